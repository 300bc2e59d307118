"""Losses of tasks: labels of a row, of its tokens, of a span in it; embeddings that belong together; better answers."""
import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from jaxlm import losses, trees
from jaxlm.losses import Sums, Vocabulary
from jaxlm.models import peft, virtual
from jaxlm.models.transformer import Transformer
from jaxlm.policies import gae, grpo, penalised_rewards, ppo
from jaxlm.preferences import PREFERENCES, Pairs, bradley_terry, kto, reference_point, sequence_log_probs
from jaxlm.types import Array, Output, Tree

REFERENCE = 'reference'  # the folder of frozen parameters that holds the policy training began with

MEETING = 'meeting'  # in names of a compiled program's instructions: where texts of the whole batch meet

LossFn = Callable[[Tree, dict[str, Array], Array | None], tuple[Array, Sums]]


# ---- labels ------------------------------------------------------------------------------------------------------


def labels_loss(model: Transformer, config: Any, params: Tree, batch: dict[str, Array],
                rng: Array | None) -> tuple[Array, Sums]:
  """Of what the label head says, by what the batch has: a class, numbers, a span, tags.

  The sum is over rows, of tags over words; a class counts config.loss.class_weights.
  """
  output = model.apply({'params': params}, batch, rng=rng, with_logits=False)
  scores, smoothing = output.scores, config.loss.label_smoothing
  if 'token_labels' in batch:
    loss, correct, weights = _of_classes(scores, batch['token_labels'], batch['token_label_weights'], config.loss)
  elif 'labels' in batch:
    loss, correct, weights = _of_classes(scores, batch['labels'], batch['label_weights'], config.loss)
  elif 'span_labels' in batch:
    # Padding is no place for an answer.
    scores_B2T = jnp.where(batch['segment_ids'][:, None] > 0, jnp.swapaxes(scores, 1, 2), -1e9)
    each_B2 = optax.softmax_cross_entropy_with_integer_labels(scores_B2T, batch['span_labels'])
    correct = (scores_B2T.argmax(-1) == batch['span_labels']).all(1).astype(jnp.float32)
    loss, weights = each_B2.mean(1), batch['label_weights']
  else:
    values_BC, weights = batch['label_values'], batch['label_weights']
    if values_BC.shape[1] == 1:
      loss, correct = jnp.square(scores - values_BC)[:, 0], None
    else:
      wanted_BC = values_BC * (1 - smoothing) + 0.5 * smoothing
      loss = optax.sigmoid_binary_cross_entropy(scores, wanted_BC).mean(1)
      correct = ((scores > 0) == (values_BC > 0.5)).mean(1)
  total, count = (loss * weights).sum(), weights.sum()
  told = {'loss': (total, count)} | ({} if correct is None else {'accuracy': ((correct * (weights > 0)).sum(),
                                                                             (weights > 0).sum().astype(jnp.float32))})
  if 'teacher_scores' in batch:
    share, temperature = config.loss.teacher.weight, config.loss.teacher.temperature
    kl = (losses.class_divergence(batch['teacher_scores'], scores, temperature) * weights).sum()
    total = (1 - share) * total + share * temperature ** 2 * kl
    told['teacher_kl'] = kl, count
  extra = losses.extra(model, output.aux, weights if weights.ndim == 1 else weights.sum(1), told)
  return total + extra, {'objective': (total + extra, count)} | told


def _of_classes(scores: Array, labels: Array, weights: Array, settings: Any) -> tuple[Array, Array, Array]:
  """(loss, 1 where the best class is right, weights with those of classes) of each place, of rows or of tokens."""
  classes = scores.shape[-1]
  hot = optax.smooth_labels(jax.nn.one_hot(labels, classes), settings.label_smoothing)
  if settings.class_weights:
    weights = weights * jnp.asarray(settings.class_weights, jnp.float32)[labels]
  return optax.softmax_cross_entropy(scores, hot), (scores.argmax(-1) == labels).astype(jnp.float32), weights


# ---- embeddings --------------------------------------------------------------------------------------------------


def embeddings(model: Transformer, params: Tree, hidden_BTD: Array, batch: dict[str, Array], texts: int) -> Array:
  """float32 [B, K, D]: each text of a row by itself, pooled as config.model.head.pool says."""
  segments_BT = virtual.real(model.config, batch['tokens'], batch['segment_ids'])
  return model.apply({'params': params}, hidden_BTD, segments_BT, texts, method='pooled')


