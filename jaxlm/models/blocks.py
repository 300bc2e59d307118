"""Attention in blocks: `dense` in memory linear in the lengths. i numbers blocks of queries, j blocks of keys."""
import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.kernels import (KEY_SIDE, MASKED, NO_WINDOW, QUERY_SIDE, Bias, Score, UnsupportedAttention,
                                  Visibility, around, encounter, encounter_again, from_above, rows_of, settled,
                                  tokens_of, zeros_like)
from jaxlm.types import Array, Tree


def blockwise(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, *, scale: float,
              softcap: float = 0.0, bias: Bias | None = None, sink_N: Array | None = None,
              dropout: Callable[[Array], Array] | None = None, block: int = 512) -> Array:
  """`dense` in memory linear in the lengths: blocks of queries meet blocks of keys, forward and again backward.

  A pair of blocks meets only where some row of the batch has a query that may see a key there, judged from the ranges
  of order, segment and position in each block; no array need be monotone. A loop visits just those pairs (a `cond` in
  a loop over all of them took 1.9 times as long at T = 8,192 with a window of 256). Forward-mode differentiation is
  not defined. Remat policies can name 'attention_out' and 'attention_lse'; saved, they spare a second forward pass.

  Args: as `dense`; scale and softcap are Python floats.
    block: tokens in a block, at most; lengths are cut evenly, then padded.
  Raises:
    UnsupportedAttention: with dropout, whose probabilities are never all there; with a bias for whole arrays only.
  Source: Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
  """
  return by_blocks(functools.partial(flash, Score(scale, softcap, bias.fn if bias else None), block), 'blockwise',
                   q_BTNH, k_BSKH, v_BSKH, visibility, bias, sink_N, dropout)


def by_blocks(run: Callable[..., tuple[Array, Array]], name: str, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array,
              visibility: Visibility, bias: Bias | None, sink_N: Array | None,
              dropout: Callable[[Array], Array] | None) -> Array:
  """What surrounds `flash` and its like, `run`: refusals, arrays of full batch size, the sink."""
  if dropout is not None:
    raise UnsupportedAttention(f'Attention kernel {name} cannot drop probabilities; '
                               'set config.model.attention.dropout=0.0, or config.model.attention.kernel=dense.')
  if bias is not None and bias.whole:
    raise UnsupportedAttention(f'Attention kernel {name} cannot add scores that depend on the query; '
                               'set config.model.attention.kernel=dense.')
  return around(run, q_BTNH, k_BSKH, v_BSKH, visibility, bias, sink_N)


