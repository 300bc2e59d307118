"""Optimizers, schedules, and rules of decay, rate and freezing."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import config as base
from jaxlm import optim, sharding, train, trees
from jaxlm.errors import JaxlmError
from jaxlm.models.stack import depths, restack, unstack
from jaxlm.sharding import Layout


def _optim(**changes):
  config = base.default().optim
  config.update(changes)
  return config


def _run(tx, params, grads, updates=3):
  """Parameters after some updates, each with other gradients."""
  @jax.jit
  def step(params, state, grads):
    change, state = tx.update(grads, state, params)
    return optax.apply_updates(params, change), state
  state = tx.init(params)
  for i in range(updates):
    params, state = step(params, state, jax.tree.map(lambda g: g * (i + 1) + 0.1 * i, grads))
  return params


# ---- schedules ---------------------------------------------------------------------------------------------------

WARMUP, TOTAL, PEAK = 10, 110, 2.0


def _rates(name, **changes):
  given = dict(lr=PEAK, schedule=name, warmup_steps=WARMUP, total_steps=TOTAL, final_fraction=0.1, decay_fraction=0.2)
  rate = optim.schedule(_optim(**{**given, **changes}))
  return np.asarray(jax.vmap(rate)(jnp.arange(TOTAL + 50)))


@pytest.mark.parametrize('name', optim.SCHEDULES)
def test_schedules_warm_up_linearly_to_the_peak_and_never_rise_again(name):
  rates = _rates(name)
  np.testing.assert_allclose(rates[:WARMUP + 1], PEAK * np.arange(1, WARMUP + 2) / (WARMUP + 1), rtol=1e-6)
  assert (np.diff(rates[WARMUP:]) <= 0).all() and (rates > 0).all() and rates.max() == np.float32(PEAK)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd'])
def test_schedules_end_at_the_final_fraction_and_stay(name):
  rates = _rates(name)
  np.testing.assert_allclose(rates[TOTAL:], 0.1 * PEAK, rtol=1e-5)
  assert rates[TOTAL - 1] > rates[TOTAL]
  assert _rates(name, final_fraction=0.0)[TOTAL] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('name, middle', [('cosine', 0.55), ('linear', 0.55), ('wsd', 1.0), ('constant', 1.0),
                                          ('rsqrt', (10 / 60) ** 0.5)])
def test_schedules_half_way(name, middle):
  assert _rates(name)[60] == pytest.approx(middle * PEAK, rel=1e-5)


def test_wsd_is_flat_and_falls_in_a_line_over_the_last_part():
  rates = _rates('wsd')
  first = TOTAL - 22  # a fifth of all steps
  assert (rates[WARMUP:first + 1] == np.float32(PEAK)).all() and rates[first + 1] < PEAK
  np.testing.assert_allclose(np.diff(rates[first:TOTAL + 1]), -0.9 * PEAK / 22, rtol=1e-4)


def test_wsd_that_falls_from_the_start_still_reaches_its_peak():
  assert _rates('wsd', decay_fraction=1.0)[WARMUP] == np.float32(PEAK)


def test_no_warmup_starts_at_the_peak():
  for name in optim.SCHEDULES:
    assert _rates(name, warmup_steps=0)[0] == np.float32(PEAK), name


# ---- scanned = unrolled ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def stacked():
  """(config of a model, parameters, gradients, axes): three layers, stacked, statistics far apart."""
  config = base.smoke(base.default())
  config.model.update(num_layers=3, width=16, vocab_pad_to=8)
  config.model.mlp.width = 24
  config.model.attention.update(num_heads=2, num_kv_heads=2, head_dim=8)
  model = train.build_model(config, 24, 'causal', sharding.single(config.sharding.rules))
  boxed = jax.eval_shape(model.init, jax.random.key(0), {'tokens': jnp.zeros((1, 2), jnp.int32)})['params']
  axes, rng = sharding.logical_axes(boxed), np.random.default_rng(0)

  def draw(path, x):
    values = rng.standard_normal(x.shape).astype(np.float32)
    layers = np.arange(1, 4).reshape(-1, *[1] * (x.ndim - 1)) ** 2 if axes[path][:1] == ('layers',) else 1
    return jnp.asarray(values * layers, jnp.float32)

  draws = [trees.map_paths(draw, jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: hasattr(b, 'names')))
           for _ in range(2)]
  return model.config, *draws, axes


def _without_layers(axes, config, params):
  """Logical axes of the unstacked tree."""
  where = {}
  for path in trees.flatten(unstack(params, config)):
    parts = path.split('/')
    inside = '/'.join(['stack/period/slot_0', *parts[2:]]) if path.startswith('stack/layer_') else path
    where[path] = tuple(a for a in axes[inside] if a != 'layers')
  return where


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_stacked_layers_learn_as_layers_apart(name, stacked):
  config, params, grads, axes = stacked
  given = _optim(name=name, lr=0.05, warmup_steps=1)
  given.adafactor.min_dim = 8  # so that it does factor
  together = _run(optim.make(given, axes), params, grads)
  alone = optim.make(given, _without_layers(axes, config, params))
  apart = _run(alone, unstack(params, config), unstack(grads, config))
  for (path, a), b in zip(trees.flatten(together).items(), jax.tree.leaves(restack(apart, config))):
    # float32 sums in another order when batched, on parameters up to 25; measured max 2e-6.
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=path)


@pytest.mark.parametrize('name', ['adafactor', 'lamb', 'lars', 'novograd'])
def test_without_the_wrapper_a_stack_learns_otherwise(name, stacked, monkeypatch):
  config, params, grads, axes = stacked
  given = _optim(name=name, lr=0.05)
  given.adafactor.min_dim = 8
  right = _run(optim.make(given, axes), params, grads)
  monkeypatch.setattr(optim, 'over_layers', lambda tx, axes, layers: tx)
  wrong = _run(optim.make(given, axes), params, grads)
  assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(right), jax.tree.leaves(wrong))) > 1e-3


def test_adafactor_keeps_rows_and_columns_only(stacked):
  config, params, _, axes = stacked
  given = _optim(name='adafactor')
  given.adafactor.min_dim = 8
  state = jax.eval_shape(optim.make(given, axes).init, params)
  assert trees.num_bytes(state) < 0.5 * trees.num_bytes(params)


# ---- optimizers against optax's own ------------------------------------------------------------------------------


def _small():
  rng = np.random.default_rng(0)
  draw = lambda: {'a': {'kernel': jnp.asarray(rng.standard_normal((4, 6)), jnp.float32),
                        'bias': jnp.asarray(rng.standard_normal(6), jnp.float32)}}
  return draw(), draw(), {'a/kernel': ('embed', 'mlp'), 'a/bias': ('mlp',)}


KERNELS_ALONE = {'a': {'kernel': True, 'bias': False}}


@pytest.mark.parametrize('name, theirs', [
    ('adamw', lambda: optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=KERNELS_ALONE)),
    ('lion', lambda: optax.lion(0.1, b1=0.9, b2=0.99, weight_decay=0.1, mask=KERNELS_ALONE)),
    ('lamb', lambda: optax.lamb(0.1, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=KERNELS_ALONE)),
    ('muon', lambda: optax.contrib.muon(0.1, beta=0.95, adam_b2=0.95, weight_decay=0.1)),
    ('lars', lambda: optax.lars(0.1, weight_decay=0.1, weight_decay_mask=KERNELS_ALONE)),
])
def test_optimizers_are_optaxs_own(name, theirs):
  params, grads, axes = _small()
  ours = optim.make(_optim(name=name, lr=0.1, schedule='constant', weight_decay=0.1, clip_norm=0.0), axes)
  want, got = _run(theirs(), params, grads), _run(ours, params, grads)
  for part in ('kernel',) if name == 'muon' else ('kernel', 'bias'):  # optax's muon gives vectors to Nesterov's Adam
    np.testing.assert_allclose(got['a'][part], want['a'][part], atol=2e-6)


def test_muon_takes_matrices_between_widths_and_leaves_vectors_to_adam():
  shapes = {'query/kernel': ('embed', 'heads', 'head_dim'), 'query/bias': ('heads', 'head_dim'),
            'out/kernel': ('heads', 'head_dim', 'embed'), 'up/kernel': ('layers', 'embed', 'mlp'),
            'embed/embedding': ('vocab', 'embed'), 'position_embed/embedding': (None, 'embed'),
            'norm/scale': ('embed',)}
  sizes = dict(embed=8, heads=2, head_dim=4, layers=3, mlp=32, vocab=5)
  rng = np.random.default_rng(0)
  draw = lambda: trees.unflatten({p: jnp.asarray(rng.standard_normal([sizes.get(a, 6) for a in axes]), jnp.float32)
                                  for p, axes in shapes.items()})
  tx = optim.make(_optim(name='muon', lr=1.0, schedule='constant', weight_decay=0.0, clip_norm=0.0), shapes)
  params = draw()
  moved = trees.flatten(jax.tree.map(jnp.subtract, params, _run(tx, params, draw(), updates=1)))
  singular = lambda x: np.linalg.svd(np.asarray(x), compute_uv=False)
  # Five Newton-Schulz steps bring singular values to between about 0.7 and 1.2, but for the smallest ones.
  for matrix in (moved['query/kernel'].reshape(8, 8), moved['out/kernel'].reshape(8, 8), *moved['up/kernel'] / 2):
    assert singular(matrix).max() < 1.25 and np.median(singular(matrix)) > 0.7  # 2 = sqrt(outputs / inputs) of up
  for path in ('query/bias', 'embed/embedding', 'position_embed/embedding', 'norm/scale'):
    np.testing.assert_allclose(np.abs(moved[path]), 1, rtol=0.02)  # Adam's first step is the sign


# ---- rules -------------------------------------------------------------------------------------------------------


def test_weight_decay_reaches_kernels_and_embeddings_and_nothing_else(stacked):
  _, params, _, axes = stacked
  ones = jax.tree.map(jnp.ones_like, params)
  tx = optim.make(_optim(name='sgd', lr=0.5, schedule='constant', weight_decay=0.1, clip_norm=0.0), axes)
  after = trees.flatten(_run(tx, ones, jax.tree.map(jnp.zeros_like, ones), updates=1))
  for path, x in after.items():
    decays = path.endswith(('kernel', 'embedding'))
    np.testing.assert_allclose(x, 0.95 if decays else 1.0, err_msg=path)
  assert {p.rpartition('/')[2] for p in after} == {'kernel', 'embedding', 'bias', 'scale'}


def test_decay_rules_multiply_and_the_first_match_wins(stacked):
  _, params, _, axes = stacked
  ones = jax.tree.map(jnp.ones_like, params)
  rules = (('embed/.*', 0.5), ('.*/kernel', 2.0), ('.*embed.*', 7.0), ('.*', 0.0))
  given = _optim(name='sgd', lr=1.0, schedule='constant', weight_decay=0.1, decay_rules=rules, clip_norm=0.0)
  tx = optim.make(given, axes)
  after = trees.flatten(_run(tx, ones, jax.tree.map(jnp.zeros_like, ones), updates=1))
  for path, x in after.items():
    times = 0.5 if path.startswith('embed/') else 2.0 if path.endswith('kernel') else 7.0 if 'embed' in path else 0.0
    np.testing.assert_allclose(x, 1 - 0.1 * times, rtol=1e-6, err_msg=path)


def test_layers_nearer_the_input_take_smaller_steps(stacked):
  config, params, _, axes = stacked
  zeros = jax.tree.map(jnp.zeros_like, params)
  given = _optim(name='sgd', lr=1.0, schedule='constant', weight_decay=0.0, clip_norm=0.0, layer_decay=0.5)
  given.sgd.momentum = 0.0
  tx = optim.make(given, axes, depths=depths(params, config))
  after = unstack(_run(tx, zeros, jax.tree.map(jnp.ones_like, params), updates=1), config)
  for path, x in trees.flatten(after).items():
    layer = re.match(r'stack/layer_(\d+)/', path)
    depth = int(layer[1]) + 1 if layer else 0 if 'embed' in path else config.num_layers + 1
    np.testing.assert_allclose(x, -0.5 ** (config.num_layers + 1 - depth), rtol=1e-6, err_msg=path)


def test_rate_rules_multiply_the_rate():
  params, grads, axes = _small()
  plain = optim.make(_optim(lr=0.1, schedule='constant'), axes)
  ruled = optim.make(_optim(lr=0.1, schedule='constant', lr_rules=(('.*/bias', 0.25), ('.*', 1.0))), axes)
  moved = [jax.tree.map(jnp.subtract, _run(tx, params, grads, updates=1), params)['a'] for tx in (plain, ruled)]
  np.testing.assert_allclose(moved[1]['kernel'], moved[0]['kernel'], rtol=1e-5)
  np.testing.assert_allclose(moved[1]['bias'], 0.25 * moved[0]['bias'], rtol=1e-4)


@pytest.mark.parametrize('rules', ['decay_rules', 'lr_rules'])
def test_a_parameter_without_a_rule_is_named(rules):
  params, _, axes = _small()
  tx = optim.make(_optim(**{rules: (('.*/kernel', 0.5),)}), axes)
  with pytest.raises(JaxlmError, match="No rule matches 'a/bias'"):
    tx.init(params)


def test_the_whole_gradient_is_clipped_before_anything_else():
  params, grads, axes = _small()
  tx = optim.make(_optim(name='sgd', lr=1.0, schedule='constant', weight_decay=0.0, clip_norm=0.5), axes)
  moved = jax.tree.map(jnp.subtract, params, _run(tx, params, grads, updates=1))
  assert float(optax.global_norm(moved)) == pytest.approx(0.5, rel=1e-5)
  small = jax.tree.map(lambda g: g * 1e-3, grads)
  np.testing.assert_allclose(jax.tree.map(jnp.subtract, params, _run(tx, params, small, updates=1))['a']['kernel'],
                             small['a']['kernel'], atol=1e-6)


def test_a_norm_that_is_known_clips_as_one_that_is_taken_does():
  axes, params = {'w': (None,)}, {'w': jnp.zeros(4)}
  tx = optim.make(_optim(name='sgd', lr=1.0, schedule='constant', weight_decay=0.0, clip_norm=0.5), axes)
  grads = {'w': jnp.asarray([3.0, 0.0, 4.0, 0.0])}
  update = lambda **known: tx.update(grads, tx.init(params), params, **known)[0]['w']
  np.testing.assert_allclose(update(norm=jnp.float32(5.0)), update(), rtol=1e-6)
  np.testing.assert_allclose(update(norm=jnp.float32(10.0)), update() / 2, rtol=1e-6)
  np.testing.assert_allclose(optim.global_norm(grads), optax.global_norm(grads), rtol=1e-6)


def test_an_unknown_optimizer_names_the_known_ones():
  with pytest.raises(JaxlmError, match="Unknown optimizer 'adamv'.* Did you mean 'adamw'"):
    optim.make(_optim(name='adamv'), {})


# ---- through the step --------------------------------------------------------------------------------------------


def _steps(config, updates=3):
  """(state before, frozen, state after, metrics) with a loss that pulls every parameter to 0.3."""
  model = train.build_model(config, 257, 'causal', Layout(sharding.make_mesh({}, jax.devices()[:1]),
                                                          tuple(config.sharding.rules)))
  shapes = train.init_state(model, config)
  state, frozen = shapes.fresh(0)
  before, frozen_before = jax.device_get((state, frozen))

  def loss(params, batch, rng):
    total = sum(jnp.square(p - 0.3).sum() for p in jax.tree.leaves(params))
    return total, {name: (total, jnp.float32(1)) for name in ('objective', 'loss')}

  step = train.make_step(loss, shapes, config)
  for _ in range(updates):
    state, metrics = step(state, frozen, {'tokens': jnp.zeros((8, 4), jnp.int32)})
  jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
  return before, frozen_before, jax.device_get(state), metrics


def test_frozen_parameters_keep_every_bit_and_cost_no_state(tiny):
  tiny.optim.update(freeze=('.*embed.*', 'stack/.*/attention/.*'), lr=0.1, schedule='constant', ema_decay=0.5)
  before, frozen, after, _ = _steps(tiny)
  assert {p.split('/')[0] for p in trees.flatten(frozen)} == {'embed', 'position_embed', 'stack'}
  assert not set(trees.flatten(frozen)) & set(trees.flatten(after.params))
  assert not any('embed' in p or '/attention/' in p for p in trees.flatten((after.opt_state, after.ema)))
  for (path, a), b in zip(trees.flatten(after.params).items(), jax.tree.leaves(before.params)):
    assert (a != b).any(), path


def test_the_average_follows_the_parameters(tiny):
  tiny.optim.update(lr=0.1, schedule='constant', ema_decay=0.75)
  before, _, after, _ = _steps(tiny, updates=1)
  want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before.params, after.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema, want)
  jax.tree.map(np.testing.assert_array_equal, before.ema, before.params)


def test_the_rate_told_is_the_rate_used(tiny):
  tiny.optim.update(name='sgd', lr=0.5, schedule='constant', warmup_steps=3, clip_norm=0.0, weight_decay=0.0)
  tiny.optim.sgd.momentum = 0.0
  before, _, after, metrics = _steps(tiny, updates=1)
  assert float(metrics['train/lr']) == pytest.approx(0.125)
  want = jax.tree.map(lambda p: p - 0.125 * 2 * (p - 0.3), before.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, want)
