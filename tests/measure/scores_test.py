"""Every measure against published implementations where they are installed, and by hand where they are not."""
import itertools
import math
import sys

import numpy as np
import pytest

from jaxlm.errors import JaxlmError
from jaxlm.measure import candidates, labels, texts
from jaxlm.measure.scores import METRICS

NEEDS = {'bleu': 'sacrebleu', 'chrf': 'sacrebleu', 'chrf++': 'sacrebleu', 'rouge': 'rouge_score'}
WORDS = 'the a cat dog sat, on mat. running runs! über 3.5 naïve'.split()
TAGS = [f'{prefix}-{kind}' for prefix in 'BIES' for kind in ('PER', 'LOC')] + ['O', 'O']
N = 40


def _text(rng, most=9):
  return ' '.join(rng.choice(WORDS, rng.integers(0, most)))


def _examples(name):
  """(predictions, references) of N made-up examples."""
  rng = np.random.default_rng(list(name.encode()))
  texts = [_text(rng) for _ in range(N)]
  several = [[_text(rng) for _ in range(rng.integers(1, 4))] for _ in range(N)]
  classes = rng.integers(0, 4, N), rng.integers(0, 4, N)
  if name.startswith('pass@'):
    return rng.integers(0, 2, (N, 120)), None
  return {
      'accuracy': classes, 'f1': classes, 'mcc': classes, 'v_measure': classes,
      'binary_f1': tuple(x % 2 for x in classes),
      'multilabel_f1': tuple(rng.integers(0, 2, (2, N, 5))),
      'pearson': tuple(rng.normal(size=(2, N))), 'mse': tuple(rng.normal(size=(2, N))),
      'spearman': tuple(rng.integers(0, 6, (2, N))),
      'calibration': (rng.dirichlet(np.ones(4) / 2, N), classes[1]),
      'perplexity': ([(rng.uniform(1, 9), rng.integers(1, 9), rng.integers(5, 40)) for _ in range(N)], None),
      'squad': (texts, several), 'bleu': (texts, several), 'chrf': (texts, several), 'chrf++': (texts, several),
      'rouge': (texts, several),
      'entity_f1': tuple([list(rng.choice(TAGS, 1 + i % 9)) for i in range(N)] for _ in range(2)),
      'ranking': ([list(rng.permutation(20)) for _ in range(N)],
                  [dict(zip(rng.permutation(20)[:5].tolist(), rng.integers(1, 4, 5).tolist())) for _ in range(N)]),
  }[name]


def _measured(name):
  if name in NEEDS:
    pytest.importorskip(NEEDS[name])
  return METRICS[name], *_examples(name)


@pytest.mark.parametrize('name', METRICS)
def test_rows_are_all_that_a_measure_of_some_of_the_examples_needs(name):
  metric, predictions, references = _measured(name)
  rows = metric.rows(predictions, references)
  index = np.random.default_rng(0).integers(0, N, N)
  pick = lambda x: None if x is None else [x[i] for i in index]
  assert metric.total(rows[index]) == metric(pick(predictions), pick(references))
  if metric.summed:
    assert metric.total(rows) == pytest.approx(metric.total(rows.sum(0, keepdims=True)), rel=1e-12)


@pytest.mark.parametrize('name', METRICS)
def test_the_order_of_examples_does_not_matter(name):
  metric, predictions, references = _measured(name)
  rows = metric.rows(predictions, references)
  assert metric.total(rows[::-1]) == pytest.approx(metric.total(rows), rel=1e-12)


# ---- classes -----------------------------------------------------------------------------------------------------


