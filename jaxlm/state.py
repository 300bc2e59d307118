"""A training state: what it holds, how it lies on a mesh, in memory and as it is saved."""
import dataclasses
import functools
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxlm import config as config_module
from jaxlm import optim, sharding, trees
from jaxlm.errors import JaxlmError
from jaxlm.models import peft, stack, stages
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer
from jaxlm.sharding import Layout
from jaxlm.task_losses import REFERENCE, needs_reference, without_reference
from jaxlm.types import Array, LossScale, TrainState, Tree

FIRST_SCALE = 64.0  # of the sum of losses over a batch: of a mean over 1,000 targets it would be 64,000
LEAST_SCALE, MOST_SCALE, STEADY = 2.0 ** -14, 2.0 ** 24, 2000


@dataclasses.dataclass(frozen=True)
class Shapes:
  """A state and its frozen parameters as ShapeDtypeStructs with shardings; how both are made, and the optimizer.

  Attributes:
    state, frozen: as they lie in memory.
    gradients: shardings of the gradients of what is trained.
    saved: the state with frozen parameters among the others and layers in their order, as checkpoints hold it.
    delta: what is frozen is another run's: a checkpoint holds what is trained alone.
    layers: path of anything in a state -> how many layers are stacked there, 0 for none.
  """
  state: TrainState
  frozen: Tree
  gradients: Tree
  saved: TrainState
  tx: optax.GradientTransformation
  make: Callable[[Array], tuple[TrainState, Tree]]
  layers: Callable[[str], int]
  layout: Layout
  delta: bool

  @property
  def trained(self) -> float:
    """The share of all parameters that are trained."""
    trained = trees.count(self.state.params)
    return trained / (trained + trees.count(self.frozen))

  def fresh(self, seed: int) -> tuple[TrainState, Tree]:
    """The state before the first update, made where it is kept; the same on any mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, (self.state, self.frozen))
    return jax.jit(self.make, out_shardings=shardings)(jax.random.key_data(jax.random.key(seed)))

  def to_save(self, state: TrainState, frozen: Tree) -> TrainState:
    """The state as checkpoints hold it."""
    state = state if self.delta else whole(state, frozen)
    return self._moved(state, stages.into_layers, self.saved) if self._staged else state

  def loaded(self, state: TrainState) -> tuple[TrainState, Tree]:
    """(the state, frozen parameters) of what a checkpoint held; of a delta, nothing that is frozen."""
    held = {} if self.delta else self.frozen
    if self._staged:
      state = self._moved(state, stages.into_stages, whole(self.state, held))
    state, frozen = split(state, held)
    kept = jax.tree.map(lambda x: x.sharding, self.state.opt_state)
    return state.replace(opt_state=jax.device_put(state.opt_state, kept)), frozen

  def in_layers(self, state: TrainState, frozen: Tree) -> Tree:
    """All parameters, with layers in their order, whatever the mesh."""
    params = trees.combine(frozen, state.params)
    if not self._staged:
      return params
    one = lambda path, x: stages.into_layers(x, n, self.layout) if (n := self.layers(path)) else x
    return jax.jit(lambda params: trees.map_paths(one, params))(params)

  def in_place(self, params: Tree) -> Tree:
    """The inverse of `in_layers`: as they lie in memory."""
    if not self._staged:
      return params
    one = lambda path, x: stages.into_stages(x, n, self.layout) if (n := self.layers(path)) else x
    shardings = jax.tree.map(lambda x: x.sharding, trees.combine(self.frozen, self.state.params))
    return jax.jit(lambda params: trees.map_paths(one, params), out_shardings=shardings)(params)

  @property
  def _staged(self) -> bool:
    return self.layout.mesh.shape[stages.AXIS] > 1

  def _moved(self, state: TrainState, move: Callable[..., Array], to: TrainState) -> TrainState:
    one = lambda path, x: move(x, n, self.layout) if (n := self.layers(path)) else x
    shardings = jax.tree.map(lambda x: x.sharding, to)
    return jax.jit(lambda state: trees.map_paths(one, state), out_shardings=shardings)(state)


def build_model(config: Any, vocab_size: int, visibility: str, layout: Layout) -> Transformer:
  """The model of a config.

  Args:
    vocab_size: the tokenizer's, used where the config says 0.
    visibility: the objective's.
  """
  return Transformer(freeze(config_module.resolved(config)['model'], vocab_size=vocab_size, visibility=visibility,
                            compute_dtype=config.precision.compute, param_dtype=config.precision.params,
                            products=config.precision.products), layout)


def init_state(model: Transformer, config: Any) -> Shapes:
  """Lays out parameters, optimizer state and average on the model's mesh; computes nothing yet.

  Parameters that match `config.optim.freeze` are kept apart: the optimizer never sees them. What the optimizer and the
  average keep, and gradients, may be split further than parameters, by config.sharding.optimizer_rules (ZeRO-1:
  Rajbhandari et al. 2020, arXiv:1910.02054).
  """
  layout, tokens = model.layout, jnp.zeros((1, config.seq_len), jnp.int32)
  # Parameters do not depend on the batch, so a row on one device will do, whatever the mesh.
  alone = model.clone(layout=sharding.single(layout.rules))
  init = lambda rng: alone.init(jax.random.wrap_key_data(rng), {'tokens': tokens, 'order': tokens})['params']
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  boxed = jax.eval_shape(init, key)
  axes = sharding.logical_axes(boxed)
  params = nn.meta.unbox(boxed)
  _check_rules(config.optim, params)
  _check_sites(model.config.peft, params)
  trainable = lambda path: peft.is_trained(model.config.peft, path) and not any(
      trees.matches(pattern, path) for pattern in config.optim.freeze)
  stacked = {path: x.shape[0] for path, x in trees.flatten(params).items() if axes[path][:1] == ('layers',)}
  layers = functools.partial(_layers, stacked)
  staged = lambda path, x: stages.into_stages(x, n, layout) if (n := layers(path)) else x
  tx = optim.make(config.optim, axes, stacked, stack.depths(jax.eval_shape(
      lambda params: trees.map_paths(staged, params), params), model.config, layout))

  def make(rng):
    made = trees.map_paths(staged, nn.meta.unbox(init(rng)))
    trained, frozen = trees.partition(made, trainable)
    if needs_reference(config):
      frozen[REFERENCE] = made
    # float32: a bfloat16 mean would hardly move.
    ema = jax.tree.map(lambda p: p.astype(jnp.float32), trained) if config.optim.ema_decay else None
    scale = LossScale(jnp.float32(FIRST_SCALE), jnp.int32(0)) if model.config.compute_dtype == 'float16' else None
    return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), ema, rng, scale), frozen

  def placed(shapes, params, layout):
    """Shapes with shardings of anything that holds arrays like parameters."""
    shardings = sharding.state_shardings(shapes, params, sharding.param_shardings(params, axes, layout), layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

  def placed_state(state, params, layout):
    wider = dataclasses.replace(layout, rules=(*layout.rules, *config.sharding.optimizer_rules))
    placed_wide = placed(state, params, wider)
    return placed_wide.replace(params=placed(state.params, params, layout)), placed(state.params, params, wider)

  shapes, frozen = jax.eval_shape(make, key)
  laid_out = trees.combine(without_reference(frozen), shapes.params)
  state, wide = placed_state(shapes, laid_out, layout)
  if config.sharding.offload_optimizer:
    sharding.check_host_memory(layout.mesh.devices.flat, 'config.sharding.offload_optimizer')
    state = state.replace(opt_state=jax.tree.map(_on_host, state.opt_state))
  if config.model.remat == 'offload':
    sharding.check_host_memory(layout.mesh.devices.flat, "config.model.remat='offload'")
  one = lambda path, x: stages.into_layers(x, n, layout) if (n := layers(path)) else x
  delta = model.config.peft.method != 'none'
  in_order = jax.eval_shape(lambda state: trees.map_paths(one, state), shapes if delta else whole(shapes, frozen))
  saved, _ = placed_state(in_order, params, _unstaged(layout))
  return Shapes(state, placed(frozen, laid_out, layout),
                jax.tree.map(lambda x: x.sharding, wide), saved, tx, make, layers, layout, delta)


def _on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The same in the host's memory; counters stay."""
  return x.update(sharding=x.sharding.with_memory_kind(sharding.HOST)) if x.ndim else x


