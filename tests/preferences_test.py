"""Losses of preferences against the papers' formulas in float64, their gradients, limits, extremes, and trl's."""
import collections
import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import policies, preferences
from jaxlm.preferences import PREFERENCES, Pairs

B, T = 6, 7


def _inputs(seed=0):
  """Everything that any loss reads, float32, by name; ratios of old to new are within and beyond the clip."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape, scale=1.0: (rng.standard_normal(shape) * scale).astype(np.float32)
  lengths = lambda: rng.integers(3, 9, B).astype(np.float32)
  chosen_lengths, rejected_lengths = lengths(), lengths()
  chosen, rejected = (-np.abs(normal(B)) * n for n in (chosen_lengths, rejected_lengths))
  policy_BT, weights_BT = -np.abs(normal(B, T)), (rng.random((B, T)) < 0.7).astype(np.float32)
  weights_BT[:, 2], weights_BT[-1] = 1, 0  # each row has a token, but for the last
  return dict(
      chosen=chosen, rejected=rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
      ref_chosen=chosen + normal(B, scale=5), ref_rejected=rejected + normal(B, scale=5),
      weights=np.array([1, 0, 2.5, 1, 1, 0.5], np.float32), good=np.array([1, 0, 0, 1, 0, 1], np.float32),
      z0=np.float32(1.7), margins=np.abs(normal(B)), policy=policy_BT, old=policy_BT + normal(B, T, scale=0.4),
      reference=policy_BT + normal(B, T), advantages=normal(B), advantages_BT=normal(B, T), values=normal(B, T),
      old_values=normal(B, T, scale=0.5), returns=normal(B, T), entropy=np.abs(normal(B, T)), weights_BT=weights_BT)


def _pairs(x, prefix=''):
  return Pairs(x[prefix + 'chosen'], x[prefix + 'rejected'], x['chosen_lengths'], x['rejected_lengths'])


# ---- the papers, an example at a time ----------------------------------------------------------------------------


def _minus_log_sigmoid(x):
  return np.logaddexp(0, -x)


def _ratio(x, i):
  """DPO's h: the difference of log-ratios."""
  return (x['chosen'][i] - x['ref_chosen'][i]) - (x['rejected'][i] - x['ref_rejected'][i])


def _over_examples(of_one):
  return lambda x: sum(x['weights'][i] * of_one(x, i) for i in range(len(x['weights'])) if x['weights'][i])


def _paper_dpo(x, i, beta=0.3, smoothing=0.0):
  h = beta * _ratio(x, i)
  return (1 - smoothing) * _minus_log_sigmoid(h) + smoothing * _minus_log_sigmoid(-h)


def _paper_ipo(x, i, beta=0.3, by_token=False):
  ours, theirs = x['chosen'][i] - x['ref_chosen'][i], x['rejected'][i] - x['ref_rejected'][i]
  if by_token:
    ours, theirs = ours / x['chosen_lengths'][i], theirs / x['rejected_lengths'][i]
  return (ours - theirs - 1 / (2 * beta)) ** 2


def _paper_orpo(x, i, odds_weight=0.2):
  p, q = (np.exp(x[name][i] / x[name + '_lengths'][i]) for name in ('chosen', 'rejected'))
  return -np.log(p) + odds_weight * _minus_log_sigmoid(np.log(p / (1 - p) / (q / (1 - q))))


def _paper_simpo(x, i, beta=2.0, gamma=0.7):
  r, s = (beta / x[name + '_lengths'][i] * x[name][i] for name in ('chosen', 'rejected'))
  return _minus_log_sigmoid(r - s - gamma)


def _paper_kto(x, i, beta=0.3, lambda_d=1.3, lambda_u=0.6):
  gain, sigmoid = x['chosen'][i] - x['ref_chosen'][i] - x['z0'], lambda v: 1 / (1 + np.exp(-v))
  return lambda_d - lambda_d * sigmoid(beta * gain) if x['good'][i] else lambda_u - lambda_u * sigmoid(-beta * gain)


def _paper_reward(x, i, centring=0.1):
  r, s = x['chosen'][i], x['rejected'][i]
  return _minus_log_sigmoid(r - s - x['margins'][i]) + centring * (r + s) ** 2


