"""Tasks, as data: where records are, how one becomes a question and an answer, and how answers are measured.

One description serves training (`data.task`), prompting with examples and scoring (`evaluate --tasks`): a key of TASKS,
a JSON file with the fields of `Task`, or "module:attribute". A record that does not fit is told of in a line, with its
file and line, before anything is trained or measured.
"""
import csv
import dataclasses
import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import numpy as np

from jaxlm.data import stdlib_tasks, tables, templates
from jaxlm.data.files import decoded, lines, matching
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup, nearest

SPLITS = ('train', 'validation', 'test')
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Texts are made of a record by jinja2 templates, which see its fields. What is no text (labels, words, answers) is a
  field of the record: the one of that name, or the one that `fields` says.

  Attributes:
    kind: a key of KINDS: what an answer is.
    records: a key of READERS, or "module:function" of a split that yields (id, record).
    files: {split: globs joined by commas}; a split without files is held out of `train`, by record.
    fields: {ours: the record's}.
    input: template of the question; of a span, of the question about `second`.
    second: template of a second text, '' where there is none: of a pair, a span's context, a query's document, the better
      of two answers.
    target: template of the answer, where that is text or a label.
    labels: names of the classes or tags; (): those that occur in the training split, sorted.
    instruction: what a prompt begins with.
    between: what stands between the examples of a prompt.
    metric: a key of `measure.scores.METRICS`; '': the kind's.
    stop: texts before which an answer ends.
    max_new_tokens: of an answer.
    program: "module:function" of (record, answer) that gives a program's text; an answer is right if that passes.
    held_out: records of 100 that are held out for validation, and as many for the test, where these have no files.
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


@dataclasses.dataclass(frozen=True)
class Example:
  """A record, read: the same for every model.

  Attributes:
    id: "file:line", or what else finds the record.
    input: the question.
    second: a second text, or ''.
    target: by kind: text; number of a class, a choice; numbers of tags; a float; 0 and 1 for each label; (start, end) in
      `second`, (-1, -1) without an answer.
    choices: answers to choose from; documents that do not belong to the query; the worse answer.
    words: that are tagged.
    messages: of a conversation.
    answers: all that count as right, of a span.
    record: as it was.
  """
  id: str
  input: str = ''
  second: str = ''
  target: Any = None
  choices: tuple[str, ...] = ()
  words: tuple[str, ...] = ()
  messages: tuple[Record, ...] = ()
  answers: tuple[str, ...] = ()
  record: Record = dataclasses.field(default_factory=dict)


# ---- reading records ---------------------------------------------------------------------------------------------


def _jsonl(paths: str, split: str) -> Iterator[tuple[str, Record]]:
  """An object a line."""
  del split
  for path in matching(paths):
    for number, (line, offset) in enumerate(lines(path, 0), 1):
      if not line.strip():
        continue
      try:
        record = json.loads(decoded(line, path, offset))
      except (ValueError, RecursionError) as e:
        raise JaxlmError(f'{path}:{number}: not a line of JSON ({e}); mend or remove it.') from e
      if not isinstance(record, dict):
        raise JaxlmError(f'{path}:{number}: wanted a JSON object, got {type(record).__name__}; mend or remove it.')
      yield f'{path}:{number}', record


def _table(paths: str, split: str, delimiter: str) -> Iterator[tuple[str, Record]]:
  """Lines of columns under a header."""
  del split
  for path in matching(paths):
    text = decoded(b''.join(line for line, _ in lines(path, 0)), path, 0).removeprefix('\ufeff')
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
      for record in reader:
        if None in record or None in record.values():
          raise JaxlmError(f'{path}:{reader.line_num}: wanted {len(reader.fieldnames)} columns, as the first line has; '
                           'mend or remove it.')
        yield f'{path}:{reader.line_num}', record
    except csv.Error as e:
      raise JaxlmError(f'{path}:{reader.line_num}: {e}; mend or remove it.') from e


# (globs joined by commas, the split) -> (id, record) of each
READERS: dict[str, Callable[..., Iterator[tuple[str, Record]]]] = {
    'jsonl': _jsonl, 'csv': functools.partial(_table, delimiter=','), 'tsv': functools.partial(_table, delimiter='\t'),
    'parquet': tables.parquet_records, 'hf_dataset': tables.hf_records,
}


def _part(id: str, held_out: int) -> str:
  """The split of a record that was given for all of them: a function of its id's last part, wherever the file lies."""
  hundredth = int.from_bytes(hashlib.sha256(Path(id).name.encode()).digest()[:4], 'big') % 100
  return 'test' if hundredth < held_out else 'validation' if hundredth < 2 * held_out else 'train'


def records(task: Task, split: str) -> Iterator[tuple[str, Record]]:
  """(id, record) of each record of a split.

  Raises:
    JaxlmError: no such split, no files, or a line that is no record.
  """
  if split not in SPLITS:
    raise JaxlmError(f'A task has the splits {", ".join(SPLITS)}; got {split!r}.')
  if task.records not in READERS:
    yield from lookup(BUILT_IN, task.records, 'reader of records')(split)
    return
  if split in task.files:
    found = READERS[task.records](task.files[split], split)
    missing = {other for other in SPLITS if other not in task.files} if split == 'train' else set()
    yield from ((id, record) for id, record in found if _part(id, task.held_out) not in missing)
  elif 'train' in task.files:
    yield from ((id, r) for id, r in READERS[task.records](task.files['train'], 'train')
                if _part(id, task.held_out) == split)
  else:
    raise JaxlmError(f"The task names no files of split {split!r} and none of 'train' to hold them out of; set files.")


def _of_stdlib(name: str) -> Callable[[str], Iterator[tuple[str, Record]]]:
  return lambda split: ((record['id'], record) for record in stdlib_tasks.records(name, split))


def _conversations(split: str) -> Iterator[tuple[str, Record]]:
  """Two questions about a function, and what its docstring and its signature answer."""
  for record in stdlib_tasks.records('summary', split):
    head = record['code'].split('\n')[0].strip()
    yield record['id'], dict(messages=[
        dict(role='user', content=f'What does this do?\n{record["code"]}'),
        dict(role='assistant', content=record['summary']),
        dict(role='user', content='How does its definition begin?'), dict(role='assistant', content=head)])


def _preferences(split: str) -> Iterator[tuple[str, Record]]:
  """A function's own summary, and that of the function before it."""
  before = None
  for record in stdlib_tasks.records('summary', split):
    if before is not None and before != record['summary']:
      yield record['id'], dict(prompt=record['code'], chosen=record['summary'], rejected=before)
    before = record['summary']


def _texts(split: str) -> Iterator[tuple[str, Record]]:
  """Whole modules."""
  return ((module.path, dict(text='\n'.join(module.lines))) for module in stdlib_tasks.library()
          if stdlib_tasks.split_of(module.path) == split)


BUILT_IN = {f'stdlib_{name}': _of_stdlib(name) for name in stdlib_tasks.RECORDS} | {
    'stdlib_chat': _conversations, 'stdlib_preferences': _preferences, 'stdlib_text': _texts}


# ---- records become examples -------------------------------------------------------------------------------------


@functools.lru_cache(256)
def _template(source: str):
  """A compiled jinja2 template; a field that is missing is an error."""
  import jinja2
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def there(value):
    if value is None:
      raise jinja2.TemplateError('a field is null')
    return value

  environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=there)
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as e:
    raise JaxlmError(f'Template {source!r}: {e}.') from e


