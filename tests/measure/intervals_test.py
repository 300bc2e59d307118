"""Intervals hold what they say, tests reject as often as they may, and summed rows resample as rows do."""
import dataclasses
import itertools
import math

import numpy as np
import pytest

from jaxlm.errors import JaxlmError
from jaxlm.measure.intervals import bootstrap, paired, sign_test
from jaxlm.measure.metric import Metric
from jaxlm.measure.scores import METRICS

MEAN = Metric('mean', lambda prediction, _: (prediction, 1), lambda sums: {'mean': sums[0] / sums[1]})


def _rows(values):
  return MEAN.rows(np.asarray(values, float))


def _row_by_row(metric):
  """The same measure, which is given every row."""
  return dataclasses.replace(metric, summed=False, combine=lambda rows: metric.combine(rows.sum(0)))


def _squads(rng, n=300):
  """Counts of two systems on the same examples: (hits, predicted, true)."""
  true = rng.integers(1, 5, n)
  hits = rng.binomial(true, [[0.6], [0.5]])
  return np.stack([hits, hits + rng.integers(0, 3, (2, n)), np.tile(true, (2, 1))], -1).astype(float)


# ---- intervals ---------------------------------------------------------------------------------------------------


def test_a_seed_decides_everything():
  a, b = _squads(np.random.default_rng(0))
  metric = METRICS['entity_f1']
  assert bootstrap(metric, a, 1) == bootstrap(metric, a, 1) != bootstrap(metric, a, 2)
  assert paired(metric, a, b, 1) == paired(metric, a, b, 1) != paired(metric, a, b, 2)


def test_summed_rows_resample_and_swap_as_rows_do():
  a, b = _squads(np.random.default_rng(0))
  metric = METRICS['entity_f1']
  slow = _row_by_row(metric)
  for name, interval in bootstrap(slow, a, 3, 200).items():
    assert bootstrap(metric, a, 3, 200)[name] == pytest.approx(interval, rel=1e-12)
  fast = paired(metric, a, b, 3, 200)
  for name, want in paired(slow, a, b, 3, 200).items():
    assert fast[name] == pytest.approx(want, rel=1e-12)


def test_resamples_in_blocks_are_the_same_resamples(monkeypatch):
  a, b = _squads(np.random.default_rng(0))
  whole = paired(METRICS['entity_f1'], a, b, 3, 200), bootstrap(METRICS['entity_f1'], a, 3, 200)
  monkeypatch.setattr('jaxlm.measure.intervals.DRAWN_AT_ONCE', 1200)  # blocks of four
  assert bootstrap(METRICS['entity_f1'], a, 3, 200) == whole[1]
  assert paired(METRICS['entity_f1'], a, b, 3, 200) == whole[0]


def test_the_interval_of_a_mean_is_that_of_all_resamples():
  values = [0.0, 1.0, 5.0, 7.0]
  every = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
  low, high = bootstrap(MEAN, _rows(values), 0, resamples=20_000, level=0.8)['mean']
  # quantiles of a distribution on few points: the observed ones must be its own, up to one part in a hundred of mass
  assert np.quantile(every, 0.09) <= low <= np.quantile(every, 0.11)
  assert np.quantile(every, 0.89) <= high <= np.quantile(every, 0.91)


def test_nineteen_intervals_of_twenty_hold_the_truth():
  rng = np.random.default_rng(0)
  held = 0
  for seed in range(300):
    low, high = bootstrap(MEAN, _rows(rng.uniform(size=200) < 0.7), seed, 400)['mean']
    held += low <= 0.7 <= high
  assert 0.91 < held / 300 < 0.98  # 0.95 with a standard error of 0.013


def test_undefined_resamples_are_left_out_and_an_undefined_measure_has_no_interval():
  metric = METRICS['pearson']
  rows = metric.rows([0, 0, 0, 1], [1, 2, 3, 4])  # a third of the resamples lack the 1
  low, high = bootstrap(metric, rows, 0)['pearson']
  assert -1 <= low < high <= 1
  assert all(map(math.isnan, bootstrap(metric, metric.rows([1, 1], [1, 2]), 0)['pearson']))


# ---- pairs -------------------------------------------------------------------------------------------------------


def test_equal_systems_differ_by_nothing():
  a = _squads(np.random.default_rng(0))[0]
  for found in paired(METRICS['entity_f1'], a, a, 0, 100).values():
    assert found == (0, 0, 0, 1, 1)


def test_exchanged_systems_differ_the_other_way():
  a, b = _squads(np.random.default_rng(0))
  one, other = (paired(METRICS['entity_f1'], *pair, 0)['f1'] for pair in ((a, b), (b, a)))
  assert one.difference > 0 and one.low > 0
  assert (-one.difference, -one.high, -one.low, *one[3:]) == pytest.approx(other)


