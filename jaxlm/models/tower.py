"""A tower: a stack of layers with what stands around it, by the data in ModelConfig."""
import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup
from jaxlm.models import virtual
from jaxlm.models.attention import Context, Tokens, remember
from jaxlm.models.config import ModelConfig
from jaxlm.models.kernels import NO_WINDOW, Bias
from jaxlm.models.layers import ACTIVATIONS, Dense, Embedding, Norm, dropout, fold
from jaxlm.models.positions import (POSITIONS, BucketBias, alibi_bias, alibi_slopes, rope_tables, rounded_alibi_bias,
                                    sinusoidal)
from jaxlm.models.stack import Aux, Cache, Stack
from jaxlm.sharding import Layout
from jaxlm.types import Array

EMBEDDING_LAYER = NO_WINDOW  # a number that no layer has, folded into dropout keys: of embeddings


@flax.struct.dataclass
class Side:
  """One row of tokens as a tower reads it.

  Attributes:
    ids_BT: token ids.
    tokens: what visibility and positions know of them, for columns that are keys.
    blocks_BT: places in blanks, 0 outside.
    tasks_BT: what each token is read for.
    slots_BT: where in a cache each column goes.
    keys_B: dropout keys, or None.
    queries: of the columns that are queries alone, or None.
    prefix: what layers make keys and values of virtual tokens of, or None.
  """
  ids_BT: Array
  tokens: Tokens
  blocks_BT: Array
  tasks_BT: Array
  slots_BT: Array
  keys_B: Array | None
  queries: Tokens | None = None
  prefix: Array | None = None


