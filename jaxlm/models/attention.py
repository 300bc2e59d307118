"""The one attention layer: projections, positions, cache, and a kernel chosen by name."""
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models import peft, virtual
from jaxlm.models.config import ModelConfig
from jaxlm.models.kernels import NO_WINDOW, Bias, Visibility
from jaxlm.models.layers import Dense, Norm, dropout
from jaxlm.models.positions import Rotations, apply_rope, by_distance, distances
from jaxlm.models.ring import attend
from jaxlm.sharding import Layout
from jaxlm.types import Array

SCOPE = 'attend'  # in names of a compiled program's instructions: the kernel's
ATTENTION_SITE, CROSS_SITE = 0, 1  # of dropout; stack.py numbers the others


@flax.struct.dataclass
class Tokens:
  """What visibility and positions need to know of each token, int32 [B, T] each.

  Attributes:
    order: when it is produced; 0: context.
    segments: its document, from 1; 0: padding, or a cache slot not yet written.
    positions: its place in the document.
    types: which of two texts it belongs to.
  """
  order: Array
  segments: Array
  positions: Array
  types: Array

  def columns(self, start: int, stop: int | None) -> 'Tokens':
    return jax.tree.map(lambda x: x[:, start:stop], self)


@flax.struct.dataclass
class Memory:
  """What all layers with caches of as many slots share.

  Attributes:
    slot_BT: int32, where this call's tokens go; the number of slots: nowhere.
    before: of the tokens in the slots before this call, [B, S] each; slots never written have segment 0, which nobody
      sees.
    after: the same with this call's.
  """
  slot_BT: Array
  before: Tokens
  after: Tokens


def remember(before: Tokens, new: Tokens, column_BT: Array) -> Memory:
  """Tokens written in their slots; padding, and what a ring would overwrite at once, is dropped.

  Args:
    before: of the tokens in the slots [B, S].
    new: of those [B, T] that come, which stand at these columns of the text.
  """
  slots = before.order.shape[1]
  last_B1 = jnp.where(new.segments > 0, column_BT, -1).max(axis=1, keepdims=True)
  kept_BT = (new.segments > 0) & (column_BT > last_B1 - slots)
  slot_BT = jnp.where(kept_BT, column_BT % slots, slots)
  return Memory(slot_BT, before, jax.tree.map(lambda old, new: jax.vmap(_put)(old, new, slot_BT), before, new))


def _put(old: Array, new: Array, at: Any) -> Array:
  """An array with new elements at these places of its first dims; nothing at places that it does not have."""
  return old.at[at].set(new.astype(old.dtype), mode='drop')


@flax.struct.dataclass
class Context:
  """What all layers of one call share.

  Attributes:
    tokens: of all columns. The first `num_keys` are keys and queries, those after (XLNet's query stream) are queries
      alone; None: all are both.
    memory: by number of slots, of the layers whose caches have so many; None without caches.
    rotations: of queries and keys; None without rotary positions.
    local_rotations: of layers with a window, where they differ.
    bias: of scores, or None.
    keys_B: dropout keys, or None.
    source: (hidden [B, S, D], its tokens, its `virtual` or None) that cross-attention reads, hidden None where a cache
      holds what is made of it, if anything is; None without both.
    virtual: int32 [B, num_keys], which virtual token of a prefix stands there, below 0 where none; None: no prefix.
    prefix: [P, X], what layers make the prefix of; None: they have it.
  """
  tokens: Tokens
  memory: dict[int, Memory] | None = None
  rotations: Rotations | None = None
  local_rotations: Rotations | None = None
  bias: Bias | None = None
  keys_B: Array | None = None
  source: tuple[Array | None, Tokens, Array | None] | None = None
  virtual: Array | None = None
  prefix: Array | None = None
  num_keys: int | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def seen(self) -> Tokens:
    """Of the columns that are keys."""
    return self.tokens.columns(0, self.num_keys)

  def rotations_of(self, window: Any) -> Rotations | None:
    """Those of a layer; its window may be traced."""
    if self.local_rotations is None or window is None:
      return self.rotations
    return jax.tree.map(lambda far, near: jnp.where(window < NO_WINDOW, near, far), self.rotations,
                        self.local_rotations)


@flax.struct.dataclass
class LayerCache:
  """Keys and values seen so far; what is known of their tokens is shared by layers (`Memory`).

  A slot is a token's column in the text modulo the number of slots: a cache of at least the whole length keeps all, a
  smaller one is a ring that keeps the last window. Latent attention keeps its latents and the rotated key as `k`, and
  no values.
  """
  k: Array  # [B, K, S, H]: kernels read a head's keys one after the other
  v: Array  # [B, K, S, H]

  @property
  def slots(self) -> int:
    return self.k.shape[2]


