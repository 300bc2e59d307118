"""Losses of preferences and rewards, as functions of log-probabilities: sums over examples or tokens, never means.

Each loss returns (the sum that is differentiated, sums and counts to report), as those of losses.py do; whoever
optimises divides once, by the count of 'objective' over the global batch. All but KTO's reference point and what is
computed of whole rollouts (`group_advantages`, `whitened`) is a sum over examples, so microbatches add up to the batch.

Arrays are float32 and finite, but for tokens of weight 0, which may hold anything. A float32 sum of -10,000 nats is
known to 0.001: of very long texts give the sum of the differences to the reference, and zeros for the reference.
"""
import dataclasses
from typing import Any, Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses import Sums
from jaxlm.lookup import lookup
from jaxlm.types import Array

LARGEST = 20.0  # a log-ratio beyond counts as this and has no gradient: exp(89) is infinite in float32
LEAST = float(np.finfo(np.float32).eps)  # what float32 cannot tell from 0 beside 1


def sequence_log_probs(log_probs_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
  """(summed log-probs [B], tokens summed [B]) of each row's targets; those of weight 0 may be infinite."""
  return (jnp.where(weights_BT != 0, log_probs_BT, 0) * weights_BT).sum(1), weights_BT.sum(1)


def _mean(sums_B: Array, counts_B: Array) -> Array:
  """Each sum by its own count; 0 of nothing."""
  return sums_B / jnp.where(counts_B > 0, counts_B, 1)


def _weighed(values: Array, weights: Array) -> tuple[Array, Array]:
  """(sum, count)."""
  return (values * weights).sum(), weights.sum()


# ---- of pairs of texts ---------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Pairs:
  """What a model says of two texts for a prompt, float32 [B] each.

  Attributes:
    chosen_B: summed log-probs of the better text's tokens.
    rejected_B: of the other's.
    chosen_lengths_B: how many tokens were summed.
    rejected_lengths_B: of the other.
  """
  chosen_B: Array
  rejected_B: Array
  chosen_lengths_B: Array
  rejected_lengths_B: Array

  def means(self) -> tuple[Array, Array]:
    """Log-probs by token: (chosen [B], rejected [B])."""
    return _mean(self.chosen_B, self.chosen_lengths_B), _mean(self.rejected_B, self.rejected_lengths_B)


def _of_pairs(loss_B: Array, rewards: tuple[Array, Array], policy: Pairs, weights_B: Array) -> tuple[Array, Sums]:
  total, count = _weighed(loss_B, weights_B)
  told = {'log_probs_chosen': policy.chosen_B, 'log_probs_rejected': policy.rejected_B} | _compared(*rewards)
  return total, {'objective': (total, count)} | {name: _weighed(x_B, weights_B) for name, x_B in told.items()}


def _compared(chosen_B: Array, rejected_B: Array) -> dict[str, Array]:
  """What is told of the rewards of both."""
  return {'rewards_chosen': chosen_B, 'rewards_rejected': rejected_B, 'margin': chosen_B - rejected_B,
          'accuracy': (chosen_B > rejected_B).astype(jnp.float32)}


def _implicit_rewards(policy: Pairs, reference: Pairs, beta: float) -> tuple[Array, Array]:
  """beta · log π / π_ref of both texts."""
  return beta * (policy.chosen_B - reference.chosen_B), beta * (policy.rejected_B - reference.rejected_B)


def dpo(policy: Pairs, reference: Pairs, weights_B: Array, *, beta: float = 0.1,
        label_smoothing: float = 0.0) -> tuple[Array, Sums]:
  """The chosen text's log-ratio to the reference should be above the rejected one's, as a logistic regression.

  Args:
    policy: differentiated.
    reference: of the frozen policy.
    weights_B: how much each pair counts.
    beta: how strongly the reference holds.
    label_smoothing: how often a label is thought wrong; above 0 it is the conservative DPO of the paper's authors.
  Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7.
  """
  chosen_B, rejected_B = rewards = _implicit_rewards(policy, reference, beta)
  margin_B = chosen_B - rejected_B
  loss_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_B) - label_smoothing * jax.nn.log_sigmoid(-margin_B)
  return _of_pairs(loss_B, rewards, policy, weights_B)


