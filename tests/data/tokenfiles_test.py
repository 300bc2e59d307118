"""Token files of nanoGPT, llm.c and Megatron-LM, written as those programs write them."""
import struct

import numpy as np
import pytest
from corpora import corpus, restarts_anywhere, tokens_of

from jaxlm.data import sources, store, tokenfiles, tokenizers
from jaxlm.errors import JaxlmError

END = 256


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(store, 'SHARD_BYTES', 2000)
  monkeypatch.setattr(tokenfiles, 'SCAN', 16)


def write_nanogpt(folder, documents):
  """data/openwebtext/prepare.py: the end after each document, two bytes an id."""
  np.array([i for ids in documents for i in [*ids, END]], np.uint16).tofile(folder / 'train.bin')


def write_llmc(folder, documents, magic=20240520, version=1, dtype=np.uint16):
  """dev/data/data_common.py and fineweb.py: the end before each document, under 256 int32."""
  flat = [i for ids in documents for i in [END, *ids]]
  header = np.zeros(256, np.int32)
  header[:3] = magic, version, len(flat)
  (folder / 'train.bin').write_bytes(header.tobytes() + np.array(flat, dtype).tobytes())


def write_megatron(folder, documents, code=8, dtype=np.uint16, sentences=1, modes=False):
  """megatron/core/datasets/indexed_dataset.py: documents of one or more sequences, an end after each document."""
  flat = [[*ids, END] for ids in documents]
  pieces = [part.tolist() for ids in flat for part in np.array_split(ids, sentences)]
  with open(folder / 'train.bin', 'wb') as f:
    for piece in pieces:
      f.write(np.array(piece, dtype).tobytes(order='C'))
  lengths = [len(p) for p in pieces]
  pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
  with open(folder / 'train.idx', 'wb') as f:
    f.write(b'MMIDIDX\x00\x00' + struct.pack('<Q', 1) + struct.pack('<B', code) + struct.pack('<Q', len(pieces))
            + struct.pack('<Q', len(flat) + 1) + np.array(lengths, np.int32).tobytes()
            + np.array(pointers, np.int64).tobytes()
            + (np.arange(len(flat) + 1, dtype=np.int64) * sentences).tobytes()
            + bytes(len(pieces)) * modes)


@pytest.mark.parametrize('source, write, options', [
    ('nanogpt', write_nanogpt, {}), ('llmc', write_llmc, {}),
    ('llmc', write_llmc, dict(magic=20240801, version=7, dtype=np.uint32)),
    ('megatron', write_megatron, {}), ('megatron', write_megatron, dict(code=4, dtype=np.int32, sentences=3)),
    ('megatron', write_megatron, dict(code=5, dtype=np.int64, modes=True))])
def test_the_tokens_are_those_of_the_same_documents_as_json_lines(source, write, options, tmp_path, monkeypatch):
  config, texts = corpus(tmp_path)
  expected = tokens_of(config)
  (tmp_path / 'files').mkdir()
  write(tmp_path / 'files', [tokenizers.bytes_tokenizer().encode(t) for t in texts], **options)
  config.data.update(source=source, paths=str(tmp_path / 'files' / '*'))
  monkeypatch.setattr(tokenizers.Tokenizer, 'encode_batch', None)
  assert tokens_of(config) == expected
  (s,), _ = store.prepare(config)
  assert s.manifest['shards'] > 3 and s.manifest['is_tokens']
  assert [s.text(i) for i in s.heldout] == [texts[i] for i in s.heldout] != []
  made = sources.make(config.data, source, config.data.paths)
  assert restarts_anywhere(made, bos=END, eos=END)
  for i, document in enumerate(made.documents(bos=END, eos=END)):
    if made.unit == 'byte':
      dtype = document.ids.dtype
      raw = open(made.paths[document.file], 'rb').read()[document.offset:document.end]
      assert np.frombuffer(raw, dtype).tolist() == document.ids.tolist() == expected[i][1:-1]
    else:
      assert document.offset == i and made.names[document.file] == 'train.idx'


def test_a_flat_file_without_ends_is_one_document(tmp_path):
  np.arange(200, dtype=np.uint16).tofile(tmp_path / 'train.bin')
  config, _ = corpus(tmp_path)
  config.data.update(source='nanogpt', paths=str(tmp_path / 'train.bin'))
  assert tokens_of(config) == [[END, *range(200), END]]


