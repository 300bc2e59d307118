"""Mesh and layout on eight simulated devices: specs, errors, bytes, rows of a host."""
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import config as base
from jaxlm import optim, sharding, train, trees
from jaxlm.errors import JaxlmError
from jaxlm.sharding import Layout, mesh_sizes

RULES = tuple(base.default().sharding.rules)


def _layout(rules=RULES, **sizes):
  return Layout(sharding.make_mesh(sizes), tuple(rules))


def _parameters(config, layout):
  """(shapes, logical axes) of a config's parameters."""
  model = train.build_model(config, 257, 'causal', sharding.single(layout.rules))
  boxed = jax.eval_shape(model.init, jax.random.key(0), {'tokens': jnp.zeros((8, 4), jnp.int32)})['params']
  return nn.meta.unbox(boxed), sharding.logical_axes(boxed)


# ---- the mesh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('given, filled', [
    (dict(data=-1), dict(data=8)),
    (dict(data=-1, fsdp=4), dict(data=2, fsdp=4)),
    (dict(fsdp=4, tensor=2), dict(fsdp=4, tensor=2)),
    (dict(data=-1, tensor=8), dict(tensor=8)),
    (dict(replica=2, data=2, tensor=-1), dict(replica=2, data=2, tensor=2)),
])
def test_one_open_axis_takes_the_devices_that_are_left(given, filled):
  assert {a: n for a, n in mesh_sizes(given, 8).items() if n > 1} == filled
  assert math.prod(mesh_sizes(given, 8).values()) == 8


@pytest.mark.parametrize('given, line', [
    (dict(data=-1, fsdp=-1), 'only one axis may be -1; got data and fsdp'),
    (dict(data=-1, tensor=3), '8 devices do not divide by 3'),
    (dict(data=2, tensor=2), 'data=2 × tensor=2 needs 4 devices, there are 8'),
    (dict(), 'all sizes 1 needs 1 devices, there are 8; change a size, or set one to -1'),
])
def test_sizes_that_do_not_fit_are_one_clear_line(given, line):
  with pytest.raises(JaxlmError, match=line):
    mesh_sizes(given, 8)


def test_every_axis_exists_and_neighbours_talk_on_the_last():
  mesh = _layout(fsdp=4, tensor=2).mesh
  assert tuple(mesh.shape) == sharding.MESH_AXES
  assert [d.id for d in mesh.devices.reshape(4, 2)[0]] == [0, 1]


# ---- specs -------------------------------------------------------------------------------------------------------

BLOCK = 'stack/period/slot_0/'
# parameter: its spec on data=8, on fsdp=8, on tensor=2 × fsdp=4
SPECS = {
    'embed/embedding': (P(None, None), P(None, 'fsdp'), P('tensor', 'fsdp')),
    'position_embed/embedding': (P(None, None), P(None, 'fsdp'), P(None, 'fsdp')),
    BLOCK + 'attention_norm/scale': (P(None, None), P(None, 'fsdp'), P(None, 'fsdp')),
    BLOCK + 'attention/query/kernel': (P(None, None, None, None), P(None, 'fsdp', None, None),
                                       P(None, 'fsdp', 'tensor', None)),
    BLOCK + 'attention/query/bias': (P(None, None, None), P(None, None, 'fsdp'), P(None, 'tensor', 'fsdp')),
    BLOCK + 'attention/key/bias': (P(None, None, None), P(None, None, 'fsdp'), P(None, 'tensor', 'fsdp')),
    BLOCK + 'attention/out/kernel': (P(None, None, None, None), P(None, None, None, 'fsdp'),
                                     P(None, 'tensor', None, 'fsdp')),
    BLOCK + 'mlp/up/kernel': (P(None, None, None), P(None, 'fsdp', None), P(None, 'fsdp', 'tensor')),
    BLOCK + 'mlp/up/bias': (P(None, None), P(None, 'fsdp'), P(None, ('tensor', 'fsdp'))),
    BLOCK + 'mlp/down/kernel': (P(None, None, None), P(None, None, 'fsdp'), P(None, 'tensor', 'fsdp')),
    'final_norm/bias': (P(None), P('fsdp'), P('fsdp')),
}


@pytest.mark.parametrize('number, sizes', enumerate([dict(data=8), dict(fsdp=8), dict(tensor=2, fsdp=4)]))
def test_parameters_are_laid_out_as_the_rules_say(number, sizes, tiny):
  layout = _layout(**sizes)
  shapes, axes = _parameters(tiny, layout)
  got = trees.flatten(sharding.param_shardings(shapes, axes, layout))
  assert {path: got[path].spec for path in SPECS} == {path: specs[number] for path, specs in SPECS.items()}
  if sizes != dict(data=8):
    assert all(not s.is_fully_replicated for s in got.values())


