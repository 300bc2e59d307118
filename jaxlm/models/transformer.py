"""Block, Stack, Transformer: every transformer family, chosen by the data in ModelConfig."""
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import trees
from jaxlm.lookup import lookup
from jaxlm.models.attention import Attention, LayerCache, Tokens
from jaxlm.models.config import ModelConfig, segments
from jaxlm.models.layers import Embedding, Mlp, Norm, dropout, example_keys, fold, softcap
from jaxlm.models.positions import POSITIONS, rope_tables, sinusoidal
from jaxlm.sharding import Layout
from jaxlm.types import Array, JaxlmError, Output, Tree

NO_WINDOW = 1 << 30
BRANCH_SITES = (1, 2)  # dropout after attention, after the MLP; attention.py has site 0
EMBEDDING_LAYER = NO_WINDOW  # the number embeddings fold into their dropout keys, which no layer has

# What the backward pass may keep; the rest is computed again.
REMAT = {
    'none': None,
    'full': lambda names: jax.checkpoint_policies.nothing_saveable,
    'dots': lambda names: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'names': lambda names: jax.checkpoint_policies.save_only_these_names(*names),
}
REMAT_NAMES = ('attention_out', 'attention_lse', 'mlp_hidden')  # what `names` may keep; the second is blockwise's


@flax.struct.dataclass
class Context:
  """What all layers of one call share."""
  tokens: Tokens
  rope: tuple[Array, Array] | None
  keys_B: Array | None


class Block(nn.Module):
  """Attention and MLP, each inside `x = post_norm(alpha·x + out_norm(f(in_norm(x))))`; side by side if parallel."""
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context, layer: Any, window: Any,
               cache: LayerCache | None = None) -> tuple[Array, LayerCache | None]:
    """Args:
      x_BTD: the residual stream.
      layer: this layer's number, int or int32 scalar; folded into dropout keys.
      window: tokens it sees back, likewise; None: all.
      cache: this layer's.
    """
    config, residual = self.config, self.config.residual
    keys_B = fold(context.keys_B, layer)
    norm = lambda on, name: Norm(config, name=name) if on else lambda x: x
    attention = Attention(config, self.layout, name='attention')
    mlp = Mlp(config, self.layout.constrain, name='mlp')
    out = lambda y, i: dropout(norm(residual.out_norm, ('attention_out_norm', 'mlp_out_norm')[i])(y),
                               config.dropout, keys_B, BRANCH_SITES[i])
    pin = lambda y: self.layout.constrain(y, 'act_batch', 'act_length', 'act_embed')

    y_BTD = norm(residual.in_norm, 'attention_norm')(x_BTD)
    a_BTD, cache = attention(y_BTD, context.tokens, context.rope, window, keys_B, cache)
    if residual.parallel:
      sum_BTD = residual.alpha * x_BTD + out(a_BTD, 0) + out(mlp(y_BTD), 1)
      return pin(norm(residual.post_norm, 'post_norm')(sum_BTD)), cache
    x_BTD = pin(norm(residual.post_norm, 'attention_post_norm')(residual.alpha * x_BTD + out(a_BTD, 0)))
    m_BTD = mlp(norm(residual.in_norm, 'mlp_norm')(x_BTD))
    return pin(norm(residual.post_norm, 'mlp_post_norm')(residual.alpha * x_BTD + out(m_BTD, 1))), cache


class Period(nn.Module):
  """The blocks of one repeat, scanned."""
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context, layers: Array, windows: Array | None) -> tuple[Array, None]:
    block = _block_class(self.config, scanned=True)
    for slot in range(layers.shape[0]):
      window = None if windows is None else windows[slot]
      x_BTD, _ = block(self.config, self.layout, name=f'slot_{slot}')(x_BTD, context, layers[slot], window)
    return x_BTD, None


