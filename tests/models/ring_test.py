"""Attention over devices is attention: lengths, heads and rows split over a mesh, every kernel, every visibility."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import sharding
from jaxlm.errors import JaxlmError
from jaxlm.models import kernels, ring
from jaxlm.models.kernels import Bias, UnsupportedAttention, Visibility
from jaxlm.models.positions import alibi_bias

B, T, N, H = 4, 32, 8, 4
TOLERANCE = 5e-6  # float32 sums in another order, relative to the largest entry; measured max 8e-7
RULES = tuple(base.default().sharding.rules)


def layout_of(rules=RULES, **mesh):
  return sharding.Layout(sharding.make_mesh(mesh), rules)


def tokens(name):
  """(order, segment, position) [B, T] of different rows, and the mode."""
  rng, columns = np.random.default_rng(3), np.arange(T, dtype=np.int32)
  rows = lambda make: np.stack([make(i) for i in range(B)]).astype(np.int32)
  cuts = [sorted(rng.choice(np.arange(1, T), 3, replace=False)) for _ in range(B)]
  segment = rows(lambda i: np.where(columns < T - i, 1 + np.searchsorted(cuts[i], columns, side='right'), 0))
  start = rows(lambda i: np.maximum.accumulate(np.where(np.isin(columns, [0, *cuts[i]]), columns, 0)))
  whole, count = rows(lambda i: 0 * columns + 1), rows(lambda i: columns)
  return {
      'causal': (count + 1, whole, count, 'causal'),
      'packed': (count + 1, segment, count - start, 'causal'),
      'prefix': (rows(lambda i: np.maximum(columns - 5 * i, 0)), whole, count, 'order'),
      'permutation': (rows(lambda i: np.where(rng.random(T) < 0.4, 0, rng.permutation(T) + 1)), segment, count - start,
                      'order'),
      'full': (0 * count, segment, count - start, 'full'),
  }[name]


def see(name, window=None, turn=lambda x: x):
  *integers, mode = tokens(name)
  order, segment, position = (turn(x) for x in integers)
  return Visibility(order, order, segment, segment, position, position, window, mode=mode)


def drawn(K):
  rng = np.random.default_rng(0)
  draw = lambda heads: rng.standard_normal((B, T, heads, H)).astype(np.float32)
  return draw(N), draw(K), draw(K), draw(N), rng.standard_normal(N).astype(np.float32)


def both(layout, kernel, v, x, softcap=0.0, biased=False, sink=False):
  """(gradients, output) under a layout, and those of `dense` on one device."""
  q, k, v_, grad, sink_N = x
  slopes_N = np.linspace(0.1, 0.8, N, dtype=np.float32)

  def loss(of, q, k, v_, slopes_N, sink_N, v):
    bias = Bias(alibi_bias, slopes_N, (('act_heads',),)) if biased else None
    out = of(q, k, v_, v, scale=0.5, softcap=softcap, bias=bias, sink_N=sink_N if sink else None, dropout=None, block=4)
    return (out * grad).sum(), out

  run = lambda of: jax.jit(jax.grad(functools.partial(loss, of), argnums=(0, 1, 2, 3, 4), has_aux=True))(
      q, k, v_, slopes_N, sink_N, v)
  return run(functools.partial(ring.attend, layout, kernel)), run(kernels.dense)


def assert_same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=TOLERANCE * max(1.0, float(np.abs(b).max())), rtol=0)


MESHES = {'seq=8': dict(seq=8), 'seq=2 × tensor=2 × fsdp=2': dict(seq=2, tensor=2, fsdp=2)}


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('name', ['causal', 'packed', 'prefix', 'permutation', 'full'])
def test_a_ring_is_dense_attention(mesh, name):
  assert_same(*both(layout_of(**MESHES[mesh]), 'ring', see(name), drawn(4)))


@pytest.mark.parametrize('kernel', ['dense', 'blockwise', 'ring'])
def test_windows_caps_biases_and_sinks_are_those_of_dense_attention(kernel):
  v = see('packed', window=jnp.int32(7))
  assert_same(*both(layout_of(seq=2, tensor=2, fsdp=2), kernel, v, drawn(2), softcap=3.0, biased=True, sink=True))


@pytest.mark.parametrize('kernel', ['dense', 'blockwise'])
def test_gathered_keys_give_dense_attention(kernel):
  assert_same(*both(layout_of(seq=4, fsdp=2), kernel, see('permutation'), drawn(4)))


@pytest.mark.parametrize('K, tensor', [(1, 2), (2, 4), (2, 2), (8, 4)])
def test_key_heads_that_are_not_split_are_found_by_their_query_heads(K, tensor):
  rules = tuple((axis, None if axis == 'kv_heads' else to) for axis, to in RULES)
  assert_same(*both(layout_of(rules, tensor=tensor, fsdp=8 // tensor), 'blockwise', see('packed'), drawn(K)))


def test_balanced_columns_give_the_same_answers_in_another_place():
  turned = ring.balanced({'tokens': np.zeros((B, T), np.int32)}, 8)['slots'][0]
  turn = lambda x: x[:, turned]
  x = *(turn(y) for y in drawn(4)[:4]), drawn(4)[4]
  (found, out), _ = both(layout_of(seq=8), 'ring', see('packed', turn=turn), x)
  _, (expected, dense) = both(layout_of(seq=8), 'ring', see('packed'), drawn(4))
  assert_same((out, found[:3]), (turn(dense), [turn(x) for x in expected[:3]]))


def test_balanced_columns_share_causal_work_evenly():
  """Half-stretches of keys that the busiest device visits: 2n + 1 of its 4n, where in order it would be 4n - 1."""
  n = 8
  slots = ring.balanced({'tokens': np.zeros((1, 2 * n), np.int32)}, n)['slots'][0]
  work = [sum(slots[j] <= slots[i] for i in (2 * d, 2 * d + 1) for j in range(2 * n)) for d in range(n)]
  assert set(work) == {2 * n + 1}


def test_balanced_turns_every_array_of_columns_but_a_source():
  batch = {'tokens': np.arange(16).reshape(2, 8), 'future_targets': np.arange(32).reshape(2, 8, 2),
           'source_tokens': np.arange(16).reshape(2, 8), 'example_ids': np.arange(2)}
  found = ring.balanced(batch, 2)
  assert found['slots'].tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]] * 2
  assert (found['tokens'] == batch['tokens'][:, [0, 1, 6, 7, 2, 3, 4, 5]]).all()
  assert (found['future_targets'] == batch['future_targets'][:, [0, 1, 6, 7, 2, 3, 4, 5]]).all()
  assert (found['source_tokens'] == batch['source_tokens']).all() and (found['example_ids'] == [0, 1]).all()


def test_dropped_probabilities_are_refused_where_lengths_are_split():
  q, k, v_, _, _ = drawn(4)
  with pytest.raises(UnsupportedAttention, match='cannot be dropped where lengths are split over seq; set config'):
    ring.attend(layout_of(seq=8), 'dense', q, k, v_, see('causal'), scale=1.0, softcap=0.0, bias=None, sink_N=None,
                dropout=lambda p: p, block=4)


def test_lengths_that_do_not_divide_say_what_to_set():
  q, k, v_, _, _ = (x[:, :30] if x.ndim > 1 else x for x in drawn(4))
  told = r'dim 1 \(act_length=30\) does not divide by mesh axis seq=8; set config.seq_len'
  with pytest.raises(JaxlmError, match=told):
    ring.attend(layout_of(seq=8), 'ring', q, k, v_, see('causal', turn=lambda x: x[:, :30]), scale=1.0, softcap=0.0,
                bias=None, sink_N=None, dropout=None, block=4)
