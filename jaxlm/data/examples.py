"""Examples of a task as a stream: encoded before training begins, packed by a plan, read at random like any other."""
import dataclasses
import functools
import hashlib
import sys
from typing import Any, Callable, Iterator, Sequence

import numpy as np
from tqdm.auto import tqdm

from jaxlm.data import store, tasks, tokenizers
from jaxlm.data.encoders import ENCODERS, Form, TooLong, form_of, singled
from jaxlm.data.mixtures import Schedule
from jaxlm.data.plans import best_fit_bins
from jaxlm.data.tasks import Example, Task
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The rows of a split as flat arrays; it pickles.

  Attributes:
    ids, marks, types: of all tokens, int32, float32 and uint8 [N].
    begins: where each part begins, and the end, int64.
    first: the first part of each row, and the end, int64.
    labels: of each row, or None.
    record: number of each row's example, int32.
    places: of each row, `Row.place`, int32 [rows, 2].
    name: of the split.
  """
  ids: np.ndarray
  marks: np.ndarray
  types: np.ndarray
  begins: np.ndarray
  first: np.ndarray
  labels: np.ndarray | None
  record: np.ndarray
  places: np.ndarray
  name: str

  def __len__(self) -> int:
    return len(self.first) - 1

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Tokens of each row, all its parts together."""
    return np.diff(self.begins[self.first])

  @functools.cached_property
  def digest(self) -> str:
    arrays = [self.ids, self.marks, self.types, self.begins, self.first]
    arrays += [] if self.labels is None else [self.labels]
    return hashlib.sha256(b''.join(hashlib.sha256(np.ascontiguousarray(x)).digest() for x in arrays)).hexdigest()


def encode(task: Task, split: str, form: Form, examples: Sequence[Example] | None = None, kind: str = '') -> Encoded:
  """All examples of a split as rows.

  Args:
    examples: those, where they have been read.
    kind: a key of ENCODERS; '': the task's.
  Raises:
    JaxlmError: a record that does not fit the task or the window: file, line, remedy.
  """
  make = ENCODERS[kind or task.kind]
  examples = tasks.examples(task, split) if examples is None else examples
  ids, marks, types, lengths, counts, labels, record, places = [], [], [], [], [], [], [], []
  left_out = 0
  for number, example in enumerate(tqdm(examples, desc=f'encoding {split}', unit='examples', disable=None)):
    try:
      found = list(make(form, example))
    except TooLong:
      if form.refuses:
        raise
      found, left_out = [], left_out + 1
    for row in found:
      for part in row.parts:
        ids.append(np.array(part.ids, np.int32))
        marks.append(np.array(part.marks, np.float32))
        types.append(np.array(part.types, np.uint8))
        lengths.append(len(part.ids))
      counts.append(len(row.parts))
      record.append(number)
      places.append(row.place)
      if row.labels is not None:
        labels.append(row.labels)
  if not counts:
    raise JaxlmError(f'No example of split {split!r} fits into a window of {form.length} tokens; make config.seq_len '
                     'longer.')
  if left_out:
    tqdm.write(f'{split}: {left_out} of {number + 1} examples do not fit into {form.length} tokens and are left out '
               '(config.data.too_long).', file=sys.stderr)
  sums = lambda x: np.concatenate([[0], np.cumsum(x, dtype=np.int64)])
  return Encoded(np.concatenate(ids), np.concatenate(marks), np.concatenate(types), sums(lengths), sums(counts),
                 np.stack(labels) if labels else None, np.array(record, np.int32),
                 np.array(places, np.int32), split)


def beginning(encoded: Encoded, tokens: int) -> Encoded:
  """The first examples, whole, that have so many tokens together; at least one."""
  last = np.append(np.flatnonzero(np.diff(encoded.record)), len(encoded) - 1)  # rows, of each example
  ends = encoded.begins[encoded.first[last + 1]]
  rows = int(last[max(np.searchsorted(ends, tokens, side='right') - 1, 0)]) + 1
  first = encoded.first[:rows + 1]
  begins = encoded.begins[:first[-1] + 1]
  n = begins[-1]
  return dataclasses.replace(encoded, ids=encoded.ids[:n], marks=encoded.marks[:n], types=encoded.types[:n], begins=begins,
                             first=first, labels=None if encoded.labels is None else encoded.labels[:rows],
                             record=encoded.record[:rows], places=encoded.places[:rows])


