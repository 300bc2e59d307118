"""Recurrent layers against torch and NumPy, and the laws: packing, decoding, causality, stacking, sharding."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import config as base
from jaxlm import sharding
from jaxlm.errors import JaxlmError
from jaxlm.models import recurrent
from jaxlm.models.attention import Context, Tokens
from jaxlm.models.recurrent import CELLS, Recurrent, init_cache, starts
from jaxlm.models.stack import init_cache as model_cache
from jaxlm.models.stack import unstack

MIXERS = tuple(CELLS)
TORCH = {'rnn': 'RNN', 'gru': 'GRU', 'lstm': 'LSTM'}
# float32 sums in another order, values of about 1; measured max 4e-7, gradients of about 10: 5e-6.
ATOL = 1e-5


@pytest.fixture(scope='session')
def recurrent_of(model_of):
  """(mixer, visibility='causal', **overrides) -> Transformer of two residual layers without positions."""
  def build(mixer, visibility='causal', **overrides):
    return model_of(visibility, mixer=mixer, **dict(positions=dict(kind='none'), embedding=dict(width=32)) | overrides)
  return build


def _context(segments_BT):
  zeros_BT = jnp.zeros_like(segments_BT)
  return Context(Tokens(zeros_BT, segments_BT, zeros_BT, zeros_BT))


def _layer(model, seed=0):
  """(a layer alone, its parameters far from zero)."""
  layer = Recurrent(model.config, model.layout)
  x_BTD, segments_BT = jnp.zeros((1, 2, model.config.width)), jnp.ones((1, 2), jnp.int32)
  shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x_BTD, _context(segments_BT), None, None, None))
  rng = np.random.default_rng(seed)
  return layer, jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), shapes['params'])


def _run(layer, params, x_BTD, segments_BT, cache=None):
  return layer.apply({'params': params}, x_BTD, _context(segments_BT), None, None, cache)


def _torch_twin(torch, mixer, params, width, twice):
  """torch's layer with our weights: they are its own, transposed and split by gates."""
  twin = getattr(torch.nn, TORCH[mixer])(width, width, batch_first=True, bidirectional=twice)
  names = {'weight_ih': 'input/kernel', 'bias_ih': 'input/bias', 'weight_hh': 'recurrent/kernel',
           'bias_hh': 'recurrent/bias'}
  with torch.no_grad():
    for theirs, ours in names.items():
      for end, start in (('', ''), ('_reverse', 'backward_'))[:1 + twice]:
        module, leaf = ours.split('/')
        w = np.asarray(params[start + module][leaf])
        getattr(twin, f'{theirs}_l0{end}').copy_(torch.tensor(w.reshape(width, -1).T if leaf == 'kernel'
                                                               else w.reshape(-1)))
  return twin


@pytest.mark.parametrize('visibility', ['causal', 'full'])
@pytest.mark.parametrize('mixer', TORCH)
def test_outputs_and_gradients_equal_torchs(mixer, visibility, recurrent_of):
  torch = pytest.importorskip('torch')
  model = recurrent_of(mixer, visibility)
  layer, params = _layer(model)
  width, twice = model.config.width, visibility == 'full'
  rng = np.random.default_rng(1)
  x_BTD, mix_BTD = (rng.standard_normal((3, 11, width)).astype(np.float32) for _ in range(2))
  segments_BT = jnp.ones((3, 11), jnp.int32)
  y_BTD, dparams, dx_BTD = jax.jit(lambda p, x: (
      _run(layer, p, x, segments_BT)[0], *jax.grad(lambda p, x: (_run(layer, p, x, segments_BT)[0] * mix_BTD).sum(),
                                                   (0, 1))(p, x)))(params, x_BTD)

  twin = _torch_twin(torch, mixer, params, width, twice)
  x = torch.tensor(x_BTD, requires_grad=True)
  y = twin(x)[0]
  if twice:
    y = y @ torch.tensor(params['out']['kernel']) + torch.tensor(params['out']['bias'])
  (y * torch.tensor(mix_BTD)).sum().backward()
  np.testing.assert_allclose(y_BTD, y.detach(), atol=ATOL)
  close = lambda got, want: np.testing.assert_allclose(got, want, atol=ATOL * max(1, np.abs(want).max()))
  close(dx_BTD, x.grad.numpy())
  for start, end in (('', ''), ('backward_', '_reverse'))[:1 + twice]:
    for ours, theirs in (('input', 'ih'), ('recurrent', 'hh')):
      grad = lambda kind: getattr(twin, f'{kind}_{theirs}_l0{end}').grad.numpy()
      close(dparams[start + ours]['kernel'].reshape(width, -1).T, grad('weight'))
      close(dparams[start + ours]['bias'].reshape(-1), grad('bias'))


