"""Training: a step, and the loop around it."""
import dataclasses
import functools
import os
import signal
import threading
from typing import Any, Callable, Sequence

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import adopt, check, fits, losses, objectives, optim, rundir, sharding, task_losses, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.cluster import Watch
from jaxlm.data import examples, pipeline, plans, store
from jaxlm.distil import Teacher
from jaxlm.errors import JaxlmError, Preempted, RunFailed
from jaxlm.evaluators import Evaluators
from jaxlm.journal import Journal, Position, Told, due
from jaxlm.models import cost, ring, stages
from jaxlm.models.transformer import Transformer
from jaxlm.rollouts import Graded, Rollouts
from jaxlm.sharding import Layout
from jaxlm.state import LEAST_SCALE, Shapes, build_model, init_state, rescaled
from jaxlm.types import Array, TrainState, Tree

# ---- the step ----------------------------------------------------------------------------------------------------

READ = ('segment_ids', 'source_segment_ids')  # where not 0, a token is read
LossFn = Callable[[Tree, dict[str, Array], Array | None], tuple[Array, losses.Sums]]


def make_step(loss_fn: LossFn, shapes: Shapes, config: Any):
  """Returns `step(state, frozen, batch) -> (state, metrics)`, compiled, its state donated.

  An update is left out where it, the loss or the gradient is not finite; `metrics['finite']` says so, and the step
  still counts. In float16 a gradient that is too large for it is no fault, as long as the loss can be scaled down.

  Args:
    loss_fn: (all parameters, batch, rng) -> (sum of losses, sums and counts); the sum is divided by the count of
      'objective' over the whole batch.
    shapes: from `init_state`.
    config: accumulation, optim.
  """
  rate, shardings = optim.schedule(config.optim), jax.tree.map(lambda x: x.sharding, shapes.state)

  def gradients(params, frozen, batch, rng, scale):
    def loss(params, batch):
      total, sums = loss_fn(trees.combine(frozen, params) if frozen else params, batch, rng)
      return total if scale is None else total * scale, sums
    (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
    return jax.lax.with_sharding_constraint(grads, shapes.gradients), sums

  def accumulated(params, frozen, batch, rng, scale):
    if config.accumulation == 1:
      return gradients(params, frozen, batch, rng, scale)
    one = lambda _, micro: (None, gradients(params, frozen, micro, rng, scale))
    add = lambda total, micro: (jax.tree.map(jnp.add, total, one(None, micro)[1]), None)
    micros = sharding.microbatches(batch, config.accumulation)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32),
                         jax.eval_shape(lambda m: one(None, m)[1], jax.tree.map(lambda x: x[0], micros)))
    return jax.lax.scan(add, zeros, micros)[0]

  def updated(state: TrainState, grads: Tree, share: Array, norm: Array) -> TrainState:
    # Scaled in here, where it is part of the optimizer's own passes over the gradients.
    grads = jax.tree.map(lambda g, p: (g * share).astype(p.dtype), grads, state.params)
    updates, opt_state = shapes.tx.update(grads, state.opt_state, state.params, norm=norm)
    new = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    if state.ema is not None:
      average = lambda mean, p: mean + (1 - config.optim.ema_decay) * (p.astype(jnp.float32) - mean)
      new = new.replace(ema=jax.tree.map(average, state.ema, new.params))
    return new

  # Between updates what the optimizer keeps may lie in the host's memory.
  near = jax.tree.map(lambda s: s.with_memory_kind('device'), shardings.opt_state)
  fetched = lambda tree, where: jax.device_put(tree, where) if near != shardings.opt_state else tree

  def step(state: TrainState, frozen: Tree, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    state = state.replace(opt_state=fetched(state.opt_state, near))
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    scale = None if state.loss_scale is None else state.loss_scale.value
    grads, sums = accumulated(state.params, frozen, batch, rng, scale)
    some = lambda count: jnp.where(count > 0, count, 1)
    share = 1 / some(sums['objective'][1]) / (1 if scale is None else scale)
    norm = optim.global_norm(grads) * share
    # Known before the update begins: where squares of the gradient can be summed, what an optimizer makes of them is
    # finite. A choice between old and new arrays after it would keep copies of the optimizer's.
    finite = jnp.isfinite(norm) & jnp.isfinite(sums['objective'][0])
    new = jax.lax.cond(finite, updated, lambda state, *_: state, state, grads, share, norm)
    if scale is not None:
      new = new.replace(loss_scale=rescaled(state.loss_scale, finite))
      finite |= jnp.isfinite(sums['objective'][0]) & (scale > LEAST_SCALE)
    metrics = {f'train/{name}': total / some(n) for name, (total, n) in sums.items()}
    read = sum((batch[key] > 0).sum() for key in READ if key in batch)
    metrics |= {'train/grad_norm': norm, 'train/lr': rate(state.step), 'finite': finite, 'targets': sums['loss'][1],
                'read': read}
    if scale is not None:
      metrics['train/loss_scale'] = scale
    return new.replace(step=state.step + 1, opt_state=fetched(new.opt_state, shardings.opt_state)), metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None),
                 compiler_options=sharding.compiler_options(shapes.layout.platform, config.compiler_options))


