"""Whatever the mesh, the losses agree: every kind of parallelism, alone and combined, against one device."""
import functools
import shutil
import types

import jax
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import objectives, sharding, train
from jaxlm.data import store
from jaxlm.errors import JaxlmError
from jaxlm.metrics import read_jsonl
from jaxlm.models import stages
from jaxlm.sharding import Layout, Schedule

RTOL = 1e-5  # float32 sums in another order over twenty updates; measured at most 2e-6


def decoder(config):
  """Llama's parts, packed documents, dropout."""
  config.model.positions.kind = 'rope'
  config.model.norm.kind = 'rmsnorm'
  config.model.mlp.gated = True
  config.model.attention.num_kv_heads = 4
  config.data.packing = 'best_fit'


def mixture(config):
  decoder(config)
  config.model.moe.update(num_experts=4, top_k=2, width=32)


def encoder_decoder(config):
  """T5's parts: two stacks, cross-attention, a learned bias that all layers share."""
  config.model.update(structure='encoder_decoder', encoder_layers=4)
  config.model.positions.kind = 'buckets'
  config.objective.name = 'prefix'


def two_stream(config):
  """XLNet's."""
  config.model.update(structure='two_stream')
  config.model.positions.kind = 'relative'
  config.objective.name = 'permutation'
  config.seq_len = 48  # a sixth of it is predicted, which divides by 8


def windowed(config):
  decoder(config)
  config.model.attention.windows = (8, 0)


FAMILIES = {f.__name__: f for f in (decoder, mixture, encoder_decoder, two_stream, windowed)}


def config_of(corpus, family, **changes):
  config = base.smoke(base.default())
  config.update(steps=20, batch_size=16, seq_len=32)
  config.model.update(num_layers=4, width=32, vocab_pad_to=64)
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=8, num_kv_heads=8, head_dim=4)
  config.data.update(source='text', paths=corpus, holdout=0.1, tokenizer='bytes')
  config.mesh.data = 1
  FAMILIES[family](config)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def trajectory(config, workdir, monkeypatch, steps=20):
  """(losses, gradient norms, the state) of a run's first steps."""
  make, count = sharding.make_mesh, int(np.prod(list(config.mesh.values())))
  monkeypatch.setattr(sharding, 'make_mesh', lambda sizes, devices=None: make(sizes, devices or jax.devices()[:count]))
  parts = train.Run(config, str(workdir), store.prepare(config, objectives.roles(config)))
  monkeypatch.setattr(sharding, 'make_mesh', make)
  step, state, frozen, position = parts.start()
  sizes, batches = parts.batches(step, position)
  found = []
  for i in range(steps):
    first = i * config.batch_size
    batch = parts.place(batches.at(first, config.batch_size, []), config.batch_size)
    state, metrics = parts.step_fn(state, frozen, batch)
    found.append((float(metrics['train/loss']), float(metrics['train/grad_norm'])))
  batches.close()
  return np.array(found), state, parts


@pytest.fixture(scope='module')
def alone(corpus, tmp_path_factory):
  """(family, changes) -> the trajectory on one device; computed once."""
  @functools.cache
  def of(family, changes):
    with pytest.MonkeyPatch.context() as patch:
      return trajectory(config_of(corpus, family, **dict(changes)), tmp_path_factory.mktemp('alone'), patch)[0]
  return lambda family, **changes: of(family, tuple(sorted(changes.items())))


RING = {'model.attention.kernel': 'ring'}
SEQUENCE = {'sharding.rules': (('act_stream', ('seq', 'tensor')), *(
    rule for rule in base.default().sharding.rules if rule[0] != 'act_stream'))}  # Megatron's sequence parallelism
ZERO1 = {'sharding.optimizer_rules': (('embed', 'data'),)}
ROUNDS = {'pipeline.repeats': 2}
REMAT = {'model.remat': 'full'}
OFFLOAD = {'sharding.offload_optimizer': True, 'model.remat': 'offload', 'model.remat_names': ('mlp_hidden',)}

