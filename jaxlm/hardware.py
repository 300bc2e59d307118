"""What machines can do, by their data sheets: arithmetic, memory, links, power."""
import dataclasses
from typing import Mapping

from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup


@dataclasses.dataclass(frozen=True)
class Hardware:
  """One device of a kind and its links; vendors' numbers, dense and without sparsity.

  Attributes:
    kinds: how `device_kind` begins.
    flops: FLOP/s by compute dtype.
    memory: bytes.
    bandwidth: bytes/s to and from that memory.
    near: devices that fast links join: a node, a slice.
    fast, slow: bytes/s that a device sends within, and between, those.
    watts: at full load; of TPUs, for which nobody prints it, an assumption.
  """
  kinds: tuple[str, ...]
  flops: Mapping[str, float]
  memory: float
  bandwidth: float
  near: int
  fast: float
  slow: float
  watts: float


HARDWARE = {
    'v100': Hardware(('Tesla V100',), {'float16': 125e12, 'float32': 15.7e12}, 32e9, 0.9e12, 8, 150e9, 12.5e9, 300),
    'a100': Hardware(('NVIDIA A100',), {'bfloat16': 312e12, 'float16': 312e12, 'float32': 19.5e12}, 80e9, 2.04e12, 8,
                     300e9, 25e9, 400),
    'h100': Hardware(('NVIDIA H100',), {'bfloat16': 989e12, 'float16': 989e12, 'float32': 67e12}, 80e9, 3.35e12, 8,
                     450e9, 50e9, 700),
    'h100_pcie': Hardware(('NVIDIA H100 PCIe',), {'bfloat16': 756e12, 'float16': 756e12, 'float32': 51e12}, 80e9,
                          2.0e12, 2, 300e9, 50e9, 350),
    'h200': Hardware(('NVIDIA H200',), {'bfloat16': 989e12, 'float16': 989e12, 'float32': 67e12}, 141e9, 4.8e12, 8,
                     450e9, 50e9, 700),
    'tpu_v4': Hardware(('TPU v4',), {'bfloat16': 275e12}, 32e9, 1.2e12, 4096, 150e9, 6.25e9, 250),
    'tpu_v5e': Hardware(('TPU v5 lite', 'TPU v5e'), {'bfloat16': 197e12}, 16e9, 0.82e12, 256, 100e9, 6.25e9, 200),
    'tpu_v5p': Hardware(('TPU v5',), {'bfloat16': 459e12}, 95e9, 2.77e12, 8960, 300e9, 6.25e9, 400),
    'tpu_v6e': Hardware(('TPU v6 lite', 'TPU v6e'), {'bfloat16': 918e12}, 32e9, 1.64e12, 256, 224e9, 12.5e9, 350),
}


def named(name: str) -> Hardware:
  """A row of the table; or "module:attribute".

  Raises:
    JaxlmError: there is none.
  """
  return lookup(HARDWARE, name, 'hardware')


def of_device(kind: str) -> tuple[str, Hardware] | None:
  """(name, row) of what calls itself so, or None."""
  known = [(len(start), name, row) for name, row in HARDWARE.items() for start in row.kinds if kind.startswith(start)]
  return max(known)[1:] if known else None


def peak(row: Hardware, name: str, dtype: str) -> float:
  """FLOP/s in a compute dtype; V100s, which know no bfloat16, are taken to compute in float16 instead.

  Raises:
    JaxlmError: it computes in neither.
  """
  found = row.flops.get(dtype) or (row.flops.get('float16') if dtype == 'bfloat16' else None)
  if found is None:
    raise JaxlmError(f'{name} has no arithmetic in {dtype} to plan with; it has {", ".join(row.flops)}. Set '
                     'config.precision.compute.')
  return found
