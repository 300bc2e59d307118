"""What scores of a label head say of a task's examples, and what that is worth."""
from typing import Any, Sequence

import numpy as np

from jaxlm.data.encoders import Form, offsets
from jaxlm.data.examples import Encoded
from jaxlm.data.tasks import KINDS, Example, Task
from jaxlm.lookup import lookup
from jaxlm.measure.metric import Metric
from jaxlm.measure.scores import METRICS

LONGEST = 30  # tokens of an answer that is extracted


def metric_of(task: Task) -> Metric:
  """The measure of a task."""
  return lookup(METRICS, task.metric or KINDS[task.kind].metric, 'measure')


def of_scores(task: Task, examples: Sequence[Example], encoded: Encoded, form: Form,
              scores: np.ndarray) -> dict[str, float]:
  """{name: number} of the task's measure.

  Args:
    encoded: the rows of those examples.
    scores: of each row [N, labels], or of its tokens [N, T, labels].
  """
  return metric_of(task)(predicted(task, examples, encoded, form, scores), references(task, examples))


def told(task: Task, examples: Sequence[Example]) -> list[str]:
  """Names of the numbers that `of_scores` gives.

  Raises:
    JaxlmError: no such measure, or one that does not read what this kind of task answers.
  """
  right = references(task, examples[:2])
  return list(metric_of(task)([x[0] if x else '' for x in right] if task.kind == 'span' else right, right))


def references(task: Task, examples: Sequence[Example]) -> list[Any]:
  """What is right, as the task's measure takes it."""
  if task.kind == 'tag':
    return [[task.labels[tag] for tag in example.target] for example in examples]
  if task.kind == 'span' or task.kind == 'text' and 'answers' in task.fields:
    return [list(example.answers) for example in examples]
  return [example.target for example in examples]


def predicted(task: Task, examples: Sequence[Example], encoded: Encoded, form: Form, scores: np.ndarray) -> list[Any]:
  """What the scores say of each example, likewise."""
  if task.kind == 'classify':
    return scores.argmax(-1)[:len(examples)].tolist()
  if task.kind == 'multi_label':
    return [tuple(row) for row in (scores > 0).astype(int)[:len(examples)].tolist()]
  if task.kind == 'regress':
    return scores[:len(examples), 0].tolist()
  if task.kind == 'tag':
    return _tags(task, examples, encoded, scores)
  return _spans(examples, encoded, form, scores)


def _tags(task: Task, examples: Sequence[Example], encoded: Encoded, scores: np.ndarray) -> list[list[str]]:
  """A tag for each word, at its first piece; words beyond the window have none, 'O', or the first there is."""
  found, outside = [], 'O' if 'O' in task.labels else task.labels[0]
  for number, example in enumerate(examples):
    a, b = encoded.begins[encoded.first[number]], encoded.begins[encoded.first[number + 1]]
    columns = np.flatnonzero(encoded.marks[a:b] >= 0)
    said = [task.labels[tag] for tag in scores[number, columns].argmax(-1)]
    found.append(said + [outside] * (len(example.target) - len(said)))
  return found


def _spans(examples: Sequence[Example], encoded: Encoded, form: Form, scores: np.ndarray) -> list[str]:
  """The best stretch of any window of each example's context; '' where the first column of text is better than all."""
  rows: list[list[int]] = [[] for _ in examples]
  for row, number in enumerate(encoded.record.tolist()):
    rows[number].append(row)
  found = []
  for example, own in zip(examples, rows):
    places, best, said = offsets(form.tokenizer, example.second)[1], -np.inf, ''
    for row in own:
      column, first = encoded.places[row]
      a, b = encoded.begins[encoded.first[row]], encoded.begins[encoded.first[row + 1]]
      start, end = scores[row, :b - a].T
      inside = slice(column, b - a - len(form.end))
      pair = start[inside, None] + end[None, inside]
      ends = np.arange(len(pair)) - np.arange(len(pair))[:, None]  # tokens from the first to the last
      pair = np.where((ends >= 0) & (ends < LONGEST), pair, -np.inf)
      i, j = np.unravel_index(pair.argmax(), pair.shape)
      value = pair[i, j] - start[len(form.front)] - end[len(form.front)]
      if value > best:
        best = value
        said = example.second[places[first + i][0]:places[first + j][1]] if value > 0 else ''
    found.append(said)
  return found
