"""Mixtures of experts against all experts in NumPy and transformers' own, and the laws: packing, stacking, sharding."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import sharding, trees
from jaxlm.errors import JaxlmError
from jaxlm.models.moe import Moe, by_group, capacity, places
from jaxlm.models.stack import unstack

# float32 sums in another order, answers of about 1; measured max 2e-6.
ATOL = 1e-5
RULES = tuple(base.default().sharding.rules)
TOGETHER = tuple((axis, ('replica', 'data', 'fsdp', 'expert') if axis == 'act_batch' else to) for axis, to in RULES)


def test_stretches_of_rows_meet_their_matrices_inside_any_number_of_vmaps():
  rng = np.random.default_rng(0)
  sizes = np.array([[[2, 3, 1], [0, 7, 0]], [[1, 1, 1], [7, 0, 0]], [[2, 2, 3], [0, 0, 3]]], np.int32)
  x, kernel = rng.standard_normal((3, 2, 7, 4)), rng.standard_normal((3, 2, 3, 4, 5))

  def plain(x, kernel):
    owner = (np.arange(7)[:, None] >= np.cumsum(sizes, -1)[..., None, :]).sum(-1)  # 3: nobody's
    return jnp.stack([jnp.stack([jnp.stack([
        x[i, j, y] @ kernel[i, j, owner[i, j, y]] if owner[i, j, y] < 3 else jnp.zeros(5) for y in range(7)])
        for j in range(2)]) for i in range(3)])

  nested = lambda x, kernel: jax.vmap(jax.vmap(by_group))(x, kernel, jnp.asarray(sizes))
  given = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  np.testing.assert_allclose(nested(*given), plain(*given), atol=ATOL)
  slope = lambda fn: jax.grad(lambda *given: (fn(*given) ** 2).sum(), (0, 1))(*given)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), slope(jax.jit(nested)), slope(plain))


@pytest.fixture(scope='session')
def mixture_of(model_of):
  """(**config.model.moe, and `mlp` overrides) -> (the layer, random parameters): 8 experts of width 16, gated."""
  def build(seed=0, mlp=(), compute_dtype='float32', layout=None, **moe):
    moe = dict(num_experts=8, top_k=2, width=16) | moe
    model = model_of(compute_dtype=compute_dtype, embedding=dict(width=32), moe=moe,
                     mlp=dict(activation='silu', gated=True, bias=False) | dict(mlp))
    layer = Moe(model.config, layout or model.layout)
    shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((8, 2, 32)),
                                          jnp.ones((8, 2), jnp.int32)))['params']
    rng = np.random.default_rng(seed)
    params = trees.map_paths(lambda path, x: ((1.0 if 'router' in path else 0.3) * rng.standard_normal(x.shape))
                             .astype(x.dtype), shapes)
    return layer, params
  return build


def _inputs(B=2, T=12, seed=1):
  return np.random.default_rng(seed).standard_normal((B, T, 32)).astype(np.float32)


def _run(layer, params, x_BTD, segments_BT=None, **options):
  segments_BT = np.ones(x_BTD.shape[:2], np.int32) if segments_BT is None else segments_BT
  return jax.jit(functools.partial(layer.apply, **options))({'params': params}, x_BTD, jnp.asarray(segments_BT))


# ---- against NumPy -----------------------------------------------------------------------------------------------

_sigmoid = lambda x: 1 / (1 + np.exp(-x))


def _reference(moe, params, x_BTD):
  """(answers of all experts, weighed, in float64; chosen experts [B, T, K]), a token at a time."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  out, chosen = np.zeros(x_BTD.shape), []
  zero = lambda name: p['experts'][name].get('bias', np.zeros(p['experts'][name]['kernel'].shape[::2]))
  for at in np.ndindex(*x_BTD.shape[:2]):
    x_D = x_BTD[at].astype(np.float64)
    logits_E = x_D @ p['router']['kernel']
    score_E = _sigmoid(logits_E) if moe.router == 'sigmoid' else np.exp(logits_E) / np.exp(logits_E).sum()
    by_E = score_E + p['router'].get('bias', 0)
    groups = by_E.reshape(moe.num_groups, -1)
    best = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1), kind='stable')[:moe.top_groups]
    by_E = np.where(np.isin(np.arange(len(by_E)) // groups.shape[1], best), by_E, -np.inf)
    picks = np.argsort(-by_E, kind='stable')[:moe.top_k]
    share = score_E[picks] / (score_E[picks].sum() if moe.normalise else 1) * moe.scale
    for e, s in zip(picks, share):
      gate, up = (x_D @ p['experts'][n]['kernel'][e] + zero(n)[e] for n in ('gate', 'up'))
      out[at] += s * ((gate * _sigmoid(gate) * up) @ p['experts']['down']['kernel'][e] + zero('down')[e])
    if 'shared' in p:
      s = p['shared']
      hidden = x_D @ s['gate']['kernel']
      shared = (hidden * _sigmoid(hidden) * (x_D @ s['up']['kernel'])) @ s['down']['kernel']
      out[at] += shared * (_sigmoid(x_D @ p['shared_gate']['kernel']) if 'shared_gate' in p else 1)
    chosen.append(picks)
  return out, np.array(chosen).reshape(*x_BTD.shape[:2], -1)


KINDS = {
    'Mixtral': dict(),
    'one expert of many': dict(top_k=1, normalise=False),
    'Qwen2-MoE': dict(normalise=False, shared_width=24, shared_gate=True),
    'DeepSeek-V3': dict(router='sigmoid', router_bias=True, num_groups=4, top_groups=2, top_k=3, scale=2.5,
                        shared_width=16),
    'biases': dict(mlp=dict(bias=True)),
}


@pytest.mark.parametrize('mode', ['dropless', 'capacity'])
@pytest.mark.parametrize('kind', KINDS)
def test_answers_equal_all_experts_in_float64(kind, mode, mixture_of):
  layer, params = mixture_of(mode=mode, capacity_factor=8.0, **KINDS[kind])  # room for all
  x_BTD = _inputs()
  want = _reference(layer.config.moe, params, x_BTD)[0]
  np.testing.assert_allclose(_run(layer, params, x_BTD)[0], want, atol=ATOL)


@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_losses_equal_brute_force_over_real_tokens(router, mixture_of):
  layer, params = mixture_of(router=router, router_bias=True)
  x_BTD, segments_BT = _inputs(), np.array([[1] * 12, [1] * 4 + [2] * 3 + [0] * 5])
  _, chosen = _reference(layer.config.moe, params, x_BTD)
  got = _run(layer, params, x_BTD, segments_BT)[1]
  for b, length in enumerate((12, 7)):
    logits_TE = x_BTD[b, :length].astype(np.float64) @ params['router']['kernel']
    score_TE = _sigmoid(logits_TE) if router == 'sigmoid' else np.exp(logits_TE)
    prob_TE = score_TE / score_TE.sum(-1, keepdims=True)
    balance = 8 * sum((chosen[b, :length] == e).sum() / length * prob_TE[:, e].mean() for e in range(8))
    np.testing.assert_allclose(got['balance'][b], balance, rtol=1e-5)
    np.testing.assert_allclose(got['router_z'][b], (np.log(np.exp(logits_TE).sum(-1)) ** 2).mean(), rtol=1e-5)


def test_gradients_equal_those_of_all_experts_at_once(mixture_of):
  layer, params = mixture_of(shared_width=24, shared_gate=True, router_bias=True)
  x_BTD, mix_BTD = _inputs(), _inputs(seed=2)

  def dense(params, x_BTD):
    score_BTE = jax.nn.softmax(x_BTD @ params['router']['kernel'])
    top_BTE = jax.nn.one_hot(jax.lax.top_k(score_BTE + params['router']['bias'], 2)[1], 8).sum(2)
    share_BTE = score_BTE * top_BTE / (score_BTE * top_BTE).sum(-1, keepdims=True)
    into = lambda name: jnp.einsum('BTD,EDF->BTEF', x_BTD, params['experts'][name]['kernel'])
    y = jnp.einsum('BTEF,EFD,BTE->BTD', jax.nn.silu(into('gate')) * into('up'), params['experts']['down']['kernel'],
                   share_BTE)
    s = params['shared']
    shared = (jax.nn.silu(x_BTD @ s['gate']['kernel']) * (x_BTD @ s['up']['kernel'])) @ s['down']['kernel']
    return y + jax.nn.sigmoid(x_BTD @ params['shared_gate']['kernel']) * shared

  ones_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
  sparse = lambda params, x_BTD: layer.apply({'params': params}, x_BTD, ones_BT)[0]
  got, want = (jax.jit(jax.grad(lambda p, x: (f(p, x) * mix_BTD).sum(), (0, 1)))(params, x_BTD)
               for f in (sparse, dense))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL * max(1, np.abs(b).max())), got, want)
  assert not got[0]['router']['bias'].any()  # it chooses, and is not learned


