"""A token store goes out again: Parquet, ArrayRecord, token files of nanoGPT, llm.c and Megatron-LM."""
import contextlib
import json
import os
from pathlib import Path
from typing import BinaryIO, Iterator, NamedTuple

import numpy as np

from jaxlm.data.shards import Store
from jaxlm.data.store import Prepared
from jaxlm.data.tokenfiles import CODES, MAGIC, llmc_header
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup

PART_TOKENS = 1 << 26  # a file of records ends after so many
GROUP_TOKENS = 1 << 20  # a row group of Parquet


class Exported(NamedTuple):
  """A document without the tokens that begin and end it in the store, and where it came from."""
  ids: np.ndarray
  file: str
  offset: int


def documents(store: Store, numbers: np.ndarray) -> Iterator[Exported]:
  """Those documents, in order."""
  settings = store.manifest['settings']
  for number in numbers.tolist():
    ids = store.read(number)
    yield Exported(ids[int(settings['bos']):len(ids) - int(settings['eos'])], *store.provenance(number))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
  """A file that gets its name when it is whole."""
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as f:
    yield f
    f.flush()
    os.fsync(f.fileno())
  temporary.replace(path)


# ---- records -----------------------------------------------------------------------------------------------------


def _cut(found: Iterator[Exported], tokens: int) -> Iterator[Iterator[Exported]]:
  """The documents in runs, each ending with the one that fills so many tokens; to be read one after the other."""
  def run(first):
    left = tokens - len(first.ids)
    yield first
    while left > 0 and (following := next(found, None)) is not None:
      left -= len(following.ids)
      yield following

  for first in found:
    yield run(first)


def _record(document: Exported, tokenizer: Tokenizer) -> dict:
  return dict(text=tokenizer.decode(document.ids, skip_special=False), tokens=document.ids.tolist(),
              file=document.file, offset=document.offset)


def parquet(store: Store, tokenizer: Tokenizer, numbers: np.ndarray, folder: Path, split: str) -> None:
  """SPLIT-00000.parquet and so on: text, as the tokenizer decodes it; tokens; file and offset it came from."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as e:
    raise JaxlmError('Parquet needs the package pyarrow: pip install pyarrow, or jaxlm[tables].') from e
  tokens = pyarrow.uint16() if store.manifest['dtype'] == '<u2' else pyarrow.uint32()
  schema = pyarrow.schema(dict(text=pyarrow.string(), tokens=pyarrow.list_(tokens), file=pyarrow.string(),
                               offset=pyarrow.int64()))
  for number, part in enumerate(_cut(documents(store, numbers), PART_TOKENS)):
    with _writing(folder / f'{split}-{number:05d}.parquet') as f:
      with pyarrow.parquet.ParquetWriter(f, schema, compression='zstd') as writer:
        for group in _cut(part, GROUP_TOKENS):
          writer.write_table(pyarrow.Table.from_pylist([_record(d, tokenizer) for d in group], schema))


def arrayrecord(store: Store, tokenizer: Tokenizer, numbers: np.ndarray, folder: Path, split: str) -> None:
  """SPLIT-00000.arrayrecord and so on: a JSON object a document, with the same fields as in Parquet."""
  from array_record.python.array_record_module import ArrayRecordWriter
  for number, part in enumerate(_cut(documents(store, numbers), PART_TOKENS)):
    path = folder / f'{split}-{number:05d}.arrayrecord'
    writer = ArrayRecordWriter(f'{path}.tmp', 'group_size:1')
    for document in part:
      writer.write(json.dumps(_record(document, tokenizer), ensure_ascii=False).encode())
    writer.close()
    os.replace(f'{path}.tmp', path)


# ---- flat files --------------------------------------------------------------------------------------------------


def _end(tokenizer: Tokenizer, dtype: str) -> np.ndarray:
  if tokenizer.vocab.last is None:
    raise JaxlmError(f'Tokenizer {tokenizer.name!r} has no end-of-text token, so documents in a flat file could not be '
                     'told apart; use --export=megatron.')
  return np.array([tokenizer.vocab.last], dtype)


def nanogpt(store: Store, tokenizer: Tokenizer, numbers: np.ndarray, folder: Path, split: str) -> None:
  """train.bin and val.bin: uint16 ids, the end-of-text id after each document."""
  if tokenizer.vocab.size > 1 << 16:
    raise JaxlmError(f"nanoGPT's files hold 16 bits a token, tokenizer {tokenizer.name!r} has {tokenizer.vocab.size} "
                     'ids; use --export=llmc or megatron.')
  end = _end(tokenizer, '<u2')
  with _writing(folder / f'{dict(train="train", heldout="val")[split]}.bin') as f:
    for document in documents(store, numbers):
      f.write(document.ids.astype('<u2').tobytes() + end.tobytes())


def llmc(store: Store, tokenizer: Tokenizer, numbers: np.ndarray, folder: Path, split: str) -> None:
  """train.bin and val.bin with llm.c's header: uint16 or uint32 ids, the end-of-text id before each document."""
  dtype = '<u2' if tokenizer.vocab.size <= 1 << 16 else '<u4'
  end, settings = _end(tokenizer, dtype), store.manifest['settings']
  count = int(store.lengths[numbers].sum()) + (1 - settings['bos'] - settings['eos']) * len(numbers)
  with _writing(folder / f'{dict(train="train", heldout="val")[split]}.bin') as f:
    f.write(llmc_header(count, dtype))
    for document in documents(store, numbers):
      f.write(end.tobytes() + document.ids.astype(dtype).tobytes())


