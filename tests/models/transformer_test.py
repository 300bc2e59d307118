"""The whole model against a NumPy reference in float64, and the laws: causality, packing, stacking, dropout, remat."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.models import attention as attention_module
from jaxlm.models import stack as stack_module
from jaxlm.models import tower as tower_module
from jaxlm.models import transformer as transformer_module
from jaxlm.models.config import segments
from jaxlm.models.positions import POSITIONS, alibi_slopes
from jaxlm.models.stack import restack, unstack

KINDS = tuple(POSITIONS)
PAIRS = [(kind, kernel) for kind in KINDS for kernel in ('dense', 'blockwise')
         if (kind, kernel) != ('relative', 'blockwise')]  # which is refused
BOTH = pytest.mark.parametrize('kernel', ['dense', 'blockwise'])
# float32 sums in another order, logits of about 3; measured max 2.5e-6.
ATOL = 1e-5


# These tests compile much and run little; without LLVM's optimizations they take half as long.


def _attention(**changes):
  return dict(block=4) | changes


def _unrolled(model, params):
  """The same model with a program a layer, as decoding uses it."""
  config = dataclasses.replace(model.config, scan=False)
  return model.clone(config=config), unstack(params, model.config)


# ---- against NumPy -----------------------------------------------------------------------------------------------


def _reference(config, params, tokens_BT):
  """Logits in float64, one query and one head at a time; one document a row."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), unstack(params, config))
  attention, residual = config.attention, config.residual
  N, K, H, (B, T) = attention.num_heads, attention.num_kv_heads, attention.head_dim, tokens_BT.shape
  erf = np.vectorize(math.erf)
  act = {'gelu': lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
         'gelu_tanh': lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
         'silu': lambda x: x / (1 + np.exp(-x)), 'relu2': lambda x: np.maximum(x, 0) ** 2}[config.mlp.activation]
  cap = lambda x, c: c * np.tanh(x / c) if c else x

  def norm(p, x):
    if config.norm.kind == 'layernorm':
      x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm.eps)
    else:
      x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.norm.eps)
    return x * p['scale'] + p.get('bias', 0)

  def rotate(x):
    out = x.copy()
    for t in range(T):
      for i in range(H // 2):
        angle = t * config.positions.rope.base ** (-2 * i / H)
        a, b = x[:, t, :, i], x[:, t, :, i + H // 2]
        out[:, t, :, i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, t, :, i + H // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out

  def attend(p, x, window):
    q, k, v = (np.einsum('btd,dnh->btnh', x, p[n]['kernel']) + p[n].get('bias', 0) for n in ('query', 'key', 'value'))
    if attention.qk_norm == 'head':
      q, k = norm(p['query_norm'], q), norm(p['key_norm'], k)
    if config.positions.kind == 'rope':
      q, k = rotate(q), rotate(k)
    out = np.zeros((B, T, N, H))
    for b in range(B):
      for n in range(N):
        for t in range(T):
          first = max(0, t - window + 1) if window else 0
          scores = cap(k[b, first:t + 1, n * K // N] @ q[b, t, n] * (attention.scale or H ** -0.5), attention.softcap)
          if config.positions.kind == 'alibi':
            scores = scores - float(alibi_slopes(N)[n]) * (t - np.arange(first, t + 1))
          probs = np.exp(scores - scores.max())
          out[b, t, n] = probs / probs.sum() @ v[b, first:t + 1, n * K // N]
    return np.einsum('btnh,nhd->btd', out, p['out']['kernel']) + p['out'].get('bias', 0)

  def mlp(p, x):
    apply = lambda name, x: x @ p[name]['kernel'] + p[name].get('bias', 0)
    return apply('down', act(apply('gate', x)) * apply('up', x) if config.mlp.gated else act(apply('up', x)))

  x = params['embed']['embedding'][tokens_BT] * config.embedding_scale
  if config.positions.kind == 'learned':
    x = x + params['position_embed']['embedding'][:T]
  if config.positions.kind == 'sinusoidal':
    angles = np.arange(T)[:, None] * 10_000.0 ** (-2 * np.arange(config.width // 2) / config.width)
    x = x + np.concatenate([np.sin(angles), np.cos(angles)], -1)
  for layer in range(config.num_layers):
    p = params['stack'][f'layer_{layer}']
    maybe = lambda name, x: norm(p[name], x) if name in p else x
    y = maybe('attention_norm', x)
    a = maybe('attention_out_norm', attend(p['attention'], y, config.window(layer)))
    if residual.parallel:
      x = maybe('post_norm', residual.alpha * x + a + maybe('mlp_out_norm', mlp(p['mlp'], y)))
    else:
      x = maybe('attention_post_norm', residual.alpha * x + a)
      m = maybe('mlp_out_norm', mlp(p['mlp'], maybe('mlp_norm', x)))
      x = maybe('mlp_post_norm', residual.alpha * x + m)
  x = norm(params['final_norm'], x) if residual.final_norm else x
  return cap(x @ (params['embed']['embedding'] if config.tie_embeddings else params['head']).T, config.logit_softcap)


FAMILIES = {
    'GPT-2': dict(positions=dict(kind='learned'), mlp=dict(activation='gelu')),
    'Llama': dict(positions=dict(kind='rope'), tie_embeddings=False, norm=dict(kind='rmsnorm'),
                  mlp=dict(activation='silu', gated=True, bias=False),
                  attention=dict(num_kv_heads=2, bias=False, out_bias=False)),
    'Gemma 2 and 3': dict(
        positions=dict(kind='rope'), norm=dict(kind='rmsnorm'), embedding_scale=math.sqrt(32), logit_softcap=3.0,
        mlp=dict(activation='gelu_tanh', gated=True), residual=dict(out_norm=True),
        attention=dict(num_kv_heads=1, head_dim=6, windows=(3, 0), softcap=2.0, qk_norm='head', scale=0.3)),
    'parallel with ALiBi': dict(positions=dict(kind='alibi'), residual=dict(parallel=True), norm=dict(bias=False),
                                mlp=dict(activation='relu2')),
    'DeepNorm': dict(positions=dict(kind='sinusoidal'),
                     residual=dict(in_norm=False, post_norm=True, alpha=1.7, final_norm=False)),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_equal_a_numpy_reference_in_float64(family, model_of, params_of):
  model = model_of(**FAMILIES[family])
  params = params_of(model)
  tokens_BT = np.random.default_rng(0).integers(0, 29, (2, 9))
  logits_BTV = jax.jit(model.apply)({'params': params}, {'tokens': jnp.asarray(tokens_BT)}).logits
  assert logits_BTV.shape == (2, 9, 32) and logits_BTV.dtype == jnp.float32
  np.testing.assert_allclose(logits_BTV, _reference(model.config, params, tokens_BT), atol=ATOL)


def test_a_half_precision_model_has_float32_logits_and_parameters(model_of, params_of):
  model = model_of(compute_dtype='bfloat16')
  params = params_of(model)
  output = jax.eval_shape(lambda p: model.apply({'params': p}, {'tokens': jnp.zeros((1, 4), jnp.int32)}), params)
  assert (output.logits.dtype, output.hidden.dtype) == (jnp.float32, jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


# ---- causality ---------------------------------------------------------------------------------------------------


def _influence(model, params, batch):
  """[T, T]: the largest gradient of the hidden state at t by the embedding of token k; all tokens differ."""
  T = batch['tokens'].shape[1]
  mix_D = jax.random.normal(jax.random.key(1), (model.config.width,))

  def at(embedding, t):
    hidden = model.apply({'params': params | {'embed': {'embedding': embedding}}}, batch, with_logits=False).hidden
    return hidden[0, t] @ mix_D

  gradient = jax.jit(jax.grad(at))
  table = [np.abs(gradient(params['embed']['embedding'], t)).max(-1)[np.asarray(batch['tokens'][0])] for t in range(T)]
  return np.stack(table)


@pytest.mark.parametrize('kind, kernel', [(kind, 'dense') for kind in KINDS] + [
    ('rope', 'blockwise'), ('alibi', 'blockwise')])  # positions meet a kernel only as rotations or as a bias
def test_future_tokens_have_zero_gradient(kind, kernel, model_of, params_of):
  model = model_of(positions=dict(kind=kind), attention=_attention(kernel=kernel))
  influence_TT = _influence(model, params_of(model), {'tokens': jnp.arange(10)[None]})
  past_TT = np.tril(np.ones((10, 10), bool))
  assert (influence_TT[~past_TT] == 0).all() and (influence_TT[past_TT] > 0).all()


@BOTH
def test_a_window_reaches_as_far_as_its_layers_together(kernel, model_of, params_of):
  model = model_of(positions=dict(kind='rope'), attention=_attention(kernel=kernel, windows=(2, 4)))
  influence_TT = _influence(model, params_of(model), {'tokens': jnp.arange(10)[None]})
  back_TT = np.arange(10)[:, None] - np.arange(10)
  np.testing.assert_array_equal(influence_TT > 0, (back_TT >= 0) & (back_TT <= 1 + 3))


@BOTH
def test_order_alone_decides_who_is_seen(kernel, model_of, params_of):
  model = model_of('order', num_layers=1, positions=dict(kind='learned'), attention=_attention(kernel=kernel))
  order = np.random.default_rng(0).integers(0, 5, 10)
  batch = {'tokens': jnp.arange(10)[None], 'order': jnp.asarray(order)[None]}
  np.testing.assert_array_equal(_influence(model, params_of(model), batch) > 0, order[None, :] <= order[:, None])


# ---- packing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, kernel', PAIRS)
def test_packed_documents_have_the_logits_of_each_alone(kind, kernel, model_of, params_of):
  model = model_of(positions=dict(kind=kind), attention=_attention(kernel=kernel, windows=(0, 4)))
  params, T, long, short = params_of(model), 14, 7, 5
  tokens = np.random.default_rng(0).integers(0, 29, long + short)

  def row(*documents):
    """Documents in a row, as (first, end) of tokens; the rest is padding."""
    parts = [(tokens[a:b], np.full(b - a, i + 1), np.arange(b - a)) for i, (a, b) in enumerate(documents)]
    return [np.pad(np.concatenate(x), (0, T - sum(b - a for a, b in documents))) for x in zip(*parts)]

  a, b = (0, long), (long, long + short)
  stacked = [np.stack(x) for x in zip(row(a, b), row(b, a), row(a), row(b))]
  batch = dict(zip(('tokens', 'segment_ids', 'positions'), map(jnp.asarray, stacked)))
  both, swapped, first, second = np.asarray(jax.jit(model.apply)({'params': params}, batch).logits)
  for logits, at_a, at_b in ((both, 0, long), (swapped, short, 0)):
    np.testing.assert_allclose(logits[at_a:at_a + long], first[:long], atol=ATOL)
    np.testing.assert_allclose(logits[at_b:at_b + short], second[:short], atol=ATOL)
  assert np.isfinite(both).all()


# ---- stacking ----------------------------------------------------------------------------------------------------


def test_scanned_layers_equal_unrolled_ones(model_of, params_of):
  model = model_of(num_layers=5, attention=_attention(windows=(0, 3)))
  params = params_of(model)
  unrolled, layers = _unrolled(model, params)
  batch = {'tokens': jax.random.randint(jax.random.key(0), (2, 8), 0, 29)}
  want = jax.jit(unrolled.apply)({'params': layers}, batch).logits
  np.testing.assert_allclose(jax.jit(model.apply)({'params': params}, batch).logits, want, atol=ATOL)


def test_restack_undoes_unstack(model_of, params_of):
  model = model_of(num_layers=3)
  params = params_of(model)
  layers = unstack(params, model.config)
  assert set(layers['stack']) == {'layer_0', 'layer_1', 'layer_2'}
  again = restack(layers, model.config)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  numbers = restack(jax.tree.map(np.asarray, layers), model.config)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(numbers))


def test_unlike_layers_restack_to_where_they_were(model_of, monkeypatch):
  kinds = ('dense',) + ('local', 'global') * 2 + ('local',)
  model = model_of(num_layers=len(kinds))
  monkeypatch.setattr(type(model.config), 'layer_kinds', lambda self: kinds)
  layers = {'stack': {f'layer_{i}': {'w': np.full(2, i)} for i in range(len(kinds))}, 'head': np.zeros(1)}
  stacked = restack(layers, model.config)
  assert trees.flatten(stacked)['stack/period/slot_1/w'].tolist() == [[2, 2], [4, 4]]
  assert segments(kinds).prefix == ('dense',) and segments(kinds).suffix == ('local',)
  assert trees.diff(unstack(stacked, model.config), layers) == []
  jax.tree.map(np.testing.assert_array_equal, unstack(stacked, model.config), layers)


def test_positions_that_are_not_built_in_are_refused_and_not_left_out(model_of):
  with pytest.raises(JaxlmError, match='my_lab.ideas:mine'):
    jax.eval_shape(model_of(positions=dict(kind='my_lab.ideas:mine')).init, jax.random.key(0),
                   {'tokens': jnp.zeros((1, 4), jnp.int32)})


# ---- dropout -----------------------------------------------------------------------------------------------------


def test_an_examples_dropout_does_not_depend_on_the_batch_around_it(model_of, params_of):
  model = model_of(dropout=0.3, attention=_attention(dropout=0.2))
  params = params_of(model)
  tokens_BT = jax.random.randint(jax.random.key(0), (4, 8), 0, 29)
  ids_B = jnp.array([7, 3, 100, 12])
  rng = jax.random.key(5)
  run = jax.jit(lambda tokens, ids, rng: model.apply(
      {'params': params}, {'tokens': tokens, 'example_ids': ids}, rng=rng, with_logits=False).hidden)
  whole = run(tokens_BT, ids_B, rng)
  turned = jnp.array([2, 0, 3, 1])
  # The masks are the same bits; products of other shapes may sum in another order. Measured 0.
  np.testing.assert_allclose(run(tokens_BT[turned], ids_B[turned], rng), whole[turned], atol=ATOL)
  np.testing.assert_allclose(run(tokens_BT[2:3], ids_B[2:3], rng), whole[2:3], atol=ATOL)
  assert np.abs(run(tokens_BT, ids_B, jax.random.fold_in(rng, 1)) - whole).max() > 0.1  # another step
  twins = run(tokens_BT[:1].repeat(2, 0), jnp.array([1, 2]), rng)
  assert np.abs(twins[0] - twins[1]).max() > 0.1  # another example


def test_no_two_sites_layers_or_examples_share_a_dropout_key(model_of, params_of, monkeypatch):
  model = model_of(dropout=0.3, attention=_attention(dropout=0.2))
  keys, (unrolled, layers) = [], _unrolled(model, params_of(model))

  def record(x, rate, keys_B, site):
    keys.extend(jax.vmap(lambda k: jax.random.key_data(jax.random.fold_in(k, site)))(keys_B).tolist())
    return x

  for module in (transformer_module, tower_module, stack_module, attention_module):
    monkeypatch.setattr(module, 'dropout', record)
  unrolled.apply({'params': layers}, {'tokens': jnp.zeros((3, 4), jnp.int32)}, rng=jax.random.key(0))
  assert len(keys) == 3 * (1 + 2 * 3)  # examples; embeddings, then attention, its branch and the MLP's in two layers
  assert len(set(map(tuple, keys))) == len(keys)


# ---- remat -------------------------------------------------------------------------------------------------------


def _gradient(model):
  loss = lambda params, batch: model.apply({'params': params}, batch).logits.astype(jnp.float32).var()
  return jax.grad(loss)


@pytest.mark.parametrize('remat, kernel', [('full', 'dense'), ('dots', 'dense'), ('names', 'blockwise')])
def test_remat_changes_no_gradient(remat, kernel, model_of, params_of):
  batch = {'tokens': jax.random.randint(jax.random.key(0), (2, 8), 0, 29)}
  plain = model_of(attention=_attention(kernel=kernel))
  params = params_of(plain)
  kept = model_of(remat=remat, remat_names=stack_module.REMAT_NAMES, attention=_attention(kernel=kernel))
  for a, b in zip(*(jax.tree.leaves(jax.jit(_gradient(m))(params, batch)) for m in (kept, plain))):
    # Fusions may differ between a forward and a recomputed one; measured 0.
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max() + 1))


def test_full_remat_holds_less_memory(model_of, params_of):
  batch = {'tokens': jnp.zeros((4, 64), jnp.int32)}
  held = {}
  for remat in ('none', 'full'):
    model = model_of(num_layers=8, remat=remat)
    compiled = jax.jit(_gradient(model)).lower(params_of(model), batch).compile()
    held[remat] = compiled.memory_analysis().temp_size_in_bytes
  assert held['full'] < 0.5 * held['none'], held


@pytest.mark.parametrize('tied', [True, False])
def test_logits_of_few_rows_are_those_of_many(tied, model_of, params_of, monkeypatch):
  model = model_of(num_layers=1, tie_embeddings=tied)
  params = params_of(model)
  batch = {'tokens': jnp.arange(6, dtype=jnp.int32).reshape(2, 3)}
  few = model.apply({'params': params}, batch).logits
  monkeypatch.setattr(transformer_module, 'FEW', 0)
  np.testing.assert_allclose(few, model.apply({'params': params}, batch).logits, atol=1e-6)
