"""Continuing text: prefill, the decode loop, beams; pure functions of a Transformer and its parameters.

Prompts of unequal length are padded on the right to a few sizes, so that programs are few. The loop runs a block of
tokens on the device; between blocks the host looks whether anything is left to do.
"""
import dataclasses
import functools
from typing import Any, Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.models.config import ModelConfig
from jaxlm.models.stack import BlockCache, init_cache, join, unstack
from jaxlm.models.transformer import Transformer
from jaxlm.sampling import Program, Sampling, bucket, choose, ends, penalised, sampling_numbers, specialised
from jaxlm.types import Array, Ids, Prompt, Tree

BLOCK = 32   # tokens a row between two looks of the host: a stop string is noticed so many too late at most
JOINED = 1 << 19  # weights of a matrix that is still small
NONE = -1    # in arrays of produced ids: nothing was produced here


def generate(model: Transformer, params: Tree, prompts: Sequence[Ids | Prompt], max_new_tokens: int = 64,
             sampling: Sampling = Sampling(), eos: Ids = (), stopped: Callable[[list[int]], bool] | None = None,
             batch_size: int = 32, first: Sequence[np.ndarray | None] | None = None) -> list[list[int]]:
  """Continues prompts.

  Args:
    model: one that continues texts; scanned or not, on any mesh.
    params: its parameters.
    prompts: ids, at least one each; or with more to say.
    max_new_tokens: length of a continuation, at most.
    sampling: how tokens are chosen.
    eos: ids that end a row.
    stopped: asked between blocks with a row's continuation so far; True ends the row. Beams do not ask.
    batch_size: rows continued at once.
    first: for each prompt which ids may come first, bool [V], or None: any (`Tokenizer.encode_prompt`).
  Returns:
    Continuations alone, in the order of the prompts; one that ended has its end token last.
  Raises:
    JaxlmError: an id outside the vocabulary, an empty prompt, more tokens than learned positions, a model that does
      not predict the next token.
  """
  prompts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
  _check(model, prompts, max_new_tokens, eos, batch_size)
  outputs: list[list[int]] = [[] for _ in prompts]
  if not max_new_tokens or not prompts:
    return outputs
  model, params = unrolled(model, params)
  by_length = sorted(range(len(prompts)), key=lambda row: (len(prompts[row].ids), len(prompts[row].source)))
  for start in range(0, len(prompts), batch_size):
    rows = by_length[start:start + batch_size]
    inputs = pad(model, [prompts[row] for row in rows], rows)
    if first is not None and any(first[row] is not None for row in rows):
      allowed_BV = np.ones((len(inputs.lengths_B), model.config.vocab_size), bool)
      for i, row in enumerate(rows):
        allowed_BV[i] = True if first[row] is None else first[row]
      inputs = inputs.replace(allowed_BV=allowed_BV)
    length = _cache_length(model, max(len(prompts[row].ids) for row in rows) + max_new_tokens)
    if sampling.num_beams > 1:
      blocks = iter([_beams(model, params, inputs, length, max_new_tokens, sampling, eos)])
    else:
      blocks = _loop(model, params, inputs, length, max_new_tokens, sampling, eos,
                     lambda i: stopped is not None and stopped(outputs[rows[i]]))
    for ids_BT in blocks:
      for row, ids in zip(rows, ids_BT.tolist()):
        outputs[row] += [i for i in ids if i != NONE]
  return outputs


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


def _check(model: Transformer, prompts: Sequence[Prompt], max_new_tokens: int, eos: Ids, batch_size: int) -> None:
  if not continues(model.config):
    raise JaxlmError('This model sees both sides of a token, so it cannot continue a text; '
                     "use one trained with objective.name='causal'." if model.config.head.lm else
                     'This model has no output layer, so it cannot continue a text.')
  for name, value, low in (('max_new_tokens', max_new_tokens, 0), ('batch_size', batch_size, 1)):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
      raise JaxlmError(f'{name} must be an integer, at least {low}; got {value!r}.')
  for row, prompt in enumerate(prompts):
    ids = prompt.ids
    if not len(ids) or model.config.structure == 'encoder_decoder' and not len(prompt.source):
      raise JaxlmError(f'Prompt {row} is empty; give it one token at least, the one that begins a document, say.')
    check_tokens(np.asarray(list(prompt.source), np.int64), model.config.vocab_size, f'Prompt {row}')
    check_length(model, len(prompt.source), f'Prompt {row}', 'Shorten it.')
    check_tokens(ids, model.config.vocab_size, f'Prompt {row}')
    room = model.config.max_length - len(ids)
    check_length(model, len(ids) + max_new_tokens, f'Prompt {row} ({len(ids)} tokens) with max_new_tokens='
                 f'{max_new_tokens}', f'Lower max_new_tokens to {room} or shorten the prompt.' if room > 0 else
                 'Shorten the prompt.')
  check_tokens(np.asarray(list(eos), np.int64), model.config.vocab_size, 'The end token')


