"""Stages of a pipeline: layers stay on their devices, microbatches travel from stage to stage."""
import dataclasses
import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import JaxlmError
from jaxlm.models.attention import Context
from jaxlm.sharding import Layout
from jaxlm.types import Array, Tree

# Letters here: S stages, R rounds, J repeats of a stage in a round, M microbatches, P devices that have rows of their
# own; b rows of a microbatch on one of them.

AXIS = 'pipe'
WEIGHTS = 'pipeline_weights'  # checkpoint_name of a repeat's slice, which no policy should keep


def sizes(layout: Layout) -> tuple[int, int, int]:
  """(stages, rounds, microbatches); one of each without a pipeline."""
  S, schedule = layout.mesh.shape[AXIS], layout.schedule
  return (S, schedule.repeats, schedule.microbatches or S) if S > 1 else (1, 1, 1)


def order(repeats: int, layout: Layout) -> np.ndarray:
  """Which repeat of a stack each place in memory holds, int [S, R, J]; -1 where a stage has one fewer.

  Stage s has, in each round r, the neighbours of chunk r·S + s; the last chunks are the shorter ones. What lies flat in
  memory in this order is split over stages by its first dim.

  Raises:
    JaxlmError: a chunk would be empty.
  """
  S, R, _ = sizes(layout)
  chunks = S * R
  if repeats < chunks:
    raise JaxlmError(f'config.mesh.pipe={S} × config.pipeline.repeats={R} makes {chunks} stages, more than the '
                     f'{repeats} repeated layers of a stack; lower one of them.')
  J = -(-repeats // chunks)
  lengths = np.full(chunks, J)
  lengths[chunks - (chunks * J - repeats) or chunks:] -= 1
  within = np.arange(J)
  table = np.where(within < lengths[:, None], (np.cumsum(lengths) - lengths)[:, None] + within, -1)
  return table.reshape(R, S, J).swapaxes(0, 1)


def places(repeats: int, layout: Layout) -> np.ndarray:
  """Where in memory each repeat lies; the inverse of `order`."""
  flat = order(repeats, layout).ravel()
  return np.argsort(np.where(flat < 0, len(flat), flat), kind='stable')[:repeats]


def into_stages(leaf: Array, repeats: int, layout: Layout) -> Array:
  """[L, ...] in layer order as it lies in memory, [S·R·J, ...]; zeros where there is no layer."""
  flat = order(repeats, layout).ravel()
  if np.array_equal(flat, np.arange(repeats)):
    return leaf
  leaf = leaf[np.maximum(flat, 0)]
  return leaf if flat.min() >= 0 else jnp.where((flat >= 0).reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)


def into_layers(leaf: Array, repeats: int, layout: Layout) -> Array:
  """Undoes `into_stages`."""
  at = places(repeats, layout)
  return leaf if leaf.shape[0] == repeats and np.array_equal(at, np.arange(repeats)) else leaf[at]


def inside(layout: Layout) -> Layout:
  """The layout that a stage's layers see: rows are no longer split, for each device's own are a dim that vmap adds."""
  mine = _row_axes(layout)
  left = lambda to: tuple(a for a in ((to,) if isinstance(to, str) else to or ()) if a not in mine) or None
  return dataclasses.replace(layout, rules=tuple((axis, left(to)) for axis, to in layout.rules))


def _row_axes(layout: Layout) -> tuple[str, ...]:
  """Mesh axes over which rows are split and nothing else that a layer does."""
  return tuple(axis for axis in layout.axes('act_batch') if axis != 'expert')


def run(apply: Callable[..., tuple[Array, dict[str, Array]]], weights: Tree, x_BTD: Array, context: Context,
        numbers: Tree, repeats: int, layout: Layout, policy: Callable[..., Any]) -> tuple[Array, dict[str, Array]]:
  """A stack's repeats, spread over stages; equal to one after the other, dropout included.

  All stages work at every tick, on what the tick before left with their neighbour. Microbatches enter in groups of S;
  a group goes round all stages R times, and what the last stage puts out is what the first needs next, so nothing has
  to be kept between rounds. R = 1 is GPipe's schedule. Of R·M + S - 1 ticks S - 1 fill and drain the pipeline.

  Weights have a copy for each device with rows of its own (the copy it holds anyway; of fsdp, gathered once a step), so
  that each sums up its gradients over all ticks before they are added to the others'.

  Args:
    apply: (weights of a repeat, its numbers, x, context) -> (x, sums [b] by name), of layers in the layout `inside`.
    weights: of all repeats, as they lie in memory.
    context: of all rows.
    numbers: of each repeat, in layer order: arrays [repeats, ...].
    policy: what is kept of a repeat for the backward pass.
  Returns:
    x and sums [B] by name.
  Raises:
    JaxlmError: rows do not divide into microbatches, or those into groups.
  Source: Huang et al. 2019, GPipe, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
  """
  S, R, M = sizes(layout)
  C, rows = S * R, _row_axes(layout)
  P = math.prod(layout.mesh.shape[axis] for axis in rows)
  check_rows(x_BTD.shape[0], layout)
  microbatches = lambda x: jnp.swapaxes(x.reshape(-1, M, *x.shape[1:]), 0, 1).reshape(M, P, -1, *x.shape[1:])
  cut = lambda x: _pin(microbatches(x), layout, {1: rows})
  by_stage = {0: AXIS, 1: rows}
  copies = lambda x: _pin(jnp.broadcast_to(x[:, None], (S, P, *x.shape[1:])), layout, by_stage)
  table = order(repeats, layout)
  W_SP = jax.tree.map(lambda x: copies(_pin(x.reshape(S, R, -1, *x.shape[1:]), layout, {0: AXIS})), weights)
  numbers_S = jax.tree.map(lambda x: jnp.asarray(x)[np.maximum(table, 0)], numbers), jnp.asarray(table >= 0)
  uneven = table.min() < 0
  bias_SP = jax.tree.map(lambda p: copies(jnp.broadcast_to(p, (S, *p.shape))), context.bias)
  # What is only looked at lies ready at every stage; what is differentiated travels.
  hidden, *known = context.source or (None, None, None)
  still_MP = jax.tree.map(lambda x: cut(_fixed(x)), context.replace(
      bias=None, source=None if context.source is None else (None, *known)))
  moving = {'x': x_BTD} if hidden is None else {'x': x_BTD, 'source': hidden}
  entering_MSP = jax.tree.map(lambda x: _pin(jnp.broadcast_to(cut(x)[:, None], (M, S, *cut(x).shape[1:])), layout,
                                             {1: AXIS, 2: rows}), moving)
  first_S = jnp.arange(S) == 0
  remat = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
  # With rounds, what is kept of a tick must not be the weights of its round.
  whole = R > 1 or layout.schedule.remat == 'stage'

  def stage(W, numbers, bias, r, flow, still):
    here = still.replace(bias=bias, source=None if hidden is None else (flow['source'], *still.source[1:]))
    taken = lambda x: checkpoint_name(jax.lax.dynamic_index_in_dim(x, r, keepdims=False), WEIGHTS)
    of_round = lambda x: x[0] if R == 1 else taken(x)

    def repeat(x, of_repeat):
      W, (numbers, real) = of_repeat
      new, sums = apply(checkpoint_name(W, WEIGHTS), numbers, x, here)
      if uneven:
        new, sums = jnp.where(real, new, x), {name: jnp.where(real, y, 0) for name, y in sums.items()}
      return new, sums

    x, sums = jax.lax.scan(repeat if whole else remat(repeat), flow['x'],
                           (jax.tree.map(of_round, W), jax.tree.map(of_round, numbers)))
    return flow | {'x': x}, {name: y.sum(0) for name, y in sums.items()}

  def of_rows(W, numbers, bias, r, m, flow):
    still = jax.tree.map(lambda x: x[m], still_MP)
    one = remat(stage) if whole else stage
    return jax.vmap(one, (0, None, 0, None, 0, 0), spmd_axis_name=rows or None)(W, numbers, bias, r, flow, still)

  def tick(flow, t):
    enters = t % C < S
    m = jnp.minimum(t // C * S + t % C, M - 1)
    flow = jax.tree.map(lambda new, old: jnp.where(
        (first_S & enters).reshape(S, *[1] * (old.ndim - 1)), new[m], jnp.roll(old, 1, axis=0)), entering_MSP, flow)
    q_S = jnp.maximum(t - jnp.arange(S), 0)
    m_S = jnp.minimum(q_S // C * S + q_S % S, M - 1)
    flow, sums = jax.vmap(of_rows)(W_SP, numbers_S, bias_SP, q_S % C // S, m_S, flow)
    flow = jax.tree.map(lambda x: _pin(x, layout, by_stage), flow)
    return flow, (flow['x'], sums)

  # Finite from the first tick on: what bubbles compute is not used, but zero times NaN is NaN.
  start = jax.lax.stop_gradient(jax.tree.map(lambda x: x[0], entering_MSP))
  _, (out, sums) = jax.lax.scan(tick, start, jnp.arange(R * M + S - 1))
  m, chunk = np.arange(M), np.arange(C)
  enters_at = m // S * C + m % S
  join = lambda x: _pin(jnp.swapaxes(x.reshape(M, -1, *x.shape[3:]), 0, 1).reshape(-1, *x.shape[3:]), layout,
                        {0: layout.axes('act_batch')})
  return join(out[enters_at + C - 1, S - 1]), {name: join(y[enters_at[:, None] + chunk, chunk % S].sum(1))
                                               for name, y in sums.items()}


def check_rows(rows: int, layout: Layout) -> None:
  """Raises JaxlmError where so many rows cannot be cut into a pipeline's microbatches."""
  S, R, M = sizes(layout)
  if R > 1 and M % S:
    raise JaxlmError(f'config.pipeline.microbatches={M} does not divide by config.mesh.pipe={S}; with '
                     f'config.pipeline.repeats={R} microbatches go round in groups of as many as there are stages.')
  if S > 1 and rows % (M * layout.batch_parts):
    raise JaxlmError(f'{rows} rows (config.batch_size / config.accumulation, or config.eval.batch_size) do not divide '
                     f'by config.pipeline.microbatches={M} × {layout.batch_parts} devices that rows are split over; '
                     'change one of them.')


def _fixed(x: Array) -> Array:
  return jax.lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _pin(x: Array, layout: Layout, where: dict[int, Any]) -> Array:
  """Pins some dims to mesh axes; the others stay as they come."""
  if not jnp.issubdtype(x.dtype, jnp.number):
    return x  # keys
  parts = [where.get(dim, PartitionSpec.UNCONSTRAINED) or None for dim in range(x.ndim)]
  return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, PartitionSpec(*parts)))