# ---- the loop ----------------------------------------------------------------------------------------------------


class Signals:
  """SIGTERM and Ctrl-C ask for a stop after this step; a second Ctrl-C, or one before the loop, stops at once.

  Attributes:
    received: the name of the signal that came, or None.
    looping: whether there are steps to wait for.
  """

  def __init__(self):
    self.received: str | None = None
    self.looping = False

  def __enter__(self):
    self.before = {}
    if threading.current_thread() is threading.main_thread():
      self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, number, frame):
    del frame
    if number == signal.SIGINT and self.received:
      raise KeyboardInterrupt
    self.received = signal.Signals(number).name
    if not self.looping:
      raise Preempted(f'{self.received} before the first step; what was prepared stays. Run the same command to go on.')

  def stop(self, together: bool) -> bool:
    """Whether to stop; all processes of a run give the same answer, for which they must ask `together`."""
    if jax.process_count() == 1:
      return self.received is not None
    return together and bool(multihost_utils.process_allgather(np.asarray(self.received is not None)).any())

  def __exit__(self, *_):
    for number, handler in self.before.items():
      signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a step is made of, for a config and a layout; nothing of it holds data.

  Attributes:
    batch: {key: (shape of an example, dtype)}.
    lengths: columns of a batch's arrays by key.
    loss_fn: as `make_step` takes it.
  """
  objective: Any
  model: Transformer
  shapes: Shapes
  loss_fn: LossFn
  step_fn: Any
  batch: dict[str, Any]
  lengths: dict[str, int]


def _check_lengths(config: Any, model: Transformer, lengths: dict[str, int]) -> None:
  """Raises JaxlmError where columns do not divide by the devices they are split over, or are more than the learned
  positions there are: a lookup would give NaN."""
  parts = model.layout.parts('act_length')
  for key, columns in lengths.items():
    if columns % parts:
      raise JaxlmError(f'{key}: at config.seq_len={config.seq_len} objective {config.objective.name!r} makes {columns} '
                       f'of them a row, which do not divide by the {parts} devices that lengths are split over; choose '
                       'another seq_len, or rate of the objective.')
  there, longest = model.config.max_length, max(lengths.get(key, 0) for key in ('tokens', 'source_tokens'))
  if model.config.positions.kind == 'learned' and longest > there:
    raise JaxlmError(f'config.model.max_length={there} is less than the {longest} columns that rows of '
                     'this objective have; raise it, or lower config.seq_len.')


def _arrangement(config: Any, visibility: str, lengths: dict[str, int], layout: Layout):
  """How the columns of a batch are laid out: so that devices of a ring have as much to do where columns see those
  before them, and come in such numbers; else as they are."""
  parts = layout.parts('act_length')
  if (config.model.attention.kernel == 'ring' and visibility == 'causal' and parts > 1
      and lengths['tokens'] % (2 * parts) == 0):
    return functools.partial(ring.balanced, parts=parts)
  return lambda batch: batch


def assemble(config: Any, layout: Layout, vocab: Any) -> Parts:
  """The parts of a step.

  Raises:
    JaxlmError: rows, lengths or layers that do not divide or fit; a dtype that the devices do not compute so.
  """
  sharding.check_compute(config.precision, layout)
  objective = objectives.make(config, vocab)
  batch = objectives.shapes(objective, config.seq_len)
  lengths = {key: shape[0] for key, (shape, _) in batch.items() if shape}
  model = build_model(config, vocab.size, objective.visibility, layout)
  for size in {config.batch_size, *(size for _, size in config.batch_ramp)}:
    layout.batch((size // config.accumulation, config.seq_len))  # says what does not divide, before any work
    stages.check_rows(size // config.accumulation, layout)
  _check_lengths(config, model, lengths)
  shapes = init_state(model, config)
  loss_fn = task_losses.make(objective.loss, model, config)
  return Parts(objective, model, shapes, loss_fn, make_step(loss_fn, shapes, config),
               batch | {'example_ids': ((), np.dtype(np.int32))}, lengths)


class Run:
  """One run: the parts that the loop puts together."""

  def __init__(self, config: Any, workdir: str, prepared: store.Prepared):
    self.config, self.tokenizer, self.stores = config, prepared.tokenizer, prepared.stores
    self.layout, vocab = sharding.layout_of(config), self.tokenizer.vocab
    parts = assemble(config, self.layout, vocab)
    self.objective, self.model, self.shapes, self.step_fn = parts.objective, parts.model, parts.shapes, parts.step_fn
    self.lengths, loss_fn = parts.lengths, parts.loss_fn
    self.arrange = _arrangement(config, self.objective.visibility, self.lengths, self.layout)
    self.stream = (plans.Stream(config, self.stores, self.objective, vocab) if prepared.task is None else
                   examples.TaskStream(config, prepared.task, self.objective))
    measured = (config, self.model, prepared, self.objective, loss_fn, self.arrange)
    self.teacher = None
    if config.loss.teacher.path:
      labels = prepared.task.task.labels if prepared.task else ()
      self.teacher = Teacher(config, self.model, self.objective, self.tokenizer, labels)
    self.rollouts = Rollouts(self.stream, *measured) if self.objective.loss in fits.WRITTEN else None
    self.evaluators = Graded(self.rollouts.writer, *measured) if self.rollouts else Evaluators(*measured)
    keep = {key: config.checkpoint[key] for key in ('keep_latest', 'keep_every', 'keep_best', 'best_metric',
                                                    'best_is_highest')}
    self.checkpoints = Checkpoints(os.path.join(workdir, 'checkpoints'), **keep)
    sizes = {config.batch_size, *(size for _, size in config.batch_ramp)}
    self.rows = {size: self.layout.host_rows((size, config.seq_len)) for size in sizes}

  def start(self) -> tuple[int, TrainState, Tree, Position]:
    """(updates done, state, frozen parameters, position): this run's, or resumed, or initialised from, or fresh."""
    config, target = self.config, self.shapes.saved
    found = self.checkpoints.restore(target)
    if found is None and config.checkpoint.resume:
      found = _other(config.checkpoint.resume).restore(target)
      if found is None:
        raise JaxlmError(f'config.checkpoint.resume: {config.checkpoint.resume} has no valid checkpoint to continue '
                         'from.')
    if found is not None:
      step, state, data = found
      state, frozen = self.shapes.loaded(state)
      return step, state, self._begun()[1] if self.shapes.delta else frozen, Position(**data)
    return 0, *self._begun(), Position()

  def _begun(self) -> tuple[TrainState, Tree]:
    """(the state before the first update, what is frozen): as drawn, with another run's weights in their places."""
    config = self.config
    state, frozen = self.shapes.fresh(config.seed)
    if not config.checkpoint.init_from and not self.shapes.delta:
      return state, frozen
    known = self.shapes.in_layers(state, frozen), self.model, self.tokenizer, config.seed
    if config.checkpoint.init_from:
      params = adopt.adopted(config.checkpoint.init_from, *known, config.checkpoint.init_step)
    else:
      params = adopt.begun(*known)
    params = self.shapes.in_place(params)
    trained = trees.flatten(state.params)
    params, kept = trees.partition(params, trained.__contains__)
    if state.ema is not None:
      average = lambda p, like: jax.device_put(jnp.array(p, jnp.float32), like.sharding)  # a copy: both are donated
      state = state.replace(ema=jax.tree.map(average, params, state.ema))
    return state.replace(params=params), kept

  def rewind(self, bad: Told, position: Position) -> tuple[int, TrainState, Tree, Position]:
    """As `start`, from the newest checkpoint, with the examples from there to the bad batch's end passed over."""
    if position.rewinds == self.config.max_rewinds:
      raise RunFailed(f'{bad}; this would be rewind {position.rewinds + 1}, config.max_rewinds={position.rewinds}.')
    step, state, frozen, back = self.start()
    first, last = pipeline.stream_indices(np.array([back.examples, bad.examples[1] - 1]), position.skips)
    back.skips = [*position.skips, [int(first), int(last) + 1]]
    back.rewinds = position.rewinds + 1
    return step, state, frozen, back

  def batches(self, step: int, position: Position) -> tuple[pipeline.BatchSizes, pipeline.Batches]:
    """(sizes of the batches from here on, this process's rows of each)."""
    sizes = pipeline.BatchSizes.of(self.config, step, position.examples)
    read = (self.rollouts.questions, None) if self.rollouts else (self.stream, self.rows.__getitem__)
    return sizes, pipeline.Batches(self.config, *read, sizes)

  def batch(self, batches: pipeline.Batches, step: int, state: TrainState, frozen: Tree, position: Position,
            size: int) -> tuple[dict[str, Array], dict[str, float]]:
    """(the batch of the next update, what is told of it): of text that is there, or that the policy writes now."""
    if self.rollouts:
      return self.rollouts.batch(batches, step, state, frozen, position.examples, position.skips)
    batch = self.place(batches.at(position.examples, size, position.skips), size)
    return self.teacher.taught(batch) if self.teacher else batch, {}

  def rests(self, step: int) -> bool:
    """Whether a run that ends after this step can go on as if it had not."""
    return not self.rollouts or self.rollouts.begins(step)

  def place(self, batch: dict[str, np.ndarray], size: int) -> dict[str, Array]:
    """This process's rows as parts of global arrays of `size` rows."""
    return self.layout.place(self.arrange(batch), size, self.rows[size][0])