def contrast_loss(model: Transformer, config: Any, params: Tree, batch: dict[str, Array],
                  rng: Array | None) -> tuple[Array, Sums]:
  """Which document belongs to a query, among those of all queries of the batch, on whatever device they lie.

  Texts of the whole batch meet, so a batch is not cut (accumulation 1). A document that is the query's own once more, in
  another row, is not taken for a wrong one. With `dims` also for the first dims alone; with `flops` also the squares of
  mean weights, of queries and of documents, summed: about as many products as an inverted index would form.

  Source: van den Oord et al. 2018, arXiv:1807.03748, eq. 4; Kusupati et al. 2022, Matryoshka representation learning,
  arXiv:2205.13147.
  """
  settings = config.objective.contrast
  output = model.apply({'params': params}, batch, rng=rng, with_logits=False)
  texts_BKD = embeddings(model, params, output.hidden, batch, 2 + settings.negatives)
  B, K, D = texts_BKD.shape
  there_BK = (batch['segment_ids'][:, None] == jnp.arange(1, K + 1)[:, None]).any(-1)
  weights_B, own_B = batch['label_weights'], jnp.arange(B) * (K - 1)
  prints_BKP = _prints(batch, K)
  same_BX = (prints_BKP[:, None, None, 1] == prints_BKP[None, :, 1:]).all(-1).reshape(B, -1)
  wrong_BX = there_BK[:, 1:].reshape(-1) & ~same_BX
  counts_BX = wrong_BX | (jnp.arange(wrong_BX.shape[1]) == own_B[:, None])
  total, correct_B = 0.0, None
  for dims in (*settings.dims, D):
    unit_BKD = _unit(texts_BKD[..., :dims])
    with jax.named_scope(MEETING):
      score_BX = jnp.einsum('BD,CKD->BCK', unit_BKD[:, 0], unit_BKD[:, 1:]).reshape(B, -1) / settings.temperature
    score_BX = jnp.where(counts_BX, score_BX, -1e9)
    nll_B = optax.softmax_cross_entropy_with_integer_labels(score_BX, own_B)
    total += (nll_B * weights_B).sum() / (len(settings.dims) + 1)
    correct_B = (score_BX.argmax(-1) == own_B).astype(jnp.float32)
  count = weights_B.sum()
  told = {'loss': (total, count), 'accuracy': ((correct_B * weights_B).sum(), count)}
  if settings.flops:
    counts_BK = there_BK * weights_B[:, None]
    mean_KD = jnp.einsum('BKD,BK->KD', texts_BKD, counts_BK) / jnp.maximum(counts_BK.sum(0), 1)[:, None]
    told['flops'] = jnp.square(mean_KD).sum() * count, count
    total += settings.flops * told['flops'][0]
  total += losses.extra(model, output.aux, weights_B, told)
  return total, {'objective': (total, count)} | told


def _prints(batch: dict[str, Array], texts: int) -> Array:
  """uint32 [B, K, 2]: two numbers of each text of a row, the same for the same ids in the same order."""
  ids_BT, segments_BT, positions_BT = (batch[key].astype(jnp.uint32) for key in ('tokens', 'segment_ids', 'positions'))
  scramble = lambda x, by: ((x ^ (x >> 16)) * jnp.uint32(by)) ^ (x >> 13)
  of = lambda by: scramble(scramble(ids_BT + 1, by) + (positions_BT + 1) * jnp.uint32(0x9E3779B9), by)
  mixed_BT2 = jnp.stack([of(by) for by in (0x85EBCA6B, 0xC2B2AE35)], axis=-1)
  return jnp.stack([jnp.where(segments_BT[..., None] == k + 1, mixed_BT2, 0).sum(1) for k in range(texts)], axis=1)


def _unit(x: Array) -> Array:
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


# ---- preferences -------------------------------------------------------------------------------------------------


def prefer_loss(model: Transformer, vocabulary: Vocabulary, config: Any, params: Tree, batch: dict[str, Array],
                rng: Array | None) -> tuple[Array, Sums]:
  """The better answer should be likelier than the worse one, as the chosen loss measures it.

  The reference is the frozen copy of the policy at the start; of a delta, the base without it.
  """
  settings = config.objective.prefer
  params, base, kept = _apart(model, params)
  policy, output = _pairs(model, vocabulary, params, batch, rng)
  preference, reference = PREFERENCES[settings.loss], None
  if preference.reference:
    reference = jax.lax.stop_gradient(_pairs(base, vocabulary, kept, batch, None)[0])
  chosen = {'dpo': dict(beta=settings.beta, label_smoothing=settings.smoothing),
            'ipo': dict(beta=settings.beta, by_token=settings.by_token),
            'orpo': dict(odds_weight=settings.odds_weight), 'simpo': dict(beta=settings.beta, margin=settings.margin)}
  total, told = preference.loss(policy, reference, batch['label_weights'], **chosen[settings.loss])
  return _with_extra(model, output, batch['label_weights'], total, told)