def ipo(policy: Pairs, reference: Pairs, weights_B: Array, *, beta: float = 0.1,
        by_token: bool = False) -> tuple[Array, Sums]:
  """The difference of log-ratios should be 1 / (2 beta), no more.

  Args:
    policy: differentiated.
    reference: of the frozen policy.
    weights_B: how much each pair counts.
    beta: the paper's tau.
    by_token: log-ratios are averages over tokens. The paper says sums; trl averages, and says that the authors did.
  Source: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences,
    arXiv:2310.12036, eq. 17.
  """
  rewards = _implicit_rewards(policy, reference, beta)
  chosen_B, rejected_B = _implicit_rewards(policy, reference, 1.0)
  if by_token:
    chosen_B, rejected_B = _mean(chosen_B, policy.chosen_lengths_B), _mean(rejected_B, policy.rejected_lengths_B)
  return _of_pairs(jnp.square(chosen_B - rejected_B - 1 / (2 * beta)), rewards, policy, weights_B)


def _log_odds(log_probs_B: Array) -> Array:
  """log p / (1 - p). Of a p that float32 cannot tell from 1, value and slope are those of the nearest that it can."""
  nearest_B = jax.lax.stop_gradient(jnp.minimum(log_probs_B, -LEAST))
  log_probs_B = nearest_B + (log_probs_B - jax.lax.stop_gradient(log_probs_B))
  return log_probs_B - jnp.log(-jnp.expm1(log_probs_B))


def orpo(policy: Pairs, reference: Any, weights_B: Array, *, odds_weight: float = 0.1) -> tuple[Array, Sums]:
  """Fine-tuning on the chosen text, plus the odds of it against the rejected one; no reference.

  The likelihood of a text is the geometric mean of its tokens'. The first term is the chosen text's mean loss by token,
  example by example; trl takes it over the batch's tokens, prompts among them.

  Args:
    policy: differentiated.
    reference: not read.
    weights_B: how much each pair counts.
    odds_weight: the paper's lambda.
  Source: Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691,
    eq. 6 and 7.
  """
  chosen_B, rejected_B = policy.means()
  odds_B = _log_odds(chosen_B) - _log_odds(rejected_B)
  odds_loss_B = -jax.nn.log_sigmoid(odds_B)
  rewards = odds_weight * chosen_B, odds_weight * rejected_B
  total, told = _of_pairs(odds_weight * odds_loss_B - chosen_B, rewards, policy, weights_B)
  more = {'loss': -chosen_B, 'odds_loss': odds_loss_B, 'log_odds_ratio': odds_B}
  return total, told | {name: _weighed(x_B, weights_B) for name, x_B in more.items()}


def simpo(policy: Pairs, reference: Any, weights_B: Array, *, beta: float = 2.0,
          margin: float = 1.0) -> tuple[Array, Sums]:
  """The chosen text's mean log-prob by token should be above the rejected one's by a margin; no reference.

  Args:
    policy: differentiated.
    reference: not read.
    weights_B: how much each pair counts.
    beta: scale of rewards.
    margin: the paper's gamma, in rewards; trl divides by beta what it calls so, which is the same.
  Source: Meng et al. 2024, SimPO, arXiv:2405.14734, eq. 6.
  """
  chosen_B, rejected_B = policy.means()
  rewards = beta * chosen_B, beta * rejected_B
  return _of_pairs(-jax.nn.log_sigmoid(rewards[0] - rewards[1] - margin), rewards, policy, weights_B)


# ---- of single texts, good or bad ----------------------------------------------------------------------------------


def reference_point(mismatched: tuple[Array, Array]) -> Array:
  """KTO's z0 []: the mean log-ratio of texts under prompts that they do not belong to, at least 0, without gradient.

  It is the one thing that couples examples. Before a step its caller joins each prompt of the global batch with the
  next example's text, scores these rows by policy and reference without gradient, and adds up their log-ratios over
  microbatches and devices; then the gradient is the same however the batch is cut.

  Args:
    mismatched: (summed log-ratios of texts, how many texts), over the global batch.
  Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
  """
  return jax.lax.stop_gradient(jnp.maximum(mismatched[0] / jnp.maximum(mismatched[1], 1), 0))


