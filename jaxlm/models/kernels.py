"""Visibility and attention: the one rule that says who sees whom, and the kernels that evaluate it.

Query q sees key k iff `order[k] <= order[q]`, both lie in the same segment, and k is inside q's window. Segment 0 is
padding: nobody sees it, and it sees nobody. A query that sees nothing returns zeros.

A kernel either equals `dense` or raises `UnsupportedAttention`; it never quietly computes something else.
"""
import dataclasses
import functools
from typing import Any, Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import JaxlmError
from jaxlm.types import Array, Tree

NO_WINDOW = 1 << 30  # a window at least this wide is no limit: what a layer without one scans as its integer
MASKED = -1e30       # a score no key has: finite, so a row of them has a maximum, and exp(MASKED - score) is exactly 0


class UnsupportedAttention(JaxlmError):
  """A kernel cannot compute exactly what was asked."""


@flax.struct.dataclass
class Visibility:
  """Who may see whom, by three integers a token.

  Attributes:
    order_q_BT, order_k_BS: when a token is produced; 0 is context that everyone sees. B may be 1 in any of the arrays.
    segment_q_BT, segment_k_BS: which document a token belongs to, from 1; 0 is padding.
    position_q_BT, position_k_BS: place of a token in its document, at least 0; what a window and a bias count in.
    window: tokens seen back, the query itself included; two-sided where mode is 'full'. Python int, int32 scalar
      (traced, so that layers scan over it) or None; None or at least `NO_WINDOW` is no limit.
    mode: 'full' (everything of the segment: order is not read), 'causal' (order agrees with time) or 'order'.
    in_order: queries and keys are the same columns, and none sees a later one: a kernel need not look there.
  """
  order_q_BT: Array
  order_k_BS: Array
  segment_q_BT: Array
  segment_k_BS: Array
  position_q_BT: Array
  position_k_BS: Array
  window: Array | int | None = None
  mode: str = flax.struct.field(pytree_node=False, default='causal')
  in_order: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Bias:
  """What is added to scores before the softmax: ALiBi, relative position buckets.

  Attributes:
    fn: (params, position_q_BT, position_k_BS) -> float32 [B or 1, N, T, S]. Called on whole arrays and on blocks of
      them, so it reads positions only; it must not close over traced arrays.
    params: what gradients flow to.
    axes: logical axes of each leaf of params.
    whole: params are laid out by query and key, so `fn` can be called on whole arrays only (XLNet's relative scores,
      which depend on the query).
  """
  fn: Callable[[Tree, Array, Array], Array] = flax.struct.field(pytree_node=False)
  params: Tree = flax.struct.field(default_factory=dict)
  axes: tuple[tuple[str | None, ...], ...] = flax.struct.field(pytree_node=False, default=())
  whole: bool = flax.struct.field(pytree_node=False, default=False)


def is_limit(window: Any) -> bool:
  """Whether a window can hide anything; a traced one may."""
  return window is not None and not (isinstance(window, int) and window >= NO_WINDOW)


def visible(v: Visibility) -> Array:
  """bool [B, T, S]: which key each query sees. The rule itself, for whole arrays and for blocks of them."""
  segment_k_B1S = v.segment_k_BS[:, None, :]
  seen_BTS = (v.segment_q_BT[:, :, None] == segment_k_B1S) & (segment_k_B1S != 0)
  if v.mode != 'full':
    seen_BTS &= v.order_k_BS[:, None, :] <= v.order_q_BT[:, :, None]
  if is_limit(v.window):
    back_BTS = v.position_q_BT[:, :, None] - v.position_k_BS[:, None, :]
    seen_BTS &= (jnp.abs(back_BTS) if v.mode == 'full' else back_BTS) < v.window
  return seen_BTS


