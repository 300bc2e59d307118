"""Permutations, mixtures and packing against brute force; the stream is pure."""
import collections
import pickle

import numpy as np
import pytest
from corpora import corpus

from jaxlm import config as configs
from jaxlm import objectives
from jaxlm.data import mixtures, plans, store
from jaxlm.errors import JaxlmError

# ---- permutations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 3, 100, 4095, 4096, 4097, 5000, 65_537, 100_000])
def test_a_permutation_meets_every_number_once(n):
  permuted = mixtures.Permutation(n, 3, 1)(np.arange(n))
  assert permuted.dtype == np.int64 and np.array_equal(np.sort(permuted), np.arange(n))


def test_any_element_alone_is_the_same():
  permutation = mixtures.Permutation(10 ** 9, 5)
  ks = np.random.default_rng(0).integers(0, 10 ** 9, 100)
  together = permutation(ks)
  assert [int(permutation(np.array([k]))[0]) for k in ks] == together.tolist()
  assert together.min() >= 0 and together.max() < 10 ** 9


def test_keys_give_unlike_permutations():
  orders = {tuple(mixtures.Permutation(10_000, *key)(np.arange(50)).tolist())
            for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 0), (2 ** 40,)]}
  assert len(orders) == 5


@pytest.mark.parametrize('n', [1000, 5000, 65_537, 10 ** 6])
def test_neighbours_are_uncorrelated_and_places_uniform(n):
  x = mixtures.Permutation(n, 7)(np.arange(min(n, 100_000))).astype(float) / n
  assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / np.sqrt(len(x))
  counts = np.histogram(x, 20, (0, 1))[0]
  assert ((counts - len(x) / 20) ** 2 / (len(x) / 20)).sum() < 50  # chi² of 19: above 50 once in 7,000


def test_the_order_of_examples_never_changes():
  """A run that resumes on another version must continue the same stream."""
  assert mixtures.Permutation(10, 0, 1)(np.arange(10)).tolist() == [4, 0, 1, 2, 7, 6, 9, 8, 5, 3]
  assert mixtures.Permutation(10 ** 6, 0, 1)(np.arange(5)).tolist() == [725095, 272690, 516491, 347496, 349354]


# ---- mixtures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('weights', [(1,), (1, 1), (2, 1, 2), (5, 3, 2), (1, 0, 3), (0, 1), (7, 1, 1, 1, 90),
                                     (3, 3, 0)])
def test_a_mixture_takes_each_source_in_turn_without_gap_or_repeat(weights):
  windows = [10 ** 9] * len(weights)
  schedule = mixtures.Schedule([(0, weights)], windows, seed=0, shuffle=False)
  n = 50 * sum(weights)
  source, epoch, window = schedule.locate(np.arange(n))
  taken = collections.Counter()
  for s, e, w in zip(source, epoch, window):
    assert (e, w) == (0, taken[s])
    taken[s] += 1
  assert [taken[s] for s in range(len(weights))] == [50 * w for w in weights] == schedule.counts(n)
  for m in range(0, n, 7):  # never far from the share
    share = np.bincount(source[:m], minlength=len(weights)) - m * np.array(weights) / sum(weights)
    assert np.abs(share).max() <= len(weights)


def test_weights_change_at_their_example_and_counters_go_on():
  phases = [(0, (1, 1, 1)), (100, (0, 3, 1)), (177, (2, 1, 2))]
  schedule = mixtures.Schedule(phases, [37, 11, 50], seed=0, shuffle=False)
  source, epoch, window = schedule.locate(np.arange(500))
  assert not (source[100:177] == 0).any()
  for s, n in enumerate([37, 11, 50]):
    here = source == s
    np.testing.assert_array_equal((epoch * n + window)[here], np.arange(here.sum()))
  assert schedule.counts(333) == np.bincount(source[:333], minlength=3).tolist()


def test_an_example_is_located_alike_alone_and_far_out():
  schedule = mixtures.Schedule([(0, (3, 1, 4)), (10 ** 8, (10 ** 9 + 7, 1, 10 ** 9))], [10 ** 9, 7, 10 ** 6], 3, True)
  numbers = np.array([0, 5, 10 ** 8 - 1, 10 ** 8, 10 ** 12, 3 * 10 ** 12])
  together = np.stack(schedule.locate(numbers))
  for i, n in enumerate(numbers):
    np.testing.assert_array_equal(np.stack(schedule.locate(np.array([n])))[:, 0], together[:, i])


def test_every_epoch_meets_every_window_once_in_a_new_order():
  schedule = mixtures.Schedule([(0, (1,))], [53], seed=0, shuffle=True)
  _, epoch, window = schedule.locate(np.arange(3 * 53))
  orders = window.reshape(3, 53)
  np.testing.assert_array_equal(epoch, np.repeat(range(3), 53))
  assert all(sorted(o) == list(range(53)) for o in orders) and len({tuple(o) for o in orders}) == 3


