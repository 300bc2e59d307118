"""Answers of few kinds against the true ones: classes, several labels, tags of words, clusters."""
import math
from typing import Any, Sequence

import numpy as np

from jaxlm.measure.metric import Metric, check, means, precision_recall_f1, ratio, whole_number

MAX_CLASSES = 1 << 20   # a class beyond is a hash or a token of another table, not a class


def _accuracy(prediction: Any, reference: Any) -> tuple[float, float]:
  same = prediction == reference
  check(np.ndim(same) == 0, 'one answer', prediction)
  check(prediction is None or isinstance(prediction, str) == isinstance(reference, str),
        f'an answer of the reference\'s kind, {type(reference).__name__}', prediction)
  return bool(same), 1


def _classes(prediction: Any, reference: Any) -> tuple[int, int]:
  """(predicted, true) class; -1 is an answer that is none of the classes."""
  predicted, true = whole_number(prediction, 'a class'), whole_number(reference, 'a class')
  check(-1 <= predicted < MAX_CLASSES, f'a class from 0 to {MAX_CLASSES - 1}, or -1 for none', predicted)
  check(0 <= true < MAX_CLASSES, f'a class from 0 to {MAX_CLASSES - 1}', true)
  return predicted, true


def _class_counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """(hits, predicted, true) of each class, and how many predictions are none."""
  predicted, true = rows.astype(np.int64).T
  size = int(rows.max()) + 1
  count = lambda ids: np.bincount(ids, minlength=size)
  answers = np.bincount(predicted + 1, minlength=size + 1)
  return count(true[predicted == true]), answers[1:], count(true), int(answers[0])


def _averages(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
  """Precision, recall and F1, each averaged over classes in three ways."""
  pooled = precision_recall_f1(hits.sum(), predicted.sum(), true.sum())
  found = {}
  for name, values in precision_recall_f1(hits, predicted, true).items():
    found |= {f'macro_{name}': values.mean(), f'micro_{name}': pooled[name],
              f'weighted_{name}': ratio(values @ true, true.sum())}
  return found


def _f1(rows: np.ndarray) -> dict[str, float]:
  """Averages over the classes that occur, predicted or true."""
  hits, predicted, true, _ = _class_counts(rows)
  occurs = predicted + true > 0
  return _averages(hits[occurs], predicted[occurs], true[occurs])


def _mcc(rows: np.ndarray) -> dict[str, float]:
  """Matthews correlation; 0 where predictions or references are all of one class. Source: Gorodkin 2004, eq. 8."""
  hits, predicted, true, none = (np.asarray(x, np.float64) for x in _class_counts(rows))
  n = len(rows)
  spread = (n ** 2 - predicted @ predicted - none ** 2) * (n ** 2 - true @ true)
  return {'mcc': (hits.sum() * n - predicted @ true) / math.sqrt(spread) if spread else 0.0}


def _positives(prediction: Any, reference: Any) -> tuple[bool, bool, bool]:
  """(hit, predicted, true) of class 1 against 0."""
  predicted, true = _classes(prediction, reference)
  check(predicted < 2 and true < 2, 'classes 0 and 1', (predicted, true))
  return predicted == true == 1, predicted == 1, true == 1


def _labels(prediction: Sequence[int], reference: Sequence[int]) -> np.ndarray:
  """(hit, predicted, true) of every label of an example that may have several."""
  predicted, true = np.asarray(prediction), np.asarray(reference)
  check(predicted.ndim == 1 and predicted.shape == true.shape and np.isin([predicted, true], (0, 1)).all(),
        'a 0 or 1 for each label, in prediction and reference', (prediction, reference))
  return np.concatenate([predicted * true, predicted, true])


def _multilabel(sums: np.ndarray) -> dict[str, float]:
  """Averages over all labels: one that never occurs counts as 0, as in scikit-learn."""
  return _averages(*np.split(sums, 3))


# ---- sequences of tags -------------------------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
  """(type, first, last) of each entity of a sentence tagged by BIO, IO or BIOES.

  Tags that break the scheme are read as conlleval reads them: I or E begins an entity where none goes on.
  """
  found, before = [], ('O', '')
  for i, tag in enumerate(tags):
    prefix, _, kind = tag.partition('-')
    check(prefix in ('O', 'B', 'I', 'E', 'S'), 'a tag O, B-type, I-type, E-type or S-type', tag)
    if prefix in ('I', 'E') and before[0] in ('B', 'I') and before[1] == kind:
      found[-1] = (kind, found[-1][1], i)
    elif prefix != 'O':
      found.append((kind, i, i))
    before = prefix, kind
  return set(found)


def _entities(prediction: Sequence[str], reference: Sequence[str]) -> tuple[int, int, int]:
  """(hits, predicted, true) entities of a sentence."""
  check(not isinstance(prediction, str) and len(prediction) == len(reference), f'{len(reference)} tags', prediction)
  predicted, true = entities(prediction), entities(reference)
  return len(predicted & true), len(predicted), len(true)


# ---- clusters ----------------------------------------------------------------------------------------------------


def _groups(prediction: int, reference: int) -> tuple[int, int]:
  return whole_number(prediction, 'a cluster'), whole_number(reference, 'a class')


def _entropy(counts: np.ndarray) -> float:
  p = counts / counts.sum()
  return float(-(p * np.log(p)).sum())


def _v_measure(rows: np.ndarray) -> dict[str, float]:
  """Whether clusters hold one class each, classes lie in one cluster each, and the harmonic mean of both.

  Source: Rosenberg & Hirschberg 2007, eq. 1 to 3, beta 1.
  """
  (_, cluster), (_, group) = (np.unique(ids, return_inverse=True) for ids in rows.T)
  _, in_both = np.unique(cluster * len(rows) + group, return_counts=True)
  clusters, classes, both = map(_entropy, (np.bincount(cluster), np.bincount(group), in_both))
  shared = max(clusters + classes - both, 0.0)
  homogeneity = shared / classes if classes else 1.0
  completeness = shared / clusters if clusters else 1.0
  return {'homogeneity': homogeneity, 'completeness': completeness,
          'v_measure': ratio(2 * homogeneity * completeness, homogeneity + completeness)}


METRICS = (
    Metric('accuracy', _accuracy, means('accuracy')),
    Metric('f1', _classes, _f1, summed=False),                      # of classes
    Metric('binary_f1', _positives, lambda sums: precision_recall_f1(*sums)),
    Metric('multilabel_f1', _labels, _multilabel),
    Metric('mcc', _classes, _mcc, summed=False),
    Metric('entity_f1', _entities, lambda sums: precision_recall_f1(*sums)),
    Metric('v_measure', _groups, _v_measure, summed=False, swappable=False),
)
