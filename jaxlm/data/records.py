"""Records of tasks: objects of files, or made of the standard library, each with the id that finds it, by split."""
import collections
import csv
import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from jaxlm.data import library, sources, stdlib_tasks, tables
from jaxlm.data.files import decoded, lines, matching
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup

Record = Mapping[str, Any]


def _jsonl(paths: str, split: str) -> Iterator[tuple[str, Record]]:
  """An object a line."""
  del split
  for path in matching(paths, key='files of a task'):
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
  for path in matching(paths, key='files of a task'):
    text = decoded(b''.join(line for line, _ in lines(path, 0)), path, 0).removeprefix('\ufeff')
    csv.field_size_limit(2**31 - 1)  # what is read is whole documents; the module's own limit is 131,072 characters
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
      if twice := [name for name, count in collections.Counter(reader.fieldnames or ()).items() if count > 1]:
        raise JaxlmError(f'{path}:1: column {twice[0]!r} stands there twice, so a record cannot have both; rename one.')
      for record in reader:
        if None in record or None in record.values():
          raise JaxlmError(f'{path}:{reader.line_num}: wanted {len(reader.fieldnames)} columns, as the first line has; '
                           'mend or remove it.')
        yield f'{path}:{reader.line_num}', record
    except csv.Error as e:
      raise JaxlmError(f'{path}:{reader.line_num}: {e}; mend or remove it.') from e


def _conll(paths: str, split: str) -> Iterator[tuple[str, Record]]:
  """Columns of words, a word a line, a blank line after each sentence: `columns` are lists, `words` and `tags` the
  first and the last of them. Columns stand apart by tabs, else by spaces. Lines of -DOCSTART-, and those that begin with
  "# " before a sentence, are left out."""
  del split
  for path in matching(paths, key='files of a task'):
    rows: list[list[str]] = []
    for number, (line, offset) in enumerate([*lines(path, 0), (b'', 0)], 1):
      text = decoded(line, path, offset).removeprefix('\ufeff' if number == 1 else '').strip()
      row = text.split('\t') if '\t' in text else text.split()
      if row and row[0] != '-DOCSTART-' and (rows or not text.startswith('# ')):
        rows.append(row)
        if len(row) != len(rows[0]):
          raise JaxlmError(f'{path}:{number}: wanted {len(rows[0])} columns, as line {number - len(rows) + 1} has, got '
                           f'{len(row)}; mend or remove it.')
      elif rows:
        columns = [*map(list, zip(*rows))]
        yield f'{path}:{number - len(rows)}', dict(words=columns[0], tags=columns[-1], columns=columns)
        rows = []


# (globs joined by commas, the split) -> (id, record) of each
READERS: dict[str, Callable[..., Iterator[tuple[str, Record]]]] = {
    'jsonl': _jsonl, 'csv': functools.partial(_table, delimiter=','), 'tsv': functools.partial(_table, delimiter='\t'),
    'conll': _conll, 'parquet': tables.parquet_records, 'hf_dataset': tables.hf_records,
}


# ---- of the standard library ----------------------------------------------------------------------------------------


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
  return ((module.path, dict(text='\n'.join(module.lines))) for module in library.modules()
          if sources.split_of(module.path) == split)


BUILT_IN = {f'stdlib_{name}': _of_stdlib(name) for name in stdlib_tasks.RECORDS} | {
    'stdlib_chat': _conversations, 'stdlib_preferences': _preferences, 'stdlib_text': _texts}


# ---- splits ------------------------------------------------------------------------------------------------------


def _part(id: str, held_out: int) -> str:
  """The split of a record that was given for all of them: a function of its id's last part, wherever the file lies."""
  hundredth = int.from_bytes(hashlib.sha256(Path(id).name.encode()).digest()[:4], 'big') % 100
  return 'test' if hundredth < held_out else 'validation' if hundredth < 2 * held_out else 'train'


def of_split(reader: str, files: Mapping[str, str], split: str, held_out: int) -> Iterator[tuple[str, Record]]:
  """(id, record) of each record of a split.

  Args:
    reader: a key of READERS or BUILT_IN, or "module:function" of a split.
    files: {split: globs joined by commas}; a split without files is held out of `train`, by record.
    split: one of sources.SPLITS.
    held_out: records of 100 that are held out for validation, and as many for the test.
  Raises:
    JaxlmError: no such split, no files, or a line that is no record.
  """
  if split not in sources.SPLITS:
    raise JaxlmError(f'A task has the splits {", ".join(sources.SPLITS)}; got {split!r}.')
  if reader not in READERS:
    yield from lookup(BUILT_IN, reader, 'reader of records')(split)
    return
  if split in files:
    found = READERS[reader](files[split], split)
    missing = {other for other in sources.SPLITS if other not in files} if split == 'train' else set()
    yield from ((id, record) for id, record in found if _part(id, held_out) not in missing)
  elif 'train' in files:
    yield from ((id, record) for id, record in READERS[reader](files['train'], 'train')
                if _part(id, held_out) == split)
  else:
    raise JaxlmError(f"The task names no files of split {split!r} and none of 'train' to hold them out of; set files.")