# ---- the model ---------------------------------------------------------------------------------------------------


def _read(model: Transformer, params: Tree, program: Program, batch: dict[str, Array], cache: list[BlockCache],
          last_B: Array) -> tuple[Array, list[BlockCache]]:
  """(float32 logits at column last_B, -inf beyond the vocabulary; the cache with the batch in it)."""
  out = model.apply({'params': params}, batch, cache, with_logits=False)
  features_B1E = jnp.take_along_axis(out.features, last_B[:, None, None], axis=1)
  logits_BV = model.apply({'params': params}, features_B1E, method='logits')[:, 0]
  return jnp.where(jnp.arange(logits_BV.shape[1]) < program.vocab_size, logits_BV, -jnp.inf), out.cache


def _prefill(model: Transformer, params: Tree, program: Program, inputs: Inputs,
             length: int) -> tuple[Array, list[BlockCache], Array | None]:
  """Reads the prompts: (logits of the first new token, cache, which ids were seen)."""
  B, T = inputs.tokens_BT.shape
  real_BT = jnp.arange(T) < inputs.lengths_B[:, None]
  cache = init_cache(model.config, B, length, 0 if inputs.source_BS is None else inputs.source_BS.shape[1])
  batch = batch_of(model.config, inputs.tokens_BT, real_BT, inputs) | sources(inputs)
  logits_BV, cache = _read(model, params, program, batch, cache, jnp.maximum(inputs.lengths_B - 1, 0))
  if inputs.allowed_BV is not None:
    allowed_BV = jnp.pad(inputs.allowed_BV, ((0, 0), (0, logits_BV.shape[1] - inputs.allowed_BV.shape[1])))
    logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
  seen_BV = None
  if program.penalises:
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], inputs.tokens_BT].max(real_BT)
  return logits_BV, cache, seen_BV


def _advance(model: Transformer, params: Tree, program: Program, cache: list[BlockCache], seen_BV: Array | None,
             inputs: Inputs, ids_B: Array, columns_B: Array,
             real_B: Array) -> tuple[Array, list[BlockCache], Array | None]:
  """Reads one token a row; rows that are not real write nothing."""
  batch = batch_of(model.config, ids_B[:, None], real_B[:, None], inputs, columns_B[:, None])
  logits_BV, cache = _read(model, params, program, batch, cache, jnp.zeros_like(ids_B))
  if program.penalises:
    seen_BV = seen_BV.at[jnp.arange(ids_B.shape[0]), ids_B].max(real_B)
  return logits_BV, cache, seen_BV


def _single_token(model: Transformer, params: Tree, rows: int) -> tuple[Transformer, Tree]:
  """The same for one token at a time, whose scores are few: kernels that cut them in blocks only cost.

  A product of a row with few weights runs on one core, which does not read as fast as the memory gives: then the matrices
  of queries, keys and values are made one.
  """
  config, attention = model.config, model.config.attention
  size = config.width * attention.num_heads * attention.head_dim
  plain = config.mixer == 'attention' and config.structure != 'two_stream' and not attention.latent.kv_rank
  joined = rows == 1 and plain and size < JOINED and model.layout.mesh.size == 1 and not config.share_layers
  config = dataclasses.replace(config, attention=dataclasses.replace(attention, kernel='dense'), joined=joined)
  return Transformer(config, model.layout), join(params, config) if joined else params


def _cache_length(model: Transformer, needed: int) -> int:
  """Slots of a cache for `needed` tokens, few different numbers; not above what a learned table can fill."""
  slots = bucket(needed, 64)
  return min(slots, model.config.max_length) if model.config.positions.kind == 'learned' else slots


# ---- the loop ----------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Rows:
  """Between two tokens.

  Attributes:
    cache: of all tokens but the newest.
    seen_BV: ids in prompt and continuation, the newest not yet; None where repetition costs nothing.
    newest_B: the token chosen last, which the model has not read.
    columns_B: where it stands in the text.
    done_B: rows that ended.
    inputs: the prompts, without what only reading them needs.
  """
  cache: list[BlockCache]
  seen_BV: Array | None
  newest_B: Array
  columns_B: Array
  done_B: Array
  inputs: Inputs