# (family, mesh, what else changes, what changes on the one device as well); the first ones are in the ordinary suite.
CASES = [
    ('decoder', dict(seq=8), RING, {}),
    ('mixture', dict(seq=2, tensor=2, fsdp=2), RING, {}),
    ('windowed', dict(pipe=2, tensor=2, fsdp=2), ROUNDS | REMAT | {'model.attention.kernel': 'blockwise'},
     {'model.dropout': 0.1}),
    ('encoder_decoder', dict(pipe=4, data=2), {'pipeline.microbatches': 8}, {}),
    ('two_stream', dict(pipe=2, seq=2, data=2), {'accumulation': 2}, {}),
    ('mixture', dict(expert=4, data=2), {}, {}),
    ('decoder', dict(data=4, tensor=2), SEQUENCE | ZERO1, {}),
    ('decoder', dict(replica=2, fsdp=4), {}, {}),
    ('decoder', dict(pipe=4, data=2), {'accumulation': 2, 'pipeline.remat': 'stage'} | REMAT, {'model.num_layers': 6}),
    # the rest only with the slow ones
    ('decoder', dict(seq=2, tensor=2, fsdp=2), RING, {}),
    ('decoder', dict(seq=2, tensor=2, fsdp=2), {}, {}),
    ('decoder', dict(pipe=4, data=2), {'pipeline.microbatches': 4}, {}),
    ('decoder', dict(pipe=4, data=2), {'pipeline.microbatches': 8}, {}),
    ('decoder', dict(pipe=2, data=4), ROUNDS, {}),
    ('decoder', dict(pipe=2, tensor=2, fsdp=2), {}, {}),
    ('decoder', dict(pipe=2, seq=2, tensor=2), RING | ROUNDS, {}),
    ('decoder', dict(tensor=2, fsdp=2, seq=2), SEQUENCE | RING | REMAT, {}),
    ('decoder', dict(data=8), ZERO1 | {'accumulation': 2}, {}),
    ('decoder', dict(pipe=2, tensor=2, fsdp=2), ROUNDS | SEQUENCE, {'optim.name': 'muon', 'model.num_layers': 7}),
    ('mixture', dict(expert=4, data=2), {}, {'model.moe.mode': 'capacity'}),
    ('mixture', dict(expert=2, tensor=2, fsdp=2), {}, {}),
    ('mixture', dict(pipe=2, expert=2, data=2), {}, {}),
    ('mixture', dict(pipe=2, expert=2, tensor=2), REMAT, {'model.moe.every': 2}),
    ('mixture', dict(replica=2, fsdp=4), {}, {}),
    ('encoder_decoder', dict(seq=8), {}, {}),
    ('encoder_decoder', dict(seq=2, tensor=2, fsdp=2), RING, {}),
    ('encoder_decoder', dict(pipe=4, data=2), {'pipeline.microbatches': 4}, {}),
    ('encoder_decoder', dict(pipe=2, data=4), ROUNDS, {}),
    ('encoder_decoder', dict(pipe=2, tensor=2, fsdp=2), REMAT, {'model.dropout': 0.1}),
    ('encoder_decoder', dict(replica=2, fsdp=4), {}, {}),
    ('two_stream', dict(seq=8), {}, {}),
    ('two_stream', dict(seq=2, tensor=2, fsdp=2), {}, {}),
    ('two_stream', dict(seq=2, tensor=2, fsdp=2), {}, {'objective.permutation.memory': 32}),
    ('two_stream', dict(pipe=4, data=2), {'pipeline.microbatches': 4}, {}),
    ('two_stream', dict(pipe=4, data=2), {'pipeline.microbatches': 8}, {}),
    ('two_stream', dict(pipe=2, data=4), ROUNDS, {}),
    ('two_stream', dict(pipe=2, tensor=2, fsdp=2), {}, {}),
    ('two_stream', dict(replica=2, fsdp=4), {}, {}),
    ('windowed', dict(seq=8), RING, {}),
    ('decoder', dict(fsdp=4, pipe=2), OFFLOAD, {}),
]
ORDINARY = 9


def named(case):
  family, mesh, changes, both = case
  told = [f'{key.rpartition(".")[2]}={value}' if not isinstance(value, tuple) else key.rpartition('.')[2]
          for key, value in (changes | both).items()]
  return ', '.join([family, ' × '.join(f'{axis}={n}' for axis, n in mesh.items()), *told])


def assert_same(case, steps, corpus, alone, tmp_path, monkeypatch):
  family, mesh, changes, both = case
  config = config_of(corpus, family, **{f'mesh.{axis}': n for axis, n in mesh.items()}, **changes, **both)
  found, _, _ = trajectory(config, tmp_path, monkeypatch, steps)
  expected = alone(family, **both)[:steps]
  print(f'| {named(case)} | {np.abs(found / expected - 1).max(0)} |')
  np.testing.assert_allclose(found, expected, rtol=RTOL)


@pytest.mark.parametrize('case', CASES[:ORDINARY], ids=named)
def test_losses_and_gradient_norms_are_those_of_one_device(case, corpus, alone, tmp_path, monkeypatch):
  assert_same(case, 4, corpus, alone, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=named)
def test_they_are_for_twenty_steps_on_every_mesh(case, corpus, alone, tmp_path, monkeypatch):
  assert_same(case, 20, corpus, alone, tmp_path, monkeypatch)


# ---- whole runs --------------------------------------------------------------------------------------------------


def few_devices(monkeypatch):
  """A mesh takes the first so many of the eight devices."""
  make = sharding.make_mesh
  take = lambda sizes: jax.devices()[:int(np.prod(list(dict(sizes).values())))]
  monkeypatch.setattr(sharding, 'make_mesh', lambda sizes, devices=None: make(sizes, devices or take(sizes)))


def logged(workdir):
  return {line['step']: line['train/loss'] for line in read_jsonl(f'{workdir}/metrics.jsonl') if 'train/loss' in line}