def test_the_multiplicative_lstm_equals_a_loop_in_float64(recurrent_of):
  model = recurrent_of('mlstm')
  layer, params = _layer(model)
  x_BTD = np.random.default_rng(1).standard_normal((2, 9, 32)).astype(np.float32)
  got = _run(layer, params, x_BTD, jnp.ones((2, 9), jnp.int32))[0]
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  h_BD = c_BD = np.zeros((2, 32))
  for t in range(9):
    x_BD = x_BTD[:, t].astype(np.float64)
    m_BD = (x_BD @ p['factor']['kernel']) * (h_BD @ p['factor_recurrent']['kernel'])
    i, f, g, o = np.moveaxis(np.einsum('BD,DGH->BGH', x_BD, p['input']['kernel']) + p['input']['bias']
                             + np.einsum('BD,DGH->BGH', m_BD, p['recurrent']['kernel']), 1, 0)
    c_BD = sigmoid(f) * c_BD + sigmoid(i) * np.tanh(g)
    h_BD = sigmoid(o) * np.tanh(c_BD)
    np.testing.assert_allclose(got[:, t], h_BD, atol=ATOL)


def test_weights_get_the_gradient_that_goes_through_the_loop(recurrent_of):
  """`unrolled` against JAX's own derivative of the scan, with starts, padding and a state that came in."""
  for mixer in ('gru', 'mlstm'):  # whose maps differ; the others are held to torch
    model = recurrent_of(mixer)
    layer, params = _layer(model)
    rng = np.random.default_rng(2)
    x_BTD, mix_BTD = (rng.standard_normal((2, 8, 32)).astype(np.float32) for _ in range(2))
    segments_BT = jnp.array([[1, 1, 0, 1, 2, 2, 0, 0], [3, 3, 3, 1, 1, 0, 1, 4]])
    state = init_cache(model.config, 2, 0)
    state = state.replace(states=tuple(jnp.asarray(0.5 * rng.standard_normal(s.shape), jnp.float32)
                                       for s in state.states), segments_B=jnp.array([1, 3]))

    def loss(params, x_BTD, states):
      y_BTD, new = _run(layer, params, x_BTD, segments_BT, state.replace(states=states))
      return (y_BTD * mix_BTD).sum() + sum((s * (i + 1)).sum() for i, s in enumerate(new.states))

    ours = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x_BTD, state.states)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(recurrent, 'unrolled', lambda cell, maps: lambda variables, tokens, *rest: recurrent._scan(
          cell, maps, variables, tokens, {}, *rest)[0])
      plain = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x_BTD, state.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL * max(1, np.abs(b).max())), ours, plain)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(ours)), mixer


# ---- documents and padding ---------------------------------------------------------------------------------------


