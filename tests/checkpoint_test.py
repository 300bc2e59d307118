"""What comes back is what was saved, on any mesh, whatever happens to the files; nothing valid is harmed."""
import json
import logging
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import seal, trees
from jaxlm.checkpoint import SLICE, Checkpoints
from jaxlm.errors import JaxlmError, RunFailed
from jaxlm.rundir import lock
from jaxlm.types import TrainState
from devices import xla_flags

DATA = {'examples': 96, 'skips': [[3, 7]]}


def make_state(seed: int = 0, ema: bool = False, rows: int = 8) -> TrainState:
  params = {'embed': {'w': jax.random.normal(jax.random.key(seed), (rows, 16))},
            'scale': jnp.full(16, seed, jnp.bfloat16)}
  return TrainState(step=jnp.int32(seed), params=params, opt_state=optax.adamw(1e-3).init(params),
                    ema=jax.tree.map(lambda x: x + 1, params) if ema else None, rng=jax.random.key(seed))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for path, x in trees.flatten(want).items():
    y = trees.flatten(got)[path]
    assert x.dtype == y.dtype and x.shape == y.shape, path
    raw = jax.random.key_data if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else lambda array: array
    assert np.asarray(raw(x)).tobytes() == np.asarray(raw(y)).tobytes(), path


def save_steps(folder, steps, **options):
  with Checkpoints(folder, **options) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, make_state(step), DATA)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: (p.stat().st_size, p.name))


def flip(file: pathlib.Path, place: float = 0.5):
  whole = bytearray(file.read_bytes())
  whole[int(len(whole) * place)] ^= 1
  file.write_bytes(whole)


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


# Saving and restoring


@pytest.mark.parametrize('ema', [False, True])
def test_restored_is_saved_bit_for_bit(tmp_path, ema):
  state = make_state(5, ema)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract(state)) is None
    checkpoints.save(5, state, DATA)
  with Checkpoints(tmp_path) as checkpoints:
    step, back, data = checkpoints.restore(abstract(state))
  assert (step, data) == (5, DATA)
  assert_same(back, state)


def test_any_pytree_and_raw_or_typed_keys_are_restored(tmp_path):
  state = {'params': jnp.arange(3.0), 'more': (jnp.zeros((0, 4)), [None, {}], jnp.uint32([1, 2])),
           'keys': jax.random.split(jax.random.key(3, impl='rbg'), 2)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    assert_same(checkpoints.restore(abstract(state))[1], state)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
  step_fn = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {'params': {'w': jnp.zeros((512, 1024))}}
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(1, 4):
      checkpoints.save(step, state, {})
      for _ in range(4):
        state = step_fn(state)
      back = checkpoints.restore(abstract(state))[1]['params']['w']
      np.testing.assert_array_equal(back, np.full((512, 1024), 4.0 * (step - 1)))


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
@pytest.mark.parametrize('shape', [(4, 2), (2, 1), (1, 1)])
def test_any_mesh_reads_any_checkpoint(tmp_path, shape):
  def on(shape, tree):
    mesh = jax.make_mesh(shape, ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2,
                         devices=jax.devices()[:shape[0] * shape[1]])
    spec = lambda x: P('fsdp', 'tensor') if x.ndim == 2 else P()
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)
  state = make_state(1, ema=True)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, on((8, 1), state), DATA)
    target = on(shape, state)
    back = checkpoints.restore(abstract(target))[1]
    params = checkpoints.restore_params(abstract(target.params))[1]
  assert_same(back, state)
  assert_same(params, state.params)
  assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, target)


def test_replicas_write_slices_of_a_large_array_and_one_of_them_a_small_one(tmp_path):
  replicas = jax.device_count()
  everywhere = NamedSharding(jax.make_mesh((replicas,), ('data',)), P())
  state = {'large': jnp.arange(replicas * SLICE // 4, dtype=jnp.int32), 'small': jnp.arange(64)}
  state = jax.device_put(state, everywhere)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, DATA)
    step, got, _ = checkpoints.restore(abstract(state))
  assert step == 1
  assert_same(got, state)


def test_parameters_can_be_read_alone_in_part_and_in_another_dtype(tmp_path):
  state = make_state(2, ema=True)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state, DATA)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert_same(checkpoints.restore_params(abstract(state.params))[1], state.params)
    assert_same(checkpoints.restore_params(abstract(state.params), item='ema')[1], state.ema)
    part = {'embed': {'w': jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}}
    step, read = checkpoints.restore_params(part)
    assert step == 2
    assert_same(read, {'embed': {'w': state.params['embed']['w'].astype(jnp.bfloat16)}})
    assert checkpoints.shapes(2)['params/embed/w'].shape == (8, 16)