def test_the_earlier_rule_takes_a_mesh_axis():
  rules = (('a', 'fsdp'), ('b', ('fsdp', 'tensor')), ('c', None))
  layout = _layout(rules, fsdp=4, tensor=2)
  assert layout.spec(('a', 'b'), (8, 8)) == P('fsdp', 'tensor')
  assert layout.spec(('b', 'a'), (8, 8)) == P('tensor', 'fsdp')
  assert layout.spec(('b', 'c', None), (8, 8, 3)) == P(('fsdp', 'tensor'), None, None)


def test_a_second_rule_adds_where_it_divides_and_is_silent_where_not():
  rules = (('a', 'tensor'), ('a', 'fsdp'))
  layout = _layout(rules, fsdp=4, tensor=2)
  assert layout.spec(('a',), (8,)) == P(('tensor', 'fsdp'))
  assert layout.spec(('a',), (6,)) == P('tensor')


def test_dims_that_do_not_divide_name_the_parameter_the_dim_and_what_to_set(tiny):
  tiny.model.update(vocab_pad_to=1)
  layout = _layout(tensor=8)
  shapes, axes = _parameters(tiny, layout)
  with pytest.raises(JaxlmError) as e:
    sharding.param_shardings(shapes, axes, layout)
  assert str(e.value) == ('embed/embedding: dim 0 (vocab=257) does not divide by mesh axis tensor=8; '
                          'set config.model.vocab_pad_to to a multiple of it.')


@pytest.mark.parametrize('axis, remedy', [('heads', 'num_heads as a multiple'), ('mlp', 'config.model.mlp.width'),
                                          ('act_heads', 'num_heads as a multiple'), ('act_vocab', 'vocab_pad_to'),
                                          ('embed', 'config.model.width'),
                                          ('act_batch', 'config.batch_size'), ('kv_heads', 'config.sharding.rules')])
def test_each_axis_has_its_remedy(axis, remedy):
  with pytest.raises(JaxlmError, match=rf'x: dim 1 \({axis}=3\) does not divide by mesh axis .*; .*{remedy}'):
    _layout(fsdp=2, tensor=4).spec((None, axis), (5, 3), 'x')


def test_an_axis_without_a_rule_is_named():
  with pytest.raises(JaxlmError, match="w: no rule for logical axis 'rank'; add one to config.sharding.rules"):
    _layout(data=8).spec(('embed', 'rank'), (8, 8), 'w')


def test_a_rule_for_an_unknown_mesh_axis_is_named():
  with pytest.raises(JaxlmError, match="'embed' goes to unknown mesh axis 'fdsp'. Known: replica, pipe, data, fsdp"):
    _layout((('embed', 'fdsp'),), data=8).spec(('embed',), (8,))


def test_constrain_pins_an_activation_and_raises_on_an_unknown_axis():
  layout = _layout(data=4, tensor=2)
  x = jax.jit(lambda x: layout.constrain(x, 'act_batch', None, 'act_mlp'))(jnp.zeros((8, 3, 4)))
  assert x.sharding.is_equivalent_to(jax.sharding.NamedSharding(layout.mesh, P('data', None, 'tensor')), 3)
  with pytest.raises(JaxlmError, match="no rule for logical axis 'act_mpl'"):
    layout.constrain(jnp.zeros((8, 3, 4)), 'act_batch', None, 'act_mpl')


# ---- what a device holds -----------------------------------------------------------------------------------------


def _bytes_a_device(tree):
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_an_eighth_of_parameters_and_optimizer_state_lies_on_each_of_eight_devices(name, tiny):
  tiny.model.update(width=64)
  tiny.model.mlp.width = 256
  tiny.model.attention.update(num_heads=8, num_kv_heads=8, head_dim=8)
  tiny.optim.update(name=name, ema_decay=0.9)
  layout = _layout(fsdp=8)
  state = train.init_state(train.build_model(tiny, 257, 'causal', layout), tiny).state
  held = (state.params, state.opt_state, state.ema)
  assert _bytes_a_device(held) <= 1.02 / 8 * trees.num_bytes(held)


def test_factored_moments_are_whole_on_a_device_only_where_they_are_small(tiny):
  tiny.model.update(width=512)
  tiny.model.mlp.width = 2048
  tiny.model.attention.update(num_heads=8, num_kv_heads=8, head_dim=64)
  tiny.optim.name = 'adafactor'
  layout = _layout(fsdp=8)
  state = train.init_state(train.build_model(tiny, 257, 'causal', layout), tiny).state
  held = (state.params, state.opt_state)
  assert trees.num_bytes(state.opt_state) < 0.5 * trees.num_bytes(state.params)
  assert _bytes_a_device(held) <= 1.02 / 8 * trees.num_bytes(held)


def test_factored_moments_take_the_layout_of_the_dims_they_keep(tiny):
  tiny.optim.name = 'adafactor'
  tiny.optim.adafactor.min_dim = 8
  tiny.optim.weight_decay = 0.0
  layout = _layout(fsdp=4, tensor=2)
  state = train.init_state(train.build_model(tiny, 257, 'causal', layout), tiny).state
  found = {}
  for path, x in trees.flatten(state.opt_state).items():
    if path.endswith('mlp/up/kernel'):  # [layers, embed=32, mlp=64], embed over fsdp, mlp over tensor
      found[path.split('/stack/')[0].rpartition('/')[2]] = (x.shape, x.sharding.spec)
  assert found['v_row'] == ((2, 32), P(None, 'fsdp')) and found['v_col'] == ((2, 64), P(None, 'tensor'))
  assert found['v'] == ((2, 1), P())  # the whole moment is not kept


