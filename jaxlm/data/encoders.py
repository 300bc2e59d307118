"""Examples of a task as tokens: what a model reads of each, by kind of task."""
import dataclasses
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

from jaxlm.data import chat, templates
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
  """[first] question [last] window of the context [last]; an answer that is not whole in a window is not there, and
  said to be at the first column of text."""
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
    key = 'objective.answer.target_length' if form.target else 'seq_len'
    raise TooLong(f'{example.id}: the target has {len(target)} tokens, the window has room for {room}; make '
                  f'config.{key} longer, or leave the record out.')
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
  messages, tools = list(example.messages), example.tools
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


def singled(task: Task, examples: Sequence[Example], good: str) -> list[Example]:
  """Single answers, good (target 1) or bad (0): both of a pair, or texts of two classes.

  Each has as its choice an answer to another question, which KTO's reference point is of: of pairs one as good or bad.

  Args:
    good: of classes, the label of answers that are good.
  Raises:
    JaxlmError: other labels than that and one more, an empty answer, or one question alone.
  """
  if task.kind == 'prefer':
    both = [[dataclasses.replace(e, second=text, target=target) for e, text in pairs] for target, pairs in (
        (1, [(e, e.second) for e in examples]), (0, [(e, e.choices[0]) for e in examples]))]
    return [example for pair in zip(*map(_beside_others, both)) for example in pair]
  if len(task.labels) != 2 or good not in task.labels:
    raise JaxlmError(f'config.objective.kto.good={good!r} names the better of two labels of a task of kind classify, whose '
                     f'`input` is the question and `second` the answer; this one has {", ".join(map(repr, task.labels))}.')
  empty = next((e.id for e in examples if not e.second), None)
  if empty:
    raise JaxlmError(f'{empty}: the answer, `second` of the task, is empty; mend the record, or the template.')
  return _beside_others([dataclasses.replace(e, target=int(task.labels[e.target] == good)) for e in examples])


def _beside_others(examples: Sequence[Example]) -> list[Example]:
  """Examples with the next answer to another question as their choice, after the last one from the first on."""
  found, other = [], None
  for i, example in reversed(list(enumerate([*examples, *examples]))):
    after = examples[(i + 1) % len(examples)]
    if after.input != example.input:
      other = after.second
    if i < len(examples):
      found.append(dataclasses.replace(example, choices=(other,)))
  if other is None:
    raise JaxlmError('All examples ask one question; KTO compares answers with those to others, so give it some more.')
  return found[::-1]


def _single(form: Form, example: Example) -> Iterator[Row]:
  for row in _preferred(form, example):
    yield dataclasses.replace(row, labels=example.target)


ENCODERS: dict[str, Callable[[Form, Example], Iterator[Row]]] = {
    'classify': _labelled, 'multi_label': _numbered, 'regress': _numbered, 'tag': _tagged, 'span': _spans,
    'text': _answered, 'choice': _chosen, 'chat': _conversation, 'retrieve': _retrieved, 'prefer': _preferred,
    'single': _single,
}


def form_of(config: Any, tokenizer: Tokenizer) -> Form:
  """How a config's model reads a task."""
  data, peft, length = config.data, config.model.peft, config.seq_len
  size = config.model.vocab_size or tokenizer.vocab.size
  front = tuple(range(size, size + peft.tokens)) if peft.method in ('prompt', 'prefix') else ()
  target = 0
  if config.model.structure == 'encoder_decoder' and config.objective.name == 'answer':
    target = config.objective.answer.target_length or length
  left_to_right = config.objective.name in ('answer', 'prefer', 'kto') and not target
  return Form(tokenizer, length + left_to_right, target, front, data.bos, data.eos, template_of(data.template),
              data.stride, data.too_long == 'refuse', config.objective.contrast.negatives)


def template_of(name: str) -> templates.Template:
  """A built-in chat template, or that of a Hugging Face folder."""
  if name in templates.TEMPLATES:
    return templates.TEMPLATES[name]
  found = templates.of_folder(name)
  if found is None:
    raise JaxlmError(f'config.data.template={name!r} is neither a built-in template '
                     f'({", ".join(templates.TEMPLATES)}) nor a folder that has one; set it to one of those.')
  return found
