"""The token store: what is kept, killed preparations, damage, split, reuse."""
import gzip
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from corpora import corpus

from jaxlm import config as configs
from jaxlm.data import sources, store, tokenizers
from jaxlm.errors import JaxlmError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(store, 'SHARD_BYTES', 2000)


def test_every_document_is_there_between_its_end_tokens(tmp_path):
  config, texts = corpus(tmp_path)
  (s,), tokenizer = store.prepare(config)
  assert s.manifest['shards'] > 3 and len(s.lengths) == len(texts)
  for i, text in enumerate(texts):
    assert s.read(i).tolist() == [256, *tokenizer.encode(text), 256]
    np.testing.assert_array_equal(s.read(i, 1, 5), s.read(i)[1:5])
    file, offset = s.provenance(i)
    line = (tmp_path / file).read_bytes()[offset:].split(b'\n')[0]
    assert json.loads(line)['text'] == text
  assert s.manifest['tokens'] == s.lengths.sum() and s.manifest['max_id'] == 256
  assert s.manifest['text_bytes'] == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize('bos, eos', [(True, False), (False, True), (False, False)])
def test_end_tokens_are_a_choice(tmp_path, bos, eos):
  config, texts = corpus(tmp_path, 5)
  config.data.update(bos=bos, eos=eos)
  (s,), tokenizer = store.prepare(config)
  assert s.read(0).tolist() == [256] * bos + tokenizer.encode(texts[0]) + [256] * eos


def test_the_split_depends_on_the_document_alone(tmp_path):
  config, texts = corpus(tmp_path / 'x', 200)
  (s,), _ = store.prepare(config)
  assert sorted([*s.train, *s.heldout]) == list(range(200)) and 20 <= len(s.heldout) <= 60
  assert [s.text(i) for i in s.heldout] == [texts[i] for i in s.heldout]
  other, _ = corpus(tmp_path / 'y', 1)
  with open(tmp_path / 'y' / 'a.jsonl', 'a') as f:
    for text in reversed(texts):
      f.write(json.dumps(dict(text=text)) + '\n')
  (mixed,), _ = store.prepare(other)
  assert {texts[i] for i in s.heldout} - {texts[0]} == {mixed.text(i) for i in mixed.heldout} - {texts[0]}
  with pytest.raises(IndexError):
    s.text(int(s.train[0]))


def test_gzip_is_measured_on_the_same_text(tmp_path):
  config, texts = corpus(tmp_path, 200)
  (s,), _ = store.prepare(config)
  for max_tokens in (1, 1000, 10 ** 9):
    sample = s.heldout_sample(max_tokens)
    data = ''.join(texts[i] for i in sample.documents).encode()
    assert (sample.text_bytes, sample.gzip_bytes) == (len(data), len(gzip.compress(data, 9)))
    assert s.lengths[sample.documents].sum() <= max_tokens or len(sample.documents) == 1
    assert s.heldout_sample(max_tokens).gzip_bytes == sample.gzip_bytes  # from the cache
  assert len(sample.documents) == len(s.heldout)


def _contents(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(pathlib.Path(folder).rglob('*'))
          if p.is_file() and p.suffix != '.lock' and 'hashes' not in p.name}


def test_a_preparation_that_failed_anywhere_continues_to_the_same_bytes(tmp_path, monkeypatch):
  config, _ = corpus(tmp_path)
  store.prepare(config)
  whole = _contents(config.data.store)
  config.data.store = str(tmp_path / 'again')
  write, failures = store.write, 0

  class Killed(BaseException):
    pass

  def failing(path, data):
    nonlocal countdown
    countdown -= 1
    if countdown < 0:
      path.with_name(path.name + '.1.tmp').write_bytes(bytes(data)[:7])  # what a kill leaves
      raise Killed
    write(path, data)

  monkeypatch.setattr(store, 'write', failing)
  while True:  # every attempt gets two files further, so that each write is once the last one
    countdown = 2
    countdown += 3 * (failures % 2)
    try:
      store.prepare(config)
      break
    except Killed:
      failures += 1
  assert failures > 3 and _contents(config.data.store) == whole


KILLED = '''
import sys
from jaxlm import config as configs
from jaxlm.data import store
store.SHARD_BYTES = 2000
write = store.write
def slow(path, data):
  print('writing', flush=True)
  write(path, data)
store.write = slow
config = configs.default()
config.data.update(source='jsonl', paths=sys.argv[1], store=sys.argv[2], holdout=0.2)
store.prepare(config)
print('done', flush=True)
'''


