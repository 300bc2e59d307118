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


def settled(sums: tuple[Array, Array, Array]) -> tuple[Array, Array]:
  """(the mean of values, log sum exp of scores; both 0 where nothing is seen), float32, of `encounter`'s sums."""
  out, top, total = sums
  sees = top > MASKED
  total = jnp.where(sees, total, 1)
  return jnp.where(sees, out / total, 0), jnp.where(sees, top + jnp.log(total), 0)


def from_above(out_BTNH: Array, grad_BTNH: Array, grad_lse_BTN1: Array) -> tuple[Array, Array]:
  """(the gradient of the output; float32 [B, T, N, 1], what the softmax's gradient subtracts from it times a value).

  That is the sum over keys of probability times its gradient = out times its gradient; and the gradient of log sum exp
  by a score is its probability.
  """
  mean_BTN1 = (out_BTNH.astype(jnp.float32) * grad_BTNH.astype(jnp.float32)).sum(-1, keepdims=True)
  return grad_BTNH, mean_BTN1 - grad_lse_BTN1


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
    others[1:] = [jnp.pad(dx_BKSH, ((0, 0), (0, 0), (0, later), (0, 0))) if later else dx_BKSH
                  for dx_BKSH in others[1:]]
    total = others if total is None else jax.tree.map(jnp.add, total, others)
  dparams, dk_BKSH, dv_BKSH = total
  tokens = lambda x_BKSH, like: tokens_of(x_BKSH, like.shape[2]).astype(like.dtype)
  no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), visibility)
  return (jnp.concatenate(dq, axis=1).astype(q_BTNH.dtype), tokens(dk_BKSH, k_BSKH), tokens(dv_BKSH, v_BSKH), dparams,
          no_gradient)


whole.defvjp(whole_forward, whole_backward)