def test_damage_elsewhere_does_not_keep_parameters_from_being_read(tmp_path):
  save_steps(tmp_path, [1])
  flip(largest_file(tmp_path / '1' / 'rest'))
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.restore_params(abstract(make_state(1).params))[0] == 1


def test_a_step_that_is_there_is_not_saved_again(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.save(1, make_state(1), DATA)
    assert not checkpoints.save(1, make_state(2), DATA)
    assert_same(checkpoints.restore(abstract(make_state()))[1], make_state(1))


def test_a_step_older_than_the_newest_is_refused_until_that_is_set_aside(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(10, make_state(10), DATA)
    with pytest.raises(JaxlmError, match='step 10 is there'):
      checkpoints.save(5, make_state(5), DATA)
    checkpoints.set_aside(10, 'rewound')
    assert checkpoints.save(5, make_state(5), DATA)
    assert checkpoints.restore(abstract(make_state()))[0] == 5


# What is kept


def test_latest_every_and_best_are_kept(tmp_path):
  losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: float('nan'), 6: 2.0, 7: 6.0, 8: 7.0, 9: 8.0, 10: 9.0, 11: 9.5}
  def save(steps):
    with Checkpoints(tmp_path, keep_latest=2, keep_every=4, keep_best=2, best_metric='eval/loss') as checkpoints:
      for step in steps:
        checkpoints.save(step, make_state(step), DATA, {'eval/loss': losses[step]} if step != 7 else {'other': 0.0})
  save(range(1, 7))
  assert Checkpoints(tmp_path, read_only=True).steps() == [2, 4, 5, 6]  # best 2 and 6, every 4, latest 5 and 6
  save(range(7, 12))  # another process: what was best is read from the manifests
  assert Checkpoints(tmp_path, read_only=True).steps() == [2, 4, 6, 8, 10, 11]


def test_fewer_than_two_checkpoints_are_refused(tmp_path):
  with pytest.raises(JaxlmError, match='at least 2'):
    Checkpoints(tmp_path, keep_latest=1)


# Damage


def _truncate(step: pathlib.Path):
  os.truncate(largest_file(step / 'params'), 10)


def _empty(step: pathlib.Path):
  step.rename(step.parent.parent / 'elsewhere')
  step.mkdir()


DAMAGE = {
    'a flipped byte': (lambda step: flip(largest_file(step / 'params')), 'sha256 differs'),
    'a flipped byte of the optimizer': (lambda step: flip(largest_file(step / 'rest')), 'sha256 differs'),
    'a truncated file': (_truncate, 'bytes; '),
    'a missing file': (lambda step: largest_file(step / 'params').unlink(), 'is missing'),
    'an empty folder': (_empty, 'the folder is empty'),
    'no manifest': (lambda step: (step / 'manifest.json').unlink(), 'manifest.json is missing'),
    'a flipped byte in the manifest': (lambda step: flip(step / 'manifest.json', 0.3), 'manifest.json is not what'),
    'half a manifest': (lambda step: os.truncate(step / 'manifest.json', 200), 'manifest.json is not what'),
    'another object': (lambda step: (step / 'manifest.json').write_text('[]'), 'manifest.json is not what'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_step_is_named_and_set_aside_and_the_one_before_restored(tmp_path, damage, caplog):
  do, says = DAMAGE[damage]
  folder = tmp_path / 'checkpoints'
  save_steps(folder, [10, 20])
  do(folder / '20')
  before, good = snapshot(folder / '20'), snapshot(folder / '10')
  with Checkpoints(folder) as checkpoints, caplog.at_level(logging.WARNING):
    step, state, data = checkpoints.restore(abstract(make_state()))
    assert (step, data) == (10, DATA)
    assert_same(state, make_state(10))
    message, = [r.getMessage() for r in caplog.records if r.name == 'jaxlm.checkpoint']
    assert 'Checkpoint 20' in message and says in message and '\n' not in message
    assert checkpoints.save(20, make_state(20), DATA)  # the same number again
    assert checkpoints.restore(abstract(make_state()))[0] == 20
  aside, = (folder / 'bad').glob('20-*')
  assert snapshot(aside) == before and snapshot(folder / '10') == good


def test_every_byte_of_a_manifest_counts(tmp_path):
  save_steps(tmp_path, [1])
  manifest = tmp_path / '1' / 'manifest.json'
  whole = manifest.read_bytes()
  for place in np.linspace(0, 1, 50, endpoint=False):
    flip(manifest, place)
    try:
      read = seal.read(tmp_path / '1')
    except seal.Damaged:
      pass
    else:  # a blank that became another blank says the same
      assert json.dumps(read) == json.dumps({k: v for k, v in json.loads(whole).items() if k != 'seal'})
    manifest.write_bytes(whole)


def test_where_all_are_damaged_there_is_nothing_to_restore_and_nothing_is_lost(tmp_path):
  save_steps(tmp_path, [1, 2])
  for step in '12':
    flip(largest_file(tmp_path / step))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_valid() is None
    assert checkpoints.restore(abstract(make_state())) is None
  assert len(list((tmp_path / 'bad').iterdir())) == 2


def test_reading_another_run_passes_over_damage_and_changes_nothing(tmp_path):
  save_steps(tmp_path, [1, 2])
  flip(largest_file(tmp_path / '2'))
  (tmp_path / '3.orbax-checkpoint-tmp').mkdir()  # a save in flight
  before = snapshot(tmp_path)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_valid() == 1
    assert checkpoints.restore(abstract(make_state()))[0] == 1
    assert checkpoints.restore_params(abstract(make_state().params))[0] == 1
    with pytest.raises(ValueError, match='read_only'):
      checkpoints.save(4, make_state(), DATA)
  assert snapshot(tmp_path) == before and (tmp_path / '3.orbax-checkpoint-tmp').is_dir()
  missing = tmp_path / 'not there'
  assert Checkpoints(missing, read_only=True).restore(abstract(make_state())) is None
  assert not missing.exists()


def test_another_models_state_is_refused_with_what_differs_and_left_in_place(tmp_path):
  save_steps(tmp_path, [1])
  before = snapshot(tmp_path)
  wide, ema = abstract(make_state(rows=24)), abstract(make_state(ema=True))
  half = abstract(make_state())
  half.params['embed']['w'] = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
  with Checkpoints(tmp_path) as checkpoints:
    for target, says in ((wide, r'params/embed/w: shape \(8, 16\); wanted \(24, 16\)'), (ema, 'ema/scale: missing'),
                         (half, 'params/embed/w: dtype float32; wanted bfloat16'), ({}, 'and 1 more')):
      with pytest.raises(JaxlmError, match=says) as error:
        checkpoints.restore(target)
      assert '\n' not in str(error.value)
    with pytest.raises(JaxlmError, match='ema/scale: missing'):
      checkpoints.restore_params(ema.params, item='ema')
    with pytest.raises(JaxlmError, match='wanted'):
      checkpoints.restore_params(wide.params)
    with pytest.raises(JaxlmError, match='no checkpoint 7 .* Steps: 1'):
      checkpoints.restore(abstract(make_state()), step=7)
  assert snapshot(tmp_path) == before


def test_a_step_asked_for_by_number_is_that_one_or_an_error(tmp_path):
  save_steps(tmp_path, [1, 2])
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract(make_state()), step=1)[0] == 1
    flip(largest_file(tmp_path / '1'))
    with pytest.raises(JaxlmError, match='Checkpoint 1 .* is damaged'):
      checkpoints.restore(abstract(make_state()), step=1)


def test_a_restore_that_fails_for_another_reason_sets_nothing_aside(tmp_path, monkeypatch):
  save_steps(tmp_path, [1, 2])
  def refuse(path):
    raise PermissionError(13, 'Permission denied', str(path))
  with Checkpoints(tmp_path) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(seal, '_digest', refuse)
      with pytest.raises(JaxlmError, match='Cannot read checkpoint 2 .* Permission denied'):
        checkpoints.restore(abstract(make_state()))
    assert checkpoints.steps() == [1, 2] and not (tmp_path / 'bad').exists()
    assert checkpoints.restore(abstract(make_state()))[0] == 2


# Saves that fail


def _raise(error):
  def fail(*_, **__):
    raise error
  return fail


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('first line\nsecond line')])
def test_a_save_that_cannot_be_sealed_commits_nothing_and_can_be_repeated(tmp_path, monkeypatch, error, capfd):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), DATA)
    checkpoints.wait()
    good = snapshot(tmp_path / '1')
    with monkeypatch.context() as patch:
      patch.setattr(seal, 'write', _raise(error))
      checkpoints.save(2, make_state(2), DATA)
      with pytest.raises(RunFailed, match='Checkpoint 2 was not saved .*Steps that stand: 1') as told:
        checkpoints.wait()
    assert '\n' not in str(told.value) and 'Traceback' not in capfd.readouterr().err
    checkpoints.wait()  # told once
    assert checkpoints.restore(abstract(make_state()))[0] == 1
    assert checkpoints.save(2, make_state(2), DATA)
    assert checkpoints.restore(abstract(make_state()))[0] == 2
  assert snapshot(tmp_path / '1') == good


