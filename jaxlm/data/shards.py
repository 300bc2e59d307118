"""The token store on disk: sealed shards of tokens, read at random.

A store is a folder:

  shard-00000.bin    the tokens of its documents, uint16 or uint32, little endian, one after the other
  shard-00000.npy    a row a document (`DOCUMENT`): length, file, offset, bytes of text, digest, held out or not
  shard-00000.txt    the text of its held-out documents, UTF-8, for measures that count bytes
  shard-00000.json   written last: counts, crc32 of each 64 Ki tokens, sha256 of each file, where the next begins
  manifest.json      written last of all: what the store was made from, and the totals
"""
import bisect
import contextlib
import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import JaxlmError

FORMAT = 1
BLOCK = 1 << 16  # tokens under one checksum

# A table rather than JSON: a million short documents open in milliseconds.
DOCUMENT = np.dtype([('length', '<i8'), ('file', '<i4'), ('offset', '<i8'), ('text_bytes', '<i8'),
                     ('digest', 'u1', 16), ('heldout', '?')])


class Heldout(NamedTuple):
  """Held-out documents that are measured on: their numbers, bytes of UTF-8, and what `gzip -9` needs for all."""
  documents: np.ndarray
  text_bytes: int
  gzip_bytes: int


class Store:
  """A prepared corpus. Documents are numbered from 0 over all shards; some of them are held out.

  Pickles as its folder's name, so that worker processes open it themselves.

  Attributes:
    name: the mixture's name for it, or its source's.
    manifest: manifest.json.
    lengths: int64 [documents], tokens of each, special ones included.
    train, heldout: int64, numbers of the documents that are trained on, and of the others.
  """

  def __init__(self, folder: str | os.PathLike, name: str = ''):
    """Opens a store that `prepare` made.

    Raises:
      JaxlmError: it is not whole.
    """
    self.folder = Path(folder)
    self.manifest = read_json(self.folder / 'manifest.json')
    if self.manifest.get('format') != FORMAT:
      raise JaxlmError(f'Token store {self.folder} has format {self.manifest.get("format")!r}, this version reads '
                       f'{FORMAT}; delete the folder and run python -m jaxlm.prepare.')
    self.name = name or self.manifest['source']
    self._shards = [read_json(self.folder / f'shard-{n:05d}.json') for n in range(self.manifest['shards'])]
    tables = [self._table(n) for n in range(len(self._shards))]
    self.documents = np.concatenate(tables)
    self.lengths = np.ascontiguousarray(self.documents['length'])
    self.starts = np.concatenate([[0], np.cumsum(self.lengths)])  # in tokens, over all shards
    self.heldout = np.flatnonzero(self.documents['heldout'])
    self.train = np.flatnonzero(~self.documents['heldout'])
    self._first = np.cumsum([0] + [len(t) for t in tables]).tolist()         # first document of each shard
    self._base = np.cumsum([0] + [s['tokens'] for s in self._shards]).tolist()  # first token of each shard
    self._bases = np.array(self._base[:-1])
    self._tokens: list[np.ndarray | None] = [None] * len(self._shards)
    self._checked = [bytearray(len(s['crc32'])) for s in self._shards]

  def __reduce__(self):
    return Store, (self.folder, self.name)

  @property
  def key(self) -> str:
    """Digest of everything the store was made from."""
    return self.manifest['key']

  @property
  def num_train_tokens(self) -> int:
    return self.manifest['tokens'] - self.manifest['heldout_tokens']

  def _shard_file(self, shard: int, suffix: str) -> Path:
    return self.folder / f'shard-{shard:05d}.{suffix}'

  def _damaged(self, shard: int, suffix: str, what: str) -> JaxlmError:
    name = f'shard-{shard:05d}'
    return JaxlmError(f'Token store {self.folder}: {what} of {name}.{suffix} is damaged, its checksum does not match; '
                      f'delete {name}.json there and run python -m jaxlm.prepare to make it again.')

  def _table(self, shard: int) -> np.ndarray:
    try:
      data = self._shard_file(shard, 'npy').read_bytes()
    except FileNotFoundError:
      data = b''
    if hashlib.sha256(data).hexdigest() != self._shards[shard]['sha256']['npy']:
      raise self._damaged(shard, 'npy', 'the document table')
    return np.load(self._shard_file(shard, 'npy'))

  def _open(self, shard: int) -> np.ndarray:
    dtype, size = np.dtype(self.manifest['dtype']), self._shards[shard]['tokens']
    file = self._shard_file(shard, 'bin')
    if not file.exists() or file.stat().st_size != size * dtype.itemsize:
      raise self._damaged(shard, 'bin', 'the length')
    self._tokens[shard] = np.asarray(np.memmap(file, dtype, 'r'))  # slices of a plain array are faster
    return self._tokens[shard]

  def _tokens_of(self, shard: int, lo: int, hi: int) -> np.ndarray:
    """Tokens [lo, hi) of a shard; each block is checked when it is first touched."""
    tokens = self._tokens[shard]
    if tokens is None:
      tokens = self._open(shard)
    checked = self._checked[shard]
    for block in range(lo // BLOCK, (hi - 1) // BLOCK + 1):
      if not checked[block]:
        part = tokens[block * BLOCK:(block + 1) * BLOCK]
        if zlib.crc32(part) != self._shards[shard]['crc32'][block]:
          raise self._damaged(shard, 'bin', f'block {block} (tokens {block * BLOCK} to {block * BLOCK + len(part)})')
        checked[block] = 1
    return tokens[lo:hi]

  def read(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
    """Tokens [start, end) of a document, as stored; read-only."""
    first, length = int(self.starts[document]), int(self.lengths[document])
    end = length if end is None else end
    if not 0 <= start <= end <= length:
      raise IndexError(f'tokens {start} to {end} of document {document}, which has {length}')
    if start == end:
      return np.empty(0, self.manifest['dtype'])
    shard = bisect.bisect_right(self._base, first + start) - 1
    return self._tokens_of(shard, first + start - self._base[shard], first + end - self._base[shard])

  def copy(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray,
           places: np.ndarray) -> None:
    """Copies many pieces (document, start, length > 0) to their places in a flat array."""
    first = self.starts[documents] + starts
    shards = np.searchsorted(self._bases, first, 'right') - 1
    first -= self._bases[shards]
    read = self._tokens_of
    for shard, lo, length, place in zip(shards.tolist(), first.tolist(), lengths.tolist(), places.tolist()):
      out[place:place + length] = read(shard, lo, lo + length)

  def provenance(self, document: int) -> tuple[str, int]:
    """(file name, byte offset in it) of a document."""
    row = self.documents[document]
    return self.manifest['files'][row['file']], int(row['offset'])

  def text(self, document: int) -> str:
    """The text of a held-out document; others are not kept."""
    row = self.documents[document]
    if not row['heldout']:
      raise IndexError(f'document {document} is not held out; only the text of held-out documents is stored')
    shard = bisect.bisect_right(self._first, document) - 1
    data = self._heldout_text(shard)
    rows = self.documents[self._first[shard]:document]
    at = int(rows['text_bytes'][rows['heldout']].sum())
    return data[at:at + int(row['text_bytes'])].decode('utf-8')

  def _heldout_text(self, shard: int) -> bytes:
    file = self._shard_file(shard, 'txt')
    data = file.read_bytes() if file.exists() else b''
    if hashlib.sha256(data).hexdigest() != self._shards[shard]['sha256']['txt']:
      raise self._damaged(shard, 'txt', 'the text')
    return data

  def heldout_sample(self, max_tokens: int) -> Heldout:
    """The first held-out documents that together have at most so many tokens; at least one if there are any."""
    fits = np.cumsum(self.lengths[self.heldout]) <= max_tokens
    chosen = self.heldout[:max(int(fits.sum()), 1)]
    text_bytes = int(self.documents['text_bytes'][chosen].sum())
    cache = self.folder / 'gzip.json'
    known = read_json(cache) if cache.exists() else {}
    if str(text_bytes) not in known:
      shards = (self._heldout_text(n) for n in range(len(self._shards)))
      data, left = [], text_bytes
      while left:
        data.append(next(shards)[:left])
        left -= len(data[-1])
      known[str(text_bytes)] = len(gzip.compress(b''.join(data), 9, mtime=0)) if text_bytes else 0
      with contextlib.suppress(OSError):  # a store that others own
        write(cache, json.dumps(known).encode())
    return Heldout(chosen, text_bytes, known[str(text_bytes)])


def read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise JaxlmError(f'Token store {path.parent} is not complete: it has no {path.name}; run python -m '
                     'jaxlm.prepare.') from None
  except ValueError as e:
    raise JaxlmError(f'{path} is damaged ({e}); delete it and run python -m jaxlm.prepare.') from e


def write(path: Path, data) -> None:
  """Writes a file whole or not at all, and durably."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  with open(temporary, 'wb') as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  temporary.replace(path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)