# ---- capacity ----------------------------------------------------------------------------------------------------


def test_choices_without_a_place_count_nothing_and_earlier_tokens_go_first(mixture_of):
  layer, params = mixture_of(mode='capacity', capacity_factor=1.0)
  x_BTD, segments_BT = _inputs(T=16), np.array([[1] * 16, [1] * 9 + [0] * 7])
  _, chosen = _reference(layer.config.moe, params, x_BTD)
  C = capacity(layer.config.moe, 16)
  assert C == 4
  dropped = np.zeros((2, 16, 2), bool)
  for b in range(2):
    taken = np.zeros(8, int)
    for t, k in np.ndindex(16, 2):
      if segments_BT[b, t]:
        dropped[b, t, k] = taken[chosen[b, t, k]] >= C
        taken[chosen[b, t, k]] += 1
  assert 0 < dropped.sum() < dropped.size / 2
  (y_BTD, _), told = _run(layer, params, x_BTD, segments_BT, mutable=['moe'])
  np.testing.assert_array_equal(told['moe']['dropped'][0], dropped)
  assert not y_BTD[1, 9:].any()
  neither = dropped.all(-1)
  assert not np.asarray(y_BTD)[neither].any() and np.asarray(y_BTD)[~neither & (segments_BT > 0)].any(-1).all()


