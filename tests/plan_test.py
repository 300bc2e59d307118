"""The bill before the job: what is read from a program is what is in it, and formulas agree with the compiler."""
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxlm import bill, hardware, liveness, search, sharding, trees
from jaxlm import config as base
from jaxlm.hlo import Program, _first_group
from jaxlm.types import JaxlmError

ROOT = pathlib.Path(__file__).parents[1]


# ---- reading a program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('text, group', [
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [0, 2, 4, 6]),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", [0, 1]),
    ("mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
    ("mesh['a'=8] {'a':(1)2}", [0, 4]),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [0, 1]),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
    ('[2,4]<=[4,2]T(1,0)', [0, 2, 4, 6]),
    ('[4,2]<=[8]', [0, 1]),
    ('{{0,3},{1,2}}', [0, 3]),
    ('{}', [0, 1, 2, 3, 4, 5, 6, 7])])
def test_groups_of_devices_are_read_in_each_of_their_forms(text, group):
  assert _first_group(text, 8) == group


@pytest.fixture(scope='module')
def looped():
  """Three rounds of x @ w over a mesh, w split over fsdp, and a gradient that is split as w is."""
  layout = sharding.Layout(sharding.make_mesh(dict(fsdp=4, tensor=2)), ())
  put = lambda *spec: NamedSharding(layout.mesh, P(*spec))

  def loss(w, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0].sum()

  def step(w, x):
    return jax.lax.with_sharding_constraint(jax.grad(loss)(w, x), put('fsdp'))
  w, x = (jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=put('fsdp')),
          jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=put('fsdp')))
  compiled = jax.jit(step, out_shardings=put('fsdp')).lower(w, x).compile()
  return compiled, Program(compiled.as_text(), layout.mesh.shape)


def test_products_count_as_often_as_their_loop_runs(looped):
  dots = looped[1].dots()
  assert all(dot.counted for dot in dots)
  assert sum(dot.flops * dot.times for dot in dots) == 3 * 3 * 2 * 8 * 64 * 64  # rows of one device; backward twice


def test_messages_tell_their_axis_their_size_and_how_often(looped):
  messages = looped[1].messages()
  assert {m.axes for m in messages} == {('fsdp',)} and {m.size for m in messages} == {4}
  gathered = [m for m in messages if m.kind == 'all-gather']
  assert {m.bytes for m in gathered} == {64 * 64 * 4} and all(m.sent == 0.75 * m.bytes for m in gathered)
  reduced = [m for m in messages if m.emitted in ('all-reduce', 'reduce-scatter')]
  assert {m.kind for m in reduced} == {'reduce-scatter'}


# ---- a step ------------------------------------------------------------------------------------------------------


def config_of(**changes):
  config = base.smoke(base.default())
  config.update(batch_size=16)
  config.mesh.data = 1
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


MESHES = {
    'fsdp=4 × tensor=2, full remat': {'mesh.fsdp': 4, 'mesh.tensor': 2, 'model.remat': 'full'},
    'pipe=4 × data=2': {'mesh.pipe': 4, 'mesh.data': 2},
    'seq=8, ring': {'mesh.seq': 8, 'model.attention.kernel': 'ring'},
    'data=8, accumulated': {'mesh.data': 8, 'accumulation': 2},
}


@pytest.fixture(scope='module', params=MESHES)
def step(request):
  config = config_of(**MESHES[request.param])
  return config, bill.compiled(config, bill._sizes(config, 8))


def test_modelled_temporaries_are_near_the_compilers(step):
  modelled, _ = liveness.fullest(step[1].program)
  print(modelled, step[1].measured, modelled / step[1].measured)
  assert abs(modelled / step[1].measured - 1) < 0.1


def test_state_bytes_are_those_of_the_shards(step):
  memory = bill._memory(step[1].parts.shapes, step[1], 'float32')
  held = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  assert memory['parameters'] == held(step[1].parts.shapes.state.params)
  assert memory['optimizer'] == held(step[1].parts.shapes.state.opt_state)


