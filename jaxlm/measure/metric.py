"""A measure: a row of numbers an example, and a total over rows.

Rows are what intervals resample: `metric.total(rows[index])` is the measure of a resample, whatever the measure.
"""
import dataclasses
import operator
from typing import Any, Callable, Iterable

import numpy as np

from jaxlm.errors import JaxlmError


@dataclasses.dataclass(frozen=True)
class Metric:
  """A measure: what one example contributes, and what all contributions together say.

  Attributes:
    name: of the measure; what it tells may be several numbers with names of their own.
    of_example: (prediction, reference) -> numbers, as many for each example [K].
    combine: contributions -> {name: number}; of their sum [K] if `summed`, else of all of them [N, K].
    summed: whether the sum of the rows says everything; most measures are so, and resample fast.
    swappable: whether one system's row may stand among another's. Ids of clusters may not, each system has its own;
      nor may scores that are compared by rank or correlation, each system has its own scale.
  """
  name: str
  of_example: Callable[[Any, Any], Iterable[float]]
  combine: Callable[[np.ndarray], dict[str, float]]
  summed: bool = True
  swappable: bool = True

  def rows(self, predictions: Iterable[Any], references: Iterable[Any] | None = None) -> np.ndarray:
    """Each example's contribution, [N, K] float64.

    Args:
      references: None for what needs none: outcomes of tests, nats of a text.
    Raises:
      JaxlmError: no examples, another number of references, or an example that cannot be measured.
    """
    predictions = list(predictions)
    references = [None] * len(predictions) if references is None else list(references)
    if not predictions or len(predictions) != len(references):
      raise JaxlmError(f'{self.name} wants one reference for each prediction, and at least one; got '
                       f'{len(predictions)} predictions and {len(references)} references.')
    rows = []
    for i, pair in enumerate(zip(predictions, references)):
      try:
        rows.append(np.array([*self.of_example(*pair)], np.float64))
      except JaxlmError as e:
        raise JaxlmError(f'{self.name}, example {i}: {e}') from e
      except (TypeError, ValueError) as e:  # NumPy's, of what is no array of numbers
        raise JaxlmError(f'{self.name}, example {i}: cannot compare {short(pair[0])} with {short(pair[1])}: '
                         f'{str(e).splitlines()[0].rstrip(".")}.') from e
      if len(rows[i]) != len(rows[0]) or not np.isfinite(rows[i]).all():
        raise JaxlmError(f'{self.name}, example {i}: wanted {len(rows[0])} finite numbers, as of example 0, got '
                         f'{len(rows[i])}, {np.isfinite(rows[i]).sum()} of them finite; give every example the same '
                         'form.')
    return np.stack(rows)

  def total(self, rows: np.ndarray) -> dict[str, float]:
    """What rows [N, K] say together: {name: number}; not a number where it is undefined."""
    return {name: float(value) for name, value in self.combine(rows.sum(0) if self.summed else rows).items()}

  def __call__(self, predictions: Iterable[Any], references: Iterable[Any] | None = None) -> dict[str, float]:
    """The measure of these predictions."""
    return self.total(self.rows(predictions, references))


# ---- what measures have in common ----------------------------------------------------------------------------------


def means(*names: str) -> Callable[[np.ndarray], dict[str, float]]:
  """Sums over the number of examples, which comes last in a row."""
  return lambda sums: dict(zip(names, sums[:-1] / sums[-1], strict=True))


def ratio(part: Any, whole: Any) -> Any:
  """part / whole, and 0 where there is no whole."""
  return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) != 0)


def precision_recall_f1(hits: Any, predicted: Any, true: Any) -> dict[str, Any]:
  """Each 0 where it has nothing to count, as scikit-learn and seqeval have it."""
  hits, predicted, true = (np.asarray(x, np.float64) for x in (hits, predicted, true))
  return dict(precision=ratio(hits, predicted), recall=ratio(hits, true), f1=ratio(2 * hits, predicted + true))


def check(good: bool, wanted: str, got: Any) -> None:
  """Raises JaxlmError where an answer is not what a measure wants."""
  if not good:
    raise JaxlmError(f'wanted {wanted}, got {short(got)}.')


def short(value: Any) -> str:
  """A value on part of a line."""
  shown = ' '.join(repr(value).split())
  return shown if len(shown) <= 60 else shown[:59] + '…'


def whole_number(value: Any, what: str) -> int:
  """A class or a cluster as an int; raises JaxlmError where it is none."""
  try:
    return operator.index(value.item() if isinstance(value, np.generic) else value)
  except TypeError:
    raise JaxlmError(f'wanted {what}, a whole number, got {short(value)}; number the names.') from None
