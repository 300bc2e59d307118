"""What training minimises, as sums over targets with their counts; divided once, over the global batch."""
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.models.layers import example_keys, softcap
from jaxlm.models.transformer import Transformer
from jaxlm.sharding import Layout
from jaxlm.sums import by_pieces, over_lead
from jaxlm.types import Array, Tree

Sums = dict[str, tuple[Array, Array]]  # name: (sum, count)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """How hidden states become losses.

  Attributes:
    size: of the vocabulary; columns beyond it have no probability.
    softcap: of logits; 0: none.
    z_loss: weight of log²Z (Chowdhery et al. 2022, PaLM, section 5).
    smoothing: of the target's probability, spread evenly (Szegedy et al. 2016).
    chunk: positions of a row whose logits exist at once.
    layout: pins logits.
    teacher_weight: of a teacher's part of the loss, where a batch has one; the targets' own gets the rest.
    temperature: at which teacher and model are compared.
  """
  size: int
  softcap: float
  z_loss: float
  smoothing: float
  chunk: int
  layout: Layout
  teacher_weight: float = 0.5
  temperature: float = 1.0


def _matrix(vocabulary: Vocabulary, w_VD: Array, dtype: Any) -> Array:
  """The output matrix as all pieces of a row multiply by it, gathered once."""
  return vocabulary.layout.gathered(w_VD.astype(dtype), 'vocab', 'embed')


def _logits(vocabulary: Vocabulary, hidden_BTD: Array, w_VD: Array, b_V: Array | None) -> Array:
  """float32 [B, T, V]; no probability beyond the vocabulary."""
  logits_BTV = jnp.einsum('BTD,VD->BTV', hidden_BTD, w_VD, preferred_element_type=jnp.float32)
  logits_BTV = vocabulary.layout.constrain(logits_BTV, 'act_batch', 'act_length', 'act_vocab')
  if b_V is not None:
    logits_BTV += b_V.astype(jnp.float32)
  logits_BTV = softcap(logits_BTV, vocabulary.softcap)
  if logits_BTV.shape[-1] == vocabulary.size:
    return logits_BTV
  return jnp.where(_real(vocabulary, logits_BTV), logits_BTV, -jnp.inf)


def _real(vocabulary: Vocabulary, logits_BTV: Array) -> Array:
  """bool [V]: which columns are of the vocabulary."""
  return jnp.arange(logits_BTV.shape[-1]) < vocabulary.size


@flax.struct.dataclass
class _Likelihoods:
  """Of logits: what their softmax is made of, each formed once.

  Attributes:
    weights_BTV: exp(logits - top).
    top_BT: the largest logit.
    total_BT: of the weights.
    log_z_BT: log sum exp of the logits.
  """
  weights_BTV: Array
  top_BT: Array
  total_BT: Array
  log_z_BT: Array


def _likelihoods(logits_BTV: Array) -> _Likelihoods:
  top_BT = logits_BTV.max(-1)
  weights_BTV = jnp.exp(logits_BTV - top_BT[..., None])
  total_BT = weights_BTV.sum(-1)
  return _Likelihoods(weights_BTV, top_BT, total_BT, top_BT + jnp.log(total_BT))


def _token_losses(vocabulary: Vocabulary, logits_BTV: Array, likely: _Likelihoods,
                  targets_BT: Array) -> tuple[Array, Array, Array]:
  """(loss, nll, correct) of each target."""
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  nll_BT = likely.log_z_BT - target_BT
  loss_BT = nll_BT
  if vocabulary.smoothing:
    # Not a slice: of a vocabulary that is split over devices it would be moved.
    mean_BT = jnp.where(_real(vocabulary, logits_BTV), logits_BTV, 0).sum(-1) / vocabulary.size
    loss_BT = (1 - vocabulary.smoothing) * nll_BT + vocabulary.smoothing * (likely.log_z_BT - mean_BT)
  if vocabulary.z_loss:
    loss_BT = loss_BT + vocabulary.z_loss * jnp.square(likely.log_z_BT)
  # Not argmax: on a CPU it took 20 ms for 16 × 256 × 2,048 where the maximum, which is there anyway, took 6.
  correct_BT = (target_BT >= likely.top_BT).astype(jnp.float32)
  return loss_BT, nll_BT, correct_BT


def _logit_gradient(vocabulary: Vocabulary, logits_BTV: Array, likely: _Likelihoods, targets_BT: Array,
                    weights_BT: Array) -> Array:
  """The gradient of the weighted loss by the logits before the soft cap."""
  of_all_BT = (1 + 2 * vocabulary.z_loss * likely.log_z_BT) / likely.total_BT
  hot_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
  grad_BTV = likely.weights_BTV * of_all_BT[..., None] - (1 - vocabulary.smoothing) * hot_BTV
  if vocabulary.smoothing:
    grad_BTV -= jnp.where(_real(vocabulary, logits_BTV), vocabulary.smoothing / vocabulary.size, 0)
  if vocabulary.softcap:
    slope_BTV = 1 - jnp.square(logits_BTV / vocabulary.softcap)
    grad_BTV = jnp.where(jnp.isfinite(logits_BTV), grad_BTV * slope_BTV, 0)
  return grad_BTV * weights_BT[..., None]


def token_losses(vocabulary: Vocabulary, hidden_BTD: Array, w_VD: Array, b_V: Array | None,
                 targets_BT: Array) -> tuple[Array, Array]:
  """(nll in nats, 1 where the target is the likeliest token), float32 [B, T] each; for measuring, not training."""
  w_VD = _matrix(vocabulary, w_VD, hidden_BTD.dtype)
  def piece(carry, inputs):
    hidden_BTD, targets_BT = inputs
    logits_BTV = _logits(vocabulary, hidden_BTD, w_VD, b_V)
    return carry, _token_losses(vocabulary, logits_BTV, _likelihoods(logits_BTV), targets_BT)[1:]
  return by_pieces(vocabulary.chunk, piece, (), hidden_BTD, targets_BT)[1]


def token_nll(vocabulary: Vocabulary, hidden_BTD: Array, w_VD: Array, b_V: Array | None, targets_BT: Array) -> Array:
  """float32 [B, T]: the loss of each target by itself, differentiable, for what is no weighted sum of them.

  Logits exist for a piece of the columns at a time, and again in the backward pass.
  """
  w_VD = _matrix(vocabulary, w_VD, hidden_BTD.dtype)

  @jax.checkpoint
  def piece(carry, inputs):
    hidden_BTD, targets_BT = inputs
    logits_BTV = _logits(vocabulary, hidden_BTD, w_VD, b_V)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return carry, jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
  return by_pieces(vocabulary.chunk, piece, (), hidden_BTD, targets_BT)[1]


# ---- a teacher ---------------------------------------------------------------------------------------------------


def opinion(vocabulary: Vocabulary, hidden_BTD: Array, w_VD: Array, b_V: Array | None, top_k: int) -> dict[str, Array]:
  """What a teacher says of each place, as a batch holds it: `teacher_log_probs`, and `teacher_ids` with a top_k.

  Args:
    top_k: of the likeliest tokens; the last log-prob is that of all others together. 0: of all tokens.
  """
  w_VD = _matrix(vocabulary, w_VD, hidden_BTD.dtype)

  def piece(carry, inputs):
    log_probs_BTV = jax.nn.log_softmax(_logits(vocabulary, *inputs, w_VD, b_V) / vocabulary.temperature)
    if not top_k:
      return carry, dict(teacher_log_probs=log_probs_BTV)
    ids_BTK = jax.lax.top_k(log_probs_BTV, top_k)[1]
    return carry, dict(teacher_log_probs=_with_rest(log_probs_BTV, ids_BTK), teacher_ids=ids_BTK)
  return by_pieces(vocabulary.chunk, piece, (), hidden_BTD)[1]


def _with_rest(log_probs_BTV: Array, ids_BTK: Array) -> Array:
  """[B, T, K + 1]: log-probs of some tokens, and of all others together.

  Those are summed themselves: 1 less the some would lose them, and their gradient, where these are nearly sure.
  """
  others = jax.vmap(jax.vmap(lambda log_probs_V, ids_K: log_probs_V.at[ids_K].set(-jnp.inf)))
  rest_BT = jax.nn.logsumexp(others(log_probs_BTV, ids_BTK), axis=-1, keepdims=True)
  return jnp.concatenate([jnp.take_along_axis(log_probs_BTV, ids_BTK, axis=-1), rest_BT], axis=-1)


def divergence(vocabulary: Vocabulary, hidden_BTD: Array, w_VD: Array, b_V: Array | None, log_probs_BTK: Array,
               ids_BTK: Array | None = None) -> Array:
  """float32 [B, T]: KL(teacher, model) at each place, at the temperature, differentiable.

  Of a teacher's likeliest tokens it is that of distributions over those and "any other", which is never above the
  whole one, and 0 where both agree. (Tokens alone, scaled to 1, would teach a model to be too sure of them.)

  Args:
    log_probs_BTK, ids_BTK: as `opinion` has them.
  """
  w_VD = _matrix(vocabulary, w_VD, hidden_BTD.dtype)

  @jax.checkpoint
  def piece(carry, inputs):
    hidden_BTD, theirs_BTK, *ids = inputs
    ours_BTK = jax.nn.log_softmax(_logits(vocabulary, hidden_BTD, w_VD, b_V) / vocabulary.temperature)
    if ids:
      ours_BTK = _with_rest(ours_BTK, ids[0])
    return carry, _divergence(theirs_BTK, ours_BTK)
  ids = () if ids_BTK is None else (ids_BTK,)
  return by_pieces(vocabulary.chunk, piece, (), hidden_BTD, log_probs_BTK, *ids)[1]


def _divergence(theirs: Array, ours: Array) -> Array:
  """KL of log-probs over the last dim; what the first says cannot be is not looked at."""
  there = jnp.isfinite(theirs)
  theirs, ours = jnp.where(there, theirs, 0), jnp.where(there, ours, 0)
  return jnp.where(there, jnp.exp(theirs) * (theirs - ours), 0).sum(-1)


def class_divergence(theirs_BC: Array, ours_BC: Array, temperature: float) -> Array:
  """KL(teacher, model) of scores of classes over the last dim, at a temperature."""
  return _divergence(*(jax.nn.log_softmax(scores_BC / temperature) for scores_BC in (theirs_BC, ours_BC)))


# ---- the loss of tokens ------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(vocabulary: Vocabulary, hidden_BTD: Array, w_VD: Array, b_V: Array | None, targets_BT: Array,
                  weights_BT: Array) -> tuple[Array, dict[str, Array]]:
  """The weighted sum of losses over all targets.

  Logits exist for `chunk` positions at a time, and the gradient is formed beside them in the forward pass, so that
  nothing is computed twice.

  Args:
    vocabulary: static.
    hidden_BTD: what the output matrix multiplies.
    w_VD: output matrix.
    b_V: its bias, or None.
    targets_BT: ids.
    weights_BT: how much each target counts.
  Returns:
    The sum, differentiable by hidden_BTD, w_VD and b_V; and sums of nll and of correct guesses, which are not.
  """
  nll_BT, correct_BT, loss_BT = _forward(vocabulary, hidden_BTD, w_VD, b_V, targets_BT, weights_BT)[1]
  return _summed(loss_BT, nll_BT, correct_BT, weights_BT)


def _forward(vocabulary, hidden_BTD, w_VD, b_V, targets_BT, weights_BT):
  w_VD = _matrix(vocabulary, w_VD, hidden_BTD.dtype)
  def piece(carry, inputs):
    hidden_BTD, targets_BT, _ = inputs
    logits_BTV = _logits(vocabulary, hidden_BTD, w_VD, b_V)
    loss_BT, nll_BT, correct_BT = _token_losses(vocabulary, logits_BTV, _likelihoods(logits_BTV), targets_BT)
    return carry, (nll_BT, correct_BT, loss_BT)
  return by_pieces(vocabulary.chunk, piece, (), hidden_BTD, targets_BT, weights_BT)


def _summed(loss_BT, nll_BT, correct_BT, weights_BT):
  # where, not times: a target that does not count may be infinite.
  total = lambda x_BT: jnp.where(weights_BT != 0, x_BT * weights_BT, 0).sum()
  return total(loss_BT), {'nll': total(nll_BT), 'correct': total(correct_BT)}


def _cross_entropy_forward(vocabulary, hidden_BTD, w_VD, b_V, targets_BT, weights_BT):
  # Gradients of weights have a first dim of devices that have rows of their own: each sums what its rows say, and the
  # sums are added once, not after every piece.
  layout, parts = vocabulary.layout, vocabulary.layout.batch_parts
  by_part = lambda x: x.reshape(parts, -1, *x.shape[1:])
  # One dim of rows, where devices split no other: XLA on a CPU turns round what is summed over two.
  rows_of = lambda x: by_part(x) if layout.axes('act_length') else x.reshape(parts, -1, x.shape[-1])
  over_rows = jax.vmap(lambda x, y: over_lead(x, y, y.ndim - 1))
  matrix_VD = _matrix(vocabulary, w_VD, hidden_BTD.dtype)

  def piece(carry, inputs):
    (dw_PVD, db_PV), (hidden_BTD, targets_BT, weights_BT) = carry, inputs
    dtype = hidden_BTD.dtype
    logits_BTV = _logits(vocabulary, hidden_BTD, matrix_VD, b_V)
    likely = _likelihoods(logits_BTV)
    loss_BT, nll_BT, correct_BT = _token_losses(vocabulary, logits_BTV, likely, targets_BT)
    grad_BTV = _logit_gradient(vocabulary, logits_BTV, likely, targets_BT, weights_BT)
    if b_V is not None:
      more_PV = over_rows(jnp.ones(rows_of(grad_BTV).shape[:-1], jnp.float32), rows_of(grad_BTV))
      db_PV = layout.constrain(db_PV + more_PV, 'act_batch', 'act_vocab')
    grad_BTV = grad_BTV.astype(dtype)
    dh_BTD = jnp.einsum('BTV,VD->BTD', grad_BTV, matrix_VD)
    dw_PVD += over_rows(rows_of(grad_BTV), rows_of(hidden_BTD))
    return (layout.constrain(dw_PVD, 'act_batch', 'act_vocab', None), db_PV), (nll_BT, correct_BT, loss_BT, dh_BTD)

  zeros = jax.tree.map(lambda x: jnp.zeros((parts, *x.shape), jnp.float32), (w_VD, b_V))
  sums, (nll_BT, correct_BT, loss_BT, dh_BTD) = by_pieces(vocabulary.chunk, piece, zeros, hidden_BTD, targets_BT, weights_BT)
  dw_PVD, db_PV = sums
  grads = (layout.summed(dw_PVD, 'vocab', 'embed').astype(w_VD.dtype),
           None if b_V is None else db_PV.sum(0).astype(b_V.dtype))
  return _summed(loss_BT, nll_BT, correct_BT, weights_BT), (dh_BTD, *grads, targets_BT, weights_BT)


def _cross_entropy_backward(vocabulary, saved, cotangents):
  dh_BTD, dw_VD, db_V, targets_BT, weights_BT = saved
  scaled = lambda x: x * cotangents[0].astype(x.dtype)
  return (*jax.tree.map(scaled, (dh_BTD, dw_VD, db_V)), np.zeros(targets_BT.shape, jax.dtypes.float0),
          jnp.zeros_like(weights_BT))


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def vocabulary_of(model: Transformer, loss: Any) -> Vocabulary:
  """The static part of the loss: of a model and the `loss` part of a config."""
  return Vocabulary(model.config.vocab_size, model.config.logit_softcap, loss.z_loss, loss.label_smoothing, loss.chunk,
                    model.layout, loss.teacher.weight, loss.teacher.temperature)


def lm_loss(model: Transformer, vocabulary: Vocabulary, params: Tree, batch: dict[str, Array],
            rng: Array | None) -> tuple[Array, Sums]:
  """The loss of tokens, next or masked or any other: (the sum that is differentiated, sums and counts to report).

  What is counted an example (a mixture's balance, whether two texts follow each other) is weighed by the example's
  targets, so that all is one sum over targets whatever the microbatch.
  """
  output = model.apply({'params': params}, batch, rng=rng, with_logits=False)
  unembedding, weights_BT = model.apply({'params': params}, method='unembedding'), batch['loss_weights']
  total, sums = cross_entropy(vocabulary, output.features, *unembedding, batch['targets'], weights_BT)
  weight_B, count = weights_BT.sum(1), weights_BT.sum()
  told = {'loss': (sums['nll'], count), 'accuracy': (sums['correct'], count)}
  for i, features_BTE in enumerate(output.future):
    weights = batch['future_weights'][..., i]
    ahead, sums = cross_entropy(vocabulary, features_BTE, *unembedding, batch['future_targets'][..., i], weights)
    total += ahead
    told[f'loss_{i + 2}_ahead'] = sums['nll'], weights.sum()
  if 'labels' in batch:
    nll_B = -jnp.take_along_axis(jax.nn.log_softmax(output.scores), batch['labels'][:, None], axis=1)[:, 0]
    correct_B = (output.scores.argmax(-1) == batch['labels']).astype(jnp.float32)
    total += (nll_B * batch['label_weights'] * weight_B).sum()
    mean = lambda x_B: ((x_B * batch['label_weights']).sum(), batch['label_weights'].sum())
    told |= {'label_loss': mean(nll_B), 'label_accuracy': mean(correct_B)}
  if 'teacher_log_probs' in batch:
    kl_BT = divergence(vocabulary, output.features, *unembedding, batch['teacher_log_probs'], batch.get('teacher_ids'))
    kl = jnp.where(weights_BT != 0, kl_BT * weights_BT, 0).sum()
    # By the square: the gradient of softer scores is as much smaller (Hinton et al. 2015, section 2.1).
    total = (1 - vocabulary.teacher_weight) * total + vocabulary.teacher_weight * vocabulary.temperature ** 2 * kl
    told['teacher_kl'] = kl, count
  total += extra(model, output.aux, weight_B, told)
  return total, {'objective': (total, count)} | told


def extra(model: Transformer, aux: dict[str, Array], weight_B: Array, told: Sums) -> Array:
  """What a mixture's routers add to the loss; each part is told, too."""
  sums = {name: (value_B * weight_B).sum() for name, value_B in aux.items()}
  told |= {name: (value, weight_B.sum()) for name, value in sums.items()}
  return sum((model.config.aux_losses[name] * value for name, value in sums.items()), jnp.float32(0))


def loss_by_context(model: Transformer, vocabulary: Vocabulary, params: Tree, batch: dict[str, Array]) -> Sums:
  """{'loss_after_N': …} for N = 1, 2, 4, …: targets with at least N tokens of their document before them, not 2N.

  Args:
    batch: of an objective that predicts each next token (`Objective.covers`).
  """
  output = model.apply({'params': params}, batch, with_logits=False)
  unembedding = model.apply({'params': params}, method='unembedding')
  nll_BT, _ = token_losses(vocabulary, output.features, *unembedding, batch['targets'])
  weights_BT, T = batch['loss_weights'], batch['tokens'].shape[1]
  nll_BT = jnp.where(weights_BT != 0, nll_BT * weights_BT, 0)
  found = {}
  for i in range(T.bit_length()):
    here_BT = (batch['positions'] + 1) >> i == 1
    found[f'loss_after_{1 << i}'] = (nll_BT * here_BT).sum(), (weights_BT * here_BT).sum()
  return found


REPLACED_WEIGHT = 50.0  # of the discriminator's loss beside the generator's (Clark et al. 2020, section 3.1)


def replaced_loss(model: Transformer, vocabulary: Vocabulary, params: Tree, batch: dict[str, Array],
                  rng: Array | None) -> tuple[Array, Sums]:
  """ELECTRA: a small masked LM fills places, the model says of each token whether it is the original.

  Fillings are drawn with the step's key by example, without gradient. One that happens to be the original counts as
  original. The discriminator's mean over an example's tokens is weighed by the example's targets.

  Source: Clark et al. 2020, ELECTRA, arXiv:2003.10555.
  """
  variables, weights_BM, index_BM = {'params': params}, batch['loss_weights'], batch['target_index']
  features_BME = model.apply(variables, batch, rng, method='replacements')
  unembedding = model.apply(variables, method='generator_unembedding')
  total, sums = cross_entropy(vocabulary, features_BME, *unembedding, batch['targets'], weights_BM)
  weight_B, count = weights_BM.sum(1), weights_BM.sum()
  told = {'loss': (sums['nll'], count), 'accuracy': (sums['correct'], count)}

  drawn_BM = jax.lax.stop_gradient(_draw(vocabulary, features_BME, unembedding, batch['example_ids'],
                                         jax.random.key(0) if rng is None else rng))
  tokens_BT, real_BT = batch['tokens'], (batch['segment_ids'] > 0).astype(jnp.float32)
  # Places that only fill the index up point at no column.
  index_BM = jnp.where(weights_BM > 0, index_BM, tokens_BT.shape[1])
  put = lambda tokens_T, index_M, drawn_M: tokens_T.at[index_M].set(drawn_M.astype(tokens_T.dtype), mode='drop')
  shown_BT = jax.vmap(put)(tokens_BT, index_BM, drawn_BM)  # a row at a time: devices need no other's
  replaced_BT = (shown_BT != tokens_BT).astype(jnp.float32)
  seen = {k: v for k, v in batch.items() if k != 'target_index'} | {'tokens': shown_BT}
  output = model.apply(variables, seen, rng=rng, with_logits=False)
  total += extra(model, output.aux, weight_B, told)
  scores_BT = output.scores[..., 0]
  nll_BT = optax.sigmoid_binary_cross_entropy(scores_BT, replaced_BT)
  per_row = lambda x_BT: (x_BT * real_BT).sum(1) / jnp.maximum(real_BT.sum(1), 1)
  total += REPLACED_WEIGHT * (per_row(nll_BT) * weight_B).sum()
  mean = lambda x_BT: ((x_BT * real_BT).sum(), real_BT.sum())
  told |= {'replaced_loss': mean(nll_BT), 'replaced_accuracy': mean(((scores_BT > 0) == (replaced_BT > 0)) * 1.0),
           'replaced': mean(replaced_BT)}
  return total, {'objective': (total, count)} | told


def _draw(vocabulary: Vocabulary, features_BME: Array, unembedding: tuple[Array, Array | None], example_ids_B: Array,
          rng: Array) -> Array:
  """Token ids [B, M] drawn from the distribution of each place, by keys of examples."""
  w_VD, b_V = unembedding
  logits_BMV = _logits(vocabulary, features_BME, _matrix(vocabulary, w_VD, features_BME.dtype), b_V)
  return jax.vmap(jax.random.categorical)(example_keys(jax.random.fold_in(rng, 1), example_ids_B), logits_BMV)


LOSSES = {'lm': lm_loss, 'replaced': replaced_loss}