def test_a_document_starts_where_the_segment_is_new_and_padding_ends_none():
  segments_BT = jnp.array([[1, 1, 0, 1, 2, 0, 0], [0, 0, 3, 3, 0, 2, 2], [5, 0, 5, 6, 6, 6, 0]])
  start_BT, last_B = starts(segments_BT, jnp.array([0, 0, 5]))
  np.testing.assert_array_equal(start_BT, [[1, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(last_B, [2, 2, 6])


@pytest.mark.parametrize('visibility', ['causal', 'full'])
@pytest.mark.parametrize('mixer', MIXERS)
def test_packed_documents_have_the_outputs_of_each_alone(mixer, visibility, recurrent_of):
  layer, params = _layer(recurrent_of(mixer, visibility))
  x_TD = np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)
  row = lambda *parts: np.concatenate([np.pad(x_TD[a:b], ((0, pad), (0, 0))) for a, b, pad in parts])
  ids = lambda *parts: np.concatenate([[s] * n for s, n in parts])
  x_BTD = np.stack([row((0, 5, 0), (5, 9, 3)), row((5, 9, 0), (0, 5, 3)), row((0, 5, 7)), row((5, 9, 8)),
                    row((0, 2, 2), (2, 5, 0), (5, 9, 1))])
  segments_BT = np.stack([ids((1, 5), (2, 4), (0, 3)), ids((2, 4), (1, 5), (0, 3)), ids((1, 5), (0, 7)),
                          ids((1, 4), (0, 8)), ids((1, 2), (0, 2), (1, 3), (2, 4), (0, 1))])
  # What stands in padding must not matter.
  x_BTD = np.where(segments_BT[..., None] > 0, x_BTD, 1e3).astype(np.float32)
  run = jax.jit(functools.partial(_run, layer))
  both, swapped, first, second, holes = run(params, x_BTD, jnp.asarray(segments_BT))[0]
  for got in (both[:5], swapped[4:9], np.delete(holes, [2, 3], 0)[:5]):
    np.testing.assert_allclose(got, first[:5], atol=ATOL)
  for got in (both[5:9], swapped[:4], holes[7:11]):
    np.testing.assert_allclose(got, second[:4], atol=ATOL)
  assert not both[9:].any() and not holes[2:4].any()


@pytest.mark.parametrize('mixer', MIXERS)
def test_future_tokens_have_zero_gradient(mixer, recurrent_of):
  layer, params = _layer(recurrent_of(mixer))
  x_1TD, ones_1T = jax.random.normal(jax.random.key(0), (1, 6, 32)), jnp.ones((1, 6), jnp.int32)
  influence = jax.jit(jax.jacrev(lambda x_1TD: _run(layer, params, x_1TD, ones_1T)[0].sum(-1)))
  dy_TT = jnp.abs(influence(x_1TD)[0, :, 0]).max(-1)
  past_TT = np.tril(np.ones((6, 6), bool))
  assert (dy_TT[~past_TT] == 0).all() and (dy_TT[past_TT] > 0).all()


# ---- decoding ----------------------------------------------------------------------------------------------------


def _decoded(model, params, batch, cache, lengths_B):
  """Logits by a prefill cut ragged at `lengths_B`, padded on the right, then a token at a time."""
  tokens_BT = batch.pop('tokens')
  B, T = tokens_BT.shape
  apply = jax.jit(lambda batch, cache: model.apply({'params': params}, batch, cache))
  logits = np.full((B, T, 32), np.nan)

  def run(first_B, size, end_B, more):
    nonlocal cache
    at_BT = first_B[:, None] + np.arange(size)
    real_BT = at_BT < end_B[:, None]
    step = {'tokens': np.take_along_axis(tokens_BT, np.minimum(at_BT, T - 1), 1), 'positions': at_BT,
            'segment_ids': real_BT}
    output = apply({k: jnp.asarray(v, jnp.int32) for k, v in step.items()} | more, cache)
    cache = output.cache
    for b, i in zip(*np.nonzero(real_BT)):
      logits[b, at_BT[b, i]] = output.logits[b, i]

  run(np.zeros(B, int), max(lengths_B), lengths_B, batch)
  while (lengths_B < T).any():
    run(lengths_B, 1, np.full(B, T), {})
    lengths_B = np.minimum(lengths_B + 1, T)
  return logits


@pytest.mark.parametrize('mixer', MIXERS)
def test_decoding_with_a_state_equals_the_full_forward(mixer, recurrent_of, params_of):
  model = recurrent_of(mixer)
  params = params_of(model)
  tokens_BT = np.random.default_rng(0).integers(0, 29, (3, 10))
  want = jax.jit(model.apply)({'params': params}, {'tokens': jnp.asarray(tokens_BT)}).logits
  single = model.clone(config=dataclasses.replace(model.config, scan=False))
  for lengths in ([6, 4, 1], [1, 1, 1]):
    got = _decoded(single, unstack(params, model.config), {'tokens': tokens_BT}, model_cache(model.config, 3, 10),
                   np.array(lengths))
    np.testing.assert_allclose(got, want, atol=ATOL)


def test_a_cache_goes_through_a_scanned_stack(recurrent_of, params_of):
  model = recurrent_of('lstm', num_layers=3)
  params = params_of(model)
  tokens_BT = jax.random.randint(jax.random.key(0), (2, 8), 0, 29)
  want = jax.jit(model.apply)({'params': params}, {'tokens': tokens_BT}).logits
  apply = jax.jit(lambda batch, cache: model.apply({'params': params}, batch, cache))
  out = apply({'tokens': tokens_BT[:, :5]}, model_cache(model.config, 2, 8))
  later = apply({'tokens': tokens_BT[:, 5:], 'positions': jnp.arange(5, 8)[None].repeat(2, 0)}, out.cache)
  np.testing.assert_allclose(jnp.concatenate([out.logits, later.logits], 1), want, atol=ATOL)


@pytest.mark.parametrize('mixer', ['lstm', 'gru'])
def test_an_encoder_decoder_with_attention_decodes_as_it_reads(mixer, recurrent_of, params_of):
  model = recurrent_of(mixer, structure='encoder_decoder', encoder_layers=2)
  params = params_of(model)
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 29, (3, 10))
  source = {'source_tokens': jnp.asarray(rng.integers(0, 29, (3, 7))),
            'source_segment_ids': jnp.asarray(np.arange(7) < np.array([[7], [4], [2]]), jnp.int32)}
  want = jax.jit(model.apply)({'params': params}, {'tokens': jnp.asarray(tokens_BT)} | source).logits
  other = source | {'source_tokens': source['source_tokens'].at[0, 0].add(1) % 29}
  moved = np.abs(jax.jit(model.apply)({'params': params}, {'tokens': jnp.asarray(tokens_BT)} | other).logits - want)
  assert moved[0].max() > 1e-3 and moved[1:].max() == 0
  single = model.clone(config=dataclasses.replace(model.config, scan=False))
  got = _decoded(single, unstack(params, model.config), {'tokens': tokens_BT} | source,
                 model_cache(model.config, 3, 10, 7), np.array([6, 4, 1]))
  np.testing.assert_allclose(got, want, atol=ATOL)


# ---- in a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mixer, visibility', [('lstm', 'causal'), ('gru', 'full'), ('mlstm', 'causal')])
def test_scanned_layers_equal_unrolled_ones(mixer, visibility, recurrent_of, params_of):
  model = recurrent_of(mixer, visibility, num_layers=3)
  params = params_of(model)
  single = model.clone(config=dataclasses.replace(model.config, scan=False))
  batch = {'tokens': jax.random.randint(jax.random.key(0), (2, 8), 0, 29)}
  want = jax.jit(single.apply)({'params': unstack(params, model.config)}, batch).logits
  np.testing.assert_allclose(jax.jit(model.apply)({'params': params}, batch).logits, want, atol=ATOL)


CLASSICAL = dict(residual=dict(alpha=0.0, in_norm=False, final_norm=False), mlp=dict(width=0))


def _loss(model, params, tokens_BT, rng=None):
  logits_BTV = model.apply({'params': params}, {'tokens': tokens_BT}, rng=rng).logits
  return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1, :29], tokens_BT[:, 1:]).mean()


