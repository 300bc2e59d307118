"""Activations times weights."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.products import OF_ONE, of_one, product


@pytest.mark.parametrize('lead', [(6,), (2, 3)])
def test_gradients_of_a_product_are_those_of_the_plain_one(lead, model_of):
  rng = np.random.default_rng(0)
  x, kernel, bias, weight = (jnp.asarray(rng.standard_normal(s), jnp.float32)
                             for s in ((*lead, 8), (8, 2, 5), (2, 5), (*lead, 10)))
  layout, axes = model_of().layout, ('embed', 'heads', 'head_dim')
  of = lambda f: jax.grad(lambda *args: (f(*args) * weight).sum(), (0, 1, 2))(x, kernel, bias)
  got = of(lambda *args: product(layout, axes, False, *args))
  want = of(lambda x, kernel, bias: x @ kernel.reshape(8, 10) + bias.reshape(10))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_kernel_outputs_first_multiplies_as_it_did(dtype, model_of):
  rng = np.random.default_rng(0)
  x, kernel, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32).astype(dtype) for s in ((1, 3, 8), (8, 10), (10,)))
  got = jax.jit(of_one, compiler_options=OF_ONE)(x, kernel.T, bias)
  want = product(model_of().layout, ('embed', 'mlp'), False, x, kernel, bias)
  assert got.dtype == want.dtype
  np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, want)), atol=1e-5 if dtype == 'float32' else 0.1)


def _rounded(x, dtype):
  """x as 8 bits of which the largest element takes the largest number give it back: float64."""
  factor = np.abs(x).max() / float(jnp.finfo(dtype).max) or 1.0
  return np.asarray(jnp.asarray(x / factor).astype(dtype), np.float64) * factor


def test_a_product_in_8_bits_rounds_what_it_multiplies_and_nothing_else(model_of):
  rng = np.random.default_rng(0)
  x, kernel, dy = (rng.standard_normal(s).astype(np.float32) * scale
                   for s, scale in (((2, 3, 8), 1e3), ((8, 10), 1e-4), ((2, 3, 10), 1e-6)))
  x[0, 0] = 0
  layout, axes = model_of().layout, ('embed', 'mlp')
  y, back = jax.vjp(lambda x, kernel: product(layout, axes, True, x, kernel, None), x, kernel)
  fine, wide = jnp.float8_e4m3fn, jnp.float8_e5m2
  x8, kernel8, dy8 = _rounded(x, fine), _rounded(kernel, fine), _rounded(dy, wide)
  dx, dkernel = back(jnp.asarray(dy))
  for got, want in ((y, x8 @ kernel8), (dx, dy8 @ kernel8.T), (dkernel, np.einsum('bti,bto->io', x8, dy8))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
  assert np.abs(y - x @ kernel).max() < 0.05 * np.abs(x @ kernel).max()  # 3 bits after the first
  zero = product(layout, axes, True, jnp.zeros((2, 8)), jnp.asarray(kernel), None)
  np.testing.assert_array_equal(zero, np.zeros((2, 10)))
