"""The token store: a corpus tokenised once into sealed shards, and read at random.

A store is a folder:

  shard-00000.bin    the tokens of its documents, uint16 or uint32, little endian, one after the other
  shard-00000.npy    a row a document (`DOCUMENT`): length, file, offset, bytes of text, digest, held out or not
  shard-00000.txt    the text of its held-out documents, UTF-8, for measures that count bytes
  shard-00000.json   written last: counts, crc32 of each 64 Ki tokens, sha256 of each file, where the next begins
  manifest.json      written last of all: what the store was made from, and the totals

A shard is a unit of work that depends on the corpus and the settings alone, so a preparation that was killed
continues with the first unsealed shard and ends with the same bytes.
"""
import bisect
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from jaxlm.data import sources, tokenizers
from jaxlm.data.sources import Document, Source
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.types import JaxlmError

FORMAT = 1
SHARD_BYTES = 1 << 26  # text in a shard: 64 MiB, about 16 million tokens
BLOCK = 1 << 16        # tokens under one checksum
BATCH_DOCUMENTS = 256  # documents tokenised in one call
BATCH_BYTES = 1 << 24  # and their text, at most, but for a single longer document

# A table rather than JSON: a million short documents open in milliseconds.
DOCUMENT = np.dtype([('length', '<i8'), ('file', '<i4'), ('offset', '<i8'), ('text_bytes', '<i8'),
                     ('digest', 'u1', 16), ('heldout', '?')])


class Heldout(NamedTuple):
  """Held-out documents that are measured on: their numbers, bytes of UTF-8, and what `gzip -9` needs for all."""
  documents: np.ndarray
  text_bytes: int
  gzip_bytes: int


class Prepared(NamedTuple):
  """What `prepare` returns: a store for each source of the mixture, and the tokenizer they share."""
  stores: list['Store']
  tokenizer: Tokenizer


# ---- reading -----------------------------------------------------------------------------------------------------


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
    self.manifest = _read_json(self.folder / 'manifest.json')
    if self.manifest.get('format') != FORMAT:
      raise JaxlmError(f'Token store {self.folder} has format {self.manifest.get("format")!r}, this version reads '
                       f'{FORMAT}; delete the folder and run python -m jaxlm.prepare.')
    self.name = name or self.manifest['source']
    self._shards = [_read_json(self.folder / f'shard-{n:05d}.json') for n in range(self.manifest['shards'])]
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
    return JaxlmError(f'Token store {self.folder}: {what} of shard-{shard:05d}.{suffix} is damaged, its checksum does '
                      f'not match; delete shard-{shard:05d}.json there and run python -m jaxlm.prepare to make it again.')

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
    known = _read_json(cache) if cache.exists() else {}
    if str(text_bytes) not in known:
      shards = (self._heldout_text(n) for n in range(len(self._shards)))
      data, left = [], text_bytes
      while left:
        data.append(next(shards)[:left])
        left -= len(data[-1])
      known[str(text_bytes)] = len(gzip.compress(b''.join(data), 9, mtime=0)) if text_bytes else 0
      with contextlib.suppress(OSError):  # a store that others own
        _write(cache, json.dumps(known).encode())
    return Heldout(chosen, text_bytes, known[str(text_bytes)])


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise JaxlmError(f'Token store {path.parent} is not complete: no {path.name}; run python -m jaxlm.prepare.') from None
  except ValueError as e:
    raise JaxlmError(f'{path} is damaged ({e}); delete it and run python -m jaxlm.prepare.') from e


# ---- writing -----------------------------------------------------------------------------------------------------