def init_cache(config: ModelConfig, batch: int, slots: int) -> LayerCache:
  """An empty cache of one layer."""
  attention, latent = config.attention, config.attention.latent
  zeros = lambda K, H: jnp.zeros((batch, K, slots, H), config.dtype)
  k, v = zeros(attention.num_kv_heads, attention.head_dim), zeros(attention.num_kv_heads, attention.head_dim)
  if latent.kv_rank:
    k, v = zeros(1, latent.kv_rank + latent.rope_dim), zeros(1, 0)
  return LayerCache(k, v)


def no_tokens(batch: int, slots: int) -> Tokens:
  """Of slots that were never written."""
  return Tokens(*(jnp.zeros((batch, slots), jnp.int32) for _ in range(4)))


def _write(layout: Layout, cache: LayerCache, k_BTKH: Array, v_BTKH: Array, slot_BT: Array) -> LayerCache:
  """The cache with new keys and values in their slots."""
  # A row at a time: where rows are spread over devices, each writes its own; and a head at a time where heads are.
  # Where they are not, XLA on a CPU writes in place only if the head is an index as the slot is: a quarter of a
  # token's time.
  heads = jnp.arange(cache.k.shape[1])[:, None]
  put_heads = jax.vmap(jax.vmap(_put, (0, 0, None)) if layout.parts('kv_heads') > 1 else
                       lambda old, new, slot_T: _put(old, new, (heads, slot_T)))
  return LayerCache(put_heads(cache.k, _turned(k_BTKH), slot_BT), put_heads(cache.v, _turned(v_BTKH), slot_BT))


def _turned(x: Array) -> Array:
  """[B, T, K, H] as [B, K, T, H], and back."""
  return jnp.swapaxes(x, 1, 2)


def _extend(layout: Layout, cache: LayerCache, k_BTKH: Array, v_BTKH: Array, context: Context,
            window: int) -> tuple[LayerCache, Array, Array, Tokens]:
  """(the new cache, then the keys, values and their tokens that this call's queries look at)."""
  memory, T = context.memory[cache.slots], k_BTKH.shape[1]
  new = _write(layout, cache, k_BTKH, v_BTKH, memory.slot_BT)
  # A ring may drop what an early query of this call still sees, so then old and new stand side by side.
  if T == 1 or not window or T + window - 1 <= cache.slots:
    return new, _turned(new.k), _turned(new.v), memory.after
  join = lambda old, fresh: jnp.concatenate([old, fresh.astype(old.dtype)], axis=1)
  return (new, join(_turned(cache.k), k_BTKH), join(_turned(cache.v), v_BTKH),
          jax.tree.map(join, memory.before, context.seen))


