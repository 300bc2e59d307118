"""Planted documents are found, named by their file, and chance is not taken for memory."""
import json

import numpy as np
import pytest
from planted import HEADER, LEAKED, PLANTED, TEXTS, UNIQUE, plant, words

from jaxlm import config as configs
from jaxlm.data import store, suffixes
from jaxlm.errors import JaxlmError
from jaxlm.measure import origins

PREFIX, LENGTH = 30, 30  # bytes


@pytest.fixture(scope='module')
def index(tmp_path_factory):
  """An index of files of plain documents; in planted.jsonl one document 50 times, in others one that is there once."""
  folder = tmp_path_factory.mktemp('origins')
  config = configs.default()
  plant(folder, config)
  (s,), _ = store.prepare(config)
  heldout = {bytes(s.read(d)[1:-1].astype(np.uint8)).decode() for d in s.heldout}
  assert len(heldout) > 2 and not heldout & {PLANTED, UNIQUE, *TEXTS['leaked']}
  return suffixes.index(s)


def ids(text):
  return list(text.encode())


class Reciter:
  """A fake model that knows some texts by heart, and else says what it always says."""

  def __init__(self, *texts, otherwise='x'):
    self.texts, self.otherwise, self.batches = [text.encode() for text in texts], otherwise.encode(), []

  def __call__(self, prompts, length):
    self.batches.append(len(prompts))
    return [self._one(bytes(prompt), length) for prompt in prompts]

  def _one(self, prompt, length):
    for text in self.texts:
      if prompt in text:
        at = text.index(prompt) + len(prompt)
        return list(text[at:at + length])
    return list((self.otherwise * length)[:length])


def measured(index, model, **more):
  usual = dict(prefix=PREFIX, length=LENGTH, samples=200, draws=10 ** 6)
  result = origins.memorised(index, model, **dict(usual, **more))
  assert json.loads(json.dumps(result)) == result
  return result, {row['repeats']: row for row in result['rows']}


# ---- training documents behind a text ----------------------------------------------------------------------------


def test_passages_are_named_with_their_files_the_least_likely_first(index):
  text = 'Zq! ' + UNIQUE[20:60] + ' QQ? ' + PLANTED[:150] + ' Zq!'
  result = origins.provenance(index, ids(text), shortest=20, most=3, decode=lambda ids: bytes(ids).decode())
  assert json.loads(json.dumps(result)) == result
  planted, unique = result['rows']
  assert text[planted['start']:planted['end']] in PLANTED and planted['tokens'] >= 150
  assert (planted['occurrences'], planted['documents'], len(planted['sources'])) == (50, 50, 3)
  assert {source['file'] for source in planted['sources']} == {'planted.jsonl'}
  assert (unique['occurrences'], unique['sources'][0]['file'], unique['sources'][0]['offset']) == (1, 'unique.jsonl', 0)
  source = planted['sources'][1]
  path = index.store.folder.parents[1] / source['file']
  assert json.loads(path.read_bytes()[source['offset']:].split(b'\n')[0])['text'] == PLANTED
  assert index.store.read(source['document'], source['start'], source['start'] + 9).tolist() == ids(
      text[planted['start']:planted['start'] + 9])
  assert '50 times in 50 documents, planted.jsonl at byte 0' in planted['line'] and PLANTED[:150] in planted['line']
  assert result['covered'] == (planted['tokens'] + unique['tokens']) / len(text)


def test_passages_are_the_matches_that_lie_in_no_other(index):
  rng = np.random.default_rng(0)
  text = sum((index.store.read(int(d))[a:a + 25].tolist() for d, a in zip(rng.choice(index.store.train, 8),
                                                                         rng.integers(1, 60, 8))), [])
  found = {(a, b) for a in range(len(text)) for b in range(a + 5, len(text) + 1) if index.count(text[a:b])}
  wanted = {(a, b) for a, b in found if not found & {(a - 1, b), (a, b + 1)}}
  rows = origins.provenance(index, text, shortest=5)['rows']
  assert {(row['start'], row['end']) for row in rows} == wanted and len(rows) == len(wanted)


def test_a_text_of_its_own_has_no_passages(index):
  result = origins.provenance(index, ids('ZQ!? ' * 10))
  assert result['rows'] == [] and result['covered'] == 0
  assert origins.provenance(index, [])['rows'] == []


# ---- text known by heart -----------------------------------------------------------------------------------------


