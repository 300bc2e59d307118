"""Beam search: the continuation with the best score."""
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import reading
from jaxlm.models.stack import Cache
from jaxlm.models.transformer import Transformer
from jaxlm.reading import NONE
from jaxlm.sampling import Sampling, bucket, ends, penalised, sampling_numbers, specialised
from jaxlm.types import Array, Ids, Tree


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
  cache: Cache
  seen_RV: Array | None
  logits_RV: Array
  ids_BWT: Array
  total_BW: Array
  best_ids_BT: Array
  best_B: Array


def search(model: Transformer, params: Tree, inputs: reading.Inputs, length: int, max_new_tokens: int,
           sampling: Sampling, eos: Ids) -> np.ndarray:
  """The best continuation of each row, ids [B, T], NONE after its end."""
  program = specialised(model.config.vocab_size, sampling, eos)
  num_rows = int((inputs.lengths_B > 0).sum())
  ids_BT = _searched(model, params, program, sampling_numbers(sampling, program), inputs, np.int32(max_new_tokens),
                     np.float32(sampling.length_penalty), length=length, num_beams=sampling.num_beams,
                     size=bucket(max_new_tokens))
  return np.asarray(ids_BT)[:num_rows]


@functools.partial(jax.jit, static_argnames=('model', 'program', 'length', 'num_beams', 'size'))
def _searched(model, params, program, numbers, inputs, steps, length_penalty, length, num_beams, size) -> Array:
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
    logits_RV, cache, seen_RV = reading.advance(
        single, params, program, cache, seen_RV, spread(reading.continued(inputs)), pick(id_BC).reshape(-1),
        jnp.repeat(inputs.lengths_B, W) + step, jnp.isfinite(total_BW).reshape(-1))
    return step + 1, Beams(cache, seen_RV, logits_RV, jnp.take_along_axis(ids_BCT, kept_BW[:, :, None], axis=1),
                           total_BW, best_ids_BT, jnp.maximum(ended_B, beams.best_B))

  single = reading.single_token(model)
  logits_BV, cache, seen_BV = reading.prefill(model, params, program, inputs, length)
  # All beams of a row are one beam at first; rows that only fill the batch have none.
  total_BW = jnp.where((jnp.arange(W) == 0) & (inputs.lengths_B > 0)[:, None], 0.0, -jnp.inf)
  beams = Beams(spread(cache), spread(seen_BV), spread(logits_BV), jnp.full((B, W, size), NONE, jnp.int32), total_BW,
                jnp.full((B, size), NONE, jnp.int32), jnp.full((B,), -jnp.inf))
  _, beams = jax.lax.while_loop(more, body, (jnp.int32(0), beams))
  alive_B = score(beams.total_BW[:, 0], steps)
  best_BT = jnp.where((alive_B > beams.best_B)[:, None], beams.ids_BWT[:, 0], beams.best_ids_BT)
  return reading.replicated(model, best_BT)
