"""Where documents come from: the standard library's code, text files, JSON Lines."""
import dataclasses
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, NamedTuple

from jaxlm.lookup import lookup
from jaxlm.types import JaxlmError

CHUNK = 1 << 20  # bytes read at once
COMPRESSED = ('.gz', '.zst')


class Document(NamedTuple):
  """A text and where it stands: file number, and the bytes [offset, end) of that file, decompressed."""
  text: str
  file: int
  offset: int
  end: int


@dataclasses.dataclass(frozen=True)
class Source:
  """An ordered list of files and how documents are read from one.

  Attributes:
    kind: the name in `SOURCES`.
    names: each file's name relative to the corpus, which is what digests and provenance hold.
    paths: where the files are.
    read: (path, offset) -> (text, offset, end) of each document from there on.
  """
  kind: str
  names: tuple[str, ...]
  paths: tuple[str, ...]
  read: Callable[[str, int], Iterator[tuple[str, int, int]]]

  def documents(self, file: int = 0, offset: int = 0) -> Iterator[Document]:
    """All documents in order, from a place that an earlier one gave. Those without text are passed over."""
    for number in range(file, len(self.paths)):
      for text, start, end in self.read(self.paths[number], offset if number == file else 0):
        if text:
          yield Document(text, number, start, end)

  def num_bytes(self) -> int | None:
    """Size of all files, or None if some are compressed."""
    if any(path.endswith(COMPRESSED) for path in self.paths):
      return None
    return sum(os.stat(path).st_size for path in self.paths)

  def digest(self, cache: Path | None = None) -> str:
    """sha256 over (name, size, sha256) of every file, in order.

    Args:
      cache: a file that remembers the sha256 of files whose path, size and modification time are unchanged.
    """
    known = _read_hashes(cache)
    fresh, total = [], hashlib.sha256()
    for name, path in zip(self.names, self.paths):
      stat = os.stat(path)
      key = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
      if key not in known:
        with open(path, 'rb') as f:
          known[key] = hashlib.file_digest(f, 'sha256').hexdigest()
        fresh.append([*key, known[key]])
      total.update(f'{name}\0{stat.st_size}\0{known[key]}\n'.encode('utf-8', 'surrogateescape'))
    _append_hashes(cache, fresh)
    return total.hexdigest()


def _read_hashes(cache: Path | None) -> dict[tuple[str, int, int], str]:
  """What the cache knows; a torn line is passed over."""
  known = {}
  if cache and cache.exists():
    for line in cache.read_text(encoding='utf-8', errors='surrogateescape').splitlines():
      try:
        path, size, mtime, digest = json.loads(line)
        known[path, size, mtime] = digest
      except ValueError:
        continue
  return known


def _append_hashes(cache: Path | None, fresh: list) -> None:
  """Adds lines, one process at a time; a cache that cannot be written is done without."""
  if not cache or not fresh:
    return
  try:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache, 'a', encoding='utf-8') as f:
      fcntl.flock(f, fcntl.LOCK_EX)
      f.write('\n' + '\n'.join(json.dumps(line) for line in fresh) + '\n')
  except OSError:
    pass


# ---- reading files -----------------------------------------------------------------------------------------------


class _Zstd(io.RawIOBase):
  """A zstandard file of any number of frames; unlike the library's own reader, a truncated one is an error."""

  def __init__(self, path: str):
    try:
      import zstandard
    except ImportError as e:
      raise JaxlmError(f'{path} needs the package zstandard: pip install zstandard.') from e
    self._file, self._new = open(path, 'rb'), zstandard.ZstdDecompressor().decompressobj
    self._frame, self._ready, self._error = None, b'', zstandard.ZstdError

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      unused = self._frame.unused_data if self._frame and self._frame.eof else b''
      chunk = unused or self._file.read(CHUNK)
      if not chunk:
        if self._frame and not self._frame.eof:
          raise EOFError('the file ends in the middle of a frame')
        return 0
      if self._frame is None or self._frame.eof:
        self._frame = self._new()
      try:
        self._ready = self._frame.decompress(chunk)
      except self._error as e:
        raise OSError(str(e)) from e
    n = min(len(buffer), len(self._ready))
    buffer[:n], self._ready = self._ready[:n], self._ready[n:]
    return n

  def close(self) -> None:
    self._file.close()
    super().close()


def _open(path: str) -> BinaryIO:
  """The file's bytes, decompressed."""
  if path.endswith('.gz'):
    return gzip.open(path, 'rb')
  if path.endswith('.zst'):
    return io.BufferedReader(_Zstd(path), CHUNK)
  return open(path, 'rb', buffering=CHUNK)


def _lines(path: str, offset: int) -> Iterator[tuple[bytes, int]]:
  """Each line with its end, and the byte it starts at.

  Raises:
    JaxlmError: the compressed data is damaged or truncated.
  """
  try:
    with _open(path) as file:
      if path.endswith(COMPRESSED):
        left = offset
        while left:
          left -= len(file.read(min(left, CHUNK)))
      else:
        file.seek(offset)
      for line in file:
        yield line, offset
        offset += len(line)
  except (EOFError, zlib.error, OSError) as e:
    if isinstance(e, OSError) and e.errno is not None:
      raise
    raise JaxlmError(f'{path} is damaged after byte {offset} of its decompressed text: {e}; restore it, or leave it '
                     'out of config.data.paths.') from e