def test_a_document_planted_often_is_found_in_its_bucket_and_no_other_is(index):
  result, rows = measured(index, Reciter(PLANTED))
  assert rows['11-100']['memorised'] == rows['11-100']['texts'] > 100 and rows['11-100']['above_chance']
  assert rows['1']['memorised'] == rows['1']['near'] == 0 and not rows['1']['above_chance']
  assert rows['0']['memorised'] == 0 and rows['0']['texts'] > 100
  assert {text['file'] for text in result['found']} == {'planted.jsonl'}
  assert all(text['repeats'] == 50 and bytes(text['target']).decode() in PLANTED for text in result['found'])
  room = lambda lengths: np.maximum(lengths - PREFIX - LENGTH + 1, 0).sum()
  all_places = room(index.store.lengths[index.store.train] - 2)
  assert result['share'] == 50 * room(len(PLANTED)) / all_places
  assert 'above chance' in rows['11-100']['line'] and 'seen 50 times, recited: planted' in result['found'][0]['line']


def test_a_document_seen_once_is_flagged_only_if_it_is_recited(index):
  result, rows = measured(index, Reciter(), samples=10 ** 6)
  assert result['found'] == [] and result['share'] == 0
  result, rows = measured(index, Reciter(UNIQUE), samples=10 ** 6)
  assert rows['1']['memorised'] == len(result['found']) == len(UNIQUE) - PREFIX - LENGTH + 1
  assert {(text['file'], text['repeats']) for text in result['found']} == {('unique.jsonl', 1)}


def test_a_header_after_ever_new_text_is_predictable(index):
  headers = [bytes(index.store.read(int(d))[1:-1].astype(np.uint8)).decode() for d in index.store.train
             if index.store.provenance(int(d))[0] == 'headers.jsonl']
  class Knows(Reciter):
    def _one(self, prompt, length):  # the header from any of its beginnings on, however the text before it went
      cut = max((n for n in range(len(HEADER)) if prompt.endswith(HEADER[:n].encode())), default=0)
      return ids(HEADER[cut:cut + length]) if any(prompt.decode() in h for h in headers) else super()._one(prompt, 5)
  result, rows = measured(index, Knows(), samples=10 ** 6)
  assert rows['1']['predictable'] == rows['1']['near'] >= rows['1']['exact'] > 100 and rows['1']['memorised'] == 0
  assert all(text['repeats'] > 1 for text in result['found'])


def test_runs_that_a_shuffled_prefix_gives_too_are_predictable(index, tmp_path):
  config = configs.default()
  text = 'abc' + 'x' * 200
  (tmp_path / 'a.jsonl').write_text(json.dumps(dict(text=text)) + '\n')
  config.data.update(source='jsonl', paths=str(tmp_path / '*.jsonl'), store=str(tmp_path / 'stores'), holdout=0.0)
  (s,), _ = store.prepare(config)
  result, rows = measured(suffixes.index(s), Reciter())
  assert rows['1']['exact'] == rows['1']['predictable'] > 0 and result['found'] == []
  assert rows['1']['above_chance'] is None and 'no held-out text' in rows['1']['line']


def test_a_phrase_said_everywhere_is_predictable(index):
  result, rows = measured(index, Reciter(otherwise=UNIQUE[60:60 + LENGTH]), samples=10 ** 6)
  assert rows['1']['exact'] == 1 and rows['1']['predictable'] == rows['1']['near'] and result['found'] == []


def test_reciting_with_few_edits_is_near(index):
  class Slips(Reciter):
    def _one(self, prompt, length):
      said = super()._one(prompt, length)
      return said[:5] + [33] + said[5:-1]  # one put in, one lost: two edits
  result, rows = measured(index, Slips(PLANTED))
  assert rows['11-100']['exact'] == 0 and rows['11-100']['near'] == rows['11-100']['texts']
  assert {text['distance'] for text in result['found']} == {2} and 'but for 2 edits' in result['found'][0]['line']
  assert measured(index, Slips(PLANTED), near=0.05)[0]['found'] == []


def test_the_result_does_not_depend_on_the_batch_but_on_the_seed(index):
  one, many = Reciter(PLANTED, UNIQUE), Reciter(PLANTED, UNIQUE)
  first = measured(index, one, samples=50, batch_size=1)[0]
  assert first == measured(index, many, samples=50, batch_size=64)[0]
  assert set(one.batches) == {1} and max(many.batches) == 64
  assert first['found'] != measured(index, many, samples=50, seed=1)[0]['found']


