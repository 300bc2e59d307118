"""A corpus is tokenised once, into a store of sealed shards, and found again by what it was made from.

A shard is a unit of work that depends on the corpus and the settings alone, so a preparation that was killed continues
with the first unsealed shard and ends with the same bytes. The files are described in shards.py.
"""
import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
from tqdm.auto import tqdm

from jaxlm import folders
from jaxlm.data import mixtures, sources, tokenizers
from jaxlm.data.files import PAIR, Document, Source
from jaxlm.data.shards import BLOCK, DOCUMENT, FORMAT, Store, read_json, write
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError

SHARD_BYTES = 1 << 26  # text in a shard: 64 MiB, about 16 million tokens
BATCH_DOCUMENTS = 256  # documents tokenised in one call
BATCH_BYTES = 1 << 24  # and their text, at most, but for a single longer document
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class Prepared(NamedTuple):
  """What `prepare` returns: a store for each source of the mixture, and the tokenizer they share."""
  stores: list[Store]
  tokenizer: Tokenizer

  @property
  def task(self) -> None:
    """Text is no task: `examples.prepare` makes what a task has in this one's place."""
    return None

  @property
  def keys(self) -> dict[str, str]:
    """{name: digest} of what is learned from."""
    return {store.name: store.key for store in self.stores}


# ---- writing -----------------------------------------------------------------------------------------------------


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
    block_bytes += document.size
    shard_bytes += document.size
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
    self.around = [np.array([id] if use else [], np.int32) for id, use in
                   ((vocab.first, settings['bos']), (vocab.last, settings['eos']))]
    self.between = vocab.last if settings.get('pair_field') else None

  def run(self) -> list[dict]:
    """Makes what is missing; returns the sidecars of all shards."""
    sidecars: list[dict] = []
    place, documents = [0, 0], None
    with tqdm(desc=f'tokenising {self.source.kind}', unit='B', unit_scale=True, disable=None,
              total=self.source.num_bytes()) as progress:
      while place is not None:
        file = self.folder / f'shard-{len(sidecars):05d}.json'
        if file.exists():
          sidecar, documents = read_json(file), None
          progress.update(sidecar['text_bytes'])
        else:
          documents = documents or self.source.documents(*place, bos=self.tokenizer.vocab.first,
                                                         eos=self.tokenizer.vocab.last)
          sidecar, documents = self._shard(file, documents, progress)
        sidecars.append(sidecar)
        place = sidecar['next']
    return sidecars

  def _shard(self, sidecar: Path, documents: Iterator[Document], progress) -> tuple[dict, Iterator[Document]]:
    """Tokenises and seals one shard; returns its sidecar and the documents that are left."""
    bos, eos = self.around
    rows, digests, tokens, texts = [], [], [], []
    for block in _blocks(documents):
      for document, ids in zip(block, self._ids(block)):
        if not len(ids):
          continue  # a normalizer can leave nothing
        digest = _digest(document)
        heldout = is_heldout(digest, self.holdout)
        text = self._text(document, heldout)
        tokens += bos, ids, eos
        if heldout:
          texts.append(text)
        rows.append((len(bos) + len(ids) + len(eos), document.file, document.offset, len(text), heldout))
        digests.append(digest[:16])
      progress.update(sum(d.size for d in block))
    following = next(documents, None)
    table = np.empty(len(rows), DOCUMENT)
    for name, column in zip(('length', 'file', 'offset', 'text_bytes', 'heldout'), zip(*rows)):
      table[name] = column
    table['digest'] = np.frombuffer(b''.join(digests), np.uint8).reshape(-1, 16)
    # unsafe: from int32 to what holds the vocabulary's size, which every id is below
    flat = np.concatenate([np.empty(0, np.int32), *tokens], dtype=self.dtype, casting='unsafe')
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
      write(sidecar.with_suffix('.' + suffix), data)
    write(sidecar, json.dumps(record).encode())
    return record, iter(()) if following is None else itertools.chain([following], documents)


  def _ids(self, block: list[Document]) -> list[np.ndarray]:
    """The tokens of documents: made here, or given and then checked."""
    if not self.source.is_tokens:
      if self.between is None:
        return self.tokenizer.encode_batch([d.text for d in block])
      parts = iter(self.tokenizer.encode_batch([t for d in block for t in d.text.split(PAIR)]))
      return [np.concatenate([next(parts), [self.between], next(parts)], dtype=np.int32) for _ in block]
    for document in block:
      lowest, highest = int(document.ids.min()), int(document.ids.max())
      if lowest < 0 or highest >= self.tokenizer.vocab.size:
        raise JaxlmError(f'{self.source.paths[document.file]}: the document at {self.source.unit} {document.offset} '
                         f'holds id {lowest if lowest < 0 else highest}, but tokenizer {self.tokenizer.name!r} has '
                         f'{self.tokenizer.vocab.size} ids; set config.data.tokenizer to the one that made the file.')
    return [d.ids for d in block]

  def _text(self, document: Document, heldout: bool) -> bytes:
    """A document's text; given tokens are decoded where their text is kept, and b'' elsewhere."""
    if not self.source.is_tokens:
      return document.text.encode()
    return self.tokenizer.decode(document.ids, skip_special=False).encode() if heldout else b''