def test_a_full_disk_is_told_in_one_line_and_harms_nothing(tmp_path):
  big = {'params': jnp.asarray(np.random.default_rng(0).standard_normal((512, 1024)), jnp.float32)}
  small = {'params': jnp.zeros(4)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small, DATA)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # stands in for a small disk: no file over 1 MB
    try:
      with pytest.raises(RunFailed, match=r'Checkpoint 2 was not saved in \S+: File too large\. Steps that stand: 1\.'):
        checkpoints.save(2, big, DATA)
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.restore(abstract(small))[0] == 1
    assert checkpoints.save(2, big, DATA)
    assert checkpoints.restore(abstract(big))[0] == 2


@pytest.mark.parametrize('use', [Checkpoints, lambda folder: lock(folder).__enter__()])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, use, monkeypatch):
  (tmp_path / 'file').write_text('')
  with pytest.raises(JaxlmError, match='Give a workdir that can be written') as told:
    use(tmp_path / 'file' / 'run')
  assert '\n' not in str(told.value)
  monkeypatch.setattr(pathlib.Path, 'mkdir', _raise(OSError(30, 'Read-only file system')))
  with pytest.raises(JaxlmError, match='Read-only file system'):
    use(tmp_path / 'run')


# Other processes

PRELUDE = '''
import os, pathlib, signal, sys, time
import jax, jax.numpy as jnp
from jaxlm import seal
from jaxlm.checkpoint import Checkpoints
from jaxlm.rundir import lock
folder = pathlib.Path(sys.argv[1])
'''