def kto(policy_B: Array, reference_B: Array, good_B: Array, z0: Array, weights_B: Array, *, beta: float = 0.1,
        good_weight: float = 1.0, bad_weight: float = 1.0) -> tuple[Array, Sums]:
  """A good text's log-ratio should be above the reference point, a bad one's below, each with falling returns.

  Args:
    policy_B: summed log-probs of each text; differentiated.
    reference_B: of the frozen policy.
    good_B: 1 or true where the text is good.
    z0: [], see `reference_point`; not differentiated.
    weights_B: how much each text counts.
    beta: how strongly the reference holds.
    good_weight: the paper's lambda_D.
    bad_weight: lambda_U; trl advises good_weight × good texts to be 1 to 4/3 times bad_weight × bad texts.
  Source: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306, section 4.
  """
  good_B, z0 = good_B.astype(jnp.float32), jax.lax.stop_gradient(z0)
  reward_B = beta * (policy_B - reference_B)
  signed_B = (2 * good_B - 1) * (reward_B - beta * z0)
  scale_B = jnp.where(good_B > 0, good_weight, bad_weight)
  total, count = _weighed(scale_B * jax.nn.sigmoid(-signed_B), weights_B)  # lambda - v, without its cancellation
  chosen_B, rejected_B = weights_B * good_B, weights_B * (1 - good_B)
  told = {'accuracy': _weighed((signed_B > 0).astype(jnp.float32), weights_B), 'kl': (z0 * count, count)}
  for name, share_B in (('chosen', chosen_B), ('rejected', rejected_B)):
    told |= {f'rewards_{name}': _weighed(reward_B, share_B), f'log_probs_{name}': _weighed(policy_B, share_B)}
  return total, {'objective': (total, count)} | told


# ---- of a reward model's scores ------------------------------------------------------------------------------------


def bradley_terry(chosen_B: Array, rejected_B: Array, weights_B: Array, margins_B: Array | None = None, *,
                  centring: float = 0.0) -> tuple[Array, Sums]:
  """A reward model's score of the chosen text should be above that of the rejected one.

  Args:
    chosen_B: scores of the better texts; differentiated.
    rejected_B: of the others; differentiated.
    weights_B: how much each pair counts.
    margins_B: by how much the one is better, where that is known (Touvron et al. 2023, Llama 2, eq. 2).
    centring: weight of the squared sum of both scores, which the likelihood alone leaves free (Eisenstein et al. 2023,
      Helping or Herding?, arXiv:2312.09244).
  Source: Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, eq. 1, for two texts.
  """
  margin_B = chosen_B - rejected_B - (0 if margins_B is None else margins_B)
  loss_B = centring * jnp.square(chosen_B + rejected_B) - jax.nn.log_sigmoid(margin_B)
  total, count = _weighed(loss_B, weights_B)
  told = {name: _weighed(x_B, weights_B) for name, x_B in _compared(chosen_B, rejected_B).items()}
  return total, {'objective': (total, count)} | told


# ---- of rollouts: texts the policy wrote, and their rewards --------------------------------------------------------


def group_advantages(rewards_BG: Array, *, by_std: bool = True, epsilon: float = 1e-4) -> Array:
  """How much better each text was than others for the same prompt; [B, G], of NumPy's arrays or of jax's.

  Args:
    rewards_BG: of the G texts written for each of B prompts. (Not the G of types.py.)
    by_std: in units of the group's standard deviation, of G - 1 as trl's and verl's; off for Dr. GRPO.
    epsilon: added to it; groups whose rewards are all the same have advantages of exactly 0.
  Source: Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, Understanding
    R1-Zero-Like Training, arXiv:2503.20783.
  """
  rewards_BG = rewards_BG - rewards_BG[:, :1]  # equal ones become 0, whose mean has no rounding
  centred_BG = rewards_BG - rewards_BG.mean(1, keepdims=True)
  if not by_std:
    return centred_BG
  variance_B1 = (centred_BG ** 2).sum(1, keepdims=True) / max(rewards_BG.shape[1] - 1, 1)
  return centred_BG / (variance_B1 ** 0.5 + epsilon)