def test_a_model_that_stops_early_or_goes_on_is_measured_all_the_same(index):
  class Stops(Reciter):
    def _one(self, prompt, length):
      return super()._one(prompt, length)[:length // 2]
  assert measured(index, Stops(PLANTED))[1]['11-100']['near'] == 0
  class GoesOn(Reciter):
    def _one(self, prompt, length):
      return super()._one(prompt, length) + [1] * 9
  assert measured(index, GoesOn(PLANTED))[1]['11-100']['memorised'] > 100


def test_what_cannot_be_measured_is_said(index):
  with pytest.raises(JaxlmError, match='prefix [+] length = 9050 tokens, the longest has'):
    origins.memorised(index, Reciter(), prefix=9000)
  with pytest.raises(JaxlmError, match='each of 64 prompts, got 1'):
    origins.memorised(index, lambda prompts, length: [[1]], prefix=PREFIX, length=LENGTH)


@pytest.mark.parametrize('repeats, name', [(0, '0'), (1, '1'), (2, '2-10'), (10, '2-10'), (11, '11-100'),
                                           (100, '11-100'), (101, '101-1000'), (10 ** 6, '100001-1000000')])
def test_buckets_are_powers_of_ten(repeats, name):
  assert origins._bucket(repeats) == name


def test_edit_distances_are_those_of_the_recursion():
  def distance(a, b):
    if not a or not b:
      return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))
  rng = np.random.default_rng(0)
  said = [rng.integers(0, 3, rng.integers(0, 7)).tolist() for _ in range(60)]
  targets = rng.integers(0, 3, (60, 5))
  assert origins.edit_distances(said, targets).tolist() == [distance(a, b) for a, b in zip(said, targets.tolist())]


# ---- leaked tests ------------------------------------------------------------------------------------------------


def contaminated(index, texts, **more):
  result = origins.contamination(index, [ids(text) for text in texts], **dict(dict(n=40, least=20), **more))
  assert json.loads(json.dumps(result)) == result
  return result


def test_a_leaked_example_is_found_and_named_and_clean_ones_are_not(index):
  clean = [words(f'test {i}') for i in range(20)]
  result = contaminated(index, [*clean, LEAKED])
  assert (result['flagged'], result['clean'], result['undecided'], result['any']) == (1, 20, 0, 1)
  row = result['rows'][-1]
  assert (row['verdict'], row['ngrams'], row['covered'], row['longest']) == ('flagged', 1, 1, 1)
  assert [source['file'] for source in row['sources']] == ['leaked.jsonl'] and 'leaked.jsonl at byte 0' in row['line']
  assert all(not row['sources'] and row['ngrams'] == 0 for row in result['rows'][:-1])


def test_the_threshold_is_the_share_of_tokens_in_ngrams_of_the_store(index):
  own = 'ZQ!?' * 100
  text = own[:300] + LEAKED[:100]
  row, = contaminated(index, [text])['rows']
  assert row['covered'] == 0.25 and row['ngrams'] == 61 / 361 and row['longest'] == 0.25
  verdict = lambda threshold: contaminated(index, [text], threshold=threshold)['rows'][0]['verdict']
  assert verdict(0.25) == verdict(0.0) == 'flagged' and verdict(0.26) == 'clean'
  assert contaminated(index, [own], threshold=0.0)['rows'][0]['verdict'] == 'clean'


def test_passages_shorter_than_n_do_not_count(index):
  assert contaminated(index, [LEAKED[:39] + 'ZQ!?' * 10])['rows'][0]['ngrams'] == 0
  assert contaminated(index, [LEAKED[:40] + 'ZQ!?' * 10])['rows'][0]['ngrams'] == 1 / 41


def test_short_examples_are_never_silently_clean(index):
  result = contaminated(index, [LEAKED[10:40], 'Q' * 30, LEAKED[10:20], 'QQ', ''])
  assert [row['verdict'] for row in result['rows']] == ['flagged', 'clean', 'undecided', 'undecided', 'undecided']
  assert [row['note'] for row in result['rows']] == [
      'shorter than n: 20-grams instead', 'shorter than n: 20-grams instead',
      'too short to tell, the store has all of it', 'too short to tell, the store has not all of it', 'empty']
  assert all(row['note'] in row['line'] for row in result['rows'])
  assert (result['share'], result['undecided']) == (0.5, 3)
  with pytest.raises(JaxlmError, match='least=9, n=8'):
    contaminated(index, [LEAKED], n=8, least=9)
