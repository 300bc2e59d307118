"""Frozen kernels in codes: what they give back, what they cost, and that nothing else of a model notices."""
import dataclasses
import functools
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import sharding, state, train, trees
from jaxlm.errors import JaxlmError
from jaxlm.models import peft, quantised
from jaxlm.models.config import PeftConfig
from jaxlm.models.products import product
from jaxlm.models.stack import restack, unstack
from jaxlm.sharding import Layout

V, T = 29, 6
EVERYWHERE = (('.*(query|key|value|out|up|down|gate)', True),)
BASES = ('int8', 'nf4')
STRUCTURES = {
    'decoder': {},
    'encoder_decoder': dict(structure='encoder_decoder', encoder_layers=2, positions=dict(kind='buckets')),
    'experts': dict(moe=dict(num_experts=4)),
    'latent': dict(positions=dict(kind='rope'), attention=dict(latent=dict(kv_rank=8, q_rank=12, rope_dim=4,
                                                                           value_dim=8))),
    'one_layer': dict(share_layers=True),
}


def adapted(model, base, **given):
  """The model with a method, LoRA everywhere by default, beside a base that is kept as `base` says."""
  given = dict(method='lora', sites=EVERYWHERE, rank=4, block=16) | given
  return model.clone(config=dataclasses.replace(model.config, peft=PeftConfig(base=base, **given)))


def batch_of(model, rows=2):
  ids_BT = np.random.default_rng(0).integers(0, V, (rows, T)).astype(np.int32)
  return {'tokens': ids_BT} | ({'source_tokens': ids_BT} if model.config.structure == 'encoder_decoder' else {})


def moved(model, params):
  """A delta far from its start, beside these weights."""
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch_of(model)))['params']
  rng = np.random.default_rng(1)
  draw = lambda path, x: (path.endswith(('magnitude', 'scale')) + 0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
  return trees.combine(params, trees.map_paths(draw, trees.partition(shapes, peft.is_delta)[0]))


@functools.partial(jax.jit, static_argnums=0)
def answers(model, delta, rest, batch):
  """(logits, gradients of something that all of them enter by the delta)."""
  def loss(delta):
    logits = model.apply({'params': trees.combine(rest, delta)}, batch).logits[..., :V]
    return jnp.sin(logits).sum(), logits
  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(delta)
  return logits, grads


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  return model.apply({'params': params}, batch_of(model)).logits[..., :V]


def of(model, params):
  return answers(model, *trees.partition(params, peft.is_delta), batch_of(model))


def assert_same(got, want, within=0.0):
  """Trees are alike, each leaf `within` this part of its largest element."""
  got, want = trees.flatten(got), trees.flatten(want)
  assert list(got) == list(want)
  for path in got:
    atol = within * float(np.abs(want[path]).max())
    np.testing.assert_allclose(got[path], want[path], rtol=0, atol=atol, err_msg=path)


@pytest.fixture(scope='session')
def pair(model_of, params_of):
  """(structure, base, more of peft) -> (plain model, its weights as codes give them, adapted model, parameters)."""
  def make(structure, kept, **given):
    plain = model_of(**STRUCTURES[structure])
    model = adapted(plain, kept, **given)
    params = quantised.quantised(params_of(plain), model.config)
    return plain, quantised.restored(params, model.config), model, moved(model, params)
  return make


# ---- codes -------------------------------------------------------------------------------------------------------


def stated(line, kept, size):
  """(codes, scales, values) of a line of weights, one block after the other, in NumPy."""
  blocks = line.reshape(-1, size)
  largest = np.abs(blocks).max(1, keepdims=True)
  unit = np.divide(blocks, largest, out=np.zeros_like(blocks), where=largest > 0)
  if kept == 'int8':
    codes = np.rint(unit * 127)
    return codes.ravel(), largest[:, 0] / 127, (codes * largest / 127).ravel()
  codes = np.abs(unit[..., None] - quantised.NF4).argmin(-1)
  span = np.ptp(largest) or 1
  scales = np.rint(255 * (largest - largest.min()) / span)
  packed = codes.ravel()[::2] + 16 * codes.ravel()[1::2]
  return packed, scales[:, 0], (quantised.NF4[codes] * (largest.min() + scales * span / 255)).ravel()


@pytest.mark.parametrize('kept', BASES)
@pytest.mark.parametrize('shape, dim, size', [((48, 3, 2), 0, 16), ((2, 3, 64), -1, 16), ((2, 36, 5), 1, 12)])
def test_codes_are_those_of_the_plain_statement(kept, shape, dim, size):
  kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  lines = np.moveaxis(kernel, dim, -1)
  lines[0, 0, :size] = 0
  parts = quantised.encoded(jnp.asarray(kernel), PeftConfig(base=kept, block=16), dim, 'kernel')
  names = {'codes': 0, 'scales': 1}
  found = {name: np.moveaxis(np.asarray(parts[name]), dim, -1) for name in names}
  values = np.moveaxis(np.asarray(quantised.whole(parts, jnp.float32)), dim, -1)
  for index in np.ndindex(lines.shape[:2]):
    want = stated(lines[index].astype(np.float64), kept, size)
    np.testing.assert_array_equal(found['codes'][index], want[0])
    np.testing.assert_allclose(found['scales'][index], want[1], rtol=1e-6)
    np.testing.assert_allclose(values[index], want[2], rtol=1e-6, atol=1e-7)
  step = np.abs(lines.reshape(*lines.shape[:2], -1, size)).max(-1).repeat(size, -1) / 127
  if kept == 'int8':
    assert (np.abs(values - lines) <= step * 0.50001).all()


@pytest.mark.parametrize('kept', BASES)
def test_what_codes_gave_back_has_the_same_codes(kept):
  settings = PeftConfig(base=kept, block=16)
  kernel = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256, 32)), jnp.float32)
  once = quantised.encoded(kernel, settings, 1, 'kernel')
  twice = quantised.encoded(quantised.whole(once, jnp.float32), settings, 1, 'kernel')
  for name in once:
    if once[name].dtype == jnp.float32:
      np.testing.assert_allclose(twice[name], once[name], rtol=3e-7)  # 127·(x / 127) rounds
    else:
      np.testing.assert_array_equal(twice[name], once[name])


