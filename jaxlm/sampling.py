"""How the next token is chosen: greedy, temperature, top_k, top_p, repetition penalty."""
import dataclasses
import math
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen; by default the likeliest.

  Penalty, temperature, top_k, top_p and min_p apply in this order, as in Hugging Face's; tokens that tie with the last
  one kept are kept too.

  Attributes:
    temperature: logits are divided by it; 0: the likeliest token.
    top_k: only so many likeliest tokens; 0: all.
    top_p: only the fewest likeliest tokens that together reach this probability (Holtzman et al. 2019); 1: all.
    min_p: only tokens at least this share as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082); 0: all.
    repetition_penalty: logits of tokens in prompt and continuation are divided by it, or multiplied where negative
      (Keskar et al. 2019, CTRL); 1: none.
    seed: a row's draws depend on it, the row's number and the token's position; not on the batch around it.
    num_beams: above 1: beam search for the continuation with the best score.
    length_penalty: of beams; score = sum of log-probabilities / length ** length_penalty, the end token counted.
  """
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0
  num_beams: int = 1
  length_penalty: float = 1.0

  def __post_init__(self):
    wanted = [('temperature', 'a number, at least 0', lambda x: 0 <= x < math.inf),
              ('top_k', 'an integer, at least 0 (0: all tokens)', lambda x: x >= 0 and x == int(x)),
              ('top_p', 'above 0 and at most 1 (1: all tokens)', lambda x: 0 < x <= 1),
              ('min_p', 'a number from 0 (all tokens) to 1', lambda x: 0 <= x <= 1),
              ('repetition_penalty', 'above 0 (1: none)', lambda x: 0 < x < math.inf),
              ('seed', 'an integer from 0 to 4294967295', lambda x: x == int(x) and 0 <= x < 2**32),
              ('num_beams', 'an integer, at least 1', lambda x: x >= 1 and x == int(x)),
              ('length_penalty', 'a number', math.isfinite)]
    for name, what, holds in wanted:
      value = getattr(self, name)
      if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not holds(value):
        raise JaxlmError(f'{name} must be {what}; got {value!r}.')
    if self.num_beams > 1 and self.temperature > 0:
      raise JaxlmError(f'num_beams={self.num_beams} searches and temperature={self.temperature} samples; '
                       'set num_beams=1 or temperature=0.')


def bucket(n: int, low: int = 16) -> int:
  """The next of 16, 24, 32, 48, 64, 96, …: sizes an array is padded to, so that programs are few."""
  power = max(low, 1 << (n - 1).bit_length())
  return power * 3 // 4 if low < power and n <= power * 3 // 4 else power


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled loop is specialised on; the numbers themselves are arguments, so that changing them is free.

  Attributes:
    vocab_size: ids from here on only round the embedding up, and are never chosen.
    eos: ids that end a row.
    samples: False: the likeliest token.
    candidates: how many of the likeliest logits are sorted for top_k and top_p; 0: none.
    nucleus: whether top_p cuts.
    floor: whether min_p does.
    penalises: whether repetition costs.
  """
  vocab_size: int
  eos: tuple[int, ...]
  samples: bool
  candidates: int
  nucleus: bool
  floor: bool
  penalises: bool


def specialised(vocab_size: int, sampling: Sampling, eos: Sequence[int]) -> Program:
  """The program that chooses so."""
  samples = sampling.temperature > 0
  top_k = sampling.top_k if samples and sampling.top_k < vocab_size else 0
  nucleus = samples and sampling.top_p < 1
  candidates = min(bucket(top_k, 1), vocab_size) if top_k else vocab_size if nucleus else 0
  return Program(vocab_size, tuple(sorted(set(map(int, eos)))), samples, candidates, nucleus,
                 samples and sampling.min_p > 0, sampling.repetition_penalty != 1)


def sampling_numbers(sampling: Sampling, program: Program) -> dict[str, Array]:
  """The arguments of `choose` and `penalised` that a program is not specialised on."""
  return {'temperature': np.float32(sampling.temperature), 'top_p': np.float32(sampling.top_p),
          'min_p': np.float32(sampling.min_p),
          'top_k': np.int32(min(sampling.top_k or program.candidates, program.candidates)),
          'repetition_penalty': np.float32(sampling.repetition_penalty), 'seed': np.uint32(sampling.seed)}


def penalised(program: Program, numbers: dict[str, Array], scores_BV: Array, seen_BV: Array | None) -> Array:
  """Scores with what was seen already made less likely."""
  if not program.penalises:
    return scores_BV
  penalty = numbers['repetition_penalty']
  return jnp.where(seen_BV, jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty), scores_BV)


def restricted(program: Program, numbers: dict[str, Array], logits_BV: Array) -> Array:
  """Logits at the temperature, -inf outside top_k, top_p and min_p."""
  logits_BV = logits_BV / numbers['temperature']
  last_B1 = -jnp.inf
  if program.candidates:
    last_B1 = _last(program, numbers, logits_BV)
  if program.floor:  # the likeliest is always kept, so the share is the same before the others are cut and after
    last_B1 = jnp.maximum(last_B1, logits_BV.max(-1, keepdims=True) + jnp.log(numbers['min_p']))
  return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf) if program.candidates or program.floor else logits_BV


def _last(program: Program, numbers: dict[str, Array], logits_BV: Array) -> Array:
  """[B, 1], the least logit that top_k and top_p keep."""
  best_BC = jax.lax.top_k(logits_BV, program.candidates)[0]
  last_B1 = jnp.take_along_axis(best_BC, jnp.full((best_BC.shape[0], 1), numbers['top_k'] - 1), axis=1)
  if program.nucleus:
    probs_BC = jax.nn.softmax(jnp.where(best_BC >= last_B1, best_BC, -jnp.inf), axis=-1)
    before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
    last_B1 = jnp.where(before_BC < numbers['top_p'], best_BC, jnp.inf).min(-1, keepdims=True).clip(min=last_B1)
  return last_B1


def likeliest(logits_BV: Array) -> Array:
  """int32 [B], the first id with the highest logit. XLA on a CPU finds a maximum forty times as fast as its place."""
  V = logits_BV.shape[1]
  ids_BV = jnp.where(logits_BV == logits_BV.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
  return ids_BV.min(-1)


def choose(program: Program, numbers: dict[str, Array], logits_BV: Array, seen_BV: Array | None, rows_B: Array,
            positions_B: Array) -> Array:
  """The next token of each row, int32 [B], which will stand at positions_B."""
  logits_BV = penalised(program, numbers, logits_BV, seen_BV)
  if not program.samples:
    return likeliest(logits_BV)
  keys_B = keys(numbers, rows_B, positions_B)
  return jax.vmap(jax.random.categorical)(keys_B, restricted(program, numbers, logits_BV)).astype(jnp.int32)


def keys(numbers: dict[str, Array], rows_B: Array, positions_B: Array) -> Array:
  """A key of the draw of each row's token."""
  key = jax.random.key(numbers['seed'])
  return jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows_B, positions_B)


def ends(program: Program, ids: Array) -> Array:
  return jnp.isin(ids, jnp.asarray(program.eos, jnp.int32))