def _surrogate(ratio, advantage, low, high):
  return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def _paper_grpo(x, normalisation, low=0.2, high=0.28, beta=0.3, entropy_weight=0.1, longest=10):
  total = 0
  for i in range(len(x['policy'])):
    written, terms = np.flatnonzero(x['weights_BT'][i]), 0
    for t in written:
      policy, theirs = x['policy'][i, t], x['reference'][i, t]
      kl = np.exp(theirs - policy) - (theirs - policy) - 1
      terms -= _surrogate(np.exp(policy - x['old'][i, t]), x['advantages'][i], low, high)
      terms += beta * kl - entropy_weight * x['entropy'][i, t]
    total += terms / {'sequence': max(len(written), 1), 'token': 1, 'longest': longest}[normalisation]
  return total


def _paper_ppo(x, clip=0.2, value_clip=0.3, c1=0.4, c2=0.05):
  total = 0
  for i, t in zip(*np.nonzero(x['weights_BT'])):
    at = {name: x[name][i, t] for name in ('policy', 'old', 'values', 'old_values', 'returns', 'entropy')}
    near = at['old_values'] + min(max(at['values'] - at['old_values'], -value_clip), value_clip)
    error = max((at['values'] - at['returns']) ** 2, (near - at['returns']) ** 2) / 2
    surrogate = _surrogate(np.exp(at['policy'] - at['old']), x['advantages_BT'][i, t], clip, clip)
    total += -surrogate + c1 * error - c2 * at['entropy']
  return total


def _of_pairs(name, **settings):
  return lambda x: PREFERENCES[name].loss(_pairs(x), _pairs(x, 'ref_'), x['weights'], **settings)


def _grpo(normalisation):
  return lambda x: policies.grpo(x['policy'], x['old'], x['reference'], x['advantages'], x['weights_BT'],
                                    x['entropy'], clip_high=0.28, kl_weight=0.3, entropy_weight=0.1,
                                    normalisation=normalisation, longest=10)


def _ppo(x):
  return policies.ppo(x['policy'], x['old'], x['advantages_BT'], x['values'], x['old_values'], x['returns'],
                         x['weights_BT'], x['entropy'], value_clip=0.3, value_weight=0.4, entropy_weight=0.05)


PAIR, TOKEN = ('chosen', 'rejected'), ('policy', 'entropy')
CASES = {  # name: (ours, the paper's, what is differentiated)
    'dpo': (_of_pairs('dpo', beta=0.3), _over_examples(_paper_dpo), PAIR),
    'dpo, smoothed': (_of_pairs('dpo', beta=0.3, label_smoothing=0.2),
                      _over_examples(functools.partial(_paper_dpo, smoothing=0.2)), PAIR),
    'ipo': (_of_pairs('ipo', beta=0.3), _over_examples(_paper_ipo), PAIR),
    'ipo, by token': (_of_pairs('ipo', beta=0.3, by_token=True),
                      _over_examples(functools.partial(_paper_ipo, by_token=True)), PAIR),
    'orpo': (_of_pairs('orpo', odds_weight=0.2), _over_examples(_paper_orpo), PAIR),
    'simpo': (_of_pairs('simpo', margin=0.7), _over_examples(_paper_simpo), PAIR),
    'kto': (lambda x: preferences.kto(x['chosen'], x['ref_chosen'], x['good'], x['z0'], x['weights'], beta=0.3,
                                      good_weight=1.3, bad_weight=0.6), _over_examples(_paper_kto), ('chosen',)),
    'reward': (lambda x: preferences.bradley_terry(x['chosen'], x['rejected'], x['weights'], x['margins'],
                                                   centring=0.1), _over_examples(_paper_reward), PAIR),
    'grpo': (_grpo('sequence'), functools.partial(_paper_grpo, normalisation='sequence'), TOKEN),
    'grpo, by token': (_grpo('token'), functools.partial(_paper_grpo, normalisation='token'), TOKEN),
    'grpo, by the longest': (_grpo('longest'), functools.partial(_paper_grpo, normalisation='longest'), TOKEN),
    'ppo': (_ppo, _paper_ppo, (*TOKEN, 'values')),
}


@functools.cache
def _compiled(ours):
  """(some inputs, the others) -> ((total, told), gradients by the former)."""
  return jax.jit(jax.value_and_grad(lambda some, others: ours(some | others), has_aux=True))


def _gradients(ours, x, names):
  """(total, gradients by name)."""
  some = {name: x[name] for name in names}
  (total, told), gradients = _compiled(ours)(some, {k: v for k, v in x.items() if k not in some})
  assert np.isfinite(jax.tree.leaves(told)).all()
  return total, gradients


