"""The laws of training: resumed = uninterrupted, sharded = unsharded, accumulated = big batch, packed = padded."""
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoint, rundir, sharding, state, train
from jaxlm import config as configs
from jaxlm.data.pipeline import documents_at
from jaxlm import objectives
from jaxlm.errors import JaxlmError, Preempted, RunFailed
from jaxlm.metrics import read_jsonl

# Float32 sums in another order; measured at most 5e-7 over 20 steps.
RTOL = 1e-5


pytestmark = pytest.mark.usefixtures('few_devices')


def mesh(config, **sizes):
  config.mesh.update(data=1)
  config.mesh.update(sizes)
  return config


def losses(workdir):
  return {line['step']: line['train/loss'] for line in read_jsonl(f'{workdir}/metrics.jsonl') if 'train/loss' in line}


def params(workdir, step):
  """{file name: bytes} would compare storage; this compares the arrays."""
  folder = checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True)
  shapes = {path.removeprefix('params/'): x for path, x in folder.shapes(step).items() if path.startswith('params/')}
  from jaxlm import trees
  return trees.flatten(folder.restore_params(trees.unflatten(shapes), step)[1])


def stop_after(monkeypatch, step):
  """Makes the next run get SIGTERM's flag when `step` updates have been started by it."""
  calls = iter(range(1, 1_000))
  monkeypatch.setattr(train.Signals, 'stop', lambda self, together: next(calls) >= step)


@pytest.fixture
def whole_run(tiny, tmp_path):
  """Six steps, never stopped, with dropout and a save every two."""
  mesh(tiny).update(steps=6, save_every=2)
  tiny.model.dropout = 0.1
  train.run(tiny, f'{tmp_path}/whole')
  return tiny, f'{tmp_path}/whole'


def test_resume_is_bitwise_identical(whole_run, tmp_path, monkeypatch):
  config, whole = whole_run
  with monkeypatch.context() as patch:
    stop_after(patch, 3)  # between two saves
    with pytest.raises(Preempted, match='step 3; saved'):
      train.run(config, f'{tmp_path}/stopped')
  train.run(config, f'{tmp_path}/stopped')
  assert losses(f'{tmp_path}/stopped') == losses(whole)
  expected, found = params(whole, 6), params(f'{tmp_path}/stopped', 6)
  assert all(np.array_equal(expected[path], found[path]) for path in expected) and expected.keys() == found.keys()


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(whole_run, caplog):
  config, whole = whole_run
  before = losses(whole), params(whole, 6)
  victim = max((os.path.join(root, name) for root, _, names in os.walk(f'{whole}/checkpoints/6/params')
                for name in names), key=os.path.getsize)
  with open(victim, 'rb+') as f:
    f.seek(os.path.getsize(victim) // 2)
    byte = f.read(1)
    f.seek(-1, 1)
    f.write(bytes([byte[0] ^ 1]))
  train.run(config, whole)
  assert 'its sha256 differs' in caplog.text and 'params/' in caplog.text
  assert os.listdir(f'{whole}/checkpoints/bad')[0].startswith('6-')
  after = params(whole, 6)
  assert losses(whole) == before[0] and all(np.array_equal(before[1][path], after[path]) for path in after)


@pytest.fixture
def twenty(tiny, tmp_path):
  """Runs twenty steps with some keys changed, and returns the losses."""
  mesh(tiny).update(steps=20, batch_size=16)

  def run(name, **changes):
    config = tiny.copy_and_resolve_references()
    with config.unlocked():
      config.update_from_flattened_dict(changes)
    train.run(config, f'{tmp_path}/{name}')
    return losses(f'{tmp_path}/{name}')
  return run


def assert_same(found, expected):
  assert found.keys() == expected.keys() and len(expected) == 20
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=RTOL)


def test_losses_are_the_same_on_every_mesh(twenty):
  expected = twenty('one')
  assert_same(twenty('data', **{'mesh.data': 8}), expected)
  assert_same(twenty('fsdp', **{'mesh.fsdp': 8}), expected)
  assert_same(twenty('both', **{'mesh.tensor': 2, 'mesh.fsdp': 4}), expected)


def test_accumulated_equals_big_batch(twenty):
  expected = twenty('one', **{'model.dropout': 0.1})  # its masks, too, are those of the whole batch
  for parts in (2, 4):
    assert_same(twenty(str(parts), **{'model.dropout': 0.1, 'accumulation': parts}), expected)