class Tower(nn.Module):
  """A stack with all of its own around it: positions, token types, norms, and the head's transform.

  Attributes:
    reads: whether words come in bare; False: already embedded by another tower (ELECTRA's generator).
  """
  config: ModelConfig
  layout: Layout
  reads: bool = True

  def setup(self):
    config = self.config
    embedding, head, positions = config.embedding, config.head, config.positions
    if positions.kind not in POSITIONS:
      raise JaxlmError(f'config.model.positions.kind: {positions.kind!r} is not built in, and positions take no '
                       f'"module:attribute"; choose one of {", ".join(POSITIONS)}.')
    # Tables are added to embeddings, before or after those are projected to the width.
    table_width = config.width if embedding.project_first else embedding.width
    table = lambda size: Embedding(config, self.layout, size, table_width, (None, 'embed'))
    if self.reads:
      if positions.kind == 'learned':
        self.position_embed = table(config.max_length + positions.offset)
        if positions.two_dims:
          self.block_position_embed = table(config.max_length + positions.offset)
      if embedding.token_types and positions.kind != 'relative':
        self.type_embed = table(embedding.token_types)
      if embedding.task_types:
        self.task_embed = table(embedding.task_types)
      if embedding.norm:
        self.embed_norm = Norm(config)
    if embedding.width != config.width:
      self.embed_project = Dense(config, self.layout, (config.width,), (None, 'embed'), bias=embedding.project_bias)
    if positions.kind == 'buckets':
      self.relative_bias = Embedding(config, self.layout, positions.num_buckets, config.attention.num_heads,
                                     (None, 'heads'), std=config.width ** -0.5)
    self.stack = Stack(config, self.layout)
    if config.residual.final_norm:
      self.final_norm = Norm(config)
    if head.lm and head.transform != 'none':
      self.head_transform = Transform(config, self.layout, embedding.width, head.transform, head.transform_bias)
    if head.lm and head.bias:
      self.head_bias = self.param('head_bias', nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',)),
                                  (config.padded_vocab,), jnp.dtype(config.param_dtype))

  def embedded(self, words_BTE: Array, side: Side) -> Array:
    """Embeddings of words with all that is added to them."""
    config, embedding, positions = self.config, self.config.embedding, self.config.positions
    x_BTE = words_BTE
    if embedding.zeroed >= 0:
      x_BTE = x_BTE * _zeroing(side, embedding.zeroed).astype(x_BTE.dtype)
    if config.embedding_scale != 1.0:
      x_BTE = x_BTE * jnp.asarray(config.embedding_scale, x_BTE.dtype)
    if embedding.project_first and embedding.width != config.width:
      x_BTE = self.embed_project(x_BTE)
    if positions.kind == 'learned':
      x_BTE = x_BTE + self.position_embed(side.tokens.positions + positions.offset)
      if positions.two_dims:
        x_BTE = x_BTE + self.block_position_embed(side.blocks_BT + positions.offset)
    elif positions.kind == 'sinusoidal':
      x_BTE = x_BTE + sinusoidal(side.tokens.positions, x_BTE.shape[-1]).astype(x_BTE.dtype)
    if embedding.token_types and positions.kind != 'relative':
      x_BTE = x_BTE + self.type_embed(side.tokens.types)
    if embedding.task_types:
      x_BTE = x_BTE + self.task_embed(side.tasks_BT)
    if embedding.norm:
      x_BTE = self.embed_norm(x_BTE)
    return dropout(x_BTE, config.dropout, fold(side.keys_B, EMBEDDING_LAYER), 0)

  def run(self, x_BTE: Array, side: Side, cache: Cache | None = None,
          source: tuple[Array | None, Tokens, Array | None] | None = None
          ) -> tuple[Array, Array, Cache | None, Aux]:
    """(the residual stream, the same after the final norm, the new cache, extra losses)."""
    config, embedding = self.config, self.config.embedding
    x_BTD = x_BTE
    if embedding.width != config.width and not embedding.project_first:
      x_BTD = self.embed_project(x_BTE)
    tokens, num_keys = side.tokens, None
    if side.queries is not None:
      num_keys = tokens.order.shape[1]
      tokens = jax.tree.map(lambda k, q: jnp.concatenate([k, q], axis=1), tokens, side.queries)
    x_BTD = self.layout.constrain(x_BTD, 'act_batch', 'act_stream', 'act_embed')
    context = self.context(tokens, side, source, num_keys)
    if cache is None:
      x_BTD, _, aux = self.stack(x_BTD, context)
    else:
      memory = {slots: remember(before, side.tokens, side.slots_BT) for slots, before in cache.tokens.items()}
      source = source or (None, cache.source, None)
      x_BTD, layers, aux = self.stack(x_BTD, context.replace(memory=memory, source=source), cache.layers)
      cache = Cache(layers, {slots: shared.after for slots, shared in memory.items()}, source[1])
    return x_BTD, self.final_norm(x_BTD) if config.residual.final_norm else x_BTD, cache, aux

  def context(self, tokens: Tokens, side: Side, source: tuple[Array | None, Tokens, Array | None] | None = None,
              num_keys: int | None = None) -> Context:
    """What the layers of one call share, without a cache; arguments as `Context` has them."""
    return Context(tokens, None, *self._rotations(tokens, side), self._bias(), side.keys_B, source,
                   self._virtual(side), side.prefix, num_keys)

  def _virtual(self, side: Side) -> Array | None:
    """Which virtual token of a prefix stands in each column of keys; None without a prefix, and where an encoder reads
    them, in whose source they stand."""
    asks = self.config.peft.method == 'prefix' and self.config.structure != 'encoder_decoder'
    return virtual.numbers(self.config, side.ids_BT) if asks else None

  def _rotations(self, tokens: Tokens, side: Side):
    """(rotations of layers without a window, of those with one or None)."""
    positions, attention = self.config.positions, self.config.attention
    rope = positions.rope
    if positions.kind != 'rope':
      return None, None
    dims = attention.latent.rope_dim if attention.latent.kv_rank else int(attention.head_dim * rope.fraction)
    if positions.two_dims:
      return tuple(rope_tables(at_BT, rope, dims // 2) for at_BT in (tokens.positions, side.blocks_BT)), None
    near = None
    if rope.local_base:
      near = (rope_tables(tokens.positions, dataclasses.replace(rope, base=rope.local_base, scaling='none'), dims),)
    return (rope_tables(tokens.positions, rope, dims),), near

  def _bias(self) -> Bias | None:
    config, positions = self.config, self.config.positions
    if positions.kind == 'alibi':
      slopes_N = jnp.asarray(alibi_slopes(config.attention.num_heads))
      if positions.alibi_rounded:
        return Bias(rounded_alibi_bias, (slopes_N, jnp.float32(positions.alibi_scale)), (('act_heads',), ()))
      return Bias(alibi_bias, slopes_N * positions.alibi_scale, (('act_heads',),))
    if positions.kind == 'buckets':
      two_sided = config.visibility != 'causal'  # an order lets some see what comes after
      return Bias(BucketBias(positions.num_buckets, positions.max_distance, two_sided), self.relative_bias.embedding,
                  ((None, 'act_heads'),))
    return None

  def features(self, hidden: Array) -> Array:
    """[..., E], what the output matrix multiplies, of hidden states [..., D]."""
    config, head = self.config, self.config.head
    x = self.head_transform(hidden) if head.lm and head.transform != 'none' else hidden
    return x if config.logit_scale == 1.0 else x * jnp.asarray(config.logit_scale, x.dtype)


class Transform(nn.Module):
  """Dense; with 'activation', 'tanh' or 'full' an activation; with 'full' a norm after it."""
  config: ModelConfig
  layout: Layout
  width: int
  kind: str
  bias: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config = self.config
    x = Dense(config, self.layout, (self.width,), ('embed', None), bias=self.bias, name='dense')(x)
    if self.kind != 'linear':
      x = lookup(ACTIVATIONS, 'tanh' if self.kind == 'tanh' else config.mlp.activation, 'activation')(x)
    return Norm(config, (None,), name='norm')(x) if self.kind == 'full' else x


def _zeroing(side: Side, id: int) -> Array:
  """float32 [B, T, 1]: 0 where the id stands; elsewhere what makes up for it, by document (ESM-2's token dropout).

  Source: Lin et al. 2022, ESM-2, and its published code: 0.12 is the share zeroed in training, 0.15 × 0.8.
  """
  zero_BT = side.ids_BT == id
  count = jax.vmap(lambda x_T, segments_T: jax.ops.segment_sum(
      x_T.astype(jnp.float32), segments_T, num_segments=segments_T.shape[0] + 1)[segments_T])
  segments_BT = side.tokens.segments
  share_BT = count(zero_BT, segments_BT) / count(jnp.ones_like(zero_BT), segments_BT)
  return jnp.where(zero_BT, 0, (1 - 0.15 * 0.8) / jnp.maximum(1 - share_BT, 1e-6))[..., None]