def megatron(store: Store, tokenizer: Tokenizer, numbers: np.ndarray, folder: Path, split: str) -> None:
  """SPLIT.bin and SPLIT.idx: a sequence a document, ending with the end-of-text id where there is one."""
  dtype = '<u2' if tokenizer.vocab.size < 65_500 else '<i4'  # as Megatron-LM chooses
  end = np.array([] if tokenizer.vocab.last is None else [tokenizer.vocab.last], dtype)
  lengths = []
  with _writing(folder / f'{split}.bin') as f:
    for document in documents(store, numbers):
      f.write(document.ids.astype(dtype).tobytes() + end.tobytes())
      lengths.append(len(document.ids) + len(end))
  code = next(code for code, name in CODES.items() if name == dtype)
  pointers = np.cumsum([0, *lengths], dtype='<i8')[:-1] * np.dtype(dtype).itemsize
  with _writing(folder / f'{split}.idx') as f:
    f.write(MAGIC + np.array([1], '<u8').tobytes() + bytes([code])
            + np.array([len(lengths), len(lengths) + 1], '<u8').tobytes() + np.array(lengths, '<i4').tobytes()
            + pointers.astype('<i8').tobytes() + np.arange(len(lengths) + 1, dtype='<i8').tobytes())


FORMATS = {'parquet': parquet, 'arrayrecord': arrayrecord, 'nanogpt': nanogpt, 'llmc': llmc, 'megatron': megatron}


def export(prepared: Prepared, name: str, to: str | os.PathLike) -> list[Path]:
  """Writes every store's documents, those trained on and those held out apart.

  Args:
    prepared: what `store.prepare` returned.
    name: a key of `FORMATS`.
    to: a folder that is new or empty; several sources get a folder each in it.
  Returns:
    The files.
  Raises:
    JaxlmError: no such format, a folder in use, or a tokenizer that the format cannot hold.
  """
  write, to = lookup(FORMATS, name, 'export format'), Path(to).expanduser()
  try:
    to.mkdir(parents=True, exist_ok=True)
    if any(to.iterdir()):
      raise JaxlmError(f'--to={to} is not empty; give a new folder.')
    for store in prepared.stores:
      folder = to / store.name if len(prepared.stores) > 1 else to
      folder.mkdir(exist_ok=True)
      for split, numbers in (('train', store.train), ('heldout', store.heldout)):
        if len(numbers):
          write(store, prepared.tokenizer, numbers, folder, split)
  except (FileExistsError, NotADirectoryError) as e:
    raise JaxlmError(f'--to={to} is no folder; give a new one.') from e
  return sorted(p for p in to.rglob('*') if p.is_file())