def test_any_mesh_resumes_any_checkpoint(tiny, tmp_path, monkeypatch):
  mesh(tiny, fsdp=8).update(steps=8, batch_size=8)
  with monkeypatch.context() as patch:
    stop_after(patch, 4)
    with pytest.raises(Preempted):
      train.run(tiny, f'{tmp_path}/8')
  import shutil
  found = {}
  for name, sizes in {'4x2': dict(fsdp=4, tensor=2), '2': dict(data=2), '1': {}, '8': dict(fsdp=8)}.items():
    if name != '8':
      shutil.copytree(f'{tmp_path}/8', f'{tmp_path}/{name}')
  for name, sizes in {'4x2': dict(fsdp=4, tensor=2), '2': dict(data=2), '1': {}, '8': dict(fsdp=8)}.items():
    train.run(mesh(tiny.copy_and_resolve_references(), **({'fsdp': 1, 'tensor': 1} | sizes)), f'{tmp_path}/{name}')
    found[name] = losses(f'{tmp_path}/{name}')
    np.testing.assert_allclose(list(found[name].values()), list(found.get('4x2').values()), rtol=RTOL)


def test_packed_losses_equal_padded(tiny):
  """The same documents, several a row or one a row: the same sum of losses and gradients, over the same targets."""
  from jaxlm.data import plans, store
  from jaxlm import losses as loss_module
  mesh(tiny).data.update(holdout=0.0, shuffle=False)
  tiny.update(seq_len=128, batch_size=32)
  found = {}
  for packing in ('best_fit', 'padded'):
    tiny.data.packing = packing
    prepared = store.prepare(tiny)
    objective = objectives.make(tiny, prepared.tokenizer.vocab)
    stream = plans.Stream(tiny, prepared.stores, objective, prepared.tokenizer.vocab)
    layout = sharding.Layout(sharding.make_mesh(tiny.mesh), tuple(tiny.sharding.rules))
    model = train.build_model(tiny, prepared.tokenizer.vocab.size, objective.visibility, layout)
    state, _ = train.init_state(model, tiny).fresh(0)
    windows = stream._plan(0, 0).windows
    batch = {k: jnp.asarray(v) for k, v in stream.examples(np.arange(windows)).items()}
    vocabulary = loss_module.vocabulary_of(model, tiny.loss)
    (_, sums), grads = jax.jit(jax.value_and_grad(
        lambda params: loss_module.lm_loss(model, vocabulary, params, batch, None), has_aux=True))(state.params)
    found[packing] = windows, sums, grads
  (few, packed, g1), (many, padded, g2) = found['best_fit'], found['padded']
  assert few < many and packed['loss'][1] == padded['loss'][1]
  np.testing.assert_allclose(packed['loss'][0], padded['loss'][0], rtol=RTOL)
  for a, b in zip(jax.tree.leaves(g1), jax.tree.leaves(g2)):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-4)  # sums over 4,000 targets


