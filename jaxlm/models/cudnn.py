"""Attention by cuDNN's fused kernel, on NVIDIA GPUs; it equals `dense` or refuses."""
from typing import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.kernels import Bias, UnsupportedAttention, Visibility, visible
from jaxlm.types import Array

IMPLEMENTATION = 'cudnn'
HEAD_DIM = 128  # all cards with the kernel take heads so wide


def refuses(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, softcap: float, bias: Bias | None, sink_N: Array | None,
            dropout: Callable[[Array], Array] | None) -> str:
  """What keeps the kernel from computing this exactly, and the remedy; '' where nothing does."""
  H, T, S = q_BTNH.shape[3], q_BTNH.shape[1], k_BSKH.shape[1]
  if softcap or sink_N is not None or dropout is not None or bias is not None:
    return 'has no softcap, sink, bias or dropout of probabilities; set config.model.attention.kernel=blockwise'
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    return f'multiplies bfloat16 or float16, not {q_BTNH.dtype}; set config.precision.compute=bfloat16'
  if H > HEAD_DIM or H % 8 or v_BSKH.shape[3] != H:
    return f'takes heads of a multiple of 8 up to {HEAD_DIM}, not {H}; set config.model.attention.kernel=blockwise'
  if T % 2 or S % 2:
    return f'takes rows of even length, not {T} and {S}; set config.model.attention.kernel=blockwise'
  return ''


def cudnn(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, *, scale: float, softcap: float = 0.0,
          bias: Bias | None = None, sink_N: Array | None = None, dropout: Callable[[Array], Array] | None = None,
          block: int = 512) -> Array:
  """`dense` by cuDNN. Documents, windows and padding are a mask; later columns that no query sees are skipped, too.

  Args: as `kernels.dense`; block is not read.
  Raises:
    UnsupportedAttention: what `refuses` says.
  """
  del block
  if why := refuses(q_BTNH, k_BSKH, v_BSKH, softcap, bias, sink_N, dropout):
    raise UnsupportedAttention(f'Attention kernel cudnn {why}.')
  seen_B1TS = visible(visibility)[:, None]
  out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=seen_B1TS, scale=scale,
                                          is_causal=visibility.in_order, implementation=IMPLEMENTATION)
  sees_BT11 = seen_B1TS.any(-1)[:, 0, :, None, None]
  return checkpoint_name(jnp.where(sees_BT11, out_BTNH, 0), 'attention_out')