def _layers(stacked: dict[str, int], path: str) -> int:
  """How many layers are stacked in what stands at a path of a state; 0: none are."""
  parts = path.split('/')
  for part in parts:
    if part.startswith(optim.STACKED):
      return int(part.removeprefix(optim.STACKED))
  return next((stacked[end] for i in range(len(parts)) if (end := '/'.join(parts[i:])) in stacked), 0)


def _unstaged(layout: Layout) -> Layout:
  """A layout of layers in their order, which need not divide by stages: stages then hold parts of every layer."""
  if layout.mesh.shape[stages.AXIS] == 1:
    return layout
  rules = tuple((axis, None if axis == 'layers' else to) for axis, to in layout.rules)
  return dataclasses.replace(layout, rules=(*rules, ('embed', stages.AXIS), ('mlp', stages.AXIS)))


def _check_rules(settings: Any, params: Tree) -> None:
  """Raises JaxlmError where a rule of the optimizer covers too little: what it names, it must mean."""
  for rules in ('decay_rules', 'lr_rules'):
    trees.matched(settings[rules], params, f'rule of config.optim.{rules}')
  paths = list(trees.flatten(params))
  for pattern in settings.freeze:
    if not any(trees.matches(pattern, path) for path in paths):
      raise JaxlmError(f'config.optim.freeze: {pattern!r} matches no parameter; patterns match a whole path, such as '
                       f'{paths[0]!r}.')
  if all(any(trees.matches(pattern, path) for pattern in settings.freeze) for path in paths):
    raise JaxlmError('config.optim.freeze leaves no parameter to train; take a pattern out.')