def _write(path: Path, data) -> None:
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """One process at a time; a second waits and says so. kill -9 releases it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'a+') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      tqdm.write(f'Waiting for another process that prepares {path.with_suffix("")}.')
      fcntl.flock(f, fcntl.LOCK_EX)
    yield


def is_heldout(digest: bytes, holdout: float) -> bool:
  """Whether a document is held out: its digest, as a number from 0 to 1, is below `holdout`."""
  return int.from_bytes(digest[:8], 'big') < holdout * 2.0 ** 64


def _blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
  """What is tokenised in one call; the last block of a shard ends where the shard does."""
  block, block_bytes, shard_bytes = [], 0, 0
  for document in documents:
    block.append(document)
    size = document.end - document.offset
    block_bytes += size
    shard_bytes += size
    if len(block) == BATCH_DOCUMENTS or block_bytes >= BATCH_BYTES or shard_bytes >= SHARD_BYTES:
      yield block
      block, block_bytes = [], 0
    if shard_bytes >= SHARD_BYTES:
      return
  if block:
    yield block


class _Builder:
  """Writes the shards of one store."""

  def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer, settings: dict[str, Any]):
    self.folder, self.source, self.tokenizer, self.holdout = folder, source, tokenizer, settings['holdout']
    vocab = tokenizer.vocab
    self.dtype = '<u2' if vocab.size <= 1 << 16 else '<u4'
    self.around = [np.array([id] if use else [], self.dtype) for id, use in
                   ((vocab.bos, settings['bos']), (vocab.eos, settings['eos']))]

  def run(self) -> list[dict]:
    """Makes what is missing; returns the sidecars of all shards."""
    sidecars: list[dict] = []
    place, documents = [0, 0], None
    with tqdm(desc=f'tokenising {self.source.kind}', unit='B', unit_scale=True, disable=None,
              total=self.source.num_bytes()) as progress:
      while place is not None:
        file = self.folder / f'shard-{len(sidecars):05d}.json'
        if file.exists():
          sidecar, documents = _read_json(file), None
        else:
          documents = documents or self.source.documents(*place)
          sidecar, documents = self._shard(file, documents, progress)
        sidecars.append(sidecar)
        place = sidecar['next']
    return sidecars

  def _shard(self, sidecar: Path, documents: Iterator[Document], progress) -> tuple[dict, Iterator[Document]]:
    """Tokenises and seals one shard; returns its sidecar and the documents that are left."""
    bos, eos = self.around
    rows, tokens, texts = [], [], []
    for block in _blocks(documents):
      for document, ids in zip(block, self.tokenizer.encode_batch([d.text for d in block])):
        if not len(ids):
          continue  # a normalizer can leave nothing
        text = document.text.encode()
        digest = hashlib.sha256(text).digest()
        heldout = is_heldout(digest, self.holdout)
        tokens += [bos, ids.astype(self.dtype), eos]
        if heldout:
          texts.append(text)
        rows.append((len(bos) + len(ids) + len(eos), document.file, document.offset, len(text),
                     np.frombuffer(digest[:16], np.uint8), heldout))
      progress.update(sum(d.end - d.offset for d in block))
    following = next(documents, None)
    table = np.array(rows, DOCUMENT)
    flat = np.concatenate(tokens) if tokens else np.empty(0, self.dtype)
    content = dict(bin=flat.tobytes(), txt=b''.join(texts), npy=_npy(table))
    held = table['heldout']
    record = dict(
        documents=len(table), tokens=len(flat), text_bytes=int(table['text_bytes'].sum()),
        heldout_documents=int(held.sum()), heldout_tokens=int(table['length'][held].sum()),
        heldout_bytes=int(table['text_bytes'][held].sum()), max_id=int(flat.max(initial=0)),
        crc32=[zlib.crc32(flat[i:i + BLOCK]) for i in range(0, len(flat), BLOCK)],
        sha256={suffix: hashlib.sha256(data).hexdigest() for suffix, data in content.items()},
        next=None if following is None else [following.file, following.offset])
    for suffix, data in content.items():
      _write(sidecar.with_suffix('.' + suffix), data)
    _write(sidecar, json.dumps(record).encode())
    return record, iter(()) if following is None else itertools.chain([following], documents)


def _npy(table: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, table)
  return buffer.getvalue()


TOTALS = ('documents', 'tokens', 'text_bytes', 'heldout_documents', 'heldout_tokens', 'heldout_bytes')


def build(folder: Path, source: Source, tokenizer: Tokenizer, settings: dict[str, Any], key: str,
          digest: str, hashes: Path | None = None) -> None:
  """Makes the store in `folder`, or what is missing of it.

  Raises:
    JaxlmError: no document in the corpus, a damaged record, or files that changed meanwhile.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for left in folder.glob('*.tmp'):
    left.unlink()
  shards = _Builder(folder, source, tokenizer, settings).run()
  if source.digest(hashes) != digest:
    raise JaxlmError(f'Files of the {source.kind} source changed while they were tokenised; run it again.')
  totals = {name: sum(s[name] for s in shards) for name in TOTALS}
  if not totals['documents']:
    raise JaxlmError(f'The {source.kind} source has no text: its {len(source.paths)} files are empty; see '
                     'config.data.paths.')
  manifest = dict(format=FORMAT, key=key, source=source.kind, source_digest=digest, tokenizer=tokenizer.name,
                  tokenizer_digest=tokenizer.digest, vocab_size=tokenizer.vocab.size,
                  dtype='<u2' if tokenizer.vocab.size <= 1 << 16 else '<u4', settings=settings, shards=len(shards),
                  max_id=max(s['max_id'] for s in shards), **totals, files=list(source.names))
  _write(folder / 'manifest.json', json.dumps(manifest, indent=1).encode())


# ---- preparing a config's data -----------------------------------------------------------------------------------


def stores_folder(data) -> Path:
  """`config.data.store`, or jaxlm/stores in the user's cache folder."""
  if data.store:
    return Path(data.store).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxlm' / 'stores'