def test_no_token_loses_its_place_to_a_later_one(mixture_of):
  layer, params = mixture_of(mode='capacity', capacity_factor=1.0)
  x_BTD = _inputs(T=16)
  later = x_BTD.copy()
  later[:, 9:] = _inputs(T=16, seed=5)[:, 9:]
  a, b = (_run(layer, params, x)[0] for x in (x_BTD, later))
  np.testing.assert_array_equal(a[:, :9], b[:, :9])
  assert (a[:, 9:] != b[:, 9:]).any()


def test_places_are_given_once():
  rng = np.random.default_rng(0)
  experts_BTK = jnp.asarray(np.argsort(rng.random((3, 10, 4)), -1)[..., :2])
  share_BTEC, found_BTK = places(experts_BTK, jnp.ones((3, 10, 2)), 4, 3)
  assert (share_BTEC.sum(1) <= 1).all() and share_BTEC.sum() == found_BTK.sum()


# ---- against transformers ----------------------------------------------------------------------------------------


def _copy(module, params):
  """Our weights into transformers' module."""
  import torch
  t = lambda w: torch.tensor(np.asarray(w))
  experts = params['experts']
  with torch.no_grad():
    module.gate.weight.copy_(t(params['router']['kernel'].T))
    into = np.concatenate([experts['gate']['kernel'], experts['up']['kernel']], -1)
    module.experts.gate_up_proj.copy_(t(into.swapaxes(1, 2)))
    module.experts.down_proj.copy_(t(experts['down']['kernel'].swapaxes(1, 2)))
    if 'bias' in params['router']:
      module.gate.e_score_correction_bias.copy_(t(params['router']['bias']))
    if 'shared' in params:
      shared = module.shared_expert if hasattr(module, 'shared_expert') else module.shared_experts
      for name in ('gate', 'up', 'down'):
        getattr(shared, f'{name}_proj').weight.copy_(t(params['shared'][name]['kernel'].T))
    if 'shared_gate' in params:
      module.shared_expert_gate.weight.copy_(t(params['shared_gate']['kernel'].T))


def _twin(kind, moe):
  """The same layer in transformers."""
  sizes = dict(hidden_size=32, num_experts_per_tok=moe.top_k, hidden_act='silu')
  if kind == 'Mixtral':
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
    return MixtralSparseMoeBlock(MixtralConfig(intermediate_size=16, num_local_experts=8, **sizes))
  if kind == 'Qwen2-MoE':
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock
    return Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(moe_intermediate_size=16, num_experts=8, norm_topk_prob=False,
                                                 shared_expert_intermediate_size=24, **sizes))
  from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
  return DeepseekV3MoE(DeepseekV3Config(moe_intermediate_size=16, n_routed_experts=8, n_group=4, topk_group=2,
                                        n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, **sizes))


