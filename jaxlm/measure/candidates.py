"""Many candidates for one question: ranked ones, of which some are relevant; samples, of which some pass."""
import math
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from jaxlm.measure.metric import Metric, check, means


def ranking(k: int = 10) -> Metric:
  """nDCG and recall of the first k, and the mean reciprocal rank of the first that is relevant.

  A prediction lists ids, the best first; a reference lists those that are relevant, or is {id: gain}. Gains count as
  they are, not as 2^gain - 1. Source: Järvelin & Kekäläinen 2002; as trec_eval computes it.
  """
  def of_query(prediction: Sequence[Any], reference: Mapping[Any, float] | Iterable[Any]) -> tuple[float, ...]:
    gains = dict(reference) if isinstance(reference, Mapping) else dict.fromkeys(reference, 1)
    ideal = sorted((gain for gain in gains.values() if gain > 0), reverse=True)
    check(bool(ideal), 'something relevant; leave out queries without', reference)
    check(not isinstance(prediction, str) and len(set(prediction)) == len(prediction),
          'a list of ids that names each once', prediction)
    found = [max(gains.get(item, 0), 0) for item in prediction]
    dcg = lambda values: sum(value / math.log2(rank + 2) for rank, value in enumerate(values[:k]))
    first = next((rank + 1 for rank, gain in enumerate(found) if gain), math.inf)
    return dcg(found) / dcg(ideal), sum(gain > 0 for gain in found[:k]) / len(ideal), 1 / first, 1

  return Metric('ranking', of_query, means(f'ndcg@{k}', f'recall@{k}', 'mrr'))


def pass_at(k: int) -> Metric:
  """The chance that one of k samples passes, estimated without bias from n >= k.

  A prediction lists whether each sample of a problem passed; there are no references.
  Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.
  """
  def of_problem(prediction: Sequence[bool], _: Any) -> tuple[float, float]:
    passed = np.asarray(prediction)
    check(passed.ndim == 1 and np.isin(passed, (0, 1)).all(), 'whether each sample passed', prediction)
    check(len(passed) >= k, f'at least {k} samples', prediction)
    n, failed = len(passed), int(len(passed) - passed.sum())
    return 1 - math.comb(failed, k) / math.comb(n, k), 1

  return Metric(f'pass@{k}', of_problem, means(f'pass@{k}'))


METRICS = (ranking(), pass_at(1), pass_at(10), pass_at(100))