def _block_class(config: ModelConfig, scanned: bool):
  policy = lookup(REMAT, config.remat, 'remat policy')
  # prevent_cse guards against a merge that cannot happen inside scan, and costs.
  return Block if policy is None else nn.remat(Block, policy=policy(config.remat_names), prevent_cse=not scanned)


class Stack(nn.Module):
  """All layers: scanned over repeats of a period in training, one by one, with caches, in decoding.

  With `config.scan` parameters are `prefix_i`, `period/slot_i` stacked over repeats, `suffix_i`; without it they are
  `layer_i`. `unstack` and `restack` turn one into the other.
  """
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context,
               cache: list[LayerCache] | None = None) -> tuple[Array, list[LayerCache] | None]:
    config = self.config
    windows = np.asarray([config.window(i) or NO_WINDOW for i in range(config.num_layers)], np.int32)
    block = _block_class(config, scanned=False)
    if not config.scan:
      new = []
      for i in range(config.num_layers):
        x_BTD, layer_cache = block(config, self.layout, name=f'layer_{i}')(
            x_BTD, context, i, config.window(i) or None, None if cache is None else cache[i])
        new.append(layer_cache)
      return x_BTD, None if cache is None else new
    if cache is not None:
      raise ValueError('A scanned stack takes no cache; decode with scan=False and unstacked parameters, as jaxlm.load '
                       'does.')
    cut = segments(config.layer_kinds())
    single = lambda i, name: block(config, self.layout, name=name)
    first, last = len(cut.prefix), config.num_layers - len(cut.suffix)
    for i in range(first):
      x_BTD, _ = single(i, f'prefix_{i}')(x_BTD, context, i, config.window(i) or None)
    shape = (cut.repeats, len(cut.period))
    inputs = [jnp.arange(first, last, dtype=jnp.int32).reshape(shape), None]
    if any(config.attention.windows):
      inputs[1] = jnp.asarray(windows[first:last].reshape(shape))
    period = nn.scan(Period, variable_axes={'params': 0}, split_rngs={'params': True}, length=cut.repeats,
                     in_axes=(nn.broadcast, 0, nn.broadcast if inputs[1] is None else 0),
                     metadata_params={nn.PARTITION_NAME: 'layers'})
    x_BTD, _ = period(config, self.layout, name='period')(x_BTD, context, *inputs)
    for i in range(last, config.num_layers):
      x_BTD, _ = single(i, f'suffix_{i - last}')(x_BTD, context, i, config.window(i) or None)
    return x_BTD, None


def unstack(params: Tree, config: ModelConfig) -> Tree:
  """Parameters of a scanned model as those of the same model with scan=False."""
  cut, out = segments(config.layer_kinds()), {}
  leaves = trees.flatten(params)
  for path, leaf in leaves.items():
    if not path.startswith('stack/'):
      out[path] = leaf
  for layer in range(config.num_layers):
    place, index = cut.path(layer)
    start = f'stack/{place}/'
    for path, leaf in leaves.items():
      if path.startswith(start):
        out[f'stack/layer_{layer}/{path[len(start):]}'] = leaf if index is None else leaf[index]
  return trees.unflatten(out)


def restack(params: Tree, config: ModelConfig) -> Tree:
  """The inverse of `unstack`."""
  cut, out, stacked = segments(config.layer_kinds()), {}, {}
  for path, leaf in trees.flatten(params).items():
    if not path.startswith('stack/layer_'):
      out[path] = leaf
      continue
    _, name, rest = path.split('/', 2)
    place, index = cut.path(int(name.removeprefix('layer_')))
    if index is None:
      out[f'stack/{place}/{rest}'] = leaf
    else:
      stacked.setdefault(f'stack/{place}/{rest}', {})[index] = leaf
  stack = lambda parts: (np if isinstance(parts[0], np.ndarray) else jnp).stack([parts[i] for i in range(len(parts))])
  return trees.unflatten(out | {path: stack(parts) for path, parts in stacked.items()})


