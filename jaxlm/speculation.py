"""Speculative decoding: something cheap guesses the next tokens, and the model checks all of them in one pass.

Whatever is guessed, the continuation is the model's own: the likeliest tokens where those are wanted, and else draws
from its own distribution. Guesses come from a smaller model, or from what followed the last tokens where they stood
before.

Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318. Guessing from the
text: Saxena 2023, Prompt lookup decoding.
"""
import dataclasses
import functools
from typing import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import reading
from jaxlm.errors import JaxlmError
from jaxlm.models.stack import Cache
from jaxlm.models.transformer import Transformer
from jaxlm.reading import NONE
from jaxlm.sampling import (Program, Sampling, ends, keys, likeliest, penalised, restricted, sampling_numbers,
                            specialised)
from jaxlm.types import Array, Ids, Tree

GUESS, ACCEPT, INSTEAD = 1, 2, 3  # the draws of a place, each with a key of its own


@dataclasses.dataclass(frozen=True)
class Guesses:
  """How tokens are guessed.

  Attributes:
    tokens: guessed at a time.
    lookup: the longest run of last tokens that is looked for in the text before; 0: `draft` guesses.
    draft, params: a model with the same vocabulary, unrolled, and its parameters.
  """
  tokens: int = 4
  lookup: int = 0
  draft: Transformer | None = None
  params: Tree = None

  def __post_init__(self):
    for name, low in (('tokens', 1), ('lookup', 0)):
      value = getattr(self, name)
      if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise JaxlmError(f'guesses: {name} must be an integer, at least {low}; got {value!r}.')
    if bool(self.lookup) == (self.draft is not None):
      raise JaxlmError('Guesses come from a draft model or from lookup; give one of the two.')


def check(model: Transformer, guesses: Guesses, sampling: Sampling) -> None:
  """Raises JaxlmError where a model cannot take tokens back, or guesses are of another vocabulary."""
  for what, each in (('This model', model), ('The draft model', guesses.draft)):
    if each is not None and (each.config.mixer != 'attention' or each.config.structure == 'two_stream'):
      raise JaxlmError(f'{what} cannot take back tokens that were guessed wrongly; leave draft and lookup out.')
  if sampling.num_beams > 1:
    raise JaxlmError(f'num_beams={sampling.num_beams} searches, and guesses are for one continuation; set num_beams=1.')
  if guesses.draft is not None:
    ours, theirs = model.config, guesses.draft.config
    for name in ('vocab_size', 'structure'):
      if getattr(ours, name) != getattr(theirs, name):
        raise JaxlmError(f"The draft model's {name} must be the model's, {getattr(ours, name)}; got "
                         f'{getattr(theirs, name)}.')
    if theirs.positions.kind == 'learned' and theirs.max_length < ours.max_length and ours.positions.kind == 'learned':
      raise JaxlmError(f'The draft model learned {theirs.max_length} positions, the model {ours.max_length}; '
                       'take a draft model that has as many.')


@flax.struct.dataclass
class Rows:
  """Between two passes of the model; in part as `decode.Rows`.

  Attributes:
    cache: of all tokens but the newest; what stands in it behind them is written again before it is read.
    guesser: the draft model's cache, likewise; or the text, int32 [B, L].
    seen_BV: ids before the newest, or None.
    newest_B: the token chosen last.
    columns_B: where it stands.
    ends_B: the column that a row's continuation does not reach.
    done_B: rows that ended.
    inputs: the prompts, without what only reading them needs.
  """
  cache: Cache
  guesser: Cache | Array
  seen_BV: Array | None
  newest_B: Array
  columns_B: Array
  ends_B: Array
  done_B: Array
  inputs: reading.Inputs