def _kl(policy_BT: Array, other_BT: Array) -> Array:
  """An unbiased estimate of KL(policy, other) that is never negative, from tokens the policy drew ("k3")."""
  ratio_BT = jnp.minimum(other_BT - policy_BT, LARGEST)
  return jnp.expm1(ratio_BT) - ratio_BT


def _clipped(policy_BT: Array, old_BT: Array, advantages_BT: Array, weights_BT: Array, low: float,
             high: float) -> tuple[Array, Sums]:
  """PPO's pessimistic surrogate, negated [B, T], and what is told of it."""
  ratio_BT = jnp.exp(jnp.minimum(policy_BT - old_BT, LARGEST))
  bounded_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
  loss_BT = -jnp.minimum(ratio_BT * advantages_BT, bounded_BT * advantages_BT)
  clipped_BT = jnp.where(advantages_BT > 0, ratio_BT > 1 + high, (ratio_BT < 1 - low) & (advantages_BT < 0))
  told = {'clip_fraction': clipped_BT.astype(jnp.float32), 'kl_old': _kl(policy_BT, old_BT), 'log_probs': policy_BT}
  return loss_BT, {name: _weighed(x_BT, weights_BT) for name, x_BT in told.items()}


def _counted(weights_BT: Array, *arrays_BT: Array | None) -> list[Array | None]:
  """The arrays, 0 where nothing counts: what is there may be infinite, and leaves no trace in a gradient."""
  return [x if x is None else jnp.where(weights_BT != 0, x, 0) for x in arrays_BT]


# name: (sum over a text's tokens, how many, the text's weight, longest) -> (what it adds, what it counts)
NORMALISATIONS = {
    'sequence': lambda sum_B, tokens_B, weight_B, longest: (weight_B * _mean(sum_B, tokens_B), weight_B),
    'token': lambda sum_B, tokens_B, weight_B, longest: (sum_B, tokens_B),
    'longest': lambda sum_B, tokens_B, weight_B, longest: (sum_B / longest, weight_B),
}


def grpo(policy_BT: Array, old_BT: Array, reference_BT: Array | None, advantages_B: Array, weights_BT: Array,
         entropy_BT: Array | None = None, *, clip_low: float = 0.2, clip_high: float = 0.2, kl_weight: float = 0.04,
         entropy_weight: float = 0.0, normalisation: str = 'sequence', longest: int = 1024) -> tuple[Array, Sums]:
  """PPO's clipped surrogate for each token, with the text's advantage in its group, and a KL to the reference.

  Args:
    policy_BT: log-probs of the tokens written; differentiated.
    old_BT: of the policy that wrote them; may be the policy's own, for the first update.
    reference_BT: of the frozen policy; None: no KL.
    advantages_B: of each text, see `group_advantages`.
    weights_BT: 1 where the policy wrote the token, 0 elsewhere; a row counts as its largest weight does.
    entropy_BT: of the policy at each token, to tell, and to reward where it has a weight; differentiated.
    clip_low: how far below 1 a ratio still counts.
    clip_high: how far above 1; DAPO has 0.28 here.
    kl_weight: the paper's beta.
    entropy_weight: 0 in the paper.
    normalisation: 'sequence' is the mean over texts of their means over tokens, as in the paper; 'token' the mean over
      all tokens (Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 8); 'longest' the mean over texts of their sums over
      tokens, by a constant (Liu et al. 2025, Dr. GRPO, arXiv:2503.20783).
    longest: tokens; that constant.
  Source: Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3 and 4.
  """
  policy_BT, old_BT, reference_BT, entropy_BT = _counted(
      weights_BT, policy_BT, jax.lax.stop_gradient(old_BT), reference_BT, entropy_BT)
  loss_BT, told = _clipped(policy_BT, old_BT, advantages_B[:, None], weights_BT, clip_low, clip_high)
  if reference_BT is not None:
    kl_BT = _kl(policy_BT, reference_BT)
    loss_BT += kl_weight * kl_BT
    told['kl'] = _weighed(kl_BT, weights_BT)
  if entropy_BT is not None:
    loss_BT -= entropy_weight * entropy_BT
    told['entropy'] = _weighed(entropy_BT, weights_BT)
  sum_B, tokens_B, weight_B = (loss_BT * weights_BT).sum(1), weights_BT.sum(1), weights_BT.max(1)
  normalise = lookup(NORMALISATIONS, normalisation, 'normalisation')
  total, count = (x_B.sum() for x_B in normalise(sum_B, tokens_B, weight_B, longest))
  return total, {'objective': (total, count), 'advantage': _weighed(advantages_B, weight_B)} | told