@pytest.mark.parametrize('source, content, message', [
    ('nanogpt', b'abc', 'train.bin has 3 bytes, an odd number; nanoGPT writes 16 bits a token. Restore it'),
    ('nanogpt', struct.pack('<3i', 20240520, 1, 2) + bytes(1012 + 4), "llm.c's header; set config.data.source='llmc'"),
    ('nanogpt', np.array([1, 300, 2, 999], np.uint16).tobytes(),
     "train.bin: the document at byte 0 holds id 999, but tokenizer 'bytes' has 258 ids; set config.data.tokenizer"),
    ('llmc', b'abc', 'is no token file of llm.c: wanted 1,024 bytes .* got 3 bytes in all'),
    ('llmc', struct.pack('<3i', 20240521, 1, 2) + bytes(1012 + 4), 'got magic number 20240521, version 1. Restore it'),
    ('llmc', struct.pack('<3i', 20240520, 2, 2) + bytes(1012 + 4), 'got magic number 20240520, version 2'),
    ('llmc', struct.pack('<3i', 20240520, 1, 3) + bytes(1012 + 4), 'its header tells 3 tokens, but 4 bytes follow it, '
                                                                   'wanted 6')])
def test_damaged_flat_files_are_one_clear_line(source, content, message, tmp_path):
  (tmp_path / 'train.bin').write_bytes(content)
  config, _ = corpus(tmp_path)
  config.data.update(source=source, paths=str(tmp_path / 'train.bin'))
  with pytest.raises(JaxlmError, match=message):
    store.prepare(config)


@pytest.mark.parametrize('harm, message', [
    (lambda idx: b'X' + idx[1:], r"train.idx is no index of Megatron-LM, or is damaged: it begins with b'XMIDIDX"),
    (lambda idx: idx[:20], 'it has 20 bytes, and 34 of them are the header'),
    (lambda idx: idx[:9] + b'\2' + idx[10:], 'wanted version 1, got 2'),
    (lambda idx: idx[:17] + b'\6' + idx[18:], 'its type code is 6, wanted one of 1, 2, 3, 4, 5, 8'),
    (lambda idx: idx[:-3], 'sequences and 3 bounds of documents need 82 bytes, it has 79'),
    (lambda idx: idx[:-8] + bytes(8), 'its bounds of documents do not rise from 0 to 2'),
    (lambda idx: idx[:34] + b'\x63' + idx[35:], 'it points beyond the 14 bytes of train.bin')])
def test_a_damaged_index_is_one_clear_line(harm, message, tmp_path):
  (tmp_path / 'files').mkdir()
  write_megatron(tmp_path / 'files', [[1, 2], [3, 4, 5]])
  index = tmp_path / 'files' / 'train.idx'
  index.write_bytes(harm(index.read_bytes()))
  config, _ = corpus(tmp_path)
  config.data.update(source='megatron', paths=str(index))
  with pytest.raises(JaxlmError, match=message):
    store.prepare(config)


def test_ids_below_zero_are_refused(tmp_path):
  (tmp_path / 'files').mkdir()
  write_megatron(tmp_path / 'files', [[1, -5]], code=4, dtype=np.int32)
  config, _ = corpus(tmp_path)
  config.data.update(source='megatron', paths=str(tmp_path / 'files' / '*'))
  with pytest.raises(JaxlmError, match='the document at document 0 holds id -5'):
    store.prepare(config)


def test_an_index_without_its_tokens_is_refused(tmp_path):
  write_megatron(tmp_path, [[1, 2]])
  (tmp_path / 'train.bin').unlink()
  config, _ = corpus(tmp_path)
  with pytest.raises(JaxlmError, match='there is no .*train.bin'):
    sources.make(config.data, 'megatron', str(tmp_path / '*.idx'))


def test_compressed_token_files_are_refused(tmp_path):
  (tmp_path / 'a.bin.gz').write_bytes(b'')
  config, _ = corpus(tmp_path)
  with pytest.raises(JaxlmError, match='a.bin.gz is compressed; token files are read in place'):
    sources.make(config.data, 'nanogpt', str(tmp_path / '*.gz'))


def test_no_tokenizer_is_trained_on_tokens(tmp_path):
  np.arange(200, dtype=np.uint16).tofile(tmp_path / 'train.bin')
  config, _ = corpus(tmp_path)
  config.data.update(source='nanogpt', paths=str(tmp_path / 'train.bin'), tokenizer='bpe')
  with pytest.raises(JaxlmError, match="Source 'nanogpt' holds tokens, so no tokenizer can be trained here"):
    store.prepare(config)