def loop(guesses: Guesses, model: Transformer, params: Tree, inputs: reading.Inputs, length: int, max_new_tokens: int,
         sampling: Sampling, eos: Ids, stopped: Callable[[int], bool], every: int) -> Iterator[np.ndarray]:
  """As `decode`'s loop: yields ids [B, T] as they are produced, NONE where a row has produced fewer.

  Args:
    every: tokens a row, at least, between two looks of the host.
  """
  program = specialised(model.config.vocab_size, sampling, eos)
  numbers = sampling_numbers(sampling, program)
  how = dict(draft=guesses.draft, lookup=guesses.lookup, tokens=guesses.tokens)
  state, ids_BT = _start(model, params, guesses.params, program, numbers, inputs, np.int32(max_new_tokens),
                         length=length, **how)
  num_rows = int((inputs.lengths_B > 0).sum())
  stopped_B = np.zeros(len(inputs.lengths_B), bool)
  while True:
    yield np.asarray(ids_BT)[:num_rows]
    stopped_B[:num_rows] |= [stopped(row) for row in range(num_rows)]
    if (np.asarray(state.done_B) | stopped_B).all():
      return
    state, ids_BT = _block(model, params, guesses.params, program, numbers, state, stopped_B, block=every, **how)


@functools.partial(jax.jit, static_argnames=('model', 'program', 'length', 'draft', 'lookup', 'tokens'))
def _start(model, params, draft_params, program, numbers, inputs, max_new_tokens, length, draft, lookup, tokens):
  """Prompts read by all who must, the first token chosen: (state, ids [B, 1])."""
  cache, seen_BV, ids_B, done_B = reading.begin(model, params, program, numbers, inputs, length, tokens)
  T = inputs.tokens_BT.shape[1]
  if lookup:
    guesser = _put(jnp.pad(inputs.tokens_BT, ((0, 0), (0, max(length - T, 0)))), ids_B[:, None], inputs.lengths_B,
                   jnp.ones_like(ids_B))
  else:
    _, guesser, _ = reading.prefill(draft, draft_params, program, inputs, length, tokens)
  done_B = reading.replicated(model, done_B | (max_new_tokens <= 1))
  state = Rows(cache, guesser, seen_BV, ids_B, inputs.lengths_B, inputs.lengths_B + max_new_tokens, done_B,
               reading.continued(inputs))
  return state, reading.told(model, inputs, ids_B)


@functools.partial(jax.jit, static_argnames=('model', 'program', 'draft', 'lookup', 'tokens', 'block'),
                   donate_argnames=('state',))
def _block(model, params, draft_params, program, numbers, state, stopped_B, draft, lookup, tokens, block):
  """`block` more tokens of each row, or some more, or fewer where it ends: (state, ids [B, block + tokens])."""
  state = state.replace(done_B=state.done_B | stopped_B)
  many = reading.single_token(model)
  guess = functools.partial(_looked_up, lookup) if lookup else functools.partial(
      _drafted, reading.single_token(draft), draft_params)

  def more(carry):
    state, _, filled_B = carry
    return (~state.done_B & (filled_B < block)).any()

  def body(carry):
    state, ids_BT, filled_B = carry
    active_B = ~state.done_B & (filled_B < block)
    columns_BX = state.columns_B[:, None] + jnp.arange(tokens + 1)
    real_BX = active_B[:, None] & (columns_BX < state.ends_B[:, None])
    columns_BX = jnp.minimum(columns_BX, state.ends_B[:, None] - 1)
    guess_BY, probs_BYV, guesser = guess(program, numbers, state, columns_BX, real_BX)
    read_BX = jnp.concatenate([state.newest_B[:, None], guess_BY], axis=1)
    logits_BXV, cache = reading.extend(many, params, program, state.cache, state.inputs, read_BX, columns_BX, real_BX)
    seen_XBV = _seen_by(program, state.seen_BV, read_BX, real_BX)
    chosen_BX, agreed_B = _checked(program, numbers, logits_BXV, seen_XBV, guess_BY, probs_BYV, state.inputs.rows_B,
                                   columns_BX, real_BX)
    # What is kept: the guesses that were right and one token more, up to an end token and to the length wanted.
    ended_BX = ends(program, chosen_BX) & (jnp.arange(tokens + 1) <= agreed_B[:, None])
    kept_B = jnp.minimum(agreed_B + 1, jnp.where(ended_BX.any(1), ended_BX.argmax(1) + 1, tokens + 1))
    kept_B = jnp.where(active_B, jnp.minimum(kept_B, state.ends_B - 1 - state.columns_B), 0)
    last_B1 = jnp.maximum(kept_B - 1, 0)[:, None]
    newest_B = jnp.where(active_B, jnp.take_along_axis(chosen_BX, last_B1, axis=1)[:, 0], state.newest_B)
    columns_B = state.columns_B + kept_B
    seen_BV = None if seen_XBV is None else jnp.where(active_B[:, None], jnp.take_along_axis(
        seen_XBV, last_B1[None, :, :], axis=0)[0], state.seen_BV)
    if lookup:
      guesser = _put(guesser, chosen_BX, state.columns_B + 1, kept_B)
    done_B = state.done_B | active_B & (ends(program, newest_B) | (columns_B + 1 >= state.ends_B))
    state = state.replace(cache=cache, guesser=guesser, seen_BV=seen_BV, newest_B=newest_B, columns_B=columns_B,
                          done_B=done_B)
    return state, _put(ids_BT, chosen_BX, filled_B, kept_B), filled_B + kept_B

  empty_BT = jnp.full((len(stopped_B), block + tokens), NONE, jnp.int32)
  state, ids_BT, _ = jax.lax.while_loop(more, body, (state, empty_BT, jnp.zeros_like(state.columns_B)))
  return state.replace(done_B=reading.replicated(model, state.done_B)), reading.replicated(model, ids_BT)