def penalised_rewards(scores_B: Array, policy_BT: Array, reference_BT: Array, weights_BT: Array, *,
                      kl_weight: float = 0.02) -> tuple[Array, Sums]:
  """Rewards of tokens: the text's score at its last, less the log-ratio to the reference at each; without gradient.

  Args:
    scores_B: a reward model's, or a verifier's.
    policy_BT: log-probs by the policy that wrote the tokens.
    reference_BT: by the frozen policy.
    weights_BT: 1 where the policy wrote the token, 0 elsewhere.
    kl_weight: the paper's beta.
  Returns:
    rewards_BT, 0 where nothing counts; and what to tell.
  Source: Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, eq. 2, by token.
  """
  policy_BT, reference_BT = _counted(weights_BT, policy_BT, reference_BT)
  written_BT = weights_BT != 0
  last_BT = written_BT & (jnp.cumsum(written_BT[:, ::-1], axis=1)[:, ::-1] == 1)
  ratio_BT = policy_BT - reference_BT
  rewards_BT = jax.lax.stop_gradient(jnp.where(last_BT, scores_B[:, None], 0) - kl_weight * ratio_BT)
  return rewards_BT, {'kl': _weighed(ratio_BT, weights_BT), 'score': _weighed(scores_B, weights_BT.max(1))}


def gae(rewards_BT: Array, values_BT: Array, weights_BT: Array, bootstrap_B: Array, ends_BT: Array | None = None, *,
        discount: float = 1.0, decay: float = 0.95) -> tuple[Array, Array]:
  """Generalised advantages, and the returns that values should learn; both [B, T] and without gradient.

  Tokens that do not count (a prompt, padding, what a tool said) are no steps: what comes after one is what comes after
  the step before it. Their rewards are not read, their results are 0.

  Args:
    rewards_BT: for writing each token.
    values_BT: of the state before it.
    weights_BT: 1 where the policy wrote the token, 0 elsewhere.
    bootstrap_B: value after a row's last token: 0 where the text had ended, the value there where it was cut off.
    ends_BT: true at the last token of each text in a row of several; nothing comes after it.
    discount: the paper's gamma.
    decay: the paper's lambda; 1 has no bias, 0 the least variance.
  Source: Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation,
    arXiv:1506.02438, eq. 16.
  """
  def step(carry, inputs):
    reward_B, value_B, counts_B, goes_on_B = inputs
    next_value_B, next_advantage_B = (goes_on_B * x_B for x_B in carry)
    error_B = reward_B + discount * next_value_B - value_B
    advantage_B = error_B + discount * decay * next_advantage_B
    carry = jnp.where(counts_B, value_B, next_value_B), jnp.where(counts_B, advantage_B, next_advantage_B)
    return carry, jnp.where(counts_B, advantage_B, 0)

  goes_on_BT = jnp.ones_like(values_BT) if ends_BT is None else 1 - ends_BT.astype(values_BT.dtype)
  inputs = [x.T for x in (rewards_BT, values_BT, weights_BT != 0, goes_on_BT)]
  _, advantages_TB = jax.lax.scan(step, (bootstrap_B, jnp.zeros_like(bootstrap_B)), inputs, reverse=True)
  advantages_BT = jax.lax.stop_gradient(advantages_TB.T)
  return advantages_BT, jax.lax.stop_gradient(jnp.where(weights_BT != 0, advantages_BT + values_BT, 0))