@pytest.mark.parametrize('kind', ['Mixtral', 'Qwen2-MoE', 'DeepSeek-V3'])
def test_answers_equal_those_of_transformers(kind, mixture_of):
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  layer, params = mixture_of(**KINDS[kind])
  module = _twin(kind, layer.config.moe)
  _copy(module, params)
  x_BTD = _inputs()
  with torch.no_grad():
    want = module(torch.tensor(x_BTD))
  np.testing.assert_allclose(_run(layer, params, x_BTD)[0], want, atol=ATOL)


def test_the_balance_loss_of_one_row_is_that_of_transformers(mixture_of):
  torch = pytest.importorskip('torch')
  mixtral = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
  layer, params = mixture_of()
  x_BTD = _inputs(B=1)
  want = mixtral.load_balancing_loss_func((torch.tensor(x_BTD[0] @ params['router']['kernel']),), 8, 2)
  np.testing.assert_allclose(_run(layer, params, x_BTD)[1]['balance'][0], want, rtol=1e-5)


# ---- in a model --------------------------------------------------------------------------------------------------


def _model(model_of, visibility='causal', compute_dtype='float32', moe=(), **overrides):
  return model_of(visibility, compute_dtype, embedding=dict(width=32), moe=dict(num_experts=4, width=16) | dict(moe),
                  **overrides)


def test_packed_documents_have_the_logits_of_each_alone(model_of, params_of):
  model = _model(model_of)
  params, tokens = params_of(model), np.random.default_rng(0).integers(0, 29, 12)
  segments = np.array([1] * 7 + [2] * 5)
  row = lambda pick: [np.pad(x[pick], (0, 12 - pick.sum())) for x in (
      tokens, segments, np.concatenate([np.arange(7), np.arange(5)]))]
  rows = [np.stack(x) for x in zip(*(row(p) for p in (segments > 0, segments == 1, segments == 2)))]
  both, first, second = jax.jit(model.apply)({'params': params}, dict(zip(('tokens', 'segment_ids', 'positions'),
                                                                       map(jnp.asarray, rows)))).logits
  np.testing.assert_allclose(both[:7], first[:7], atol=ATOL)
  np.testing.assert_allclose(both[7:], second[:5], atol=ATOL)


@pytest.mark.parametrize('moe, mixtures', [(dict(), 4), (dict(every=2), 2), (dict(every=2, first=1), 2),
                                           (dict(first=1), 3)], ids=str)
def test_scanned_layers_equal_unrolled_ones_and_losses_are_means_over_mixtures(moe, mixtures, model_of, params_of):
  model = _model(model_of, num_layers=4, moe=moe)
  params, batch = params_of(model), {'tokens': jax.random.randint(jax.random.key(0), (2, 8), 0, 29)}
  single = model.clone(config=dataclasses.replace(model.config, scan=False))
  layers = unstack(params, model.config)
  assert sum('router' in layer['mlp'] for layer in layers['stack'].values()) == mixtures
  want, got = jax.jit(single.apply)({'params': layers}, batch), jax.jit(model.apply)({'params': params}, batch)
  np.testing.assert_allclose(got.logits, want.logits, atol=ATOL)
  for name in ('balance', 'router_z'):
    np.testing.assert_allclose(got.aux[name], want.aux[name], rtol=1e-5)
  assert got.aux['balance'].shape == (2,) and (got.aux['balance'] < 4).all()  # 2 where all is even; a sum would be 8


def test_routers_of_future_heads_are_balanced_too(model_of, params_of):
  model = _model(model_of, num_layers=2, future_heads=1)
  params, batch = params_of(model), {'tokens': jax.random.randint(jax.random.key(0), (2, 8), 0, 29)}
  balance = lambda params: jax.jit(model.apply)({'params': params}, batch).aux['balance'].sum()
  found = jax.grad(balance)(params)['future_0']['mlp']['router']['kernel']
  assert np.abs(np.asarray(nn.unbox(found))).max() > 0 and balance(params) < 8


