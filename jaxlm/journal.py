"""What a run tells of itself, and where it is."""
import dataclasses
import math
from typing import Any, Callable

import jax

from jaxlm import trees
from jaxlm.errors import RunFailed
from jaxlm.evaluators import Evaluators
from jaxlm.metrics import Meter, Writer, peak_flops
from jaxlm.types import Array, Tree, TrainState


def due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


@dataclasses.dataclass
class Position:
  """Where a run is, counted on the host: the `data` of a checkpoint.

  Attributes:
    examples: consumed; skipped ones do not count.
    tokens: targets learned from.
    seconds: spent training, evaluation and sampling aside.
    rewinds: how often the run went back.
    skips: ranges of the stream that are passed over, [first, end) each.
    best: the best value of config.checkpoint.best_metric; None: none yet.
    waited: evaluations since then.
  """
  examples: int = 0
  tokens: int = 0
  seconds: float = 0.0
  rewinds: int = 0
  skips: list[list[int]] = dataclasses.field(default_factory=list)
  best: float | None = None
  waited: int = 0


@dataclasses.dataclass
class Told:
  """A step: its number, its examples [first, end), and its metrics; as text, what was wrong with it."""
  step: int
  examples: tuple[int, int]
  metrics: dict[str, Any]

  def __str__(self) -> str:
    loss, norm = (self.metrics[f'train/{name}'] for name in ('loss', 'grad_norm'))
    return (f'Step {self.step} is not finite: loss {loss}, gradient norm {norm}, on examples {self.examples[0]} to '
            f'{self.examples[1] - 1}')


class Journal:
  """Metrics, samples, progress; a step late: a step's metrics are read while the next one runs.

  Attributes:
    last: the latest number of every metric.
  """

  def __init__(self, workdir: str, config: Any, evaluators: Evaluators, flops_per_token: float, step: int,
               position: Position):
    self.config, self.evaluators = config, evaluators
    self.writer = Writer(workdir, step, config.steps, config.tensorboard)
    self.last: dict[str, Any] = self.writer.read() if step == config.steps else {}
    self._step, self._now = 0, {}
    self._pending: Told | None = None
    peak, source = peak_flops(jax.devices(), config.precision.compute)
    self._read = 0  # tokens, padding apart, since the run was begun or went on
    self.meter = Meter(flops_per_token, peak, position.seconds, self._read)
    done = f'after {step} of {config.steps} steps' if step else f'{config.steps} steps to do'
    if config.checkpoint.init_from and (not step or config.model.peft.method != 'none'):
      at = f' at step {config.checkpoint.init_step}' if config.checkpoint.init_step else ''
      done += f', from the weights of {config.checkpoint.init_from}{at}'
    self.writer.say(f'{workdir}: {done}; peak {peak / 1e12:.3g} TFLOP/s ({source}).')

  def note(self, step: int, examples: tuple[int, int], metrics: dict[str, Array]) -> None:
    """Keeps what a step just started will have measured."""
    self._pending = Told(step, examples, metrics)

  def of(self, step: int) -> dict[str, Any]:
    """The numbers measured at this very step."""
    return self._now if self._step == step else {}

  def tell(self, position: Position) -> Told | None:
    """Writes what is kept and counts it into `position`; returns it if it was not finite and the run must act on it."""
    told, self._pending = self._pending, None
    if told is None:
      return None
    told.metrics = {name: float(value) for name, value in jax.device_get(told.metrics).items()}
    position.seconds = self.meter.seconds()
    bad, targets = not told.metrics.pop('finite'), told.metrics.pop('targets')
    self._read += round(told.metrics.pop('read'))
    if not bad:
      position.tokens += round(targets)
    else:
      action = {'nonfinite/action': self.config.on_nonfinite, 'nonfinite/first_example': told.examples[0],
                'nonfinite/end_example': told.examples[1]}
      self._write(told.step, told.examples[1], position, action)
      self.writer.say(f'{told}; {self.config.on_nonfinite}.')
    if bad or due(told.step, self.config.log_every) or told.step in (1, self.config.steps):
      self._write(told.step, told.examples[1], position, {**told.metrics, **self.meter.read(self._read)})
    self.writer.advance(told.step)
    return told if bad and self.config.on_nonfinite != 'skip' else None

  def measure(self, step: int, position: Position, state: TrainState, frozen: Tree,
              going_on: Callable[[], None]) -> None:
    """Evaluates and samples, calling `going_on` all the while; not part of the training time."""
    with self.meter.paused():
      params = state.params if state.ema is None else state.ema
      params = trees.combine(frozen, params) if frozen else params
      self._write(step, position.examples, position, self.evaluators.measure(params, going_on))
      for prompt, text in self.evaluators.samples(params, step):
        self.writer.sample(step, prompt, text)
      going_on()

  def tired(self, step: int, position: Position) -> bool:
    """Whether config.checkpoint.patience evaluations have brought nothing better, this step's counted in."""
    settings = self.config.checkpoint
    measured = [name for name in self.of(step) if name.startswith('eval/')]
    if not settings.patience or not measured:
      return False
    if settings.best_metric not in measured:
      raise RunFailed(f'config.checkpoint.best_metric={settings.best_metric!r} is not measured; set it to one of '
                      f'{", ".join(measured)}.')
    value, sign = self.of(step)[settings.best_metric], 1 if settings.best_is_highest else -1
    better = math.isfinite(value) and (position.best is None or sign * value > sign * position.best)
    position.best, position.waited = (value, 0) if better else (position.best, position.waited + 1)
    return self.is_tired(position)

  def is_tired(self, position: Position) -> bool:
    """Whether the run has waited long enough; one that has, and is started again, ends at once."""
    settings = self.config.checkpoint
    if not 0 < settings.patience <= position.waited:
      return False
    self.writer.say(f'{settings.best_metric} has not been better than {position.best} for {position.waited} '
                    'evaluations; the run ends here. Raise config.checkpoint.patience to go on.')
    return True

  def back(self, step: int, position: Position) -> None:
    """After a rewind."""
    self._pending = None
    self.meter.restart(position.seconds, self._read)
    self.writer.say(f'rewound to step {step}; the stream goes on after example {position.skips[-1][1] - 1}.')
    self._write(step, position.examples, position, {'skips': position.skips[-1:]})
    self.writer.advance(step)

  def _write(self, step: int, examples: int, position: Position, metrics: dict[str, Any]) -> None:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    self._step, self._now = step, (self._now if self._step == step else {}) | numbers
    self.last.update(numbers)
    place = dict(examples=examples, tokens=position.tokens, time_s=round(position.seconds, 3))
    self.writer.write(step, place | metrics)

  def close(self) -> None:
    self.writer.close()
