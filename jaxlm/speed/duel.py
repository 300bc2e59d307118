"""Two or more sides of a comparison, taking turns; each in a process of its own."""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Iterator, Sequence

import numpy as np

from jaxlm import hardware, programs
from jaxlm.errors import RunFailed
from jaxlm.models import cost
from jaxlm.speed import machine
from jaxlm.speed.shapes import ALL, LONG, assembled

SIDES = ('jaxlm', 'transformers', 'transformers-compiled')
WARM = 20    # steps before time is taken, whose losses are compared
PROMPT = 32  # tokens before those that are generated

Line = dict[str, Any]


class Side:
  """A process that does one job of one shape.

  Args:
    name: one of SIDES.
    job: Trainer or Generator.
    folder: where the first side leaves its weights and the others find them.
  """

  def __init__(self, name: str, job: str, shape: str, folder: str):
    self.name, self._log = name, tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
        [sys.executable, '-m', 'jaxlm.speed.worker', name, job, shape, folder], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._log, text=True, env=_environment(name))
    self._answer()

  def _answer(self) -> Any:
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._log.seek(0)
      raise RunFailed(f'{self.name} ended: {" ".join(self._log.read().split()[-60:])}')
    return json.loads(line)

  def __call__(self, method: str, *arguments: Any) -> dict[str, Any]:
    """{seconds, result, peak_bytes} of one call of a job's method."""
    self._process.stdin.write(json.dumps([method, *arguments]) + '\n')
    self._process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._log.close()


def _environment(side: str) -> dict[str, str]:
  """What a side runs in: jaxlm as its programs start, peers without what those set."""
  if side == SIDES[0]:
    return programs.surroundings(os.environ)
  return {name: value for name, value in os.environ.items() if name != programs.PAGES}


@contextlib.contextmanager
def _sides(names: Sequence[str], job: str, shape: str) -> Iterator[list[Side]]:
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    yield [stack.enter_context(contextlib.closing(Side(name, job, shape, os.path.join(folder, 'model'))))
           for name in names]


def _line(measure: str, names: Sequence[str], work: float, taken: list[list[float]]) -> Line:
  """Speeds of all sides, and for each other side how many times as fast the first is: median, least and most."""
  seconds = np.array(taken)
  ratios = seconds[:, 1:] / seconds[:, :1]
  return dict(measure=measure, sides=list(names), rounds=len(taken), unit='tokens/s',
              speed=[round(work / statistics.median(column), 1) for column in seconds.T.tolist()],
              ratio=[round(float(x), 3) for x in np.median(ratios, 0)],
              least=[round(float(x), 3) for x in ratios.min(0)], most=[round(float(x), 3) for x in ratios.max(0)])


def training(shape: str, names: Sequence[str], rounds: int, steps: int = 3) -> Line:
  """Tokens a second of training steps.

  Beside the ratios: the largest difference of losses in the first twenty steps; the operating system's own figure of
  the most memory a process held; the share of the rate at which plain products of the same shapes run alone, counting
  the model's arithmetic only.
  """
  config = ALL[shape]()
  parts = assembled(config)
  flops = config.batch_size * cost.flops_per_row(parts.model.config, parts.lengths)
  with _sides(names, 'Trainer', shape) as sides:
    losses = [side('run', WARM)['result'] for side in sides]
    taken = [[side('run', steps)['seconds'] for side in sides] for _ in range(rounds)]
    peaks = [side('run', 1)['peak_bytes'] for side in sides]
  limit = machine.product_rate(config)
  line = _line(f'training {shape}', names, steps * config.batch_size * config.seq_len, taken)
  shares = [flops * steps / statistics.median(column) / limit for column in zip(*taken)]
  kind, dtype = machine.described()['device'], config.precision.compute
  if found := hardware.of_device(kind):
    peak = hardware.peak(found[1], found[0], dtype)
    line |= dict(mfu=[round(flops * steps / statistics.median(column) / peak, 3) for column in zip(*taken)])
  differ = [max(abs(a - b) for a, b in zip(losses[0], other)) for other in losses[1:]]
  return line | dict(loss_difference=[float(f'{x:.2g}') for x in differ], peak_bytes=peaks,
                     products_gflops=round(limit / 1e9, 1), share_of_products=[round(x, 3) for x in shares])


def long(rounds: int) -> Iterator[Line]:
  """Seconds of training steps of long rows, their last loss, and the most memory that a process held."""
  for shape in LONG:
    with _sides(SIDES[:1], 'Trainer', shape) as (side,):
      side('run', 1)
      found = [side('run', 1) for _ in range(rounds)]
      held = side('step_bytes')['result']
    yield dict(measure=f'training 2 layers of 512, {shape}', rounds=rounds, loss=round(found[-1]['result'][0], 4),
               seconds=round(statistics.median(x['seconds'] for x in found), 2),
               step_gb=round(held / 1e9, 2), peak_gb=round(found[-1]['peak_bytes'] / 1e9, 2))


def generating(shape: str, names: Sequence[str], rounds: int, rows: int, steps: int = 64) -> Line:
  """Tokens a second of greedy continuations of random prompts.

  Beside the ratios: whether all sides say the same; the share of the rate at which memory is read, were the weights
  alone read for each token.
  """
  config = ALL[shape]()
  prompts = np.random.default_rng(0).integers(8, config.model.vocab_size, (rows, PROMPT)).tolist()
  with _sides(names, 'Generator', shape) as sides:
    said = [side('run', prompts, steps)['result'] for side in sides]
    taken = [[side('run', prompts, steps)['seconds'] for side in sides] for _ in range(rounds)]
    held = [side('weight_bytes')['result'] for side in sides]
  limit = machine.read_rate()
  shares = [size * steps / statistics.median(column) / limit for size, column in zip(held, zip(*taken))]
  return _line(f'generating {shape}, {rows} rows', names, rows * steps, taken) | dict(
      same=[other == said[0] for other in said[1:]], read_gb_per_s=round(limit / 1e9, 1),
      share_of_reading=[round(x, 3) for x in shares])