def test_levels_of_four_bits_are_quantiles_of_the_normal_distribution():
  # Appendix E: 8 quantiles on the one side, 9 on the other, between the tails and the middle, which they share.
  end = 1 - (1 / 30 + 1 / 32) / 2
  side = lambda count: [statistics.NormalDist().inv_cdf(p) for p in np.linspace(end, 0.5, count)]
  levels = np.sort([-x for x in side(8)[:-1]] + side(9))
  np.testing.assert_allclose(quantised.NF4, levels / levels.max(), atol=2e-7)


def test_a_width_that_no_block_fits_is_refused_in_one_line():
  with pytest.raises(JaxlmError, match=r'mlp/up/kernel: dim 0 of 62 does not divide into even blocks of 4 to 16'):
    quantised.encoded(jnp.zeros((62, 8)), PeftConfig(base='nf4', block=16), 0, 'mlp/up/kernel')


@pytest.mark.parametrize('kept, least, most', [('int8', 8.5, 8.5), ('nf4', 4.15, 4.2)])
def test_a_weight_takes_so_many_bits(kept, least, most, model_of):
  attention = dict(num_heads=16, num_kv_heads=4, head_dim=64)
  model = adapted(model_of(width=1024, mlp=dict(width=3072), attention=attention), kept, block=64)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch_of(model)))['params']
  plain = adapted(model, 'same')
  whole = nn.meta.unbox(jax.eval_shape(plain.init, jax.random.key(0), batch_of(plain)))['params']
  found = sum(trees.num_bytes(leaf) for leaf in quantised.together(shapes).values() if quantised.is_parts(leaf))
  weights = sum(leaf.size for path, leaf in trees.flatten(whole).items()
                if quantised.is_kept(model.config.peft, path.split('/')[:-1]) and path.endswith('kernel'))
  assert weights == 2 * 1024 * (16 * 64 * 2 + 4 * 64 * 2 + 3072 * 2)
  assert least <= 8 * found / weights <= most


def test_nothing_whole_is_kept_for_the_backward_pass(model_of):
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 32), (32, 40)))
  parts = quantised.encoded(kernel, PeftConfig(base='nf4', block=16), 0, 'kernel')
  _, pull = jax.vjp(lambda x: product(model_of().layout, ('embed', 'mlp'), False, x, parts, None), x)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) < kernel.nbytes / 2
  dy = jnp.asarray(rng.standard_normal((3, 40)), jnp.float32)
  np.testing.assert_allclose(pull(dy)[0], dy @ quantised.whole(parts, jnp.float32).T, atol=1e-5)


