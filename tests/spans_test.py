"""Spans: T5's law and lengths, UL2's mixture, BART's noise; all can be undone."""
import collections
import itertools

import numpy as np
import pytest
from windows import FIRST, VOCAB, is_text, item_of, make, rng_of, windows

from jaxlm import objectives, rows, spans

SAMPLES = 10_000
SENTINELS = np.array([VOCAB.id(f'sentinel_{i}') for i in range(100)])


def starts_of(mask):
  return np.count_nonzero(mask & ~np.concatenate([[False], mask[:-1]]))


# ---- T5 ----------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_t5():
  objective = make('span', 'encoder_decoder', 512)
  assert (objective.raw_length(512), objective.target_length(512)) == (568, 114)  # its published settings


@pytest.mark.parametrize('seq_len', [64, 100, 512, 1000])
@pytest.mark.parametrize('rate, mean', [(0.15, 3.0), (0.5, 3.0), (0.3, 8.0)])
def test_a_full_row_fills_every_column_of_source_and_target(seq_len, rate, mean):
  objective = make('span', 'encoder_decoder', seq_len, rate=rate, mean=mean, num_sentinels=600)
  raw = objective.raw_length(seq_len)
  for lengths in ([raw], [raw // 3, raw - raw // 3], [1] * 5 + [raw - 5]):
    example = objective.example(item_of(lengths, raw), rng_of(seq_len))
    assert example['source_segment_ids'].all() and example['segment_ids'].all()
  together = make('span', 'decoder', seq_len, rate=rate, mean=mean, num_sentinels=600)
  raw = together.raw_length(seq_len)
  assert np.count_nonzero(together.example(item_of([raw], raw), rng_of(1))['segment_ids']) >= seq_len - 2


def test_all_masks_with_their_counts_are_equally_likely():
  counts = collections.Counter(tuple(spans.noise(8, 3, 2, False, rng)) for rng in map(rng_of, range(8_000)))
  known = {m for m in itertools.product((False, True), repeat=8)
           if sum(m) == 3 and starts_of(np.array(m)) == 2 and not m[0] and m[-1]}
  assert set(counts) == known and len(known) == 8
  assert max(counts.values()) / min(counts.values()) < 1.25  # 1,000 each, deviation 30
  tails = {tuple(spans.noise(8, 3, 2, True, rng)) for rng in map(rng_of, range(4_000))}
  assert tails == {m for m in itertools.product((False, True), repeat=8)
                   if sum(m) == 3 and starts_of(np.array(m)) == 2 and not m[0]}


def test_rate_and_mean_are_within_one_percent_of_nominal():
  objective, noise, number = make('span', 'encoder_decoder', 512), 0, 0
  item = item_of([568], 568)
  lengths = collections.Counter()
  for i in range(SAMPLES):
    targets = objective.example(item, rng_of(i))['targets']
    text = is_text(targets)
    noise += np.count_nonzero(text)
    number += np.count_nonzero(np.isin(targets, SENTINELS))
    if i < 1_000:
      lengths.update(np.diff(np.flatnonzero(~text)).tolist())
  assert noise / (SAMPLES * 568) == pytest.approx(0.15, rel=0.01)  # 85 of 568: 0.1496
  assert noise / number == pytest.approx(3.0, rel=0.02)            # 85 in 28: T5's own rounding, 3.04
  assert len(lengths) > 8


def segments_of(example):
  """(segment, source, target) of each, the end-of-text taken off both."""
  for segment in np.unique(example['segment_ids']):
    if segment:
      both = (example['source_tokens'][example['source_segment_ids'] == segment].tolist(),
              example['targets'][example['segment_ids'] == segment].tolist())
      yield segment, *([t for t in part if t != VOCAB.eos] for part in both)


@pytest.mark.parametrize('mask_documents', [True, False])
@pytest.mark.parametrize('own', [{}, dict(tail=True), dict(rate=0.5, mean=16.0)])
def test_every_segment_comes_back(mask_documents, own):
  objective = make('span', 'encoder_decoder', 64, mask_documents, **own)
  raw = objective.raw_length(64)
  for i, lengths in enumerate(windows(raw, 200)):
    item = item_of(lengths, raw)
    for segment, source, target in segments_of(objective.example(item, rng_of(i))):
      text = item['tokens'][item['segment_ids'] == segment if mask_documents else item['segment_ids'] > 0]
      if mask_documents and not len(source):
        assert target == text.tolist()
      assert spans.restore(source, target, SENTINELS) == text.tolist()


def test_the_decoder_reads_its_target_one_place_late_after_the_start_of_each_segment():
  objective = make('span', 'encoder_decoder', 64)
  raw = objective.raw_length(64)
  example = objective.example(item_of([raw - 20, 20], raw), rng_of(5))
  first = rows.changes(example['segment_ids'])
  assert (example['tokens'][first] == VOCAB.pad).all()
  np.testing.assert_array_equal(example['tokens'][1:][~first[1:]], example['targets'][:-1][~first[1:]])


def test_in_a_decoder_the_source_is_context_and_the_target_follows():
  objective = make('span', 'decoder', 64)
  raw = objective.raw_length(64)
  example = objective.example(item_of([raw], raw), rng_of(5))
  source = example['tokens'][example['order'] == 0]
  assert source[-1] == VOCAB.eos and example['targets'][len(source) - 1] == SENTINELS[0]
  np.testing.assert_array_equal(example['order'][len(source):], np.arange(1, 65 - len(source)))
  target = example['targets'][example['loss_weights'] > 0]
  assert spans.restore(source[:-1], target[:-1], SENTINELS) == list(range(FIRST, FIRST + raw))


# ---- UL2 ---------------------------------------------------------------------------------------------------------


def test_denoisers_are_drawn_by_weight_and_named_by_their_mode():
  objective = make('ul2', 'encoder_decoder', 128)
  raw = objective.raw_length(128)
  item, modes, rates = item_of([raw], raw), collections.Counter(), collections.defaultdict(list)
  for i in range(SAMPLES):
    e = objective.example(item, rng_of(i))
    mode = int(e['source_tokens'][0])
    modes[mode] += 1
    rates[mode].append(np.count_nonzero(is_text(e['targets'])) / raw)
    if mode == VOCAB.id('mode_s'):  # the end of the row, in one piece
      np.testing.assert_array_equal(e['source_tokens'][1:len(e['source_tokens'])][is_text(e['source_tokens'][1:])],
                                    item['tokens'][:raw - round(0.25 * raw)])
  share = [modes[VOCAB.id(f'mode_{m}')] / SAMPLES for m in 'rsx']
  assert share == pytest.approx([2 / 7, 1 / 7, 4 / 7], rel=0.07)  # a deviation of the smallest is 2.4%
  for mode, rate in (('r', 0.15), ('s', 0.25), ('x', (0.5 * 3 + 0.15) / 4)):
    assert np.mean(rates[VOCAB.id(f'mode_{mode}')]) == pytest.approx(rate, rel=0.02), mode  # rounded to 1 in 141


def test_every_document_of_a_row_is_told_the_mode():
  for kind in ('encoder_decoder', 'decoder'):
    objective = make('ul2', kind, 128)
    raw = objective.raw_length(128)
    for i in range(100):
      e = objective.example(item_of([raw // 4] * 3 + [raw - raw // 4 * 3], raw), rng_of(i))
      tokens, segments = ((e['source_tokens'], e['source_segment_ids']) if kind == 'encoder_decoder' else
                          (e['tokens'], e['segment_ids']))
      modes = [tokens[segments == s][0] for s in np.unique(segments[segments > 0])]
      assert len(set(modes)) == 1 and modes[0] in {VOCAB.id(f'mode_{m}') for m in 'rsx'}


def test_every_denoiser_comes_back():
  objective = make('ul2', 'encoder_decoder', 128)
  raw = objective.raw_length(128)
  for i, lengths in enumerate(windows(raw, 200)):
    item = item_of(lengths, raw)
    for segment, source, target in segments_of(objective.example(item, rng_of(i))):
      text = item['tokens'][item['segment_ids'] == segment].tolist()
      modes = {VOCAB.id(f'mode_{m}') for m in 'rsx'}
      assert spans.restore([t for t in source if t not in modes], target, SENTINELS) == text


# ---- BART --------------------------------------------------------------------------------------------------------


def test_bart_masks_its_rate_in_spans_of_its_mean():
  objective = make('denoising', 'encoder_decoder', 128, permute=0.0)
  raw = objective.raw_length(128)
  item, left, masks = item_of([raw], raw), 0, 0
  for i in range(SAMPLES):
    source = objective.example(item, rng_of(i))['source_tokens']
    left += np.count_nonzero(is_text(source))
    masks += np.count_nonzero(source == VOCAB.mask)
  assert 1 - left / (SAMPLES * raw) == pytest.approx(0.3, rel=0.01)
  assert masks / SAMPLES == pytest.approx(0.3 * raw / 3, rel=0.01)  # 0.3% fewer: the room for them is bounded


def test_lengths_of_spans_are_poisson_with_0():
  lengths = np.concatenate([spans.drawn(300, 3.0, 0, 200, 10_000, rng) for rng in map(rng_of, range(300))])
  law = np.exp(-3) * np.array([1, 3, 9 / 2, 27 / 6, 81 / 24])
  np.testing.assert_allclose(np.bincount(lengths)[:5] / len(lengths), law, rtol=0.06)  # 2.5% at 30,000 draws


@pytest.mark.parametrize('expected', [0.7, 1.5, 7.7, 60.0])
@pytest.mark.parametrize('shortest, mean', [(0, 3.0), (1, 3.0 / (1 - np.exp(-3)))])
def test_drawn_lengths_have_their_mean_and_their_sum_however_few(expected, shortest, mean):
  total, number, rng = 0, 0, rng_of(0)
  for _ in range(40_000):
    lengths = spans.drawn(expected, 3.0, shortest, 60, 10_000, rng)
    total, number = total + lengths.sum(), number + len(lengths)
    assert lengths.sum() >= spans.least(expected, 3.0, shortest)
  assert total / 40_000 == pytest.approx(expected, rel=0.02)  # at 0.7 a standard deviation is 1.0%, at 60 0.02%
  assert total / number == pytest.approx(mean, rel=0.02)


def test_lengths_never_pass_their_limit():
  for i in range(500):
    assert spans.drawn(4.0, 8.0, 1, 20, 5, rng_of(i)).sum() <= 5
    assert len(spans.drawn(40.0, 3.0, 1, 6, 100, rng_of(i))) <= 6


def test_a_source_without_permutation_is_the_text_with_gaps():
  objective = make('denoising', 'encoder_decoder', 64, permute=0.0)
  raw = objective.raw_length(64)
  for i, lengths in enumerate(windows(raw, 100)):
    item = item_of(lengths, raw)
    e = objective.example(item, rng_of(i))
    source, text = e['source_tokens'][e['source_segment_ids'] > 0], item['tokens'][item['segment_ids'] > 0]
    np.testing.assert_array_equal(e['targets'][e['segment_ids'] > 0], text)
    kept = source[is_text(source)]
    assert (np.diff(kept) > 0).all()
    gaps = np.flatnonzero(np.diff(kept) > 1)  # where something is missing inside the text, a mask stands
    places = np.flatnonzero(is_text(source))
    assert all(VOCAB.mask in source[places[g]:places[g + 1]] for g in gaps)


def test_sentences_are_permuted_inside_their_documents():
  objective = make('denoising', 'encoder_decoder', 64, rate=0.0)
  raw = objective.raw_length(64)
  assert raw == 64
  item = item_of([40, 24], 64)
  item['tokens'][[0, 39]] = VOCAB.bos, VOCAB.eos
  orders = set()
  for i in range(20):
    e = objective.example(item, rng_of(i))
    orders.add(tuple(e['source_tokens']))
    for segment in (1, 2):
      here = e['source_tokens'][e['source_segment_ids'] == segment]
      np.testing.assert_array_equal(np.sort(here), np.sort(item['tokens'][item['segment_ids'] == segment]))
    assert e['source_tokens'][0] == VOCAB.bos and e['source_tokens'][39] == VOCAB.eos
    # after a token that does not end a sentence the next one follows
    pair = np.stack([e['source_tokens'][:-1], e['source_tokens'][1:]])
    inside = is_text(pair).all(0) & (pair[0] % 11 != 0) & (e['source_segment_ids'][:-1] == e['source_segment_ids'][1:])
    broken = np.count_nonzero(np.diff(pair[:, inside], axis=0) != 1)
    assert broken <= 2  # the last sentence of a document ends without a full stop
  assert len(orders) > 5


def test_deletion_and_rotation_do_as_they_say():
  item, left = item_of([64], 64), 0
  objective = make('denoising', 'encoder_decoder', 64, rate=0.0, permute=0.0, delete=0.2)
  for i in range(2_000):
    left += np.count_nonzero(is_text(objective.example(item, rng_of(i))['source_tokens']))
  assert left / (2_000 * 64) == pytest.approx(0.8, rel=0.01)
  objective = make('denoising', 'encoder_decoder', 64, rate=0.0, permute=0.0, rotate=1.0)
  firsts = [int(objective.example(item, rng_of(i))['source_tokens'][0]) - FIRST for i in range(200)]
  assert len(set(firsts)) > 50
  for i in range(5):
    np.testing.assert_array_equal(objective.example(item, rng_of(i))['source_tokens'] - FIRST,
                                  (np.arange(64) + firsts[i]) % 64)


# ---- prefix ------------------------------------------------------------------------------------------------------


def test_prefixes_fit_whatever_is_drawn():
  objective = make('prefix', 'encoder_decoder', 60)
  raw = objective.raw_length(60)
  assert (raw, objective.target_length(60)) == (80, 60)
  shares = []
  for i in range(500):
    e = objective.example(item_of([raw], raw), rng_of(i))
    shares.append(np.count_nonzero(e['source_segment_ids']) / raw)
  assert 0.24 < min(shares) < 0.27 and 0.73 < max(shares) <= 0.75
  assert objectives.shapes(objective, 60)['source_tokens'][0] == (60,)
