"""Losses of texts that a policy wrote, by what they were worth: sums over texts or tokens, never means.

They return what those of preferences.py do, and microbatches add up to the batch; but advantages are of whole rollouts
(`group_advantages`, `whitened`).

Arrays are float32 and finite, but for tokens of weight 0, which may hold anything.
"""
import jax
import jax.numpy as jnp

from jaxlm.losses import Sums
from jaxlm.lookup import lookup
from jaxlm.preferences import mean_of, weighed
from jaxlm.types import Array

LARGEST = 20.0  # a log-ratio beyond counts as this and has no gradient: exp(89) is infinite in float32


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
  return loss_BT, {name: weighed(x_BT, weights_BT) for name, x_BT in told.items()}


def _counted(weights_BT: Array, *arrays_BT: Array | None) -> list[Array | None]:
  """The arrays, 0 where nothing counts: what is there may be infinite, and leaves no trace in a gradient."""
  return [x if x is None else jnp.where(weights_BT != 0, x, 0) for x in arrays_BT]


# name: (sum over a text's tokens, how many, the text's weight, longest) -> (what it adds, what it counts)
NORMALISATIONS = {
    'sequence': lambda sum_B, tokens_B, weight_B, longest: (weight_B * mean_of(sum_B, tokens_B), weight_B),
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
    told['kl'] = weighed(kl_BT, weights_BT)
  if entropy_BT is not None:
    loss_BT -= entropy_weight * entropy_BT
    told['entropy'] = weighed(entropy_BT, weights_BT)
  sum_B, tokens_B, weight_B = (loss_BT * weights_BT).sum(1), weights_BT.sum(1), weights_BT.max(1)
  normalise = lookup(NORMALISATIONS, normalisation, 'normalisation')
  total, count = (x_B.sum() for x_B in normalise(sum_B, tokens_B, weight_B, longest))
  return total, {'objective': (total, count), 'advantage': weighed(advantages_B, weight_B)} | told


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
  return rewards_BT, {'kl': weighed(ratio_BT, weights_BT), 'score': weighed(scores_B, weights_BT.max(1))}


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
    value_clip: how far values move from the old ones; 0: freely, as in the paper; OpenAI's baselines clip.
    value_weight: the paper's c1, of half the square.
    entropy_weight: the paper's c2.
  Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7 and 9.
  """
  policy_BT, old_BT, advantages_BT, values_BT, old_values_BT, returns_BT, entropy_BT = _counted(
      weights_BT, policy_BT, jax.lax.stop_gradient(old_BT), advantages_BT, values_BT, old_values_BT, returns_BT,
      entropy_BT)
  policy_loss_BT, told = _clipped(policy_BT, old_BT, advantages_BT, weights_BT, clip, clip)
  free_BT = jnp.square(values_BT - returns_BT)
  reach = value_clip or jnp.inf
  bounded_BT = jnp.square(jnp.clip(values_BT, old_values_BT - reach, old_values_BT + reach) - returns_BT)
  value_loss_BT = jnp.maximum(free_BT, bounded_BT) / 2
  loss_BT = policy_loss_BT + value_weight * value_loss_BT
  more = {'policy_loss': policy_loss_BT, 'value_loss': value_loss_BT, 'advantage': advantages_BT, 'value': values_BT,
          'return': returns_BT, 'value_clip_fraction': (bounded_BT > free_BT).astype(jnp.float32)}
  if entropy_BT is not None:
    loss_BT -= entropy_weight * entropy_BT
    more['entropy'] = entropy_BT
  total, count = weighed(loss_BT, weights_BT)
  return total, {'objective': (total, count)} | told | {name: weighed(x, weights_BT) for name, x in more.items()}