def _differences(paper, x, name, step=1e-6):
  """The gradient of a float64 function by central differences."""
  slope = np.zeros(x[name].shape)
  for index in np.ndindex(slope.shape):
    ends = []
    for sign in (1, -1):
      moved = x[name].copy()
      moved[index] += sign * step
      ends.append(paper(x | {name: moved}))
    slope[index] = (ends[0] - ends[1]) / (2 * step)
  return slope


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('case', CASES)
def test_losses_and_gradients_are_the_papers(case, seed):
  ours, paper, names = CASES[case]
  x = _inputs(seed)
  exact = {k: np.float64(v) for k, v in x.items()}
  total, gradients = _gradients(ours, x, names)
  assert float(total) == pytest.approx(paper(exact), rel=1e-5)
  for name in names:
    want = _differences(paper, exact, name)
    np.testing.assert_allclose(gradients[name], want, atol=1e-5 * max(np.abs(want).max(), 1), err_msg=name)


@pytest.mark.parametrize('case', CASES)
def test_microbatches_add_up_to_the_batch(case):
  ours, x = CASES[case][0], _inputs()
  cut = lambda rows: {k: v if np.ndim(v) == 0 else v[rows] for k, v in x.items()}
  whole, parts = ours(x), [ours(cut(rows)) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
  added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5), added, whole)
  assert float(whole[0]) == float(whole[1]['objective'][0])


@pytest.mark.parametrize('case', CASES)
def test_what_has_no_weight_leaves_no_trace(case):
  ours, _, names = CASES[case]
  x = _inputs()
  other = dict(x)
  for name in ('policy', 'old', 'reference', 'values', 'old_values', 'returns', 'entropy', 'advantages_BT'):
    other[name] = np.where(x['weights_BT'] > 0, x[name], -np.inf)
  for name in ('chosen', 'rejected', 'ref_chosen', 'margins'):
    other[name] = np.where(x['weights'] > 0, x[name], np.float32(-1e4))
  (total, gradients), (same, same_gradients) = (_gradients(ours, y, names) for y in (x, other))
  assert total == same
  jax.tree.map(np.testing.assert_array_equal, gradients, same_gradients)
  without = _inputs() | {k: 0 * x[k] for k in ('weights', 'weights_BT')}
  total, gradients = _gradients(ours, without, names)
  assert total == 0 and all((g == 0).all() for g in gradients.values())
  assert float(ours(without)[1]['objective'][1]) == 0


# ---- extremes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', CASES)
def test_extreme_log_ratios_stay_finite(case):
  ours, _, names = CASES[case]
  x, signs = _inputs(), np.array([1, -1, 1, -1, 1, -1], np.float32)
  for change in (lambda v, s: s * 1e4, lambda v, s: v + s * 1e4, lambda v, s: 0 * v, lambda v, s: 0 * v - 1e4):
    for flip in (1, -1):
      moved = x | {k: change(x[k], flip * signs.reshape(B, *[1] * (x[k].ndim - 1))) for k in names}
      total, gradients = _gradients(ours, moved, names)
      assert np.isfinite(total) and all(np.isfinite(g).all() for g in gradients.values())


