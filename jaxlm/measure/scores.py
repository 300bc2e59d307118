"""What an answer is worth: every measure is a row of numbers an example, and a total over rows.

Rows are what intervals resample: `metric.total(rows[index])` is the measure of a resample, whatever the measure.
Numbers are fractions, 0 to 1, but for BLEU and chrF, which are 0 to 100 as sacrebleu has them.
"""
import collections
import dataclasses
import functools
import math
import operator
import re
import string
from typing import Any, Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxlm.errors import JaxlmError

ECE_BINS = 15           # Guo et al. 2017
MAX_CLASSES = 1 << 20   # a class beyond is a hash or a token of another table, not a class
MAX_NATS = 700          # e to more overflows


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
        raise JaxlmError(f'{self.name}, example {i}: cannot compare {_short(pair[0])} with {_short(pair[1])}: '
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


def _means(*names: str) -> Callable[[np.ndarray], dict[str, float]]:
  """Sums over the number of examples, which comes last in a row."""
  return lambda sums: dict(zip(names, sums[:-1] / sums[-1], strict=True))


def _ratio(part: Any, whole: Any) -> Any:
  """part / whole, and 0 where there is no whole."""
  return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) != 0)


def _precision_recall_f1(hits: Any, predicted: Any, true: Any) -> dict[str, Any]:
  """Each 0 where it has nothing to count, as scikit-learn and seqeval have it."""
  hits, predicted, true = (np.asarray(x, np.float64) for x in (hits, predicted, true))
  return dict(precision=_ratio(hits, predicted), recall=_ratio(hits, true), f1=_ratio(2 * hits, predicted + true))


def _short(value: Any) -> str:
  shown = ' '.join(repr(value).split())
  return shown if len(shown) <= 60 else shown[:59] + '…'


def _wanted(good: bool, wanted: str, got: Any) -> None:
  if not good:
    raise JaxlmError(f'wanted {wanted}, got {_short(got)}.')


def _needs(package: str, what: str) -> JaxlmError:
  return JaxlmError(f'{what} needs the package {package}: pip install "jaxlm[measure]".')


# ---- classes -----------------------------------------------------------------------------------------------------


def _whole_number(value: Any, what: str) -> int:
  try:
    return operator.index(value.item() if isinstance(value, np.generic) else value)
  except TypeError:
    raise JaxlmError(f'wanted {what}, a whole number, got {_short(value)}; number the names.') from None


def _accuracy(prediction: Any, reference: Any) -> tuple[float, float]:
  same = prediction == reference
  _wanted(np.ndim(same) == 0, 'one answer', prediction)
  _wanted(prediction is None or isinstance(prediction, str) == isinstance(reference, str),
          f'an answer of the reference\'s kind, {type(reference).__name__}', prediction)
  return bool(same), 1


def _classes(prediction: Any, reference: Any) -> tuple[int, int]:
  """(predicted, true) class; -1 is an answer that is none of the classes."""
  predicted, true = _whole_number(prediction, 'a class'), _whole_number(reference, 'a class')
  _wanted(-1 <= predicted < MAX_CLASSES, f'a class from 0 to {MAX_CLASSES - 1}, or -1 for none', predicted)
  _wanted(0 <= true < MAX_CLASSES, f'a class from 0 to {MAX_CLASSES - 1}', true)
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
  pooled = _precision_recall_f1(hits.sum(), predicted.sum(), true.sum())
  found = {}
  for name, values in _precision_recall_f1(hits, predicted, true).items():
    found |= {f'macro_{name}': values.mean(), f'micro_{name}': pooled[name],
              f'weighted_{name}': _ratio(values @ true, true.sum())}
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
  _wanted(predicted < 2 and true < 2, 'classes 0 and 1', (predicted, true))
  return predicted == true == 1, predicted == 1, true == 1


def _labels(prediction: Sequence[int], reference: Sequence[int]) -> np.ndarray:
  """(hit, predicted, true) of every label of an example that may have several."""
  predicted, true = np.asarray(prediction), np.asarray(reference)
  _wanted(predicted.ndim == 1 and predicted.shape == true.shape and np.isin([predicted, true], (0, 1)).all(),
          'a 0 or 1 for each label, in prediction and reference', (prediction, reference))
  return np.concatenate([predicted * true, predicted, true])


def _multilabel(sums: np.ndarray) -> dict[str, float]:
  """Averages over all labels: one that never occurs counts as 0, as in scikit-learn."""
  return _averages(*np.split(sums, 3))


# ---- numbers and probabilities -----------------------------------------------------------------------------------