def python(script: str, *args, devices: int = 1) -> subprocess.Popen:
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': xla_flags(devices),
         'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}
  return subprocess.Popen([sys.executable, '-c', PRELUDE + script, *map(str, args)], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


KILLED = '''
state = {'params': jnp.arange(1000.0)}
checkpoints = Checkpoints(folder)
checkpoints.save(1, state, {})
checkpoints.wait()
write = seal.write
def die(*args, **kwargs):
  if sys.argv[2] == 'after':
    write(*args, **kwargs)
  os.kill(os.getpid(), signal.SIGKILL)
seal.write = die
checkpoints.save(2, state, {})
checkpoints.wait()
'''


@pytest.mark.parametrize('moment', ['before', 'after'])
def test_a_save_killed_around_its_manifest_leaves_the_steps_before_and_nothing_else(tmp_path, moment):
  process = python(KILLED, tmp_path, moment)
  process.communicate(timeout=120)
  assert process.returncode == -signal.SIGKILL
  assert {p.name for p in tmp_path.iterdir()} == {'1', '2.orbax-checkpoint-tmp'}
  with Checkpoints(tmp_path) as checkpoints:
    assert {p.name for p in tmp_path.iterdir()} == {'1'}
    state = {'params': jnp.arange(1000.0)}
    assert checkpoints.restore(abstract(state))[0] == 1
    assert checkpoints.save(2, state, {})
  assert not list(tmp_path.glob('bad/*'))


HOLDER = '''
with lock(folder):
  print('held', flush=True)
  time.sleep(60)
'''


def test_a_second_process_is_told_who_holds_the_run_and_a_kill_lets_go(tmp_path):
  holder = python(HOLDER, tmp_path)
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(JaxlmError, match=f'in use by another process .*host {socket.gethostname()}, pid {holder.pid}'):
      with lock(tmp_path):
        pass
  finally:
    holder.kill()
    holder.communicate()
  with lock(tmp_path):
    with pytest.raises(JaxlmError, match=f'pid {os.getpid()}'):
      with lock(tmp_path):
        pass
  with lock(tmp_path):
    pass


def test_a_start_that_fails_leaves_no_empty_run_directory(tmp_path):
  for name, left in (('new', ()), ('new', ('checkpoints',)), ('kept', ('config.json',)), ('kept', ())):
    with pytest.raises(JaxlmError, match='refused'), lock(tmp_path / name):
      for file in left:
        (tmp_path / name / file).mkdir()
      raise JaxlmError('refused')
    assert [p.name for p in tmp_path.iterdir()] == ([] if name == 'new' else ['kept'])
  with lock(tmp_path / 'kept'):
    pass


def test_a_job_that_came_a_moment_too_late_leaves_the_lock_of_the_first(tmp_path, monkeypatch):
  with lock(tmp_path / 'run'):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, 'exists', lambda path: False)  # as it looked before the first one began
      with pytest.raises(JaxlmError, match='in use by another process'), lock(tmp_path / 'run'):
        pass
    assert [p.name for p in (tmp_path / 'run').iterdir()] == ['lock']


