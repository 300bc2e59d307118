"""Visibility and attention: the one rule that says who sees whom, and the kernels that evaluate it.

Query q sees key k iff `order[k] <= order[q]`, both lie in the same segment, and k is inside q's window. Segment 0 is
padding: nobody sees it, and it sees nobody. A query that sees nothing returns zeros.

A kernel either equals `dense` or raises `UnsupportedAttention`; it never quietly computes something else.
"""
from typing import Any, Callable

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.types import Array, JaxlmError, Tree

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
    strict: order_k < max(order_q, 1) instead of order_k <= order_q: XLNet's query stream, which must not see its token.
    mode: 'full' (everything of the segment: order is not read), 'causal' (order agrees with time) or 'order'.
  """
  order_q_BT: Array
  order_k_BS: Array
  segment_q_BT: Array
  segment_k_BS: Array
  position_q_BT: Array
  position_k_BS: Array
  window: Array | int | None = None
  strict: bool = flax.struct.field(pytree_node=False, default=False)
  mode: str = flax.struct.field(pytree_node=False, default='causal')


@flax.struct.dataclass
class Bias:
  """What is added to scores before the softmax: ALiBi, relative position buckets.

  Attributes:
    fn: (params, position_q_BT, position_k_BS) -> float32 [B or 1, N, T, S]. Called on whole arrays and on blocks of
      them, so it reads positions only; it must not close over traced arrays.
    params: what gradients flow to.
  """
  fn: Callable[[Tree, Array, Array], Array] = flax.struct.field(pytree_node=False)
  params: Tree = flax.struct.field(default_factory=dict)


def is_limit(window: Any) -> bool:
  """Whether a window can hide anything; a traced one may."""
  return window is not None and not (isinstance(window, int) and window >= NO_WINDOW)


def visible(v: Visibility) -> Array:
  """bool [B, T, S]: which key each query sees. The rule itself, for whole arrays and for blocks of them."""
  segment_k_B1S = v.segment_k_BS[:, None, :]
  seen_BTS = (v.segment_q_BT[:, :, None] == segment_k_B1S) & (segment_k_B1S != 0)
  if v.mode != 'full':
    order_k_B1S = v.order_k_BS[:, None, :]
    seen_BTS &= (order_k_B1S < jnp.maximum(v.order_q_BT, 1)[:, :, None] if v.strict
                 else order_k_B1S <= v.order_q_BT[:, :, None])
  if is_limit(v.window):
    back_BTS = v.position_q_BT[:, :, None] - v.position_k_BS[:, None, :]
    seen_BTS &= (jnp.abs(back_BTS) if v.mode == 'full' else back_BTS) < v.window
  return seen_BTS


def dense(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, *, scale: float, softcap: float = 0.0,
          bias: Bias | None = None, dropout: Callable[[Array], Array] | None = None, block: int = 512) -> Array:
  """Attention that holds every score: the reference, and the fastest at short lengths.

  Args:
    q_BTNH, k_BSKH, v_BSKH: query head n reads kv head n // (N / K).
    visibility: who sees whom.
    scale: scores = scale * q·k, in float32.
    softcap: scores = softcap * tanh(scores / softcap); 0 leaves them.
    bias: added to the capped scores.
    dropout: float32 probabilities [B, N, T, S] -> the same, some of them dropped.
    block: not read; kernels share one signature.
  Returns:
    [B, T, N, H] in q's dtype.
  """
  del block
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  # Query heads of one kv head become rows of one matrix: 4-D operands, heads before tokens. With five dimensions, or
  # tokens before heads, XLA on a CPU transposes the scores.
  q_BKXH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
  k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
  score_BKXS = jnp.einsum('BKXH,BKSH->BKXS', q_BKXH, k_BKSH, preferred_element_type=jnp.float32) * scale
  score_BNTS = score_BKXS.reshape(B, N, T, S)
  if softcap:
    score_BNTS = softcap * jnp.tanh(score_BNTS / softcap)
  if bias is not None:
    score_BNTS += bias.fn(bias.params, visibility.position_q_BT, visibility.position_k_BS)
  seen_BTS = visible(visibility)
  score_BNTS = jnp.where(seen_BTS[:, None], score_BNTS, MASKED)
  # The shift leaves the result as it is, so it needs no gradient; dividing the output, not the scores, saves a pass.
  weight_BNTS = jnp.exp(score_BNTS - jax.lax.stop_gradient(score_BNTS.max(-1, keepdims=True)))
  total_BNT1 = weight_BNTS.sum(-1, keepdims=True)
  if dropout is not None:
    weight_BNTS, total_BNT1 = dropout(weight_BNTS / total_BNT1), jnp.ones_like(total_BNT1)
  weight_BKXS = weight_BNTS.reshape(score_BKXS.shape).astype(v_BKSH.dtype)
  out_BKXH = jnp.einsum('BKXS,BKSH->BKXH', weight_BKXS, v_BKSH, preferred_element_type=jnp.float32)
  out_BTNH = (out_BKXH.reshape(B, N, T, H) / total_BNT1).transpose(0, 2, 1, 3)
  return jnp.where(seen_BTS.any(-1)[:, :, None, None], out_BTNH, 0).astype(q_BTNH.dtype)


KERNELS = {'dense': dense}
