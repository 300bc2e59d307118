"""Where a sequence of tokens occurs in the training text of a store: suffix arrays, kept as files.

A suffix array lists the places of a text in the order of what follows them, so the places of a sequence are neighbours
and two binary searches find them all. A store is indexed in parts of whole documents, which bounds the memory:

  suffixes/KEY/text-00000.npy     tokens + 1, a 0 after each document; big endian, so that bytes compare as tokens do
  suffixes/KEY/places-00000.npy   places of that text, sorted
  suffixes/KEY/manifest.json      what it belongs to, and the crc32 of each file

The folder appears whole or not at all; one that is damaged is made again.
"""
import bisect
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
from tqdm.auto import tqdm

from jaxlm.data.shards import Store
from jaxlm.errors import JaxlmError

FORMAT = 1
PART_TOKENS = 1 << 25  # sorted in 53 bytes a token: 1.8 GB
MOST_TOKENS = 1 << 31  # ranks and places are int32
REACH = 64             # tokens that are compared at first; twice as many wherever all of them are equal


class Occurrences(NamedTuple):
  """Where a sequence begins: documents and tokens in them, in the order of the store; int64, of equal length."""
  documents: np.ndarray
  starts: np.ndarray


# ---- sorting -----------------------------------------------------------------------------------------------------