def _digest(document: Document) -> bytes:
  """sha256 of a document's text, or of its ids as uint32, little endian."""
  data = document.text.encode() if document.ids is None else document.ids.astype('<u4').tobytes()
  return hashlib.sha256(data).digest()


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
                  unit=source.unit, is_tokens=source.is_tokens, max_id=max(s['max_id'] for s in shards), **totals,
                  files=list(source.names))
  write(folder / 'manifest.json', json.dumps(manifest, indent=1).encode())


# ---- preparing a config's data -----------------------------------------------------------------------------------


def stores_folder(data) -> Path:
  """`config.data.store`, or jaxlm/stores in the user's cache folder."""
  if data.store:
    return Path(data.store).expanduser()
  return folders.cache('stores')


def _key(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def mixture(data) -> list[tuple[str, str, str, int]]:
  """(name, source, paths, weight) of each source; one of weight 1 where `config.data.mixture` is empty."""
  return list(data.mixture) or [(data.source, data.source, data.paths, 1)]


def weights(data, sizes: Sequence[int]) -> list[int]:
  """Weights of the mixture's sources: as given, or times what `config.data.temperature` makes of their sizes.

  Args:
    sizes: of the sources; tokens to train on, where they are known.
  """
  given = [weight for *_, weight in mixture(data)]
  return mixtures.tempered(given, sizes, data.temperature) if data.temperature else given


def _check_temperature(data) -> None:
  if data.temperature and data.phases:
    raise JaxlmError(f'config.data.temperature={data.temperature} weighs sources by their sizes, for the whole run; '
                     'leave config.data.phases empty, or set the temperature to 0.')


def prepare(config, roles: Sequence[str] = ()) -> Prepared:
  """Tokenises what the config's sources hold, once; what is there already is reused.

  A second process that prepares the same waits for the first. Needs no device.

  Args:
    config: the whole config; only `config.data` is read.
    roles: special tokens that the objective writes (`objectives.roles`); the tokenizer gets those that it lacks. No
      text is encoded otherwise for it, so stores are shared by objectives.
  Returns:
    The stores in the order of the mixture, and the tokenizer, trained first where it must be.
  Raises:
    JaxlmError: missing files, an empty corpus, a corrupted record, a tokenizer without the tokens asked for, or a
      folder that cannot be written.
  """
  data = config.data
  folder, hashes = stores_folder(data), stores_folder(data) / 'hashes.jsonl'
  _check_temperature(data)
  named = [(name, sources.make(data, source, paths)) for name, source, paths, _ in mixture(data)]
  try:
    digests = [source.digest(hashes) for _, source in named]
    tokenizer = tokenizers.resolve(data.tokenizer) or _trained(data, folder, named, digests)
    _check_special(data, tokenizer)
    stores = [_store(data, folder, name, source, digest, tokenizer, hashes)
              for (name, source), digest in zip(named, digests)]
  except OSError as e:
    if any(e.filename in source.paths for _, source in named):
      raise JaxlmError(f'Cannot read {e.filename}: {e.strerror}; mend it, or leave it out of config.data.paths.') from e
    if e.errno not in NOT_WRITABLE:
      raise
    raise JaxlmError(f'Cannot prepare the token store in {folder}: {e.strerror} ({e.filename or "a write"}); set '
                     'config.data.store to a folder that can be written and has room.') from e
  return Prepared(stores, tokenizer.with_roles(roles))


def _check_special(data, tokenizer: Tokenizer) -> None:
  for role, id in (('bos', tokenizer.vocab.first), ('eos', tokenizer.vocab.last)):
    if data[role] and id is None:
      raise JaxlmError(f'config.data.{role} is True, but tokenizer {tokenizer.name!r} has no {role} token; set '
                       f'config.data.{role}=False, or name it in the tokenizer_config.json beside it.')
  if data.pair_field and tokenizer.vocab.last is None:
    raise JaxlmError(f'config.data.pair_field is set, but tokenizer {tokenizer.name!r} has no eos token to stand '
                     'between a text and its translation; name it in the tokenizer_config.json beside it.')


def _settings(data) -> dict[str, Any]:
  """The settings that decide which documents a corpus has, and which are held out."""
  pair = dict(pair_field=data.pair_field) if data.pair_field else {}  # left out, for the keys of stores without
  return dict(holdout=float(data.holdout), document=data.document, text_field=data.text_field, **pair)


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
  shards = read_json(place / 'manifest.json').get('shards', 0)
  return all((place / f'shard-{n:05d}.json').exists() for n in range(shards))


def _trained(data, folder: Path, named, digests: list[str]) -> Tokenizer:
  """The tokenizer trained on this corpus, from the cache if it is there.

  Of a mixture each source gives text by its weight; a temperature takes the sizes of the files, as nothing is
  tokenised yet.
  """
  for name, source in named:
    if source.is_tokens:
      raise JaxlmError(f'Source {name!r} holds tokens, so no tokenizer can be trained here: tokenizer '
                       f'{data.tokenizer!r} would give other ids; set config.data.tokenizer to the one that made them.')
  by_weight = weights(data, [sum(os.stat(path).st_size for path in source.paths) for _, source in named])
  key = _key('recipe 1', data.tokenizer, data.vocab_size, data.tokenizer_bytes, _settings(data),
             [[source.kind, digest, weight] for (_, source), digest, weight in zip(named, digests, by_weight)])
  place = folder / 'tokenizers' / f'{data.tokenizer}-{key[:16]}'
  if not (place / 'tokenizer.json').exists():
    with _locked(place.with_suffix('.lock')):
      if not (place / 'tokenizer.json').exists():
        shares = [data.tokenizer_bytes * weight // sum(by_weight) for weight in by_weight]
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
