"""Tokens that others made: nanoGPT's and llm.c's flat files, Megatron-LM's indexed datasets; read, never tokenised."""
import os
from pathlib import Path
from typing import Iterator

import numpy as np

from jaxlm.data.files import COMPRESSED, Source, matching, named
from jaxlm.errors import JaxlmError

SCAN = 1 << 22  # tokens searched for document ends at once
REMEDY = 'restore it, or leave it out of config.data.paths.'

Documents = Iterator[tuple[np.ndarray, int, int]]


def _mapped(path: str, dtype: str, offset: int = 0) -> np.ndarray:
  """The numbers of a file from that byte on, as an array that is read where it is touched."""
  count = (os.path.getsize(path) - offset) // np.dtype(dtype).itemsize
  return np.asarray(np.memmap(path, dtype, 'r', offset, (count,))) if count > 0 else np.empty(0, dtype)


def _uncompressed(paths: list[str]) -> list[str]:
  for path in paths:
    if path.endswith(COMPRESSED):
      raise JaxlmError(f'{path} is compressed; token files are read in place, so decompress it first.')
  return paths


def split(tokens: np.ndarray, eos: int | None, start: int = 0) -> Iterator[tuple[int, int]]:
  """[begin, end) of the documents of a flat array from `start` on; the ends themselves are in none.

  Files have the end after each document (nanoGPT) or before (llm.c); what lies between two ends is a document.
  """
  for begin in range(start, len(tokens), SCAN):
    if eos is None:
      break
    for end in np.flatnonzero(tokens[begin:begin + SCAN] == eos).tolist():
      if begin + end > start:
        yield start, begin + end
      start = begin + end + 1
  if start < len(tokens):
    yield start, len(tokens)


# ---- nanoGPT and llm.c: documents between ends -------------------------------------------------------------------

HEADER = 1024  # bytes of llm.c's: 256 int32: magic, version, number of tokens, zeros
HEADERS = {20240520: (1, '<u2'), 20240801: (7, '<u4')}  # magic: (version, type of the tokens)