def _with_extra(model: Transformer, output: Output, weight_B: Array, total: Array, told: Sums) -> tuple[Array, Sums]:
  """A loss of texts, with what a mixture's routers add to it; `loss` is without that."""
  told = {'loss': told['objective']} | told
  total += losses.extra(model, output.aux, weight_B, told)
  return total, told | {'objective': (total, told['objective'][1])}


def without_reference(params: Tree) -> Tree:
  """All parameters but the copy of the policy at the start."""
  return {key: value for key, value in params.items() if key != REFERENCE}


def _apart(model: Transformer, params: Tree) -> tuple[Tree, Transformer, Tree]:
  """(the policy's parameters; the reference, and its: the copy that was kept, or the model without its delta)."""
  kept, params = params.get(REFERENCE), without_reference(params)
  if kept is not None:
    return params, model, kept
  base = model.clone(config=dataclasses.replace(model.config, peft=type(model.config.peft)()))
  return params, base, trees.partition(params, peft.is_delta)[1]


def token_log_probs(model: Transformer, vocabulary: Vocabulary, params: Tree, batch: dict[str, Array],
                    rng: Array | None, temperature: float = 1.0) -> Array:
  """float32 [B, T]: log-probs of the targets, by what a model draws from at a temperature."""
  return _said(model, vocabulary, params, batch, rng, temperature)[0]


def _said(model: Transformer, vocabulary: Vocabulary, params: Tree, batch: dict[str, Array], rng: Array | None,
          temperature: float = 1.0) -> tuple[Array, Output]:
  """(log-probs of the targets [B, T], all that the model returns)."""
  output = model.apply({'params': params}, batch, rng=rng, with_logits=False)
  w_VD, b_V = model.apply({'params': params}, method='unembedding')
  cooled = dataclasses.replace(vocabulary, softcap=vocabulary.softcap / temperature)  # all that logits are linear in
  nll_BT = losses.token_nll(cooled, output.features / temperature, w_VD, None if b_V is None else b_V / temperature,
                            batch['targets'])
  return -nll_BT, output


def _pairs(model: Transformer, vocabulary: Vocabulary, params: Tree, batch: dict[str, Array],
           rng: Array | None) -> tuple[Pairs, Output]:
  """What a model says of the two texts of each row."""
  log_probs_BT, output = _said(model, vocabulary, params, batch, rng)
  of = lambda text: sequence_log_probs(log_probs_BT, jnp.where(batch['segment_ids'] == text, batch['loss_weights'], 0))
  (chosen_B, chosen_lengths_B), (rejected_B, rejected_lengths_B) = of(1), of(2)
  return Pairs(chosen_B, rejected_B, chosen_lengths_B, rejected_lengths_B), output


def kto_loss(model: Transformer, vocabulary: Vocabulary, config: Any, params: Tree, batch: dict[str, Array],
             rng: Array | None) -> tuple[Array, Sums]:
  """A good answer should be likelier than it was, a bad one less likely, as measured from what answers to other questions
  became; a batch is not cut (accumulation 1), for all of it says what that is.

  The reference is that of `prefer_loss`.
  """
  settings, weights_B = config.objective.kto, batch['label_weights']
  params, base, kept = _apart(model, params)
  policy, output = _pairs(model, vocabulary, params, batch, rng)
  reference = jax.lax.stop_gradient(_pairs(base, vocabulary, kept, batch, None)[0])
  moved = ((policy.rejected_B - reference.rejected_B) * weights_B).sum(), weights_B.sum()
  total, told = kto(policy.chosen_B, reference.chosen_B, batch['labels'], reference_point(moved), weights_B,
                    beta=settings.beta, good_weight=settings.good_weight, bad_weight=settings.bad_weight)
  return _with_extra(model, output, weights_B, total, told)


def reward_loss(model: Transformer, config: Any, params: Tree, batch: dict[str, Array],
                rng: Array | None) -> tuple[Array, Sums]:
  """The label head's score of the better answer should be above that of the worse one (`bradley_terry`)."""
  output = model.apply({'params': params}, batch, rng=rng, with_logits=False)
  segments_BT = virtual.real(model.config, batch['tokens'], batch['segment_ids'])
  score = lambda text: model.apply({'params': params}, output.hidden, jnp.where(segments_BT == text, 1, 0),
                                   method='scores')[:, 0]
  total, told = bradley_terry(score(1), score(2), batch['label_weights'], centring=config.objective.reward.centring)
  return _with_extra(model, output, batch['label_weights'], total, told)


def needs_reference(config: Any) -> bool:
  """Whether a frozen copy of the parameters at the start must be kept: not where the model without its delta is that."""
  objective = config.objective
  compares = {'prefer': PREFERENCES[objective.prefer.loss].reference, 'grpo': objective.grpo.kl_weight > 0,
              'ppo': objective.ppo.kl_weight > 0, 'kto': True}
  leaves = config.model.peft.method in ('lora', 'ia3', 'bottleneck') and not config.model.peft.also
  return compares.get(objective.name, False) and not leaves