# ---- models ------------------------------------------------------------------------------------------------------


def test_a_fresh_model_is_the_plain_one_in_codes(model_of):
  plain = model_of(**STRUCTURES['experts'])
  model = adapted(plain, 'nf4')
  fresh = lambda model: nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch_of(model)))['params']
  rest = trees.partition(fresh(model), peft.is_delta)[1]
  assert_same(rest, quantised.quantised(fresh(plain), model.config), 1e-6)
  assert {path.split('/')[-2] for path in trees.flatten(rest) if path.endswith('kernel')} == {'router'}


@pytest.mark.parametrize('structure', STRUCTURES)
def test_kept_kernels_have_the_shapes_and_the_axes_that_a_mesh_splits(structure, model_of, params_of):
  plain = model_of(**STRUCTURES[structure])
  model = adapted(plain, 'nf4')
  boxed = jax.eval_shape(model.init, jax.random.key(0), batch_of(model))['params']
  axes, rest = sharding.logical_axes(boxed), trees.partition(nn.meta.unbox(boxed), peft.is_delta)[1]
  made = quantised.quantised(params_of(plain), model.config)
  of_tree = lambda tree: {path: (leaf.shape, leaf.dtype) for path, leaf in trees.flatten(tree).items()}
  assert of_tree(made) == of_tree(rest)
  shapes = {path: leaf.shape for path, leaf in trees.flatten(rest).items()}
  kept = [path.removesuffix('/codes') for path in trees.flatten(rest) if path.endswith('/codes')]
  assert kept and all(len(axes[path]) == leaf.ndim for path, leaf in trees.flatten(rest).items())
  for path in kept:
    codes, ranges = axes[f'{path}/codes'], axes[f'{path}/ranges']
    assert axes[f'{path}/scales'] == codes
    blocked = [i for i, (of_codes, of_ranges) in enumerate(zip(codes, ranges)) if of_codes != of_ranges]
    # Of a latent's query the input is the latent's rank, which no mesh splits.
    assert [(codes[i], ranges[i], shapes[f'{path}/ranges'][i]) for i in blocked] == [('embed', None, 2)] or (
        structure == 'latent' and path.endswith('query/kernel') and not blocked)


def test_only_what_stays_is_kept():
  lora = PeftConfig(method='lora', base='nf4', also='.*slot_1/mlp/up/.*')
  home = lambda place: f'stack/period/{place}'.split('/')
  for place in ('slot_0/attention/query', 'slot_0/mlp/experts/up', 'slot_0/mlp/shared/down', 'slot_0/cross/out'):
    assert quantised.is_kept(lora, home(place))
    assert not quantised.is_kept(dataclasses.replace(lora, base='same'), home(place))
    assert not quantised.is_kept(dataclasses.replace(lora, method='none'), home(place))
  for place in ('slot_1/mlp/up', 'slot_0/mlp/router', 'slot_0/mlp/shared_gate', 'slot_0/attention_bottleneck/down',
                'slot_0/attention/prefix/key_value', 'slot_0/attention/recurrent'):
    assert not quantised.is_kept(lora, home(place))
  assert not quantised.is_kept(lora, ['head', 'dense'])


@pytest.mark.parametrize('structure, kept, given', [
    *(('decoder', kept, {}) for kept in BASES), ('decoder', 'nf4', dict(dora=True)),
    ('encoder_decoder', 'nf4', {}), ('experts', 'nf4', {}),
    ('experts', 'int8', dict(method='ia3', sites=())), ('decoder', 'nf4', dict(method='bottleneck', sites=()))])
def test_answers_and_gradients_are_those_of_the_weights_that_codes_give_back(structure, kept, given, pair):
  _, weights, model, params = pair(structure, kept, **given)
  whole = adapted(model, 'same', **given)
  got, want = of(model, params), of(whole, trees.combine(weights, trees.partition(params, peft.is_delta)[0]))
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)
  assert_same(got[1], want[1], 1e-5)
  assert max(float(jnp.abs(grad).max()) for grad in jax.tree.leaves(got[1])) > 1e-2


def test_at_the_start_answers_are_the_plain_models(pair):
  plain, weights, model, params = pair('decoder', 'nf4')
  start = trees.map_paths(lambda path, x: jnp.zeros_like(x) if path.endswith('lora/b') else x, params)
  np.testing.assert_allclose(of(model, start)[0], logits(plain, weights), atol=1e-5)


