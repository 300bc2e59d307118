"""Files of a corpus: what a source is, which files it has, their digest, their bytes and lines."""
import dataclasses
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, NamedTuple

import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest

CHUNK = 1 << 20  # bytes read at once
PAIR = '\x1e'     # stands between a text and its translation (ASCII's record separator)
COMPRESSED = ('.gz', '.zst')


class Document(NamedTuple):
  """A text, or the tokens somebody made of one, and where it stands.

  Attributes:
    text: '' where the source holds tokens.
    file: number of the file.
    offset, end: its place there, [offset, end), in the source's unit; bytes are those of the decompressed file.
    size: its bytes, which decide where shards end.
    ids: its tokens, or None.
  """
  text: str
  file: int
  offset: int
  end: int
  size: int
  ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """An ordered list of files and how documents are read from one.

  Attributes:
    kind: the name in `SOURCES`.
    names: each file's name relative to the corpus, which is what digests and provenance hold.
    paths: where the files are.
    read: (path, offset) -> (text or ids, offset, end) of each document from there on.
    unit: what offsets count: 'byte', or 'row', 'record', 'document'.
    is_tokens: whether the files hold ids; then `read` takes `eos=` too, the id between documents, or None.
  """
  kind: str
  names: tuple[str, ...]
  paths: tuple[str, ...]
  read: Callable[..., Iterator[tuple[str | np.ndarray, int, int]]]
  unit: str = 'byte'
  is_tokens: bool = False

  def documents(self, file: int = 0, offset: int = 0, bos: int | None = None,
                eos: int | None = None) -> Iterator[Document]:
    """All documents in order, from a place that an earlier one gave. Those that are empty are passed over.

    Args:
      bos, eos: ids that begin and end documents in files of tokens; no document holds them there.
    """
    read = functools.partial(self.read, eos=eos) if self.is_tokens else self.read
    for number in range(file, len(self.paths)):
      for content, start, end in read(self.paths[number], offset if number == file else 0):
        if self.is_tokens:
          ids = _bare(content, bos, eos)
          if len(ids):
            yield Document('', number, start, end, ids.nbytes, ids)
        elif content:
          yield Document(content, number, start, end, end - start if self.unit == 'byte' else len(content.encode()))

  def num_bytes(self) -> int | None:
    """Size of all files, or None if it is not that of their documents."""
    if self.unit != 'byte' or any(path.endswith(COMPRESSED) for path in self.paths):
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


def _bare(ids: np.ndarray, bos: int | None, eos: int | None) -> np.ndarray:
  """A document's ids without those that begin and end it, which whoever keeps it adds as it wants."""
  begins, ends = len(ids) > 0 and ids[0] == bos, len(ids) > 1 and ids[-1] == eos
  return ids[int(begins):len(ids) - int(ends)]


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


def opened(path: str) -> BinaryIO:
  """The file's bytes, decompressed."""
  if path.endswith('.gz'):
    return gzip.open(path, 'rb')
  if path.endswith('.zst'):
    return io.BufferedReader(_Zstd(path), CHUNK)
  return open(path, 'rb', buffering=CHUNK)


def lines(path: str, offset: int) -> Iterator[tuple[bytes, int]]:
  """Each line with its end, and the byte it starts at.

  Raises:
    JaxlmError: the compressed data is damaged or truncated.
  """
  try:
    with opened(path) as file:
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


def line_number(path: str, offset: int) -> int:
  return 1 + sum(1 for _, start in lines(path, 0) if start < offset)


def decoded(data: bytes, path: str, offset: int) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise JaxlmError(f'{path}:{line_number(path, offset) + data[:e.start].count(10)}: not UTF-8 at byte '
                     f'{offset + e.start}; convert the file, or leave it out of config.data.paths.') from e


def json_field(data: bytes, field: str, fault: Callable[[str], JaxlmError], key: str = 'text_field'):
  """The field of a JSON object: text, in which lone surrogates, which JSON allows and UTF-8 does not, become U+FFFD.

  Args:
    fault: makes an error of what is wrong; it knows where.
    key: of config.data, that says which field.
  Returns:
    Text, or an array where the field is a list of whole numbers.
  """
  try:
    record = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise fault(f'not a line of JSON ({e}); mend or remove it.') from e
  if not isinstance(record, dict):
    raise fault(f'wanted a JSON object, got {type(record).__name__}.')
  if field not in record:
    raise fault(f'no field {field!r}; it has {", ".join(map(repr, list(record)[:8])) or "none"}. Set '
                f'config.data.{key}.{nearest(field, record)}')
  value = record[field]
  if isinstance(value, list) and all(type(i) is int and abs(i) < 1 << 63 for i in value):
    return np.array(value, np.int64)
  if not isinstance(value, str):
    raise fault(f'field {field!r} wants text, got {type(value).__name__}.')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    value = value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return value


# ---- finding files -----------------------------------------------------------------------------------------------


def matching(paths: str, is_wanted: Callable[[str], bool] = os.path.isfile, key: str = 'config.data.paths') -> list[str]:
  """Absolute paths of the files, or of what else is wanted, that the globs match, sorted.

  Args:
    key: who names them.
  Raises:
    JaxlmError: a glob that matches nothing, or none at all.
  """
  found: set[str] = set()
  for pattern in filter(None, (p.strip() for p in paths.split(','))):
    matches = [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if is_wanted(p)]
    if not matches:
      kind = 'file' if is_wanted is os.path.isfile else 'folder'
      raise JaxlmError(f'{key}: {pattern!r} matches no {kind} (looked from {os.getcwd()}).')
    found.update(os.path.abspath(p) for p in matches)
  if not found:
    raise JaxlmError(f'{key} is empty; give files as globs joined by commas, "corpus/**/*.txt".')
  return sorted(found)


def named(paths: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """(names relative to the folder that holds all, paths), sorted by name."""
  root = os.path.commonpath([os.path.dirname(p) for p in paths])
  pairs = sorted((Path(os.path.relpath(p, root)).as_posix(), p) for p in paths)
  return tuple(n for n, _ in pairs), tuple(p for _, p in pairs)