def _other(workdir: str) -> Checkpoints:
  return Checkpoints(os.path.join(workdir, 'checkpoints'), read_only=True)


def run(config: Any, workdir: str, allow_change: Sequence[str] = ()) -> dict[str, Any]:
  """Trains `config` in `workdir`, or resumes what that holds; what `python -m jaxlm.main` does.

  Args:
    config: from an experiment's `get_config`.
    workdir: the run directory; made if it is not there.
    allow_change: groups of keys in which a resumed run may differ.
  Returns:
    The last metrics, by name.
  Raises:
    JaxlmError: something the user can mend; nothing saved is harmed.
    RunFailed: the run itself failed.
    Preempted: it was asked to stop, and saved.
  """
  check.validate(config)
  with Signals() as signals, rundir.lock(workdir):
    directory = rundir.RunDirectory(workdir)
    config = adopt.pinned(config, directory.config)
    prepared = prepare(config)
    parts = Run(config, directory.path, prepared)
    labels = prepared.task.task.labels if prepared.task else ()
    this = (config, prepared.keys, prepared.tokenizer.digest, labels, allow_change)
    directory.check(*this)
    if config.checkpoint.resume and directory.config is None:
      rundir.RunDirectory(config.checkpoint.resume).check(*this)
    with parts.checkpoints:
      start = parts.start()
      if start[0] > config.steps:
        raise JaxlmError(f'{directory.path} has done {start[0]} steps, config.steps={config.steps} is less; raise it, '
                         'or use another workdir.')
      directory.accept(*this)  # not before: a checkpoint that does not fit leaves config.json as it was
      if jax.process_index() == 0:
        prepared.tokenizer.save(os.path.join(directory.path, 'tokenizer'))
      with Watch(os.path.join(directory.path, '.processes'), jax.process_index(), jax.process_count(),
                 config.heartbeat_s, config.watchdog_s) as watch:
        try:
          return train(parts, directory.path, signals, watch, *start)
        except Exception as e:
          watch.blame(e)
          raise