def test_kill_9_and_continue_ends_with_the_same_bytes(tmp_path):
  config, _ = corpus(tmp_path)
  store.prepare(config)
  whole = _contents(config.data.store)
  command = [sys.executable, '-c', KILLED, config.data.paths, str(tmp_path / 'again')]
  env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  for writes in (2, 9):
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for _ in range(writes):
      assert child.stdout.readline() == 'writing\n'
    child.kill()
    assert 'done' not in child.communicate()[0] and child.returncode == -signal.SIGKILL
  config.data.store = str(tmp_path / 'again')
  store.prepare(config)
  assert _contents(tmp_path / 'again') == whole


def test_a_second_process_waits_and_finds_it_done(tmp_path, monkeypatch):
  config, _ = corpus(tmp_path)
  built, build = [], store.build

  def slow(*args):
    built.append(1)
    time.sleep(0.3)
    build(*args)

  monkeypatch.setattr(store, 'build', slow)
  threads = [threading.Thread(target=store.prepare, args=(config,)) for _ in range(3)]  # flock counts open files
  [t.start() for t in threads]
  [t.join() for t in threads]
  assert len(built) == 1 and len(store.prepare(config).stores) == 1


def test_an_unchanged_corpus_is_reused_and_any_setting_makes_another_store(tmp_path, monkeypatch):
  config, _ = corpus(tmp_path)
  (first,), _ = store.prepare(config)
  monkeypatch.setattr(tokenizers.Tokenizer, 'encode_batch', None)
  assert store.prepare(config).stores[0].folder == first.folder
  monkeypatch.undo()
  keys = {first.key}
  for change in (dict(bos=False), dict(eos=False), dict(holdout=0.3), dict(tokenizer='bpe', vocab_size=270)):
    changed = config.copy_and_resolve_references()
    changed.data.update(change)
    keys.add(store.prepare(changed).stores[0].key)
  with open(tmp_path / 'a.jsonl', 'a') as f:
    f.write('{"text": "one more"}\n')
  keys.add(store.prepare(config).stores[0].key)
  assert len(keys) == 6


def test_a_trained_tokenizer_never_reads_held_out_text(tmp_path, monkeypatch):
  config, _ = corpus(tmp_path, 100)
  config.data.update(tokenizer='bpe', vocab_size=300)
  seen, train = [], tokenizers.train
  monkeypatch.setattr(tokenizers, 'train', lambda name, texts, size: train(name, seen.extend(texts) or seen, size))
  (s,), tokenizer = store.prepare(config)
  assert len(seen) == len(s.train) and not set(seen) & {s.text(i) for i in s.heldout}
  assert tokenizer.vocab.size == 300
  assert store.prepare(config).tokenizer.digest == tokenizer.digest and len(seen) == len(s.train)  # trained once


def test_a_flipped_byte_is_named_with_its_block_and_made_again(tmp_path, monkeypatch):
  monkeypatch.setattr(store, 'BLOCK', 256)
  monkeypatch.setattr('jaxlm.data.shards.BLOCK', 256)
  config, _ = corpus(tmp_path)
  (s,), _ = store.prepare(config)
  whole = _contents(config.data.store)
  file = s.folder / 'shard-00001.bin'
  data = bytearray(file.read_bytes())
  data[2 * 300] ^= 1
  file.write_bytes(data)
  (damaged,), _ = store.prepare(config)
  damaged.read(0)
  with pytest.raises(JaxlmError, match=r'block 1 \(tokens 256 to 512\) of shard-00001.bin is damaged.*delete '
                                       r'shard-00001.json there and run python -m jaxlm.prepare'):
    for i in range(len(damaged.lengths)):
      damaged.read(i)
  (s.folder / 'shard-00001.json').unlink()
  store.prepare(config)
  assert _contents(config.data.store) == whole


@pytest.mark.parametrize('suffix, harm', [('npy', 'flip'), ('txt', 'flip'), ('bin', 'cut'), ('npy', 'gone')])
def test_other_damage_is_named(tmp_path, suffix, harm):
  config, _ = corpus(tmp_path)
  (s,), _ = store.prepare(config)
  shard = next(n for n in range(9) if (s.folder / f'shard-{n:05d}.txt').stat().st_size)  # has held-out text
  file = s.folder / f'shard-{shard:05d}.{suffix}'
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.unlink() if harm == 'gone' else file.write_bytes(data if harm == 'flip' else data[:-2])
  with pytest.raises(JaxlmError, match=rf'{file.name} is damaged'):
    (again,), _ = store.prepare(config)
    again.heldout_sample(10 ** 9)
    for document in range(len(again.lengths)):
      again.read(document)


