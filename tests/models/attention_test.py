"""The attention layer's cache: decoding a token at a time is the full forward."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.attention import Tokens, _write, remember
from jaxlm.models.stack import init_cache, unstack

# float32 sums in another order, logits of about 3; measured max 2.5e-6.
ATOL = 1e-5
# These tests compile much and run little; without LLVM's optimizations they take half as long.


def _attention(**changes):
  return dict(block=4) | changes


def _unrolled(model, params):
  """The same model with a program a layer, as decoding uses it."""
  config = dataclasses.replace(model.config, scan=False)
  return model.clone(config=config), unstack(params, model.config)


def _decode(model, params, tokens_BT, lengths_B, chunks):
  """Logits by prefills of the given sizes, cut ragged at `lengths_B`, then a token at a time to the end."""
  B, T = tokens_BT.shape
  unrolled, layers = _unrolled(model, params)
  cache, logits = init_cache(model.config, B, T), np.full((B, T, 32), np.nan)
  apply = jax.jit(lambda batch, cache: unrolled.apply({'params': layers}, batch, cache))

  def run(first_B, size, end_B):
    nonlocal cache
    positions = first_B[:, None] + np.arange(size)
    real = positions < end_B[:, None]
    batch = {'tokens': np.take_along_axis(tokens_BT, np.minimum(positions, T - 1), 1), 'positions': positions,
             'segment_ids': real.astype(np.int32)}
    output = apply({k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}, cache)
    cache = output.cache
    for b, i in zip(*np.nonzero(real)):
      logits[b, positions[b, i]] = output.logits[b, i]

  at = 0
  for size in chunks:
    run(np.full(B, at), size, lengths_B)
    at += size
  while (lengths_B < T).any():
    run(lengths_B, 1, np.full(B, T))
    lengths_B = np.minimum(lengths_B + 1, T)
  return logits


@pytest.mark.parametrize('kind, changes, chunks', [
    ('learned', dict(), (9,)),
    ('sinusoidal', dict(windows=(5, 0)), (9,)),
    ('rope', dict(windows=(0, 4), num_kv_heads=2), (9,)),                      # a ring shorter than the prefill
    ('alibi', dict(windows=(3, 4)), (5, 4)),                                   # a ring prefilled in two parts
    ('none', dict(windows=(6,), kernel='blockwise'), (4, 5)),
    ('rope', dict(windows=(4, 0), kernel='blockwise', num_kv_heads=1), (9,)),
])
def test_decoding_with_a_cache_equals_the_full_forward(kind, changes, chunks, model_of, params_of):
  model = model_of(positions=dict(kind=kind), attention=_attention(**changes))
  params = params_of(model)
  tokens_BT = np.random.default_rng(0).integers(0, 29, (3, 14))
  want = jax.jit(model.apply)({'params': params}, {'tokens': jnp.asarray(tokens_BT)}).logits
  got = _decode(model, params, tokens_BT, np.array([9, 5, 1]), chunks)
  np.testing.assert_allclose(got, want, atol=ATOL)


def test_prompts_padded_on_the_left_decode_the_same(model_of, params_of):
  model = model_of(positions=dict(kind='rope'), attention=_attention(windows=(0, 4)))
  params = params_of(model)
  tokens_BT = np.random.default_rng(0).integers(0, 29, (2, 8))
  want = jax.jit(model.apply)({'params': params}, {'tokens': jnp.asarray(tokens_BT)}).logits
  unrolled, layers = _unrolled(model, params)
  pad_B = np.array([0, 3])
  positions = np.arange(8) - pad_B[:, None]
  shifted = np.take_along_axis(tokens_BT, np.maximum(positions, 0), 1)
  batch = {'tokens': shifted, 'positions': np.maximum(positions, 0), 'segment_ids': positions >= 0}
  batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
  output = jax.jit(unrolled.apply)({'params': layers}, batch, init_cache(model.config, 2, 12))
  np.testing.assert_allclose(output.logits[0], want[0], atol=ATOL)
  np.testing.assert_allclose(output.logits[1, 3:], want[1, :5], atol=ATOL)


def test_a_windowed_layer_caches_its_window_alone(model_of):
  config = model_of(attention=_attention(windows=(0, 4), num_kv_heads=2)).config
  cache = init_cache(config, 3, 100)
  assert [layer.mixer.k.size for layer in cache.layers] == [3 * 100 * 2 * 8, 3 * 4 * 2 * 8]
  assert {slots: tokens.order.shape for slots, tokens in cache.tokens.items()} == {4: (3, 4), 100: (3, 100)}


def test_layers_with_as_many_slots_share_what_is_known_of_their_tokens(model_of):
  config = model_of(num_layers=6, attention=_attention(windows=(0, 0, 4))).config
  cache = init_cache(config, 3, 100)
  assert len(jax.tree.leaves(cache.layers)) == 6 * 2 and len(jax.tree.leaves(cache.tokens)) == 2 * 4


def test_a_scanned_stack_writes_the_same_cache(model_of, params_of):
  model = model_of(num_layers=3)
  params, tokens = params_of(model), jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 5)))
  unrolled, layers = _unrolled(model, params)
  cache = init_cache(model.config, 2, 8)
  want = jax.jit(unrolled.apply)({'params': layers}, {'tokens': tokens}, cache)
  got = jax.jit(model.apply)({'params': params}, {'tokens': tokens}, cache)
  np.testing.assert_allclose(got.logits, want.logits, atol=ATOL)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got.cache, want.cache)


def test_a_ring_keeps_the_last_tokens_and_drops_padding(model_of):
  slots, T = 3, 5
  attention = _attention(num_heads=1, num_kv_heads=1, head_dim=1, windows=(slots,))
  model = model_of(num_layers=1, attention=attention)
  empty = init_cache(model.config, 2, T)
  positions = jnp.broadcast_to(jnp.arange(T), (2, T))
  segments = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
  values = positions[..., None, None].astype(jnp.float32) + 10
  tokens = Tokens(positions + 1, segments, positions, 0 * positions)
  memory = remember(empty.tokens[slots], tokens, positions)
  cache = _write(model.layout, empty.layers[0].mixer, values, -values, memory.slot_BT)
  np.testing.assert_array_equal(memory.after.positions, [[3, 4, 2], [0, 1, 0]])
  np.testing.assert_array_equal(memory.after.segments, [[1, 1, 1], [1, 1, 0]])
  np.testing.assert_array_equal(cache.k.reshape(2, slots), [[13, 14, 12], [10, 11, 0]])
  np.testing.assert_array_equal(cache.v, -cache.k)