def poison(monkeypatch, examples):
  """Makes the loss of the named examples of the stream infinite, wherever they come."""
  from jaxlm.data import plans
  plain = plans.Stream.examples

  def poisoned(self, numbers):
    batch = plain(self, numbers)
    for row in np.flatnonzero(np.isin(numbers, examples)):
      batch['loss_weights'][row, 0] = np.inf
    return batch
  monkeypatch.setattr(plans.Stream, 'examples', poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(tiny, tmp_path, monkeypatch):
  mesh(tiny).update(steps=6, save_every=1)
  poison(monkeypatch, [17])
  with pytest.raises(RunFailed, match=r'Step 3 is not finite: .* on examples 16 to 23.*the last checkpoint is step'):
    train.run(tiny, f'{tmp_path}/run')
  for path, array in params(f'{tmp_path}/run', 2).items():
    assert np.isfinite(array).all(), path


def test_skip_leaves_the_update_out_and_records_the_batch(tiny, tmp_path, monkeypatch):
  mesh(tiny).update(steps=6, on_nonfinite='skip')
  poison(monkeypatch, [17])
  train.run(tiny, f'{tmp_path}/run')
  lines = read_jsonl(f'{tmp_path}/run/metrics.jsonl')
  action = next(line for line in lines if 'nonfinite/action' in line)
  assert (action['step'], action['nonfinite/first_example'], action['nonfinite/end_example']) == (3, 16, 24)
  assert np.isfinite(losses(f'{tmp_path}/run')[6])


def test_rewind_goes_back_to_the_checkpoint_and_past_the_bad_examples(tiny, tmp_path, monkeypatch):
  mesh(tiny).update(steps=6, save_every=2, on_nonfinite='rewind')
  poison(monkeypatch, [25])  # in step 4; step 2 is saved, so examples 16 to 31 are passed over
  train.run(tiny, f'{tmp_path}/run')
  data = checkpoint.Checkpoints(f'{tmp_path}/run/checkpoints', read_only=True)
  text = (tmp_path / 'run/checkpoints/6/data/metadata').read_text()
  assert json.loads(text)['skips'] == [[16, 32]] and json.loads(text)['rewinds'] == 1 and data.latest_valid() == 6
  rows = documents_at(f'{tmp_path}/run', 3, objectives.make)
  assert {row['example'] for row in rows} == set(range(32, 40))
  found = losses(f'{tmp_path}/run')
  assert sorted(found) == [1, 2, 3, 4, 5, 6] and np.isfinite(list(found.values())).all()


def test_a_batch_ramp_grows_and_resumes(tiny, tmp_path, monkeypatch):
  mesh(tiny).update(steps=6, batch_ramp=((2, 4),))
  train.run(tiny, f'{tmp_path}/whole')
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Preempted):
      train.run(tiny, f'{tmp_path}/stopped')
  train.run(tiny, f'{tmp_path}/stopped')
  for folder in ('whole', 'stopped'):
    lines = [line for line in read_jsonl(f'{tmp_path}/{folder}/metrics.jsonl') if 'train/loss' in line]
    assert [line['examples'] for line in lines] == [4, 8, 16, 24, 32, 40]
  assert losses(f'{tmp_path}/whole') == losses(f'{tmp_path}/stopped')


def test_init_from_takes_weights_alone(tiny, tmp_path, capfd):
  mesh(tiny).update(steps=2)
  train.run(tiny, f'{tmp_path}/first')
  assert 'from the weights' not in capfd.readouterr().err
  tiny.checkpoint.init_from = f'{tmp_path}/first'
  tiny.optim.freeze = ('embed/.*', '.*/mlp/.*')
  train.run(tiny, f'{tmp_path}/second')
  assert f'2 steps to do, from the weights of {tmp_path}/first' in capfd.readouterr().err
  first, second = params(f'{tmp_path}/first', 2), params(f'{tmp_path}/second', 2)
  for path in first:
    frozen = path.startswith('embed/') or '/mlp/' in path
    assert np.array_equal(first[path], second[path]) == frozen, path


def test_resume_takes_state_and_place_in_the_stream(whole_run, tmp_path, monkeypatch):
  config, whole = whole_run
  with monkeypatch.context() as patch:
    stop_after(patch, 4)
    with pytest.raises(Preempted):
      train.run(config, f'{tmp_path}/first')
  config.checkpoint.resume = f'{tmp_path}/first'
  train.run(config, f'{tmp_path}/second')
  assert losses(f'{tmp_path}/second') == {step: loss for step, loss in losses(whole).items() if step > 4}


def test_bfloat16_computes_near_float32_with_float32_weights(twenty, tmp_path):
  expected, found = twenty('float32'), twenty('bfloat16', **{'precision.compute': 'bfloat16'})
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=0.02)  # bfloat16 has 3 digits
  assert {x.dtype for x in params(f'{tmp_path}/bfloat16', 20).values()} == {np.dtype('float32')}