class Transformer(nn.Module):
  """A decoder-only language model."""
  config: ModelConfig
  layout: Layout

  def setup(self):
    config = self.config
    if config.positions.kind not in POSITIONS:
      raise JaxlmError(f'config.model.positions.kind: {config.positions.kind!r} is not built in, and positions take no '
                       f'"module:attribute"; choose one of {", ".join(POSITIONS)}.')
    self.embed = Embedding(config, config.padded_vocab, ('vocab', 'embed'))
    if config.positions.kind == 'learned':
      self.position_embed = Embedding(config, config.max_length, (None, 'embed'))
    self.stack = Stack(config, self.layout)
    if config.residual.final_norm:
      self.final_norm = Norm(config)
    if not config.tie_embeddings:
      self.head = self.param('head', nn.with_logical_partitioning(nn.initializers.normal(config.init.std),
                                                                  ('vocab', 'embed')),
                             (config.padded_vocab, config.width), jnp.dtype(config.param_dtype))

  def __call__(self, batch: dict[str, Array], cache: list[LayerCache] | None = None, rng: Array | None = None,
               with_logits: bool = True) -> Output:
    """Runs the model.

    Args:
      batch: tokens; segment_ids, positions, order and example_ids where they are not the obvious ones: one document
        a row, counted from 0.
      cache: from `init_cache`; written and returned.
      rng: key of this step's dropout; None: none.
      with_logits: False leaves logits out; the loss forms them in chunks.
    """
    config = self.config
    tokens_BT = batch['tokens']
    count_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    positions_BT = batch.get('positions', count_BT)
    order = {'causal': positions_BT + 1 if cache is not None else count_BT + 1, 'full': jnp.zeros_like(tokens_BT)}
    tokens = Tokens(batch['order'] if config.visibility == 'order' else order[config.visibility],
                    batch.get('segment_ids', jnp.ones_like(tokens_BT)), positions_BT)
    keys_B = None
    if rng is not None:
      keys_B = example_keys(rng, batch.get('example_ids', jnp.arange(tokens_BT.shape[0])))

    x_BTD = self.embed(tokens_BT)
    if config.embedding_scale != 1.0:
      x_BTD = x_BTD * jnp.asarray(config.embedding_scale, x_BTD.dtype)
    if config.positions.kind == 'learned':
      x_BTD = x_BTD + self.position_embed(positions_BT)
    elif config.positions.kind == 'sinusoidal':
      x_BTD = x_BTD + sinusoidal(positions_BT, config.width).astype(x_BTD.dtype)
    x_BTD = dropout(x_BTD, config.dropout, fold(keys_B, EMBEDDING_LAYER), 0)
    x_BTD = self.layout.constrain(x_BTD, 'act_batch', 'act_length', 'act_embed')
    rope = None
    if config.positions.kind == 'rope':
      rope = rope_tables(positions_BT, config.positions.rope, config.attention.head_dim)
    x_BTD, cache = self.stack(x_BTD, Context(tokens, rope, keys_B), cache)
    if config.residual.final_norm:
      x_BTD = self.final_norm(x_BTD)
    return Output(self.logits(x_BTD) if with_logits else None, x_BTD, cache, {})

  def unembedding(self) -> Array:
    """The output matrix, [V_padded, D]: the head's, or the embedding itself."""
    return self.embed.embedding if self.config.tie_embeddings else self.head

  def logits(self, hidden_BTD: Array) -> Array:
    """float32 [B, T, V_padded]."""
    # float32: bfloat16 logits lose the differences between likely tokens.
    logits_BTV = jnp.einsum('BTD,VD->BTV', hidden_BTD, self.unembedding().astype(self.config.dtype),
                            preferred_element_type=jnp.float32)
    logits_BTV = self.layout.constrain(logits_BTV, 'act_batch', 'act_length', 'act_vocab')
    return softcap(logits_BTV, self.config.logit_softcap)
