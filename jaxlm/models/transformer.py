"""Transformer: every family's model, a tower with words and heads, and what may stand beside it, by ModelConfig."""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models import virtual
from jaxlm.models.attention import Tokens
from jaxlm.models.config import ModelConfig
from jaxlm.models.layers import Dense, Embedding, dropout, example_keys, fold, softcap
from jaxlm.models.stack import Aux, Block, Cache, add, init_cache
from jaxlm.models.tower import EMBEDDING_LAYER, Side, Tower, Transform
from jaxlm.sums import by_pieces
from jaxlm.types import Array, Output

# Up to so many rows the output matrix, which is large, comes first in a product: on a CPU 2.4 times as fast at 8 rows
# of 50,304 logits. The barrier keeps XLA from turning it back.
FEW = 256
PIECE = 1 << 25  # logits that exist at once where a text's best ones are looked for
TOWER = EMBEDDING_LAYER + 1  # another number that no layer has, folded into dropout keys: of another tower


def _by_mixture(aux: Aux, config: ModelConfig, heads: int) -> Aux:
  """Means over mixture layers, an encoder's and so many future heads' among them, of sums over them."""
  towers = [tower for start, tower in config.towers().items() if start in ('', 'encoder/')]
  count = sum(kind.moe for tower in towers for kind in tower.layer_kinds()) + heads * config.layer_kinds()[-1].moe
  return {name: x_B / count for name, x_B in aux.items()}


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

  def __call__(self, batch: dict[str, Array], cache: Cache | None = None, rng: Array | None = None,
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

  def _remember(self, batch: dict[str, Array]) -> Cache:
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
    context = self.context(side.tokens, side).replace(virtual=None, prefix=None)
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