def items(encoded: Encoded, groups: Sequence[Sequence[int]], empty: Callable[[int], dict], seq_len: int, filler: int,
          together: bool) -> dict[str, np.ndarray]:
  """Rows as `answers` reads them: each holds the texts of one group of encoded rows, one after the other.

  Args:
    groups: numbers of encoded rows, a sequence a row; an empty one is padding.
    empty: `Objective.empty`.
    together: False: the parts of a row are a question for the encoder and an answer, in turn.
  """
  block = {key: np.stack([value] * len(groups)) for key, value in empty(seq_len).items()}
  for key in ('tokens', 'source_tokens'):
    if key in block:
      block[key][:] = filler
  for row, group in enumerate(groups):
    column, source, segment = 0, 0, 0
    for number in group:
      for part in range(encoded.first[number], encoded.first[number + 1]):
        a, b = encoded.begins[part], encoded.begins[part + 1]
        asks = not together and (part - encoded.first[number]) % 2 == 0
        segment += together or asks
        if asks:
          here = slice(source, source + b - a)
          block['source_tokens'][row, here], block['source_segment_ids'][row, here] = encoded.ids[a:b], segment
          source += b - a
          continue
        here = slice(column, column + b - a)
        block['tokens'][row, here], block['segment_ids'][row, here] = encoded.ids[a:b], segment
        block['marks'][row, here], block['types'][row, here] = encoded.marks[a:b], encoded.types[a:b]
        column += b - a
      if 'labels' in block:
        block['labels'][row] = encoded.labels[number]
  return block


def bins(encoded: Encoded, form: Form) -> list[np.ndarray]:
  """Numbers of encoded rows that share a row, as full as best-fit decreasing makes them.

  Source: Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv:2404.10830.
  """
  lengths, capacity = encoded.lengths, form.length
  if form.target:  # both sides must fit: a pair takes the larger share of its side
    parts = np.diff(encoded.begins).reshape(-1, 2)
    capacity = form.length * form.target
    lengths = np.maximum(parts[:, 0] * form.target, parts[:, 1] * form.length)
  number = best_fit_bins(lengths, capacity)
  order = np.argsort(number, kind='stable')
  return np.split(order, np.flatnonzero(np.diff(number[order])) + 1)