def test_f1_by_hand():
  found = METRICS['f1']([0, 0, 1, 1, 2], [0, 1, 1, 1, 0])  # hits 1, 2, 0; predicted 2, 2, 1; true 2, 3, 0
  assert found == pytest.approx(dict(
      macro_precision=(1 / 2 + 1 + 0) / 3, macro_recall=(1 / 2 + 2 / 3 + 0) / 3, macro_f1=(1 / 2 + 4 / 5 + 0) / 3,
      micro_precision=3 / 5, micro_recall=3 / 5, micro_f1=3 / 5,
      weighted_precision=(2 / 2 + 3) / 5, weighted_recall=3 / 5, weighted_f1=(2 / 2 + 3 * 4 / 5) / 5))


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('average', ['macro', 'micro', 'weighted'])
def test_f1_is_that_of_scikit_learn(average, seed):
  sklearn = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(seed)
  predicted, true = rng.integers(0, 6, 12), rng.integers(1, 8, 12)  # some classes are never predicted, some never true
  want = sklearn.precision_recall_fscore_support(true, predicted, average=average, zero_division=0)[:3]
  found = METRICS['f1'](predicted, true)
  assert [found[f'{average}_{name}'] for name in ('precision', 'recall', 'f1')] == pytest.approx(want)


def test_an_answer_that_is_no_class_misses_one_and_is_predicted_as_none():
  found = METRICS['f1']([0, -1], [0, 1])
  assert (found['micro_precision'], found['micro_recall'], found['macro_f1']) == (1, 0.5, 0.5)
  other_class = METRICS['mcc']([0, 1, 3, 1], [0, 1, 1, 0])
  assert METRICS['mcc']([0, 1, -1, 1], [0, 1, 1, 0]) == other_class


