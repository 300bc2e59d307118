"""Tower and Transformer: what stands around a stack of layers, for every family, chosen by the data in ModelConfig."""
import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup
from jaxlm.models import virtual
from jaxlm.models.attention import Context, Tokens
from jaxlm.models.config import ModelConfig
from jaxlm.models.kernels import NO_WINDOW, Bias
from jaxlm.models.layers import ACTIVATIONS, Dense, Embedding, Norm, dropout, example_keys, fold, softcap
from jaxlm.models.positions import (POSITIONS, BucketBias, alibi_bias, alibi_slopes, rope_tables, rounded_alibi_bias,
                                    sinusoidal)
from jaxlm.models.stack import Aux, Block, BlockCache, Stack, add, init_cache
from jaxlm.sharding import Layout
from jaxlm.sums import by_pieces
from jaxlm.types import Array, Output

# Up to so many rows the output matrix, which is large, comes first in a product: on a CPU 2.4 times as fast at 8 rows
# of 50,304 logits. The barrier keeps XLA from turning it back.
FEW = 256
PIECE = 1 << 25  # logits that exist at once where a text's best ones are looked for

# Numbers that no layer has, folded into dropout keys: of embeddings, and of another tower.
EMBEDDING_LAYER, TOWER = NO_WINDOW, NO_WINDOW + 1


def _by_mixture(aux: Aux, config: ModelConfig, heads: int) -> Aux:
  """Means over mixture layers, an encoder's and so many future heads' among them, of sums over them."""
  towers = [tower for start, tower in config.towers().items() if start in ('', 'encoder/')]
  count = sum(kind.moe for tower in towers for kind in tower.layer_kinds()) + heads * config.layer_kinds()[-1].moe
  return {name: x_B / count for name, x_B in aux.items()}


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

  def run(self, x_BTE: Array, side: Side, cache: list[BlockCache] | None = None,
          source: tuple[Array, Tokens, Array | None] | None = None
          ) -> tuple[Array, Array, list[BlockCache] | None, Aux]:
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
    context = Context(tokens, side.slots_BT, *self._rotations(tokens, side), self._bias(), side.keys_B, source,
                      self._virtual(side), side.prefix, num_keys)
    x_BTD, cache, aux = self.stack(x_BTD, context, cache)
    return x_BTD, self.final_norm(x_BTD) if config.residual.final_norm else x_BTD, cache, aux

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


