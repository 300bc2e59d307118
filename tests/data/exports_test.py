"""What goes out comes in again: the same tokens."""
import json

import numpy as np
import pytest
from corpora import corpus, tokens_of

from jaxlm.data import exports, store, tokenizers
from jaxlm.errors import JaxlmError

READ_BACK = [('parquet', 'train-*.parquet', 'tokens'), ('parquet', 'train-*.parquet', 'text'),
             ('arrayrecord', 'train-*.arrayrecord', 'tokens'), ('arrayrecord', 'train-*.arrayrecord', 'text'),
             ('nanogpt', 'train.bin', 'text'), ('llmc', 'train.bin', 'text'), ('megatron', 'train.idx', 'text')]


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(store, 'SHARD_BYTES', 2000)
  monkeypatch.setattr(exports, 'PART_TOKENS', 3000)
  monkeypatch.setattr(exports, 'GROUP_TOKENS', 700)


@pytest.mark.parametrize('ends', [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize('name, files, field', READ_BACK)
def test_documents_that_went_out_come_in_with_the_same_tokens(name, files, field, ends, tmp_path):
  if name == 'parquet':
    pytest.importorskip('pyarrow')
  config, _ = corpus(tmp_path)
  config.data.update(bos=ends[0], eos=ends[1])
  prepared = store.prepare(config)
  (s,) = prepared.stores
  written = exports.export(prepared, name, tmp_path / 'out')
  assert not list((tmp_path / 'out').glob('*.tmp'))
  assert {p.name[:3] for p in written} == {'tra', 'val' if name in ('nanogpt', 'llmc') else 'hel'}
  assert name not in ('parquet', 'arrayrecord') or len(written) > 2
  config.data.update(source=name, paths=str(tmp_path / 'out' / files), text_field=field, holdout=0.0)
  assert tokens_of(config) == [s.read(i).tolist() for i in s.train]


def test_records_tell_where_a_document_came_from(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet')
  config, texts = corpus(tmp_path)
  prepared = store.prepare(config)
  (s,) = prepared.stores
  exports.export(prepared, 'parquet', tmp_path / 'out')
  rows = [row for file in sorted((tmp_path / 'out').glob('heldout*')) for row in parquet.read_table(file).to_pylist()]
  assert [(row['file'], row['offset'], row['text']) for row in rows] == [
      (*s.provenance(i), texts[i]) for i in s.heldout]
  raw = (tmp_path / 'a.jsonl').read_bytes()
  assert json.loads(raw[rows[0]['offset']:].split(b'\n')[0])['text'] == rows[0]['text']


def test_sources_of_a_mixture_go_to_folders_of_their_names(tmp_path):
  config, _ = corpus(tmp_path / 'x')
  corpus(tmp_path / 'y', 30, seed=1)
  config.data.mixture = (('ex', 'jsonl', str(tmp_path / 'x' / '*.jsonl'), 2),
                         ('why', 'jsonl', str(tmp_path / 'y' / '*.jsonl'), 1))
  written = exports.export(store.prepare(config), 'nanogpt', tmp_path / 'out')
  assert [p.relative_to(tmp_path / 'out').as_posix() for p in written] == [
      'ex/train.bin', 'ex/val.bin', 'why/train.bin', 'why/val.bin']


def test_what_a_format_cannot_hold_is_one_clear_line(tmp_path):
  config, _ = corpus(tmp_path)
  prepared = store.prepare(config)
  with pytest.raises(JaxlmError, match="Unknown export format 'parqet'.*Did you mean 'parquet'"):
    exports.export(prepared, 'parqet', tmp_path / 'out')
  with pytest.raises(JaxlmError, match='is not empty; give a new folder'):
    exports.export(prepared, 'nanogpt', tmp_path)
  with pytest.raises(JaxlmError, match='is no folder'):
    exports.export(prepared, 'nanogpt', tmp_path / 'a.jsonl')
  wide = tokenizers.bytes_tokenizer()
  wide.vocab = tokenizers.Vocab(size=70_000, eos=256)
  with pytest.raises(JaxlmError, match="nanoGPT's files hold 16 bits a token, tokenizer 'bytes' has 70000 ids"):
    exports.export(store.Prepared(prepared.stores, wide), 'nanogpt', tmp_path / 'out')
  wide.vocab = tokenizers.Vocab(size=300)
  with pytest.raises(JaxlmError, match='no end-of-text token, so documents in a flat file could not be told apart'):
    exports.export(store.Prepared(prepared.stores, wide), 'llmc', tmp_path / 'out')


def test_larger_vocabularies_go_out_in_32_bits(tmp_path):
  config, _ = corpus(tmp_path, 5)
  config.data.holdout = 0.0
  prepared = store.prepare(config)
  wide = tokenizers.bytes_tokenizer()
  wide.vocab = tokenizers.Vocab(size=70_000, eos=69_999)
  exports.export(store.Prepared(prepared.stores, wide), 'llmc', tmp_path / 'llmc')
  exports.export(store.Prepared(prepared.stores, wide), 'megatron', tmp_path / 'megatron')
  assert np.fromfile(tmp_path / 'llmc' / 'train.bin', '<u4', offset=1024)[0] == 69_999
  assert np.fromfile(tmp_path / 'megatron' / 'train.bin', '<i4')[-1] == 69_999