@functools.partial(jax.jit, static_argnames=('model', 'program', 'length'))
def _start(model, params, program, numbers, inputs, length) -> tuple[Rows, Array]:
  """Prompts read, the first token chosen: (state, ids [B, 1])."""
  logits_BV, cache, seen_BV = _prefill(model, params, program, inputs, length)
  ids_B = choose(program, numbers, logits_BV, seen_BV, inputs.rows_B, inputs.lengths_B)
  empty_B = inputs.lengths_B == 0
  done_B = _whole(model, empty_B | ends(program, ids_B))
  state = Rows(cache, seen_BV, ids_B, inputs.lengths_B, done_B, _continued(inputs))
  return state, _whole(model, jnp.where(empty_B, NONE, ids_B)[:, None])


@functools.partial(jax.jit, static_argnames=('model', 'program'), donate_argnames=('state',))
def _block(model, params, program, numbers, state, stopped_B, steps) -> tuple[Rows, Array]:
  """Up to BLOCK more tokens, fewer where `steps` is less or all rows ended: (state, ids [B, BLOCK])."""
  state, (model, params) = state.replace(done_B=state.done_B | stopped_B), _single_token(model, params, len(stopped_B))

  def more(carry):
    step, state, _ = carry
    return (step < steps) & ~state.done_B.all()

  def body(carry):
    step, state, ids_BT = carry
    logits_BV, cache, seen_BV = _advance(model, params, program, state.cache, state.seen_BV, state.inputs,
                                         state.newest_B, state.columns_B, ~state.done_B)
    columns_B = state.columns_B + ~state.done_B
    ids_B = choose(program, numbers, logits_BV, seen_BV, state.inputs.rows_B, columns_B)
    ids_BT = jax.lax.dynamic_update_slice_in_dim(ids_BT, jnp.where(state.done_B, NONE, ids_B)[:, None], step, axis=1)
    state = state.replace(cache=cache, seen_BV=seen_BV, newest_B=ids_B, columns_B=columns_B,
                          done_B=state.done_B | ends(program, ids_B))
    return step + 1, state, ids_BT

  empty_BT = jnp.full((state.newest_B.shape[0], BLOCK), NONE, jnp.int32)
  _, state, ids_BT = jax.lax.while_loop(more, body, (jnp.int32(0), state, empty_BT))
  return state.replace(done_B=_whole(model, state.done_B)), _whole(model, ids_BT)


def _continued(inputs: Inputs) -> Inputs:
  """What is still needed of prompts that have been read."""
  return inputs.replace(tokens_BT=None, lengths_B=None, source_BS=None, source_lengths_B=None, allowed_BV=None)


def _whole(model: Transformer, x: Array) -> Array:
  """Replicated: every process of a run reads the same, and decides the same."""
  return jax.lax.with_sharding_constraint(x, model.layout.replicated)


def _loop(model: Transformer, params: Tree, inputs: Inputs, length: int, max_new_tokens: int, sampling: Sampling,
          eos: Ids, stopped: Callable[[int], bool]) -> Iterator[np.ndarray]:
  """Yields ids [B, BLOCK] (at first [B, 1]) as they are produced, NONE where a row has ended.

  Args:
    stopped: asked, after each block was taken, for each row of the batch that is not filling.
  """
  program = specialised(model.config.vocab_size, sampling, eos)
  numbers = sampling_numbers(sampling, program)
  state, ids_BT = _start(model, params, program, numbers, inputs, length)
  num_rows, produced = int((inputs.lengths_B > 0).sum()), 1
  stopped_B = np.zeros(len(inputs.lengths_B), bool)
  yield np.asarray(ids_BT)[:num_rows]
  while produced < max_new_tokens:
    stopped_B[:num_rows] |= [stopped(row) for row in range(num_rows)]
    if (np.asarray(state.done_B) | stopped_B).all():
      return
    steps = min(BLOCK, max_new_tokens - produced)
    state, ids_BT = _block(model, params, program, numbers, state, stopped_B, np.int32(steps))
    produced += steps
    yield np.asarray(ids_BT)[:num_rows]


# ---- beams -------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Beams:
  """Beam search between two tokens; W beams a row, those of a row side by side in the model's batch.

  Attributes:
    cache, seen_RV: of R = B·W beams.
    logits_RV: of each beam's next token.
    ids_BWT: continuations so far, NONE where there is nothing yet.
    total_BW: their log-probabilities, summed; -inf: no such beam.
    best_ids_BT: the best continuation that ended.
    best_B: its score.
  """
  cache: list[BlockCache]
  seen_RV: Array | None
  logits_RV: Array
  ids_BWT: Array
  total_BW: Array
  best_ids_BT: Array
  best_B: Array