def test_scanned_is_unrolled(pair, params_of):
  plain, _, model, params = pair('experts', 'nf4')
  unrolled = model.clone(config=dataclasses.replace(model.config, scan=False))
  single = unstack(params, model.config)
  np.testing.assert_allclose(logits(unrolled, single), of(model, params)[0], atol=1e-5)
  assert_same(restack(single, model.config), params)
  one_by_one = quantised.quantised(unstack(params_of(plain), plain.config), unrolled.config)
  assert_same(one_by_one, trees.partition(single, peft.is_delta)[1], 1e-6)


@pytest.mark.parametrize('structure, kept, sizes', [
    ('decoder', 'nf4', dict(fsdp=2, tensor=2, data=2)), ('experts', 'int8', dict(fsdp=2, tensor=2, expert=2)),
    ('decoder', 'nf4', dict(pipe=2, fsdp=2, tensor=2))])
def test_many_devices_answer_as_one(structure, kept, sizes, pair):
  _, _, model, params = pair(structure, kept)
  layout = Layout(sharding.make_mesh(sizes), model.layout.rules)
  spread = model.clone(layout=layout)
  boxed = jax.eval_shape(model.init, jax.random.key(0), batch_of(model))['params']
  shardings = sharding.param_shardings(nn.meta.unbox(boxed), sharding.logical_axes(boxed), layout)
  split = [path for path, x in trees.flatten(shardings).items() if path.endswith('codes') and not x.is_fully_replicated]
  assert len(split) >= 6
  placed = jax.device_put(params, shardings)
  batch, parts = batch_of(model, rows=8), lambda params: trees.partition(params, peft.is_delta)
  got, want = answers(spread, *parts(placed), batch), answers(model, *parts(params), batch)
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)
  assert_same(got[1], want[1], 1e-5)


@pytest.mark.parametrize('given', [{}, dict(dora=True)])
def test_merged_weights_are_whole_and_compute_what_the_adapted_model_does(given, pair):
  plain, _, model, params = pair('decoder', 'nf4', **given)
  single = plain.clone(config=dataclasses.replace(plain.config, scan=False))
  merged = peft.merge(unstack(params, model.config), model.config.peft)
  assert not any(map(quantised.is_parts, quantised.together(merged).values()))
  np.testing.assert_allclose(logits(single, merged), of(model, params)[0], atol=1e-5)


def test_lengths_of_dora_begin_as_those_of_the_weights_that_codes_give_back(pair):
  _, weights, model, params = pair('decoder', 'nf4', dora=True)
  delta = trees.partition(params, peft.is_delta)[0]
  assert_same(trees.partition(peft.settled(params), peft.is_delta)[0],
              trees.partition(peft.settled(trees.combine(weights, delta)), peft.is_delta)[0], 1e-6)


def test_a_training_step_moves_the_delta_and_no_code():
  config = base.smoke(base.default())
  config.update(batch_size=2, seq_len=T)
  config.model.update(num_layers=2, width=32, vocab_pad_to=8)
  config.model.mlp.width = 48
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=8)
  config.model.peft.update(method='lora', base='nf4', block=16)
  config.optim.update(warmup_steps=0, lr=0.1)
  model = state.build_model(config, V, 'causal', sharding.single(config.sharding.rules))
  shapes = state.init_state(model, config)
  before, frozen = shapes.fresh(0)
  old, kernels = jax.device_get((before.params, frozen))
  assert {path.rpartition('/')[2] for path in trees.flatten(before.params)} == {'a', 'b'}

  def loss(params, batch, rng):
    total = jnp.sin(model.apply({'params': params}, batch).logits).sum()
    count = jnp.float32(batch['tokens'].size)
    return total, {'objective': (total, count), 'loss': (total, count)}

  after, metrics = train.make_step(loss, shapes, config)(before, frozen, batch_of(model))
  assert metrics['finite']
  assert_same(frozen, kernels)
  assert any(path.endswith('kernel/codes') for path in trees.flatten(frozen))
  assert list(trees.flatten(after.params)) == list(trees.flatten(old))
  assert max(np.abs(new - leaf).max() for new, leaf in zip(*map(jax.tree.leaves, (after.params, old)))) > 0