def _put(text_BL: Array, ids_BX: Array, at_B: Array, count_B: Array) -> Array:
  """The text with the first `count` ids of each row in the columns from `at` on."""
  X, L = ids_BX.shape[1], text_BL.shape[1]
  column_BX = jnp.where(jnp.arange(X) < count_B[:, None], at_B[:, None] + jnp.arange(X), L)
  put = lambda text_L, ids_X, column_X: text_L.at[column_X].set(ids_X, mode='drop')
  return jax.vmap(put)(text_BL, ids_BX, column_BX)


def _seen_by(program: Program, seen_BV: Array | None, ids_BX: Array, real_BX: Array) -> Array | None:
  """[X, B, V]: which ids were seen when each of these had been read."""
  if not program.penalises:
    return None
  found = []
  for x in range(ids_BX.shape[1]):
    seen_BV = reading.seen(program, seen_BV, ids_BX[:, x], real_BX[:, x])
    found.append(seen_BV)
  return jnp.stack(found)


# ---- guesses: (ids [B, Y], the probabilities [B, Y, V] they were drawn from or None: they are certain, new guesser) --


def _looked_up(longest: int, program: Program, numbers: dict[str, Array], state: Rows, columns_BX: Array,
               real_BX: Array) -> tuple[Array, None, Array]:
  """What followed the last tokens, as many as agree up to `longest`, where they stood before; the last such place."""
  del program, numbers, real_BX
  text_BL, newest_B1 = state.guesser, state.columns_B[:, None]
  columns_L = jnp.arange(text_BL.shape[1])
  agree_BL, run_BL = True, 0
  for back in range(longest):
    wanted_B1 = jnp.take_along_axis(text_BL, jnp.maximum(newest_B1 - back, 0), axis=1)
    before_BL = jnp.roll(text_BL, back, axis=1)
    agree_BL &= (before_BL == wanted_B1) & (columns_L >= back) & (newest_B1 >= back)
    run_BL += agree_BL
  rank_BL = jnp.where(columns_L < newest_B1, run_BL * len(columns_L) + columns_L, -1)
  found_B1 = rank_BL.argmax(1)[:, None]
  # Where the guess reaches the newest token, what lies between repeats itself.
  period_B1 = newest_B1 - found_B1
  at_BY = found_B1 + 1 + jnp.arange(columns_BX.shape[1] - 1) % jnp.maximum(period_B1, 1)
  return jnp.take_along_axis(text_BL, at_BY, axis=1), None, text_BL