# ---- packing -----------------------------------------------------------------------------------------------------


LENGTHS = [np.array(x) for x in ([1], [2], [17], [9], [8], [1, 1, 1], [30, 1, 5, 9, 9, 16, 17, 2], [8] * 6)]
LENGTHS.append(np.random.default_rng(0).integers(1, 60, 200))


@pytest.mark.parametrize('lengths', LENGTHS, ids=lambda x: f'{len(x)}docs{x.sum()}')
@pytest.mark.parametrize('packing', list(plans.PLANNERS))
@pytest.mark.parametrize('overlap', [0, 1])
def test_every_token_but_a_documents_first_is_a_target_once(packing, lengths, overlap):
  """With no overlap: every token is in a window once."""
  raw_length = 8 + overlap
  documents = np.arange(len(lengths)) * 3 + 1
  sizes = set()
  for epoch in range(3):
    plan = plans.PLANNERS[packing].make(plans.Lengths(documents, lengths, raw_length, overlap),
                                        mixtures.Permutation(len(lengths), epoch))
    sizes.add(plan.windows)
    pieces = plan.pieces(np.arange(plan.windows))
    targets, filled = collections.Counter(), np.zeros(plan.windows, int)
    for row, document, start, end in zip(*(c.tolist() for c in pieces)):
      assert 0 <= start < end <= lengths[(document - 1) // 3]
      targets.update((document, t) for t in range(start + overlap, end))
      filled[row] += end - start
    assert targets == collections.Counter((d, t) for d, n in zip(documents.tolist(), lengths.tolist())
                                          for t in range(overlap, n))
    assert (filled <= raw_length).all()
    alone = plan.pieces(np.array([plan.windows - 1])) if plan.windows else None
    assert alone is None or alone.end.tolist() == pieces.end[pieces.row == plan.windows - 1].tolist()
    if packing in ('concatenated', 'contiguous'):
      assert (filled[:-1] == raw_length).all()
    if packing == 'padded':
      assert len(pieces.row) == plan.windows
  assert len(sizes) == 1  # an epoch has as many windows as any other


def test_best_fit_is_best_fit_decreasing():
  rng = np.random.default_rng(0)
  for _ in range(50):
    capacity = int(rng.integers(5, 40))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 80))
    bins = plans.best_fit_bins(lengths, capacity)
    rooms = []  # one item at a time
    for size in sorted(lengths.tolist(), reverse=True):
      fitting = [i for i, room in enumerate(rooms) if room >= size]
      if fitting:
        rooms[min(fitting, key=lambda i: rooms[i])] -= size
      else:
        rooms.append(capacity - size)
    assert sorted(capacity - np.bincount(bins, lengths)) == sorted(rooms)


# ---- the stream --------------------------------------------------------------------------------------------------


def stream_of(config):
  stores, tokenizer = store.prepare(config)
  return plans.Stream(config, stores, objectives.make(config, tokenizer.vocab), tokenizer.vocab)


def _small(tmp_path, **changes):
  config, texts = corpus(tmp_path)
  config.seq_len = 32
  config.data.update(changes)
  return config, texts


@pytest.mark.parametrize('packing', list(plans.PLANNERS))
def test_an_epoch_of_examples_is_the_training_text(tmp_path, packing):
  config, texts = _small(tmp_path, packing=packing)
  stream = stream_of(config)
  (windows,) = stream.schedule.windows
  batch = stream.examples(np.arange(windows))
  counted = collections.Counter(batch['targets'][batch['loss_weights'] > 0].tolist())
  (s,) = stream.stores
  expected = collections.Counter(t for d in s.train for t in s.read(d)[1:].tolist())
  assert counted == expected
  assert batch['tokens'].dtype == np.int32


@pytest.mark.parametrize('packing', list(plans.PLANNERS))
def test_examples_are_the_documents_they_say(tmp_path, packing):
  stream = stream_of(_small(tmp_path, packing=packing)[0])
  (s,) = stream.stores
  for i in range(stream.schedule.windows[0] + 3):
    example, pieces = stream.sample(i), stream.documents(i)
    tokens = np.concatenate([s.read(p['document'], p['start'], p['end']) for p in pieces])
    raw = np.append(example['tokens'], example['targets'][-1])
    np.testing.assert_array_equal(raw[:len(tokens)], tokens)
    assert (raw[len(tokens):] == 257).all()
    segments = np.repeat(np.arange(1, len(pieces) + 1), [p['end'] - p['start'] for p in pieces])[:32]
    np.testing.assert_array_equal(example['segment_ids'][:len(segments)], segments)
    assert not example['segment_ids'][len(segments):].any()
    begin = np.flatnonzero(np.diff(segments, prepend=0))
    np.testing.assert_array_equal(example['positions'][:len(segments)],
                                  np.arange(len(segments)) - begin[segments - 1])
    assert (pieces[0]['file'], pieces[0]['offset']) == s.provenance(pieces[0]['document'])


