"""Attention over devices: each answers for its own queries; keys go round a ring of devices, or are gathered."""
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm import sharding
from jaxlm.lookup import lookup
from jaxlm.models import blocks, kernels
from jaxlm.models.cudnn import cudnn, refuses
from jaxlm.models.kernels import Bias, Score, UnsupportedAttention, Visibility
from jaxlm.sharding import Layout
from jaxlm.types import Array


def attend(layout: Layout, name: str, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, *,
           scale: float, softcap: float, bias: Bias | None, sink_N: Array | None,
           dropout: Callable[[Array], Array] | None, block: int) -> Array:
  """The kernel of this name, as each device runs it for the rows, queries and heads that it holds.

  Where rows' lengths are split, `ring` passes keys on from device to device; for any other kernel they are gathered.

  Args: as `kernels.dense`.
  Raises:
    UnsupportedAttention: probabilities are dropped, whose masks are drawn for whole rows, while lengths are split.
  """
  along, heads = layout.axes('act_length'), layout.axes('act_heads')
  if name == AUTO:
    name = fitting(layout.platform, bool(along), q_BTNH, k_BSKH, v_BSKH, softcap, bias, sink_N, dropout)
  kernel, given = lookup(KERNELS, name, 'attention kernel'), dict(scale=scale, softcap=softcap, block=block)
  if dropout is not None and along:
    raise UnsupportedAttention('Attention probabilities cannot be dropped where lengths are split over '
                               f'{" × ".join(along)}; set config.model.attention.dropout=0.0, or that mesh axis to 1.')
  if dropout is not None or layout.mesh.size == 1:
    return kernel(q_BTNH, k_BSKH, v_BSKH, visibility, bias=bias, sink_N=sink_N, dropout=dropout, **given)

  B, K = q_BTNH.shape[0], k_BSKH.shape[2]
  kv_heads = 'kv_heads' if K % layout.parts('kv_heads') == 0 else None
  spec = lambda *axes: lambda x: layout.spec(axes, x.shape, 'attention')
  integers = {key: jnp.broadcast_to(getattr(visibility, key), (B, getattr(visibility, key).shape[1]))
              for key in kernels.QUERY_SIDE + kernels.KEY_SIDE}
  traced = isinstance(visibility.window, jax.Array)
  params, tree = jax.tree.flatten(bias.params if bias else None)
  arrays = dict(q=q_BTNH, k=k_BSKH, v=v_BSKH, integers=integers, window=visibility.window if traced else None,
                params=params, sink=sink_N)
  specs = dict(q=spec('act_batch', 'act_length', 'act_heads', None)(q_BTNH), integers=jax.tree.map(
      spec('act_batch', 'act_length'), integers), window=PartitionSpec() if traced else None,
               params=[spec(*axes)(x) for axes, x in zip(bias.axes if bias else (), params)],
               sink=None if sink_N is None else spec('act_heads')(sink_N))
  specs['k'] = specs['v'] = spec('act_batch', 'act_length', kv_heads, None)(k_BSKH)
  everywhere, split = sharding.axes_of(specs['q']), bool(specs['k'][2])

  def local(x: dict[str, Any]) -> Array:
    # What is the same on several devices gets a gradient from each; they are summed here, on the way back.
    own = lambda y, spec: sharding.differ(y, tuple(a for a in everywhere if a not in sharding.axes_of(spec)))
    q, k, v = (own(x[key], specs[key]) for key in 'qkv')
    params = [own(y, spec) for y, spec in zip(x['params'], specs['params'])]
    if heads and not split:
      k, v = (_own_heads(y, q.shape[2], q_BTNH.shape[2], heads) for y in (k, v))
    integers, call = x['integers'], kernel
    if kernel is ring:
      call = functools.partial(ring, axes=along)
    elif along:
      whole = lambda y: jax.lax.all_gather(y, along, axis=1, tiled=True)
      k, v, integers = whole(k), whole(v), integers | {key: whole(integers[key]) for key in kernels.KEY_SIDE}
    seen = visibility.replace(window=x['window'] if traced else visibility.window, **integers)
    added = bias and bias.replace(params=jax.tree.unflatten(tree, params))
    return call(q, k, v, seen, bias=added, sink_N=x['sink'], **given)

  return layout.by_device(local, (specs,), specs['q'])(arrays)