def cut(x_BT: Array, block: int) -> Array:
  """[B, T, ...] as [I, B, block or less, ...], padded with zeros: padding's segment is 0."""
  B, T, *rest = x_BT.shape
  num_blocks = -(-T // block)
  size = -(-T // num_blocks)
  x_BT = jnp.pad(x_BT, [(0, 0), (0, num_blocks * size - T)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(x_BT.reshape(B, num_blocks, size, *rest), 1, 0)


def join(x_IBT: Array, length: int) -> Array:
  """Undoes `cut`."""
  x_BIT = jnp.moveaxis(x_IBT, 0, 1)
  return x_BIT.reshape(x_BIT.shape[0], -1, *x_BIT.shape[3:])[:, :length]


def cut_sides(v: Visibility, block: int) -> tuple[dict[str, Array], dict[str, Array]]:
  """The integers of each block of queries and of each block of keys; a pair of them completes a Visibility."""
  return tuple({name: cut(getattr(v, name), block) for name in side} for side in (QUERY_SIDE, KEY_SIDE))


def may_meet(v: Visibility, side_q: dict[str, Array], side_k: dict[str, Array]) -> Array:
  """bool [I, J]: False only where no query of block i sees a key of block j, in any row of the batch."""
  far = NO_WINDOW - 1  # above any order, segment and position, and 2 * far is still an int32

  def ranges(side, segment):
    real = side[segment] != 0
    return [(jnp.where(real, x, far).min(-1), jnp.where(real, x, -far).max(-1)) for x in side.values()]

  (first_q, last_q), (low_q, high_q), (left_q, right_q) = ranges(side_q, 'segment_q_BT')
  (first_k, _), (low_k, high_k), (left_k, right_k) = ranges(side_k, 'segment_k_BS')
  meet_IJB = (low_q[:, None] <= high_k) & (low_k <= high_q[:, None])
  if v.mode != 'full':
    meet_IJB &= first_k <= last_q[:, None]
  if v.window is not None:
    meet_IJB &= left_q[:, None] - right_k < v.window
    if v.mode == 'full':
      meet_IJB &= left_k - right_q[:, None] < v.window
  return meet_IJB.any(-1)


def true_first(meets_IJ: Array) -> tuple[Array, Array]:
  """For each row, how many are True, and the column numbers, those first."""
  return meets_IJ.sum(-1), jnp.argsort(~meets_IJ, axis=-1, stable=True)


def pick(blocks: Tree, i: Array) -> Tree:
  """Block i of every array."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash(score, block, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility):
  """`blockwise` with all that is static in front and every array of `visibility` of full batch size.

  Returns (out [B, T, N, H], log of the sum of exp(scores) [B, T, N, 1], 0 where nothing is seen).
  """
  return flash_forward(score, block, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility)[0]


def flash_forward(score, block, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility):
  side_q_I, side_k_J = cut_sides(visibility, block)
  q_IBKXH, k_JBKSH, v_JBKSH = cut_heads(k_BSKH.shape[2], block, q_BTNH, k_BSKH, v_BSKH)
  sums_I = meet(score, bias_params, visibility, (q_IBKXH, side_q_I), (k_JBKSH, v_JBKSH, side_k_J))
  out_BTNH, lse_IBKX1, lse_BTN1 = settle(sums_I, q_BTNH)
  return (out_BTNH, lse_BTN1), (q_BTNH, k_BSKH, v_BSKH, bias_params, visibility, out_BTNH, lse_IBKX1)


def flash_backward(score, block, saved, grads):
  q_BTNH, k_BSKH, v_BSKH, bias_params, visibility, out_BTNH, lse_IBKX1 = saved
  side_q_I, side_k_J = cut_sides(visibility, block)
  queries = (*cut_heads(k_BSKH.shape[2], block, q_BTNH, *from_above(out_BTNH, *grads)), lse_IBKX1, side_q_I)
  keys = (*cut_heads(k_BSKH.shape[2], block, k_BSKH, v_BSKH), side_k_J)
  (dq_IBKXH, dparams), (dk_JBKSH, dv_JBKSH) = meet_again(score, bias_params, visibility, queries, keys,
                                                         nothing(queries[0], bias_params))
  whole = lambda x_IBKXH, like: join_heads(x_IBKXH, *like.shape[1:3]).astype(like.dtype)
  no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), visibility)
  return whole(dq_IBKXH, q_BTNH), whole(dk_JBKSH, k_BSKH), whole(dv_JBKSH, v_BSKH), dparams, no_gradient


def cut_heads(K: int, block: int, *arrays: Array) -> tuple[Array, ...]:
  """[B, T, N, H] each, as blocks of rows [I, B, K, X, H]."""
  return tuple(jax.vmap(lambda x: rows_of(x, K))(cut(x, block)) for x in arrays)


def join_heads(x_IBKXH: Array, length: int, N: int) -> Array:
  """Undoes `cut_heads`: [B, T, N, H]."""
  return join(jax.vmap(lambda x: tokens_of(x, N))(x_IBKXH), length)


def meet(score: Score, bias_params: Tree, visibility: Visibility, queries: Tree, keys: Tree,
         sums_I: tuple[Array, Array, Array] | None = None) -> tuple[Array, Array, Array]:
  """Each block of queries meets its blocks of keys.

  Args:
    queries: (q [I, B, K, X, H], integers of each block).
    keys: (k, v [J, B, K, S, H], integers).
    sums_I: of the keys met before: the weighted sum of values, the top score and the sum of weights, float32
      [I, B, K, X, H or 1]; None: none was.
  Returns:
    The sums, these keys included.
  """
  (_, side_q_I), (_, v_JBKSH, side_k_J) = queries, keys

  def one(_, q_block):
    (q_BKXH, side_q), num, seen_J, sums = q_block

    def met(n, sums):
      out_BKXH, top_BKX1, total_BKX1 = sums
      k_BKSH, v_BKSH, side_k = pick(keys, seen_J[n])
      more_BKXH, new_top_BKX1, more_BKX1 = encounter(score, bias_params, visibility.replace(**side_q, **side_k), q_BKXH,
                                                     k_BKSH, v_BKSH, top_BKX1)
      # Until a query has seen its first key its weights are exp(0): this factor is then exactly 0 and forgets them.
      keep_BKX1 = jnp.exp(top_BKX1 - new_top_BKX1)
      return keep_BKX1 * out_BKXH + more_BKXH, new_top_BKX1, keep_BKX1 * total_BKX1 + more_BKX1

    sums = no_sums(q_BKXH, v_JBKSH.shape[-1]) if sums is None else sums
    return None, jax.lax.fori_loop(0, num, met, sums)

  meets_IJ = may_meet(visibility, side_q_I, side_k_J)
  return jax.lax.scan(one, None, (queries, *true_first(meets_IJ), sums_I))[1]


def no_sums(q: Array, value_dim: int) -> tuple[Array, Array, Array]:
  """What `meet` carries before the first key."""
  zero = zeros_like(q[..., :1])
  return jnp.broadcast_to(zero, (*q.shape[:-1], value_dim)), zero + MASKED, zero


def settle(sums_I: tuple[Array, Array, Array], q_BTNH: Array) -> tuple[Array, Array, Array]:
  """(out [B, T, N, H]; log sum exp of scores, in blocks and [B, T, N, 1], 0 where nothing is seen)."""
  out_IBKXH, lse_IBKX1 = settled(sums_I)
  lse_IBKX1 = checkpoint_name(lse_IBKX1, 'attention_lse')
  out_BTNH = checkpoint_name(join_heads(out_IBKXH.astype(q_BTNH.dtype), *q_BTNH.shape[1:3]), 'attention_out')
  return out_BTNH, lse_IBKX1, join_heads(lse_IBKX1, *q_BTNH.shape[1:3])


def nothing(q_IBKXH: Array, bias_params: Tree) -> tuple[Array, Tree]:
  """Gradients of queries and of a bias before the first key."""
  return zeros_like(q_IBKXH), jax.tree.map(jnp.zeros_like, bias_params)


def meet_again(score: Score, bias_params: Tree, visibility: Visibility, queries: Tree, keys: Tree,
               before: tuple[Array, Tree]) -> tuple[tuple[Array, Tree], tuple[Array, Array]]:
  """Each block of keys meets its blocks of queries again and adds to their gradients in place.

  Args:
    queries: (q [I, B, K, X, H], the two of `from_above`, log sum exp, integers) of each block.
    keys: (k, v [J, B, K, S, H], integers).
    before: gradients of queries and of a bias so far, float32.
  Returns:
    (those, these keys included; gradients of the keys and values, float32 [J, B, K, S, H]).
  """
  (*_, side_q_I), (*_, side_k_J) = queries, keys

  def one(carry, k_block):
    (k_BKSH, v_BKSH, side_k), num, seen_by_I = k_block

    def met(n, sums):
      dq_IBKXH, dparams, dk_BKSH, dv_BKSH = sums
      i = seen_by_I[n]
      *of_query, side_q = pick(queries, i)
      here = encounter_again(score, bias_params, visibility.replace(**side_q, **side_k), of_query, k_BKSH, v_BKSH)
      return dq_IBKXH.at[i].add(here[0]), *jax.tree.map(jnp.add, (dparams, dk_BKSH, dv_BKSH), here[1:])

    *carry, dk_BKSH, dv_BKSH = jax.lax.fori_loop(0, num, met, (*carry, zeros_like(k_BKSH), zeros_like(v_BKSH)))
    return tuple(carry), (dk_BKSH, dv_BKSH)

  meets_JI = may_meet(visibility, side_q_I, side_k_J).T
  return jax.lax.scan(one, before, (keys, *true_first(meets_JI)))


flash.defvjp(flash_forward, flash_backward)