def _key(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def mixture(data) -> list[tuple[str, str, str, int]]:
  """(name, source, paths, weight) of each source; one of weight 1 where `config.data.mixture` is empty."""
  return list(data.mixture) or [(data.source, data.source, data.paths, 1)]


def prepare(config) -> Prepared:
  """Tokenises what the config's sources hold, once; what is there already is reused.

  A second process that prepares the same waits for the first. Needs no device.

  Args:
    config: the whole config; only `config.data` is read.
  Returns:
    The stores in the order of the mixture, and the tokenizer, trained first where it must be.
  Raises:
    JaxlmError: missing files, an empty corpus, a corrupted record, a tokenizer without the tokens asked for, or a
      folder that cannot be written.
  """
  data = config.data
  folder, hashes = stores_folder(data), stores_folder(data) / 'hashes.jsonl'
  entries = mixture(data)
  named = [(name, sources.make(data, source, paths)) for name, source, paths, _ in entries]
  try:
    digests = [source.digest(hashes) for _, source in named]
    tokenizer = tokenizers.resolve(data.tokenizer) or _trained(data, folder, named, digests, [e[3] for e in entries])
    _check_special(data, tokenizer)
    stores = [_store(data, folder, name, source, digest, tokenizer, hashes)
              for (name, source), digest in zip(named, digests)]
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOTDIR, errno.EPERM):
      raise
    raise JaxlmError(f'Cannot prepare the token store in {folder}: {e.strerror} ({e.filename}); set '
                     'config.data.store to a folder that can be written and has room.') from e
  return Prepared(stores, tokenizer)


def _check_special(data, tokenizer: Tokenizer) -> None:
  for role in ('bos', 'eos'):
    if data[role] and getattr(tokenizer.vocab, role) is None:
      raise JaxlmError(f'config.data.{role} is True, but tokenizer {tokenizer.name!r} has no {role} token; set '
                       f'config.data.{role}=False, or name it in the tokenizer_config.json beside it.')


def _settings(data) -> dict[str, Any]:
  """The settings that decide which documents a corpus has, and which are held out."""
  return dict(holdout=float(data.holdout), document=data.document, text_field=data.text_field)


def _store(data, folder: Path, name: str, source: Source, digest: str, tokenizer: Tokenizer, hashes: Path) -> Store:
  settings = dict(_settings(data), bos=bool(data.bos), eos=bool(data.eos))
  key = _key(FORMAT, SHARD_BYTES, source.kind, digest, tokenizer.digest, settings)
  place = folder / f'{source.kind}-{key[:16]}'
  if not _is_whole(place):
    with _locked(place.with_suffix('.lock')):
      if not _is_whole(place):
        build(place, source, tokenizer, settings, key, digest, hashes)
  return Store(place, name)


def _is_whole(place: Path) -> bool:
  """Whether every sidecar is there; deleting one asks for its shard to be made again."""
  if not (place / 'manifest.json').exists():
    return False
  shards = _read_json(place / 'manifest.json').get('shards', 0)
  return all((place / f'shard-{n:05d}.json').exists() for n in range(shards))


def _trained(data, folder: Path, named, digests: list[str], weights: list[int]) -> Tokenizer:
  """The tokenizer trained on this corpus, from the cache if it is there."""
  key = _key('recipe 1', data.tokenizer, data.vocab_size, data.tokenizer_bytes, _settings(data),
             [[source.kind, digest, weight] for (_, source), digest, weight in zip(named, digests, weights)])
  place = folder / 'tokenizers' / f'{data.tokenizer}-{key[:16]}'
  if not (place / 'tokenizer.json').exists():
    with _locked(place.with_suffix('.lock')):
      if not (place / 'tokenizer.json').exists():
        shares = [data.tokenizer_bytes * weight // sum(weights) for weight in weights]
        texts = itertools.chain.from_iterable(
            _training_text(source, share, data.holdout) for (_, source), share in zip(named, shares))
        first = next(texts, None)
        if first is None:
          raise JaxlmError(f'There is no text to train tokenizer {data.tokenizer!r} on: the corpus is empty; see '
                           'config.data.paths.')
        tokenizers.train(data.tokenizer, itertools.chain([first], texts), data.vocab_size).save(place)
  tokenizer = tokenizers.load(place)
  tokenizer.name = data.tokenizer
  return tokenizer


def _training_text(source: Source, num_bytes: int, holdout: float) -> Iterator[str]:
  """Text of documents that are not held out, until it has that many bytes."""
  with tqdm(desc=f'reading {source.kind} for the tokenizer', unit='B', unit_scale=True, disable=None,
            total=num_bytes) as progress:
    for document in source.documents():
      data = document.text.encode()
      if is_heldout(hashlib.sha256(data).digest(), holdout):
        continue
      yield document.text
      progress.update(len(data))
      num_bytes -= len(data)
      if num_bytes <= 0:
        return