def prepare(config: Any) -> store.Prepared | examples.Prepared:
  """What a config learns from: a task's examples, or the stores of its text."""
  if config.data.task:
    return examples.prepare(config, objectives.roles(config), fits.ANSWERS[config.objective.name])
  return store.prepare(config, objectives.roles(config))


def train(parts: Run, workdir: str, signals: Signals, watch: Watch, step: int, state: TrainState, frozen: Tree,
          position: Position) -> dict[str, Any]:
  """The loop, from where `parts.start` says."""
  config, checkpoints = parts.config, parts.checkpoints
  columns = sum(parts.lengths.get(key, 0) for key in READ)
  flops_per_token = cost.flops_per_row(parts.model.config, parts.lengths, trained=parts.shapes.trained) / columns
  journal = Journal(workdir, config, parts.evaluators, flops_per_token, step, position)
  sizes, batches = parts.batches(step, position)

  def save():
    checkpoints.save(step, parts.shapes.to_save(state, frozen), dataclasses.asdict(position), journal.of(step))

  signals.looping = True
  try:
    tired = journal.is_tired(position)
    while step < config.steps and not tired:
      first, size = position.examples, sizes(position.examples)
      batch, said = parts.batch(batches, step, state, frozen, position, size)
      state, metrics = parts.step_fn(state, frozen, batch)
      step, position.examples = step + 1, first + size
      watch.step(step)
      stop = parts.rests(step) and signals.stop(together=due(step, config.log_every))
      bad = journal.tell(position)  # of the step before, while this one runs
      journal.note(step, (first, first + size), metrics | said)
      ending = stop or step == config.steps
      if not bad and (ending or due(step, config.eval_every) or due(step, config.save_every)):
        bad = journal.tell(position)
      if bad and config.on_nonfinite == 'stop':
        raise RunFailed(f'{bad}; the last checkpoint is step {checkpoints.latest_valid()}. Lower the rate, or set '
                        "config.on_nonfinite to 'skip' or 'rewind'.")
      if bad:
        step, state, frozen, position = parts.rewind(bad, position)
        journal.back(step, position)
        batches.close()
        sizes, batches = parts.batches(step, position)
        continue
      if due(step, config.eval_every) or step == config.steps:
        journal.measure(step, position, state, frozen, lambda: watch.step(step))
      tired = journal.tired(step, position)
      if due(step, config.save_every) or ending or tired:
        save()
      if stop and step < config.steps:
        checkpoints.wait()
        raise Preempted(f'{signals.received or "another process"} at step {step}; saved in {workdir}. Run the same '
                        'command to go on.')
    checkpoints.wait()
  finally:
    batches.close()
    journal.close()
  return journal.last