@pytest.mark.parametrize('seed', range(5))
def test_matthews_correlation_is_the_formula_for_two_classes_and_scikit_learns_for_more(seed):
  rng = np.random.default_rng(seed)
  predicted, true = rng.integers(0, 2, (2, 30))
  tp, tn, fp, fn = (((predicted == p) & (true == t)).sum() for p, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
  want = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  assert METRICS['mcc'](predicted, true)['mcc'] == pytest.approx(want)
  sklearn = pytest.importorskip('sklearn.metrics')
  predicted, true = rng.integers(0, 5, (2, 30))
  assert METRICS['mcc'](predicted, true)['mcc'] == pytest.approx(sklearn.matthews_corrcoef(true, predicted))


def test_matthews_correlation_of_one_class_is_zero():
  assert METRICS['mcc']([1, 1, 1], [0, 1, 1]) == METRICS['mcc']([0, 1, 1], [1, 1, 1]) == {'mcc': 0}


def test_binary_f1_counts_class_one():
  assert METRICS['binary_f1']([1, 1, 0, 0], [1, 0, 1, 0]) == dict(precision=0.5, recall=0.5, f1=0.5)
  assert METRICS['binary_f1']([0, 0], [0, 0]) == dict(precision=0, recall=0, f1=0)


@pytest.mark.parametrize('seed', range(3))
def test_multilabel_f1_is_that_of_scikit_learn(seed):
  sklearn = pytest.importorskip('sklearn.metrics')
  predicted, true = np.random.default_rng(seed).integers(0, 2, (2, 6, 5))
  predicted[:, 0] = true[:, 0] = 0  # a label that never occurs
  found = METRICS['multilabel_f1'](predicted, true)
  for average in ('macro', 'micro', 'weighted'):
    assert found[f'{average}_f1'] == pytest.approx(sklearn.f1_score(true, predicted, average=average, zero_division=0))


def test_multilabel_f1_by_hand():
  found = METRICS['multilabel_f1']([[1, 1, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 1]])
  assert (found['micro_f1'], found['macro_f1']) == (pytest.approx(4 / 6), pytest.approx((1 + 2 / 3 + 0) / 3))


# ---- numbers and probabilities -----------------------------------------------------------------------------------


def test_correlations_are_those_of_scipy():
  stats = pytest.importorskip('scipy.stats')
  rng = np.random.default_rng(0)
  x = rng.integers(0, 9, 50)  # with ties
  y = x + rng.normal(size=50) * 3 + 1e6
  assert METRICS['pearson'](x, y)['pearson'] == pytest.approx(stats.pearsonr(x, y).statistic)
  assert METRICS['spearman'](x, y)['spearman'] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_correlations_by_hand():
  assert METRICS['pearson']([1, 2, 3], [2, 2, 4])['pearson'] == pytest.approx(math.sqrt(3) / 2)
  assert METRICS['spearman']([1, 2, 2, 9], [1, 2, 3, 1000])['spearman'] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
  assert math.isnan(METRICS['pearson']([0.1] * 3, [1, 2, 3])['pearson'])
  assert METRICS['mse']([1, 2], [1, 4]) == {'mse': 2}


def test_calibration_by_hand():
  found = METRICS['calibration']([[0.9, 0.1], [0.1, 0.9], [0.4, 0.6]], [0, 0, 1])
  assert found['ece'] == pytest.approx((abs(1.8 - 1) + abs(0.6 - 1)) / 3)
  assert found['brier'] == pytest.approx((0.02 + 1.62 + 0.32) / 3)


def test_calibration_error_is_the_sum_over_bins_that_are_closed_above():
  rng = np.random.default_rng(0)
  probs, true = rng.dirichlet(np.ones(3), 300), rng.integers(0, 3, 300)
  probs[:4] = [1, 0, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0, 1, 0]  # 0.6 = 9/15 and 0.8 = 12/15 lie on an edge
  confidence, right = probs.max(1), probs.argmax(1) == true
  want = 0
  for low, high in itertools.pairwise(np.linspace(0, 1, 16)):
    inside = (confidence > low) & (confidence <= high)
    if inside.any():
      want += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
  assert METRICS['calibration'](probs, true)['ece'] == pytest.approx(want)


def test_brier_score_of_two_classes_is_twice_that_of_scikit_learn():
  sklearn = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  p, true = rng.uniform(size=50), rng.integers(0, 2, 50)
  found = METRICS['calibration'](np.stack([1 - p, p], 1), true)
  assert found['brier'] == pytest.approx(2 * np.mean((p - true) ** 2))
  assert found['brier'] == pytest.approx(2 * sklearn.brier_score_loss(true, p))


def test_perplexity_is_of_tokens_and_bits_are_of_bytes():
  found = METRICS['perplexity']([(math.log(2) * 3, 1, 4), (math.log(2) * 5, 3, 4)])
  assert found == pytest.approx(dict(loss=2 * math.log(2), perplexity=4, bits_per_byte=1))
  assert math.isnan(METRICS['perplexity']([(3.0, 2, 0)])['bits_per_byte'])


# ---- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('prediction, golds, exact, f1', [
    ('The Cat!', 'cat', 1, 1),
    ('a  theatre,  an', ['x', 'Theatre'], 1, 1),       # articles are words, not letters
    ('the cat sat', ['cat', 'cat sat down'], 0, 0.8),  # 2 of 2, 2 of 3; the best answer counts
    ('cat cat', 'cat', 0, 2 / 3),                      # bags, not sets
    ("it's", 'its', 1, 1),
    ('', [], 1, 1), ('', '', 1, 1), ('the', [''], 1, 1),
    ('cat', [], 0, 0), ('', 'cat', 0, 0),
    ('', ['cat', '...'], 0, 0),                        # an answer of nothing but punctuation is none
    ('cat', 'dog', 0, 0),
])
def test_exact_match_and_token_f1_of_answers(prediction, golds, exact, f1):
  assert METRICS['squad']([prediction], [golds]) == dict(exact_match=exact, f1=pytest.approx(f1))


def _streams(references):
  """As sacrebleu wants them: the first reference of every sentence, the second, …; None where there is none."""
  return [*itertools.zip_longest(*references)]


def test_bleu_and_chrf_are_exactly_those_of_sacrebleu():
  sacrebleu = pytest.importorskip('sacrebleu')
  predictions, references = _examples('bleu')
  streams = _streams(references)
  assert METRICS['bleu'](predictions, references)['bleu'] == sacrebleu.corpus_bleu(predictions, streams).score > 0
  assert METRICS['chrf'](predictions, references)['chrf'] == sacrebleu.corpus_chrf(predictions, streams).score > 0
  plus = sacrebleu.corpus_chrf(predictions, streams, word_order=2).score
  assert METRICS['chrf++'](predictions, references)['chrf++'] == plus
  by_char = sacrebleu.corpus_bleu(predictions, streams, tokenize='char').score
  assert texts.bleu('char')(predictions, references)['bleu'] == by_char


