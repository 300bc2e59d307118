"""Where documents come from: the standard library's code, text files, JSON Lines, proteins; and all other sources."""
import functools
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Iterator

from jaxlm.data import tables, tokenfiles
from jaxlm.data.files import PAIR, Source, decoded, json_field, line_number, lines, matching, named
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup


SPLITS = ('train', 'validation', 'test')
SALT = 1807  # of splits: with it each of them has modules whose doctests can be run


def split_of(name: str, by_file: bool = True) -> str:
  """The split of the standard library's tasks that a name falls into: 80, 10 and 10 of a hundred, for ever the same.

  Args:
    name: a record's id or a path.
    by_file: by the path alone, so that a file's records stay together; else by the whole name.
  Returns:
    'train', 'validation' or 'test'.
  """
  key = name.partition(':')[0] if by_file else name
  place = int.from_bytes(hashlib.sha256(f'{SALT}/{key}'.encode()).digest()[:8], 'big') % 100
  return 'train' if place < 80 else 'validation' if place < 90 else 'test'


def _source_file(path: str, offset: int) -> Iterator[tuple[str, int, int]]:
  """A program's whole file; one in another encoding is no document."""
  data = Path(path).read_bytes()
  try:
    yield data[offset:].decode('utf-8'), offset, len(data)
  except UnicodeDecodeError:
    return


def _below(root: Path, left_out: set[str]) -> Iterator[Path]:
  """Files of a folder and of those in it, without looking into some: site-packages may hold many thousands."""
  for folder, folders, files in os.walk(root):
    folders[:] = set(folders) - left_out
    yield from (Path(folder, name) for name in files)


def stdlib(data, paths: str) -> Source:
  """The running Python's standard library, a document a file, without its tests and what was installed beside it.

  Args:
    paths: '' for all files; 'train' for those that its tasks do not hold out (`split_of`), or another split's.
  """
  del data
  root = Path(sysconfig.get_paths()['stdlib'])
  left_out = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  names = sorted(p.relative_to(root).as_posix() for p in _below(root, left_out)
                 if p.suffix == '.py' and p.is_file()
                 and not p.name.startswith('_sysconfigdata'))  # that one describes the machine Python was built on
  if paths:
    lookup(dict.fromkeys(SPLITS), paths, 'split of the standard library')
    names = [name for name in names if split_of(name) == paths]
  if not names:
    raise JaxlmError(f'This Python has no standard library source under {root}; set config.data.source=text and '
                     'config.data.paths.')
  return Source('stdlib', tuple(names), tuple(str(root / name) for name in names), _source_file)


def _text_file(path: str, offset: int, document: str) -> Iterator[tuple[str, int, int]]:
  """Documents of a text file: all of it, its lines, or its paragraphs (blocks between blank lines)."""
  block, start = [], offset
  for line, at in lines(path, offset):
    blank = not line.strip()
    if document == 'line':
      if not blank:
        yield decoded(line.rstrip(b'\r\n'), path, at), at, at + len(line)
    elif document == 'paragraph' and blank:
      if block:
        yield decoded(b''.join(block).rstrip(b'\r\n'), path, start), start, at
      block = []
    else:
      start = start if block else at
      block.append(line)
  if block:
    text = b''.join(block)
    whole = text if document == 'file' else text.rstrip(b'\r\n')
    yield decoded(whole, path, start), start, start + len(text)


def text(data, paths: str) -> Source:
  """Text files in UTF-8, plain or compressed; `config.data.document` says what a document is."""
  return Source('text', *named(matching(paths)), functools.partial(_text_file, document=data.document))


def _json_lines(path: str, offset: int, field: str, pair: str) -> Iterator[tuple[str, int, int]]:
  """The text field of each line's object; with `pair` the text, PAIR, and what that field holds."""
  for line, at in lines(path, offset):
    if not line.strip():
      continue
    fault = lambda what: JaxlmError(f'{path}:{line_number(path, at)}: {what}')
    value = json_field(line, field, fault)
    if not isinstance(value, str):
      raise fault(f'field {field!r} wants text, got list.')
    if pair:
      other = json_field(line, pair, fault, 'pair_field')
      if not isinstance(other, str):
        raise fault(f'field {pair!r} wants text, got list.')
      value = PAIR.join(text.replace(PAIR, ' ') for text in (value, other))
    yield value, at, at + len(line)


def jsonl(data, paths: str) -> Source:
  """JSON Lines, plain, .gz or .zst: an object a line, the text in `config.data.text_field`.

  Its translation, if `config.data.pair_field` is set, is part of the same document.
  """
  read = functools.partial(_json_lines, field=data.text_field, pair=data.pair_field)
  return Source('jsonl', *named(matching(paths)), read)


def _fasta_file(path: str, offset: int) -> Iterator[tuple[str, int, int]]:
  """The sequence under each header, its lines joined; white space and lines that begin with ';' are no part of it."""
  parts, start, end = [], None, offset
  for line, at in lines(path, offset):
    if line.startswith(b'>'):
      if start is not None:
        yield ''.join(parts), start, at
      parts, start = [], at
    elif line.strip() and not line.startswith(b';'):
      if start is None:
        raise JaxlmError(f'{path}:{line_number(path, at)}: a sequence without a header; FASTA has a line that begins '
                         'with ">" before each.')
      parts.append(''.join(decoded(line, path, at).split()))
    end = at + len(line)
  if start is not None:
    yield ''.join(parts), start, end


def fasta(data, paths: str) -> Source:
  """Sequences in FASTA, plain, .gz or .zst: a record is a document, without its header; letters stay as they are."""
  del data
  return Source('fasta', *named(matching(paths)), _fasta_file)


SOURCES = {
    'stdlib': stdlib, 'text': text, 'jsonl': jsonl, 'fasta': fasta,
    'parquet': tables.parquet, 'hf_dataset': tables.hf_dataset, 'arrayrecord': tables.arrayrecord,
    'nanogpt': tokenfiles.nanogpt, 'llmc': tokenfiles.llmc, 'megatron': tokenfiles.megatron,
}


def make(data, source: str, paths: str) -> Source:
  """The source of that name; `data` is `config.data`.

  Raises:
    JaxlmError: no such source, no files, or pairs asked of a source that has none.
  """
  make_source = lookup(SOURCES, source, 'source')
  if data.pair_field and make_source is not jsonl:
    raise JaxlmError(f'config.data.pair_field is set, but source {source!r} has no translations; only jsonl does.')
  return make_source(data, paths)
