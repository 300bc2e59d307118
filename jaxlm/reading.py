"""A model that reads: prompts as arrays, all of a prompt into a cache, then a token at a time.

Prompts of unequal length are padded on the right to a few sizes, so that programs are few.
"""
import dataclasses
import functools
from typing import Any, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import transfer, trees
from jaxlm.errors import JaxlmError
from jaxlm.models.config import ModelConfig
from jaxlm.models.products import OUTPUTS_FIRST
from jaxlm.models.stack import Cache, init_cache, unstack
from jaxlm.models.transformer import Transformer
from jaxlm.sampling import Program, bucket, choose, ends
from jaxlm.types import Array, Prompt, Tree

PIECE = 512       # columns of a prompt read at once
NONE = -1         # in arrays of produced ids: nothing was produced here


def unrolled(model: Transformer, params: Tree) -> tuple[Transformer, Tree]:
  """The model that decodes, a layer after the other, and its parameters; what trains scans over layers stacked."""
  config = dataclasses.replace(model.config, scan=False, remat='none')
  # One token has no length to split.
  columns = 'act_length', 'act_stream'
  rules = tuple((logical, None if logical in columns else axes) for logical, axes in model.layout.rules)
  if model.config.scan:
    params = _unstack(params, config, model.layout)
  return Transformer(config, dataclasses.replace(model.layout, rules=rules)), params


_unstack = jax.jit(unstack, static_argnames=('config', 'layout'))


def check_tokens(tokens: np.ndarray, vocab_size: int, what: str) -> None:
  """Raises JaxlmError where ids are outside the vocabulary, which an array lookup would turn into NaN silently."""
  tokens = np.asarray(tokens)
  if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
    raise JaxlmError(f'{what}: wanted token ids, got {tokens.dtype}; encode text with the tokenizer first.')
  wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
  if wrong.size:
    raise JaxlmError(f'{what}: token id {wrong.flat[0]} is outside the vocabulary, 0 to {vocab_size - 1}; '
                     "use this model's own tokenizer.")


def check_length(model: Transformer, needed: int, what: str, remedy: str) -> None:
  """Raises JaxlmError where a row would be longer than the positions a model learned; other kinds have no end."""
  config = model.config
  if config.positions.kind == 'learned' and needed > config.max_length:
    raise JaxlmError(f'{what} needs {needed} positions; the model learned {config.max_length}. {remedy}')


@flax.struct.dataclass
class Inputs:
  """Prompts as arrays. Rows that only fill the batch up have length 0.

  Attributes:
    tokens_BT: ids, padded on the right.
    lengths_B: tokens of each row that are real.
    rows_B: the row's number, which keys its draws.
    context_B, blank_B: as in `Prompt`.
    source_BS: what the encoder reads, padded on the right, or None.
    source_lengths_B: tokens of it that are real, or None.
    allowed_BV: which ids may be the first new one, or None: any.
  """
  tokens_BT: Any
  lengths_B: Any
  rows_B: Any
  context_B: Any
  blank_B: Any
  source_BS: Any = None
  source_lengths_B: Any = None
  allowed_BV: Any = None


