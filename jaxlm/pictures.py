"""Pictures for notebooks: what was learned, who attends to whom, where a model lives. Need matplotlib."""
from typing import Any, Sequence

import numpy as np

from jaxlm import bill, trees
from jaxlm.errors import JaxlmError
from jaxlm.metrics import read_jsonl
from jaxlm.models import kernels

# One hue from light to dark for quantities; distinct hues in a fixed order for identities.
QUANTITY = 'Blues'
IDENTITY = 'tab10'
SHOWN = 8  # devices named in a part of a picture


def _pyplot() -> Any:
  try:
    import matplotlib.pyplot as plt
  except ImportError as e:
    raise JaxlmError('Pictures need matplotlib: pip install "jaxlm[notebooks]".') from e
  return plt


def _axes(axes: Any, width: float, height: float) -> Any:
  """The axes given, or new ones of a size in inches."""
  return axes if axes is not None else _pyplot().subplots(figsize=(width, height), layout='constrained')[1]


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


def ratios(bars: Sequence[tuple[str, float, tuple[float, float]]], axes: Any = None) -> Any:
  """How many times as fast one side of each comparison is: a bar each, with its spread, and a line at equal speed.

  Args:
    bars: (name, median, (least, most)).
    axes: matplotlib's, or None for a new figure.
  Returns:
    The axes.
  """
  axes = _axes(axes, 7, 0.6 + 0.5 * len(bars))
  names, medians, spreads = zip(*bars)
  errors = np.abs(np.array(spreads).T - np.array(medians))
  axes.barh(range(len(bars)), medians, xerr=errors, height=0.6, ecolor='0.3', capsize=2)
  axes.axvline(1.0, color='0.3', linewidth=1)
  axes.set_yticks(range(len(bars)), names)
  axes.invert_yaxis()
  axes.set(xlabel='times as fast')
  axes.spines[['top', 'right']].set_visible(False)
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


def visibility(batch: dict[str, Any], mode: str, decode: Any, axes: Any = None, title: str = '') -> Any:
  """Who may see whom in the first row of a batch: a row of the picture looks, a column is seen.

  Of two streams, the rows are the queries; of an encoder-decoder, the source stands left of what the decoder reads.

  Args:
    batch: as an objective makes it, `types.BATCH`.
    mode: the objective's visibility.
    decode: ids -> text, of the tokenizer.
    axes: matplotlib's, or None for a new figure.
    title: above the picture.
  Returns:
    The axes.
  """
  row = {key: np.asarray(value)[:1] for key, value in batch.items()}
  tokens, segments = row['tokens'], row['segment_ids']
  order = row.get('order', np.arange(1, tokens.shape[1] + 1)[None])
  asks, asks_segments, names = order, segments, tokens
  if 'query_order' in row:
    asks, asks_segments = np.maximum(row['query_order'], 1) - 1, row['query_segment_ids']
    names = row['targets']
  seen = kernels.visible(kernels.Visibility(asks, order, asks_segments, segments, asks, order, mode=mode))[0]
  keys = tokens
  if 'source_tokens' in row:
    source = row['source_segment_ids']
    same = (asks_segments[0][:, None] == source[0]) & (source[0] > 0)
    seen, keys = np.concatenate([same, seen], axis=1), np.concatenate([row['source_tokens'], tokens], axis=1)
  told = lambda ids: [decode([int(i)]).replace('\n', '⏎').replace(' ', '␣') for i in ids[0]]
  axes = _axes(axes, 1.2 + 0.2 * keys.shape[1], 1.2 + 0.2 * names.shape[1])
  axes.imshow(np.asarray(seen), cmap=QUANTITY, vmin=0, vmax=1.4, aspect='equal')
  axes.set_xticks(range(keys.shape[1]), told(keys), fontsize=7)
  axes.set_yticks(range(names.shape[1]), told(names), fontsize=7)
  axes.set(xlabel='is seen', ylabel='is predicted' if 'query_order' in row else 'looks', title=title)
  return axes


