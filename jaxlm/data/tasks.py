"""Tasks, as data: where records are, how one becomes a question and an answer, and how answers are measured.

One description serves training (`data.task`), prompting with examples and scoring (`evaluate --tasks`): a key of TASKS,
a JSON file with the fields of `Task`, or "module:attribute". A record that does not fit is told of in a line, with its
file and line, before anything is trained or measured.
"""
import dataclasses
import functools
import glob
import json
import os
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import numpy as np

from jaxlm.data import records, sources, templates, wordkinds
from jaxlm.data.expressions import listed, made
from jaxlm.data.records import Record
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup, nearest


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Texts are made of a record by jinja2 templates, which see its fields. What is no text (labels, words, answers) is a
  field of the record: the one of that name, or what `fields` says, a name or an expression in {{ }}. Both know the
  filter `split(pattern)`, with which 'A. one\\nB. two' | split('(?m)^[A-Z][.]') is [' one', ' two'].

  Attributes:
    kind: a key of KINDS: what an answer is.
    records: a key of `records.READERS` or `records.BUILT_IN`, or "module:function" of a split that yields (id, record).
    files: {split: globs joined by commas}, of a JSON task beside it or from here; a split without files is held out of
      `train`, by record.
    fields: {ours: the record's}: choices, words, tags, labels, answers, negatives, rejected, messages; `answers` of a
      kind 'text' are all that count as right, where they are named here.
    input: template of the question; of a span, of the question about `second`.
    second: template of a second text, '' where there is none: of a pair, a span's context, a query's document, the
      better of two answers.
    target: template of the answer, where that is text or a label.
    labels: names of the classes or tags; (): those that occur in the training split, sorted.
    instruction: what a prompt begins with.
    between: what stands between the examples of a prompt.
    metric: a key of `measure.scores.METRICS`; '': the kind's.
    stop: texts before which an answer ends.
    max_new_tokens: of an answer.
    program: template of a program, which sees what a model `said`, too; or "module:function" of (record, said) that
      gives its text. An answer is right if that passes.
    held_out: records of 100 that are held out for validation, and as many for the test, where these have no files.
    group: template of a name, such as a subject, a source or a bucket of lengths: exams also tell of each by itself.
  """
  kind: str
  records: str = 'jsonl'
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  input: str = '{{ text }}'
  second: str = ''
  target: str = '{{ label }}'
  labels: tuple[str, ...] = ()
  instruction: str = ''
  between: str = '\n\n'
  metric: str = ''
  stop: tuple[str, ...] = ()
  max_new_tokens: int = 64
  program: str = ''
  held_out: int = 10
  group: str = ''


@dataclasses.dataclass(frozen=True)
class Example:
  """A record, read: the same for every model.

  Attributes:
    id: "file:line", or what else finds the record.
    input: the question.
    second: a second text, or ''.
    target: by kind: text; number of a class, a choice; numbers of tags; a float; 0 and 1 for each label; (start, end)
      in `second`, (-1, -1) without an answer.
    choices: answers to choose from; documents that do not belong to the query; the worse answer.
    words: that are tagged.
    messages: of a conversation.
    tools: that it may call, or None.
    answers: all that count as right, of a span or a text.
    record: as it was.
    group: that it belongs to, or ''.
  """
  id: str
  input: str = ''
  second: str = ''
  target: Any = None
  choices: tuple[str, ...] = ()
  words: tuple[str, ...] = ()
  messages: tuple[Record, ...] = ()
  tools: tuple[Record, ...] | None = None
  answers: tuple[str, ...] = ()
  record: Record = dataclasses.field(default_factory=dict)
  group: str = ''


# ---- records become examples -------------------------------------------------------------------------------------


def _text(task: Task, source: str, id: str, record: Record) -> str:
  return made(source, id, record, is_text=True)


def program_of(task: Task, example: Example, said: str) -> str:
  """The program that shows whether an answer is right."""
  if '{{' in task.program:
    return _text(task, task.program, example.id, dict(example.record, said=said))
  return lookup({}, task.program, 'program of a task')(example.record, said)


def _field(task: Task, name: str, id: str, record: Record, wanted: str, holds: Callable[[Any], bool]) -> Any:
  """What a record says of one of our fields."""
  theirs = task.fields.get(name, name)
  if '{{' in theirs:
    value = made(theirs, id, record, is_text=False)
  elif theirs in record:
    value = record[theirs]
  else:
    raise JaxlmError(f'{id}: no field {theirs!r}; it has {listed(record)}. Mend the record, or set fields[{name!r}] '
                     f'of the task.{nearest(theirs, record)}')
  if not holds(value):
    raise JaxlmError(f'{id}: field {theirs!r} wants {wanted}, got {str(value)[:60]!r}; mend or remove the record.')
  return value


def _has(task: Task, name: str, record: Record) -> bool:
  theirs = task.fields.get(name, name)
  return '{{' in theirs or theirs in record


def _is_texts(value: Any) -> bool:
  return isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value)


def label_number(task: Task, id: str, value: Any) -> int:
  """The number of a label that is given by name, or by number where that is no name."""
  if str(value) in task.labels:
    return task.labels.index(str(value))
  if str(value).isdecimal() and int(value) < len(task.labels):
    return int(value)
  raise JaxlmError(f'{id}: unknown label {value!r}; the task has {", ".join(map(repr, task.labels[:12]))}'
                   f'{" …" * (len(task.labels) > 12)}. Mend the record, or the labels of the task.'
                   f'{nearest(str(value), task.labels)}')


def _classified(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  return dict(target=label_number(task, id, make(task.target)))


def _many_labels(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  given = _field(task, 'labels', id, record, 'a list of labels', lambda x: isinstance(x, (list, tuple)))
  chosen = {label_number(task, id, value) for value in given}
  return dict(target=tuple(int(i in chosen) for i in range(len(task.labels))))


def _number(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  text = make(task.target)
  try:
    value = float(text)
  except ValueError:
    value = float('nan')
  if not abs(value) < float('inf'):
    raise JaxlmError(f'{id}: target wants a finite number, got {text!r}; mend or remove the record.')
  return dict(target=value)


def _tagged(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  words = _field(task, 'words', id, record, 'a list of words', _is_texts)
  tags = _field(task, 'tags', id, record, 'a list of tags', lambda x: isinstance(x, (list, tuple)))
  if len(words) != len(tags) or not words:
    raise JaxlmError(f'{id}: {len(words)} words and {len(tags)} tags; each word has one, and there is at least one. '
                     'Mend or remove the record.')
  return dict(input='', words=tuple(words), target=tuple(label_number(task, id, tag) for tag in tags))


def _span(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  """SQuAD's form: answers is {'text': […], 'answer_start': […]}; or `answer` and `start`, one of each."""
  context = make(task.second)
  as_squad = lambda x: (
      isinstance(x, dict) and _is_texts(x.get('text')) and isinstance(x.get('answer_start'), (list, tuple))
      and len(x['text']) == len(x['answer_start']) and all(type(start) is int for start in x['answer_start']))
  if _has(task, 'answers', record):
    answers = _field(task, 'answers', id, record, "{'text': […], 'answer_start': […]}", as_squad)
    texts, starts = answers['text'], answers['answer_start']
  else:
    texts = [_field(task, 'answer', id, record, 'text', lambda x: isinstance(x, str))]
    starts = [_field(task, 'start', id, record, 'a whole number', lambda x: type(x) is int)]
  for text, start in zip(texts, starts):
    if context[start:start + len(text)] != text:
      raise JaxlmError(f'{id}: the context has {context[start:start + len(text)]!r} at {start}, not the answer '
                       f'{text!r}; mend or remove the record.')
  return dict(target=(starts[0], starts[0] + len(texts[0])) if texts else (-1, -1), answers=tuple(texts))


def _answered(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  target = make(task.target)
  if not target.strip():
    raise JaxlmError(f'{id}: the target is empty; mend or remove the record.')
  answers = _field(task, 'answers', id, record, 'a list of at least one text', lambda x: _is_texts(x) and len(x) > 0
                   ) if 'answers' in task.fields else ()
  return dict(target=target, answers=tuple(answers))


def _choice(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  choices = tuple(_field(task, 'choices', id, record, 'a list of texts', _is_texts))
  if not choices:
    raise JaxlmError(f'{id}: there is nothing to choose from; mend or remove the record.')
  if '' in choices:
    raise JaxlmError(f'{id}: choice {choices.index("")} is empty, and nothing is likelier; mend or remove the record.')
  value = make(task.target)
  readings = {choices.index(value)} if value in choices else set()
  readings |= {int(value)} if value.isdecimal() and int(value) < len(choices) else set()
  if len(readings) > 1:
    raise JaxlmError(f'{id}: target {value!r} is one of the choices, and the number of another; give the number of '
                     'every target, or none.')
  number = next(iter(readings), -1)
  if number < 0:
    raise JaxlmError(f'{id}: target {value!r} is none of the {len(choices)} choices, nor the number of one; mend or '
                     'remove the record.')
  return dict(choices=choices, target=number)


def _retrieved(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  if not _has(task, 'negatives', record):
    return {}
  found = _field(task, 'negatives', id, record, 'a list of texts', lambda x: not x or _is_texts(x))
  return dict(choices=tuple(found or ()))


def _conversation(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  messages = _field(task, 'messages', id, record, 'a list of messages', lambda x: isinstance(x, (list, tuple)) and all(
      isinstance(m, Mapping) for m in x))
  if faults := templates.check(messages):
    raise JaxlmError(f'{id}: {faults[0]}')
  return dict(messages=tuple(messages), tools=_tools(task, id, record))


def _tools(task: Task, id: str, record: Record) -> tuple[Record, ...] | None:
  """A list of objects, or JSON of one; None where there are none."""
  if 'tools' not in task.fields and record.get('tools') is None:
    return None
  found = _field(task, 'tools', id, record, 'a list of tools, each an object, or JSON of one',
                 lambda x: not x or _objects(x) is not None)
  return _objects(found) or None


def _objects(value: Any) -> tuple[Record, ...] | None:
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError:
      return None
  whole = isinstance(value, (list, tuple)) and all(isinstance(x, Mapping) for x in value)
  return tuple(value) if whole else None


def last_said(example: Example, role: str) -> str:
  """The last turn of a role.

  Raises:
    JaxlmError: it calls a tool and says nothing, which no measure reads.
  """
  said = next(message.get('content') for message in reversed(example.messages) if message['role'] == role)
  if said is None:
    raise JaxlmError(f'{example.id}: the last turn of the {role} calls a tool and says nothing, which no measure of text '
                     'reads; end the conversation with an answer, or leave it out.')
  return said


def _document(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  return {}


def _preferred(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  return dict(choices=(_field(task, 'rejected', id, record, 'text', lambda x: isinstance(x, str) and bool(x.strip())),))


@dataclasses.dataclass(frozen=True)
class Kind:
  """What answers are.

  Attributes:
    read: (task, id, record, template -> text) -> fields of the example.
    metric: a key of METRICS.
    labels: whether there are names to choose from.
    fields: what it reads of a record that is no text.
  """
  read: Callable[..., dict[str, Any]]
  metric: str
  labels: bool = False
  fields: tuple[str, ...] = ()


KINDS = {
    'classify': Kind(_classified, 'f1', labels=True), 'regress': Kind(_number, 'pearson'),
    'multi_label': Kind(_many_labels, 'multilabel_f1', labels=True, fields=('labels',)),
    'tag': Kind(_tagged, 'entity_f1', labels=True, fields=('words', 'tags')),
    'span': Kind(_span, 'squad', fields=('answers', 'answer', 'start')),
    'text': Kind(_answered, 'rouge', fields=('answers',)), 'choice': Kind(_choice, 'accuracy', fields=('choices',)),
    'retrieve': Kind(_retrieved, 'ranking', fields=('negatives',)),
    'chat': Kind(_conversation, 'rouge', fields=('messages', 'tools')),
    'prefer': Kind(_preferred, 'accuracy', fields=('rejected',)),
    'document': Kind(_document, 'perplexity'),
}
TEXTLESS = ('tag', 'chat')  # kinds whose records have no `input`


def _records(task: Task, split: str) -> Iterator[tuple[str, Record]]:
  return records.of_split(task.records, task.files, split, task.held_out)


def examples(task: Task, split: str) -> Iterator[Example]:
  """The examples of a split.

  Raises:
    JaxlmError: a record that does not fit the task: file, line, remedy; or a split without any.
  """
  kind, count = lookup(KINDS, task.kind, 'kind of task'), 0
  for id, record in _records(task, split):
    make = functools.partial(_text, task, id=id, record=record)
    texts = {}
    if task.kind not in TEXTLESS:
      texts = dict(input=make(task.input), second=make(task.second) if task.second else '')
    group = make(task.group) if task.group else ''
    yield Example(id, **(texts | kind.read(task, id, record, make)), record=record, group=group)
    count += 1
  if not count:
    raise JaxlmError(f'Split {split!r} of the task is empty: {task.files.get(split) or task.records} gives no record. '
                     'Give it files, or raise held_out.')


def named_labels(task: Task) -> Task:
  """The task with the names of its labels, which are those of the training split where it has none."""
  if task.labels or not lookup(KINDS, task.kind, 'kind of task').labels:
    return task
  found: set[str] = set()
  for id, record in _records(task, 'train'):
    if task.kind == 'classify':
      found.add(_text(task, task.target, id, record))
    else:
      name = 'tags' if task.kind == 'tag' else 'labels'
      given = _field(task, name, id, record, f'a list of {name}', lambda x: isinstance(x, (list, tuple)))
      found.update(map(str, given))
  if not found:
    raise JaxlmError("Split 'train' of the task is empty, so it has no labels; give it files.")
  return dataclasses.replace(task, labels=tuple(sorted(found)))


def drawn(items: list[Any], number: int, rng: np.random.Generator) -> list[Any]:
  """So many of the items, in their order; all of them where number is 0, or more than there are."""
  if not 0 < number < len(items):
    return items
  return [items[i] for i in sorted(rng.choice(len(items), number, replace=False).tolist())]


# ---- naming tasks ------------------------------------------------------------------------------------------------


def make(name: str) -> Task:
  """The task of that name: a key of TASKS, a JSON file with the fields of a Task, or "module:attribute".

  Raises:
    JaxlmError: no such task, or a file that does not describe one.
  """
  if not name.endswith('.json'):
    return named_labels(lookup(TASKS, name, 'task'))
  try:
    values = json.loads(Path(name).read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise JaxlmError(f'{name} is no task that can be read: {e}.') from e
  task = described(values, name)
  files = {split: _beside(name, globs) for split, globs in task.files.items()}
  return named_labels(dataclasses.replace(task, files=files))


def _beside(name: str, globs: str) -> str:
  """Globs as they are seen from here: what matches beside the file that names it is meant, else what matches here."""
  near = {pattern: os.path.join(os.path.dirname(name), pattern) for pattern in map(str.strip, globs.split(','))}
  return ','.join(path if glob.glob(path, recursive=True) else pattern for pattern, path in near.items())


JSON_TYPES = {  # of a task's fields; others are texts
    'files': dict, 'fields': dict, 'labels': list, 'stop': list, 'max_new_tokens': int, 'held_out': int}


def described(values: Any, where: str) -> Task:
  """A task of a nested dict, as JSON has it."""
  fields = {field.name: field for field in dataclasses.fields(Task)}
  if not isinstance(values, dict) or 'kind' not in values:
    raise JaxlmError(f"{where}: a task is an object with at least 'kind', one of {', '.join(KINDS)}.")
  for key, value in values.items():
    if key not in fields:
      raise JaxlmError(f'{where}: unknown key {key!r}; a task has {", ".join(fields)}.{nearest(key, fields)}')
    wanted = JSON_TYPES.get(key, str)
    if not isinstance(value, wanted):
      raise JaxlmError(f'{where}: {key} wants {wanted.__name__}, got {value!r}.')
    inside = value.values() if wanted is dict else value if wanted is list else ()
    if not all(isinstance(x, str) for x in inside):
      raise JaxlmError(f'{where}: {key} wants texts inside, got {value!r}.')
  known = lookup(KINDS, values['kind'], 'kind of task').fields
  for name in values.get('fields', ()):
    if name not in known:
      raise JaxlmError(f'{where}: a task of kind {values["kind"]!r} reads no field {name!r}; fields names '
                       f'{", ".join(known) or "none"}.{nearest(name, known)}')
  for split in values.get('files', ()):
    if split not in sources.SPLITS:
      raise JaxlmError(f'{where}: files has a split {split!r}; a task has {", ".join(sources.SPLITS)}.')
  if len(set(values.get('labels', ()))) < len(values.get('labels', ())):
    raise JaxlmError(f'{where}: labels has a name twice, {", ".join(values["labels"])}; give each once.')
  return Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


_CODE = dict(max_new_tokens=64, stop=('\n\n',))
_BY_LENGTH = '{{ "under 4k" if text | length < 4096 else "under 32k" if text | length < 32768 else "longer" }}'
TASKS = {
    'docstring': Task('text', 'stdlib_summary', input='{{ code }}\n# What it does:', target=' {{ summary }}', **_CODE),
    'body': Task('text', 'stdlib_body', input='{{ prompt }}', target='{{ body }}', max_new_tokens=256,
                 program='jaxlm.data.stdlib_tasks:program', metric='pass@1'),
    'line': Task('text', 'stdlib_line', input='{{ before }}{{ prompt }}', target='{{ line }}', max_new_tokens=64, stop=('\n',),
                 program='import ast\ntrees = [ast.dump(ast.parse(text)) for text in {{ [prompt ~ said, prompt ~ line] | tojson }}]'
                         '\nassert trees[0] == trees[1]', metric='pass@1'),
    'stdlib': Task('document', 'stdlib_text', group=_BY_LENGTH),
    'lisp': Task('text', 'stdlib_translation', input='{{ python }}\n', target='{{ lisp }}', metric='bleu',
                 stop=('\n',), max_new_tokens=128),
    'find': Task('retrieve', 'stdlib_retrieve', input='{{ query }}', second='{{ positive }}'),
    'comments': Task('retrieve', 'stdlib_comments', input='{{ query }}', second='{{ positive }}'),
    'neighbours': Task('retrieve', 'stdlib_neighbours', input='{{ query }}', second='{{ positive }}'),
    'kinds': Task('tag', 'stdlib_token_kinds', labels=wordkinds.TAGS),
    'module': Task('classify', 'stdlib_module'),
    'default': Task('span', 'stdlib_default', input='{{ question }}', second='{{ context }}'),
    'assistant': Task('chat', 'stdlib_chat'),
    'better': Task('prefer', 'stdlib_preferences', input='{{ prompt }}\n# What it does:', second=' {{ chosen }}',
                   fields={'rejected': "{{ ' ' ~ rejected }}"}),
}