def pad(model: Transformer, prompts: Sequence[Prompt], rows: Sequence[int] | None = None) -> Inputs:
  """Prompts of unequal length as arrays; as many rows as a power of two a part of the mesh's batch axes.

  Args:
    prompts: one at least.
    rows: their numbers; None: 0, 1, ….
  """
  parts = model.layout.batch_parts
  B = parts * bucket(-(-len(prompts) // parts), 1)

  def filled(sequences):
    ids_BT, lengths_B = np.zeros((B, bucket(max(map(len, sequences)))), np.int32), np.zeros(B, np.int32)
    for i, ids in enumerate(sequences):
      ids_BT[i, :len(ids)], lengths_B[i] = ids, len(ids)
    return ids_BT, lengths_B

  column = lambda values: np.pad(np.array(list(values), np.int32), (0, B - len(prompts)))
  source = filled([p.source for p in prompts]) if model.config.structure == 'encoder_decoder' else (None, None)
  return Inputs(*filled([p.ids for p in prompts]), column(range(len(prompts)) if rows is None else rows),
                column(p.context for p in prompts),
                column(p.blank for p in prompts), *source)


def places(config: ModelConfig, inputs: Inputs, columns_BT: Array) -> dict[str, Array]:
  """What a batch says of the tokens in these columns of prompts and their continuations."""
  context_B1 = inputs.context_B[:, None]
  order_BT = jnp.maximum(columns_BT - context_B1 + 1, 0)
  filled_BT = (order_BT > 0) & (inputs.blank_B[:, None] >= 0)
  return {'slots': columns_BT, 'positions': jnp.where(filled_BT, inputs.blank_B[:, None], columns_BT),
          'order': order_BT, 'block_positions': order_BT}


def batch_of(config: ModelConfig, tokens_BT: Array, real_BT: Array, inputs: Inputs | None = None,
             columns_BT: Array | None = None) -> dict[str, Array]:
  """What the model reads of rows whose tokens are all one document but for padding, wherever that stands.

  Whatever the structure, features of a column predict the token after it (of two streams, the query is there).

  Args:
    inputs: what the rows are prompts of; None: all is produced, from left to right.
    columns_BT: of the tokens in their text; None: they are counted.
  """
  if columns_BT is None:
    # Padding stands at 0 too: a learned table has no row for what is beyond its end, and would give NaN.
    columns_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1, 0)
  if inputs is None:
    zeros_B = jnp.zeros(tokens_BT.shape[:1], jnp.int32)
    inputs = Inputs(None, None, None, zeros_B, zeros_B - 1)
  segments_BT = real_BT.astype(jnp.int32)
  batch = {'tokens': tokens_BT, 'segment_ids': segments_BT} | places(config, inputs, columns_BT)
  if config.structure == 'two_stream':
    following = places(config, inputs, columns_BT + 1)
    batch |= {'query_positions': following['positions'], 'query_order': following['order'],
              'query_segment_ids': segments_BT}
  return batch


def sources(inputs: Inputs) -> dict[str, Array]:
  """What a batch says of the encoder's side; nothing where there is none."""
  if inputs.source_BS is None:
    return {}
  real_BS = jnp.arange(inputs.source_BS.shape[1]) < inputs.source_lengths_B[:, None]
  return {'source_tokens': inputs.source_BS, 'source_segment_ids': real_BS.astype(jnp.int32)}


def continues(config: ModelConfig) -> bool:
  """Whether a model can continue a text."""
  return config.head.lm and config.visibility != 'full'


# ---- the model ---------------------------------------------------------------------------------------------------


def logits_of(model: Transformer, params: Tree, program: Program, features_BTE: Array) -> Array:
  """float32 [B, T, V], -inf beyond the vocabulary."""
  logits_BTV = model.apply({'params': params}, features_BTE, method='logits')
  return jnp.where(jnp.arange(logits_BTV.shape[2]) < program.vocab_size, logits_BTV, -jnp.inf)


def prefill(model: Transformer, params: Tree, program: Program, inputs: Inputs, length: int,
            spare: int = 0) -> tuple[Array, Cache, Array | None]:
  """Reads the prompts: (logits of the first new token, cache, which ids were seen).

  Args:
    length: slots of the cache.
    spare: more of them where a window keeps fewer, for tokens that may be taken back.
  """
  B, T = inputs.tokens_BT.shape
  real_BT = jnp.arange(T) < inputs.lengths_B[:, None]
  source = 0 if inputs.source_BS is None else inputs.source_BS.shape[1]
  cache = init_cache(model.config, B, length, source, spare)
  last_B = jnp.maximum(inputs.lengths_B - 1, 0)

  def read(cache, first, size, more):
    cut = lambda x_BT: jax.lax.dynamic_slice_in_dim(x_BT, first, size, axis=1)
    columns_BT = jnp.minimum(first + jnp.arange(size, dtype=jnp.int32), last_B[:, None])
    batch = batch_of(model.config, cut(inputs.tokens_BT), cut(real_BT), inputs, columns_BT) | more
    out = model.apply({'params': params}, batch, cache, with_logits=False)
    at_B11 = jnp.clip(last_B - first, 0, size - 1)[:, None, None]
    return out.cache, jnp.take_along_axis(out.features, at_B11, axis=1)

  size = _piece(model.config, T)
  cache, features_B1E = read(cache, 0, size, sources(inputs))
  if size < T:
    def go_on(carry, first):
      cache, features_B1E = carry
      cache, here_B1E = read(cache, first, size, {})
      return (cache, jnp.where((last_B >= first)[:, None, None], here_B1E, features_B1E)), None
    (cache, features_B1E), _ = jax.lax.scan(go_on, (cache, features_B1E), jnp.arange(size, T, size))
  logits_BV = logits_of(model, params, program, features_B1E)[:, 0]
  if inputs.allowed_BV is not None:
    allowed_BV = jnp.pad(inputs.allowed_BV, ((0, 0), (0, logits_BV.shape[1] - inputs.allowed_BV.shape[1])))
    logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
  seen_BV = None
  if program.penalises:
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], inputs.tokens_BT].max(real_BT)
  return logits_BV, cache, seen_BV


