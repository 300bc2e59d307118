"""Optimizers by optax attribute, schedules, decay and rates by rules."""
import math
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import trees
from jaxlm.lookup import lookup
from jaxlm.sums import over_lead
from jaxlm.types import Array, Tree

Axes = Mapping[str, tuple[str | None, ...]]


# ---- schedules: step -> multiple of the peak rate, after the warmup ------------------------------------------------


def _cosine(optim, step, span):
  return optim.final_fraction + (1 - optim.final_fraction) * 0.5 * (1 + jnp.cos(math.pi * step / span))


def _linear(optim, step, span):
  return 1 - (1 - optim.final_fraction) * step / span


def _wsd(optim, step, span):
  """Warmup, stable, decay (Hu et al. 2024, MiniCPM): flat, then linear over the last `decay_fraction`."""
  falling = min(max(optim.decay_fraction * optim.total_steps, 1), span)
  return 1 - (1 - optim.final_fraction) * jnp.clip((step - (span - falling)) / falling, 0, 1)


def _rsqrt(optim, step, span):
  """As the 2017 Transformer: falls with the square root of the step."""
  warmup = max(optim.warmup_steps, 1)
  return jnp.sqrt(warmup / (step + warmup))


def _constant(optim, step, span):
  return jnp.ones_like(step)


SCHEDULES = {'cosine': _cosine, 'linear': _linear, 'wsd': _wsd, 'rsqrt': _rsqrt, 'constant': _constant}


def schedule(optim: Any) -> Callable[[Any], jax.Array]:
  """Updates done -> learning rate of the next one."""
  shape = lookup(SCHEDULES, optim.schedule, 'schedule')
  span = max(optim.total_steps - optim.warmup_steps, 1)

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / (optim.warmup_steps + 1))
    past = jnp.clip(step - optim.warmup_steps, 0, span if optim.schedule not in ('rsqrt', 'constant') else None)
    return optim.lr * warm * shape(optim, past, span)
  return rate


# ---- optimizers: (sub-config, weight decay, logical axes) -> what turns gradients into directions -------------------


def _adamw(c, decay, axes):
  return optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), decay)


def _lion(c, decay, axes):
  return optax.chain(optax.scale_by_lion(c.b1, c.b2), decay)


def _sgd(c, decay, axes):
  return optax.chain(decay, optax.trace(c.momentum, c.nesterov))


def _adafactor(c, decay, axes):
  return optax.chain(optax.scale_by_factored_rms(decay_rate=c.decay_rate, min_dim_size_to_factor=c.min_dim),
                     optax.clip_by_block_rms(c.clipping), decay)


def _lamb(c, decay, axes):
  return optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), decay, optax.scale_by_trust_ratio())


def _lars(c, decay, axes):
  return optax.chain(decay, optax.scale_by_trust_ratio(trust_coefficient=c.trust), optax.trace(c.momentum))


def _novograd(c, decay, axes):
  return optax.chain(optax.scale_by_novograd(c.b1, c.b2, c.eps), decay)


def _adagrad(c, decay, axes):
  return optax.chain(optax.scale_by_rss(c.initial, c.eps), decay)


def _rmsprop(c, decay, axes):
  return optax.chain(optax.scale_by_rms(c.decay, c.eps), decay)


def _muon(c, decay, axes):
  """Muon for the matrices between two widths, Adam for embeddings, the head and vectors (Jordan et al. 2024).

  Each matrix, orthogonal, is scaled by sqrt(max(1, outputs / inputs)). A bias of heads has two dims and is a vector.
  """
  def numbers(path):
    names = tuple(a for a in axes[path] if a != 'layers')
    if len(names) < 2 or 'embed' not in names or 'vocab' in names or None in names:
      return None
    dims = range(len(names))
    into = 1 if names[0] == 'embed' else len(names) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(dims[:into]), tuple(dims[into:]))
  matrices = lambda params: trees.map_paths(lambda path, _: numbers(path), params)
  labels = lambda params: trees.map_paths(lambda path, _: 'muon' if numbers(path) else 'adam', params)
  # optax's whole muon, for its scaling by shape; a rate of -1 makes it a direction. Its own Adam is Nesterov's.
  return optax.chain(optax.partition({
      'muon': optax.contrib.muon(-1.0, beta=c.beta, ns_steps=c.ns_steps, muon_weight_dimension_numbers=matrices),
      'adam': optax.scale_by_adam(c.adam_b1, c.adam_b2)}, labels), decay)


OPTIMIZERS = {'adamw': _adamw, 'adafactor': _adafactor, 'lion': _lion, 'muon': _muon, 'sgd': _sgd, 'lamb': _lamb,
              'lars': _lars, 'novograd': _novograd, 'adagrad': _adagrad, 'rmsprop': _rmsprop}


