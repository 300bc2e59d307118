"""Files of named tensors, safetensors as Hugging Face lays them out: read and written one tensor at a time.

Nothing is unpickled, and no name in a file becomes a path. What a file says about itself is checked before it is used;
links are followed wherever they lead, for that is how Hugging Face's cache keeps its folders.
"""
import dataclasses
import json
import math
import re
import struct
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import safetensors

from jaxlm.errors import JaxlmError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16)}
PICKLED = ('*.bin', '*.pt', '*.pth', '*.h5', '*.msgpack', '*.ckpt', '*.pkl')

# Dots and word characters: what every library writes, and nothing that a file system would read as a place. A lone
# star is what transformers 5 calls the buffers that all layers of ESM share.
NAME = re.compile(r'[\w\-]+(\.([\w\-]+|\*))*')

COMPARED = 1 << 24  # elements that are compared at once


def listed(names: Iterable[str], most: int = 3) -> str:
  """'a, b, c and 4 more'."""
  names = sorted(names)
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def read_json(file: Path) -> dict[str, Any]:
  """The object that a JSON file holds."""
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise JaxlmError(f'{file} is missing; a Hugging Face folder has one.') from None
  except (ValueError, RecursionError) as e:
    raise JaxlmError(f'{file} is not valid JSON: {e}.') from None
  if not isinstance(value, dict):
    raise JaxlmError(f'{file} must hold a JSON object; got {type(value).__name__}.')
  return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
  """Replaces a file at once."""
  temporary = file.with_name(file.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
  temporary.replace(file)


# ---- reading -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file.

  Attributes:
    shape: as the file has it.
    dtype: as safetensors names it: F32, BF16; those in DTYPES can be read.
    read: gives the array, which may be a view of the file: whoever keeps it copies it.
  """
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
  """Tensors by name; each is read from its file when it is asked for.

  Attributes:
    entries: of each name, what is known without reading it.
  """

  def __init__(self, entries: Mapping[str, Entry]):
    self.entries = dict(entries)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in self.entries.items()}

  @property
  def dtypes(self) -> dict[str, str]:
    return {name: entry.dtype for name, entry in self.entries.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    return self.entries[name].read()

  def __iter__(self) -> Iterator[str]:
    return iter(self.entries)

  def __len__(self) -> int:
    return len(self.entries)


def open_files(files: Mapping[str, Path]) -> Weights:
  """The tensors of some safetensors files.

  Args:
    files: path of each, by the name it has in messages.
  Raises:
    JaxlmError: one is not there or not whole, or its header lies, or a name is no name or stands twice.
  """
  entries: dict[str, Entry] = {}
  for title, path in files.items():
    for name, entry in _header(path).items():
      if not NAME.fullmatch(name):
        raise JaxlmError(f'{path} holds a tensor named {name!r}, which is no name of a parameter.')
      if name in entries:
        raise JaxlmError(f'Tensor {name} stands in two files of the folder, {title} among them.')
      entries[name] = entry
  return Weights(entries)


def _header(path: Path) -> dict[str, Entry]:
  """The tensors that one file says it has. The library sees to it that header, sizes and offsets agree."""
  try:
    with safetensors.safe_open(path, framework='np') as file:
      names = set(file.keys())
    with open(path, 'rb') as file:
      length, = struct.unpack('<Q', file.read(8))
      header = json.loads(file.read(length))
  except FileNotFoundError:
    raise JaxlmError(f'{path} is missing; {INDEX} lists it.') from None
  except (OSError, ValueError, struct.error, safetensors.SafetensorError) as e:
    raise JaxlmError(f'{path} is no whole safetensors file: {" ".join(str(e).split())}.') from None
  header.pop('__metadata__', None)
  if set(header) != names:
    raise JaxlmError(f'{path} is no whole safetensors file: its header can be read in two ways.')

  def entry(about: Mapping[str, Any]) -> Entry:
    shape, dtype, start = tuple(about['shape']), about['dtype'], 8 + length + about['data_offsets'][0]
    def read() -> np.ndarray:
      if not math.prod(shape):
        return np.empty(shape, DTYPES[dtype])
      # Mapped, so that only what is looked at comes into memory, and goes when this array does.
      return np.memmap(path, DTYPES[dtype], 'r', start, (math.prod(shape),)).reshape(shape)
    return Entry(shape, dtype, read)
  return {name: entry(about) for name, about in header.items()}


def read_weights(folder: Path) -> Weights:
  """Opens model.safetensors, or the shards that model.safetensors.index.json lists.

  Raises:
    JaxlmError: neither is there, a file is damaged or missing, or an index that names a file elsewhere, or tensors
      other than those its files hold.
  """
  folder = Path(folder)
  if (folder / SINGLE).exists():
    return open_files({SINGLE: folder / SINGLE})
  if not (folder / INDEX).exists():
    pickled = [p.name for pattern in PICKLED for p in folder.glob(pattern)]
    remedy = f' {listed(pickled)} can run code and is not read; save it as safetensors.' if pickled else ''
    raise JaxlmError(f'{folder} has no {SINGLE} and no {INDEX}.' + remedy)
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
    raise JaxlmError(f'{folder / INDEX} must hold weight_map, an object of tensor names and file names.')
  files = sorted(set(weight_map.values()))
  for name in files:
    if not re.fullmatch(r'[\w\-][\w\-.]*\.safetensors', name):
      raise JaxlmError(f'{folder / INDEX} names the file {name!r}; only *.safetensors beside it are read.')
  weights = open_files({name: folder / name for name in files})
  if set(weights) != set(weight_map):
    raise JaxlmError(f'{folder / INDEX} and its files disagree about {listed(set(weights) ^ set(weight_map))}.')
  return weights


def same(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays have the same bits, a piece at a time."""
  if (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  bits = lambda x: x.reshape(-1).view(f'u{x.dtype.itemsize}')
  a, b = bits(a), bits(b)
  return all(np.array_equal(a[i:i + COMPARED], b[i:i + COMPARED]) for i in range(0, a.size, COMPARED))


# ---- writing -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to be written: what the header says, and how to get it when its turn comes."""
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def cast(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """The array in another dtype.

  Raises:
    JaxlmError: a number too large for it.
  """
  if x.dtype == dtype:
    return x
  with np.errstate(over='ignore'):
    out = x.astype(dtype)
  if dtype == np.float16 and np.isinf(out).sum() != np.isinf(x).sum():
    raise JaxlmError(f'Tensor {name} holds numbers beyond those of float16 (65,504); write it as bfloat16 or float32.')
  return out


def write_weights(folder: Path, tensors: Sequence[Tensor], shard_bytes: int) -> None:
  """Writes model.safetensors, or shards and their index; each file appears when it is complete.

  Args:
    folder: exists.
    tensors: in the order in which they are made; one is in memory at a time.
    shard_bytes: a file holds at most this, or one tensor.
  """
  shards, size = [[]], 0
  for tensor in tensors:
    if shards[-1] and size + tensor.num_bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.num_bytes
  weight_map: dict[str, str] = {}
  for i, shard in enumerate(shards):
    name = SINGLE if len(shards) == 1 else f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    _write(folder / name, shard)
    weight_map.update({tensor.name: name for tensor in shard})
  if len(shards) > 1:
    total = sum(tensor.num_bytes for tensor in tensors)
    write_json(folder / INDEX, dict(metadata=dict(total_size=total), weight_map=weight_map))


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
  names = {dtype: name for name, dtype in DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # stable; so every tensor is aligned
  start = 0
  for tensor in tensors:
    end = start + tensor.num_bytes
    header[tensor.name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end])
    start = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors:
      array = np.asarray(tensor.make(), order='C')
      if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f'{tensor.name} is {array.dtype} {array.shape}; its header says {tensor.dtype} '
                         f'{tensor.shape}.')
      file.write(array.reshape(-1).view(np.uint8).data)
      del array
  temporary.replace(path)