def test_dpo_is_right_where_it_is_saturated():
  log_ratios = np.array([-1e4, -300, -30, -1e-4, 0, 1e-4, 30, 300, 1e4], np.float32)
  zeros, ones = np.zeros_like(log_ratios), np.ones_like(log_ratios)
  loss = lambda chosen: preferences.dpo(Pairs(chosen, zeros, ones, ones), Pairs(zeros, zeros, ones, ones), ones,
                                        beta=1.0)[0]
  want = np.logaddexp(0, -log_ratios.astype(float))
  np.testing.assert_allclose([float(loss(log_ratios * hot)) - (len(want) - 1) * np.log(2) for hot in np.eye(len(want))],
                             want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(jax.grad(loss)(log_ratios), -np.exp(-np.logaddexp(0, log_ratios.astype(float))),
                             rtol=1e-5, atol=1e-30)


def test_odds_of_near_certain_and_of_impossible_texts_are_right():
  means = np.array([-1e4, -100, -20, -1, -0.1, -1e-4, -1e-6, -2e-7, -1e-8, 0, 1e-8], np.float32)
  chosen, rejected = (m.ravel() for m in np.meshgrid(means, means))
  ones = np.ones_like(chosen)
  def loss(chosen, rejected):
    return preferences.orpo(Pairs(chosen, rejected, ones, ones), None, ones, odds_weight=1.0)
  gradients = jax.grad(lambda *args: loss(*args)[0], (0, 1))(chosen, rejected)
  near = lambda m: np.minimum(m.astype(float), -preferences.LEAST)  # float32 knows no probability nearer to 1
  odds = lambda m: near(m) - np.log(-np.expm1(near(m)))
  wrong = np.exp(-np.logaddexp(0, odds(chosen) - odds(rejected)))   # sigmoid(-log odds ratio)
  np.testing.assert_allclose(gradients[0], -1 + wrong / np.expm1(near(chosen)), rtol=1e-5)
  np.testing.assert_allclose(gradients[1], -wrong / np.expm1(near(rejected)), rtol=1e-5, atol=1e-30)
  of_each = jax.vmap(lambda c, r: preferences.orpo(Pairs(c[None], r[None], ones[:1], ones[:1]), None, ones[:1],
                                                   odds_weight=1.0)[0])(chosen, rejected)
  np.testing.assert_allclose(of_each, -chosen + np.logaddexp(0, odds(rejected) - odds(chosen)), rtol=1e-5, atol=1e-5)


# ---- limits ------------------------------------------------------------------------------------------------------


def test_dpo_of_the_reference_itself_is_log_2():
  x = _inputs()
  total, told = preferences.dpo(_pairs(x), _pairs(x), x['weights'], label_smoothing=0.1)
  assert float(total / told['objective'][1]) == pytest.approx(np.log(2), rel=1e-6)
  assert float(told['margin'][0]) == 0


def test_ipo_is_least_where_the_difference_is_half_the_inverse_of_beta():
  zeros, ones = np.zeros(1, np.float32), np.ones(1, np.float32)
  at = lambda chosen: preferences.ipo(Pairs(chosen, zeros, ones, ones), Pairs(zeros, zeros, ones, ones), ones,
                                      beta=0.25)[0]
  assert at(2 * ones) == 0 and jax.grad(at)(2 * ones) == 0 and jax.grad(at)(3 * ones) > 0


def test_kto_at_its_reference_point_is_half_of_each_weight_and_z0_has_no_gradient():
  x = _inputs()
  loss = lambda policy, z0: preferences.kto(policy, x['ref_chosen'], x['good'], z0, np.ones(B, np.float32),
                                            good_weight=2.0)[0]
  assert float(loss(x['ref_chosen'] + x['z0'], x['z0'])) == pytest.approx(3 * 1.0 + 3 * 0.5, rel=1e-5)
  assert jax.grad(loss, 1)(x['chosen'], x['z0']) == 0


def test_the_reference_point_is_the_global_mean_and_never_negative():
  assert preferences.reference_point((jnp.float32(6), jnp.float32(4))) == 1.5
  assert preferences.reference_point((jnp.float32(-6), jnp.float32(4))) == 0
  assert preferences.reference_point((jnp.float32(0), jnp.float32(0))) == 0
  assert jax.grad(lambda total: preferences.reference_point((total, jnp.float32(4))))(6.0) == 0


@pytest.mark.parametrize('xp', [np, jnp])
def test_advantages_are_of_the_group(xp):
  rewards = np.array([[0.1, 0.1, 0.1], [1, 0, 2], [1e4, -1e4, 0]], np.float32)
  got = np.asarray(policies.group_advantages(xp.asarray(rewards)))
  exact = rewards.astype(float)
  plain = exact - exact.mean(1, keepdims=True)
  np.testing.assert_allclose(got, plain / (exact.std(1, ddof=1, keepdims=True) + 1e-4), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(policies.group_advantages(xp.asarray(rewards), by_std=False), plain, rtol=1e-5,
                             atol=1e-5)
  assert (got[0] == 0).all()
  assert (np.asarray(policies.group_advantages(xp.ones((2, 1), np.float32))) == 0).all()


@pytest.mark.parametrize('case', [c for c in CASES if 'grpo' in c or c == 'ppo'])
def test_no_advantage_has_no_gradient(case):
  x = _inputs()
  x |= {'advantages': 0 * x['advantages'], 'advantages_BT': 0 * x['advantages_BT'], 'reference': x['policy']}
  assert (_gradients(CASES[case][0], x, ['policy'])[1]['policy'] == 0).all()


def test_the_clip_stops_the_gradient_only_of_what_has_moved_far_enough_already():
  ratios = np.array([0.5, 0.5, 1.0, 1.0, 1.5, 1.5], np.float32)
  advantages = np.array([1, -1, 1, -1, 1, -1], np.float32)
  moved = np.array([1, 0, 1, 1, 0, 1], bool)  # pessimism: only 0.5 with a bad, and 1.5 with a good one, are far enough
  ones = np.ones((6, 1), np.float32)
  def grpo(policy):
    return policies.grpo(policy, 0 * ones, None, advantages, ones)
  def ppo(policy):
    return policies.ppo(policy, 0 * ones, advantages[:, None], *[0 * ones] * 3, ones)
  for loss in (grpo, ppo):
    gradient, told = jax.grad(loss, has_aux=True)(np.log(ratios)[:, None])
    np.testing.assert_allclose(gradient[:, 0], -ratios * advantages * moved, rtol=1e-6)
    assert [float(v) for v in told['clip_fraction']] == [2, 6]


def test_the_clip_of_values_stops_the_gradient_of_what_has_moved_far_enough_already():
  ones = np.ones((4, 1), np.float32)
  values, returns = np.array([[0.1], [0.5], [0.5], [-0.5]]), np.array([[1], [1], [-1], [1]])
  def loss(values):
    return policies.ppo(0 * ones, 0 * ones, 0 * ones, values, 0 * ones, returns, ones, value_weight=1.0)
  gradient, told = jax.grad(loss, has_aux=True)(values.astype(np.float32))
  np.testing.assert_allclose(gradient[:, 0], [-0.9, 0, 1.5, -1.5], rtol=1e-6)
  assert float(told['value_clip_fraction'][0]) == 1


def test_the_first_update_may_name_its_own_policy_as_the_old_one():
  x = _inputs()
  loss = lambda policy: policies.grpo(policy, policy, None, x['advantages'], x['weights_BT'],
                                         normalisation='token')[0]
  np.testing.assert_allclose(jax.grad(loss)(x['policy']), -x['advantages'][:, None] * x['weights_BT'], rtol=1e-6)


def test_an_unknown_normalisation_is_named():
  x = _inputs()
  with pytest.raises(Exception, match="Unknown normalisation 'tokens'.*Did you mean 'token'"):
    policies.grpo(x['policy'], x['old'], None, x['advantages'], x['weights_BT'], normalisation='tokens')


# ---- of tokens ---------------------------------------------------------------------------------------------------


def test_sequence_log_probs_leave_out_what_has_no_weight():
  x = _inputs()
  log_probs = np.where(x['weights_BT'] > 0, x['policy'], -np.inf)
  sums, counts = preferences.sequence_log_probs(log_probs, x['weights_BT'])
  np.testing.assert_allclose(sums, (x['policy'] * x['weights_BT']).sum(1), rtol=1e-6)
  np.testing.assert_array_equal(counts, x['weights_BT'].sum(1))
  gradient = jax.grad(lambda p: preferences.sequence_log_probs(p, x['weights_BT'])[0].sum())(log_probs)
  np.testing.assert_array_equal(gradient, x['weights_BT'])


def test_the_score_comes_with_the_last_token_and_the_penalty_with_each():
  weights = np.array([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], np.float32)
  policy, scores = np.full((3, 5), -1, np.float32), np.array([10, 20, 30], np.float32)
  reference = np.where(weights > 0, -3, -np.inf).astype(np.float32)
  rewards, told = policies.penalised_rewards(scores, policy, reference, weights, kl_weight=0.5)
  np.testing.assert_allclose(rewards, [[0, -1, 0, 9, 0], [-1, -1, -1, -1, 19], [0] * 5])
  assert [float(v) for v in told['kl']] == [14, 7] and [float(v) for v in told['score']] == [30, 2]


def _plain_gae(rewards, values, weights, bootstrap, ends, discount, decay):
  """The sum of all later errors for each token, row by row: O(T²)."""
  advantages = np.zeros_like(values)
  for i in range(len(values)):
    text = np.concatenate([[0], np.cumsum(ends[i])[:-1]])  # which text a token belongs to
    steps = np.flatnonzero(weights[i])
    for k, t in enumerate(steps):
      for distance, l in enumerate(steps[k:]):
        if text[l] != text[t]:
          break
        later = steps[k + distance + 1:]
        if len(later) and text[later[0]] == text[l]:
          follows = values[i, later[0]]
        else:  # the text's last: over, or cut off by the row's end
          follows = 0 if ends[i, l:][text[l:] == text[l]].any() else bootstrap[i]
        error = rewards[i, l] + discount * follows - values[i, l]
        advantages[i, t] += (discount * decay) ** distance * error
  return advantages


@pytest.mark.parametrize('discount, decay', [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (0.9, 0.8)])
def test_gae_is_the_sum_over_all_later_errors(discount, decay):
  rng = np.random.default_rng(3)
  rewards, values = rng.standard_normal((2, 64, 12))
  weights, ends = rng.random((64, 12)) < 0.6, rng.random((64, 12)) < 0.15
  bootstrap = rng.standard_normal(64)
  want = _plain_gae(rewards, values, weights, bootstrap, ends, discount, decay)
  f32 = [np.float32(a) for a in (rewards, values, weights, bootstrap)]
  got, returns = jax.jit(policies.gae)(*f32, ends, discount=discount, decay=decay)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(returns, (want + values) * weights, atol=1e-5)
  alone, _ = policies.gae(*f32, discount=discount, decay=decay)
  np.testing.assert_allclose(alone, _plain_gae(rewards, values, weights, bootstrap, 0 * ends, discount, decay),
                             atol=1e-5)


def test_gae_sees_nothing_of_what_does_not_count_and_has_no_gradient():
  x = _inputs()
  bootstrap = np.ones(B, np.float32)
  advantages = lambda values, rewards: policies.gae(rewards, values, x['weights_BT'], bootstrap)
  hidden = [np.where(x['weights_BT'] > 0, x[name], np.nan) for name in ('values', 'returns')]
  for got, want in zip(advantages(*hidden), advantages(x['values'], x['returns'])):
    np.testing.assert_array_equal(got, want)
  gradient = jax.grad(lambda values: sum(y.sum() for y in advantages(values, x['returns'])))(x['values'])
  assert (gradient == 0).all()


def test_whitened_advantages_have_mean_0_and_variance_1_where_they_count():
  x = _inputs()
  got, counted = np.asarray(policies.whitened(3 + 5 * x['values'], x['weights_BT'])), x['weights_BT'] > 0
  assert (got[~counted] == 0).all()
  assert got[counted].mean() == pytest.approx(0, abs=1e-6) and got[counted].std() == pytest.approx(1, rel=1e-5)


# ---- told --------------------------------------------------------------------------------------------------------


def test_what_is_told_of_pairs():
  x = _inputs()
  told = {k: float(v[0] / v[1]) for k, v in preferences.dpo(_pairs(x), _pairs(x, 'ref_'), x['weights'])[1].items()}
  mean = lambda y: np.average(y, weights=x['weights'])
  chosen, rejected = (0.1 * (x[k] - x['ref_' + k]) for k in ('chosen', 'rejected'))
  want = {'rewards_chosen': chosen, 'rewards_rejected': rejected, 'margin': chosen - rejected,
          'accuracy': chosen > rejected, 'log_probs_chosen': x['chosen'], 'log_probs_rejected': x['rejected']}
  assert {k: told[k] for k in want} == pytest.approx({k: mean(v) for k, v in want.items()}, rel=1e-5)


def test_what_is_told_of_single_texts():
  x = _inputs()
  told = {k: float(v[0] / v[1]) for k, v in CASES['kto'][0](x)[1].items()}
  reward, good = 0.3 * (x['chosen'] - x['ref_chosen']), x['good'] > 0
  mean = lambda y, which: np.average(y[which], weights=x['weights'][which])
  want = {'accuracy': mean((reward > 0.3 * x['z0']) == good, slice(None)), 'kl': x['z0'],
          'rewards_chosen': mean(reward, good), 'rewards_rejected': mean(reward, ~good),
          'log_probs_chosen': mean(x['chosen'], good), 'log_probs_rejected': mean(x['chosen'], ~good)}
  assert {k: told[k] for k in want} == pytest.approx(want, rel=1e-5)
  assert want['accuracy'] != mean((reward > 0) == good, slice(None))  # the point matters


def test_what_is_told_of_rollouts():
  x = _inputs()
  mean = lambda y: np.average(y, weights=x['weights_BT'])
  policy, old, reference = (x[k].astype(float) for k in ('policy', 'old', 'reference'))
  k3 = lambda d: np.exp(d) - d - 1
  want = {'kl': k3(reference - policy), 'kl_old': k3(old - policy), 'entropy': x['entropy'], 'log_probs': policy}
  told = {k: float(v[0] / v[1]) for k, v in _grpo('sequence')(x)[1].items()}
  assert {k: told[k] for k in want} == pytest.approx({k: mean(v) for k, v in want.items()}, rel=1e-5)
  assert {'clip_fraction', 'advantage'} <= told.keys()
  told = {k: float(v[0] / v[1]) for k, v in _ppo(x)[1].items()}
  total = told['policy_loss'] + 0.4 * told['value_loss'] - 0.05 * told['entropy']
  assert told['objective'] == pytest.approx(total, rel=1e-5)


# ---- trl ---------------------------------------------------------------------------------------------------------


def _trl(module):
  """A module of trl, whose private methods are called: of that version alone."""
  trl = pytest.importorskip('trl', reason='trl is not a dependency')
  if not trl.__version__.startswith('1.16.'):
    pytest.skip(f'written for trl 1.16, not {trl.__version__}')
  try:
    return importlib.import_module(f'trl.{module}')
  except ImportError as e:
    pytest.skip(f'trl.{module}: {e}')


def _trainer(**attributes):
  """What trl's losses read of a trainer."""
  same = lambda x, *args, **kwargs: x
  accelerator = types.SimpleNamespace(device='cpu', gather=same, gather_for_metrics=same, reduce=same, num_processes=1,
                                      sync_gradients=True)
  metrics = collections.defaultdict(lambda: collections.defaultdict(list))
  model = types.SimpleNamespace(training=False)
  return types.SimpleNamespace(accelerator=accelerator, _metrics=metrics, model=model, aux_loss_enabled=False,
                               **attributes)


def _agrees(case, x, loss, tensors, count):
  """Ours, divided by the count, and its gradient are trl's mean and its gradient."""
  total, gradients = _gradients(case, x, list(tensors))
  loss.backward()
  assert float(total) / count == pytest.approx(loss.item(), rel=1e-5)
  for name, tensor in tensors.items():
    np.testing.assert_allclose(gradients[name] / count, tensor.grad.numpy(), atol=1e-5, err_msg=name)


def _tensors(x, *names):
  torch = pytest.importorskip('torch')
  return {name: torch.tensor(x[name], requires_grad=True) for name in names}


def _of_one_token(torch, log_probs, lengths):
  """(outputs of trl's fused head, mask) of rows whose first token has all of a text's log-prob."""
  width = int(lengths.max())
  mask = (torch.arange(width) < lengths[:, None]).int()
  per_token = torch.nn.functional.pad(log_probs[:, None], (0, width - 1))
  zeros = torch.zeros(per_token.shape)
  outputs = types.SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
  return outputs, torch.nn.functional.pad(mask, (1, 0))


@pytest.mark.parametrize('kind, name, settings', [
    ('sigmoid', 'dpo', dict(beta=0.3)), ('ipo', 'ipo', dict(beta=0.3, by_token=True))])
def test_dpo_and_ipo_are_trls(kind, name, settings):
  trainer, torch = _trl('trainer.dpo_trainer').DPOTrainer, pytest.importorskip('torch')
  x = _inputs() | {'weights': np.ones(B, np.float32)}
  tensors = _tensors(x, *PAIR)
  lengths = torch.tensor(np.concatenate([x['chosen_lengths'], x['rejected_lengths']]))
  outputs, mask = _of_one_token(torch, torch.cat(list(tensors.values())), lengths)
  stub = _trainer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl', loss_types=[kind],
                  loss_weights=[1.0], beta=0.3, label_smoothing=0.0, use_weighting=False, _total_train_tokens=0)
  inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask,
                ref_chosen_logps=torch.tensor(x['ref_chosen']), ref_rejected_logps=torch.tensor(x['ref_rejected']))
  loss = trainer._compute_loss(stub, lambda **kwargs: outputs, inputs, False)
  _agrees(_of_pairs(name, **settings), x, loss, tensors, B)


