"""What a run tells: metrics.jsonl, samples.jsonl, TensorBoard, the progress bar, and speed as a share of the peak."""
import contextlib
import json
import math
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from jaxlm import hardware

def peak_flops(devices, dtype: str) -> tuple[float, str]:
  """(FLOP/s of all devices together, where the number is from).

  A known accelerator's is the vendor's; a CPU's is measured here, once, as the best of several matrix products, since
  its simulated devices share the same cores. 0 where nothing is known.
  """
  kind = devices[0].device_kind
  name, row = hardware.of_device(kind) or (kind, None)
  if row is not None and dtype in row.flops:
    return row.flops[dtype] * len(devices), f'{name} data sheet, {dtype}'
  if devices[0].platform != 'cpu':
    return 0.0, f'unknown for {kind}'
  size = 1024
  product = jax.jit(jnp.matmul, device=jax.local_devices()[0])
  x = jnp.ones((size, size), dtype)
  product(x, x).block_until_ready()
  best = math.inf
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size ** 3 / best * jax.process_count(), f'measured: {size}³ product, {dtype}'


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """The lines of a metrics file by step, the last line of a repeated step winning; a torn last line is left out."""
  lines: dict[Any, dict[str, Any]] = {}
  with open(path, encoding='utf-8') as f:
    for text in f:
      if text.endswith('\n'):
        line = json.loads(text)
        key = (line['step'], tuple(sorted({k.split('/')[0] for k in line if '/' in k})))
        lines.pop(key, None)
        lines[key] = line
  return list(lines.values())


def mend(path: str) -> None:
  """Ends a file's torn last line, which a killed run left, by cutting it off."""
  if not os.path.exists(path):
    return
  with open(path, 'rb+') as f:
    data = f.read()
    if data and not data.endswith(b'\n'):
      f.truncate(data.rfind(b'\n') + 1)


class Meter:
  """Time spent training, and speed since the last reading.

  Args:
    flops_per_token: of the model, forward and backward.
    peak: FLOP/s of all devices; 0: not known.
    seconds: trained before.
    tokens: read before.
  """

  def __init__(self, flops_per_token: float, peak: float, seconds: float, tokens: int):
    self._flops, self._peak = flops_per_token, peak
    self.restart(seconds, tokens)

  def restart(self, seconds: float, tokens: int) -> None:
    """Counts on from here."""
    self._began = time.perf_counter() - seconds
    self._reads = [(seconds, tokens)] * 2

  def seconds(self) -> float:
    return time.perf_counter() - self._began

  @contextlib.contextmanager
  def paused(self):
    """What happens inside takes no time."""
    start = time.perf_counter()
    yield
    self._began += time.perf_counter() - start

  def read(self, tokens: int) -> dict[str, float]:
    """train/tokens_per_s and train/mfu since the reading before the last, at so many tokens read in all.

    A step is told of while the next one runs, but before a save at once: over two readings that evens out.
    """
    now, (before, learned) = self.seconds(), self._reads[0]
    self._reads = [self._reads[1], (now, tokens)]
    speed = (tokens - learned) / max(now - before, 1e-9)
    return {'train/tokens_per_s': speed} | ({'train/mfu': speed * self._flops / self._peak} if self._peak else {})


class Writer:
  """Appends to the run directory's files and draws the progress bar; silent on all processes but the first.

  Args:
    workdir: the run directory.
    start: updates already done.
    steps: updates in all.
    tensorboard: also write event files.
  """

  def __init__(self, workdir: str, start: int, steps: int, tensorboard: bool):
    self.active = jax.process_index() == 0
    self.workdir, self.board, self.bar = workdir, None, None
    if not self.active:
      return
    self.files = {}
    for name in ('metrics', 'samples'):
      path = os.path.join(workdir, f'{name}.jsonl')
      mend(path)
      self.files[name] = open(path, 'a', encoding='utf-8')
    if tensorboard:
      import tensorboardX  # its import costs half a second
      self.board = tensorboardX.SummaryWriter(os.path.join(workdir, 'tensorboard'), purge_step=start + 1)
    self.bar = tqdm(initial=start, total=steps, unit='step', disable=not sys.stderr.isatty(), dynamic_ncols=True)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """One line of metrics.jsonl, safe from this process's death once this returns; numbers also to TensorBoard."""
    if not self.active:
      return
    self._line('metrics', {'step': step, **metrics})
    if self.board:
      for name, value in metrics.items():
        if '/' in name and isinstance(value, (int, float)):
          self.board.add_scalar(name, value, step)
    if 'train/loss' in metrics:
      speed = metrics.get('train/tokens_per_s', 0)
      self.bar.set_postfix_str(f'loss {metrics["train/loss"]:.3f}, {speed:,.0f} tokens/s')
    if not sys.stderr.isatty() or any(name.startswith('eval/') for name in metrics):
      self.say(f'step {step}  ' + '  '.join(f'{name} {_short(v)}' for name, v in metrics.items() if '/' in name))

  def read(self) -> dict[str, Any]:
    """The latest number of every metric written so far."""
    last: dict[str, Any] = {}
    for line in read_jsonl(os.path.join(self.workdir, 'metrics.jsonl')):
      last.update((name, value) for name, value in line.items() if '/' in name and isinstance(value, (int, float)))
    return last

  def advance(self, step: int) -> None:
    if self.active:
      self.bar.update(step - self.bar.n)  # back after a rewind

  def sample(self, step: int, prompt: str, text: str) -> None:
    """One line of samples.jsonl."""
    if not self.active:
      return
    self._line('samples', {'step': step, 'prompt': prompt, 'text': text})
    if self.board:
      self.board.add_text('sample', f'    {prompt}{text}'.replace('\n', '\n    '), step)

  def say(self, text: str) -> None:
    """A line on the terminal that does not tear the bar."""
    if self.active:
      tqdm.write(text, file=sys.stderr)

  def _line(self, name: str, content: dict[str, Any]) -> None:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    self.files[name].write(json.dumps(finite) + '\n')  # JSON has no NaN
    self.files[name].flush()

  def close(self) -> None:
    if not self.active:
      return
    self.bar.close()
    for file in self.files.values():
      file.close()
    if self.board:
      self.board.close()


def _short(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
  return str(value)