def _number(value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    raise JaxlmError(f'wanted a number, got {_short(value)}.') from None


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
  probs, true = np.asarray(prediction, np.float64), _whole_number(reference, 'a class')
  _wanted(probs.ndim == 1 and len(probs) > 1 and probs.min() >= 0 and abs(probs.sum() - 1) < 0.02,  # bfloat16's sums
          'the probability of each class, which sum to 1', prediction)
  _wanted(0 <= true < len(probs), f'a class below {len(probs)}', true)
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
  _wanted(np.shape(prediction) == (3,) and min(prediction) >= 0, '(nats, tokens, bytes) of a text', prediction)
  return tuple(prediction)


def _perplexity(sums: np.ndarray) -> dict[str, float]:
  nats, tokens, size = sums
  loss = nats / tokens if tokens else math.nan
  return {'loss': loss, 'perplexity': math.exp(min(loss, MAX_NATS)),
          'bits_per_byte': nats / math.log(2) / size if size else math.nan}


# ---- texts -------------------------------------------------------------------------------------------------------


def _texts(prediction: str, reference: str | Sequence[str]) -> tuple[str, list[str]]:
  """The text, and the texts it may be; one alone need not be in a list."""
  golds = [reference] if isinstance(reference, str) else reference
  _wanted(isinstance(prediction, str), 'a text', prediction)
  _wanted(isinstance(golds, Sequence) and all(isinstance(gold, str) for gold in golds), 'a text or a list of texts',
          reference)
  return prediction, list(golds)


def _texts_of_some(prediction: str, reference: str | Sequence[str]) -> tuple[str, list[str]]:
  prediction, golds = _texts(prediction, reference)
  _wanted(bool(golds), 'at least one reference', reference)
  return prediction, golds


_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize_answer(answer: str) -> str:
  """An answer in lower case, without punctuation, articles and spare white space. Source: Rajpurkar et al. 2016."""
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', answer.lower().translate(_NO_PUNCTUATION)).split())


def _token_f1(answer: list[str], gold: list[str]) -> float:
  """F1 of bags of words; of two that are empty 1."""
  if not answer or not gold:
    return float(answer == gold)
  return 2 * (collections.Counter(answer) & collections.Counter(gold)).total() / (len(answer) + len(gold))


def _squad(prediction: str, reference: str | Sequence[str]) -> tuple[float, float, float]:
  """(exact match, token F1, 1), the best over the answers; without any, or with '', the right one is to say nothing.

  Source: Rajpurkar et al. 2018, SQuAD 2.0, arXiv:1806.03822, and its evaluation script.
  """
  prediction, golds = _texts(prediction, reference)
  answer = normalize_answer(prediction)
  golds = [gold for gold in map(normalize_answer, golds) if gold] or ['']
  return answer in golds, max(_token_f1(answer.split(), gold.split()) for gold in golds), 1


def _sacrebleu(name: str, kind: str, **options: Any) -> Metric:
  """A measure of sacrebleu, by a sentence's counts, which its own significance tests resample (underscored there)."""
  @functools.cache
  def scorer() -> Any:
    try:
      import sacrebleu.metrics
    except ImportError as e:
      raise _needs('sacrebleu', name) from e
    try:
      return getattr(sacrebleu.metrics, kind)(**options)
    except (KeyError, RuntimeError, OSError) as e:  # no such tokenizer, one not installed, one not downloaded
      raise JaxlmError(f'sacrebleu has no {kind} with {options} here: {" ".join(str(e).split())}') from e

  def counts(prediction: str, reference: str | Sequence[str]) -> list[int]:
    prediction, golds = _texts_of_some(prediction, reference)
    return scorer()._extract_corpus_statistics([prediction], [[gold] for gold in golds])[0]

  def score(sums: np.ndarray) -> dict[str, float]:
    return {name: scorer()._compute_score_from_stats([int(x) for x in np.rint(sums)]).score}

  return Metric(name, counts, score)


def bleu(tokenize: str = '13a') -> Metric:
  """Corpus BLEU, 0 to 100. Source: Post 2018, arXiv:1804.08771.

  Args:
    tokenize: sacrebleu's: '13a'; 'zh', 'ja-mecab', 'ko-mecab' for Chinese, Japanese, Korean; 'char', 'flores200'.
  """
  return _sacrebleu('bleu', 'BLEU', tokenize=tokenize, force=True)


def chrf(word_order: int = 0) -> Metric:
  """Corpus chrF, 0 to 100. Source: Popović 2015, chrF; 2017, chrF++.

  Args:
    word_order: longest n-gram of words beside those of characters: 0, or 2 for chrF++.
  """
  return _sacrebleu('chrf' + '+' * word_order, 'CHRF', word_order=word_order)


def rouge(stem: bool = False) -> Metric:
  """Mean F1 of ROUGE-1, -2 and -L, the best over references. Source: Lin 2004.

  Args:
    stem: whether Porter's stems are compared instead of words; papers differ.
  """
  names = 'rouge1', 'rouge2', 'rougeL'

  @functools.cache
  def scorer() -> Any:
    try:
      from rouge_score import rouge_scorer
    except ImportError as e:
      raise _needs('rouge-score', 'rouge') from e
    return rouge_scorer.RougeScorer(names, use_stemmer=stem)

  def f1(prediction: str, reference: str | Sequence[str]) -> tuple[float, ...]:
    prediction, golds = _texts_of_some(prediction, reference)
    scores = scorer().score_multi(golds, prediction)
    return *(scores[name].fmeasure for name in names), 1

  return Metric('rouge', f1, _means(*names))


# ---- sequences of tags -------------------------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
  """(type, first, last) of each entity of a sentence tagged by BIO, IO or BIOES.

  Tags that break the scheme are read as conlleval reads them: I or E begins an entity where none goes on.
  """
  found, before = [], ('O', '')
  for i, tag in enumerate(tags):
    prefix, _, kind = tag.partition('-')
    _wanted(prefix in ('O', 'B', 'I', 'E', 'S'), 'a tag O, B-type, I-type, E-type or S-type', tag)
    if prefix in ('I', 'E') and before[0] in ('B', 'I') and before[1] == kind:
      found[-1] = (kind, found[-1][1], i)
    elif prefix != 'O':
      found.append((kind, i, i))
    before = prefix, kind
  return set(found)


def _entities(prediction: Sequence[str], reference: Sequence[str]) -> tuple[int, int, int]:
  """(hits, predicted, true) entities of a sentence."""
  _wanted(not isinstance(prediction, str) and len(prediction) == len(reference), f'{len(reference)} tags', prediction)
  predicted, true = entities(prediction), entities(reference)
  return len(predicted & true), len(predicted), len(true)


# ---- rankings and clusters ---------------------------------------------------------------------------------------


def ranking(k: int = 10) -> Metric:
  """nDCG and recall of the first k, and the mean reciprocal rank of the first that is relevant.

  A prediction lists ids, the best first; a reference lists those that are relevant, or is {id: gain}. Gains count as
  they are, not as 2^gain - 1. Source: Järvelin & Kekäläinen 2002; as trec_eval computes it.
  """
  def of_query(prediction: Sequence[Any], reference: Mapping[Any, float] | Iterable[Any]) -> tuple[float, ...]:
    gains = dict(reference) if isinstance(reference, Mapping) else dict.fromkeys(reference, 1)
    ideal = sorted((gain for gain in gains.values() if gain > 0), reverse=True)
    _wanted(bool(ideal), 'something relevant; leave out queries without', reference)
    _wanted(not isinstance(prediction, str) and len(set(prediction)) == len(prediction),
            'a list of ids that names each once', prediction)
    found = [max(gains.get(item, 0), 0) for item in prediction]
    dcg = lambda values: sum(value / math.log2(rank + 2) for rank, value in enumerate(values[:k]))
    first = next((rank + 1 for rank, gain in enumerate(found) if gain), math.inf)
    return dcg(found) / dcg(ideal), sum(gain > 0 for gain in found[:k]) / len(ideal), 1 / first, 1

  return Metric('ranking', of_query, _means(f'ndcg@{k}', f'recall@{k}', 'mrr'))


def _groups(prediction: int, reference: int) -> tuple[int, int]:
  return _whole_number(prediction, 'a cluster'), _whole_number(reference, 'a class')


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
          'v_measure': _ratio(2 * homogeneity * completeness, homogeneity + completeness)}