class Attention(nn.Module):
  """Multi-head attention, grouped where there are fewer key than query heads (Ainslie et al. 2023).

  Attributes:
    cross: keys and values are made of the context's source, every query sees all of its segment there, and positions
      play no part.
  """
  config: ModelConfig
  layout: Layout
  cross: bool = False

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context, window: Any, keys_B: Array | None,
               cache: LayerCache | None) -> tuple[Array, LayerCache | None]:
    """Args:
      x_BTD: queries are made of it, and keys and values.
      context: of all layers.
      window: tokens seen back; an int or an int32 scalar; None: all.
      keys_B: dropout keys of this layer, or None.
      cache: of this layer, or None.
    """
    config, attention = self.config, self.config.attention
    if attention.latent.kv_rank and not self.cross:
      q_BTNH, out_of, k_BSKH, v_BSKH, seen, cache = self._latent(x_BTD, context, window, cache)
    else:
      q_BTNH, k_BSKH, v_BSKH, seen, cache = self._heads(x_BTD, context, window, cache)
      out_of = lambda out_BTNH: out_BTNH
    scale = attention.scale or (attention.head_dim + (attention.latent.rope_dim if attention.latent.kv_rank else 0)
                                ) ** -0.5
    mode, bias, tokens = config.visibility, context.bias, context.tokens
    if self.cross:
      mode, bias, window = 'full', None, None
    elif config.positions.kind == 'relative':
      q_BTNH, bias = self._relative(q_BTNH, tokens, seen, scale)
    visibility = Visibility(tokens.order, seen.order, tokens.segments, seen.segments, tokens.positions,
                            seen.positions, window, mode=mode,
                            in_order=mode == 'causal' and cache is None and context.num_keys is None)
    drop = None
    if keys_B is not None and attention.dropout:
      drop = lambda probs: dropout(probs, attention.dropout, keys_B, CROSS_SITE if self.cross else ATTENTION_SITE)
    if self.is_mutable_collection('attention'):  # somebody asked to see the probabilities
      drop = lambda probs: (self.sow('attention', 'probs', probs), probs)[1]
    sink_N = self._param('sink', nn.initializers.zeros, ('heads',), (attention.num_heads,)) if attention.sink else None
    with jax.named_scope(SCOPE):
      out_BTNH = attend(self.layout, attention.kernel, q_BTNH, k_BSKH, v_BSKH, visibility, scale=scale,
                        softcap=attention.softcap, bias=bias, sink_N=sink_N, dropout=drop, block=attention.block)
    out_BTNH = out_of(out_BTNH)
    out_BTD = Dense(config, self.layout, (config.width,), ('heads', 'head_dim', 'embed'), num_inputs=2,
                    bias=attention.out_bias, residual=True, name='out')(out_BTNH)
    return out_BTD, cache

  def _param(self, name: str, init, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(self.config.param_dtype))

  def _heads(self, x_BTD: Array, context: Context, window: Any, cache: LayerCache | None):
    """(queries, keys, values, tokens of the keys, the new cache)."""
    config, attention = self.config, self.config.attention
    project = lambda x, heads, axis, name: Dense(config, self.layout, (heads, attention.head_dim),
                                                 ('embed', axis, 'head_dim'), bias=attention.bias, name=name)(x)
    pin = lambda x, axis: self.layout.constrain(x, 'act_batch', 'act_length', axis, None)
    norm = lambda x, axis, name: x
    if attention.qk_norm != 'none':
      axes = ('head_dim',) if attention.qk_norm == 'head' else ('heads', 'head_dim')
      norm = lambda x, axis, name: Norm(config, (axis, 'head_dim')[-len(axes):], 2 if attention.qk_norm == 'all' else 1,
                                        name=name)(x)
    N, K = attention.num_heads, attention.num_kv_heads
    q_BTNH = norm(pin(project(x_BTD, N, 'heads', 'query'), 'act_heads'), 'heads', 'query_norm')
    if self.cross and context.source[0] is None:
      return q_BTNH, _turned(cache.k), _turned(cache.v), context.source[1], cache
    own = x_BTD[:, :context.num_keys], context.seen, context.virtual
    y_BSD, seen, numbers_BS = context.source if self.cross else own
    k_BSKH, v_BSKH = (pin(project(y_BSD, K, 'kv_heads', name), 'kv_heads') for name in ('key', 'value'))
    k_BSKH = norm(k_BSKH, 'kv_heads', 'key_norm')
    if self.cross:
      k_BSKH, v_BSKH = self._prefixed(k_BSKH, v_BSKH, numbers_BS, context)
      return q_BTNH, k_BSKH, v_BSKH, seen, None if cache is None else LayerCache(_turned(k_BSKH), _turned(v_BSKH))
    if (rotations := context.rotations_of(window)) is not None:
      interleaved, of_keys = config.positions.rope.interleaved, slice(None, context.num_keys)
      q_BTNH = apply_rope(q_BTNH, rotations, interleaved)
      k_BSKH = apply_rope(k_BSKH, jax.tree.map(lambda x: x[:, of_keys], rotations), interleaved)
    k_BSKH, v_BSKH = self._prefixed(k_BSKH, v_BSKH, numbers_BS, context)
    if cache is not None:
      cache, k_BSKH, v_BSKH, seen = _extend(self.layout, cache, k_BSKH, v_BSKH, context, window or 0)
    return q_BTNH, k_BSKH, v_BSKH, seen, cache

  def _prefixed(self, k_BSKH: Array, v_BSKH: Array, numbers_BS: Array | None, context: Context) -> tuple[Array, Array]:
    """Keys and values, learned ones where a virtual token of a prefix stands."""
    if numbers_BS is None:
      return k_BSKH, v_BSKH
    return virtual.Prefix(self.config, self.layout, name=peft.PREFIX)(k_BSKH, v_BSKH, numbers_BS, context.prefix)

  def _relative(self, q_BTNH: Array, tokens: Tokens, seen: Tokens, scale: float) -> tuple[Array, Bias]:
    """(queries that meet keys, scores of what depends on distance and on whether types agree).

    Source: Dai et al. 2019, Transformer-XL, section 3.3; Yang et al. 2019, XLNet, arXiv:1906.08237, section 2.5.
    """
    config = self.config
    N, H = q_BTNH.shape[2:]
    normal, f32 = nn.initializers.normal(config.init.std), dict(preferred_element_type=jnp.float32)
    vector = lambda name: self._param(name, normal, ('heads', 'head_dim'), (N, H)).astype(q_BTNH.dtype)
    r_XNH = Dense(config, self.layout, (N, H), ('embed', 'heads', 'head_dim'), bias=False, name='relative')(
        distances(seen.positions.shape[1], config.width).astype(q_BTNH.dtype))
    score_BNTS = by_distance(jnp.einsum('BTNH,XNH->BTNX', q_BTNH + vector('relative_bias'), r_XNH, **f32),
                             tokens.positions, seen.positions)
    if config.embedding.token_types:
      types_2NH = self._param('types', normal, (None, 'heads', 'head_dim'), (2, N, H)).astype(q_BTNH.dtype)
      same_BNT2 = jnp.einsum('BTNH,XNH->BNTX', q_BTNH + vector('types_bias'), types_2NH, **f32)
      differ_B1TS = (tokens.types[:, :, None] != seen.types[:, None, :])[:, None]
      score_BNTS += jnp.where(differ_B1TS, same_BNT2[..., 1:], same_BNT2[..., :1])
    by_query = Bias(_given, scale * score_BNTS, (('act_batch', 'act_heads', 'act_length', None),), whole=True)
    return q_BTNH + vector('content_bias'), by_query

  def _latent(self, x_BTD: Array, context: Context, window: Any, cache: LayerCache | None):
    """(queries, what makes values of the kernel's result, keys, values, tokens of the keys, the new cache).

    Keys and values are made of a latent a token, which is all that a cache holds, beside one rotated key for all heads.
    With a cache, the maps from latents to keys and values are applied to queries and results instead.

    Source: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    config, attention, latent = self.config, self.config.attention, self.config.attention.latent
    N, H, R, C = attention.num_heads, attention.head_dim, latent.rope_dim, latent.kv_rank
    dense = lambda name, features, axes, bias=False: Dense(config, self.layout, features, axes, bias=bias, name=name)
    norm = lambda x, name: Norm(config, (None,), name=name)(x)
    y_BTX = x_BTD
    if latent.q_rank:
      y_BTX = norm(dense('query_down', (latent.q_rank,), ('embed', None), attention.bias)(x_BTD), 'query_norm')
    query = dense('query', (N, H + R), (None if latent.q_rank else 'embed', 'heads', 'head_dim'))
    q_BTNH = self.layout.constrain(query(y_BTX), 'act_batch', 'act_length', 'act_heads', None)
    down_BSX = dense('key_value_down', (C + R,), ('embed', None), attention.bias)(x_BTD[:, :context.num_keys])
    c_BSC = norm(down_BSX[..., :C], 'key_value_norm')
    rotations, interleaved = context.rotations_of(window), config.positions.rope.interleaved
    of_keys = jax.tree.map(lambda x: x[:, :context.num_keys], rotations)
    rotate = lambda x, by: x if by is None else apply_rope(x, by, interleaved)
    q_rope_BTNR, k_rope_BS1R = rotate(q_BTNH[..., H:], rotations), rotate(down_BSX[:, :, None, C:], of_keys)
    normal, dtype = nn.initializers.normal(config.init.std), config.dtype
    key_CNH = self._param('key', normal, (None, 'heads', 'head_dim'), (C, N, H)).astype(dtype)
    value_CNV = self._param('value', normal, (None, 'heads', 'head_dim'), (C, N, latent.value_dim)).astype(dtype)
    if cache is None:
      k_BSNH = jnp.einsum('BSC,CNH->BSNH', c_BSC, key_CNH)
      k_rope_BSNR = jnp.broadcast_to(k_rope_BS1R, (*k_BSNH.shape[:3], R))
      return (jnp.concatenate([q_BTNH[..., :H], q_rope_BTNR], -1), lambda out_BTNV: out_BTNV,
              jnp.concatenate([k_BSNH, k_rope_BSNR], -1), jnp.einsum('BSC,CNV->BSNV', c_BSC, value_CNV), context.seen,
              None)
    q_BTNC = jnp.einsum('BTNH,CNH->BTNC', q_BTNH[..., :H], key_CNH)
    fresh_BS1X = jnp.concatenate([c_BSC[:, :, None], k_rope_BS1R], -1)
    cache, k_BS1X, _, seen = _extend(self.layout, cache, fresh_BS1X, fresh_BS1X[..., :0], context, window or 0)
    return (jnp.concatenate([q_BTNC, q_rope_BTNR], -1),
            lambda out_BTNC: jnp.einsum('BTNC,CNV->BTNV', out_BTNC, value_CNV), k_BS1X, k_BS1X[..., :C], seen, cache)


def _given(bias_BNTS: Array, position_q_BT: Array, position_k_BS: Array) -> Array:
  """A bias that is there already, as `Bias.fn`."""
  del position_q_BT, position_k_BS
  return bias_BNTS