def test_files_that_change_meanwhile_are_refused(tmp_path, monkeypatch):
  config, _ = corpus(tmp_path)
  encode = tokenizers.Tokenizer.encode_batch

  def meddling(self, texts):
    with open(tmp_path / 'a.jsonl', 'a') as f:
      f.write('\n')
    return encode(self, texts)

  monkeypatch.setattr(tokenizers.Tokenizer, 'encode_batch', meddling)
  with pytest.raises(JaxlmError, match='changed while they were tokenised'):
    store.prepare(config)


def test_a_store_pickles_as_its_folder(tmp_path):
  config, _ = corpus(tmp_path)
  (s,), _ = store.prepare(config)
  s.read(0)
  copy = pickle.loads(pickle.dumps(s))
  assert len(pickle.dumps(s)) < 1000 and copy.name == s.name
  np.testing.assert_array_equal(copy.read(3), s.read(3))


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, monkeypatch):
  config, texts = corpus(tmp_path, 5)
  tokenizer = tokenizers.bytes_tokenizer()
  tokenizer.vocab = tokenizers.Vocab(size=70_000, bos=69_999, eos=256, pad=257)
  monkeypatch.setattr(tokenizers, 'bytes_tokenizer', lambda: tokenizer)
  (s,), _ = store.prepare(config)
  assert s.read(0).dtype == np.uint32 and s.read(0)[0] == 69_999


def test_mixtures_have_a_store_each(tmp_path):
  config, _ = corpus(tmp_path / 'x')
  corpus(tmp_path / 'y', 30, seed=1)
  config.data.mixture = (('ex', 'jsonl', str(tmp_path / 'x' / '*.jsonl'), 2),
                         ('why', 'jsonl', str(tmp_path / 'y' / '*.jsonl'), 1))
  stores, _ = store.prepare(config)
  assert [(s.name, len(s.lengths)) for s in stores] == [('ex', 60), ('why', 30)]


def test_an_empty_corpus_is_one_clear_line(tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n\n')
  config = configs.default()
  config.data.update(source='jsonl', paths=str(tmp_path / 'a.jsonl'), store=str(tmp_path / 'stores'))
  for tokenizer in ('bytes', 'bpe'):
    config.data.tokenizer = tokenizer
    with pytest.raises(JaxlmError, match='config.data.paths'):
      store.prepare(config)


def test_a_tokenizer_without_an_end_token_is_one_clear_line(tmp_path):
  config, _ = corpus(tmp_path)
  bare = tokenizers.hf.Tokenizer(tokenizers.models.WordLevel({'alpha': 0, 'x': 1}, unk_token='x'))
  bare.save(str(tmp_path / 'tokenizer.json'))
  config.data.tokenizer = str(tmp_path / 'tokenizer.json')
  with pytest.raises(JaxlmError, match='config.data.bos is True, but tokenizer .* has no bos token; set '
                                       'config.data.bos=False'):
    store.prepare(config)


def test_a_store_that_cannot_be_written_is_one_clear_line(tmp_path):
  config, _ = corpus(tmp_path)
  (tmp_path / 'file').write_text('')
  config.data.store = str(tmp_path / 'file')
  with pytest.raises(JaxlmError, match='Cannot prepare the token store in .*set config.data.store'):
    store.prepare(config)


def test_the_documents_of_a_run_do_not_depend_on_how_they_are_tokenised_together(tmp_path, monkeypatch):
  config, _ = corpus(tmp_path)
  store.prepare(config)
  whole = _contents(config.data.store)
  monkeypatch.setattr(store, 'BATCH_DOCUMENTS', 3)
  config.data.store = str(tmp_path / 'again')
  store.prepare(config)
  assert _contents(config.data.store) == whole


def test_sources_by_module_and_function(tmp_path):
  config, _ = corpus(tmp_path)
  config.data.update(source='jaxlm.data.sources:jsonl')
  assert len(store.prepare(config).stores[0].lengths) == 60
  assert sources.make(config.data, 'jsonl', config.data.paths).kind == 'jsonl'
