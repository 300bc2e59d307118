"""Examples of a task as tokens: encoded before training begins, packed by a plan, read at random like any other stream."""
import dataclasses
import functools
import hashlib
import sys
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
from tqdm.auto import tqdm

from jaxlm.data import chat, store, tasks, templates, tokenizers
from jaxlm.data.mixtures import Schedule
from jaxlm.data.plans import best_fit_bins
from jaxlm.data.tasks import Example, Task
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError

NONE = -1  # the tag of a token that has none


class TooLong(JaxlmError):
  """An example does not fit into the window."""


class Part(NamedTuple):
  """One text of an example: its ids, what each is marked with, and which of two texts each belongs to."""
  ids: list[int]
  marks: list[float]
  types: list[int]


@dataclasses.dataclass(frozen=True)
class Row:
  """What a model reads of an example, or of a window of one.

  Attributes:
    parts: texts; of an encoder-decoder the question, then the answer.
    labels: as `answers` has them, or None.
    place: of a window of a long context: (column of its first token, number of that token in the context).
  """
  parts: tuple[Part, ...]
  labels: Any = None
  place: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Form:
  """How examples become rows for one model.

  Attributes:
    tokenizer: of the model.
    length: columns of a row; of an encoder-decoder, of the question.
    target: columns of an encoder-decoder's answer; 0: question and answer are one text.
    front: ids of virtual tokens that stand before every text that is read.
    bos, eos: whether a text begins and ends with those.
    template: of conversations.
    stride: tokens that windows of a context share.
    refuses: whether an example that does not fit is an error; else it is left out.
    negatives: documents beside a query's own.
  """
  tokenizer: Tokenizer
  length: int
  target: int = 0
  front: tuple[int, ...] = ()
  bos: bool = True
  eos: bool = True
  template: templates.Template | None = None
  stride: int = 128
  refuses: bool = True
  negatives: int = 0

  @property
  def begin(self) -> list[int]:
    first = self.tokenizer.vocab.first
    return [*self.front, *([first] if self.bos and first is not None else [])]

  @property
  def end(self) -> list[int]:
    last = self.tokenizer.vocab.last
    return [last] if self.eos and last is not None else []


def _plain(ids: Sequence[int], mark: float = 0.0, type: int = 0) -> Part:
  return Part(list(ids), [mark] * len(ids), [type] * len(ids))


def _joined(*parts: Part) -> Part:
  return Part(*([x for column in columns for x in column] for columns in zip(*parts)))


def _fitting(example: Example, room: int) -> int:
  """Raises JaxlmError where there is no room for what must be there."""
  if room < 1:
    raise TooLong(f'{example.id}: no room is left for the question in this window; make config.seq_len longer.')
  return room


# ---- by kind of task ---------------------------------------------------------------------------------------------