def test_a_sample_is_a_pure_function_of_config_and_number(tmp_path):
  config, _ = _small(tmp_path)
  config.data.mixture = (('a', 'jsonl', config.data.paths, 2), ('b', 'jsonl', config.data.paths, 1),
                         ('c', 'jsonl', config.data.paths, 2))
  config.data.phases = ((20, (0, 1, 1)),)
  stream, other = stream_of(config), stream_of(config)
  forward = stream.examples(np.arange(100))
  for i in np.random.default_rng(0).permutation(100):
    for key, value in other.sample(int(i)).items():
      np.testing.assert_array_equal(value, forward[key][i])
  copy = pickle.loads(pickle.dumps(other))
  np.testing.assert_array_equal(copy.examples(np.arange(100))['tokens'], forward['tokens'])


def test_seeds_and_epochs_differ(tmp_path):
  config, _ = _small(tmp_path)
  stream = stream_of(config)
  n = stream.schedule.windows[0]
  config.seed = 1
  orders = [stream.examples(np.arange(n))['tokens'], stream.examples(np.arange(n, 2 * n))['tokens'],
            stream_of(config).examples(np.arange(n))['tokens']]
  assert not any(np.array_equal(a, b) for a, b in zip(orders, orders[1:] + orders[:1]))


def test_without_shuffling_documents_come_in_their_order(tmp_path):
  stream = stream_of(_small(tmp_path, shuffle=False)[0])
  (s,) = stream.stores
  batch = stream.examples(np.arange(stream.schedule.windows[0]))
  text = np.concatenate([s.read(d) for d in s.train])
  np.testing.assert_array_equal(batch['tokens'].ravel()[:len(text)], text)


def test_random_objectives_draw_by_seed_and_number(tmp_path):
  config, _ = _small(tmp_path)
  stores, tokenizer = store.prepare(config)
  noisy = objectives.Objective(lambda item, rng: dict(tokens=item['tokens'], noise=rng.random(3)), lambda t: t, 'full')
  stream = plans.Stream(config, stores, noisy, tokenizer.vocab)
  batch = stream.examples(np.arange(20))
  np.testing.assert_array_equal(stream.sample(7)['noise'], batch['noise'][7])
  assert len(np.unique(batch['noise'])) == 60


def test_large_plans_are_kept_and_read_again(tmp_path, monkeypatch):
  config, _ = _small(tmp_path, packing='best_fit')
  expected = stream_of(config).examples(np.arange(300))['tokens']
  monkeypatch.setattr(plans, 'CACHED_FROM', 1)
  for packing in ('best_fit', 'concatenated', 'contiguous', 'padded'):
    config.data.packing = packing
    first = stream_of(config).examples(np.arange(300))['tokens']
    monkeypatch.setitem(plans.PLANNERS, packing, plans.PLANNERS[packing]._replace(make=None))
    np.testing.assert_array_equal(stream_of(config).examples(np.arange(60))['tokens'], first[:60])
    if packing == 'best_fit':
      np.testing.assert_array_equal(first, expected)
    monkeypatch.undo()
    monkeypatch.setattr(plans, 'CACHED_FROM', 1)
  folder = stream_of(config).stores[0].folder / 'plans'
  assert len(list(folder.iterdir())) <= plans.CACHED_PLANS


def test_ids_beyond_the_model_are_refused_by_name(tmp_path):
  config, _ = _small(tmp_path)
  config.model.vocab_size = 200
  with pytest.raises(JaxlmError, match="Source 'jsonl' was tokenised by 'bytes' and holds id 257, but the model has "
                                       '200 ids; set config.model.vocab_size to 0 or at least 258'):
    stream_of(config)


def test_a_source_without_training_text_is_refused(tmp_path):
  config, _ = _small(tmp_path, holdout=0.999999)
  with pytest.raises(JaxlmError, match="Source 'jsonl' has no text to train on: 60 documents, 60 of them held out"):
    stream_of(config)


@pytest.mark.parametrize('phases, message', [
    (((10, (1, 2)),), 'are 2, but there are 1 sources'),
    (((10, (1,)), (10, (2,))), 'first examples must rise'),
    (((0, (1,)),), 'first examples must rise')])
def test_phases_that_do_not_fit_are_refused(tmp_path, phases, message):
  config, _ = _small(tmp_path, phases=phases)
  with pytest.raises(JaxlmError, match=message):
    stream_of(config)


def test_an_unknown_packing_is_refused():
  with pytest.raises(JaxlmError, match="Unknown packing 'bestfit'"):
    plans.lookup(plans.PLANNERS, 'bestfit', 'packing')
  assert configs.default().data.packing in plans.PLANNERS