@pytest.mark.parametrize('mixer, overrides', [
    ('rnn', CLASSICAL), ('gru', CLASSICAL), ('lstm', CLASSICAL), ('mlstm', CLASSICAL), ('lstm', dict(dropout=0.1))],
    ids=lambda value: value if isinstance(value, str) else 'classical' if value is CLASSICAL else 'residual with MLP')
def test_a_language_model_learns_its_text(mixer, overrides, recurrent_of):
  model = recurrent_of(mixer, init=dict(std=0.2), **overrides)
  tokens_BT = jnp.tile(jax.random.permutation(jax.random.key(0), 29)[None], (2, 1))
  params = nn.meta.unbox(model.init(jax.random.key(1), {'tokens': tokens_BT}))['params']
  paths = {'/'.join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
  if overrides is CLASSICAL:
    assert not any('norm' in path or 'mlp' in path for path in paths)
  tx = optax.adam(1e-2)

  @jax.jit
  def step(state, i):
    params, opt_state = state
    loss, grads = jax.value_and_grad(functools.partial(_loss, model))(
        params, tokens_BT=tokens_BT, rng=jax.random.fold_in(jax.random.key(2), i))
    updates, opt_state = tx.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), loss

  state, losses = (params, tx.init(params)), []
  for i in range(40):
    state, loss = step(state, i)
    losses.append(float(loss))
  assert losses[0] > 3 and losses[-1] < 0.7 * losses[0], losses