def _check_sites(settings: Any, params: Tree) -> None:
  """Raises JaxlmError where a delta's pattern means nothing there is."""
  if settings.method == 'none':
    return
  paths = list(trees.flatten(params))
  places = {peft.site(path.split('/')[:n]) for path in paths for n in range(1, path.count('/') + 1)}
  for pattern, value in settings.sites:
    if value and not any(trees.matches(pattern, place) for place in places):
      raise JaxlmError(f'config.model.peft.sites: {pattern!r} matches no place; there are '
                       f'{", ".join(sorted(place for place in places if place.count("/") == 1)[:12])}.')
  if settings.also and not any(trees.matches(settings.also, path) for path in paths):
    raise JaxlmError(f'config.model.peft.also: {settings.also!r} matches no parameter; patterns match a whole path, such as '
                     f'{paths[0]!r}.')
  if settings.method == 'bitfit' and not any(map(peft.is_bias, paths)):
    raise JaxlmError("config.model.peft.method='bitfit' trains biases, and this model has none; take another method, such as "
                     "'lora'.")
  if settings.method != 'bitfit' and not any(map(peft.is_delta, paths)):
    raise JaxlmError(f'config.model.peft.method={settings.method!r} adds nothing to this model; set config.model.peft.sites '
                     'to places it has.')


def whole(state: TrainState, frozen: Tree) -> TrainState:
  """The state with frozen parameters put back, as checkpoints hold it."""
  if not frozen:
    return state
  return state.replace(params=trees.combine(frozen, state.params),
                       ema=None if state.ema is None else trees.combine(frozen, state.ema))


def split(state: TrainState, frozen: Tree) -> tuple[TrainState, Tree]:
  """The inverse of `whole`, for the same frozen paths."""
  if not frozen:
    return state, frozen
  paths = trees.flatten(frozen)
  frozen, params = trees.partition(state.params, paths.__contains__)
  ema = None if state.ema is None else trees.partition(state.ema, paths.__contains__)[1]
  return state.replace(params=params, ema=ema), frozen


def rescaled(scale: LossScale, finite: Array) -> LossScale:
  """Half where a gradient was too large; twice after STEADY updates that were not.

  Source: Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740, section 3.2.
  """
  steps = jnp.where(finite, scale.steps + 1, 0)
  factor = jnp.where(finite, jnp.where(steps >= STEADY, 2.0, 1.0), 0.5)
  return LossScale(jnp.clip(scale.value * factor, LEAST_SCALE, MOST_SCALE), jnp.where(steps >= STEADY, 0, steps))