def _labelled(form: Form, example: Example) -> Iterator[Row]:
  """[first] text [last], and a second text after it; what is too long is cut at its end, the longer text first."""
  encode, texts = form.tokenizer.encode, [example.input, example.second] if example.second else [example.input]
  ids, begin, end = [encode(text) for text in texts], form.begin, form.end
  room = _fitting(example, form.length - len(begin) - len(ids) * len(end))
  while sum(map(len, ids)) > room:
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    rest = sum(map(len, ids)) - len(ids[longest])
    ids[longest] = ids[longest][:max(room - rest, room // len(ids))]
  yield Row((_joined(_plain(begin), *(_plain([*part, *end], type=i) for i, part in enumerate(ids))),), example.target)


def _numbered(form: Form, example: Example) -> Iterator[Row]:
  """The same, whose label is a vector."""
  for row in _labelled(form, example):
    yield dataclasses.replace(row, labels=np.atleast_1d(np.array(example.target, np.float32)))


def _tagged(form: Form, example: Example) -> Iterator[Row]:
  """Words, each tagged at its first piece; those beyond the window are left out."""
  begin, end = form.begin, form.end
  room, part = _fitting(example, form.length - len(begin) - len(end)), Part([], [], [])
  for i, (word, tag) in enumerate(zip(example.words, example.target)):
    ids = form.tokenizer.encode(word if i == 0 else f' {word}') or form.tokenizer.encode(word) or [
        form.tokenizer.vocab.filler]
    if len(part.ids) + len(ids) > room:
      break
    part = _joined(part, Part(ids, [tag] + [NONE] * (len(ids) - 1), [0] * len(ids)))
  yield Row((_joined(_plain(begin, NONE), part, _plain(end, NONE)),))


def offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
  """(ids, the characters [start, end) that each stands for)."""
  encoding = tokenizer.backend.encode(text, add_special_tokens=False)
  return encoding.ids, encoding.offsets


def _spans(form: Form, example: Example) -> Iterator[Row]:
  """[first] question [last] window of the context [last]; an answer that is not whole in a window is not there, and said
  to be at the first column of text."""
  begin, end = form.begin, form.end
  question = form.tokenizer.encode(example.input)[:form.length // 2]
  head = [*begin, *question, *end]
  ids, places = offsets(form.tokenizer, example.second)
  room = _fitting(example, form.length - len(head) - len(end))
  start, stop = example.target
  inside = [i for i, (a, b) in enumerate(places) if a < stop and b > start] if start >= 0 else []
  for first in range(0, max(len(ids) - min(form.stride, room // 2), 1), room - min(form.stride, room // 2)):
    window = ids[first:first + room]
    here = bool(inside) and first <= inside[0] and inside[-1] < first + len(window)
    labels = [len(head) + i - first for i in (inside[0], inside[-1])] if here else [len(form.front)] * 2
    yield Row((_joined(_plain(head), _plain([*window, *end], type=1)),), np.array(labels, np.int32), (len(head), first))


def _text(form: Form, example: Example, answer: str) -> Row:
  """A question and its answer, which alone counts, with the token that ends it."""
  question = form.tokenizer.encode(example.input)
  target = [*form.tokenizer.encode(answer), *form.end]
  room = form.target or form.length - len(form.begin)
  if len(target) > room:
    raise TooLong(f'{example.id}: the target has {len(target)} tokens, the window has room for {room}; make '
                     f'config.{"objective.answer.target_length" if form.target else "seq_len"} longer, or leave the record out.')
  if form.target:
    begin, end = form.begin, form.end
    return Row((_plain([*begin, *question[:form.length - len(begin) - len(end)], *end]), _plain(target, 1.0)))
  kept = room - len(target)
  return Row((_joined(_plain([*form.begin, *(question[-kept:] if kept else [])]), _plain(target, 1.0)),))


def joined_text(form: Form, example: Example, answer: str) -> Part:
  """A question and an answer to it as one text."""
  return _text(dataclasses.replace(form, target=0), example, answer).parts[0]


def _answered(form: Form, example: Example) -> Iterator[Row]:
  yield _text(form, example, example.target)


def _chosen(form: Form, example: Example) -> Iterator[Row]:
  yield _text(form, example, example.choices[example.target])


def _conversation(form: Form, example: Example) -> Iterator[Row]:
  """All turns, of which the assistant's count; the last ones are left out until the rest fits."""
  messages, tools = list(example.messages), example.record.get('tools')
  if faults := templates.check(messages):
    raise JaxlmError(f'{example.id}: {faults[0]}')
  while messages:
    try:
      ids, weights = chat.encode(form.tokenizer, form.template, dict(messages=messages, tools=tools))
    except JaxlmError as e:
      raise JaxlmError(f'{example.id}: {e}') from e
    if len(form.front) + len(ids) <= form.length:
      yield Row((_joined(_plain(form.front), Part(ids, weights, [0] * len(ids))),))
      return
    answers = [i for i, message in enumerate(messages[:-1]) if message['role'] == 'assistant']
    messages = messages[:answers[-1] + 1] if answers else []
  raise TooLong(f'{example.id}: not even the first answer fits into {form.length} tokens; make config.seq_len longer, '
                   'or leave the record out.')


def _retrieved(form: Form, example: Example) -> Iterator[Row]:
  """The query, its document, and those that are not its, each a text."""
  texts = [example.input, example.second, *example.choices[:form.negatives]]
  room = _fitting(example, form.length // len(texts) - len(form.begin) - len(form.end))
  yield Row(tuple(_plain([*form.begin, *form.tokenizer.encode(text)[:room], *form.end]) for text in texts))


def _preferred(form: Form, example: Example) -> Iterator[Row]:
  half = dataclasses.replace(form, length=form.length // 2)
  yield Row(tuple(_text(half, example, answer).parts[0] for answer in (example.second, example.choices[0])))


ENCODERS: dict[str, Callable[[Form, Example], Iterator[Row]]] = {
    'classify': _labelled, 'multi_label': _numbered, 'regress': _numbered, 'tag': _tagged, 'span': _spans,
    'text': _answered, 'choice': _chosen, 'chat': _conversation, 'retrieve': _retrieved, 'prefer': _preferred,
}


def form_of(config: Any, tokenizer: Tokenizer) -> Form:
  """How a config's model reads a task."""
  data, peft, length = config.data, config.model.peft, config.seq_len
  size = config.model.vocab_size or tokenizer.vocab.size
  front = tuple(range(size, size + peft.tokens)) if peft.method in ('prompt', 'prefix') else ()
  target = 0
  if config.model.structure == 'encoder_decoder' and config.objective.name == 'answer':
    target = config.objective.answer.target_length or length
  left_to_right = config.objective.name in ('answer', 'prefer') and not target
  return Form(tokenizer, length + left_to_right, target, front, data.bos, data.eos, template_of(data.template), data.stride,
              data.too_long == 'refuse', config.objective.contrast.negatives)


def template_of(name: str) -> templates.Template:
  """A built-in chat template, or that of a Hugging Face folder."""
  if name in templates.TEMPLATES:
    return templates.TEMPLATES[name]
  found = templates.of_folder(name)
  if found is None:
    raise JaxlmError(f'config.data.template={name!r} is neither a built-in template ({", ".join(templates.TEMPLATES)}) nor a '
                     'folder that has one; set it to one of those.')
  return found


# ---- all examples of a split -------------------------------------------------------------------------------------


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
    arrays = [self.ids, self.marks, self.types, self.begins, self.first] + ([] if self.labels is None else [self.labels])
    return hashlib.sha256(b''.join(hashlib.sha256(np.ascontiguousarray(x)).digest() for x in arrays)).hexdigest()


def encode(task: Task, split: str, form: Form, examples: Sequence[Example] | None = None) -> Encoded:
  """All examples of a split as rows.

  Args:
    examples: those, where they have been read.
  Raises:
    JaxlmError: a record that does not fit the task or the window: file, line, remedy.
  """
  make = ENCODERS[task.kind]
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
    raise JaxlmError(f'No example of split {split!r} fits into a window of {form.length} tokens; make config.seq_len longer.')
  if left_out:
    tqdm.write(f'{split}: {left_out} of {number + 1} examples do not fit into {form.length} tokens and are left out '
               '(config.data.too_long).', file=sys.stderr)
  sums = lambda x: np.concatenate([[0], np.cumsum(x, dtype=np.int64)])
  return Encoded(np.concatenate(ids), np.concatenate(marks), np.concatenate(types), sums(lengths), sums(counts),
                 np.stack(labels) if labels else None, np.array(record, np.int32),
                 np.array(places, np.int32), split)


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
    examples: of the validation split, as they were read.
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
                     f'{config.objective.name!r} does not learn; it learns {" ".join(kinds)}. Set config.objective.name to the '
                     "task's own.")
  tokenizer = tokenizers.resolve(config.data.tokenizer)
  tokenizer = tokenizer.with_roles(roles) if tokenizer else store.prepare(config, roles).tokenizer
  heads = len(task.labels) or (1 if task.kind == 'regress' else 0)
  if heads and config.model.head.num_labels != heads:
    raise JaxlmError(f'config.model.head.num_labels={config.model.head.num_labels}, but task {config.data.task!r} has '
                     f'{heads} labels; set it to {heads}.')
  form = form_of(config, tokenizer)
  train, validation = (drawn(list(tasks.examples(task, split)), config) for split in ('train', 'validation'))
  return Prepared(tokenizer, TaskData(task, form, encode(task, 'train', form, train), encode(
      task, 'validation', form, validation), tuple(validation)))


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
