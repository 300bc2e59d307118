"""The one attention layer: projections, positions, cache, and a kernel chosen by name."""
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.lookup import lookup
from jaxlm.models.config import ModelConfig
from jaxlm.models.kernels import KERNELS, Bias, Visibility
from jaxlm.models.layers import Dense, Norm, dropout
from jaxlm.models.positions import alibi_bias, alibi_slopes, apply_rope
from jaxlm.sharding import Layout
from jaxlm.types import Array

ATTENTION_SITE = 0  # of dropout; transformer.py numbers the others


@flax.struct.dataclass
class Tokens:
  """What visibility and positions need to know of each token, int32 [B, T] each.

  Attributes:
    order: when it is produced; 0: context.
    segments: its document, from 1; 0: padding, or a cache slot not yet written.
    positions: its place in the document.
  """
  order: Array
  segments: Array
  positions: Array


@flax.struct.dataclass
class LayerCache:
  """Keys and values seen so far, with what is known of their tokens.

  A slot is a token's position modulo the number of slots: a cache of at least the whole length keeps all, a smaller
  one is a ring that keeps the last window. Slots never written have segment 0, which nobody sees.
  """
  k: Array        # [B, S, K, H]
  v: Array        # [B, S, K, H]
  tokens: Tokens  # [B, S] each


def init_cache(config: ModelConfig, batch: int, length: int) -> list[LayerCache]:
  """An empty cache: an array a layer, `length` slots, fewer where the layer's window is shorter.

  Args:
    batch: rows.
    length: tokens a row may reach, prompt and continuation.
  """
  attention = config.attention
  zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)
  caches = []
  for layer in range(config.num_layers):
    slots = min(length, config.window(layer) or length)
    kv = jnp.zeros((batch, slots, attention.num_kv_heads, attention.head_dim), config.dtype)
    caches.append(LayerCache(kv, jnp.copy(kv), Tokens(zeros(slots), zeros(slots), zeros(slots))))
  return caches


def _write(cache: LayerCache, k_BTKH: Array, v_BTKH: Array, tokens: Tokens) -> LayerCache:
  """The cache with new tokens in their slots; padding, and what a ring would overwrite at once, is dropped."""
  slots = cache.k.shape[1]
  last_B1 = jnp.where(tokens.segments > 0, tokens.positions, -1).max(axis=1, keepdims=True)
  kept_BT = (tokens.segments > 0) & (tokens.positions > last_B1 - slots)
  slot_BT = jnp.where(kept_BT, tokens.positions % slots, slots)
  rows_B1 = jnp.arange(cache.k.shape[0])[:, None]
  put = lambda old, new: old.at[rows_B1, slot_BT].set(new.astype(old.dtype), mode='drop')
  return LayerCache(put(cache.k, k_BTKH), put(cache.v, v_BTKH), jax.tree.map(put, cache.tokens, tokens))


def _extend(cache: LayerCache, k_BTKH: Array, v_BTKH: Array, tokens: Tokens,
            window: int) -> tuple[LayerCache, Array, Array, Tokens]:
  """(the new cache, then the keys, values and their tokens that this call's queries look at)."""
  new = _write(cache, k_BTKH, v_BTKH, tokens)
  # A ring may drop what an early query of this call still sees, so then old and new stand side by side.
  if tokens.positions.shape[1] == 1 or not window or tokens.positions.shape[1] + window - 1 <= cache.k.shape[1]:
    return new, new.k, new.v, new.tokens
  join = lambda old, fresh: jnp.concatenate([old, fresh.astype(old.dtype)], axis=1)
  return new, join(cache.k, k_BTKH), join(cache.v, v_BTKH), jax.tree.map(join, cache.tokens, tokens)


class Attention(nn.Module):
  """Multi-head attention, grouped where there are fewer key than query heads (Ainslie et al. 2023)."""
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, tokens: Tokens, rope: tuple[Array, Array] | None, window: Any,
               keys_B: Array | None, cache: LayerCache | None) -> tuple[Array, LayerCache | None]:
    """Args:
      x_BTD: queries are made of it, and keys and values.
      tokens: of x.
      rope: tables for x's positions, or None.
      window: tokens seen back; an int or an int32 scalar; None: all.
      keys_B: dropout keys of this layer, or None.
      cache: of this layer, or None.
    """
    config, attention = self.config, self.config.attention
    project = lambda heads, axis, name: Dense(config, (heads, attention.head_dim), ('embed', axis, 'head_dim'),
                                              bias=attention.bias, name=name)(x_BTD)
    q_BTNH = project(attention.num_heads, 'heads', 'query')
    k_BTKH = project(attention.num_kv_heads, 'kv_heads', 'key')
    v_BTKH = project(attention.num_kv_heads, 'kv_heads', 'value')
    if attention.qk_norm == 'head':
      q_BTNH = Norm(config, 'head_dim', name='query_norm')(q_BTNH)
      k_BTKH = Norm(config, 'head_dim', name='key_norm')(k_BTKH)
    if rope is not None:
      q_BTNH, k_BTKH = apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope)
    q_BTNH = self.layout.constrain(q_BTNH, 'act_batch', 'act_length', 'act_heads', None)

    k_BSKH, v_BSKH, seen = k_BTKH, v_BTKH, tokens
    if cache is not None:
      cache, k_BSKH, v_BSKH, seen = _extend(cache, k_BTKH, v_BTKH, tokens, window or 0)
    bias = None
    if config.positions.kind == 'alibi':
      bias = Bias(alibi_bias, jnp.asarray(alibi_slopes(attention.num_heads)))
    visibility = Visibility(tokens.order, seen.order, tokens.segments, seen.segments, tokens.positions,
                            seen.positions, window, mode=config.visibility)
    drop = None
    if keys_B is not None and attention.dropout:
      drop = lambda probs: dropout(probs, attention.dropout, keys_B, ATTENTION_SITE)
    if self.is_mutable_collection('attention'):  # somebody asked to see the probabilities
      drop = lambda probs: (self.sow('attention', 'probs', probs), probs)[1]
    kernel = lookup(KERNELS, attention.kernel, 'attention kernel')
    out_BTNH = kernel(q_BTNH, k_BSKH, v_BSKH, visibility, scale=attention.scale or attention.head_dim ** -0.5,
                      softcap=attention.softcap, bias=bias, dropout=drop, block=attention.block)
    out_BTNH = checkpoint_name(out_BTNH, 'attention_out')
    out_BTD = Dense(config, (config.width,), ('heads', 'head_dim', 'embed'), num_inputs=2, bias=attention.out_bias,
                    residual=True, name='out')(out_BTNH)
    return out_BTD, cache
