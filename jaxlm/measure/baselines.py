"""What needs no model: answers that any model should beat, in the form that exams judge."""
import collections
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from jaxlm.data.tasks import Example, Task, last_said
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup

Baseline = Callable[[Task, Sequence[Example], Sequence[Example]], list[Any]]  # (task, training examples, those asked)


def _majority(task: Task, train: Sequence[Example], asked: Sequence[Example]) -> list[Any]:
  """The commonest answer; of tags, of each word by itself; of numbers, the mean."""
  if task.kind == 'tag':
    of_word: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    every: collections.Counter = collections.Counter()
    for example in train:
      every.update(example.target)
      for word, tag in zip(example.words, example.target):
        of_word[word][tag] += 1
    best = lambda counter: counter.most_common(1)[0][0]
    return [[task.labels[best(of_word[word]) if word in of_word else best(every)] for word in e.words] for e in asked]
  if task.kind == 'regress':
    return [float(np.mean([e.target for e in train]))] * len(asked)
  told = {'span': lambda e: e.answers[0] if e.answers else '', 'chat': lambda e: last_said(e, 'assistant')}
  answers = list(map(told.get(task.kind, lambda e: e.target), train))
  return [collections.Counter(answers).most_common(1)[0][0]] * len(asked)


def _tfidf(task: Task, train: Sequence[Example], asked: Sequence[Example]) -> list[Any]:
  """Words and pairs of words by TF-IDF: logistic regression on them; of numbers ridge; of documents and of two answers,
  cosines; of text the answer to the nearest question."""
  try:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
  except ImportError as e:
    raise JaxlmError('The baseline tfidf needs scikit-learn: pip install "jaxlm[measure]".') from e
  vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r'\w+|[^\w\s]')
  text = lambda e: f'{e.input}\n{e.second}' if e.second and task.kind != 'retrieve' else e.input
  if task.kind == 'prefer':  # the answer that is more like its question
    vectors.fit([text for e in train for text in (e.input, e.second)])
    near = lambda answers: vectors.transform([e.input for e in asked]).multiply(vectors.transform(answers)).sum(1)
    better = np.asarray(near([e.second for e in asked]) > near([e.choices[0] for e in asked]))
    return better[:, 0].astype(int).tolist()
  if task.kind == 'retrieve':
    vectors.fit([e.second for e in train] + [e.input for e in train])
    queries, documents = (vectors.transform(texts) for texts in ([e.input for e in asked], [e.second for e in asked]))
    return [order for part in _cosines(queries, documents) for order in np.argsort(-part, kind='stable').tolist()]
  if len({e.target for e in train}) == 1:
    return [train[0].target] * len(asked)
  seen = vectors.fit_transform(map(text, train))
  if task.kind == 'text':
    nearest = [i for part in _cosines(vectors.transform(map(text, asked)), seen) for i in part.argmax(1)]
    return [train[i].target for i in nearest]
  model = Ridge() if task.kind == 'regress' else LogisticRegression(C=10, max_iter=1000)
  return model.fit(seen, [e.target for e in train]).predict(vectors.transform(map(text, asked))).tolist()


def _cosines(rows: Any, others: Any, size: int = 256) -> Iterator[np.ndarray]:
  """Of each row with all others, so many rows at a time."""
  for start in range(0, rows.shape[0], size):
    yield (rows[start:start + size] @ others.T).toarray()


def _lead(task: Task, train: Sequence[Example], asked: Sequence[Example]) -> list[str]:
  """The first line of the question."""
  return [next(iter(question.strip().splitlines()), '') for question in _copy(task, train, asked)]


def _copy(task: Task, train: Sequence[Example], asked: Sequence[Example]) -> list[str]:
  """The question itself; in a conversation what the user said last."""
  return [last_said(e, 'user') if task.kind == 'chat' else e.input for e in asked]


_FITS = {'majority': ('classify', 'regress', 'tag', 'span', 'choice', 'text', 'chat'),
         'tfidf': ('classify', 'regress', 'retrieve', 'prefer', 'text'),
         'lead': ('text', 'chat'), 'copy': ('text', 'chat')}
BASELINES: dict[str, Baseline] = {'majority': _majority, 'tfidf': _tfidf, 'lead': _lead, 'copy': _copy}


def answers(name: str, task: Task, train: Sequence[Example], asked: Sequence[Example]) -> list[Any]:
  """What a baseline says to the examples that are asked.

  Raises:
    JaxlmError: no such baseline, or not of this kind of task.
  """
  baseline = lookup(BASELINES, name, 'baseline')
  if task.kind not in _FITS.get(name, (task.kind,)):
    fitting = [other for other, kinds in _FITS.items() if task.kind in kinds]
    raise JaxlmError(f'The baseline {name!r} says nothing to a task of kind {task.kind!r}; take '
                     f'{" or ".join(fitting) or "none"}.')
  return baseline(task, train, asked)
