"""How far a measure can be trusted: bootstrap intervals, and tests of two systems on the same examples.

Examples are what is drawn, so they must be independent: questions about one passage belong in one example's row.
"""
import math
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.measure.metric import Metric

DRAWN_AT_ONCE = 1 << 20  # examples; 24 MB in the arrays of a block

Draw = Callable[[Metric, np.ndarray, np.random.Generator, int], Iterator[np.ndarray]]


class Paired(NamedTuple):
  """System a against system b in one number.

  Attributes:
    difference: a's minus b's.
    low, high: percentile interval of the difference.
    p_bootstrap: two-sided, by resampling examples, centred on the difference; too small below about 50 examples.
    p_randomization: two-sided, by swapping the systems' answers to each example or not; not a number for measures
      that are not swappable.
  """
  difference: float
  low: float
  high: float
  p_bootstrap: float
  p_randomization: float


class SignTest(NamedTuple):
  """On how many examples a is above b, below it, and equal; `p` is two-sided."""
  wins: int
  losses: int
  ties: int
  p: float


def _blocks(resamples: int, num_examples: int) -> Iterator[int]:
  """Sizes of parts of all resamples that fit in memory."""
  size = max(DRAWN_AT_ONCE // num_examples, 1)
  for start in range(0, resamples, size):
    yield min(size, resamples - start)


def _resampled(metric: Metric, rows_SNK: np.ndarray, rng: np.random.Generator, resamples: int) -> Iterator[np.ndarray]:
  """Rows of as many examples drawn with replacement, the same for every system; one row, their sum, where that does."""
  n = rows_SNK.shape[1]
  for size in _blocks(resamples, n):
    index_RN = rng.integers(n, size=(size, n))
    if not metric.summed:
      yield from (rows_SNK[:, index] for index in index_RN)
      continue
    drawn = np.bincount((index_RN + n * np.arange(size)[:, None]).ravel(), minlength=size * n)
    sums_SRK = drawn.reshape(size, n).astype(np.float64) @ rows_SNK
    yield from sums_SRK.swapaxes(0, 1)[:, :, None]


def _swapped(metric: Metric, rows_SNK: np.ndarray, rng: np.random.Generator, resamples: int) -> Iterator[np.ndarray]:
  """Rows of two systems that exchange each example or not; one row, their sum, where that does."""
  n = rows_SNK.shape[1]
  for size in _blocks(resamples, n):
    swap_RN = rng.integers(2, size=(size, n))  # int64: blocks of any size draw the same
    if not metric.summed:
      yield from (np.where(swap[:, None], rows_SNK[::-1], rows_SNK) for swap in swap_RN)
      continue
    gained_RK = swap_RN.astype(np.float64) @ (rows_SNK[1] - rows_SNK[0])
    first, second = rows_SNK.sum(1)
    yield from np.stack([first + gained_RK, second - gained_RK], 1)[:, :, None]


def _totals(metric: Metric, rows_SNK: np.ndarray, draw: Draw, rng: np.random.Generator,
            resamples: int) -> dict[str, np.ndarray]:
  """{name: totals of every resample and system [R, S]}."""
  found = [[metric.total(rows) for rows in drawn] for drawn in draw(metric, rows_SNK, rng, resamples)]
  return {name: np.array([[total[name] for total in totals] for totals in found]) for name in found[0][0]}


def _differences(totals_RS: np.ndarray) -> np.ndarray:
  return totals_RS[:, 0] - totals_RS[:, 1]


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
  """Percentiles of the values that are defined."""
  values = values[~np.isnan(values)]
  if not len(values):
    return math.nan, math.nan
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def _p_value(distances: np.ndarray, distance: float, scale: float) -> float:
  """The share of resamples at least as far, the observed one among them; undefined ones count as far."""
  nearer = distances < distance - 1e-9 * scale  # sums of floats differ in their last bits
  return float((1 + (~nearer).sum()) / (1 + len(distances)))


def _check(rows: Sequence[np.ndarray], resamples: int, level: float) -> np.ndarray:
  shapes = [np.shape(x) for x in rows]
  if len(shapes[0]) != 2 or not shapes[0][0] or len(set(shapes)) > 1:
    raise JaxlmError(f'Wanted rows [examples, numbers], at least one, and alike for both systems; got shapes {shapes}; '
                     'take metric.rows of the same examples in the same order.')
  if resamples < 1 or not 0 < level < 1:
    raise JaxlmError(f'Wanted resamples >= 1 and 0 < level < 1, got {resamples} and {level}.')
  return np.stack([np.asarray(x, np.float64) for x in rows])


def _generator(seed: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(seed))


def bootstrap(metric: Metric, rows: np.ndarray, seed: int, resamples: int = 1000,
              level: float = 0.95) -> dict[str, tuple[float, float]]:
  """{name: (low, high)} by the percentile bootstrap over examples.

  Args:
    rows: [N, K], of metric.rows.
    seed: same seed, same interval.
    level: share of intervals that hold the true value; fewer do below about 50 examples.
  Raises:
    JaxlmError: rows of another shape, or a level that is none.
  Source: Efron 1979; for BLEU Koehn 2004.
  """
  rows_1NK = _check([rows], resamples, level)
  totals = _totals(metric, rows_1NK, _resampled, _generator(seed), resamples)
  return {name: _interval(values[:, 0], level) for name, values in totals.items()}


def paired(metric: Metric, rows_a: np.ndarray, rows_b: np.ndarray, seed: int, resamples: int = 1000,
           level: float = 0.95) -> dict[str, Paired]:
  """Two systems on the same examples, number by number.

  Args:
    rows_a, rows_b: [N, K], of metric.rows for the same examples in the same order.
    seed: same seed, same result.
    resamples: of either kind; the least p is 1 / (resamples + 1).
  Raises:
    JaxlmError: rows of different shapes, or a level that is none.
  Source: Efron & Tibshirani 1993, algorithm 16.2 (centred bootstrap); Noreen 1989, and Riezler & Maxwell 2005
    (approximate randomization).
  """
  rows_2NK, rng = _check([rows_a, rows_b], resamples, level), _generator(seed)
  a, b = map(metric.total, rows_2NK)
  resampled = _totals(metric, rows_2NK, _resampled, rng, resamples)
  swapped = _totals(metric, rows_2NK, _swapped, rng, resamples) if metric.swappable else None
  found = {}
  for name in a:
    difference, scale = a[name] - b[name], max(abs(a[name]), abs(b[name]))
    p_of = lambda distances: _p_value(np.abs(distances), abs(difference), scale)
    drawn = _differences(resampled[name])
    found[name] = Paired(difference, *_interval(drawn, level), p_of(drawn - difference),
                         p_of(_differences(swapped[name])) if metric.swappable else math.nan)
  return found


def sign_test(scores_a: np.ndarray, scores_b: np.ndarray) -> SignTest:
  """The exact sign test of two systems; on right and wrong, 1 and 0, it is McNemar's exact test.

  Args:
    scores_a, scores_b: [N], one score an example: of accuracy `metric.rows(…)[:, 0]`.
  Raises:
    JaxlmError: other shapes.
  """
  a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
  if a.ndim != 1 or a.shape != b.shape:
    raise JaxlmError(f'Wanted one score an example of both systems, got shapes {a.shape} and {b.shape}; take one '
                     'column of metric.rows.')
  wins, losses = int((a > b).sum()), int((a < b).sum())
  return SignTest(wins, losses, len(a) - wins - losses, _binomial_p(min(wins, losses), wins + losses))


def _binomial_p(fewer: int, n: int) -> float:
  """Two-sided chance of at most `fewer` heads or tails in n tosses."""
  i = np.arange(fewer)
  log_choose = np.concatenate([[0.0], np.cumsum(np.log(n - i) - np.log(i + 1))])
  return min(1.0, float(2 * np.exp(log_choose - n * np.log(2)).sum()))
