"""Meshes, remat and microbatches for a job: what fits, the fastest first."""
import itertools
import math
from typing import Any, Iterator

from jaxlm import bill, check, hardware
from jaxlm import config as config_module
from jaxlm.errors import JaxlmError
from jaxlm.models.config import freeze


def candidates(config: Any, devices: int, near: int) -> Iterator[dict[str, Any]]:
  """Layouts worth compiling: tensor within fast links, stages that hold layers, rows for every device."""
  model = config.model
  rows = config.batch_size // config.accumulation
  divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
  kv = math.gcd(model.attention.num_heads, model.attention.num_kv_heads)
  for tensor in (d for d in divisors(devices) if d <= min(near, 64) and kv % d == 0):
    for pipe in (d for d in divisors(devices // tensor) if d <= min(model.num_layers, 64)):
      left = devices // tensor // pipe
      for fsdp in (d for d in divisors(left) if d in (1, left) or d == min(left, near)):
        data = left // fsdp
        parts = data * fsdp
        if rows % parts:
          continue
        most = rows // parts
        for microbatches in ([0] if pipe == 1 else sorted({m for m in (pipe, 4 * pipe, most) if m and most % m == 0})):
          for remat in ('dots', 'full'):
            yield {'mesh.tensor': tensor, 'mesh.pipe': pipe, 'mesh.fsdp': fsdp, 'mesh.data': data, 'mesh.replica': 1,
                   'mesh.seq': 1, 'mesh.expert': 1, 'pipeline.microbatches': microbatches, 'model.remat': remat}


def guess(config: Any, layout: dict[str, Any], row: hardware.Hardware) -> float:
  """A rough order of seconds, without compiling: what bubbles, recomputing and messages add; no place, no chance."""
  model = freeze(config_module.resolved(config)['model'], vocab_size=config.model.vocab_size or 1 << 15,
                 visibility='causal')
  params = 12 * model.num_layers * model.width ** 2
  tensor, pipe, fsdp, data = (layout[f'mesh.{axis}'] for axis in ('tensor', 'pipe', 'fsdp', 'data'))
  state = params * 16 / (tensor * pipe * fsdp)
  rows = config.batch_size / config.accumulation / (data * fsdp)
  kept = 2 if layout['model.remat'] == 'full' else 20
  activations = rows * config.seq_len * model.width * kept * model.num_layers / (pipe * tensor)
  if state + activations > row.memory:
    return math.inf
  devices = tensor * pipe * fsdp * data
  M = layout['pipeline.microbatches'] or pipe
  work = 6 * params * config.batch_size * config.seq_len / devices / (0.5 * max(row.flops.values()))
  work *= (4 / 3 if layout['model.remat'] == 'full' else 1) * (M + pipe - 1) / M
  waited = 4 * model.num_layers / pipe * rows * config.seq_len * model.width * 2 * 2 * (tensor - 1) / tensor / row.fast
  gathered = 3 * params * 4 / (tensor * pipe) * (fsdp > 1) / (row.fast if fsdp * tensor <= row.near else row.slow)
  return max(work, gathered * (M + pipe - 1 if pipe > 1 else 1)) + waited


def ranked(config: Any, hardware_name: str, devices: int, assumptions: bill.Assumptions,
           tries: int) -> list[dict[str, Any]]:
  """Bills of the layouts that are likeliest to be fast; those that fit first, by time.

  Raises:
    JaxlmError: no layout can be compiled.
  """
  row = hardware.named(hardware_name)
  count = devices or math.prod(bill.mesh_of(config).values())
  likely = sorted(candidates(config, count, row.near), key=lambda layout: guess(config, layout, row))
  found, refused = [], ''
  for layout in itertools.islice(likely, tries):
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      changed.update_from_flattened_dict(layout)
    try:
      check.validate(changed)
      found.append(bill.make(changed, hardware_name, count, assumptions) | {'layout': layout})
    except JaxlmError as e:
      refused = str(e)
  if not found:
    raise JaxlmError(refused or f'No mesh of {count} devices divides this model and its batch; change --devices or '
                     'config.batch_size.')
  return sorted(found, key=lambda one: (not one['fits'], one['step_s']))


def table(found: list[dict[str, Any]]) -> str:
  """A line a layout."""
  rows = [('', 'mesh', 'remat', 'microbatches', 'bytes a device', 'step', 'MFU', 'fits')]
  for i, one in enumerate(found):
    mesh = ' × '.join(f'{axis}={n}' for axis, n in one['mesh'].items()) or 'one device'
    rows.append((str(i + 1), mesh, one['layout']['model.remat'], str(one['pipeline']['microbatches']),
                 f'{one["bytes_per_device"] / 1e9:.1f} GB', f'{one["step_s"]:.3g} s', f'{one["time"]["mfu"]:.1%}',
                 'yes' if one['fits'] else 'no'))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
