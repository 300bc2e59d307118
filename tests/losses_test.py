"""The vocabulary loss against a plain formula in float64, its gradients, and what it holds in memory."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import losses, sharding
from jaxlm.losses import Vocabulary, cross_entropy, token_losses
from jaxlm.train import build_model

B, T, D, V, PADDED = 2, 11, 8, 13, 16
LAYOUT = sharding.single(base.default().sharding.rules)
PLAIN = Vocabulary(size=V, softcap=0.0, z_loss=0.0, smoothing=0.0, chunk=T, layout=LAYOUT)
CASES = {
    'plain': dict(),
    'chunks that divide': dict(chunk=1),
    'chunks that do not divide': dict(chunk=4),
    'z-loss': dict(z_loss=0.1),
    'smoothing': dict(smoothing=0.2),
    'softcap': dict(softcap=2.0),
    'no padded columns': dict(size=PADDED),
    'all': dict(chunk=4, z_loss=0.1, smoothing=0.2, softcap=2.0),
    'all, no padded columns': dict(chunk=4, z_loss=0.1, smoothing=0.2, softcap=2.0, size=PADDED),
}


def _inputs():
  rng = np.random.default_rng(0)
  weights_BT = rng.choice([0.0, 1.0, 2.5], (B, T)).astype(np.float32)
  return (rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((PADDED, D)).astype(np.float32),
          rng.integers(0, V, (B, T)).astype(np.int32), weights_BT)


def _plain(vocabulary, h_BTD, w_VD, targets_BT, xp):
  """(loss, nll, correct) of every target, columns beyond the vocabulary cut off; xp is numpy or jax.numpy."""
  logits = xp.einsum('btd,vd->btv', h_BTD, w_VD[:vocabulary.size])
  if vocabulary.softcap:
    logits = vocabulary.softcap * xp.tanh(logits / vocabulary.softcap)
  log_z = xp.log(xp.exp(logits).sum(-1))
  hot = xp.arange(vocabulary.size) == targets_BT[..., None]
  log_probs = logits - log_z[..., None]
  goal = (1 - vocabulary.smoothing) * hot + vocabulary.smoothing / vocabulary.size
  loss = -(goal * log_probs).sum(-1) + vocabulary.z_loss * log_z ** 2
  return loss, -(hot * log_probs).sum(-1), logits.argmax(-1) == targets_BT


@pytest.mark.parametrize('case', CASES)
def test_values_are_those_of_the_plain_formula_in_float64(case):
  vocabulary = dataclasses.replace(PLAIN, **CASES[case])
  h, w, targets, weights = _inputs()
  want = [(x * weights).sum() for x in _plain(vocabulary, h.astype(float), w.astype(float), targets, np)]
  total, sums = jax.jit(cross_entropy, static_argnums=0)(vocabulary, h, w, None, targets, weights)
  np.testing.assert_allclose((total, sums['nll'], sums['correct']), want, rtol=2e-6)


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_the_plain_formula(case):
  vocabulary = dataclasses.replace(PLAIN, **CASES[case])
  h, w, targets, weights = _inputs()
  plain = lambda h, w: (_plain(vocabulary, h, w, targets, jnp)[0] * weights).sum() / 7
  ours = lambda h, w: cross_entropy(vocabulary, h, w, None, targets, weights)[0] / 7
  (value, got), (want_value, want) = (jax.jit(jax.value_and_grad(f, (0, 1)))(h, w) for f in (ours, plain))
  np.testing.assert_allclose(value, want_value, rtol=2e-6)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())  # float32 sums; measured max 3.2e-7
  assert (np.asarray(got[1])[vocabulary.size:] == 0).all()         # columns beyond the vocabulary learn nothing


def test_a_bias_counts_and_learns():
  h, w, targets, weights = _inputs()
  vocabulary = dataclasses.replace(PLAIN, chunk=4, softcap=2.0)
  b = np.random.default_rng(1).standard_normal(PADDED).astype(np.float32)
  ours = lambda b: cross_entropy(vocabulary, h, w, b, targets, weights)[0]
  with_bias = lambda b: (_plain(vocabulary, np.concatenate([h, np.ones((B, T, 1), np.float32)], -1),
                                jnp.concatenate([w, b[:, None]], 1), targets, jnp)[0] * weights).sum()
  for got, want in zip(jax.value_and_grad(ours)(b), jax.value_and_grad(with_bias)(b)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('chunk', [T, 4])
def test_token_losses_are_those_of_the_plain_formula(chunk):
  vocabulary = dataclasses.replace(PLAIN, chunk=chunk, softcap=2.0, z_loss=0.3, smoothing=0.4)
  h, w, targets, _ = _inputs()
  _, nll, correct = _plain(vocabulary, h.astype(float), w.astype(float), targets, np)
  got_nll, got_correct = jax.jit(token_losses, static_argnums=0)(vocabulary, h, w, None, targets)
  np.testing.assert_allclose(got_nll, nll, rtol=1e-5)  # of the bare likelihood: no z-loss, no smoothing
  np.testing.assert_array_equal(got_correct, correct)


def test_what_does_not_count_leaves_no_trace():
  h, w, targets, weights = _inputs()
  weights[:, 5:] = 0
  other = targets.copy()
  other[:, 5:] = PADDED - 1  # beyond the vocabulary: its loss is infinite
  loss = lambda h, w, targets: cross_entropy(PLAIN, h, w, None, targets, weights)[0]
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  (value, grads), (same, same_grads) = step(h, w, targets), step(h, w, other)
  assert value == same and np.isfinite(value)
  jax.tree.map(np.testing.assert_array_equal, grads, same_grads)
  assert (np.asarray(grads[0])[:, 5:] == 0).all()


def test_no_target_at_all_is_zero_loss_and_zero_gradient():
  h, w, targets, weights = _inputs()
  value, grads = jax.value_and_grad(lambda h: cross_entropy(PLAIN, h, w, None, targets, 0 * weights)[0])(h)
  assert value == 0 and (grads == 0).all()


def test_large_logits_stay_finite():
  h, w, targets, weights = _inputs()
  value, grad = jax.value_and_grad(lambda h: cross_entropy(PLAIN, h, w, None, targets, weights)[0])(h * 1e4)
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_sums_do_not_depend_on_how_the_batch_is_cut():
  h, w, targets, weights = _inputs()
  whole, _ = cross_entropy(PLAIN, h, w, None, targets, weights)
  parts = sum(cross_entropy(PLAIN, h[i:i + 1], w, None, targets[i:i + 1], weights[i:i + 1])[0] for i in range(B))
  assert float(parts) == pytest.approx(float(whole), rel=1e-6)


def test_half_precision_hidden_states_have_float32_losses_and_master_gradients():
  h, w, targets, weights = _inputs()
  loss = lambda h, w: cross_entropy(dataclasses.replace(PLAIN, chunk=4), h, w, None, targets, weights)[0]
  value, (dh, dw) = jax.value_and_grad(loss, (0, 1))(h.astype(jnp.bfloat16), w)
  assert (value.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  exact = jax.grad(loss, 1)(h, w)
  np.testing.assert_allclose(dw, exact, atol=0.02 * np.abs(exact).max())  # bfloat16 operands; measured 0.005


# ---- what it costs -----------------------------------------------------------------------------------------------


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(getattr(p, 'jaxpr', p), 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def test_loss_and_gradient_take_three_products_a_chunk_and_no_whole_logits():
  batch, length, width, size, chunk = 2, 1024, 16, 512, 64
  vocabulary = Vocabulary(size=size, softcap=0.0, z_loss=1e-4, smoothing=0.0, chunk=chunk, layout=LAYOUT)
  loss = lambda h, w, targets, weights: cross_entropy(vocabulary, h, w, None, targets, weights)[0]
  shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
  args = (shape(batch, length, width), shape(size, width), shape(batch, length, dtype=jnp.int32), shape(batch, length))
  step = jax.value_and_grad(loss, (0, 1))
  equations = list(_equations(jax.make_jaxpr(step)(*args).jaxpr))
  assert sum(e.primitive.name == 'dot_general' for e in equations) == 3   # logits, and two of the gradient
  assert [e.params['length'] for e in equations if e.primitive.name == 'scan'] == [length // chunk]
  sizes = [v.aval.size for e in equations for v in e.outvars]
  assert max(sizes) <= max(batch * chunk * size, batch * length * width)
  compiled = jax.jit(step).lower(*args).compile()
  whole = 4 * batch * length * size
  assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * whole  # some arrays of one chunk, [B, T, D] and [V, D]


def test_the_loss_without_a_gradient_takes_one_product():
  h, w, targets, weights = _inputs()
  chunked = dataclasses.replace(PLAIN, chunk=4)
  jaxpr = jax.make_jaxpr(lambda h: cross_entropy(chunked, h, w, None, targets, weights))(h).jaxpr
  assert sum(e.primitive.name == 'dot_general' for e in _equations(jaxpr)) == 1


# ---- of a model --------------------------------------------------------------------------------------------------


def test_the_models_loss_is_that_of_its_logits(tiny):
  tiny.loss.chunk = 8
  tiny.model.update(num_layers=1, logit_softcap=5.0)
  model = build_model(tiny, 257, 'causal', LAYOUT)
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 257, (2, 17)).astype(np.int32)
  batch = dict(tokens=tokens_BT[:, :-1], targets=tokens_BT[:, 1:],
               loss_weights=rng.choice([0.0, 1.0], (2, 16)).astype(np.float32))
  params = jax.tree.map(lambda p: p.value, jax.jit(model.init)(jax.random.key(0), batch)['params'],
                        is_leaf=lambda p: hasattr(p, 'names'))
  loss = lambda params: losses.lm_loss(model, losses.vocabulary_of(model, tiny.loss), params, batch, None)
  total, sums = jax.jit(loss)(params)
  logits = np.asarray(jax.jit(model.apply)({'params': params}, batch).logits, np.float64)[..., :257]
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_probs, batch['targets'][..., None], -1)[..., 0]
  count = batch['loss_weights'].sum()
  assert float(total) == pytest.approx((nll * batch['loss_weights']).sum(), rel=1e-5)
  assert {name: float(n) for name, (_, n) in sums.items()} == dict.fromkeys(('objective', 'loss', 'accuracy'), count)
  right = (logits.argmax(-1) == batch['targets']) * batch['loss_weights']
  assert float(sums['accuracy'][0]) == right.sum()