def test_what_a_state_cannot_do_is_refused(recurrent_of, model_of):
  tokens = {'tokens': jnp.zeros((1, 4), jnp.int32), 'order': jnp.zeros((1, 4), jnp.int32)}
  start = lambda model: jax.eval_shape(model.init, jax.random.key(0), tokens)
  for model, told in ((recurrent_of('lstm', 'order'), "visibility 'order'"),
                      (recurrent_of('lstm', structure='two_stream'), 'no second stream'),
                      (recurrent_of('gru', attention=dict(windows=(2,))), 'no window'),
                      (recurrent_of('rnn', positions=dict(kind='rope')), "positions.kind='rope'")):
    with pytest.raises(JaxlmError, match=told):
      start(model)
  both_ways = recurrent_of('gru', 'full')
  layer, params = _layer(both_ways)
  with pytest.raises(JaxlmError, match='without a cache'):
    _run(layer, params, jnp.zeros((1, 2, 32)), jnp.ones((1, 2), jnp.int32), init_cache(both_ways.config, 1, 0))


def test_a_half_precision_state_stays_float32(recurrent_of, params_of):
  model = recurrent_of('lstm', compute_dtype='bfloat16')
  params = params_of(model)
  tokens_BT = jax.random.randint(jax.random.key(0), (2, 6), 0, 29)
  output = jax.jit(model.apply)({'params': params}, {'tokens': tokens_BT}, model_cache(model.config, 2, 6))
  assert {s.dtype for s in output.cache.layers[0].mixer.states} == {jnp.dtype('float32')}
  assert output.hidden.dtype == jnp.bfloat16
  full = jax.jit(recurrent_of('lstm').apply)({'params': params}, {'tokens': tokens_BT})
  np.testing.assert_allclose(output.logits, full.logits, atol=0.1)  # bfloat16 has 8 bits; measured 0.03


@pytest.mark.parametrize('mesh', [dict(data=8), dict(data=2, fsdp=2, tensor=2)],
                         ids=str)
def test_a_sharded_model_equals_one_on_one_device(mesh, recurrent_of, params_of):
  model = recurrent_of('lstm')
  params = params_of(model)
  layout = sharding.Layout(sharding.make_mesh(mesh), tuple(base.default().sharding.rules))
  spread = model.clone(layout=layout)
  tokens_BT = jax.random.randint(jax.random.key(0), (8, 9), 0, 29)
  boxed = jax.eval_shape(spread.init, jax.random.key(0), {'tokens': tokens_BT})['params']
  placed = jax.device_put(params, sharding.param_shardings(nn.meta.unbox(boxed), sharding.logical_axes(boxed), layout))
  want = jax.jit(jax.value_and_grad(functools.partial(_loss, model)))(params, tokens_BT)
  step = jax.jit(jax.value_and_grad(functools.partial(_loss, spread)), out_shardings=(
      None, jax.tree.map(lambda x: x.sharding, placed)))
  compiled = step.lower(placed, jax.device_put(tokens_BT, layout.batch(tokens_BT.shape))).compile()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), compiled(placed, jax.device_put(
      tokens_BT, layout.batch(tokens_BT.shape))), want)