# ---- rewards -----------------------------------------------------------------------------------------------------


def grpo_loss(model: Transformer, vocabulary: Vocabulary, config: Any, params: Tree, batch: dict[str, Array],
              rng: Array | None) -> tuple[Array, Sums]:
  """Answers better than others to the same question should be likelier, near the policy that wrote them.

  The reference is that of `prefer_loss`. `entropy` is estimated by the tokens that were drawn: the mean of their -log-probs.
  """
  settings = config.objective.grpo
  params, base, kept = _apart(model, params)
  said = functools.partial(_said, vocabulary=vocabulary, batch=batch, temperature=settings.temperature)
  (policy_BT, output), reference_BT = said(model, params=params, rng=rng), None
  if settings.kl_weight:
    reference_BT = jax.lax.stop_gradient(said(base, params=kept, rng=None)[0])
  own_BT, weights_BT = jax.lax.stop_gradient(policy_BT), batch['loss_weights']
  total, told = grpo(policy_BT, batch.get('old_log_probs', own_BT), reference_BT, batch['advantages'],
                     weights_BT, -own_BT, clip_low=settings.clip_low, clip_high=settings.clip_high,
                     kl_weight=settings.kl_weight, normalisation=settings.normalisation, longest=settings.max_new_tokens)
  counted_B = weights_BT.sum(1) if settings.normalisation == 'token' else weights_BT.max(1)
  return _with_extra(model, output, counted_B, total, told)


def ppo_loss(model: Transformer, vocabulary: Vocabulary, config: Any, params: Tree, batch: dict[str, Array],
             rng: Array | None) -> tuple[Array, Sums]:
  """Tokens that did better than the label head expected should be likelier, near the policy that wrote them; and the head
  should expect what came.

  `entropy` as in `grpo_loss`. The reference is in the rewards, see `worth`.
  """
  settings, params = config.objective.ppo, _apart(model, params)[0]
  policy_BT, output = _said(model, vocabulary, params, batch, rng, settings.temperature)
  weights_BT = batch['loss_weights']
  total, told = ppo(policy_BT, batch['old_log_probs'], batch['advantages'], output.scores[..., 0], batch['old_values'],
                    batch['returns'], weights_BT, -jax.lax.stop_gradient(policy_BT), clip=settings.clip,
                    value_clip=settings.value_clip, value_weight=settings.value_weight)
  return _with_extra(model, output, weights_BT.sum(1), total, told)


def worth(model: Transformer, config: Any, params: Tree, batch: dict[str, Array],
          scores_B: Array) -> tuple[dict[str, Array], Sums]:
  """({old_log_probs, old_values, advantages, returns} of answers that a policy wrote, float32 [B, T]; what is told of them).

  Args:
    params: the policy's and its reference's.
    scores_B: a reward for each answer. It ends there, also where it was cut off: the reward is for what was written, and
      nothing comes after it.
  """
  settings, weights_BT = config.objective.ppo, batch['loss_weights']
  params, base, kept = _apart(model, params)
  said = functools.partial(_said, vocabulary=losses.vocabulary_of(model, config.loss), batch=batch, rng=None,
                           temperature=settings.temperature)
  policy_BT, output = said(model, params=params)
  reference_BT = said(base, params=kept)[0] if settings.kl_weight else policy_BT
  values_BT = output.scores[..., 0]
  rewards_BT, told = penalised_rewards(scores_B, policy_BT, reference_BT, weights_BT, kl_weight=settings.kl_weight)
  advantages_BT, returns_BT = gae(rewards_BT, values_BT, weights_BT, jnp.zeros_like(scores_B), discount=settings.discount,
                                  decay=settings.decay)
  return dict(old_log_probs=policy_BT, old_values=values_BT, advantages=advantages_BT, returns=returns_BT), told


def make(name: str, model: Transformer, config: Any) -> LossFn:
  """The loss of an objective, (parameters, batch, rng) -> (the sum that is differentiated, sums and counts)."""
  vocabulary = losses.vocabulary_of(model, config.loss)
  if name in losses.LOSSES:
    return functools.partial(losses.LOSSES[name], model, vocabulary)
  return {'labels': functools.partial(labels_loss, model, config),
          'contrast': functools.partial(contrast_loss, model, config),
          'reward': functools.partial(reward_loss, model, config),
          'prefer': functools.partial(prefer_loss, model, vocabulary, config),
          'kto': functools.partial(kto_loss, model, vocabulary, config),
          'grpo': functools.partial(grpo_loss, model, vocabulary, config),
          'ppo': functools.partial(ppo_loss, model, vocabulary, config)}[name]