def test_a_pipelined_run_saves_layers_in_their_order_and_any_mesh_goes_on(corpus, tmp_path, monkeypatch):
  """Saved by two uneven stages in two rounds, with moments and an average; evaluated and sampled there, too."""
  few_devices(monkeypatch)
  both = {'model.num_layers': 5, 'optim.ema_decay': 0.5, 'eval.prompts': ('the model',), 'steps': 4, 'save_every': 2,
          'optim.total_steps': 4}
  make = lambda **changes: config_of(corpus, 'decoder', **(both | changes))
  train.run(make(), str(tmp_path / 'alone'))
  train.run(make(**ROUNDS, **{'mesh.pipe': 2, 'mesh.data': 2, 'steps': 2}), str(tmp_path / 'piped'))
  meshes = {'one': {}, 'other': {'mesh.pipe': 4, 'mesh.fsdp': 2}, 'same': ROUNDS | {'mesh.pipe': 2}}
  for name, changes in meshes.items():
    shutil.copytree(tmp_path / 'piped', tmp_path / name)
    train.run(make(**changes), str(tmp_path / name))
    found, expected = logged(tmp_path / name), logged(tmp_path / 'alone')
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=RTOL)
  heldout = [[line['eval/heldout/loss'] for line in read_jsonl(f'{tmp_path}/{name}/metrics.jsonl')
              if 'eval/heldout/loss' in line][-1] for name in ('alone', 'one', 'other', 'same')]
  np.testing.assert_allclose(heldout, heldout[0], rtol=RTOL)
  samples = [read_jsonl(f'{tmp_path}/{name}/samples.jsonl')[-1] for name in ('alone', 'same')]
  assert samples[0] == samples[1]


def test_init_from_reaches_the_stages_of_a_pipeline(corpus, tmp_path, monkeypatch):
  few_devices(monkeypatch)
  train.run(config_of(corpus, 'decoder', steps=1), str(tmp_path / 'first'))
  found = {}
  given = {'optim.freeze': ('embed/.*',), 'checkpoint.init_from': str(tmp_path / 'first'), 'steps': 2}
  for name, changes in {'alone': {}, 'piped': {'mesh.pipe': 2} | ROUNDS}.items():
    train.run(config_of(corpus, 'decoder', **given, **changes), str(tmp_path / name))
    found[name] = list(logged(tmp_path / name).values())
  np.testing.assert_allclose(found['piped'], found['alone'], rtol=RTOL)


# ---- where layers lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('repeats, S, R, table', [
    (4, 2, 1, [[[0, 1]], [[2, 3]]]),
    (8, 2, 2, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    (5, 2, 2, [[[0, 1], [3, -1]], [[2, -1], [4, -1]]]),
    (3, 3, 1, [[[0]], [[1]], [[2]]])])
def test_chunks_are_neighbours_and_the_last_ones_are_the_shorter(repeats, S, R, table):
  layout = Layout(sharding.make_mesh(dict(pipe=S), jax.devices()[:S]), (), Schedule(repeats=R))
  assert stages.order(repeats, layout).tolist() == table
  x = np.arange(repeats * 3.0).reshape(repeats, 3)
  memory = stages.into_stages(jax.numpy.asarray(x), repeats, layout)
  assert memory.shape[0] == np.array(table).size
  np.testing.assert_array_equal(stages.into_layers(memory, repeats, layout), x)
  np.testing.assert_array_equal(memory.reshape(*np.array(table).shape, 3)[..., 0],
                                np.where(np.array(table) < 0, 0, np.array(table) * 3))


def test_blooms_seventy_layers_lie_on_twelve_stages():
  layout = types.SimpleNamespace(mesh=types.SimpleNamespace(shape={'pipe': 12}), schedule=Schedule())
  table = stages.order(70, layout)
  assert table.shape == (12, 1, 6) and (table < 0).sum() == 2 and (table[:10] >= 0).all()


def test_more_stages_than_layers_are_refused():
  layout = Layout(sharding.make_mesh(dict(pipe=4), jax.devices()[:4]), (), Schedule(repeats=2))
  with pytest.raises(JaxlmError, match=r'pipe=4 × config.pipeline.repeats=2 makes 8 stages, more than the 7 repeated'):
    stages.order(7, layout)


@pytest.mark.parametrize('rows, microbatches, repeats, words', [
    (12, 8, 1, '12 rows .* do not divide by config.pipeline.microbatches=8 × 2 devices'),
    (24, 6, 2, 'microbatches=6 does not divide by config.mesh.pipe=4; with config.pipeline.repeats=2')])
def test_rows_that_do_not_cut_say_what_to_set(rows, microbatches, repeats, words):
  rules = tuple(base.default().sharding.rules)
  layout = Layout(sharding.make_mesh(dict(pipe=4, data=2)), rules, Schedule(microbatches, repeats))
  with pytest.raises(JaxlmError, match=words):
    stages.check_rows(rows, layout)