def _line_number(path: str, offset: int) -> int:
  return 1 + sum(1 for _, start in _lines(path, 0) if start < offset)


def _decode(data: bytes, path: str, offset: int) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise JaxlmError(f'{path}:{_line_number(path, offset) + data[:e.start].count(10)}: not UTF-8 at byte '
                     f'{offset + e.start}; convert the file, or leave it out of config.data.paths.') from e


# ---- sources -----------------------------------------------------------------------------------------------------


def _source_file(path: str, offset: int) -> Iterator[tuple[str, int, int]]:
  """A program's whole file; one in another encoding is no document."""
  data = Path(path).read_bytes()
  try:
    yield data[offset:].decode('utf-8'), offset, len(data)
  except UnicodeDecodeError:
    return


def stdlib(data, paths: str) -> Source:
  """The running Python's standard library, a document a file, without its tests and what was installed beside it."""
  del data, paths
  root = Path(sysconfig.get_paths()['stdlib'])
  left_out = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  names = sorted(str(p.relative_to(root).as_posix()) for p in root.rglob('*.py')
                 if not left_out & set(p.relative_to(root).parts) and p.is_file()
                 and not p.name.startswith('_sysconfigdata'))  # that one describes the machine Python was built on
  if not names:
    raise JaxlmError(f'This Python has no standard library source under {root}; set config.data.source=text and '
                     'config.data.paths.')
  return Source('stdlib', tuple(names), tuple(str(root / name) for name in names), _source_file)


def _files(paths: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """(names relative to the corpus, paths) of the files that the globs match, sorted by name."""
  found: set[str] = set()
  for pattern in filter(None, (p.strip() for p in paths.split(','))):
    matches = [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
    if not matches:
      raise JaxlmError(f'config.data.paths: {pattern!r} matches no file (looked from {os.getcwd()}).')
    found.update(os.path.abspath(p) for p in matches)
  if not found:
    raise JaxlmError('config.data.paths is empty; give files as globs joined by commas, "corpus/**/*.txt".')
  root = os.path.commonpath([os.path.dirname(p) for p in found])
  named = sorted((Path(os.path.relpath(p, root)).as_posix(), p) for p in found)
  return tuple(n for n, _ in named), tuple(p for _, p in named)


def _text_file(path: str, offset: int, document: str) -> Iterator[tuple[str, int, int]]:
  """Documents of a text file: all of it, its lines, or its paragraphs (blocks between blank lines)."""
  block, start = [], offset
  for line, at in _lines(path, offset):
    blank = not line.strip()
    if document == 'line':
      if not blank:
        yield _decode(line.rstrip(b'\r\n'), path, at), at, at + len(line)
    elif document == 'paragraph' and blank:
      if block:
        yield _decode(b''.join(block).rstrip(b'\r\n'), path, start), start, at
      block = []
    else:
      start = start if block else at
      block.append(line)
  if block:
    text = b''.join(block)
    whole = text if document == 'file' else text.rstrip(b'\r\n')
    yield _decode(whole, path, start), start, start + len(text)


def text(data, paths: str) -> Source:
  """Text files in UTF-8, plain or compressed; `config.data.document` says what a document is."""
  return Source('text', *_files(paths), functools.partial(_text_file, document=data.document))


def _json_lines(path: str, offset: int, field: str) -> Iterator[tuple[str, int, int]]:
  """The text field of each line's object. Lone surrogates, which JSON allows and UTF-8 does not, become U+FFFD."""
  def fault(at, what):
    return JaxlmError(f'{path}:{_line_number(path, at)}: {what}')

  for line, at in _lines(path, offset):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as e:
      raise fault(at, f'not a line of JSON ({e}); mend or remove it.') from e
    if not isinstance(record, dict):
      raise fault(at, f'wanted a JSON object, got {type(record).__name__}.')
    if field not in record:
      raise fault(at, f'no field {field!r}; it has {", ".join(map(repr, list(record)[:8])) or "none"}. Set '
                      'config.data.text_field.')
    value = record[field]
    if not isinstance(value, str):
      raise fault(at, f'field {field!r} wants text, got {type(value).__name__}.')
    try:
      value.encode('utf-8')
    except UnicodeEncodeError:
      value = value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    yield value, at, at + len(line)


def jsonl(data, paths: str) -> Source:
  """JSON Lines, plain, .gz or .zst: an object a line, the text in `config.data.text_field`."""
  return Source('jsonl', *_files(paths), functools.partial(_json_lines, field=data.text_field))


SOURCES = {'stdlib': stdlib, 'text': text, 'jsonl': jsonl}


def make(data, source: str, paths: str) -> Source:
  """The source of that name; `data` is `config.data`.

  Raises:
    JaxlmError: no such source, or no files.
  """
  return lookup(SOURCES, source, 'source')(data, paths)