def whitened(advantages_BT: Array, weights_BT: Array, *, epsilon: float = 1e-8) -> Array:
  """Advantages of mean 0 and variance 1 over all that counts; of whole rollouts, before they are cut up."""
  count = jnp.maximum(weights_BT.sum(), 1)
  centred_BT = jnp.where(weights_BT != 0, advantages_BT - (advantages_BT * weights_BT).sum() / count, 0)
  return centred_BT * jax.lax.rsqrt((jnp.square(centred_BT) * weights_BT).sum() / count + epsilon)


def ppo(policy_BT: Array, old_BT: Array, advantages_BT: Array, values_BT: Array, old_values_BT: Array,
        returns_BT: Array, weights_BT: Array, entropy_BT: Array | None = None, *, clip: float = 0.2,
        value_clip: float = 0.2, value_weight: float = 0.1, entropy_weight: float = 0.0) -> tuple[Array, Sums]:
  """The clipped surrogate, half the squared error of values (the larger of free and clipped), less the entropy.

  Args:
    policy_BT: log-probs of the tokens written; differentiated.
    old_BT: of the policy that wrote them.
    advantages_BT: see `gae`; the reference's KL is in its rewards, see `penalised_rewards`.
    values_BT: of the state before each token; differentiated.
    old_values_BT: when the tokens were written.
    returns_BT: what values should be, see `gae`.
    weights_BT: 1 where the policy wrote the token, 0 elsewhere.
    entropy_BT: of the policy at each token, to tell, and to reward where it has a weight; differentiated.
    clip: how far from 1 a ratio still counts.
    value_clip: how far values move from the old ones; the paper has none, OpenAI's baselines do.
    value_weight: the paper's c1, of half the square.
    entropy_weight: the paper's c2.
  Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7 and 9.
  """
  policy_BT, old_BT, advantages_BT, values_BT, old_values_BT, returns_BT, entropy_BT = _counted(
      weights_BT, policy_BT, jax.lax.stop_gradient(old_BT), advantages_BT, values_BT, old_values_BT, returns_BT,
      entropy_BT)
  policy_loss_BT, told = _clipped(policy_BT, old_BT, advantages_BT, weights_BT, clip, clip)
  free_BT = jnp.square(values_BT - returns_BT)
  bounded_BT = jnp.square(jnp.clip(values_BT, old_values_BT - value_clip, old_values_BT + value_clip) - returns_BT)
  value_loss_BT = jnp.maximum(free_BT, bounded_BT) / 2
  loss_BT = policy_loss_BT + value_weight * value_loss_BT
  more = {'policy_loss': policy_loss_BT, 'value_loss': value_loss_BT, 'advantage': advantages_BT, 'value': values_BT,
          'return': returns_BT, 'value_clip_fraction': (bounded_BT > free_BT).astype(jnp.float32)}
  if entropy_BT is not None:
    loss_BT -= entropy_weight * entropy_BT
    more['entropy'] = entropy_BT
  total, count = _weighed(loss_BT, weights_BT)
  return total, {'objective': (total, count)} | told | {name: _weighed(x, weights_BT) for name, x in more.items()}


@dataclasses.dataclass(frozen=True)
class Preference:
  """A loss, and what its caller must have.

  Attributes:
    loss: losses that read the same are called alike.
    reads: 'pairs' of texts, 'marked' single texts, 'scores' of pairs, 'groups' of rollouts, 'values' with rollouts.
    reference: whether a frozen policy scores the texts, for the loss or for the rewards it is given.
  """
  loss: Callable[..., tuple[Array, Sums]]
  reads: str
  reference: bool


PREFERENCES = {
    'dpo': Preference(dpo, 'pairs', True),
    'ipo': Preference(ipo, 'pairs', True),
    'orpo': Preference(orpo, 'pairs', False),
    'simpo': Preference(simpo, 'pairs', False),
    'kto': Preference(kto, 'marked', True),
    'reward': Preference(bradley_terry, 'scores', False),
    'grpo': Preference(grpo, 'groups', True),
    'ppo': Preference(ppo, 'values', True),
}
