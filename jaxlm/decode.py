"""Continuing text: the decode loop; pure functions of a Transformer and its parameters.

The loop runs a block of tokens on the device; between blocks the host looks whether anything is left to do.
"""
import functools
from typing import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import beams, reading, speculation
from jaxlm.errors import JaxlmError
from jaxlm.models import virtual
from jaxlm.models.products import OF_ONE
from jaxlm.models.stack import Cache
from jaxlm.models.transformer import Transformer
from jaxlm.reading import NONE
from jaxlm.sampling import Sampling, choose, ends, sampling_numbers, specialised
from jaxlm.speculation import Guesses
from jaxlm.types import Array, Ids, Prompt, Tree

BLOCK = 32  # tokens a row between two looks of the host: a stop string is noticed so many too late at most


def generate(model: Transformer, params: Tree, prompts: Sequence[Ids | Prompt], max_new_tokens: int = 64,
             sampling: Sampling = Sampling(), eos: Ids = (), stopped: Callable[[list[int]], bool] | None = None,
             batch_size: int = 32, first: Sequence[np.ndarray | None] | None = None, guesses: Guesses | None = None,
             every: int = BLOCK, heard: Callable[[int, list[int]], None] | None = None) -> list[list[int]]:
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
    guesses: how tokens are guessed, for the model to check several at once; None: they are not.
    every: tokens a row between two looks of the host, at most BLOCK.
    heard: told a row's number and its continuation so far whenever the host looks.
  Returns:
    Continuations alone, in the order of the prompts; one that ended has its end token last.
  Raises:
    JaxlmError: an id outside the vocabulary, an empty prompt, more tokens than learned positions, a model that does
      not predict the next token.
  """
  prompts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
  _check(model, prompts, max_new_tokens, eos, batch_size)
  if guesses is not None:
    speculation.check(model, guesses, sampling)
  outputs: list[list[int]] = [[] for _ in prompts]
  if not max_new_tokens or not prompts:
    return outputs
  model, params = reading.unrolled(model, params)
  by_length = sorted(range(len(prompts)), key=lambda row: (len(prompts[row].ids), len(prompts[row].source)))
  for start in range(0, len(prompts), batch_size):
    rows = by_length[start:start + batch_size]
    inputs = reading.pad(model, [prompts[row] for row in rows], rows)
    if first is not None and any(first[row] is not None for row in rows):
      allowed_BV = np.ones((len(inputs.lengths_B), model.config.vocab_size), bool)
      for i, row in enumerate(rows):
        allowed_BV[i] = True if first[row] is None else first[row]
      inputs = inputs.replace(allowed_BV=allowed_BV)
    length = reading.cache_length(model, max(len(prompts[row].ids) for row in rows) + max_new_tokens)
    if sampling.num_beams > 1:
      blocks = iter([beams.search(model, params, inputs, length, max_new_tokens, sampling, eos)])
    else:
      run = _loop if guesses is None else functools.partial(speculation.loop, guesses)
      blocks = run(model, params, inputs, length, max_new_tokens, sampling, eos,
                   lambda i: stopped is not None and stopped(outputs[rows[i]]), every)
    for ids_BT in blocks:
      for row, ids in zip(rows, ids_BT.tolist()):
        outputs[row] += [i for i in ids if i != NONE]
        if heard is not None:
          heard(row, outputs[row])
  return outputs


def _check(model: Transformer, prompts: Sequence[Prompt], max_new_tokens: int, eos: Ids, batch_size: int) -> None:
  if not reading.continues(model.config):
    raise JaxlmError('This model sees both sides of a token, so it cannot continue a text; '
                     "use one trained with objective.name='causal'." if model.config.head.lm else
                     'This model has no output layer, so it cannot continue a text.')
  for name, value, low in (('max_new_tokens', max_new_tokens, 0), ('batch_size', batch_size, 1)):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
      raise JaxlmError(f'{name} must be an integer, at least {low}; got {value!r}.')
  size = model.config.vocab_size + virtual.count(model.config.peft)
  for row, prompt in enumerate(prompts):
    ids = prompt.ids
    if not len(ids) or model.config.structure == 'encoder_decoder' and not len(prompt.source):
      raise JaxlmError(f'Prompt {row} is empty; give it one token at least, the one that begins a document, say.')
    reading.check_tokens(np.asarray(list(prompt.source), np.int64), size, f'Prompt {row}')
    reading.check_length(model, len(prompt.source), f'Prompt {row}', 'Shorten it.')
    reading.check_tokens(ids, size, f'Prompt {row}')
    room = model.config.max_length - len(ids)
    reading.check_length(model, len(ids) + max_new_tokens, f'Prompt {row} ({len(ids)} tokens) with max_new_tokens='
                 f'{max_new_tokens}', f'Lower max_new_tokens to {room} or shorten the prompt.' if room > 0 else
                 'Shorten the prompt.')
  reading.check_tokens(np.asarray(list(eos), np.int64), model.config.vocab_size, 'The end token')


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
  cache: Cache
  seen_BV: Array | None
  newest_B: Array
  columns_B: Array
  done_B: Array
  inputs: reading.Inputs


@functools.partial(jax.jit, static_argnames=('model', 'program', 'length'))
def _start(model, params, program, numbers, inputs, length) -> tuple[Rows, Array]:
  """Prompts read, the first token chosen: (state, ids [B, 1])."""
  cache, seen_BV, ids_B, done_B = reading.begin(model, params, program, numbers, inputs, length)
  state = Rows(cache, seen_BV, ids_B, inputs.lengths_B, reading.replicated(model, done_B), reading.continued(inputs))
  return state, reading.told(model, inputs, ids_B)


def _block(model, params, program, numbers, state, stopped_B, steps) -> tuple[Rows, Array]:
  """Up to BLOCK more tokens, fewer where `steps` is less or all rows ended: (state, ids [B, BLOCK]).

  Args:
    model: as `reading.single_token` gives it.
  """
  state = state.replace(done_B=state.done_B | stopped_B)

  def more(carry):
    step, state, _ = carry
    return (step < steps) & ~state.done_B.all()

  def body(carry):
    step, state, ids_BT = carry
    logits_BV, cache, seen_BV = reading.advance(model, params, program, state.cache, state.seen_BV, state.inputs,
                                                state.newest_B, state.columns_B, ~state.done_B)
    columns_B = state.columns_B + ~state.done_B
    ids_B = choose(program, numbers, logits_BV, seen_BV, state.inputs.rows_B, columns_B)
    ids_BT = jax.lax.dynamic_update_slice_in_dim(ids_BT, jnp.where(state.done_B, NONE, ids_B)[:, None], step, axis=1)
    state = state.replace(cache=cache, seen_BV=seen_BV, newest_B=ids_B, columns_B=columns_B,
                          done_B=state.done_B | ends(program, ids_B))
    return step + 1, state, ids_BT

  empty_BT = jnp.full((state.newest_B.shape[0], BLOCK), NONE, jnp.int32)
  _, state, ids_BT = jax.lax.while_loop(more, body, (jnp.int32(0), state, empty_BT))
  return state.replace(done_B=reading.replicated(model, state.done_B)), reading.replicated(model, ids_BT)


_block_of = functools.partial(jax.jit, _block, static_argnames=('model', 'program'), donate_argnames=('state',))
_block_of_many, _block_of_one = _block_of(), _block_of(compiler_options=OF_ONE)


def _loop(model: Transformer, params: Tree, inputs: reading.Inputs, length: int, max_new_tokens: int,
          sampling: Sampling, eos: Ids, stopped: Callable[[int], bool], every: int) -> Iterator[np.ndarray]:
  """Yields ids [B, BLOCK] (at first [B, 1]) as they are produced, NONE where a row has ended.

  Args:
    stopped: asked, after each block was taken, for each row of the batch that is not filling.
    every: tokens of a block.
  """
  program = specialised(model.config.vocab_size, sampling, eos)
  numbers = sampling_numbers(sampling, program)
  state, ids_BT = _start(model, params, program, numbers, inputs, length)
  num_rows, produced = int((inputs.lengths_B > 0).sum()), 1
  stopped_B = np.zeros(len(inputs.lengths_B), bool)
  yield np.asarray(ids_BT)[:num_rows]
  model, block = reading.single_token(model), _block_of_many
  if len(stopped_B) == 1 < max_new_tokens and (one := reading.for_one_row(model, params)):
    (model, params), block = one, _block_of_one
  while produced < max_new_tokens:
    stopped_B[:num_rows] |= [stopped(row) for row in range(num_rows)]
    if (np.asarray(state.done_B) | stopped_B).all():
      return
    steps = min(every, max_new_tokens - produced)
    state, ids_BT = block(model, params, program, numbers, state, stopped_B, np.int32(steps))
    produced += steps
    yield np.asarray(ids_BT)[:num_rows]