def test_float16_scales_the_loss_down_until_its_gradient_fits(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(state, 'FIRST_SCALE', 2.0 ** 20)
  monkeypatch.setattr(state, 'STEADY', 6)
  mesh(tiny).update(steps=20, save_every=7)
  tiny.precision.compute = 'float16'
  train.run(tiny, f'{tmp_path}/whole')
  lines = [line for line in read_jsonl(f'{tmp_path}/whole/metrics.jsonl') if 'train/loss_scale' in line]
  scales, found = [line['train/loss_scale'] for line in lines], losses(f'{tmp_path}/whole')
  # Updates that were left out on the way are no fault: the run goes on, though config.on_nonfinite is 'stop'.
  assert scales[0] == 2.0 ** 20 and scales[0] > min(scales) and max(np.diff(scales)) > 0  # down, later up again
  assert all(b in (a, a / 2, 2 * a) for a, b in zip(scales, scales[1:]))
  assert found[20] < found[1] - 0.2
  with monkeypatch.context() as patch:
    stop_after(patch, 5)
    with pytest.raises(Preempted):
      train.run(tiny, f'{tmp_path}/parts')
  train.run(tiny, f'{tmp_path}/parts')
  jax.tree.map(np.testing.assert_array_equal, params(f'{tmp_path}/parts', 20), params(f'{tmp_path}/whole', 20))


def test_float16_computes_near_float32(twenty, tmp_path):
  found, wanted = twenty('half', **{'precision.compute': 'float16'}), twenty('full')
  assert max(abs(found[step] - wanted[step]) for step in wanted) < 0.02


def test_products_in_8_bits_train_nearly_as_well_on_any_mesh(twenty):
  found, wanted = twenty('eight', **{'precision.products': 'float8'}), twenty('full')
  assert wanted[1] != found[1] and max(abs(found[step] - wanted[step]) for step in wanted) < 0.05
  split = twenty('split', **{'precision.products': 'float8', 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  assert max(abs(found[step] - split[step]) for step in found) < 0.01  # sums in another order round otherwise


def test_ema_is_kept_and_evaluated(tiny, tmp_path):
  mesh(tiny).optim.ema_decay = 0.5
  train.run(tiny, f'{tmp_path}/run')
  folder = checkpoint.Checkpoints(f'{tmp_path}/run/checkpoints', read_only=True)
  paths = folder.shapes(4)
  assert {p.removeprefix('ema/') for p in paths if p.startswith('ema/')} == {
      p.removeprefix('params/') for p in paths if p.startswith('params/')}


def test_two_jobs_cannot_share_a_run_directory(tiny, tmp_path):
  with rundir.lock(tmp_path / 'run'), pytest.raises(JaxlmError, match='in use by another process'):
    train.run(tiny, f'{tmp_path}/run')


def test_resume_from_another_run_is_held_to_the_same_rules(whole_run, tmp_path):
  config, whole = whole_run
  config.checkpoint.resume = whole
  config.seed = 7
  with pytest.raises(JaxlmError, match='config.seed=0, now 7'):
    train.run(config, f'{tmp_path}/other')


def test_fewer_steps_than_are_done_are_refused_and_a_finished_run_tells_its_last_metrics(whole_run):
  config, whole = whole_run
  before = (open(f'{whole}/config.json').read())
  assert train.run(config, whole)['train/loss'] == losses(whole)[6]
  config.steps = 4
  with pytest.raises(JaxlmError, match='has done 6 steps, config.steps=4 is less'):
    train.run(config, whole)
  assert open(f'{whole}/config.json').read() == before


def test_every_training_line_tells_speed_and_every_save_only_what_was_measured_there(tiny, tmp_path):
  mesh(tiny).update(steps=4, save_every=1, eval_every=2)
  train.run(tiny, f'{tmp_path}/run')
  lines = [line for line in read_jsonl(f'{tmp_path}/run/metrics.jsonl') if 'train/loss' in line]
  assert all(line['train/tokens_per_s'] > 0 for line in lines) and len(lines) == 4
  manifest = {step: json.loads((tmp_path / f'run/checkpoints/{step}/manifest.json').read_text()) for step in (3, 4)}
  assert 'eval/heldout/loss' in manifest[4]['metrics'] and 'eval/heldout/loss' not in manifest[3]['metrics']


@pytest.mark.parametrize('changes, words', [
    ({'optim.freeze': ('nosuch',)}, "freeze: 'nosuch' matches no parameter"),
    ({'optim.freeze': ('.*',)}, 'leaves no parameter to train'),
    ({'optim.decay_rules': (('embed.*', 0.0),)}, 'No rule of config.optim.decay_rules matches')])
def test_rules_that_cover_too_little_are_refused(tiny, tmp_path, changes, words):
  with tiny.unlocked():
    tiny.update_from_flattened_dict(changes)
  with pytest.raises(JaxlmError, match=words):
    train.run(mesh(tiny), f'{tmp_path}/run')


def test_the_base_of_a_run_is_found_from_another_folder(tmp_path):
  (tmp_path / 'runs/base').mkdir(parents=True)
  (tmp_path / 'runs/own').mkdir()
  config = configs.default()
  for told, found in (('runs/base', str(tmp_path / 'runs/base')), ('runs/gone', 'runs/gone')):
    config.checkpoint.init_from = told
    (tmp_path / 'runs/own/config.json').write_text(configs.dumps(config))
    assert rundir.RunDirectory(str(tmp_path / 'runs/own')).config.checkpoint.init_from == found
