"""Losses of preferences, as functions of log-probabilities: sums over examples, never means.

Each loss returns (the sum that is differentiated, sums and counts to report), as those of losses.py do; whoever
optimises divides once, by the count of 'objective' over the global batch. All but KTO's reference point is a sum over
examples, so microbatches add up to the batch.

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
from jaxlm.types import Array

LEAST = float(np.finfo(np.float32).eps)  # what float32 cannot tell from 0 beside 1


def sequence_log_probs(log_probs_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
  """(summed log-probs [B], tokens summed [B]) of each row's targets; those of weight 0 may be infinite."""
  return (jnp.where(weights_BT != 0, log_probs_BT, 0) * weights_BT).sum(1), weights_BT.sum(1)


def mean_of(sums_B: Array, counts_B: Array) -> Array:
  """Each sum by its own count; 0 of nothing."""
  return sums_B / jnp.where(counts_B > 0, counts_B, 1)


def weighed(values: Array, weights: Array) -> tuple[Array, Array]:
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
    return mean_of(self.chosen_B, self.chosen_lengths_B), mean_of(self.rejected_B, self.rejected_lengths_B)


def _of_pairs(loss_B: Array, rewards: tuple[Array, Array], policy: Pairs, weights_B: Array) -> tuple[Array, Sums]:
  total, count = weighed(loss_B, weights_B)
  told = {'log_probs_chosen': policy.chosen_B, 'log_probs_rejected': policy.rejected_B} | _compared(*rewards)
  return total, {'objective': (total, count)} | {name: weighed(x_B, weights_B) for name, x_B in told.items()}


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
    chosen_B, rejected_B = mean_of(chosen_B, policy.chosen_lengths_B), mean_of(rejected_B, policy.rejected_lengths_B)
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
  return total, told | {name: weighed(x_B, weights_B) for name, x_B in more.items()}


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

  It is the one thing that couples examples: its sums are over the global batch, so a batch is not cut.

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
  total, count = weighed(scale_B * jax.nn.sigmoid(-signed_B), weights_B)  # lambda - v, without its cancellation
  chosen_B, rejected_B = weights_B * good_B, weights_B * (1 - good_B)
  told = {'accuracy': weighed((signed_B > 0).astype(jnp.float32), weights_B), 'kl': (z0 * count, count)}
  for name, share_B in (('chosen', chosen_B), ('rejected', rejected_B)):
    told |= {f'rewards_{name}': weighed(reward_B, share_B), f'log_probs_{name}': weighed(policy_B, share_B)}
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
  total, count = weighed(loss_B, weights_B)
  told = {name: weighed(x_B, weights_B) for name, x_B in _compared(chosen_B, rejected_B).items()}
  return total, {'objective': (total, count)} | told


@dataclasses.dataclass(frozen=True)
class Preference:
  """A loss of pairs, and what its caller must have.

  Attributes:
    loss: all read the same: policy, reference, weights.
    reference: whether a frozen policy scores the texts.
  """
  loss: Callable[..., tuple[Array, Sums]]
  reference: bool


PREFERENCES = {'dpo': Preference(dpo, True), 'ipo': Preference(ipo, True), 'orpo': Preference(orpo, False),
               'simpo': Preference(simpo, False)}