def test_kto_is_trls():
  trainer, torch = _trl('trainer.kto_trainer').KTOTrainer, pytest.importorskip('torch')
  x = _inputs() | {'weights': np.ones(B, np.float32)}
  tensors = _tensors(x, 'chosen')
  outputs, mask = _of_one_token(torch, tensors['chosen'], torch.tensor(x['chosen_lengths']))
  mismatched = torch.tensor(x['rejected']), torch.tensor(x['ref_rejected'])
  stub = _trainer(precompute_ref_logps=True, calculate_KL=True, beta=0.3, loss_type='kto', desirable_weight=1.3,
                  undesirable_weight=0.6, _total_train_tokens=0, _compute_kl_logps=lambda *args: mismatched[0])
  inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask, label=torch.tensor(x['good']).bool(),
                ref_logps=torch.tensor(x['ref_chosen']), ref_KL_logps=mismatched[1])
  x['z0'] = preferences.reference_point(((x['rejected'] - x['ref_rejected']).sum(), np.float32(B)))
  _agrees(CASES['kto'][0], x, trainer._compute_loss(stub, lambda **kwargs: outputs, inputs, False), tensors, B)


def test_the_odds_of_orpo_and_the_loss_of_simpo_are_trls():
  orpo = _trl('experimental.orpo.orpo_trainer').ORPOTrainer
  cpo = _trl('experimental.cpo.cpo_trainer').CPOTrainer
  x = _inputs() | {'weights': np.ones(B, np.float32)}
  tensors = _tensors(x, *PAIR)
  means = [tensors[name] / tensors[name].new_tensor(x[name + '_lengths']) for name in PAIR]
  loss = -orpo.odds_ratio_loss(_trainer(beta=0.2), *means)[0].mean() - means[0].mean()
  _agrees(CASES['orpo'][0], x, loss, tensors, B)
  tensors = _tensors(x, *PAIR)
  means = [tensors[name] / tensors[name].new_tensor(x[name + '_lengths']) for name in PAIR]
  stub = _trainer(beta=2.0, alpha=0.0, loss_type='simpo', simpo_gamma=0.7, label_smoothing=0.0)
  _agrees(CASES['simpo'][0], x, cpo.cpo_loss(stub, *means)[0].mean(), tensors, B)


