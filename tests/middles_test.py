"""Fill-in-the-middle: both orders, nothing lost, exact rows."""
import numpy as np
import pytest
from windows import FIRST, VOCAB, config_of, item_of, make, rng_of, windows

from jaxlm import fits, middles, objectives

SAMPLES = 10_000
MARKS = [VOCAB.id(f'fim_{part}') for part in ('prefix', 'middle', 'suffix')]


def settings(rate=1.0, spm=0.5):
  return middles.Middles(rate, spm, *MARKS, VOCAB.bos, VOCAB.eos)


def whole(example):
  n = np.count_nonzero(example['segment_ids'])
  return np.append(example['tokens'][:n], [t for t in example['targets'][n - 1:n] if t != VOCAB.filler])


@pytest.mark.parametrize('mask_documents', [True, False])
@pytest.mark.parametrize('spm', [0.0, 1.0, 0.5])
def test_every_document_comes_back(spm, mask_documents):
  objective = make('fim', 'decoder', 64, mask_documents, spm=spm, rate=1.0, every=16)
  raw = objective.raw_length(64)
  for i, lengths in enumerate(windows(raw, 200)):
    item = item_of(lengths, raw)
    if lengths and lengths[0] > 3:
      item['tokens'][[0, lengths[0] - 1]] = VOCAB.bos, VOCAB.eos
    row = whole(objective.example(item, rng_of(i))).tolist()
    for number, length in enumerate(lengths):
      text = item['tokens'][item['segment_ids'] == number + 1].tolist()
      more = 3 * (row[row[0] == VOCAB.bos] == MARKS[0])
      assert middles.restore(row[:length + more], settings()) == text
      row = row[length + more:]
    assert not row


def test_rates_and_orders_are_as_said():
  objective, cut, spm, item = make('fim', 'decoder', 64), 0, 0, item_of([62], 62)
  firsts = []
  assert objective.raw_length(64) == 62
  for i in range(SAMPLES):
    tokens = objective.example(item, rng_of(i))['tokens']
    if MARKS[0] in tokens:
      cut += 1
      at = int(np.flatnonzero(tokens == MARKS[0])[0])
      spm += tokens[at + 1] == MARKS[2] and tokens[-2] != MARKS[1]
      firsts.append(at)
  assert cut / SAMPLES == pytest.approx(0.5, rel=0.02)
  assert spm / cut == pytest.approx(0.5, abs=0.03)
  assert set(firsts) == {0}


def test_the_first_and_last_special_tokens_stay():
  item = item_of([62], 62)
  item['tokens'][[0, 61]] = VOCAB.bos, VOCAB.eos
  objective = make('fim', 'decoder', 64, rate=1.0)
  for i in range(50):
    row = whole(objective.example(item, rng_of(i)))
    assert (row[0], row[1], row[-1], len(row)) == (VOCAB.bos, MARKS[0], VOCAB.eos, 65)


def test_psm_reads_prefix_suffix_middle():
  objective = make('fim', 'decoder', 64, rate=1.0, spm=0.0)
  row = whole(objective.example(item_of([62], 62), rng_of(3))).tolist()
  a, b = row.index(MARKS[2]), row.index(MARKS[1])
  prefix, suffix, middle = row[1:a], row[a + 1:b], row[b + 1:]
  assert row[0] == MARKS[0] and prefix + middle + suffix == list(range(FIRST, FIRST + 62))


def test_as_many_documents_are_cut_as_columns_are_kept_for():
  objective = make('fim', 'decoder', 256, rate=1.0, every=64)
  assert objective.raw_length(256) == 257 - 12
  for i in range(20):
    example = objective.example(item_of([24] * 10, 245), rng_of(i))
    assert np.count_nonzero(example['tokens'] == MARKS[0]) == 4


def test_every_token_after_the_first_of_a_document_is_predicted():
  example = make('fim', 'decoder', 64, rate=1.0).example(item_of([30, 32], 62), rng_of(0))
  assert example['loss_weights'].sum() == 65 - 2
  assert fits.FITS['fim'] == dict(decoder='causal', recurrent='causal')
  assert objectives.roles(config_of('fim', 'decoder')) == ('fim_prefix', 'fim_middle', 'fim_suffix')