def _text(task: Task, source: str, id: str, record: Record) -> str:
  import jinja2
  try:
    return _template(source).render(record)
  except jinja2.TemplateError as e:
    raise JaxlmError(f'{id}: template {source!r}: {e}; the record has {_listed(record)}. Mend the record, or the '
                     'template.') from e


def _listed(record: Record) -> str:
  return ', '.join(map(repr, list(record)[:12])) or 'no fields'


def _field(task: Task, name: str, id: str, record: Record, wanted: str, holds: Callable[[Any], bool]) -> Any:
  """What a record says of one of our fields."""
  theirs = task.fields.get(name, name)
  if theirs not in record:
    raise JaxlmError(f'{id}: no field {theirs!r}; it has {_listed(record)}. Mend the record, or set fields[{name!r}] of '
                     f'the task.{nearest(theirs, record)}')
  if not holds(record[theirs]):
    raise JaxlmError(f'{id}: field {theirs!r} wants {wanted}, got {str(record[theirs])[:60]!r}; mend or remove the record.')
  return record[theirs]


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
    raise JaxlmError(f'{id}: {len(words)} words and {len(tags)} tags; each word has one, and there is at least one. Mend '
                     'or remove the record.')
  return dict(input='', words=tuple(words), target=tuple(label_number(task, id, tag) for tag in tags))