def fitting(platform: str, split: bool, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, softcap: float,
            bias: Bias | None, sink_N: Array | None, dropout: Callable[[Array], Array] | None) -> str:
  """The name of the fastest kernel that computes this exactly on a platform.

  Args:
    split: lengths are split over devices.
  """
  if dropout is not None or bias is not None and bias.whole:
    return 'dense'
  if split:
    return 'ring'
  if platform == 'gpu' and not refuses(q_BTNH, k_BSKH, v_BSKH, softcap, bias, sink_N, dropout):
    return 'cudnn'
  return 'dense' if q_BTNH.shape[1] * k_BSKH.shape[1] <= FEW_SCORES else 'blockwise'


def _own_heads(x_BSKH: Array, mine: int, N: int, axes: tuple[str, ...]) -> Array:
  """Of key heads that all devices have, those that this one's `mine` of N query heads read."""
  group, first = N // x_BSKH.shape[2], jax.lax.axis_index(axes) * mine
  if mine % group and group % mine:  # one for each query head
    return jnp.take(x_BSKH, (first + jnp.arange(mine)) // group, axis=2)
  return jax.lax.dynamic_slice_in_dim(x_BSKH, first // group, max(mine // group, 1), axis=2)


# ---- the ring ------------------------------------------------------------------------------------------------------


def ring(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, *, scale: float, softcap: float = 0.0,
         bias: Bias | None = None, sink_N: Array | None = None, dropout: Callable[[Array], Array] | None = None,
         block: int = 512, axes: tuple[str, ...] = ()) -> Array:
  """`blockwise` where each device holds a part of the queries and keys of every row.

  Keys and values go round the devices in as many steps as there are. A step sends on what it has before it uses it, so
  that the network and the arithmetic work at the same time. The integers that decide who sees whom are gathered once.

  Args: as `blocks.blockwise`.
    axes: mesh axes over which lengths are split; without, this is `blockwise`.
  Source: Liu et al. 2023, Ring Attention, arXiv:2310.01889, algorithm 1.
  """
  score = Score(scale, softcap, bias.fn if bias else None)
  if not axes:
    run = functools.partial(blocks.flash, score, block)
  else:
    # With `balanced` columns a device has an early and a late stretch of them: no block should hold both.
    run = functools.partial(_ring, score, min(block, -(-k_BSKH.shape[1] // 2)), axes)
  return blocks.by_blocks(run, 'ring', q_BTNH, k_BSKH, v_BSKH, visibility, bias, sink_N, dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(score, block, axes, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility):
  """As `blocks.flash`, inside `shard_map`."""
  return _forward(score, block, axes, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility)[0]


def _forward(score, block, axes, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility):
  K, H = k_BSKH.shape[2:]
  side_q_I, _ = blocks.cut_sides(visibility, block)
  queries = *blocks.cut_heads(K, block, q_BTNH), side_q_I
  side_of = _sides(visibility, block, axes)

  def step(carry, t):
    kv_BSKX, sums_I = carry
    coming_BSKX = _pass_on(kv_BSKX, axes)
    keys = *blocks.cut_heads(K, block, kv_BSKX[..., :H], kv_BSKX[..., H:]), side_of(t)
    return (coming_BSKX, blocks.meet(score, bias_params, visibility, queries, keys, sums_I)), None

  kv_BSKX = jnp.concatenate([k_BSKH, v_BSKH], axis=-1)
  (_, sums_I), _ = jax.lax.scan(step, (kv_BSKX, blocks.no_sums(queries[0], v_BSKH.shape[-1])),
                                jnp.arange(jax.lax.axis_size(axes)))
  out_BTNH, lse_IBKX1, lse_BTN1 = blocks.settle(sums_I, q_BTNH)
  return (out_BTNH, lse_BTN1), (q_BTNH, k_BSKH, v_BSKH, bias_params, visibility, out_BTNH, lse_IBKX1)


def _backward(score, block, axes, saved, grads):
  q_BTNH, k_BSKH, v_BSKH, bias_params, visibility, out_BTNH, lse_IBKX1 = saved
  K, S, H = k_BSKH.shape[2], k_BSKH.shape[1], k_BSKH.shape[3]
  side_q_I, _ = blocks.cut_sides(visibility, block)
  queries = (*blocks.cut_heads(K, block, q_BTNH, *kernels.from_above(out_BTNH, *grads)), lse_IBKX1, side_q_I)
  side_of = _sides(visibility, block, axes)

  def step(carry, t):
    kv_BSKX, dkv_BSKX, before = carry
    # Gradients follow their keys a step behind, so that neither message waits for this step's products.
    coming_BSKX, dkv_BSKX = _pass_on(kv_BSKX, axes), _pass_on(dkv_BSKX, axes)
    keys = *blocks.cut_heads(K, block, kv_BSKX[..., :H], kv_BSKX[..., H:]), side_of(t)
    before, (dk_JBKSH, dv_JBKSH) = blocks.meet_again(score, bias_params, visibility, queries, keys, before)
    here_BSKX = jnp.concatenate([blocks.join_heads(dx, S, K) for dx in (dk_JBKSH, dv_JBKSH)], axis=-1)
    return (coming_BSKX, dkv_BSKX + here_BSKX, before), None

  kv_BSKX = jnp.concatenate([k_BSKH, v_BSKH], axis=-1)
  start = kv_BSKX, kernels.zeros_like(kv_BSKX), blocks.nothing(queries[0], bias_params)
  (_, dkv_BSKX, (dq_IBKXH, dparams)), _ = jax.lax.scan(step, start, jnp.arange(jax.lax.axis_size(axes)))
  dkv_BSKX = _pass_on(dkv_BSKX, axes)  # home
  no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), visibility)
  return (blocks.join_heads(dq_IBKXH, *q_BTNH.shape[1:3]).astype(q_BTNH.dtype),
          dkv_BSKX[..., :H].astype(k_BSKH.dtype), dkv_BSKX[..., H:].astype(v_BSKH.dtype), dparams, no_gradient)


_ring.defvjp(_forward, _backward)


def _pass_on(x: Array, axes: tuple[str, ...]) -> Array:
  """What the device before has."""
  n = jax.lax.axis_size(axes)
  return jax.lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])


def _sides(visibility: Visibility, block: int, axes: tuple[str, ...]) -> Callable[[Array], dict[str, Array]]:
  """Step t -> the integers, in blocks, of the keys that are here then."""
  n, S = jax.lax.axis_size(axes), visibility.order_k_BS.shape[1]
  all_BS = {key: jax.lax.all_gather(getattr(visibility, key), axes, axis=1, tiled=True) for key in kernels.KEY_SIDE}
  here = lambda t: (jax.lax.axis_index(axes) - t) % n * S
  return lambda t: {key: blocks.cut(jax.lax.dynamic_slice_in_dim(x, here(t), S, axis=1), block)
                    for key, x in all_BS.items()}


def balanced(batch: dict[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
  """A causal batch with its columns in another order, so that each of `parts` devices has as much to look at.

  Device i gets the i-th stretch of columns from the beginning and the i-th from the end. Which column a token had is
  told by `slots`. The source of an encoder-decoder, which all see, stays as it is.

  Args:
    batch: arrays [B, T, ...]; T a multiple of 2 · parts.
  """
  T = batch['tokens'].shape[1]
  stretches = np.arange(T, dtype=np.int32).reshape(2 * parts, -1)
  columns = np.concatenate([stretches[j] for i in range(parts) for j in (i, 2 * parts - 1 - i)])
  turn = lambda key, x: x[:, columns] if x.ndim > 1 and not key.startswith('source_') else x
  slots = np.broadcast_to(np.arange(T, dtype=np.int32), batch['tokens'].shape)
  return {key: turn(key, x) for key, x in (batch | {'slots': slots}).items()}


AUTO = 'auto'           # `fitting`
FEW_SCORES = 1024 ** 2  # of a head: up to here dense was faster on a CPU, 1.2 times at 1,024 tokens and 0.9 at 4,096
KERNELS = {'dense': kernels.dense, 'blockwise': blocks.blockwise, 'ring': ring, 'cudnn': cudnn}
