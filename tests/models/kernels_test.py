"""Who sees whom, and that every kernel computes it: against a float64 reference written from the rule alone."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.models import blocks, kernels
from jaxlm.models.kernels import Bias, Visibility
from jaxlm.models.ring import KERNELS

B, T, N, H = 2, 13, 4, 4
SCALE, BLOCK = 0.7, 4
# float32 against float64, relative to the largest entry; measured max 2e-7 on outputs and 5e-7 on gradients.
TOLERANCE = 5e-6


def one_document(order_T, segments=None, positions=None):
  """Arrays of a self-attention whose two rows hold the same; segments default to one, positions to 0, 1, …"""
  integers = lambda x: np.tile(np.asarray(x, np.int32), (B, 1))
  length = len(order_T)
  order = integers(order_T)
  segment = integers(np.ones(length) if segments is None else segments)
  position = integers(np.arange(length) if positions is None else positions)
  return order, order, segment, segment, position, position


def scattered(T, S):
  """Random integers without any structure, and different in each row: no kernel may assume monotone arrays."""
  rng = np.random.default_rng(5)
  draw = lambda high, length: rng.integers(0, high, (B, length)).astype(np.int32)
  return draw(6, T), draw(6, S), draw(3, T), draw(3, S), draw(9, T), draw(9, S)


CAUSAL = 1 + np.arange(T)
PACKED = (1,) * 5 + (2,) * 6 + (0,) * 2                        # two documents, then padding
RESTART = (0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0)
PREFIX = (0,) * 6 + tuple(range(1, 8))
INFILLING = (0, 0, 1, 2, 3, 0, 0, 4, 5, 0, 6, 7, 0)            # spans produced among context
PERMUTATION = (0, 0, 9, 3, 1, 0, 5, 2, 8, 4, 7, 6, 0)          # rank + 1 on targets, context 0

# name: visibility, num_kv_heads, softcap, whether biased. Cases that differ in integers alone share a compilation.
CASES = {
    'causal': (Visibility(*one_document(CAUSAL)), 4, 0.0, False),
    'causal, packed, static window': (Visibility(*one_document(CAUSAL, PACKED, RESTART), window=3), 2, 0.0, False),
    'causal, traced window': (Visibility(*one_document(CAUSAL), window=jnp.int32(2)), 1, 0.0, False),
    'causal, traced window without limit':
        (Visibility(*one_document(CAUSAL), window=jnp.int32(kernels.NO_WINDOW)), 1, 0.0, False),
    'prefix': (Visibility(*one_document(PREFIX), mode='order'), 2, 0.0, False),
    'infilling': (Visibility(*one_document(INFILLING), mode='order'), 2, 0.0, False),
    'permutation': (Visibility(*one_document(PERMUTATION), mode='order'), 2, 0.0, False),
    'permutation, query stream': (Visibility(one_document(np.maximum(PERMUTATION, 1) - 1)[0],
                                             *one_document(PERMUTATION)[1:], mode='order'), 2, 0.0, False),
    'full, packed': (Visibility(*one_document(np.zeros(T), PACKED, RESTART), mode='full'), 4, 0.0, False),
    'full, traced window': (Visibility(*one_document(np.zeros(T)), window=jnp.int32(3), mode='full'), 2, 3.0, True),
    'scattered': (Visibility(*scattered(7, T), window=4, mode='order'), 2, 3.0, True),
    'scattered, full': (Visibility(*scattered(T, 6), window=4, mode='full'), 2, 0.0, False),
    'a token against a cache': (Visibility(*scattered(1, T), mode='order'), 2, 0.0, False),
}


def brute_force(v):
  """The rule of DESIGN section 1, one pair at a time."""
  window = float('inf') if v.window is None else int(v.window)

  def sees(b, t, s):
    order_q, order_k = v.order_q_BT[b, t], v.order_k_BS[b, s]
    back = int(v.position_q_BT[b, t]) - int(v.position_k_BS[b, s])
    ordered = v.mode == 'full' or order_k <= order_q
    together = v.segment_q_BT[b, t] == v.segment_k_BS[b, s] != 0
    return ordered and together and (abs(back) if v.mode == 'full' else back) < window

  length_q, length_k = v.order_q_BT.shape[1], v.order_k_BS.shape[1]
  return np.array([[[sees(b, t, s) for s in range(length_k)] for t in range(length_q)] for b in range(B)])


def distance(v):
  return np.abs(v.position_q_BT[:, :, None] - v.position_k_BS[:, None, :]).astype(np.float64)


SLOPES_N = 0.1 * (1 + jnp.arange(N, dtype=jnp.float32))


def alibi(slopes_N, position_q_BT, position_k_BS):
  return -slopes_N[:, None, None] * jnp.abs(position_q_BT[:, None, :, None] - position_k_BS[:, None, None, :])


def arrays(v, num_kv_heads):
  """Queries, keys, values, and the gradient that comes down to the output."""
  rng = np.random.default_rng(7)
  q, k = v.order_q_BT.shape[1], v.order_k_BS.shape[1]
  return [rng.standard_normal(shape).astype(np.float32)
          for shape in ((B, q, N, H), (B, k, num_kv_heads, H), (B, k, num_kv_heads, H), (B, q, N, H))]


def reference(v, q, k, v_, grad, softcap, biased):
  """Output and gradients of (q, k, v, slopes) in float64 NumPy."""
  q, k, v_, grad = (x.astype(np.float64) for x in (q, k, v_, grad))
  G = N // k.shape[2]
  k, v_ = np.repeat(k, G, axis=2), np.repeat(v_, G, axis=2)
  score = SCALE * np.einsum('BTNH,BSNH->BNTS', q, k)
  slope = np.ones_like(score)
  if softcap:
    score, slope = softcap * np.tanh(score / softcap), 1 - np.tanh(score / softcap) ** 2
  away = distance(v)[:, None]
  if biased:
    score = score - np.asarray(SLOPES_N, np.float64)[:, None, None] * away
  weight = np.exp(score) * brute_force(v)[:, None]
  prob = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
  out = np.einsum('BNTS,BSNH->BTNH', prob, v_)
  dprob = np.einsum('BTNH,BSNH->BNTS', grad, v_)
  dscore = prob * (dprob - (prob * dprob).sum(-1, keepdims=True))
  ddot = SCALE * slope * dscore
  by_kv_head = lambda x: x.reshape(*x.shape[:2], -1, G, H).sum(3)
  return out, (np.einsum('BNTS,BSNH->BTNH', ddot, k), by_kv_head(np.einsum('BNTS,BTNH->BSNH', ddot, q)),
               by_kv_head(np.einsum('BNTS,BTNH->BSNH', prob, grad)), -(dscore * away).sum((0, 2, 3)) * biased)


def output_and_gradients(kernel, v, q, k, v_, grad, softcap=0.0, biased=False, block=BLOCK):
  def loss(q, k, v_, slopes_N):
    out = kernel(q, k, v_, v, scale=SCALE, softcap=softcap, bias=Bias(alibi, slopes_N) if biased else None, block=block)
    return (out.astype(jnp.float32) * grad).sum(), out

  gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v_, SLOPES_N)
  return out, gradients


@functools.partial(jax.jit, static_argnames=('window', 'softcap', 'biased'))
def of_all_kernels(v, *x, window, softcap, biased):
  v = v.replace(window=window) if window else v
  return {name: output_and_gradients(kernel, v, *x, softcap, biased) for name, kernel in KERNELS.items()
          if name != 'cudnn'}  # needs a GPU


def run_kernels(v, x, softcap=0.0, biased=False):
  """{kernel: (output, gradients)}; a window that is a Python int stays one."""
  static = v.window if isinstance(v.window, int) else None
  return of_all_kernels(v.replace(window=None) if static else v, *x, window=static, softcap=softcap, biased=biased)


def assert_close(got, wanted, tolerance=TOLERANCE):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=0,
                               atol=tolerance * max(1.0, np.abs(np.asarray(y, np.float64)).max()))


@pytest.mark.parametrize('case', CASES)
def test_visible_is_the_rule_pair_by_pair(case):
  v = CASES[case][0]
  np.testing.assert_array_equal(np.asarray(kernels.visible(v)), brute_force(v))


@pytest.mark.parametrize('case', CASES)
def test_every_kernel_equals_the_float64_reference_forward_and_backward(case):
  v, num_kv_heads, softcap, biased = CASES[case]
  x = arrays(v, num_kv_heads)
  for got in run_kernels(v, x, softcap, biased).values():
    assert_close(got, reference(v, *x, softcap, biased))


@pytest.mark.parametrize('pieces', [2, 3, 4])
@pytest.mark.parametrize('case', ['causal', 'causal, packed, static window', 'causal, traced window'])
def test_dense_in_pieces_that_see_no_later_column_equals_the_reference(case, pieces, monkeypatch):
  monkeypatch.setattr(kernels, 'PIECE', T // pieces)
  monkeypatch.setattr(kernels, 'MOST_PIECES', pieces)
  v, num_kv_heads, _, _ = CASES[case]
  x = arrays(v, num_kv_heads)
  # Softcap and bias, too: what is cut is all that a score depends on.
  run = lambda in_order: jax.jit(lambda *x: output_and_gradients(
      kernels.dense, v.replace(in_order=in_order), *x, softcap=3.0, biased=True))
  multiplied = lambda in_order: str(jax.make_jaxpr(run(in_order))(*x)).count('dot_general')
  assert multiplied(True) == pieces * multiplied(False)
  assert_close(run(True)(*x), reference(v, *x, 3.0, True))


def test_a_query_that_sees_nothing_returns_zeros_and_no_gradient():
  order, *rest = one_document(CAUSAL, PACKED, RESTART)
  v = Visibility(order - 1, *rest, mode='order')
  blind_BT = ~brute_force(v).any(-1)
  assert blind_BT[0, [0, 5, 11, 12]].all() and not blind_BT.all()
  for out, gradients in run_kernels(v, arrays(v, 2)).values():
    assert (np.asarray(out)[blind_BT] == 0).all() and (np.asarray(gradients[0])[blind_BT] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_unseen_tokens_have_exactly_zero_gradient():
  v = Visibility(*one_document(PERMUTATION, PACKED, RESTART), mode='order')
  seen_S = brute_force(v)[0, 8]
  assert seen_S.any() and not seen_S.all()
  q, k, v_, grad = arrays(v, 2)
  grad[:, np.arange(T) != 8] = 0
  for _, (dq, dk, dv, _) in run_kernels(v, (q, k, v_, grad)).values():
    reached = lambda x: np.abs(np.asarray(x)).sum((0, 2, 3)) > 0
    np.testing.assert_array_equal(reached(dk), seen_S)
    np.testing.assert_array_equal(reached(dv), seen_S)
    np.testing.assert_array_equal(reached(dq), np.arange(T) == 8)


def test_blockwise_meets_a_pair_of_blocks_wherever_a_token_sees_another():
  for v, *_ in CASES.values():
    v = v if v.window is None else v.replace(window=jnp.int32(v.window))
    length_q, length_k = v.order_q_BT.shape[1], v.order_k_BS.shape[1]
    meets_IJ = np.asarray(blocks.may_meet(v, *blocks.cut_sides(v, BLOCK)))
    size_q, size_k = (-(-length // -(-length // BLOCK)) for length in (length_q, length_k))
    for _, t, s in np.argwhere(brute_force(v)):
      assert meets_IJ[t // size_q, s // size_k]


def test_blockwise_skips_the_future_other_documents_and_what_lies_outside_the_window():
  length = 32
  meets = lambda v: np.asarray(blocks.may_meet(v, *blocks.cut_sides(v, 8))).astype(int).tolist()
  causal = Visibility(*one_document(1 + np.arange(length)))
  assert meets(causal) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
  assert meets(causal.replace(window=jnp.int32(9))) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
  packed = np.repeat([1, 2, 2, 0], 8)
  assert meets(Visibility(*one_document(np.zeros(length), packed), mode='full')) == [
      [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
  assert meets(Visibility(*one_document(np.zeros(length)), window=jnp.int32(2), mode='full')) == [
      [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_blockwise_runs_under_scan_over_windows_checkpoint_and_vmap():
  v = Visibility(*one_document(CAUSAL, PACKED, RESTART))
  x, _, _, grad = arrays(v, N)
  windows_L = jnp.array([3, kernels.NO_WINDOW, 2])

  def gradients(kernel):
    def layer(x, window):
      attend = lambda x: kernel(x, x, x, v.replace(window=window), scale=SCALE, block=BLOCK)
      return x + jax.checkpoint(attend)(x), None

    mapped = jax.vmap(lambda x, window: layer(x, window)[0], (None, 0))
    loss = lambda x: ((jax.lax.scan(layer, x, windows_L)[0] + mapped(x, windows_L).sum(0)) * grad).sum()
    return jax.grad(loss)(0.5 * x)

  wanted, got = jax.jit(lambda: (gradients(kernels.dense), gradients(blocks.blockwise)))()
  assert_close(got, wanted)


def test_blockwise_can_be_saved_by_name_and_then_runs_forward_once():
  v = Visibility(*one_document(CAUSAL))
  q = arrays(v, N)[0]

  def num_loops(policy):
    attend = jax.checkpoint(lambda x: blocks.blockwise(2 * x, x, x, v, scale=SCALE, block=BLOCK), policy=policy)
    return str(jax.make_jaxpr(jax.grad(lambda x: (attend(x) ** 2).sum()))(q)).count(' while[')

  saved = num_loops(jax.checkpoint_policies.save_only_these_names('attention_out', 'attention_lse'))
  assert (saved, num_loops(None)) == (2, 3)  # forward and backward; forward, forward again and backward


def test_bfloat16_inputs_give_bfloat16_outputs_within_its_precision():
  v = Visibility(*one_document(CAUSAL))
  x = arrays(v, 2)
  half = [a.astype(jnp.bfloat16) for a in x[:3]]
  wanted = reference(v, *(np.asarray(a, np.float32) for a in half), x[3], 0.0, False)
  for out, gradients in run_kernels(v, (*half, x[3])).values():
    assert out.dtype == gradients[0].dtype == gradients[1].dtype == jnp.bfloat16
    # Weights, dot gradients and results are each rounded to 8 bits once (2^-9 each); measured 0.006.
    assert_close((out, gradients), wanted, tolerance=0.012)


def test_blockwise_equals_dense_when_batch_and_heads_are_sharded():
  if len(jax.devices()) < 4:
    pytest.skip('needs 4 devices')
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  v = jax.tree.map(jnp.asarray, Visibility(*one_document(CAUSAL, PACKED, RESTART)))
  x = arrays(v, 2)
  place = lambda tree, spec: jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))
  heads = PartitionSpec('data', None, 'tensor')
  got = run_kernels(place(v, PartitionSpec('data')), [place(a, heads) for a in x])['blockwise']
  assert_close(got, reference(v, *x, 0.0, False))
  manual = jax.shard_map(lambda v, *x: blocks.blockwise(*x, v, scale=SCALE, block=BLOCK), mesh=mesh,
                         in_specs=(PartitionSpec('data'), heads, heads, heads), out_specs=heads)
  assert_close(jax.jit(manual)(v, *x[:3]), got[0])


def test_blockwise_memory_grows_linearly_with_length():
  def temporary_bytes(kernel, length):
    integers = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 6
    x = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 3
    loss = lambda v, q, k, v_: kernel(q, k, v_, v, scale=SCALE, block=512).sum()
    compiled = jax.jit(jax.grad(loss, argnums=(1, 2, 3))).lower(Visibility(*integers), *x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = (temporary_bytes(blocks.blockwise, length) for length in (4096, 16384))
  assert long <= 4.2 * short  # measured 1.2 to 1.7: a pair of blocks' scores cost the same at any length
  assert long < 16384 * 16384 * 4 / 50  # one matrix of scores is 1.07 GB


def test_dense_lends_its_probabilities_to_dropout_and_blockwise_refuses():
  v = Visibility(*one_document(CAUSAL, PACKED, RESTART))
  q, k, v_, _ = arrays(v, 2)
  lent = []
  out = kernels.dense(q, k, v_, v, scale=SCALE, dropout=lambda p: lent.append(p) or 2 * p)
  assert_close(out, 2 * kernels.dense(q, k, v_, v, scale=SCALE))
  assert lent[0].shape == (B, N, T, T)
  sees_BT = brute_force(v).any(-1)
  np.testing.assert_allclose(np.moveaxis(lent[0].sum(-1), 1, 2)[sees_BT], 1.0, rtol=1e-6)
  with pytest.raises(kernels.UnsupportedAttention, match=r'dropout=0\.0, or config\.model\.attention\.kernel=dense'):
    blocks.blockwise(q, k, v_, v, scale=SCALE, dropout=lambda p: p)