def test_bleu_by_hand():
  pytest.importorskip('sacrebleu')
  found = METRICS['bleu'](['a b c d e', 'x y'], ['a b c d f g', 'x y'])
  # n-grams 6/7, 4/5, 2/3, 1/2; brevity exp(1 - 8/7)
  assert found['bleu'] == pytest.approx(100 * (6 / 7 * 4 / 5 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(-1 / 7))


def test_a_tokenizer_that_is_not_here_is_one_line():
  pytest.importorskip('sacrebleu')
  with pytest.raises(JaxlmError, match="sacrebleu has no BLEU with .*'klingon'") as e:
    texts.bleu('klingon')(['a'], ['a'])
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('stem', [False, True])
def test_rouge_is_the_mean_of_rouge_scores(stem):
  rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
  predictions, references = _examples('rouge')
  scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], use_stemmer=stem)
  each = [scorer.score_multi(golds, text) for text, golds in zip(predictions, references)]
  want = {name: np.mean([score[name].fmeasure for score in each]) for name in each[0]}
  assert texts.rouge(stem)(predictions, references) == pytest.approx(want)


def test_rouge_by_hand():
  pytest.importorskip('rouge_score')
  found = METRICS['rouge'](['a b c d'], ['b a c d e'])
  assert found == pytest.approx(dict(rouge1=8 / 9, rouge2=2 / 7, rougeL=6 / 9))


@pytest.mark.parametrize('name', NEEDS)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
  monkeypatch.setitem(sys.modules, NEEDS[name], None)
  metric = texts.rouge() if name == 'rouge' else texts._sacrebleu(name, 'BLEU')
  with pytest.raises(JaxlmError, match=r'pip install "jaxlm\[measure\]"'):
    metric(['a'], ['a'])


# ---- sequences of tags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tags, want', [
    ('B-X I-X O B-Y', {('X', 0, 1), ('Y', 3, 3)}),
    ('B-X B-X I-X', {('X', 0, 0), ('X', 1, 2)}),
    ('B-X I-X E-X S-X O', {('X', 0, 2), ('X', 3, 3)}),
    ('I-X I-X I-Y', {('X', 0, 1), ('Y', 2, 2)}),
    ('E-X E-X S-X I-X', {('X', 0, 0), ('X', 1, 1), ('X', 2, 2), ('X', 3, 3)}),
    ('O O', set()), ('B-a-b I-a-b', {('a-b', 0, 1)}),
])
def test_entities_of_tags(tags, want):
  assert labels.entities(tags.split()) == want


@pytest.mark.parametrize('tags', [['B-X', 'I-X', 'B-Y', 'I-Y', 'O'], TAGS])
def test_entity_f1_is_that_of_seqeval_for_any_tags(tags):
  seqeval = pytest.importorskip('seqeval.metrics')
  rng = np.random.default_rng(0)
  predicted, true = ([list(rng.choice(tags, 1 + i % 12)) for i in range(400)] for _ in range(2))
  found = METRICS['entity_f1'](predicted, true)
  want = [f(true, predicted) for f in (seqeval.precision_score, seqeval.recall_score, seqeval.f1_score)]
  assert [found['precision'], found['recall'], found['f1']] == pytest.approx(want, rel=1e-12)
  assert 0 < found['f1'] < 1


def test_entity_f1_by_hand():
  found = METRICS['entity_f1']([['B-X', 'I-X', 'O', 'B-Y']], [['B-X', 'I-X', 'I-X', 'B-Y']])
  assert found == dict(precision=0.5, recall=0.5, f1=0.5)


# ---- rankings, clusters, programs --------------------------------------------------------------------------------


def test_ranking_by_hand():
  found = candidates.ranking(3)([['b', 'a', 'x', 'c']], [{'a': 3, 'c': 1, 'd': 0}])
  dcg, ideal = 3 / math.log2(3), 3 + 1 / math.log2(3)
  assert found == pytest.approx({'ndcg@3': dcg / ideal, 'recall@3': 1 / 2, 'mrr': 1 / 2})
  assert candidates.ranking(1)([['x']], [['a']]) == {'ndcg@1': 0, 'recall@1': 0, 'mrr': 0}


