"""Pictures for notebooks: what was learned, who attends to whom, where a parameter lives. Need matplotlib."""
from typing import Any, Sequence

import numpy as np

from jaxlm.metrics import read_jsonl
from jaxlm.types import JaxlmError

# One hue from light to dark for quantities; distinct hues in a fixed order for identities.
QUANTITY = 'Blues'
IDENTITY = 'tab10'


def _axes(axes: Any, width: float, height: float) -> Any:
  """The axes given, or new ones of a size in inches."""
  try:
    import matplotlib.pyplot as plt
  except ImportError as e:
    raise JaxlmError('Pictures need matplotlib: pip install "jaxlm[notebooks]".') from e
  return axes if axes is not None else plt.subplots(figsize=(width, height), layout='constrained')[1]


def losses(workdir: str, axes: Any = None) -> Any:
  """Training loss by step, with every held-out loss as a dot.

  Args:
    workdir: a run directory.
    axes: matplotlib's, or None for a new figure.
  Returns:
    The axes.
  """
  axes = _axes(axes, 6, 3.2)
  lines = read_jsonl(f'{workdir}/metrics.jsonl')
  trained = [(line['step'], line['train/loss']) for line in lines if 'train/loss' in line]
  axes.plot(*zip(*trained), linewidth=1.5, label='training')
  for name in sorted({key for line in lines for key in line if key.startswith('eval/') and key.endswith('/loss')}):
    points = [(line['step'], line[name]) for line in lines if name in line]
    axes.plot(*zip(*points), 'o', label=name.split('/')[1])
  axes.set(xlabel='step', ylabel='loss (nats a token)')
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', alpha=0.3)
  axes.legend(frameon=False)
  return axes


def attention(probs_TS: Any, pieces: Sequence[str], axes: Any = None, title: str = '') -> Any:
  """One head's attention: a row a query, a column a key.

  Args:
    probs_TS: probabilities, from `lm.attention`.
    pieces: the text of each token.
    axes: matplotlib's, or None for a new figure.
    title: above the picture.
  Returns:
    The axes.
  """
  size = 1.2 + 0.26 * len(pieces)
  axes = _axes(axes, size + 0.8, size)
  image = axes.imshow(np.asarray(probs_TS), cmap=QUANTITY, vmin=0, vmax=1)
  names = [piece.replace('\n', '⏎').replace(' ', '␣') for piece in pieces]
  axes.set_xticks(range(len(names)), names, rotation=90)
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel='looks at', ylabel='token', title=title)
  axes.figure.colorbar(image, ax=axes, label='probability', shrink=0.8)
  return axes


def layout(sharding: Any, shape: Sequence[int], axes: Any = None, title: str = '') -> Any:
  """Which devices hold which part of a matrix.

  Args:
    sharding: of an array; `array.sharding`.
    shape: the array's; dims beyond the last two are taken at their first index, a vector is a row.
    axes: matplotlib's, or None for a new figure.
    title: above the picture.
  Returns:
    The axes.
  """
  axes = _axes(axes, 4.5, 3.2)
  import matplotlib
  rows, columns = (1, *shape)[-2:] if len(shape) < 2 else shape[-2:]
  parts: dict[tuple[int, int, int, int], list[int]] = {}
  for device, index in sharding.devices_indices_map(tuple(shape)).items():
    if any(part.indices(size)[0] for part, size in zip(index[:-2], shape)):
      continue
    spans = [part.indices(size)[:2] for part, size in zip(index, shape)][-2:]
    (top, bottom), (left, right) = spans if len(spans) == 2 else [(0, 1), *spans]
    parts.setdefault((top, bottom, left, right), []).append(device.id)
  colors = matplotlib.colormaps[IDENTITY]
  for (top, bottom, left, right), devices in parts.items():
    axes.add_patch(matplotlib.patches.Rectangle((left, top), right - left, bottom - top, facecolor=(
        *colors(devices[0] % 10)[:3], 0.55), edgecolor='white', linewidth=2))
    axes.text((left + right) / 2, (top + bottom) / 2, ', '.join(map(str, sorted(devices))), ha='center', va='center')
  axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns], yticks=[0, rows],
           title=title or f'{"×".join(map(str, shape))} on {len(sharding.device_set)} devices')
  return axes
