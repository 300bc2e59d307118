"""Texts against the texts they may be. BLEU and chrF are 0 to 100, as sacrebleu has them."""
import collections
import functools
import re
import string
from typing import Any, Sequence

import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.measure.metric import Metric, check, means


def _texts(prediction: str, reference: str | Sequence[str]) -> tuple[str, list[str]]:
  """The text, and the texts it may be; one alone need not be in a list."""
  golds = [reference] if isinstance(reference, str) else reference
  check(isinstance(prediction, str), 'a text', prediction)
  check(isinstance(golds, Sequence) and all(isinstance(gold, str) for gold in golds), 'a text or a list of texts',
        reference)
  return prediction, list(golds)


def _texts_of_some(prediction: str, reference: str | Sequence[str]) -> tuple[str, list[str]]:
  prediction, golds = _texts(prediction, reference)
  check(bool(golds), 'at least one reference', reference)
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


def _missing(package: str, what: str) -> JaxlmError:
  return JaxlmError(f'{what} needs the package {package}: pip install "jaxlm[measure]".')


def _sacrebleu(name: str, kind: str, **options: Any) -> Metric:
  """A measure of sacrebleu, by a sentence's counts, which its own significance tests resample (underscored there)."""
  @functools.cache
  def scorer() -> Any:
    try:
      import sacrebleu.metrics
    except ImportError as e:
      raise _missing('sacrebleu', name) from e
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
      raise _missing('rouge-score', 'rouge') from e
    return rouge_scorer.RougeScorer(names, use_stemmer=stem)

  def f1(prediction: str, reference: str | Sequence[str]) -> tuple[float, ...]:
    prediction, golds = _texts_of_some(prediction, reference)
    scores = scorer().score_multi(golds, prediction)
    return *(scores[name].fmeasure for name in names), 1

  return Metric('rouge', f1, means(*names))


METRICS = (Metric('squad', _squad, means('exact_match', 'f1')), bleu(), chrf(), chrf(word_order=2), rouge())