# ---- programs ----------------------------------------------------------------------------------------------------


def pass_at(k: int) -> Metric:
  """The chance that one of k samples passes, estimated without bias from n >= k.

  A prediction lists whether each sample of a problem passed; there are no references.
  Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.
  """
  def of_problem(prediction: Sequence[bool], _: Any) -> tuple[float, float]:
    passed = np.asarray(prediction)
    _wanted(passed.ndim == 1 and np.isin(passed, (0, 1)).all(), 'whether each sample passed', prediction)
    _wanted(len(passed) >= k, f'at least {k} samples', prediction)
    n, failed = len(passed), int(len(passed) - passed.sum())
    return 1 - math.comb(failed, k) / math.comb(n, k), 1

  return Metric(f'pass@{k}', of_problem, _means(f'pass@{k}'))


METRICS = {metric.name: metric for metric in (
    Metric('accuracy', _accuracy, _means('accuracy')),
    Metric('f1', _classes, _f1, summed=False),                      # of classes
    Metric('binary_f1', _positives, lambda sums: _precision_recall_f1(*sums)),
    Metric('multilabel_f1', _labels, _multilabel),
    Metric('mcc', _classes, _mcc, summed=False),
    Metric('pearson', _numbers, _pearson, summed=False, swappable=False),
    Metric('spearman', _numbers, _spearman, summed=False, swappable=False),
    Metric('mse', _squared_error, _means('mse')),
    Metric('calibration', _confidence, _calibration),
    Metric('perplexity', _text_cost, _perplexity),
    Metric('squad', _squad, _means('exact_match', 'f1')),
    bleu(), chrf(), chrf(word_order=2), rouge(),
    Metric('entity_f1', _entities, lambda sums: _precision_recall_f1(*sums)),
    ranking(),
    Metric('v_measure', _groups, _v_measure, summed=False, swappable=False),
    pass_at(1), pass_at(10), pass_at(100),
)}