def _span(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  """SQuAD's form: answers is {'text': […], 'answer_start': […]}; or `answer` and `start`, one of each."""
  context = make(task.second)
  if 'answers' in record:
    answers = _field(task, 'answers', id, record, "{'text': […], 'answer_start': […]}", lambda x: isinstance(
        x, dict) and _is_texts(x.get('text')) and isinstance(x.get('answer_start'), (list, tuple)) and len(x['text']) == len(
            x['answer_start']) and all(type(start) is int for start in x['answer_start']))
    texts, starts = answers['text'], answers['answer_start']
  else:
    texts = [_field(task, 'answer', id, record, 'text', lambda x: isinstance(x, str))]
    starts = [_field(task, 'start', id, record, 'a whole number', lambda x: type(x) is int)]
  for text, start in zip(texts, starts):
    if context[start:start + len(text)] != text:
      raise JaxlmError(f'{id}: the context has {context[start:start + len(text)]!r} at {start}, not the answer {text!r}; '
                       'mend or remove the record.')
  return dict(target=(starts[0], starts[0] + len(texts[0])) if texts else (-1, -1), answers=tuple(texts))


def _answered(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  target = make(task.target)
  if not target.strip():
    raise JaxlmError(f'{id}: the target is empty; mend or remove the record.')
  return dict(target=target)


def _choice(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  choices = tuple(_field(task, 'choices', id, record, 'a list of texts', _is_texts))
  if not choices:
    raise JaxlmError(f'{id}: there is nothing to choose from; mend or remove the record.')
  value = make(task.target)
  readings = {choices.index(value)} if value in choices else set()
  readings |= {int(value)} if value.isdecimal() and int(value) < len(choices) else set()
  if len(readings) > 1:
    raise JaxlmError(f'{id}: target {value!r} is one of the choices, and the number of another; give the number of every '
                     'target, or none.')
  number = next(iter(readings), -1)
  if number < 0:
    raise JaxlmError(f'{id}: target {value!r} is none of the {len(choices)} choices, nor the number of one; mend or remove '
                     'the record.')
  return dict(choices=choices, target=number)


def _retrieved(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  negatives = record.get(task.fields.get('negatives', 'negatives'), ())
  return dict(choices=tuple(_field(task, 'negatives', id, record, 'a list of texts', _is_texts)) if negatives else ())


def _conversation(task: Task, id: str, record: Record, make: Callable[[str], str]) -> dict[str, Any]:
  messages = _field(task, 'messages', id, record, 'a list of messages', lambda x: isinstance(x, (list, tuple)) and all(
      isinstance(m, Mapping) for m in x))
  if faults := templates.check(messages):
    raise JaxlmError(f'{id}: {faults[0]}')
  return dict(messages=tuple(messages))


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
  """
  read: Callable[..., dict[str, Any]]
  metric: str
  labels: bool = False


KINDS = {
    'classify': Kind(_classified, 'f1', labels=True), 'multi_label': Kind(_many_labels, 'multilabel_f1', labels=True),
    'regress': Kind(_number, 'pearson'), 'tag': Kind(_tagged, 'entity_f1', labels=True), 'span': Kind(_span, 'squad'),
    'text': Kind(_answered, 'rouge'), 'choice': Kind(_choice, 'accuracy'), 'retrieve': Kind(_retrieved, 'ranking'),
    'chat': Kind(_conversation, 'rouge'), 'prefer': Kind(_preferred, 'accuracy'),
    'document': Kind(_document, 'perplexity'),
}
TEXTLESS = ('tag', 'chat')  # kinds whose records have no `input`


def examples(task: Task, split: str) -> Iterator[Example]:
  """The examples of a split.

  Raises:
    JaxlmError: a record that does not fit the task: file, line, remedy; or a split without any.
  """
  kind, count = lookup(KINDS, task.kind, 'kind of task'), 0
  for id, record in records(task, split):
    make = functools.partial(_text, task, id=id, record=record)
    texts = {} if task.kind in TEXTLESS else dict(input=make(task.input), second=make(task.second) if task.second else '')
    yield Example(id, **(texts | kind.read(task, id, record, make)), record=record)
    count += 1
  if not count:
    raise JaxlmError(f'Split {split!r} of the task is empty: {task.files.get(split) or task.records} gives no record. Give '
                     'it files, or raise held_out.')


def named_labels(task: Task) -> Task:
  """The task with the names of its labels, which are those of the training split where it has none."""
  if task.labels or not lookup(KINDS, task.kind, 'kind of task').labels:
    return task
  found: set[str] = set()
  for id, record in records(task, 'train'):
    if task.kind == 'classify':
      found.add(_text(task, task.target, id, record))
    else:
      name = 'tags' if task.kind == 'tag' else 'labels'
      found.update(map(str, _field(task, name, id, record, f'a list of {name}', lambda x: isinstance(x, (list, tuple)))))
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
  return named_labels(described(values, name))


def described(values: Any, where: str) -> Task:
  """A task of a nested dict, as JSON has it."""
  fields = {field.name: field for field in dataclasses.fields(Task)}
  if not isinstance(values, dict) or 'kind' not in values:
    raise JaxlmError(f"{where}: a task is an object with at least 'kind', one of {', '.join(KINDS)}.")
  for key, value in values.items():
    if key not in fields:
      raise JaxlmError(f'{where}: unknown key {key!r}; a task has {", ".join(fields)}.{nearest(key, fields)}')
    wanted = {'files': dict, 'fields': dict, 'labels': list, 'stop': list, 'max_new_tokens': int, 'held_out': int}.get(key, str)
    if not isinstance(value, wanted):
      raise JaxlmError(f'{where}: {key} wants {wanted.__name__}, got {value!r}.')
    inside = value.values() if wanted is dict else value if wanted is list else ()
    if not all(isinstance(x, str) for x in inside):
      raise JaxlmError(f'{where}: {key} wants texts inside, got {value!r}.')
  lookup(KINDS, values['kind'], 'kind of task')
  return Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


_CODE = dict(max_new_tokens=64, stop=('\n\n',))
TASKS = {
    'docstring': Task('text', 'stdlib_summary', input='{{ code }}\n# What it does:', target=' {{ summary }}', **_CODE),
    'body': Task('text', 'stdlib_body', input='{{ prompt }}', target='{{ body }}', max_new_tokens=256,
                 program='jaxlm.data.stdlib_tasks:program', metric='pass@1'),
    'stdlib': Task('document', 'stdlib_text'),
    'find': Task('retrieve', 'stdlib_retrieve', input='{{ query }}', second='{{ positive }}'),
    'kinds': Task('tag', 'stdlib_token_kinds', labels=stdlib_tasks.TAGS),
    'module': Task('classify', 'stdlib_module'),
    'default': Task('span', 'stdlib_default', input='{{ question }}', second='{{ context }}'),
    'assistant': Task('chat', 'stdlib_chat'),
    'better': Task('prefer', 'stdlib_preferences', input='{{ prompt }}\n# What it does:', second=' {{ chosen }}'),
}