def sort_places(text: np.ndarray, top: int) -> np.ndarray:
  """int32, the places of a text in the order of what follows them up to the next 0; equal ones as the text has them.

  As many tokens as 64 bits hold are sorted as one number. From then on, places that agree in h tokens are sorted by
  the ranks of the places h further, so that every round doubles what has been compared. Only those that are still
  equal take part in it.

  Args:
    text: from 0 to `top`; the last is 0.
    top: what no token is above.
  Source: Larsson and Sadakane 2007, Faster suffix sorting, doi:10.1016/j.tcs.2007.07.017, section 2.
  """
  bits = top.bit_length()
  h = 64 // bits
  key = _beginnings(text, bits, h)
  order = np.argsort(key).astype(np.int32)
  key = key[order]
  ends = np.flatnonzero(text == 0)
  left = np.repeat(ends, np.diff(ends, prepend=-1)).astype(np.int32)
  left -= np.arange(len(text), dtype=np.int32)  # tokens before the next 0
  rank = np.empty(len(text), np.int32)
  slots, places = np.arange(len(text), dtype=np.int32), order
  while True:
    new = np.concatenate([[True], key[1:] != key[:-1]])
    rank[places] = slots[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
    equal = ~new | ~np.append(new[1:], True)
    unsorted = equal & (left[places] >= h)
    slots = slots[unsorted]
    if not len(slots):
      return (np.sort(rank.astype(np.int64) << 32 | np.arange(len(text))) & 0xffffffff).astype(np.int32)
    places = places[unsorted]
    key = rank[places].astype(np.int64) << 32 | rank[places + h]
    by = np.argsort(key)
    key, places = key[by], places[by]
    h *= 2


def _beginnings(text: np.ndarray, bits: int, h: int) -> np.ndarray:
  """uint64, the h tokens from each place on as one number; nothing but zeros follows a 0."""
  key = text.astype(np.uint64)
  inside = key != 0
  for n in range(1, h):
    key[:-1] = (text[:-1].astype(np.uint64) << np.uint64(n * bits)) | np.where(inside[:-1], key[1:], 0)
  return key


# ---- files -------------------------------------------------------------------------------------------------------


def index(store: Store, folder: str | os.PathLike | None = None) -> 'Suffixes':
  """The index of a store's training documents, made first where it is not there; a second process waits.

  Args:
    folder: where indexes are kept, each under its store's key; `suffixes` in the store's own folder if None.
  Raises:
    JaxlmError: nothing to index, a document that is too long, or a folder that cannot be written.
  """
  digest = hashlib.sha256(json.dumps([FORMAT, store.key, PART_TOKENS]).encode()).hexdigest()
  place = Path(folder or store.folder / 'suffixes') / digest[:24]
  try:
    if not _is_whole(place):
      with _alone(place.with_suffix('.lock')):
        if not _is_whole(place):
          _build(store, place)
  except OSError as e:
    raise JaxlmError(f'Cannot keep the suffix array of store {store.name!r} in {place.parent}: {e.strerror}; give '
                     'index(store, folder=…) a folder that can be written and has room.') from e
  return Suffixes(store, place)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
  """One process at a time; kill -9 releases it."""
  lock.parent.mkdir(parents=True, exist_ok=True)
  with open(lock, 'a+') as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    yield


def _is_whole(place: Path) -> bool:
  """Whether every file is there and is what was written."""
  try:
    crc32 = json.loads((place / 'manifest.json').read_bytes())['crc32']
    return all(_crc32(place / name) == crc for name, crc in crc32.items())
  except (FileNotFoundError, ValueError, KeyError):
    return False


def _crc32(file: Path) -> int:
  return zlib.crc32(np.memmap(file, np.uint8, 'r'))


def _build(store: Store, place: Path) -> None:
  temporary = place.with_suffix('.tmp')
  for left in (temporary, place):  # of a process that was killed; or damaged
    shutil.rmtree(left, ignore_errors=True)
  temporary.mkdir()
  with tqdm(desc=f'indexing {store.name}', unit='token', unit_scale=True, disable=None,
            total=store.num_train_tokens) as progress:
    for n, documents in enumerate(_parts(store)):
      text = _text(store, documents)
      _save(temporary / f'text-{n:05d}.npy', text.astype(text.dtype.newbyteorder('>')))
      _save(temporary / f'places-{n:05d}.npy', sort_places(text, store.manifest['vocab_size']))
      progress.update(int(store.lengths[documents].sum()))
  manifest = dict(format=FORMAT, key=store.key,
                  crc32={file.name: _crc32(file) for file in sorted(temporary.glob('*.npy'))})
  with open(temporary / 'manifest.json', 'w', encoding='utf-8') as f:
    json.dump(manifest, f)
    _sync(f)
  temporary.rename(place)


def _save(file: Path, array: np.ndarray) -> None:
  with open(file, 'wb') as f:
    np.save(f, array)
    _sync(f)


def _sync(f) -> None:
  f.flush()
  os.fsync(f.fileno())


def _parts(store: Store) -> list[np.ndarray]:
  """The training documents of each part: as many as fit, at least one."""
  if not len(store.train):
    raise JaxlmError(f'Store {store.name!r} has no training document to index; lower config.data.holdout.')
  ends = np.cumsum(store.lengths[store.train] + 1)
  parts, first, done = [], 0, 0
  while first < len(ends):
    end = max(int(np.searchsorted(ends, done + PART_TOKENS, 'right')), first + 1)
    if ends[end - 1] - done > MOST_TOKENS:
      raise JaxlmError(f'Document {store.train[first]} of store {store.name!r} has {ends[first] - done - 1} tokens, an '
                       f'index takes fewer than {MOST_TOKENS}; set config.data.document to what divides it.')
    parts.append(store.train[first:end])
    first, done = end, int(ends[end - 1])
  return parts


def _text(store: Store, documents: np.ndarray) -> np.ndarray:
  """Documents end to end, tokens + 1, and a 0 after each."""
  lengths = store.lengths[documents]
  ends = np.cumsum(lengths + 1)
  # The highest number is left free, for ids that the store's tokenizer lacks.
  text = np.zeros(int(ends[-1]), np.uint16 if store.manifest['vocab_size'] + 1 < 1 << 16 else np.uint32)
  store.copy(documents, np.zeros_like(lengths), lengths, text, ends - lengths - 1)
  text += 1
  text[ends - 1] = 0
  return text


# ---- questions ---------------------------------------------------------------------------------------------------


class _Part:
  """Some of the documents, and the places of their text in order."""

  def __init__(self, folder: Path, number: int, lengths: np.ndarray, documents: np.ndarray):
    self.text = np.load(folder / f'text-{number:05d}.npy', mmap_mode='r')
    self.places = np.load(folder / f'places-{number:05d}.npy', mmap_mode='r')
    self.documents, self.begins = documents, np.cumsum(lengths + 1) - lengths - 1
    self._width = self.text.itemsize
    self._bytes, self._order = memoryview(self.text.view(np.uint8)), memoryview(self.places)

  def _search(self, side, sought: bytes) -> int:
    # A 0 ends every comparison, since no sequence has one: what follows it does not matter.
    width, size, text = self._width, len(sought), self._bytes
    return side(self._order, sought, key=lambda place: bytes(text[place * width:place * width + size]))

  def slots(self, sought: bytes) -> tuple[int, int]:
    """[first, end) among the sorted places, of those where it occurs."""
    return self._search(bisect.bisect_left, sought), self._search(bisect.bisect_right, sought)

  def match(self, sought: np.ndarray) -> int:
    """How many of its first tokens occur together; one of the two places beside it in the order has most."""
    slot = self._search(bisect.bisect_left, sought.tobytes())
    longest = 0
    for place in self.places[max(slot - 1, 0):slot + 1].tolist():
      found = self.text[place:place + len(sought)]
      unequal = found != sought[:len(found)]
      longest = max(longest, int(unequal.argmax()) if unequal.any() else len(found))
    return longest


class Suffixes:
  """An index of a store's training documents; no match goes from one document into the next.

  Attributes:
    store: what is indexed.
  """

  def __init__(self, store: Store, folder: Path):
    self.store = store
    self._parts = [_Part(folder, n, store.lengths[documents], documents)
                   for n, documents in enumerate(_parts(store))]

  def _encoded(self, ids: Sequence[int]) -> np.ndarray:
    """Ids as the texts have them; those that the store's tokenizer lacks become one that no text has."""
    ids, size = np.asarray(ids, np.int64), self.store.manifest['vocab_size']
    return np.where((ids < 0) | (ids >= size), size + 1, ids + 1).astype(self._parts[0].text.dtype)

  def _sought(self, ids: Sequence[int]) -> bytes:
    if not len(ids):
      raise JaxlmError('An empty sequence occurs everywhere; ask for one id at least.')
    return self._encoded(ids).tobytes()

  def count(self, ids: Sequence[int]) -> int:
    """How often a sequence occurs; overlapping occurrences count."""
    sought = self._sought(ids)
    return sum(end - first for first, end in (part.slots(sought) for part in self._parts))

  def occurrences(self, ids: Sequence[int]) -> Occurrences:
    """Every place where a sequence occurs."""
    sought, found = self._sought(ids), []
    for part in self._parts:
      first, end = part.slots(sought)
      places = np.sort(part.places[first:end]).astype(np.int64)
      rows = np.searchsorted(part.begins, places, 'right') - 1
      found.append((part.documents[rows], places - part.begins[rows]))
    return Occurrences(*(np.concatenate(column) for column in zip(*found)))

  def find(self, ids: Sequence[int], most: int | None = None) -> list[tuple[int, int]]:
    """(document, start) of the occurrences of a sequence, in the order of the store; of more than `most` the first."""
    documents, starts = self.occurrences(ids)
    return list(zip(documents[:most].tolist(), starts[:most].tolist()))

  def longest(self, ids: Sequence[int]) -> np.ndarray:
    """int64 [len(ids)]: how many tokens from each position of a text on occur together in the store."""
    sought = self._encoded(ids)
    return np.max([_longest(part, sought) for part in self._parts], axis=0)


def _longest(part: _Part, sought: np.ndarray) -> np.ndarray:
  lengths, length = np.zeros(len(sought), np.int64), 0
  for i in range(len(sought)):
    reach = max(REACH, length)
    while (length := part.match(sought[i:i + reach])) == reach:
      reach *= 2
    lengths[i] = length
  return lengths
