"""The cuDNN kernel's surroundings, with XLA's own attention in its place; what it refuses; which kernel fits."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import cudnn, kernels, ring
from jaxlm.models.kernels import Bias, Visibility

B, T, N, K, H = 2, 16, 4, 2, 8
COLUMNS = np.arange(T, dtype=np.int32)


def visibility(segments=(1,) * T, window=None, mode='causal', in_order=True):
  segments_BT = np.broadcast_to(np.asarray(segments, np.int32), (B, T))
  positions_BT = np.broadcast_to(COLUMNS, (B, T))
  return Visibility(positions_BT + 1, positions_BT + 1, segments_BT, segments_BT, positions_BT, positions_BT, window,
                    mode, in_order)


def arrays(dtype=np.float32):
  rng = np.random.default_rng(0)
  return [rng.standard_normal((B, T, heads, H)).astype(dtype) for heads in (N, K, K)]


@pytest.mark.parametrize('given', [
    visibility(), visibility([1] * 5 + [2] * 8 + [0] * 3), visibility(window=4),
    visibility(mode='full', in_order=False),
    visibility([1] * 10 + [0] * 6, mode='full', in_order=False)])
def test_it_sees_what_dense_sees_and_nothing_gives_zeros(given, monkeypatch):
  monkeypatch.setattr(cudnn, 'IMPLEMENTATION', 'xla')
  monkeypatch.setattr(cudnn, 'refuses', lambda *_: '')  # of float32

  def run(kernel):
    loss = lambda q, k, v: jnp.sin(kernel(q, k, v, given, scale=0.3)).sum()
    return kernel(*arrays(), given, scale=0.3), jax.grad(loss, (0, 1, 2))(*arrays())

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), run(cudnn.cudnn), run(kernels.dense))


@pytest.mark.parametrize('changes, told', [
    (dict(softcap=30.0),
     'has no softcap, sink, bias or dropout of probabilities; set config.model.attention.kernel=blockwise'),
    (dict(sink_N=jnp.zeros(N)), 'has no softcap'),
    (dict(dropout=lambda x: x), 'has no softcap'),
    (dict(bias=Bias(lambda params, q, k: 0.0)), 'has no softcap'),
    (dict(dtype=np.float32), 'multiplies bfloat16 or float16, not float32; set config.precision.compute=bfloat16'),
    (dict(odd=True), 'takes rows of even length, not 15 and 15'),
])
def test_what_it_cannot_do_exactly_it_refuses_in_a_line(changes, told):
  dtype, odd = changes.pop('dtype', jnp.bfloat16), changes.pop('odd', False)
  q, k, v = (x[:, :T - odd] for x in arrays(dtype))
  with pytest.raises(kernels.UnsupportedAttention, match=f'Attention kernel cudnn {told}'):
    cudnn.cudnn(q, k, v, visibility(), scale=0.3, **changes)


@pytest.mark.parametrize('platform, dtype, split, length, changes, name', [
    ('cpu', np.float32, False, 1024, {}, 'dense'),
    ('cpu', np.float32, False, 2048, {}, 'blockwise'),
    ('gpu', jnp.bfloat16, False, 128, {}, 'cudnn'),
    ('gpu', np.float32, False, 4096, {}, 'blockwise'),
    ('gpu', jnp.bfloat16, False, 4096, dict(softcap=30.0), 'blockwise'),
    ('gpu', jnp.bfloat16, True, 4096, {}, 'ring'),
    ('gpu', jnp.bfloat16, False, 4096, dict(dropout=lambda x: x), 'dense'),
    ('tpu', jnp.bfloat16, False, 4096, dict(bias=Bias(lambda *_: 0.0, whole=True)), 'dense'),
])
def test_the_kernel_that_fits_is_the_fastest_that_is_exact(platform, dtype, split, length, changes, name):
  q, k = (jax.ShapeDtypeStruct((1, length, heads, 64), dtype) for heads in (N, K))
  given = dict(softcap=0.0, bias=None, sink_N=None, dropout=None) | changes
  assert ring.fitting(platform, split, q, k, k, **given) == name