TWO_PROCESSES = '''
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
process = int(sys.argv[2])
jax.distributed.initialize(f'localhost:{sys.argv[3]}', num_processes=2, process_id=process)
mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
whole = np.arange(64.0, dtype=np.float32).reshape(16, 4)
sharded, replicated = NamedSharding(mesh, P('fsdp')), NamedSharding(mesh, P())
def make(step):
  return {'params': {'w': jax.make_array_from_callback(whole.shape, sharded, lambda i: whole[i] + step)},
          'step': jax.make_array_from_callback((), replicated, lambda i: np.int32(step))}
with lock(folder):
  checkpoints = Checkpoints(folder / 'checkpoints')
  for step in (1, 2, 3):
    checkpoints.save(step, make(step), {'examples': step})
  checkpoints.wait()
  if process == 0:
    bad = max((p for p in (folder / 'checkpoints/3').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    bad.write_bytes(bytes(bad.stat().st_size))
  from jax.experimental import multihost_utils
  multihost_utils.sync_global_devices('damaged')
  step, state, data = checkpoints.restore(jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0)))
  assert (step, data) == (2, {'examples': 2}), (step, data)
  for shard in state['params']['w'].addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index] + 2)
  assert checkpoints.save(3, make(3), {'examples': 3})
  checkpoints.close()
'''


def test_two_processes_save_set_aside_and_restore_together(tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  processes = [python(TWO_PROCESSES, tmp_path, i, port, devices=4) for i in range(2)]
  try:
    outputs = [p.communicate(timeout=180) for p in processes]
  finally:
    for p in processes:
      p.kill()
  assert [p.returncode for p in processes] == [0, 0], '\n'.join(err[-3000:] for _, err in outputs)
  assert sum('Checkpoint 3' in err for _, err in outputs) == 1  # told by one of them
  target = {'params': {'w': jax.ShapeDtypeStruct((16, 4), jnp.float32)}, 'step': jax.ShapeDtypeStruct((), jnp.int32)}
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:  # one process reads what two wrote
    step, state, _ = checkpoints.restore(target)
  assert step == 3 and len(list((tmp_path / 'checkpoints/bad').iterdir())) == 1
  np.testing.assert_array_equal(state['params']['w'], np.arange(64.0).reshape(16, 4) + 3)


def test_saving_blocks_for_the_copy_alone(tmp_path, monkeypatch):
  write = seal.write
  def slowly(*args, **kwargs):
    time.sleep(1.0)
    write(*args, **kwargs)
  monkeypatch.setattr(seal, 'write', slowly)
  with Checkpoints(tmp_path) as checkpoints:
    start = time.monotonic()
    checkpoints.save(1, make_state(1), DATA)
    assert time.monotonic() - start < 0.9
    assert checkpoints.steps() == []
  assert checkpoints.steps() == [1]