@dataclasses.dataclass(frozen=True)
class Score:
  """What q·k becomes for the softmax: softcap * tanh(scale * q·k / softcap) + bias; MASKED where q does not see k."""
  scale: float
  softcap: float
  bias_fn: Callable[[Tree, Array, Array], Array] | None

  def __call__(self, dot_BKXS: Array, bias_params: Tree, v: Visibility) -> Array:
    B, K, X, S = dot_BKXS.shape
    T = v.position_q_BT.shape[1]
    score_BNTS = self.scale * dot_BKXS.reshape(B, K * X // T, T, S)
    if self.softcap:
      score_BNTS = self.softcap * jnp.tanh(score_BNTS / self.softcap)
    if self.bias_fn is not None:
      score_BNTS += self.bias_fn(bias_params, v.position_q_BT, v.position_k_BS)
    return jnp.where(visible(v)[:, None], score_BNTS, MASKED).reshape(dot_BKXS.shape)


# Operands have four dimensions, heads before tokens, and the G query heads of a kv head are rows X = G * T of one
# matrix. With tokens before heads, or G and T apart, XLA on a CPU transposes the scores: forward and backward at
# B=12, T=256, N=6, H=64 take 54 ms instead of 35 (jax.nn.dot_product_attention 52).
def rows_of(x_BTNH: Array, K: int) -> Array:
  """[B, T, N, H] as [B, K, X, H]; keys and values are the case N = K."""
  B, T, N, H = x_BTNH.shape
  return x_BTNH.transpose(0, 2, 1, 3).reshape(B, K, N // K * T, H)


def tokens_of(x_BKXH: Array, N: int) -> Array:
  """[B, K, X, H] as [B, T, N, H]."""
  B, _, _, H = x_BKXH.shape
  return x_BKXH.reshape(B, N, -1, H).transpose(0, 2, 1, 3)


# float32: products of bfloat16 are summed and returned in it.
multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
zeros_like = functools.partial(jnp.zeros_like, dtype=jnp.float32)


def dense(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, *, scale: float, softcap: float = 0.0,
          bias: Bias | None = None, sink_N: Array | None = None, dropout: Callable[[Array], Array] | None = None,
          block: int = 512) -> Array:
  """Attention that holds every score: the reference, and the fastest at short lengths.

  Args:
    q_BTNH, k_BSKH, v_BSKH: query head n reads kv head n // (N / K). Values may have another head dim than keys.
    visibility: who sees whom.
    scale: scores = scale * q·k; scores, their softmax and all sums are float32.
    softcap: scores = softcap * tanh(scores / softcap); 0 leaves them.
    bias: added to the capped scores; finite.
    sink_N: the score of a key that every query sees, whose value is 0 (Xiao et al. 2023, arXiv:2309.17453).
    dropout: float32 probabilities [B, N, T, S] -> the same, some of them dropped. (It may also just look at them.)
    block: not read; kernels share one signature.
  Returns:
    [B, T, N, H of v] in q's dtype.
  """
  del block
  score = Score(scale, softcap, bias.fn if bias else None)
  if dropout is None:
    pieces = min(MOST_PIECES, q_BTNH.shape[1] // PIECE) if visibility.in_order and not (bias and bias.whole) else 1
    return around(functools.partial(whole, score, max(pieces, 1)), q_BTNH, k_BSKH, v_BSKH, visibility, bias, sink_N)
  K, N, T = k_BSKH.shape[2], *q_BTNH.shape[2:0:-1]
  q_BKXH, k_BKSH, v_BKSH = (rows_of(x, K) for x in (q_BTNH, k_BSKH, v_BSKH))
  score_BKXS = score(multiply('BKXH,BKSH->BKXS', q_BKXH, k_BKSH), bias.params if bias else None, visibility)
  prob_BNTS = jax.nn.softmax(score_BKXS).reshape(-1, N, T, k_BSKH.shape[1])
  if sink_N is not None:
    lse_BNT1 = jax.nn.logsumexp(score_BKXS, axis=-1).reshape(-1, N, T, 1)
    prob_BNTS *= of_keys(lse_BNT1, sink_N.astype(jnp.float32)[:, None, None])
  prob_BKXS = dropout(prob_BNTS).reshape(score_BKXS.shape).astype(v_BKSH.dtype)
  out_BKXH = multiply('BKXS,BKSH->BKXH', prob_BKXS, v_BKSH)
  sees_BKX1 = jax.lax.stop_gradient(score_BKXS).max(-1, keepdims=True) > MASKED
  return checkpoint_name(tokens_of(jnp.where(sees_BKX1, out_BKXH, 0).astype(q_BTNH.dtype), N), 'attention_out')


def of_keys(lse: Array, sink: Array) -> Array:
  """What keys take where keys and a sink together take 1: log sum exp of scores against the sink's score."""
  return jax.nn.sigmoid(lse - sink)


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


def around(run: Callable[..., tuple[Array, Array]], q_BTNH: Array, k_BSKH: Array, v_BSKH: Array,
           visibility: Visibility, bias: Bias | None, sink_N: Array | None) -> Array:
  """What surrounds `whole` and `flash` and their like, `run`: arrays of full batch size, the sink."""
  batch = q_BTNH.shape[0]
  arrays = {name: jnp.broadcast_to(getattr(visibility, name), (batch, getattr(visibility, name).shape[1]))
            for name in QUERY_SIDE + KEY_SIDE}
  window = jnp.asarray(visibility.window, jnp.int32) if is_limit(visibility.window) else None
  out_BTNH, lse_BTN1 = run(q_BTNH, k_BSKH, v_BSKH, bias.params if bias else None,
                           visibility.replace(window=window, **arrays))
  if sink_N is None:
    return out_BTNH
  return (out_BTNH * of_keys(lse_BTN1, sink_N.astype(jnp.float32)[:, None])).astype(out_BTNH.dtype)


QUERY_SIDE = ('order_q_BT', 'segment_q_BT', 'position_q_BT')
KEY_SIDE = ('order_k_BS', 'segment_k_BS', 'position_k_BS')


def encounter(score: Score, bias_params: Tree, between: Visibility, q_BKXH: Array, k_BKSH: Array, v_BKSH: Array,
              top_BKX1: Array | float = MASKED) -> tuple[Array, Array, Array]:
  """(the weighted sum of values, the top score, the sum of weights) of queries that meet keys; float32.

  Args:
    between: integers of these queries and keys.
    top_BKX1: the top score of the keys met before.
  """
  score_BKXS = score(multiply('BKXH,BKSH->BKXS', q_BKXH, k_BKSH), bias_params, between)
  top_BKX1 = jnp.maximum(top_BKX1, score_BKXS.max(-1, keepdims=True))
  weight_BKXS = jnp.exp(score_BKXS - top_BKX1)
  return (multiply('BKXS,BKSH->BKXH', weight_BKXS.astype(v_BKSH.dtype), v_BKSH), top_BKX1,
          weight_BKXS.sum(-1, keepdims=True))


def encounter_again(score: Score, bias_params: Tree, between: Visibility, queries: tuple[Array, Array, Array, Array],
                    k_BKSH: Array, v_BKSH: Array) -> tuple[Array, Tree, Array, Array]:
  """Gradients of queries, bias, keys and values, float32.

  Args:
    queries: q [B, K, X, H], the two of `from_above`, log sum exp.
  """
  q_BKXH, grad_BKXH, mean_BKX1, lse_BKX1 = queries
  score_BKXS, pull = jax.vjp(lambda dot_BKXS, params: score(dot_BKXS, params, between),
                             multiply('BKXH,BKSH->BKXS', q_BKXH, k_BKSH), bias_params)
  prob_BKXS = jnp.exp(score_BKXS - lse_BKX1)
  dprob_BKXS = multiply('BKXH,BKSH->BKXS', grad_BKXH, v_BKSH)
  ddot_BKXS, dparams = pull(prob_BKXS * (dprob_BKXS - mean_BKX1))
  ddot_BKXS = ddot_BKXS.astype(k_BKSH.dtype)
  return (multiply('BKXS,BKSH->BKXH', ddot_BKXS, k_BKSH), dparams, multiply('BKXS,BKXH->BKSH', ddot_BKXS, q_BKXH),
          multiply('BKXS,BKXH->BKSH', prob_BKXS.astype(grad_BKXH.dtype), grad_BKXH))


# Of queries that meet only the keys up to them. Fewer columns make products of matrices that libraries multiply slower,
# more pieces longer programs.
PIECE, MOST_PIECES = 64, 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def whole(score, pieces, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility):
  """What `flash` returns, with all scores of a query at once. Scores are not kept, but formed again.

  Args:
    pieces: into how many the queries are cut, each of which meets the keys in columns up to its last.
  """
  return whole_forward(score, pieces, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility)[0]


def _pieces(pieces: int, visibility: Visibility) -> Iterator[tuple[slice, slice, Visibility]]:
  """(columns of the queries, of the keys, their integers) of each piece."""
  T, S = visibility.order_q_BT.shape[1], visibility.order_k_BS.shape[1]
  for i in range(pieces):
    queries, keys = slice(i * T // pieces, (i + 1) * T // pieces), slice(0, (i + 1) * S // pieces)
    yield queries, keys, visibility.replace(
        **{name: getattr(visibility, name)[:, columns] for side, columns in ((QUERY_SIDE, queries), (KEY_SIDE, keys))
           for name in side})


def whole_forward(score, pieces, q_BTNH, k_BSKH, v_BSKH, bias_params, visibility):
  rows = lambda x: rows_of(x, k_BSKH.shape[2])
  k_BKSH, v_BKSH, outs, lses = rows(k_BSKH), rows(v_BSKH), [], []
  for queries, keys, between in _pieces(pieces, visibility):
    sums = encounter(score, bias_params, between, rows(q_BTNH[:, queries]), k_BKSH[:, :, keys], v_BKSH[:, :, keys])
    out_BKXH, lse_BKX1 = settled(sums)
    outs.append(tokens_of(out_BKXH.astype(q_BTNH.dtype), q_BTNH.shape[2]))
    lses.append(tokens_of(lse_BKX1, q_BTNH.shape[2]))
  out_BTNH = checkpoint_name(jnp.concatenate(outs, axis=1), 'attention_out')
  lse_BTN1 = checkpoint_name(jnp.concatenate(lses, axis=1), 'attention_lse')
  return (out_BTNH, lse_BTN1), (q_BTNH, k_BSKH, v_BSKH, bias_params, visibility, out_BTNH, lse_BTN1)


def whole_backward(score, pieces, saved, grads):
  q_BTNH, k_BSKH, v_BSKH, bias_params, visibility, out_BTNH, lse_BTN1 = saved
  rows = lambda x: rows_of(x, k_BSKH.shape[2])
  k_BKSH, v_BKSH = rows(k_BSKH), rows(v_BSKH)
  of_queries, dq, total = (q_BTNH, *from_above(out_BTNH, *grads), lse_BTN1), [], None
  for queries, keys, between in _pieces(pieces, visibility):
    dq_BKXH, *others = encounter_again(score, bias_params, between, [rows(x[:, queries]) for x in of_queries],
                                       k_BKSH[:, :, keys], v_BKSH[:, :, keys])
    dq.append(tokens_of(dq_BKXH, q_BTNH.shape[2]))
    later = k_BSKH.shape[1] - keys.stop
    others[1:] = [jnp.pad(dx_BKSH, ((0, 0), (0, 0), (0, later), (0, 0))) if later else dx_BKSH for dx_BKSH in others[1:]]
    total = others if total is None else jax.tree.map(jnp.add, total, others)
  dparams, dk_BKSH, dv_BKSH = total
  tokens = lambda x_BKSH, like: tokens_of(x_BKSH, like.shape[2]).astype(like.dtype)
  no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), visibility)
  return (jnp.concatenate(dq, axis=1).astype(q_BTNH.dtype), tokens(dk_BKSH, k_BSKH), tokens(dv_BKSH, v_BSKH), dparams,
          no_gradient)


whole.defvjp(whole_forward, whole_backward)


# ---- what blockwise is made of: i numbers blocks of queries, j blocks of keys -------------------------------------


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


def settled(sums: tuple[Array, Array, Array]) -> tuple[Array, Array]:
  """(the mean of values, log sum exp of scores; both 0 where nothing is seen), float32, of `encounter`'s sums."""
  out, top, total = sums
  sees = top > MASKED
  total = jnp.where(sees, total, 1)
  return jnp.where(sees, out / total, 0), jnp.where(sees, top + jnp.log(total), 0)


def settle(sums_I: tuple[Array, Array, Array], q_BTNH: Array) -> tuple[Array, Array, Array]:
  """(out [B, T, N, H]; log sum exp of scores, in blocks and [B, T, N, 1], 0 where nothing is seen)."""
  out_IBKXH, lse_IBKX1 = settled(sums_I)
  lse_IBKX1 = checkpoint_name(lse_IBKX1, 'attention_lse')
  out_BTNH = checkpoint_name(join_heads(out_IBKXH.astype(q_BTNH.dtype), *q_BTNH.shape[1:3]), 'attention_out')
  return out_BTNH, lse_IBKX1, join_heads(lse_IBKX1, *q_BTNH.shape[1:3])


def from_above(out_BTNH: Array, grad_BTNH: Array, grad_lse_BTN1: Array) -> tuple[Array, Array]:
  """(the gradient of the output; float32 [B, T, N, 1], what the softmax's gradient subtracts from it times a value).

  That is the sum over keys of probability times its gradient = out times its gradient; and the gradient of log sum exp
  by a score is its probability.
  """
  mean_BTN1 = (out_BTNH.astype(jnp.float32) * grad_BTNH.astype(jnp.float32)).sum(-1, keepdims=True)
  return grad_BTNH, mean_BTN1 - grad_lse_BTN1


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