def test_ndcg_is_that_of_scikit_learn():
  sklearn = pytest.importorskip('sklearn.metrics')
  predictions, references = _examples('ranking')
  gains = np.array([[reference.get(i, 0) for i in range(20)] for reference in references])
  ranks = np.argsort(predictions, axis=1)
  want = sklearn.ndcg_score(gains, -ranks, k=10)
  assert METRICS['ranking'](predictions, references)['ndcg@10'] == pytest.approx(want)


def test_v_measure_is_that_of_scikit_learn():
  sklearn = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  for size in (1, 2, 3, 8):
    clusters, classes = rng.integers(-1, size, 40), rng.integers(0, 3, 40)
    want = dict(zip(('homogeneity', 'completeness', 'v_measure'),
                    sklearn.homogeneity_completeness_v_measure(classes, clusters)))
    assert METRICS['v_measure'](clusters, classes) == pytest.approx(want)


def test_v_measure_by_hand():
  names = dict(homogeneity=0.5, completeness=1, v_measure=2 / 3)  # two classes of four in each cluster
  assert METRICS['v_measure']([0, 0, 1, 1], [0, 1, 2, 3]) == pytest.approx(names)
  assert METRICS['v_measure']([5, 5, 9], [1, 1, 0])['v_measure'] == pytest.approx(1)
  assert METRICS['v_measure']([0, 0], [0, 0])['v_measure'] == 1


@pytest.mark.parametrize('passed', [[0] * 5, [1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1]])
def test_pass_at_k_is_the_share_of_subsets_that_hold_one_that_passes(passed):
  for k in range(1, len(passed) + 1):
    want = np.mean([any(subset) for subset in itertools.combinations(passed, k)])
    assert candidates.pass_at(k)([passed])[f'pass@{k}'] == pytest.approx(want)


# ---- bad inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, predictions, references, said', [
    ('accuracy', [], [], 'at least one'),
    ('accuracy', [1], [1, 2], '1 predictions and 2 references'),
    ('accuracy', [1, '2'], [1, 2], "example 1: wanted an answer of the reference's kind, int, got '2'"),
    ('f1', ['yes'], [1], "wanted a class, a whole number, got 'yes'"),
    ('f1', [0], [-1], 'wanted a class from 0'),
    ('f1', [0.5], [1], 'whole number'),
    ('binary_f1', [2], [1], 'classes 0 and 1'),
    ('multilabel_f1', [[1, 0]], [[1, 0, 1]], 'a 0 or 1 for each label'),
    ('multilabel_f1', [[1, 0], [1]], [[1, 0], [1]], 'example 1: wanted 6 finite numbers'),
    ('mse', ['x'], [1], "wanted a number, got 'x'"),
    ('mse', [math.nan], [1], '1 of them finite'),
    ('calibration', [[2.0, 1.0]], [0], 'which sum to 1'),
    ('calibration', [['a', 'b']], [0], "cannot compare ['a', 'b'] with 0"),
    ('calibration', [[0.5, 0.5]], [2], 'a class below 2'),
    ('perplexity', [(1.0, 2)], None, '(nats, tokens, bytes)'),
    ('squad', [None], ['a'], 'wanted a text, got None'),
    ('squad', ['a'], [[1]], 'a list of texts'),
    ('bleu', ['a'], [[]], 'at least one reference'),
    ('entity_f1', [['O']], [['O', 'O']], 'wanted 2 tags'),
    ('entity_f1', [['PER']], [['O']], 'a tag O, B-type'),
    ('ranking', [['a', 'a']], [['a']], 'names each once'),
    ('ranking', [['a']], [{'a': 0}], 'leave out queries without'),
    ('pass@10', [[1, 0]], None, 'at least 10 samples'),
    ('pass@1', [[0.5]], None, 'whether each sample passed'),
])
def test_what_cannot_be_measured_is_one_line_that_names_the_example(name, predictions, references, said):
  with pytest.raises(JaxlmError) as e:
    METRICS[name](predictions, references)
  assert said in str(e.value) and '\n' not in str(e.value) and str(e.value).startswith(name)