def _drafted(draft: Transformer, params: Tree, program: Program, numbers: dict[str, Array], state: Rows,
             columns_BX: Array, real_BX: Array) -> tuple[Array, Array | None, Cache]:
  """What a smaller model says. It reads its last guess, too: if all are right, its cache has what the model's has."""
  def one(carry, x):
    cache, seen_BV, ids_B = carry
    columns_B, real_B, next_B = x
    logits_BV, cache, seen_BV = reading.advance(draft, params, program, cache, seen_BV, state.inputs, ids_B, columns_B,
                                                real_B)
    logits_BV = logits_BV[:, :program.vocab_size]
    if seen_BV is not None:
      logits_BV = penalised(program, numbers, logits_BV, seen_BV[:, :program.vocab_size])
    if not program.samples:
      return (cache, seen_BV, likeliest(logits_BV)), (likeliest(logits_BV), None)
    logits_BV = restricted(program, numbers, logits_BV)
    ids_B = jax.vmap(jax.random.categorical)(_keys(numbers, state.inputs.rows_B, next_B, GUESS), logits_BV)
    return (cache, seen_BV, ids_B.astype(jnp.int32)), (ids_B.astype(jnp.int32), jax.nn.softmax(logits_BV))

  next_BX = columns_BX + 1
  (cache, *_), (ids_XB, probs_XBV) = jax.lax.scan(one, (state.guesser, state.seen_BV, state.newest_B),
                                                  (columns_BX.T, real_BX.T, next_BX.T))
  probs_BYV = None if probs_XBV is None else jnp.swapaxes(probs_XBV[:-1], 0, 1)
  return ids_XB[:-1].T, probs_BYV, cache


def _keys(numbers: dict[str, Array], rows_B: Array, positions_B: Array, which: int) -> Array:
  return jax.vmap(jax.random.fold_in, (0, None))(keys(numbers, rows_B, positions_B), which)


# ---- the check ---------------------------------------------------------------------------------------------------


def _checked(program: Program, numbers: dict[str, Array], logits_BXV: Array, seen_XBV: Array | None, guess_BY: Array,
             probs_BYV: Array | None, rows_B: Array, columns_BX: Array, real_BX: Array) -> tuple[Array, Array]:
  """(ids [B, X], of which the first agreed + 1 hold; how many guesses are right, [B]).

  A guess drawn with probability q is kept with probability min(1, p / q); the first that is not gives way to a draw
  from what p has more than q; after the last right one comes a draw from p.
  """
  logits_XBV = jnp.swapaxes(logits_BXV, 0, 1)[:, :, :program.vocab_size]
  if seen_XBV is not None:
    seen_XBV = seen_XBV[:, :, :program.vocab_size]
    logits_XBV = jax.vmap(functools.partial(penalised, program, numbers))(logits_XBV, seen_XBV)
  right = lambda agrees_BY: jnp.cumprod((agrees_BY & real_BX[:, 1:]).astype(jnp.int32), axis=1).sum(1)
  if not program.samples:
    chosen_BX = jax.vmap(likeliest)(logits_XBV).T
    return chosen_BX, right(guess_BY == chosen_BX[:, :-1])
  logits_XBV = jax.vmap(functools.partial(restricted, program, numbers))(logits_XBV)
  p_BXV = jnp.swapaxes(jax.nn.softmax(logits_XBV), 0, 1)
  q_BYV = jax.nn.one_hot(guess_BY, program.vocab_size) if probs_BYV is None else probs_BYV
  of_guess = lambda x_BYV: jnp.take_along_axis(x_BYV, guess_BY[..., None], axis=2)[..., 0]
  draw_keys = jax.vmap(functools.partial(_keys, numbers, rows_B), (1, None), 1)
  uniform_BY = jax.vmap(jax.vmap(jax.random.uniform))(draw_keys(columns_BX[:, 1:], ACCEPT))
  agreed_B = right(uniform_BY * of_guess(q_BYV) < of_guess(p_BXV[:, :-1]))
  more_BXV = jnp.concatenate([jnp.maximum(p_BXV[:, :-1] - q_BYV, 0), p_BXV[:, -1:]], axis=1)
  # Rounding can leave nothing where p and q are the same; then they would not have differed, and p itself will do.
  more_BXV = jnp.where(more_BXV.sum(-1, keepdims=True) > 0, more_BXV, p_BXV)
  instead_BX = jax.vmap(jax.vmap(jax.random.categorical))(draw_keys(columns_BX + 1, INSTEAD), jnp.log(more_BXV))
  guess_BX = jnp.concatenate([guess_BY, guess_BY[:, -1:]], axis=1)
  chosen_BX = jnp.where(jnp.arange(guess_BX.shape[1]) < agreed_B[:, None], guess_BX, instead_BX)
  return chosen_BX.astype(jnp.int32), agreed_B