def _beams(model: Transformer, params: Tree, inputs: Inputs, length: int, max_new_tokens: int, sampling: Sampling,
           eos: Ids) -> np.ndarray:
  """The best continuation of each row, ids [B, T], NONE after its end."""
  program = specialised(model.config.vocab_size, sampling, eos)
  num_rows = int((inputs.lengths_B > 0).sum())
  ids_BT = _search(model, params, program, sampling_numbers(sampling, program), inputs, np.int32(max_new_tokens),
                   np.float32(sampling.length_penalty), length=length, num_beams=sampling.num_beams,
                   size=bucket(max_new_tokens))
  return np.asarray(ids_BT)[:num_rows]


@functools.partial(jax.jit, static_argnames=('model', 'program', 'length', 'num_beams', 'size'))
def _search(model, params, program, numbers, inputs, steps, length_penalty, length, num_beams, size) -> Array:
  """Beam search that goes on until no beam can become better than the best continuation that ended.

  An end counts where it is among the W best next tokens of a row, as in Hugging Face's search; so one beam with
  length_penalty 0 is the greedy continuation.
  """
  B, W, V = inputs.tokens_BT.shape[0], num_beams, model.config.padded_vocab
  num_candidates = min(W * (1 + len(program.eos)), W * V)
  score = lambda total, n: total / n.astype(jnp.float32) ** length_penalty
  spread = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, W, axis=0), tree)
  first_row_B1 = jnp.arange(B)[:, None] * W

  def more(carry):
    step, beams = carry
    # The best a beam can still score: no further loss, at the length that suits it.
    bound_B = score(beams.total_BW.max(1), jnp.where(length_penalty > 0, steps, step + 1))
    return (step < steps) & (bound_B > beams.best_B).any()

  def body(carry):
    step, beams = carry
    logp_RV = penalised(program, numbers, jax.nn.log_softmax(beams.logits_RV), beams.seen_RV)
    total_BX = (beams.total_BW[:, :, None] + logp_RV.reshape(B, W, V)).reshape(B, W * V)
    total_BC, index_BC = jax.lax.top_k(total_BX, num_candidates)
    beam_BC, id_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
    ids_BCT = jnp.take_along_axis(beams.ids_BWT, beam_BC[:, :, None], axis=1).at[:, :, step].set(id_BC)
    ends_BC = ends(program, id_BC)

    ended_BC = jnp.where(ends_BC & (jnp.arange(num_candidates) < W), score(total_BC, step + 1), -jnp.inf)
    at_B11, ended_B = ended_BC.argmax(1)[:, None, None], ended_BC.max(1)
    best_ids_BT = jnp.where((ended_B > beams.best_B)[:, None], jnp.take_along_axis(ids_BCT, at_B11, axis=1)[:, 0],
                            beams.best_ids_BT)

    total_BW, kept_BW = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, total_BC), W)
    pick = lambda x_BC: jnp.take_along_axis(x_BC, kept_BW, axis=1)
    row_R = (first_row_B1 + pick(beam_BC)).reshape(-1)
    cache, seen_RV = jax.tree.map(lambda x: x[row_R], (beams.cache, beams.seen_RV))
    logits_RV, cache, seen_RV = _advance(
        *single, program, cache, seen_RV, spread(_continued(inputs)), pick(id_BC).reshape(-1),
        jnp.repeat(inputs.lengths_B, W) + step, jnp.isfinite(total_BW).reshape(-1))
    return step + 1, Beams(cache, seen_RV, logits_RV, jnp.take_along_axis(ids_BCT, kept_BW[:, :, None], axis=1),
                           total_BW, best_ids_BT, jnp.maximum(ended_B, beams.best_B))

  single, (logits_BV, cache, seen_BV) = _single_token(model, params, B * W), _prefill(model, params, program, inputs, length)
  # All beams of a row are one beam at first; rows that only fill the batch have none.
  total_BW = jnp.where((jnp.arange(W) == 0) & (inputs.lengths_B > 0)[:, None], 0.0, -jnp.inf)
  beams = Beams(spread(cache), spread(seen_BV), spread(logits_BV), jnp.full((B, W, size), NONE, jnp.int32), total_BW,
                jnp.full((B, size), NONE, jnp.int32), jnp.full((B,), -jnp.inf))
  _, beams = jax.lax.while_loop(more, body, (jnp.int32(0), beams))
  alive_B = score(beams.total_BW[:, 0], steps)
  return _whole(model, jnp.where((alive_B > beams.best_B)[:, None], beams.ids_BWT[:, 0], beams.best_ids_BT))