def _flat_documents(path: str, offset: int, dtype: str, header: int, eos: int | None) -> Documents:
  size = np.dtype(dtype).itemsize
  tokens = _mapped(path, dtype, header)
  for begin, end in split(tokens, eos, max(offset - header, 0) // size):
    yield tokens[begin:end], header + begin * size, header + end * size


def _headerless(path: str, offset: int, eos: int | None) -> Documents:
  size = os.path.getsize(path)
  if size % 2:
    raise JaxlmError(f'{path} has {size} bytes, an odd number; nanoGPT writes 16 bits a token. {REMEDY.capitalize()}')
  if size >= HEADER and int(_mapped(path, '<i4')[0]) in HEADERS:
    raise JaxlmError(f"{path} has llm.c's header; set config.data.source='llmc'.")
  yield from _flat_documents(path, offset, '<u2', 0, eos)


def nanogpt(data, paths: str) -> Source:
  """nanoGPT's files: uint16 ids and nothing else; the tokenizer's end-of-text id ends a document."""
  del data
  return Source('nanogpt', *named(_uncompressed(matching(paths))), _headerless, is_tokens=True)


def _headed(path: str, offset: int, eos: int | None) -> Documents:
  size = os.path.getsize(path)
  magic, version, count = (int(i) for i in _mapped(path, '<i4')[:3]) if size >= HEADER else (None, None, None)
  if magic not in HEADERS or version != HEADERS[magic][0]:
    got = f'magic number {magic}, version {version}' if size >= HEADER else f'{size} bytes in all'
    raise JaxlmError(f'{path} is no token file of llm.c: wanted 1,024 bytes that begin with '
                     f'{" or ".join(f"{m}, version {v}" for m, (v, _) in HEADERS.items())}; got {got}. '
                     f'{REMEDY.capitalize()}')
  dtype = HEADERS[magic][1]
  if size != HEADER + count * np.dtype(dtype).itemsize:
    raise JaxlmError(f'{path} is damaged: its header tells {count} tokens, but {size - HEADER} bytes follow it, wanted '
                     f'{count * np.dtype(dtype).itemsize}; {REMEDY}')
  yield from _flat_documents(path, offset, dtype, HEADER, eos)


def llmc(data, paths: str) -> Source:
  """llm.c's files: a header of 1,024 bytes, then uint16 or uint32 ids; the end-of-text id parts documents."""
  del data
  return Source('llmc', *named(_uncompressed(matching(paths))), _headed, is_tokens=True)


def llmc_header(count: int, dtype: str) -> bytes:
  """The header of a file of so many tokens."""
  magic, (version, _) = next((m, h) for m, h in HEADERS.items() if h[1] == dtype)
  header = np.zeros(HEADER // 4, '<i4')
  header[:3] = magic, version, count
  return header.tobytes()


# ---- Megatron-LM -------------------------------------------------------------------------------------------------

MAGIC = b'MMIDIDX\0\0'
CODES = {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}  # 6 and 7 are floats


class _Index:
  """An .idx file: where each sequence lies in the .bin beside it, and which sequences make a document.

  After the magic number: version (uint64), type code (uint8), number of sequences n and of document bounds d (uint64
  each), lengths (int32 [n], tokens), pointers (int64 [n], bytes), document bounds (int64 [d], sequence numbers from 0
  to n).
  """

  def __init__(self, path: str):
    fault = lambda what: JaxlmError(f'{path} is no index of Megatron-LM, or is damaged: {what}; {REMEDY}')
    data = Path(path).read_bytes()
    if data[:len(MAGIC)] != MAGIC:
      raise fault(f'it begins with {data[:len(MAGIC)]!r}, wanted {MAGIC!r}')
    if len(data) < 34:
      raise fault(f'it has {len(data)} bytes, and 34 of them are the header')
    version, = np.frombuffer(data, '<u8', 1, 9).tolist()
    sequences, bounds = np.frombuffer(data, '<u8', 2, 18).tolist()
    if version != 1:
      raise fault(f'wanted version 1, got {version}')
    if data[17] not in CODES:
      raise fault(f'its type code is {data[17]}, wanted one of {", ".join(map(str, CODES))}, whole numbers')
    wanted = 34 + 12 * sequences + 8 * bounds
    if len(data) not in (wanted, wanted + sequences):  # multimodal ones add a byte a sequence
      raise fault(f'{sequences} sequences and {bounds} bounds of documents need {wanted} bytes, it has {len(data)}')
    self.dtype = np.dtype(CODES[data[17]])
    self.lengths = np.frombuffer(data, '<i4', sequences, 34)
    self.pointers = np.frombuffer(data, '<i8', sequences, 34 + 4 * sequences)
    self.bounds = np.frombuffer(data, '<i8', bounds, 34 + 12 * sequences)
    rising = len(self.bounds) > 0 and self.bounds[0] == 0 and (np.diff(self.bounds) >= 0).all()
    if not rising or self.bounds[-1] != sequences:
      raise fault(f'its bounds of documents do not rise from 0 to {sequences}')
    size = os.path.getsize(_beside(path, '.bin'))
    ends = self.pointers + self.lengths.astype(np.int64) * self.dtype.itemsize
    if sequences and (self.lengths.min() < 0 or self.pointers.min() < 0 or ends.max() > size
                      or (self.pointers % self.dtype.itemsize).any()):
      raise fault(f'it points beyond the {size} bytes of {os.path.basename(_beside(path, ".bin"))}')


def _beside(path: str, suffix: str) -> str:
  return os.path.splitext(path)[0] + suffix


def _indexed(path: str, offset: int, eos: int | None) -> Documents:
  """Whole documents; a .bin is read with its .idx."""
  del eos
  if path.endswith('.bin'):
    return
  index = _Index(path)
  tokens = _mapped(_beside(path, '.bin'), index.dtype)
  for number in range(offset, len(index.bounds) - 1):
    parts = []
    for sequence in range(index.bounds[number], index.bounds[number + 1]):
      begin = int(index.pointers[sequence]) // index.dtype.itemsize
      parts.append(tokens[begin:begin + int(index.lengths[sequence])])
    ids = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, index.dtype), *parts])
    yield ids, number, number + 1


def megatron(data, paths: str) -> Source:
  """Megatron-LM's indexed datasets, .idx and .bin; the globs may name either."""
  del data
  found = set()
  for path in _uncompressed(matching(paths)):
    for suffix in ('.idx', '.bin'):
      found.add(_beside(path, suffix))
      if not path.endswith(('.idx', '.bin')) or not os.path.exists(_beside(path, suffix)):
        raise JaxlmError(f'{path}: an indexed dataset of Megatron-LM is NAME.idx and NAME.bin; there is no '
                         f'{_beside(path, suffix)}.')
  return Source('megatron', *named(list(found)), _indexed, 'document', True)
