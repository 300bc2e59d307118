"""The parts of a block."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.layers import (ACTIVATIONS, Dense, Embedding, Mlp, Norm, dropout, example_keys, fold, normed,
                                 softcap)


def _apply(module, params, x):
  return module.apply({'params': params}, x)


def _initial(module, x, seed=0):
  boxed = module.init(jax.random.key(seed), x)['params']
  return jax.tree.map(lambda p: p.value, boxed, is_leaf=lambda p: hasattr(p, 'names'))


@pytest.mark.parametrize('kind', ['layernorm', 'rmsnorm'])
def test_norms_compute_in_float32_whatever_comes_in(kind, model_of):
  config = model_of(compute_dtype='bfloat16', norm=dict(kind=kind)).config
  x = (100 + np.random.default_rng(0).standard_normal((2, 3, 32))).astype(jnp.bfloat16)
  scale, bias = np.linspace(0.5, 1.5, 32), np.linspace(-1, 1, 32)
  y = _apply(Norm(config), dict(scale=scale, bias=bias), x)
  assert y.dtype == jnp.bfloat16
  x = np.asarray(x, np.float64)
  if kind == 'layernorm':
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
  else:
    want = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * scale
  np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=2e-2)  # the result has bfloat16's 8 bits


@pytest.mark.parametrize('centred', [True, False])
@pytest.mark.parametrize('dims', [1, 2])
def test_gradients_of_a_norm_are_those_of_its_formula(centred, dims):
  rng = np.random.default_rng(0)
  x, scale, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 4, 8), (4, 8)[2 - dims:],
                                                                               (4, 8)[2 - dims:]))
  weight = rng.standard_normal(x.shape)
  def plain(x, scale, bias):
    over = tuple(range(-dims, 0))
    y = x - x.mean(over, keepdims=True) if centred else x
    return y / jnp.sqrt((y ** 2).mean(over, keepdims=True) + 1e-5) * scale + bias
  of = lambda f: jax.grad(lambda *args: (f(*args) * weight).sum(), (0, 1, 2))(x, scale, bias)
  for got, want in zip(of(lambda *args: normed(centred, dims, 1e-5, *args)), of(plain), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


PLAIN = {'gelu': lambda x: jax.nn.gelu(x, approximate=False), 'gelu_tanh': jax.nn.gelu, 'relu': jax.nn.relu,
         'relu2': lambda x: jax.nn.relu(x) ** 2, 'silu': jax.nn.silu, 'tanh': jnp.tanh}


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_slopes_of_activations_are_those_of_their_formulas_and_keep_the_argument_alone(name):
  x = jnp.linspace(-4, 4, 101)
  slope = lambda f: jax.vmap(jax.grad(f))(x)
  np.testing.assert_allclose(slope(ACTIVATIONS[name]), slope(PLAIN[name]), atol=1e-6)
  kept = jax.tree.leaves(jax.vjp(ACTIVATIONS[name], x)[1])
  assert [k.shape for k in kept] == [x.shape] and (kept[0] == x).all()


def test_a_constant_row_is_normed_to_the_bias(model_of):
  y = _apply(Norm(model_of().config), dict(scale=np.ones(32, np.float32), bias=np.full(32, 3.0, np.float32)),
             jnp.full((1, 32), 1e4))
  np.testing.assert_array_equal(y, np.full((1, 32), 3.0))


def test_dense_contracts_and_makes_several_dims(model_of):
  rng = np.random.default_rng(0)
  x, kernel, bias = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4, 8), (4, 8, 32), (32,)))
  config, layout = model_of().config, model_of().layout
  out = Dense(config, layout, (32,), ('heads', 'head_dim', 'embed'), num_inputs=2)
  want = np.einsum('btnh,nhd->btd', x, kernel) + bias
  np.testing.assert_allclose(_apply(out, dict(kernel=kernel, bias=bias), x), want, atol=1e-5)
  into = Dense(config, layout, (4, 8), ('embed', 'heads', 'head_dim'), bias=False)
  kernel = kernel.transpose(2, 0, 1)
  back = np.einsum('btd,dnh->btnh', want, kernel)
  np.testing.assert_allclose(_apply(into, dict(kernel=kernel), want), back, atol=1e-4)


def test_initial_scales_are_the_configs_and_shrink_with_depth_where_said(model_of):
  model = model_of(num_layers=8, init=dict(std=0.5, embedding_std=0.1))
  x = jnp.zeros((1, 1, 64))
  std = lambda module, x: float(jnp.std(jax.tree.leaves(_initial(module, x))[-1]))
  dense = lambda config, **more: Dense(config, model_of().layout, (256,), ('mlp', 'embed'), bias=False, **more)
  assert std(dense(model.config), x) == pytest.approx(0.5, rel=0.03)
  assert std(dense(model.config, residual=True), x) == pytest.approx(0.5 / 4, rel=0.03)
  flat = model_of(num_layers=8, init=dict(std=0.5, scale_by_depth=False)).config
  assert std(dense(flat, residual=True), x) == pytest.approx(0.5, rel=0.03)
  table = Embedding(model.config, model.layout, 512, 32, ('vocab', 'embed'))
  assert std(table, jnp.zeros((1, 1), jnp.int32)) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize('gated', [False, True])
def test_a_gate_multiplies(gated, model_of):
  config = model_of(mlp=dict(gated=gated, activation='relu', bias=False)).config
  mlp = Mlp(config, model_of().layout)
  x = jax.random.normal(jax.random.key(0), (1, 3, 32))
  params = _initial(mlp, x)
  assert set(params) == {'up', 'down'} | ({'gate'} if gated else set())
  h = {name: np.asarray(x, np.float64) @ p['kernel'] for name, p in params.items() if name != 'down'}
  h = np.maximum(h['gate'], 0) * h['up'] if gated else np.maximum(h['up'], 0)
  np.testing.assert_allclose(_apply(mlp, params, x), h @ np.asarray(params['down']['kernel'], np.float64), atol=1e-6)


def test_an_activation_of_ones_own_is_called(model_of):
  x, own = jnp.ones((1, 1, 32)), Mlp(model_of(mlp=dict(activation='jax.numpy:sin')).config, model_of().layout)
  params = _initial(own, x)
  params['up']['bias'] += 1.0
  want = jnp.sin(x @ params['up']['kernel'] + 1.0) @ params['down']['kernel']
  np.testing.assert_allclose(_apply(own, params, x), want, atol=1e-6)


def test_activations_have_their_known_values():
  known = {'gelu': 0.8413447, 'gelu_tanh': 0.8411920, 'relu': 1.0, 'relu2': 1.0, 'silu': 0.7310586, 'tanh': 0.7615942}
  assert set(known) == set(ACTIVATIONS)
  for name, value in known.items():
    assert float(ACTIVATIONS[name](jnp.float32(1.0))) == pytest.approx(value, abs=1e-6), name
  assert float(ACTIVATIONS['relu2'](jnp.float32(-3.0))) == 0 and float(ACTIVATIONS['relu2'](jnp.float32(3.0))) == 9


def test_a_softcap_bounds_and_is_nothing_at_zero():
  x = jnp.array([-1e6, -0.01, 0.01, 1e6])
  assert softcap(x, 0.0) is x
  np.testing.assert_allclose(softcap(x, 30.0), [-30, -0.01, 0.01, 30], rtol=1e-6)


# ---- dropout -----------------------------------------------------------------------------------------------------


def _mask(rng=0, ids=(0, 1, 2, 3), layer=0, site=1, rate=0.25, shape=(64, 32)):
  keys_B = fold(example_keys(jax.random.key(rng), jnp.array(ids)), layer)
  return np.asarray(dropout(jnp.ones((len(ids), *shape)), rate, keys_B, site))


def test_dropout_keeps_the_mean_and_scales_what_is_left():
  kept = _mask(ids=range(16))
  assert set(np.unique(kept)) == {0, np.float32(1 / 0.75)}
  assert kept.mean() == pytest.approx(1.0, abs=0.02)  # 32,768 draws: a standard error of 0.003


def test_masks_differ_by_step_example_layer_and_site_and_by_nothing_else():
  first = _mask()
  assert not any((first == other).all() for other in (_mask(rng=1), _mask(layer=1), _mask(site=2)))
  assert len({row.tobytes() for row in first}) == 4
  np.testing.assert_array_equal(_mask(ids=(3, 1)), first[[3, 1]])
  np.testing.assert_array_equal(_mask(layer=jnp.int32(0)), first)  # a scanned layer's number is traced


def test_no_keys_or_no_rate_drop_nothing():
  x = jnp.ones((2, 3))
  assert dropout(x, 0.5, None, 0) is x and dropout(x, 0.0, example_keys(jax.random.key(0), jnp.arange(2)), 0) is x


def test_dropout_keeps_half_precision():
  keys_B = example_keys(jax.random.key(0), jnp.arange(2))
  assert dropout(jnp.ones((2, 3), jnp.bfloat16), 0.5, keys_B, 0).dtype == jnp.bfloat16