# ---- putting it together -------------------------------------------------------------------------------------------


def _by_rules(rules, make: Callable[[float, Callable], optax.GradientTransformation]) -> optax.GradientTransformation:
  """One transformation for each number that rules give, masked to the parameters they give it to."""
  numbers = sorted({number for _, number in rules})
  mask = lambda number: lambda params: trees.map_paths(lambda path, _: trees.match(rules, path) == number, params)
  return optax.chain(*[make(number, mask(number)) for number in numbers])


STACKED = 'stacked_'  # and a number of layers: the key under which the state of parameters with so many stands


def over_layers(tx: optax.GradientTransformation, axes: Axes,
                layers: Mapping[str, int] | None = None) -> optax.GradientTransformation:
  """`tx` applied to each layer of stacked parameters as if it stood alone.

  Optimizers with statistics of a whole tensor (Adafactor, LAMB, LARS, NovoGrad, Muon) would mix layers otherwise.

  Args:
    axes: as in `make`.
    layers: of each stacked parameter, by path, where its first dim says more (a pipeline rounds up); names the state.
  """
  def groups(tree: Tree) -> dict[str, Tree]:
    parts: dict[str, dict[str, Any]] = {}
    for path, leaf in trees.flatten(tree).items():
      stacked = axes[path][:1] == ('layers',)
      name = f'{STACKED}{(layers or {}).get(path, leaf.shape[0])}' if stacked else 'single'
      parts.setdefault(name, {})[path] = leaf
    return {name: trees.unflatten(leaves) for name, leaves in sorted(parts.items())}

  def init(params):
    return {name: (tx.init if name == 'single' else jax.vmap(tx.init))(part) for name, part in groups(params).items()}

  def update(updates, state, params=None):
    shares, new_state, out = groups(params), {}, []
    for name, part in groups(updates).items():
      step = tx.update if name == 'single' else jax.vmap(tx.update)
      part, new_state[name] = step(part, state[name], shares[name])
      out.append(part)
    return trees.combine(*out), new_state

  return optax.GradientTransformation(init, update)


def global_norm(tree: Tree) -> Array:
  """float32: of all arrays together. A product of each with itself: XLA on a CPU would write down squares to sum."""
  return jnp.sqrt(sum(over_lead(x, x) for x in jax.tree.leaves(tree)))


def _clipped(most: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`, given the norm where it is known: `update(…, norm=…)`. (Pascanu et al. 2013)"""
  def update(updates, state, params=None, *, norm=None, **_):
    del params
    factor = jnp.minimum(1.0, most / (global_norm(updates) if norm is None else norm))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state
  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _by_depth(decay: float, depths: Mapping[str, Any]) -> optax.GradientTransformation:
  """Smaller steps the nearer a parameter stands to the input: times decay for each layer above it.

  Source: Howard and Ruder 2018, ULMFiT, arXiv:1801.06146, section 3.2; Clark et al. 2020, ELECTRA, appendix B.
  """
  last = max(int(np.max(depth)) for depth in depths.values())

  def one(path, update):
    factor = decay ** (last - np.asarray(depths[path], np.float32))
    return update * jnp.asarray(factor.reshape(-1, *(1,) * (update.ndim - 1)) if factor.ndim else factor, update.dtype)
  return optax.stateless(lambda updates, params: trees.map_paths(one, updates))


def make(optim: Any, axes: Axes, layers: Mapping[str, int] | None = None,
         depths: Mapping[str, Any] | None = None) -> optax.GradientTransformation:
  """The optimizer of a config: clip, direction, decay, rate by rules, schedule.

  Args:
    optim: the `optim` part of a config.
    axes: logical axes of each trainable parameter, by path; 'layers' first marks stacked ones.
    layers: as in `over_layers`.
    depths: how far above the input each stands (`stack.depths`), for optim.layer_decay.
  Returns:
    A transformation whose `update` may be given `norm`, the global norm of the gradients.
  """
  decay = optax.identity()
  if optim.weight_decay:
    decay = _by_rules(optim.decay_rules, lambda times, mask: optax.add_decayed_weights(optim.weight_decay * times, mask)
                      if times else optax.identity())
  direction = lookup(OPTIMIZERS, optim.name, 'optimizer')(getattr(optim, optim.name, optim), decay, axes)
  rates = optim.lr_rules
  parts = [over_layers(direction, axes, layers)]
  if {number for _, number in rates} != {1.0}:
    parts.append(_by_rules(rates, lambda times, mask: optax.masked(optax.scale(times), mask)))
  if optim.layer_decay != 1.0:
    parts.append(_by_depth(optim.layer_decay, depths))
  parts.append(optax.scale_by_learning_rate(schedule(optim)))
  if optim.clip_norm:
    parts.insert(0, _clipped(optim.clip_norm))
  return optax.with_extra_args_support(optax.chain(*parts))
