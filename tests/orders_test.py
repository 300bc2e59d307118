"""Orders: prefixes, XLNet's permutations and memory, GLM's blanks."""
import numpy as np
import pytest
from windows import FIRST, VOCAB, config_of, is_text, item_of, make, rng_of, windows

from jaxlm import orders

SAMPLES = 10_000


def test_a_prefix_is_context_and_the_rest_is_numbered():
  objective, shares = make('prefix', 'decoder', 64), []
  for i in range(300):
    e = objective.example(item_of([40, 25], 65), rng_of(i))
    for segment, size in ((1, 40), (2, 25)):
      order = e['order'][e['segment_ids'] == segment]
      known = np.count_nonzero(order == 0)
      shares.append(known / size)
      np.testing.assert_array_equal(order, np.maximum(np.arange(len(order)) - known + 1, 0))
      weights = e['loss_weights'][e['segment_ids'] == segment]
      np.testing.assert_array_equal(weights, [float(known - 1 <= i < size - 1) for i in range(len(order))])
  assert 0.22 < min(shares) and max(shares) <= 0.75 and np.mean(shares) == pytest.approx(0.5, abs=0.03)


# ---- permutation -------------------------------------------------------------------------------------------------


def test_xlnet_predicts_a_sixth_in_spans_of_words_in_random_order():
  objective, predicted, first = make('permutation', 'two_stream', 128), 0, 0
  item, lengths = item_of([128], 128), []
  for i in range(SAMPLES):
    e = objective.example(item, rng_of(i))
    used = e['loss_weights'] > 0
    predicted += np.count_nonzero(used)
    orders_ = e['query_order'][used]
    first += orders_[0] < orders_[1]
    if i < 300:
      np.testing.assert_array_equal(np.sort(orders_), np.arange(1, used.sum() + 1))
      runs = np.split(e['query_positions'][used], np.flatnonzero(np.diff(e['query_positions'][used]) > 1) + 1)
      lengths += [len(run) for run in runs]
  assert predicted / (SAMPLES * 128) == pytest.approx(1 / 6, rel=0.01)
  assert first / SAMPLES == pytest.approx(0.5, abs=0.02)
  assert max(lengths) >= 9 and np.mean(lengths) > 3  # three tokens a word here


def test_content_sees_itself_and_queries_do_not():
  e = make('permutation', 'two_stream', 64).example(item_of([64], 64), rng_of(0))
  used = e['loss_weights'] > 0
  for position, order, target in zip(e['query_positions'][used], e['query_order'][used], e['targets'][used]):
    assert e['tokens'][position] == target and e['order'][position] == order > 0
    assert not (e['order'] < max(order, 1))[position] and (e['order'] <= order)[position]
  assert np.count_nonzero(e['order']) == used.sum()
  assert not e['query_segment_ids'][~used].any()


def test_memory_is_the_text_before_the_row():
  objective = make('permutation', 'two_stream', 32, memory=16)
  assert (objective.raw_length(32), objective.overlap) == (48, 16)
  item = item_of([10, 30], 48)
  e = objective.example(item, rng_of(0))
  np.testing.assert_array_equal(np.concatenate([e['memory_tokens'], e['tokens']]), item['tokens'])
  for key in ('segment_ids', 'positions'):
    np.testing.assert_array_equal(np.concatenate([e[f'memory_{key}'], e[key]]), item[key])
  short = objective.example(item_of([10], 48), rng_of(0))
  assert not short['loss_weights'].any() and not short['segment_ids'].any()


# ---- blank infilling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('own', [dict(long=0.0), dict(long=1.0), dict(long=0.0, sentences=1.0), {}])
@pytest.mark.parametrize('mask_documents', [True, False])
def test_every_segment_comes_back(mask_documents, own):
  objective = make('infilling', 'decoder', 128, mask_documents, **own)
  raw = objective.raw_length(128)
  for i, lengths in enumerate(windows(raw, 100)):
    item = item_of(lengths, raw)
    e = objective.example(item, rng_of(i))
    for segment in np.unique(e['segment_ids'][e['segment_ids'] > 0]):
      text = item['tokens'][item['segment_ids'] == segment if mask_documents else item['segment_ids'] > 0]
      assert orders.restore(e, segment, VOCAB.id('sop')) == text.tolist()