def test_explain_tells_every_parameter_and_its_bytes(tiny):
  layout = _layout(fsdp=4, tensor=2)
  shapes, axes = _parameters(tiny, layout)
  text = sharding.explain(shapes, axes, layout).splitlines()
  assert text[0].split() == ['parameter', 'shape', 'logical', 'axes', 'spec', 'bytes', 'a', 'device']
  assert {line.split()[0] for line in text[1:-1]} == set(trees.flatten(shapes))
  line = next(line for line in text if line.startswith('embed/embedding'))
  assert line.split('  ')[-1].strip() == f'{320 * 32 * 4 // 8:,}'
  assert '320×32' in line and 'vocab embed' in line and 'tensor, fsdp' in line
  whole = trees.num_bytes(shapes)
  held = sum(int(line.split()[-1].replace(',', '')) for line in text[1:-1])
  assert text[-1] == f'{held:,} of {whole:,} bytes on each device (fsdp=4 × tensor=2)'
  assert held < 1.05 / 8 * whole + 1024  # the position table is not split by tensor


def test_explain_of_one_device_says_so(tiny):
  layout = sharding.single(RULES)
  text = sharding.explain(*_parameters(tiny, layout), layout).splitlines()[-1]
  held, _, whole = text.split()[:3]
  assert held == whole and text.endswith('(one device)')


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sizes, parts', [(dict(data=8), 8), (dict(data=2, fsdp=2, tensor=2), 4), (dict(tensor=8), 1)])
def test_placed_rows_come_back_whole(sizes, parts):
  layout = _layout(**sizes)
  batch = {'tokens': np.arange(8 * 6).reshape(8, 6).astype(np.int32), 'example_ids': np.arange(8, dtype=np.int32)}
  assert layout.batch_parts == parts and layout.host_rows((8, 6)) == (0, 8)
  placed = layout.place(batch, 8)
  for key, x in batch.items():
    np.testing.assert_array_equal(placed[key], x)
    assert placed[key].sharding.shard_shape(x.shape)[0] == 8 // parts


def test_rows_that_do_not_divide_say_what_to_set():
  with pytest.raises(JaxlmError, match=r'batch: dim 0 \(act_batch=6\) does not divide by mesh axis data=8; '
                                       r'set config.batch_size'):
    _layout(data=8).batch((6, 4))


def test_compiler_options_compile_here():
  options = sharding.compiler_options(jax.devices()[0].platform)
  assert float(jax.jit(jnp.sin, compiler_options=options)(0.0)) == 0.0
  # The names of a GPU's are known to every backend of this version of XLA.
  assert float(jax.jit(jnp.sin, compiler_options=sharding.compiler_options('cuda'))(0.0)) == 0.0
  assert sharding.compiler_options('cpu', [('xla_cpu_experimental_ynn_fusion_type', None)]) == {}


def test_axes_lie_in_different_slices_from_the_outermost_on():
  device = lambda i, slice_index: types.SimpleNamespace(id=i, slice_index=slice_index, process_index=slice_index,
                                                        platform='cpu', device_kind='cpu')
  assert sharding._over_slices(sharding.mesh_sizes(dict(replica=2, fsdp=4), 8), 2)['replica'] == 2
  assert sharding._over_slices(sharding.mesh_sizes(dict(data=4, tensor=2), 8), 2)['data'] == 2
  grid = sharding.mesh_utils.create_hybrid_device_mesh([1, 4], [2, 1], [device(i, i % 2) for i in range(8)])
  assert [[d.slice_index for d in row] for row in grid] == [[0] * 4, [1] * 4]
  told = '3 slices do not divide by data=4 and the axes outside it; set config.mesh.replica'
  with pytest.raises(JaxlmError, match=told):
    sharding._over_slices(sharding.mesh_sizes(dict(data=4, fsdp=3), 12), 3)


def test_8_bits_are_refused_on_cards_that_would_imitate_them():
  def layout(capability):
    device = types.SimpleNamespace(device_kind='NVIDIA A100', compute_capability=capability)
    mesh = types.SimpleNamespace(shape={'pipe': 1}, size=1, devices=np.array([device]))
    return types.SimpleNamespace(mesh=mesh, platform='gpu')
  precision = types.SimpleNamespace(compute='bfloat16', products='float8')
  sharding.check_compute(precision, layout('9.0'))
  with pytest.raises(JaxlmError, match="products='float8' needs a card of compute capability 8.9 or more; NVIDIA A100 "
                                       "has 8.0. Set it to 'compute' here."):
    sharding.check_compute(precision, layout('8.0'))
