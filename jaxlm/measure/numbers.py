"""Answers that are numbers: values, probabilities of classes, costs of texts."""
import math
from typing import Any, Sequence

import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.measure.metric import Metric, check, means, short, whole_number

ECE_BINS = 15           # Guo et al. 2017
MAX_NATS = 700          # e to more overflows


def _number(value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    raise JaxlmError(f'wanted a number, got {short(value)}.') from None


def _numbers(prediction: Any, reference: Any) -> tuple[float, float]:
  return _number(prediction), _number(reference)


def _squared_error(prediction: Any, reference: Any) -> tuple[float, float]:
  return (_number(prediction) - _number(reference)) ** 2, 1


def _ranks(values: np.ndarray) -> np.ndarray:
  """Ranks from 1; equal values share the mean of theirs."""
  _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
  if (x == x[0]).all() or (y == y[0]).all():
    return math.nan
  x, y = x - x.mean(), y - y.mean()
  return float(np.clip(x / np.linalg.norm(x) @ (y / np.linalg.norm(y)), -1, 1))


def _pearson(rows: np.ndarray) -> dict[str, float]:
  return {'pearson': _correlation(*rows.T)}


def _spearman(rows: np.ndarray) -> dict[str, float]:
  return {'spearman': _correlation(*map(_ranks, rows.T))}


def _confidence(prediction: Sequence[float], reference: int) -> np.ndarray:
  """Of the bin of the best class: 1, its probability, whether it is right; then the squared error, and 1."""
  probs, true = np.asarray(prediction, np.float64), whole_number(reference, 'a class')
  check(probs.ndim == 1 and len(probs) > 1 and probs.min() >= 0 and abs(probs.sum() - 1) < 0.02,  # bfloat16's sums
        'the probability of each class, which sum to 1', prediction)
  check(0 <= true < len(probs), f'a class below {len(probs)}', true)
  best = int(probs.argmax())
  row = np.zeros((3, ECE_BINS))
  index = np.searchsorted(np.linspace(0, 1, ECE_BINS + 1), min(probs[best], 1)) - 1  # bins are (low, high]
  row[:, index] = 1, probs[best], best == true
  return np.array([*row.ravel(), ((probs - (np.arange(len(probs)) == true)) ** 2).sum(), 1])


def _calibration(sums: np.ndarray) -> dict[str, float]:
  """Expected calibration error of the best class, and Brier's score, the squared error summed over classes (0 to 2).

  Few examples a bin raise the error, and so do resamples: compare intervals of equal numbers of examples.
  Source: Guo et al. 2017, arXiv:1706.04599, eq. 3; Brier 1950.
  """
  _, confidence, right = sums[:-2].reshape(3, ECE_BINS)
  return {'ece': np.abs(right - confidence).sum() / sums[-1], 'brier': sums[-2] / sums[-1]}


def _text_cost(prediction: tuple[float, int, int], _: Any) -> tuple[float, ...]:
  check(np.shape(prediction) == (3,) and min(prediction) >= 0, '(nats, tokens, bytes) of a text', prediction)
  return tuple(prediction)


def _perplexity(sums: np.ndarray) -> dict[str, float]:
  nats, tokens, size = sums
  loss = nats / tokens if tokens else math.nan
  return {'loss': loss, 'perplexity': math.exp(min(loss, MAX_NATS)),
          'bits_per_byte': nats / math.log(2) / size if size else math.nan}


METRICS = (
    Metric('pearson', _numbers, _pearson, summed=False, swappable=False),
    Metric('spearman', _numbers, _spearman, summed=False, swappable=False),
    Metric('mse', _squared_error, means('mse')),
    Metric('calibration', _confidence, _calibration),
    Metric('perplexity', _text_cost, _perplexity),
)