@dataclasses.dataclass(frozen=True)
class TaskData:
  """A task's examples for one model.

  Attributes:
    task: its description.
    form: how rows are made.
    train, validation: encoded.
    examples: of the validation split, as they were read: the first ones, as far as config.eval.max_tokens goes.
  """
  task: Task
  form: Form
  train: Encoded
  validation: Encoded
  examples: tuple[Example, ...]

  @functools.cached_property
  def digest(self) -> str:
    """Of what is learned from."""
    return hashlib.sha256(f'{self.task.labels} {self.train.digest} {self.validation.digest}'.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a run learns of a task from, in the place of `store.Prepared`."""
  tokenizer: Tokenizer
  task: TaskData
  stores: tuple = ()

  @property
  def keys(self) -> dict[str, str]:
    """{name: digest} of what is learned from."""
    return {'task': self.task.digest}


def prepare(config: Any, roles: Sequence[str] = (), kinds: Sequence[str] = tuple(tasks.KINDS)) -> Prepared:
  """Reads, checks and encodes the task of a config. A tokenizer that is trained here learns from data.source.

  Args:
    kinds: of task, that the objective learns.
  Raises:
    JaxlmError: no such task, one that the objective does not learn, another number of labels than the model has; a
      record that does not fit: file, line, remedy.
  """
  task = tasks.make(config.data.task)
  if task.kind not in kinds:
    raise JaxlmError(f'config.data.task={config.data.task!r} is of kind {task.kind!r}, which objective '
                     f'{config.objective.name!r} does not learn; it learns {" and ".join(kinds)}. Take a '
                     "task of that kind, or set config.objective.name to an objective of this one.")
  tokenizer = tokenizers.resolve(config.data.tokenizer)
  tokenizer = tokenizer.with_roles(roles) if tokenizer else store.prepare(config, roles).tokenizer
  heads = len(task.labels) or (1 if task.kind == 'regress' else 0)
  kind = 'single' if config.objective.name == 'kto' else task.kind
  if kind == task.kind and heads and config.model.head.num_labels != heads:
    raise JaxlmError(f'config.model.head.num_labels={config.model.head.num_labels}, but task {config.data.task!r} has '
                     f'{heads} labels; set it to {heads}.')
  form = form_of(config, tokenizer)
  read = {split: drawn(list(tasks.examples(task, split)), config) for split in ('train', 'validation')}
  if kind == 'single':
    read = {split: singled(task, examples, config.objective.kto.good) for split, examples in read.items()}
  train, validation = (encode(task, split, form, examples, kind) for split, examples in read.items())
  validation = beginning(validation, config.eval.max_tokens)
  measured = tuple(read['validation'][:validation.record[-1] + 1])
  return Prepared(tokenizer, TaskData(task, form, train, validation, measured))


def drawn(read: list[Example], config: Any) -> list[Example]:
  """As many of the examples as the config asks for, in their order."""
  rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, 0], np.uint64)))
  return tasks.drawn(read, config.data.task_examples, rng)


class TaskStream:
  """The endless sequence of training rows of a task: `examples(i)` is a pure function of (config, i). It pickles.

  Args:
    config: the whole config.
    data: of its task.
    objective: of the config.
  """

  def __init__(self, config: Any, data: TaskData, objective: Any):
    encoded, form = data.train, data.form
    packed = config.data.packing == 'best_fit' and config.objective.name == 'answer'
    self.groups = bins(encoded, form) if packed else [np.array([i]) for i in range(len(encoded))]
    self._encoded, self._objective, self._seq_len = encoded, objective, config.seq_len
    self._filler, self._together = form.tokenizer.vocab.filler, not form.target
    self._capacity = form.length
    self.schedule = Schedule([(0, (1,))], [len(self.groups)], config.seed, config.data.shuffle)

  @property
  def filled(self) -> float:
    """The share of columns that hold text."""
    return float(self._encoded.lengths.sum() / (len(self.groups) * self._capacity))

  def examples(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Many rows, with the keys of `types.BATCH` but `example_ids`."""
    _, _, windows = self.schedule.locate(np.asarray(numbers, np.int64))
    return self.rows([self.groups[window] for window in windows.tolist()])

  def rows(self, groups: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    item = items(self._encoded, groups, self._objective.empty, self._seq_len, self._filler, self._together)
    return self._objective.example(item, None)


class TaskBatches:
  """Batches that hold every row of a split once, in order; what the last lacks is padding, which counts nothing.

  Attributes:
    name: 'validation'.
    encoded: the split.
  """

  def __init__(self, config: Any, data: TaskData, objective: Any, rows: Callable[[int], tuple[int, int]]):
    encoded, form = data.validation, data.form
    self.name, self.encoded = encoded.name, encoded
    self._make = functools.partial(items, encoded, empty=objective.empty, seq_len=config.seq_len,
                                   filler=form.tokenizer.vocab.filler, together=not form.target)
    self._objective, self._size, self._rows = objective, config.eval.batch_size, rows

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    lo, hi = self._rows(self._size)
    for start in range(0, len(self.encoded), self._size):
      numbers = range(start + lo, start + hi)
      batch = self._objective.example(self._make([[n] if n < len(self.encoded) else [] for n in numbers]), None)
      batch['example_ids'] = np.arange(lo, hi, dtype=np.int32)
      yield {key: np.ascontiguousarray(value) for key, value in batch.items()}