def test_the_reward_loss_is_trls():
  trainer, torch = _trl('trainer.reward_trainer').RewardTrainer, pytest.importorskip('torch')
  x = _inputs() | {'weights': np.ones(B, np.float32)}
  tensors = _tensors(x, *PAIR)
  outputs = types.SimpleNamespace(logits=torch.cat(list(tensors.values()))[:, None])
  stub = _trainer(args=types.SimpleNamespace(center_rewards_coefficient=0.1), _total_train_tokens=0)
  loss = trainer.compute_loss(stub, lambda **kwargs: outputs, {'margin': torch.tensor(x['margins'])})
  _agrees(CASES['reward'][0], x, loss, tensors, B)


@pytest.mark.parametrize('kind, normalisation', [('grpo', 'sequence'), ('dapo', 'token'), ('dr_grpo', 'longest')])
def test_grpo_is_trls(kind, normalisation):
  trainer, torch = _trl('trainer.grpo_trainer').GRPOTrainer, pytest.importorskip('torch')
  x = {k: v[:5] if np.ndim(v) else v for k, v in _inputs().items()}  # trl counts a text without tokens
  tensors, tokens = _tensors(x, 'policy'), torch.tensor(x['weights_BT'])
  stub = _trainer(
      _get_per_token_logps_and_entropies=lambda *args, **kwargs: (tensors['policy'], torch.tensor(x['entropy']), None),
      top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level='token', beta=0.3,
      loss_type=kind, epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, vllm_importance_sampling_correction=False,
      max_completion_length=10, _entropy_bonus_enabled=False,
      args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None))
  ids = torch.zeros(tokens.shape, dtype=torch.int64)
  inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=tokens,
                advantages=torch.tensor(x['advantages']), old_per_token_logps=torch.tensor(x['old']),
                ref_per_token_logps=torch.tensor(x['reference']), num_items_in_batch=tokens.sum())
  ours = lambda x: policies.grpo(x['policy'], x['old'], x['reference'], x['advantages'], x['weights_BT'],
                                    clip_high=0.28, kl_weight=0.3, normalisation=normalisation, longest=10)
  count = float(ours(x)[1]['objective'][1])
  _agrees(ours, x, trainer._compute_loss(stub, None, inputs), tensors, count)