def test_a_bill_adds_up():
  config = config_of(**{'mesh.fsdp': 8})
  found = bill.make(config, 'h100', 8, bill.Assumptions(price_per_hour=2.0, tokens=1e9))
  assert {'params_total', 'devices', 'bytes_per_device', 'flops_per_step', 'step_s'} <= found.keys()
  assert found['params_total'] == sum(found['parameters'].values())
  assert found['job']['money'] == pytest.approx(2.0 * found['job']['device_hours'])
  assert found['job']['days'] == pytest.approx(1e9 / (16 * 64) * found['step_s'] / 86400)
  assert 1.0 < found['flops']['program_over_model'] < 1.5  # dense scores are computed whole, the mask asks for half
  json.dumps(found)
  assert 'DOES NOT' not in bill.table(found) and 'm  ' in bill.table(found)


def test_sustained_speed_gives_the_money_that_is_in_print():
  """GPT-3: 3.14e23 FLOPs; on V100s at 28 TFLOP/s and 1.5 an hour about 4.6 million."""
  flops = 3.14e23
  hours = flops / 28e12 / 3600
  assert hours * 1.5 == pytest.approx(4.6e6, rel=0.02)


# ---- meshes that are too large, or wrong -------------------------------------------------------------------------


def test_only_data_and_replica_shrink():
  sizes = sharding.mesh_sizes(dict(pipe=35, tensor=8, data=8), 2240)
  assert bill.shrunk(sizes) == sizes | {'data': 4}
  palm = sharding.mesh_sizes(dict(tensor=12, fsdp=128, data=2, replica=2), 6144)
  assert bill.shrunk(palm) == palm | {'data': 1, 'replica': 1}
  with pytest.raises(JaxlmError, match='fsdp=4096 are more devices than the 2048 that can be simulated'):
    bill.shrunk(sharding.mesh_sizes(dict(fsdp=4096), 4096))


@pytest.mark.parametrize('arguments, line', [
    (['--hardware=h1000'], "error: Unknown hardware 'h1000'. Known: a100, h100, h100_pcie, h200, tpu_v4, tpu_v5e, tpu_v5p, "
                           'tpu_v6e, v100; or pass "module:attribute". Did you mean \'h100\'?'),
    ([], '--devices is missing; config.mesh leaves one axis open (-1)'),
    (['--devices=12', '--config.mesh.fsdp=5'], 'config.mesh: fsdp=5 needs 5 devices, there are 12'),
    (['--devices=4096', '--config.mesh.data=1', '--config.mesh.fsdp=4096'], 'more devices than the 2048'),
    (['--devices=8', '--config.batch_size=12'], 'does not divide by mesh axis fsdp=8'),
    (['--devices=8', '--output=nowhere/plan.json'], 'its folder is not there')])
def test_a_plan_that_cannot_be_made_is_one_clear_line(arguments, line):
  done = subprocess.run([sys.executable, '-m', 'jaxlm.plan', f'--config={ROOT}/experiments/gpt2.py:smoke', *arguments],
                        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
  told = [text for text in done.stderr.splitlines() if text.startswith('error:')]
  assert done.returncode == 2 and len(told) == 1 and line in told[0], done.stderr


def test_the_program_writes_its_table_and_json(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'jaxlm.plan', f'--config={ROOT}/experiments/gpt2.py:smoke', '--devices=16',
                         '--hardware=a100', f'--output={tmp_path}/plan.json', '--config.mesh.tensor=2'],
                        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['devices'] == 16 and found['mesh'] == {'fsdp': 8, 'tensor': 2} and 'all-reduce over tensor' in done.stdout


def test_a_search_ranks_what_fits_first():
  config = config_of(**{'mesh.data': -1})
  found = search.ranked(config, 'a100', 8, bill.Assumptions(), tries=3)
  assert len(found) == 3 and [one['step_s'] for one in found] == sorted(one['step_s'] for one in found)
  assert len(search.table(found).splitlines()) == 4


@pytest.mark.parametrize('name', hardware.HARDWARE)
def test_hardware_is_found_by_what_devices_call_themselves(name):
  row = hardware.named(name)
  assert all(hardware.of_device(f'{kind} 80GB HBM3')[0] == name for kind in row.kinds if kind != 'TPU v5')