def test_swaps_have_the_p_of_all_swaps():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 6, (2, 9))
  a[0] += 6
  signs = np.array([*itertools.product((1, -1), repeat=9)])
  want = (np.abs(signs @ (a - b)) >= abs((a - b).sum())).mean()
  found = paired(MEAN, _rows(a), _rows(b), 0, 20_000)['mean'].p_randomization
  assert 0.02 < want < 0.98
  assert found == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 20_000))


def test_p_does_not_depend_on_the_unit_nor_on_last_bits():
  a, b = np.random.default_rng(0).integers(0, 4, (2, 12))  # many resamples are exactly as far as the systems
  whole, tenths = (paired(MEAN, _rows(a * unit), _rows(b * unit), 0)['mean'] for unit in (1, 0.1))
  assert tenths[3:] == whole[3:]


def test_the_centred_bootstrap_has_the_p_of_all_resamples():
  a, b = np.array([3.0, 1, 4, 1, 5]), np.array([1.0, 2, 0, 2, 2])
  difference = (a - b).mean()
  every = np.array([np.mean(drawn) for drawn in itertools.product(a - b, repeat=5)])
  want = (np.abs(every - difference) >= difference - 1e-9).mean()
  found = paired(MEAN, _rows(a), _rows(b), 0, 20_000)['mean'].p_bootstrap
  assert found == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 20_000))


def test_systems_that_are_alike_are_told_apart_one_time_in_twenty():
  rng = np.random.default_rng(0)
  p = np.array([paired(MEAN, *map(_rows, rng.normal(size=(2, 60)) + rng.normal(size=60)), seed, 200)['mean'][3:]
                for seed in range(400)])
  rejected = (p < 0.05).mean(0)
  assert (0.02 < rejected).all() and (rejected < 0.085).all()  # 0.05 with a standard error of 0.011


def test_a_measure_of_all_rows_is_tested_too():
  rng = np.random.default_rng(0)
  true = rng.normal(size=80)
  metric = METRICS['spearman']
  near, far = (metric.rows(true + noise * rng.normal(size=80), true) for noise in (0.3, 2.0))
  found = paired(metric, near, far, 0, 300)['spearman']
  assert found.difference > 0.2 and found.low > 0 and found.p_bootstrap == 1 / 301


def test_what_has_its_own_scale_in_every_system_is_not_swapped():
  rng = np.random.default_rng(0)
  true = rng.normal(size=80)
  metric = METRICS['spearman']
  one, same = metric.rows(true + rng.normal(size=80), true), metric.rows(true * 1000 + 5, true)
  assert math.isnan(paired(metric, one, same, 0, 20)['spearman'].p_randomization)
  swapped = dataclasses.replace(metric, swappable=True)
  assert paired(swapped, one, one, 0, 20)['spearman'].p_randomization == 1


# ---- the sign test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('wins, losses', [(0, 0), (1, 0), (5, 0), (3, 9), (7, 7), (40, 61)])
def test_the_sign_test_is_exact(wins, losses):
  a, b = [1] * wins + [0] * losses + [1, 0], [0] * wins + [1] * losses + [1, 0]
  n = wins + losses
  want = min(1, 2 * sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2 ** n)
  assert sign_test(a, b) == (wins, losses, 2, pytest.approx(want, rel=1e-12))


def test_the_sign_test_of_many_is_that_of_scipy():
  stats = pytest.importorskip('scipy.stats')
  a = np.arange(100_000) < 49_500
  want = stats.binomtest(49_500, 100_000, 0.5).pvalue
  assert sign_test(a, ~a).p == pytest.approx(want, rel=1e-8)


# ---- bad inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('call, said', [
    (lambda: bootstrap(MEAN, np.ones(3), 0), 'Wanted rows [examples, numbers]'),
    (lambda: bootstrap(MEAN, np.ones((0, 2)), 0), 'at least one'),
    (lambda: bootstrap(MEAN, np.ones((3, 2)), 0, level=95), '0 < level < 1'),
    (lambda: bootstrap(MEAN, np.ones((3, 2)), 0, resamples=0), 'resamples >= 1'),
    (lambda: paired(MEAN, np.ones((3, 2)), np.ones((4, 2)), 0), 'got shapes [(3, 2), (4, 2)]'),
    (lambda: sign_test([1, 0], [1]), 'one score an example'),
])
def test_what_cannot_be_resampled_is_one_line(call, said):
  with pytest.raises(JaxlmError) as e:
    call()
  assert said in str(e.value) and '\n' not in str(e.value)