def test_an_encoders_mixtures_count_too(model_of, params_of):
  model = _model(model_of, structure='encoder_decoder', encoder_layers=2, num_layers=2)
  tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 29)
  params, apply = params_of(model), jax.jit(model.apply)
  aux = lambda source: apply({'params': params}, {'tokens': tokens, 'source_tokens': source}).aux['balance']
  assert (1 < aux(tokens)).all() and (aux(tokens) < 4).all() and (aux(tokens) != aux(tokens[:, ::-1])).all()


@pytest.mark.parametrize('mode, mesh, rules, half', [
    ('dropless', dict(data=8), RULES, False),
    ('dropless', dict(data=2, fsdp=2, tensor=2), RULES, True),
    ('dropless', dict(data=2, expert=4), RULES, False),                        # tokens are on all that share them
    ('dropless', dict(fsdp=2, expert=2, tensor=2), TOGETHER, True),            # tokens are gathered
    ('dropless', dict(seq=2, fsdp=2, expert=2), TOGETHER, False),
    ('dropless', dict(data=4, pipe=2), RULES, True),                           # one axis is not manual
    ('capacity', dict(data=2, expert=4), RULES, False),
    ('capacity', dict(fsdp=2, expert=2, tensor=2), TOGETHER, True),
], ids=lambda value: ' '.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else
    'together' if value is TOGETHER else 'apart' if value is RULES else None)
def test_a_sharded_mixture_equals_one_on_one_device(mode, mesh, rules, half, mixture_of):
  changes = dict(mode=mode, mlp=dict(bias=True), shared_width=16)
  alone, params = mixture_of(**changes)
  x_BTD, mix_BTD = _inputs(8), _inputs(8, seed=2)
  segments_BT = jnp.asarray(np.arange(12) < 12 - np.arange(8)[:, None], jnp.int32)

  def step(layer):
    def loss(params, x_BTD):
      y_BTD, aux = layer.apply({'params': params}, x_BTD, segments_BT)
      return (y_BTD.astype(jnp.float32) * mix_BTD).sum() + sum(v.sum() for v in aux.values()), y_BTD
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

  want = step(alone)(params, x_BTD)
  layout = sharding.Layout(sharding.make_mesh(mesh), rules)
  spread = mixture_of(layout=layout, **changes)[0]
  boxed = jax.eval_shape(spread.init, jax.random.key(0), x_BTD, segments_BT)['params']
  placed = jax.device_put(params, sharding.param_shardings(nn.meta.unbox(boxed), sharding.logical_axes(boxed), layout))
  x_placed = jax.device_put(x_BTD, layout.sharding(('act_batch', 'act_length', None), x_BTD.shape))
  got = step(spread)(placed, x_placed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL * max(1, np.abs(b).max())), got, want)
  if not half:
    return
  # bfloat16 keeps 8 bits, and a close choice may fall otherwise: so most answers are near. Measured median 0.005.
  (_, y_BTD), grads = step(mixture_of(layout=layout, compute_dtype='bfloat16', **changes)[0])(placed, x_placed)
  assert np.isfinite(np.asarray(y_BTD, np.float32)).all() and all(
      np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(grads))
  assert np.median(np.abs(np.asarray(y_BTD, np.float32) - want[0][1])) < 0.05


def test_no_tokens_are_gathered_where_experts_are_not_spread(mixture_of):
  layout = sharding.Layout(sharding.make_mesh(dict(data=8)), RULES)
  layer, params = mixture_of(layout=layout)
  x = jax.ShapeDtypeStruct((8, 12, 32), jnp.float32, sharding=layout.batch((8, 12, 32)))
  run = jax.jit(lambda p, x: layer.apply({'params': p}, x, jnp.ones((8, 12), jnp.int32))[0])
  text = run.lower(params, x).compile().as_text()
  assert not any(name in text for name in ('all-gather', 'all-to-all', 'collective-permute'))


def test_numbers_that_do_not_fit_are_refused(mixture_of):
  for told, moe in (('num_groups=3', dict(num_groups=3)), ('top_groups=3', dict(num_groups=2, top_groups=3)),
                    ('top_k=5', dict(num_groups=2, top_groups=1, top_k=5)), ('top_k=9', dict(top_k=9))):
    with pytest.raises(JaxlmError, match=told):
      mixture_of(**moe)
  with pytest.raises(JaxlmError, match='expert=6'):
    mixture_of(num_experts=6, layout=sharding.Layout(sharding.make_mesh(dict(data=2, expert=4)), RULES))
