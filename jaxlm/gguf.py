"""GGUF files, as llama.cpp writes them: read where the `gguf` package is installed, quantised tensors expanded."""
import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.families import table
from jaxlm.weights import NAME, Entry, Weights

PLAIN = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16)}
IGNORED = ('general.', 'tokenizer.', 'quantize.', 'GGUF.', 'imatrix.')  # metadata that no number of a model stands in


@dataclasses.dataclass(frozen=True)
class Source:
  """A GGUF file as a folder would be: the config.json it amounts to, its tensors, and the table of their names."""
  hf: dict[str, Any]
  weights: Weights
  templates: tuple[tuple, ...]


def file_of(path: Path) -> Path | None:
  """The GGUF file that a path means: itself, or the only one in a folder."""
  if path.is_file():
    return path if path.suffix == '.gguf' else None
  found = sorted(path.glob('*.gguf'))
  return found[0] if len(found) == 1 else None


def read(path: Path) -> Source:
  """Opens a GGUF file; its tensors are read when they are asked for.

  The tokenizer inside is not read: put the model's tokenizer.json beside the file.

  Raises:
    JaxlmError: the package is missing, the file is damaged, or of an architecture, or with numbers, that no family
      here understands.
  """
  try:
    import gguf
  except ImportError:
    raise JaxlmError(f'{path} is a GGUF file, which the gguf package reads; pip install "jaxlm[gguf]".') from None
  try:
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(IGNORED[1:])}
    weights = Weights({tensor.name: _entry(gguf, path, tensor) for tensor in reader.tensors})
  except Exception as e:  # the package raises whatever its arithmetic runs into
    raise JaxlmError(f'{path} is no whole GGUF file: {" ".join(str(e).split()) or type(e).__name__}.') from None
  for name in weights:
    if not NAME.fullmatch(name):
      raise JaxlmError(f'{path} holds a tensor named {name!r}, which is no name of a parameter.')
  if meta.get('split.count', 1) > 1:
    raise JaxlmError(f'{path} is one of {meta["split.count"]} parts; join them with llama.cpp\'s gguf-split --merge.')
  family = _family(meta.get('general.architecture'))
  start = family.GGUF + '.'
  numbers = {name.removeprefix(start): value for name, value in meta.items() if not name.startswith(IGNORED)}
  short = lambda x: float(str(np.float32(x))) if isinstance(x, float) else x  # 1e-5, not 9.99999974e-06
  numbers = {name: short(value) for name, value in numbers.items()}
  return Source(family.from_gguf(numbers, weights), weights, family.GGUF_TEMPLATES)


def _family(architecture: Any) -> ModuleType:
  known = {family.GGUF: family for family in table.FAMILIES.values() if hasattr(family, 'GGUF')}
  if not isinstance(architecture, str) or architecture not in known:
    raise JaxlmError(f'general.architecture is {architecture!r}; of GGUF files those of {", ".join(sorted(known))} are '
                     'read.')
  return known[architecture]


def _entry(gguf: ModuleType, path: Path, tensor: Any) -> Entry:
  """One tensor, its dims in our order; a quantised one becomes float32."""
  kind, shape = tensor.tensor_type, tuple(int(n) for n in reversed(tensor.shape))
  name, stored, offset, dims = tensor.name, tensor.data.dtype, int(tensor.data_offset), tensor.data.shape

  def array() -> np.ndarray:
    raw = np.memmap(path, stored, 'r', offset, dims)
    if kind.name in PLAIN:
      return raw.reshape(-1).view(PLAIN[kind.name]).reshape(shape)
    try:
      return gguf.quants.dequantize(np.asarray(raw), kind).reshape(shape)
    except NotImplementedError:
      raise JaxlmError(f'Tensor {name} of {path} is {kind.name}, which the gguf package cannot expand; take a file '
                       'quantised in another way.') from None
  return Entry(shape, kind.name if kind.name in PLAIN else 'F32', array)