def test_short_blanks_are_fifteen_percent_in_poisson_lengths():
  objective = make('infilling', 'decoder', 256, long=0.0)
  raw = objective.raw_length(256)
  item, hidden, lengths = item_of([raw], raw), 0, []
  for i in range(SAMPLES):
    e = objective.example(item, rng_of(i))
    later = e['block_positions'] > 0
    hidden += np.count_nonzero(is_text(e['tokens'][later]))
    if i < 2_000:
      ends = np.flatnonzero(e['targets'][later] == VOCAB.id('eop'))
      lengths += (np.diff(ends, prepend=-1) - 1).tolist()  # without sop
  assert hidden / (SAMPLES * raw) == pytest.approx(0.15, rel=0.01)
  # Poisson(3) without 0 has mean 3.157
  assert min(lengths) == 1 and np.mean(lengths) == pytest.approx(3.157, rel=0.01)  # a deviation is 0.3%


def test_the_last_token_of_a_blank_predicts_its_end_and_positions_are_the_masks():
  objective = make('infilling', 'decoder', 128, long=0.0)
  raw = objective.raw_length(128)
  e = objective.example(item_of([raw], raw), rng_of(0))
  later = np.flatnonzero(e['block_positions'])
  np.testing.assert_array_equal(e['order'][later], np.arange(1, len(later) + 1))
  np.testing.assert_array_equal(e['loss_weights'] > 0, e['block_positions'] > 0)
  assert not e['order'][:later[0]].any()
  for column in later:
    position, place = e['positions'][column], e['block_positions'][column]
    assert e['tokens'][position] == VOCAB.mask                   # part A is one segment, so positions are columns
    assert (e['tokens'][column] == VOCAB.id('sop')) == (place == 1)
    end = column == later[-1] or e['block_positions'][column + 1] == 1
    assert e['targets'][column] == (VOCAB.id('eop') if end else e['tokens'][column + 1])
  starts = e['positions'][later[e['block_positions'][later] == 1]]
  assert sorted(starts.tolist()) != starts.tolist()              # shuffled


def test_long_blanks_are_the_end_of_each_document():
  objective = make('infilling', 'decoder', 128, long=1.0)
  raw = objective.raw_length(128)
  shares = []
  for i in range(1_000):
    e = objective.example(item_of([60, raw - 60], raw), rng_of(i))
    part_a = (e['segment_ids'] > 0) & (e['block_positions'] == 0)
    for segment, size in ((1, 60), (2, raw - 60)):
      kept = e['tokens'][part_a & (e['segment_ids'] == segment)]
      assert kept[-1] == VOCAB.id('gmask') and is_text(kept[:-1]).all()
      shares.append(1 - (len(kept) - 1) / size)
  assert 0.49 < min(shares) and max(shares) == 1 and np.mean(shares) == pytest.approx(0.75, rel=0.01)


def test_sentences_are_blanks_as_a_whole():
  objective = make('infilling', 'decoder', 256, long=0.0, sentences=1.0)
  raw = objective.raw_length(256)
  hidden = 0
  for i in range(2_000):
    e = objective.example(item_of([raw], raw), rng_of(i))
    later = e['block_positions'] > 0
    hidden += np.count_nonzero(is_text(e['tokens'][later]))
    ends = np.flatnonzero(e['targets'][later] == VOCAB.id('eop'))
    last = e['tokens'][later][ends]
    assert all(t % 11 == 0 or t == FIRST + raw - 1 for t in last)  # a full stop, or the text's end
  assert hidden / (2_000 * raw) == pytest.approx(0.15, rel=0.05)


def test_how_often_a_row_has_a_long_blank():
  config = config_of('infilling', 'decoder', 64)
  objective = make('infilling', 'decoder', 64, long=0.3, sentences=0.2)
  raw, kinds = objective.raw_length(64), {VOCAB.id('gmask'): 0, VOCAB.id('smask'): 0, VOCAB.mask: 0}
  for i in range(SAMPLES):
    tokens = objective.example(item_of([raw], raw), rng_of(i))['tokens']
    for kind in kinds:
      kinds[kind] += kind in tokens
  assert kinds[VOCAB.id('gmask')] / SAMPLES == pytest.approx(0.3, abs=0.01)
  assert kinds[VOCAB.mask] / SAMPLES == pytest.approx(0.5, abs=0.01)
  assert config.objective.infilling.long == 0.5
