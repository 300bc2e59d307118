"""Adaptation beside projections: bottlenecks after a branch, and virtual tokens, which stand for no text.

Virtual tokens are tokens. Their ids follow the vocabulary's, and whoever makes rows puts them in front of every
document; so packing, positions, masks, caches and every kernel treat them as they treat the others. A prompt gives them
learned embeddings; a prefix gives them learned keys and values in every layer, whatever else would have been computed
there.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.lookup import lookup
from jaxlm.models.config import ModelConfig, PeftConfig
from jaxlm.models.layers import ACTIVATIONS, Dense
from jaxlm.models.products import product
from jaxlm.sharding import Layout
from jaxlm.types import Array

METHODS = ('prompt', 'prefix')  # that put virtual tokens in front of a text


def count(config: PeftConfig) -> int:
  """Virtual tokens in front of a text."""
  return config.tokens if config.method in METHODS else 0


def numbers(config: ModelConfig, ids_BT: Array) -> Array | None:
  """int32 [B, T]: which virtual token stands here, from 0; below 0 where a real one does. None: there are none."""
  return ids_BT - config.vocab_size if count(config.peft) else None


class Bottleneck(nn.Module):
  """Down to a few dims, an activation, and back up: nothing at the start, when the last matrix is 0.

  Added to a branch's output, of which it is made (Houlsby et al. 2019, arXiv:1902.00751, figure 2); `parallel`: made
  of the branch's input, and scaled (He et al. 2021, arXiv:2110.04366, section 3.4).
  """
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    config, width = self.config, self.config.peft.width
    act = lookup(ACTIVATIONS, config.mlp.activation, 'activation')
    low_BTX = act(Dense(config, self.layout, (width,), ('embed', None), name='down')(x_BTD))
    up = Dense(config, self.layout, (config.width,), (None, 'embed'), name='up', zero=True)
    return jnp.asarray(config.peft.strength, x_BTD.dtype) * up(low_BTX)


class Virtual(nn.Module):
  """What stands in the place of virtual tokens: a table, or what an encoder makes of one.

  Source: Lester et al. 2021, Prompt tuning, arXiv:2104.08691; with an encoder: Liu et al. 2021, P-tuning,
  arXiv:2103.10385, section 3.2, and Li and Liang 2021, Prefix-tuning, arXiv:2101.00190, section 4.3.

  Attributes:
    width: of the table, and of what comes out.
  """
  config: ModelConfig
  layout: Layout
  width: int

  @nn.compact
  def __call__(self) -> Array:
    """[P, width]; of a prefix's encoder, what its layers multiply: [P, peft.width]."""
    config, p = self.config, self.config.peft
    table_PE = self.param('embedding', nn.with_logical_partitioning(nn.initializers.normal(config.init.embedding_std),
                                                                    (None, 'embed')),
                          (p.tokens, self.width), jnp.dtype(config.param_dtype)).astype(config.dtype)
    dense = lambda features, name: Dense(config, self.layout, (features,), (None, None), name=name)
    if p.encoder == 'none':
      return table_PE
    if p.method == 'prefix':
      return jnp.tanh(dense(p.width, 'into')(table_PE))
    x_PX = table_PE
    if p.encoder == 'lstm':
      x_PX = _both_ways(table_PE, p.width)
      x_PX = jax.nn.relu(dense(2 * p.width, 'into')(x_PX))
    else:
      x_PX = jax.nn.relu(dense(p.width, 'into')(x_PX))
      x_PX = jax.nn.relu(dense(p.width, 'middle')(x_PX))
    return dense(self.width, 'out')(x_PX)


def _both_ways(x_PE: Array, width: int) -> Array:
  """[P, 2·width]: two layers of LSTMs, one from each end."""
  for layer in range(2):
    run = lambda name, **kw: nn.RNN(nn.OptimizedLSTMCell(width, name=name), **kw)(x_PE[None])[0]
    x_PE = jnp.concatenate([run(f'forward_{layer}'), run(f'backward_{layer}', reverse=True, keep_order=True)], -1)
  return x_PE


def put(numbers_BT: Array, words_BTE: Array, table_PE: Array) -> Array:
  """Embeddings of words, with those of virtual tokens in their places."""
  return jnp.where((numbers_BT >= 0)[..., None], _taken(table_PE, numbers_BT), words_BTE)


def real(config: ModelConfig, ids_BT: Array, segments_BT: Array) -> Array:
  """Segments of tokens, 0 where a virtual one stands: what a row is pooled from."""
  return segments_BT if count(config.peft) == 0 else jnp.where(ids_BT >= config.vocab_size, 0, segments_BT)


def _taken(table_PX: Array, numbers_BT: Array) -> Array:
  return jnp.take(table_PX, jnp.maximum(numbers_BT, 0), axis=0)


class _KeyValue(nn.Module):
  """[P, 2, K, H]: keys and values of hidden states [P, X]. Two products: dims before the heads cannot be one with them
  where devices share heads, and the kernel would be gathered."""
  config: ModelConfig
  layout: Layout
  heads: tuple[int, int]

  @nn.compact
  def __call__(self, hidden_PX: Array) -> Array:
    axes, dtype = (None, 'kv_heads', 'head_dim'), jnp.dtype(self.config.param_dtype)
    param = lambda name, init, axes, shape: self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    kernel_X2KH = param('kernel', nn.initializers.normal(self.config.init.std), (None, None, 'kv_heads', 'head_dim'),
                        (hidden_PX.shape[1], 2, *self.heads))
    bias_2KH = param('bias', nn.initializers.zeros, axes, (2, *self.heads))
    x_PX = hidden_PX.astype(self.config.dtype)
    both = [product(self.layout, axes, False, x_PX, kernel_X2KH[:, i], bias_2KH[i]).reshape(-1, *self.heads)
            for i in range(2)]
    return jnp.stack(both, axis=1)


class Prefix(nn.Module):
  """Keys and values of virtual tokens, learned for this layer: a table; or of an encoder's hidden states, a product."""
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, k_BSKH: Array, v_BSKH: Array, numbers_BS: Array, hidden_PX: Array | None) -> tuple[Array, Array]:
    """The keys and values, as they are but where a virtual token stands."""
    config, K, H = self.config, *k_BSKH.shape[2:]
    if hidden_PX is None:
      both_P2KH = self.param('key_value', nn.with_logical_partitioning(nn.initializers.normal(config.init.std),
                                                                       (None, None, 'kv_heads', 'head_dim')),
                             (config.peft.tokens, 2, K, H), jnp.dtype(config.param_dtype)).astype(config.dtype)
    else:
      both_P2KH = _KeyValue(config, self.layout, (K, H), name='key_value')(hidden_PX)
    here = (numbers_BS >= 0)[..., None, None]
    set_ = lambda old, new: jnp.where(here, _taken(new, numbers_BS).astype(old.dtype), old)
    return set_(k_BSKH, both_P2KH[:, 0]), set_(v_BSKH, both_P2KH[:, 1])
