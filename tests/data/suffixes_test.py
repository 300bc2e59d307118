"""Suffix arrays against brute force; how they are kept."""
import json

import numpy as np
import pytest
from corpora import corpus

from jaxlm.data import store, suffixes
from jaxlm.errors import JaxlmError


def _store(folder, alphabet='ab', documents=30, most=40, holdout=0.2, seed=0):
  config, _ = corpus(folder, 1)
  rng = np.random.default_rng(seed)
  texts = [''.join(rng.choice([*alphabet], rng.integers(1, most))) for _ in range(documents)]
  (folder / 'a.jsonl').write_text(''.join(json.dumps(dict(text=text)) + '\n' for text in texts))
  config.data.holdout = holdout
  (s,), _ = store.prepare(config)
  return s


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A store of two letters, its index in several parts, and its training documents."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(suffixes, 'PART_TOKENS', 150)
    s = _store(tmp_path_factory.mktemp('small'))
    index = suffixes.index(s)
    assert len(index._parts) > 2
  return s, index, {int(d): s.read(int(d)).tolist() for d in s.train}


def _places(documents, ids):
  return [(d, i) for d, text in documents.items() for i in range(len(text)) if text[i:i + len(ids)] == ids]


# ---- the order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('top', [1, 2, 5, 300, 70_000])
@pytest.mark.parametrize('seed', range(4))
def test_places_are_in_the_order_of_what_follows(top, seed):
  rng = np.random.default_rng(seed)
  text = np.append(rng.integers(0 if seed % 2 else 1, min(top, 4) + 1, 400) * (top // min(top, 4)), 0)
  text = text.astype(np.uint16 if top < 1 << 16 else np.uint32)
  ends = np.flatnonzero(text == 0)
  until_end = lambda i: text[i:ends[np.searchsorted(ends, i)] + 1].tolist()
  assert suffixes.sort_places(text, top).tolist() == sorted(range(len(text)), key=lambda i: (until_end(i), i))


def test_copies_of_a_long_document_are_in_the_order_of_the_text():
  copy = np.append(np.random.default_rng(0).integers(1, 3, 1000), 0).astype(np.uint16)
  places = suffixes.sort_places(np.tile(copy, 5), 2)
  groups = places.reshape(-1, 5)
  assert (np.diff(groups, axis=1) == len(copy)).all()


# ---- questions ---------------------------------------------------------------------------------------------------


def test_counts_and_places_are_those_of_brute_force(small):
  _, index, documents = small
  rng = np.random.default_rng(1)
  for length in [1, 1, 2, 3, 5, 8, 12, 20] * 5:
    ids = rng.choice([97, 98, 256], length, p=[.49, .49, .02]).tolist()
    assert index.count(ids) == len(_places(documents, ids))
    assert index.find(ids) == _places(documents, ids)
    assert index.find(ids, most=3) == _places(documents, ids)[:3]


def test_every_sequence_of_a_training_document_is_found_where_it_stands(small):
  _, index, documents = small
  for document, text in documents.items():
    assert (document, 0) in index.find(text) and index.longest(text).tolist() == list(range(len(text), 0, -1))


def test_no_match_goes_from_one_document_into_the_next(small):
  _, index, documents = small
  for first, second in zip(list(documents.values()), list(documents.values())[1:]):
    assert index.count(first[-3:] + second[:3]) == 0
    assert index.longest(first + second)[0] == len(first)


def test_heldout_documents_are_not_indexed(tmp_path):
  s = _store(tmp_path, 'abcdefgh', most=60)
  index, long = suffixes.index(s), [int(d) for d in s.heldout if s.lengths[d] > 20]
  assert long and all(index.count(s.read(d)) == 0 for d in long)


@pytest.mark.parametrize('reach', [1, 3, 64])
def test_longest_matches_are_those_of_brute_force(small, reach, monkeypatch):
  _, index, documents = small
  monkeypatch.setattr(suffixes, 'REACH', reach)
  text = np.random.default_rng(2).choice([97, 98, 99, 256], 150, p=[.49, .48, .01, .02]).tolist()
  wanted = [max((n for n in range(1, len(text) - i + 1) if _places(documents, text[i:i + n])), default=0)
            for i in range(len(text))]
  assert index.longest(text).tolist() == wanted and 0 in wanted and max(wanted) > 5


def test_ids_that_the_tokenizer_lacks_occur_nowhere(small):
  _, index, _ = small
  for id in (-1, 257, 258, 65_535, 65_536, 65_536 + 97, 1 << 40):
    assert index.count([id]) == 0 and index.find([97, id]) == [] and index.longest([97, id, 98]).tolist() == [1, 0, 1]
  assert index.longest([]).tolist() == []
  with pytest.raises(JaxlmError, match='one id at least'):
    index.count([])


def test_parts_answer_as_one_index_does(small, tmp_path):
  s, index, documents = small
  whole = suffixes.index(s, tmp_path)
  assert len(whole._parts) == 1
  text = sum(documents.values(), [])[:200]
  np.testing.assert_array_equal(whole.longest(text), index.longest(text))
  assert whole.find([97, 98, 98]) == index.find([97, 98, 98])


# ---- files -------------------------------------------------------------------------------------------------------


def _contents(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*.*')) if p.suffix != '.lock'}


def test_an_index_is_made_once_and_is_the_same_when_made_anew(tmp_path, monkeypatch):
  s = _store(tmp_path)
  suffixes.index(s)
  suffixes.index(s, tmp_path / 'other')
  assert _contents(s.folder / 'suffixes') == _contents(tmp_path / 'other')
  monkeypatch.setattr(suffixes, 'sort_places', None)
  assert suffixes.index(s).count([97]) > 0


def test_a_build_that_was_killed_anywhere_is_begun_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(suffixes, 'PART_TOKENS', 150)
  s = _store(tmp_path)
  suffixes.index(s)
  whole = _contents(s.folder / 'suffixes')

  class Killed(BaseException):
    pass

  sync = suffixes._sync
  for last in range(len(whole)):
    left = last

    def failing(f):
      nonlocal left
      left -= 1
      if left < 0:
        f.truncate(7)  # what a kill leaves
        raise Killed
      sync(f)

    with monkeypatch.context() as patch:
      patch.setattr(suffixes, '_sync', failing)
      with pytest.raises(Killed):
        suffixes.index(s, tmp_path / 'again')
    assert not list((tmp_path / 'again').glob('*/manifest.json')) or last == len(whole) - 1
    assert not [p for p in (tmp_path / 'again').iterdir() if not p.suffix]
  suffixes.index(s, tmp_path / 'again')
  assert _contents(tmp_path / 'again') == whole


@pytest.mark.parametrize('name', ['text-00000.npy', 'places-00000.npy', 'manifest.json'])
@pytest.mark.parametrize('harm', ['missing', 'empty', 'short', 'flipped'])
def test_a_damaged_index_is_made_again(tmp_path, name, harm):
  s = _store(tmp_path)
  suffixes.index(s)
  whole = _contents(s.folder / 'suffixes')
  file, = (s.folder / 'suffixes').glob(f'*/{name}')
  data = bytearray(file.read_bytes())
  data[-5] ^= 64
  file.write_bytes(dict(missing=b'', empty=b'', short=data[:-9], flipped=data)[harm])
  if harm == 'missing':
    file.unlink()
  suffixes.index(s)
  assert _contents(s.folder / 'suffixes') == whole


def test_another_corpus_has_another_index(tmp_path):
  one, two = _store(tmp_path / 'a'), _store(tmp_path / 'b', seed=1)
  for s in (one, two):
    suffixes.index(s, tmp_path / 'kept')
  assert len(list((tmp_path / 'kept').glob('*/manifest.json'))) == 2
  text = two.read(int(two.train[0]))
  assert suffixes.index(two, tmp_path / 'kept').find(text)[0] == (two.train[0], 0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  s = _store(tmp_path)
  (tmp_path / 'file').write_text('')
  with pytest.raises(JaxlmError, match='folder=…'):
    suffixes.index(s, tmp_path / 'file')


def test_nothing_to_index_is_said(tmp_path):
  with pytest.raises(JaxlmError, match='config.data.holdout'):
    suffixes.index(_store(tmp_path, documents=3, holdout=0.999999))


def test_a_document_that_is_too_long_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(suffixes, 'PART_TOKENS', 10)
  monkeypatch.setattr(suffixes, 'MOST_TOKENS', 20)
  with pytest.raises(JaxlmError, match=r'Document \d+ of .* has \d+ tokens'):
    suffixes.index(_store(tmp_path))