def by_context(workdirs: dict[str, str], axes: Any = None) -> Any:
  """Held-out loss by how many tokens stand before the target, of several runs with config.eval.by_context.

  Args:
    workdirs: {what to call it: a run directory}.
    axes: matplotlib's, or None for a new figure.
  Returns:
    The axes.
  """
  axes, start = _axes(axes, 6, 3.6), 'eval/heldout/loss_after_'
  for name, workdir in workdirs.items():
    last = [line for line in read_jsonl(f'{workdir}/metrics.jsonl') if any(key.startswith(start) for key in line)][-1]
    points = sorted((int(key[len(start):]), value) for key, value in last.items() if key.startswith(start))
    axes.plot(*zip(*points), 'o-', linewidth=1.5, label=name)
  axes.set_xscale('log', base=2)
  axes.set(xlabel='tokens before the target', ylabel='held-out loss (nats a token)')
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', alpha=0.3)
  axes.legend(frameon=False)
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
    told = [*map(str, sorted(devices)[:SHOWN]), *(['…'] if len(devices) > SHOWN else [])]
    axes.text((left + right) / 2, (top + bottom) / 2, ', '.join(told), ha='center', va='center', fontsize=8)
  axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns], yticks=[0, rows],
           title=title or f'{"×".join(map(str, shape))} on {len(sharding.device_set)} devices')
  return axes


def explain(config: Any, devices: int = 0, hardware: str = 'h100') -> Any:
  """How a config lies on its devices: parts of the largest weights, bytes of each device, and what a step sends.

  The step is compiled for devices that are simulated, as `python -m jaxlm.plan` does.

  Args:
    config: validated.
    devices: how many; 0: as many as config.mesh multiplies out to.
    hardware: a row of hardware.HARDWARE, for what is near and far.
  Returns:
    matplotlib's figure.
  """
  plt, sizes = _pyplot(), bill.mesh_of(config, devices)
  step = bill.compiled(config, sizes)
  found = bill.read(step, config, hardware, sizes)
  weights = {}  # the largest of each shape
  for path, x in sorted(trees.flatten(step.parts.shapes.state.params).items(), key=lambda item: -item[1].size):
    weights.setdefault((x.shape, x.sharding.spec), (path, x))
  figure = plt.figure(figsize=(12, 6.5), layout='constrained')
  grid = figure.add_gridspec(2, 4)
  for i, (path, x) in enumerate([*weights.values()][:4]):
    title = path.removeprefix('stack/period/').replace('/kernel', '')
    layout(x.sharding, x.shape, figure.add_subplot(grid[0, i]), f'{title}\n{"×".join(map(str, x.shape))}')
  memory, left, right = found['memory'], figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:])
  classes = {name: memory[name] for name in ('parameters', 'optimizer', 'average')} | memory['temporaries_by_class']
  sent = {}
  for link in found['messages']:
    name = f'{link["kind"]} over {" × ".join(link["axes"])}'
    sent[name] = sent.get(name, 0.0) + link['sent']
  for axes, bars, title in ((left, classes, 'a device holds'), (right, sent, 'a device sends in a step')):
    bars = dict(sorted(((name, n) for name, n in bars.items() if n), key=lambda bar: bar[1])[-8:])
    drawn = axes.barh(list(bars), list(bars.values()), color=plt.colormaps[QUANTITY](0.6), height=0.6)
    axes.bar_label(drawn, [bill.amount(n, 'B') for n in bars.values()], padding=4)
    axes.set(title=title, xticks=[])
    axes.spines[['top', 'right', 'bottom']].set_visible(False)
    axes.margins(x=0.2)
  mesh = ' × '.join(f'{axis}={n}' for axis, n in found['mesh'].items()) or 'one device'
  faults = f'{len(found["lint"])} things do not go by the layout; see python -m jaxlm.plan'
  figure.suptitle(f'{mesh}: {faults if found["lint"] else "all goes by the layout"}')
  return figure