class Transformer(Tower):
  """A language model: a tower, and where the structure has one, an encoder or a generator beside it."""

  def setup(self):
    super().setup()
    config, head = self.config, self.config.head
    E = config.embedding.width
    self.embed = Embedding(config, self.layout, config.padded_vocab, E, ('vocab', 'embed'))
    towers = config.towers()
    if 'encoder/' in towers:
      self.encoder = Tower(towers['encoder/'], self.layout)
    if 'generator/' in towers:
      self.generator = Tower(towers['generator/'], self.layout, reads=False)
    if config.peft.method == 'prompt' or config.peft.method == 'prefix' and config.peft.encoder != 'none':
      self.virtual = virtual.Virtual(config, self.layout, E if config.peft.method == 'prompt' else config.width)
    normal, dtype = nn.initializers.normal(config.init.std), jnp.dtype(config.param_dtype)
    if head.lm and not config.tie_embeddings:
      self.head = self.param('head', nn.with_logical_partitioning(normal, ('vocab', 'embed')),
                             (config.padded_vocab, E), dtype)
    if config.structure == 'two_stream':
      self.query_embed = self.param('query_embed', nn.with_logical_partitioning(normal, ('embed',)), (E,), dtype)
    self.future = [Block(config, self.layout, config.layer_kinds()[-1]) for _ in range(config.future_heads)]
    if head.pooler != 'none':
      self.pooler = Transform(config, self.layout, config.width, head.pooler, head.pooler_bias)
    if head.labels != 'none':
      self.labels = Dense(config, self.layout, (config.num_labels,), ('embed', None), bias=head.label_bias)

  def __call__(self, batch: dict[str, Array], cache: list[BlockCache] | None = None, rng: Array | None = None,
               with_logits: bool = True) -> Output:
    """Runs the model.

    Args:
      batch: tokens; the other keys of `types.BATCH` where they are not the obvious ones: one document a row, counted
        from 0. `slots` [B, T] may say where in the cache tokens go; else it is their positions.
      cache: from `init_cache`; written and returned. With a source in it, the batch needs none.
      rng: key of this step's dropout; None: none.
      with_logits: False leaves logits out; the loss forms them in chunks.
    """
    config = self.config
    if self.is_initializing():  # every part takes part, so that its parameters are made
      batch = _everything(config, batch)
      if config.generator.width:
        self.replacements(batch)
    keys_B = None
    if rng is not None:
      keys_B = example_keys(rng, batch.get('example_ids', jnp.arange(batch['tokens'].shape[0])))
    if 'memory_tokens' in batch:  # each column has a slot of its own: positions begin anew in every document
      batch = batch | {'slots': _columns(batch['tokens'], batch['memory_tokens'].shape[1])}
    side = _side(batch, '', config.visibility, keys_B, cached=cache is not None)
    side = side.replace(prefix=self._prefix())
    source, aux = None, {}
    if config.structure == 'encoder_decoder' and 'source_tokens' in batch:
      hidden_BSD, read, aux = self.encode(batch, fold(keys_B, TOWER))
      prefixed = config.peft.method == 'prefix'
      source = hidden_BSD, read, virtual.numbers(config, batch['source_tokens']) if prefixed else None
    if 'memory_tokens' in batch:
      cache = self._remember(batch)
    x_BTE = self.embedded(self._words(side.ids_BT), side)
    if config.structure == 'two_stream' and 'query_positions' in batch:
      side = side.replace(queries=_queries(batch))
      query_BME = jnp.broadcast_to(self.query_embed.astype(x_BTE.dtype), (*batch['query_positions'].shape,
                                                                          x_BTE.shape[-1]))
      query_BME = dropout(query_BME, config.dropout, fold(keys_B, EMBEDDING_LAYER), 1)
      x_BTE = jnp.concatenate([x_BTE, query_BME], axis=1)
    stream_BTD, hidden_BTD, cache, told = self.run(x_BTE, side, cache, source)
    ahead, more = self._future(stream_BTD, side, cache)
    aux = _by_mixture(add(add(aux, told), more), config, len(ahead))
    future = tuple(self.features(x_BTD) for x_BTD in ahead)
    at_BMD = hidden_BTD
    if side.queries is not None:
      columns = side.ids_BT.shape[1]
      hidden_BTD, at_BMD = hidden_BTD[:, :columns], hidden_BTD[:, columns:]
    elif 'target_index' in batch:
      at_BMD = jnp.take_along_axis(hidden_BTD, batch['target_index'][..., None], axis=1)
    features = self.features(at_BMD)
    with_logits = with_logits and config.head.lm
    return Output(self.logits(features) if with_logits else None, hidden_BTD, features, cache, aux, future,
                  self.scores(hidden_BTD, virtual.real(config, side.ids_BT, side.tokens.segments)))

  def _words(self, ids_BT: Array) -> Array:
    """Embeddings [B, T, E] of ids, virtual ones among them."""
    numbers_BT = virtual.numbers(self.config, ids_BT)
    if numbers_BT is None:
      return self.embed(ids_BT)
    words_BTE = self.embed(jnp.where(numbers_BT >= 0, 0, ids_BT))
    return virtual.put(numbers_BT, words_BTE, self.virtual()) if self.config.peft.method == 'prompt' else words_BTE

  def _prefix(self) -> Array | None:
    """What layers make keys and values of virtual tokens of; None where each has its own, or there is no prefix."""
    peft = self.config.peft
    return self.virtual() if peft.method == 'prefix' and peft.encoder != 'none' else None

  def encode(self, batch: dict[str, Array], keys_B: Array | None = None) -> tuple[Array, Tokens, Aux]:
    """(hidden states [B, S, D] of an encoder-decoder's source, its tokens, sums over layers of extra losses)."""
    side = _side(batch, 'source_', 'full', keys_B, cached=False).replace(prefix=self._prefix())
    _, hidden_BSD, _, aux = self.encoder.run(self.encoder.embedded(self._words(side.ids_BT), side), side)
    return hidden_BSD, side.tokens, aux

  def _remember(self, batch: dict[str, Array]) -> list[BlockCache]:
    """A cache that holds the memory, without gradient, and has room for the row."""
    memory = {key.removeprefix('memory_'): value for key, value in batch.items() if key.startswith('memory_')}
    memory['order'] = jnp.zeros_like(memory['tokens'])  # all of it is context
    memory['slots'] = _columns(memory['tokens'])
    side = _side(memory, '', self.config.visibility, None, cached=True).replace(prefix=self._prefix())
    B, M = side.ids_BT.shape
    cache = init_cache(self.config, B, M + batch['tokens'].shape[1])
    _, _, cache, _ = self.run(self.embedded(self._words(side.ids_BT), side), side, cache)
    return jax.lax.stop_gradient(cache)

  def _future(self, x_BTD: Array, side: Side, cache: Any) -> tuple[list[Array], Aux]:
    """(hidden states that predict the 2nd, 3rd, … token ahead, extra losses); none while decoding.

    Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2: parallel heads, a block each, one output matrix.
    """
    config = self.config
    if cache is not None or not self.future:
      return [], {}
    context = Context(side.tokens, side.slots_BT, *self._rotations(side.tokens, side), self._bias(), side.keys_B)
    window, found, total = config.window(config.num_layers - 1) or None, [], {}
    for i, block in enumerate(self.future):
      out_BTD, _, aux = block(x_BTD, context, config.num_layers + i, window)
      found.append(self.final_norm(out_BTD) if config.residual.final_norm else out_BTD)
      total = add(total, aux)
    return found, total

  def scores(self, hidden_BTD: Array, segments_BT: Array) -> Array | None:
    """What the label head says; without labels, the pooled states that a body's pooler gives, [B, D]."""
    head = self.config.head
    if head.labels == 'none' and head.pooler == 'none':
      return None
    x = pool(hidden_BTD, segments_BT, head.pool) if head.labels in ('none', 'sequence') else hidden_BTD
    x = self.pooler(x) if head.pooler != 'none' else x
    return x if head.labels == 'none' else self.labels(x).astype(jnp.float32)

  def pooled(self, hidden_BTD: Array, segments_BT: Array, texts: int = 1, how: str | None = None) -> Array:
    """float32 [B, K, D or V]: each text of a row by itself, as `how` says; text k is segment k + 1.

    Args:
      how: as config.head.pool, which it is by default. With 'splade' the V entries of the vocabulary: log(1 + x) of the
        best score x that any of the text's tokens gives an entry, where that is above 0 (Formal et al. 2021, SPLADE v2,
        arXiv:2109.10086).
    """
    how = how or self.config.head.pool
    if how != 'splade':
      of_text = lambda k: pool(hidden_BTD, jnp.where(segments_BT == k + 1, 1, 0), how)
      return jnp.stack([of_text(k) for k in range(texts)], axis=1).astype(jnp.float32)
    features_BTE = self.features(hidden_BTD)
    w_VE, b_V = self.unembedding()
    rows = w_VE.astype(self.config.dtype), jnp.zeros(len(w_VE), jnp.float32) if b_V is None else b_V.astype(jnp.float32)

    @jax.checkpoint
    def best(_, rows):
      (w_1VE, b_1V), f32 = rows, dict(preferred_element_type=jnp.float32)
      logits_BTV = self._capped(jnp.einsum('BTE,VE->BTV', features_BTE, w_1VE[0], **f32), b_1V)
      of_text = lambda k: jnp.where((segments_BT == k + 1)[..., None], logits_BTV, 0).max(1)
      best_BKV = jnp.stack([of_text(k) for k in range(texts)], axis=1)
      return (), jnp.moveaxis(self.layout.constrain(best_BKV, 'act_batch', None, 'act_vocab'), 2, 0)[None]
    some = max(1, PIECE // hidden_BTD[..., 0].size)
    _, best_1VBK = by_pieces(some, best, (), *(x[None] for x in rows), whole=self.layout.parts('act_vocab'))
    return jnp.log1p(nn.relu(jnp.moveaxis(best_1VBK[0], 0, 2)[..., :self.config.vocab_size]))

  def replacements(self, batch: dict[str, Array], rng: Array | None = None) -> Array:
    """[B, M, E]: features of ELECTRA's generator at `target_index`, of rows whose tokens there are hidden."""
    keys_B = None if rng is None else example_keys(rng, batch['example_ids'])
    side = _side(batch | {'tokens': batch['masked_tokens']}, '', 'full', fold(keys_B, TOWER), cached=False)
    _, hidden_BTD, _, _ = self.generator.run(self.embedded(self.embed(side.ids_BT), side), side)
    return self.generator.features(jnp.take_along_axis(hidden_BTD, batch['target_index'][..., None], axis=1))

  def unembedding(self) -> tuple[Array, Array | None]:
    """(the output matrix [V_padded, E]: the head's, or the embedding itself; its bias [V_padded], or None)."""
    return (self.embed.embedding if self.config.tie_embeddings else self.head,
            self.head_bias if self.config.head.bias else None)

  def generator_unembedding(self) -> tuple[Array, Array | None]:
    """The same of ELECTRA's generator, which shares the embedding."""
    return self.embed.embedding, self.generator.head_bias

  def logits(self, features_BTE: Array) -> Array:
    """float32 [B, T, V_padded]."""
    w_VE, b_V = self.unembedding()
    w_VE, f32 = w_VE.astype(self.config.dtype), dict(preferred_element_type=jnp.float32)
    # float32: bfloat16 logits lose the differences between likely tokens.
    if features_BTE.size // features_BTE.shape[-1] <= FEW:
      logits_VBT = jax.lax.optimization_barrier(jnp.einsum('VE,BTE->VBT', w_VE, features_BTE, **f32))
      logits_BTV = jnp.moveaxis(logits_VBT, 0, 2)
    else:
      logits_BTV = jnp.einsum('BTE,VE->BTV', features_BTE, w_VE, **f32)
    return self._capped(logits_BTV, b_V)

  def _capped(self, logits_BTV: Array, b_V: Array | None) -> Array:
    """What products with the output matrix, or with a part of it, become: laid out, with the bias, capped."""
    logits_BTV = self.layout.constrain(logits_BTV, 'act_batch', 'act_length', 'act_vocab')
    if b_V is not None:
      logits_BTV += b_V.astype(jnp.float32)
    return softcap(logits_BTV, self.config.logit_softcap)


def _columns(ids_BT: Array, first: int = 0) -> Array:
  """[B, T]: first, first + 1, …"""
  return jnp.broadcast_to(first + jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)


def _side(batch: dict[str, Array], start: str, visibility: str, keys_B: Array | None, cached: bool) -> Side:
  """The arrays of a batch whose names begin with `start`, filled up with the obvious ones."""
  ids_BT = batch[start + 'tokens']
  zeros_BT, ones_BT = jnp.zeros_like(ids_BT), jnp.ones_like(ids_BT)
  count_BT = _columns(ids_BT)
  positions_BT = batch.get(start + 'positions', count_BT)
  slots_BT = batch.get('slots', positions_BT)
  time_BT = slots_BT if cached or not start and 'slots' in batch else count_BT
  orders = {'full': lambda: zeros_BT, 'causal': lambda: time_BT + 1,
            'order': lambda: batch['order']}
  tokens = Tokens(orders[visibility](), batch.get(start + 'segment_ids', ones_BT), positions_BT,
                  batch.get('token_types', zeros_BT))
  return Side(ids_BT, tokens, batch.get('block_positions', zeros_BT), batch.get('task_types', zeros_BT), slots_BT,
              keys_B)


def _everything(config: ModelConfig, batch: dict[str, Array]) -> dict[str, Array]:
  """The batch, with what the structure can read besides tokens."""
  tokens_BT = batch['tokens']
  zeros_BT, more = jnp.zeros_like(tokens_BT), {'order': jnp.zeros_like(tokens_BT)}
  if config.structure == 'encoder_decoder':
    more['source_tokens'] = zeros_BT
  if config.structure == 'two_stream':
    more |= {'query_positions': zeros_BT, 'query_order': zeros_BT, 'query_segment_ids': zeros_BT + 1}
  if config.generator.width:
    more |= {'masked_tokens': zeros_BT, 'target_index': zeros_BT}
  return more | batch


def _queries(batch: dict[str, Array]) -> Tokens:
  """XLNet's query stream: it sees what is produced before its token, and context, but not the token.

  A strict `order[k] < max(order[q], 1)` between integers is `order[k] <= max(order[q], 1) - 1`.
  """
  positions_BM = batch['query_positions']
  types_BM = jnp.zeros_like(positions_BM)
  if 'token_types' in batch:
    types_BM = batch.get('query_types', types_BM)
  return Tokens(jnp.maximum(batch['query_order'], 1) - 1, batch['query_segment_ids'], positions_BM, types_BM)


def pool(hidden_BTD: Array, segments_BT: Array, how: str) -> Array:
  """[B, D]: what stands for a row: its first or last real token, or the mean of all."""
  real_BT = segments_BT > 0
  if how == 'mean':
    weights_BT1 = real_BT[..., None].astype(jnp.float32)
    total_BD = (hidden_BTD.astype(jnp.float32) * weights_BT1).sum(1)
    return (total_BD / jnp.maximum(weights_BT1.sum(1), 1)).astype(hidden_BTD.dtype)
  if how not in ('first', 'last'):
    raise ValueError(f'no token of a row is {how!r}')
  columns = jnp.arange(real_BT.shape[1])
  at_B = jnp.argmax(real_BT, axis=1) if how == 'first' else jnp.where(real_BT, columns, 0).max(1)
  return jnp.take_along_axis(hidden_BTD, at_B[:, None, None], axis=1)[:, 0]