def begin(model: Transformer, params: Tree, program: Program, numbers: dict[str, Array], inputs: Inputs, length: int,
          spare: int = 0) -> tuple[Cache, Array | None, Array, Array]:
  """Prompts read, the first token chosen: (cache, which ids were seen, the token [B], which rows have ended)."""
  logits_BV, cache, seen_BV = prefill(model, params, program, inputs, length, spare)
  ids_B = choose(program, numbers, logits_BV, seen_BV, inputs.rows_B, inputs.lengths_B)
  return cache, seen_BV, ids_B, (inputs.lengths_B == 0) | ends(program, ids_B)


def told(model: Transformer, inputs: Inputs, ids_B: Array) -> Array:
  """[B, 1], the first token of each row; NONE where a row only fills the batch up."""
  return replicated(model, jnp.where(inputs.lengths_B == 0, NONE, ids_B)[:, None])


def _piece(config: ModelConfig, length: int) -> int:
  """Columns of a prompt that are read at once, so that scores are of PIECE queries at most; all, where some look on."""
  pieces = 1
  while config.visibility == 'causal' and length % (2 * pieces) == 0 and length // pieces > PIECE:
    pieces *= 2
  return length // pieces


def extend(model: Transformer, params: Tree, program: Program, cache: Cache, inputs: Inputs, ids_BT: Array,
           columns_BT: Array, real_BT: Array) -> tuple[Array, Cache]:
  """(logits [B, T, V] after each of these tokens; the cache with them in it, but for those that are not real)."""
  batch = batch_of(model.config, ids_BT, real_BT, inputs, columns_BT)
  out = model.apply({'params': params}, batch, cache, with_logits=False)
  return logits_of(model, params, program, out.features), out.cache


def advance(model: Transformer, params: Tree, program: Program, cache: Cache, seen_BV: Array | None,
            inputs: Inputs, ids_B: Array, columns_B: Array,
            real_B: Array) -> tuple[Array, Cache, Array | None]:
  """Reads one token a row; rows that are not real write nothing."""
  logits_B1V, cache = extend(model, params, program, cache, inputs, ids_B[:, None], columns_B[:, None], real_B[:, None])
  return logits_B1V[:, 0], cache, seen(program, seen_BV, ids_B, real_B)


def seen(program: Program, seen_BV: Array | None, ids_B: Array, real_B: Array) -> Array | None:
  """Which ids were seen, a token a row included."""
  return seen_BV.at[jnp.arange(ids_B.shape[0]), ids_B].max(real_B) if program.penalises else None


def single_token(model: Transformer) -> Transformer:
  """The same for one token at a time, whose scores are few: kernels that cut them in blocks only cost."""
  attention = dataclasses.replace(model.config.attention, kernel='dense')
  return Transformer(dataclasses.replace(model.config, attention=attention), model.layout)


def for_one_row(model: Transformer, params: Tree) -> tuple[Transformer, Tree] | None:
  """The same for one row in a program compiled with `products.OF_ONE`, its small kernels copied; None where that does
  not hold."""
  config = model.config
  if (model.layout.platform != 'cpu' or model.layout.mesh.size > 1 or config.products != 'compute'
      or config.peft.method == 'lora' or config.peft.base != 'same'):
    return None
  model = Transformer(dataclasses.replace(config, outputs_first=True), model.layout)
  return model, _outputs_first(model, params)


@functools.partial(jax.jit, static_argnums=0)
def _outputs_first(model: Transformer, params: Tree) -> Tree:
  """Parameters of a model that keeps some kernels outputs first, made of those of one that does not."""
  leaves = trees.flatten(params)
  for path, want in trees.flatten(transfer.wanted(model)).items():
    if path.endswith(OUTPUTS_FIRST):
      leaves[path] = leaves.pop(path.removesuffix(OUTPUTS_FIRST) + 'kernel').reshape(want.shape[::-1]).T
  return trees.unflatten(leaves)


def cache_length(model: Transformer, needed: int) -> int:
  """Slots of a cache for `needed` tokens, few different numbers; not above what a learned table can fill."""
  slots = bucket(needed, 64)
  return min(slots, model.config.max_length) if model.config.positions.kind == 'learned' else slots


def continued(inputs: Inputs) -> Inputs:
  """What is still needed of prompts that have been read."""
  return inputs.replace(tokens_BT=None, lengths_B=None, source_BS=None, source_lengths_B=None, allowed_BV=None)


def replicated(model: Transformer, x: Array) -> Array:
  """Replicated: every process of a run reads the same, and decides the same."""
  return jax.lax.with_sharding_constraint(x, model.layout.replicated)
