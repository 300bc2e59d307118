"""Tables spelled out for a model; weights placed on any mesh, stacked or not, equal to those read whole."""
import dataclasses
import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import hf, sharding, transfer, trees, weights
from jaxlm.errors import JaxlmError
from jaxlm.families import llama, table
from jaxlm.models.config import freeze
from jaxlm.models.stack import restack
from jaxlm.models.transformer import Transformer

HF = dict(model_type='mixed', vocab_size=131, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
          num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
MOE = dict(num_experts=3, width=24, every=2, first=1, shared_width=20, shared_gate=True)
START = 'model.layers.{layer}.mlp.'
PARTS = (('gate', 'w1', 'f d -> d f'), ('up', 'w3', 'f d -> d f'), ('down', 'w2', 'd f -> f d'))
OLD = [row for row in llama.TEMPLATES if row[0] not in ('final_norm/scale', 'embed/embedding')]


def family(**more):
  """Llama with a mixture in layers 1 and 3, and all that a table can say."""
  rows = [(f'stack/layer_{{layer}}/mlp/experts/{ours}/kernel', f'{START}experts.{{expert}}.{theirs}.weight', bijection)
          for ours, theirs, bijection in PARTS]
  rows += [(f'stack/layer_{{layer}}/mlp/shared/{ours}/kernel', f'{START}shared.{theirs}.weight', bijection)
           for ours, theirs, bijection in PARTS]
  rows += [('stack/layer_{layer}/mlp/router/kernel', START + 'gate.weight', 'e d -> d e'),
           ('stack/layer_{layer}/mlp/shared_gate/kernel', START + 'shared_gate.weight', '1 d -> d 1'),
           ('embed/embedding', 'model.words.weight', 'v d -> v d', lambda model: model.width == 16),
           ('embed/embedding', 'model.tokens.weight', 'v d -> v d', lambda model: model.width != 16),
           ('final_norm/scale', 'model.norm.weight', 'd -> d')]
  parts = dict(vars(llama), MODEL_TYPE='mixed', TEMPLATES=(*OLD, *rows), TIED={'twin.weight': 'model.words.weight'},
               RENAMED=((r'\.gamma$', '.weight'),), UNUSED={'contacts.weight': lambda model: (1, model.num_layers)},
               from_hf=lambda given: llama.from_hf(given) | dict(family='mixed', moe=MOE),
               to_hf=lambda model: llama.to_hf(model) | dict(model_type='mixed'))
  return types.SimpleNamespace(**(parts | more))


@pytest.fixture
def mixed(monkeypatch):
  made = family()
  monkeypatch.setitem(table.FAMILIES, 'mixed', made)
  return made


def model_of(made, **more):
  return freeze(hf.whole_model(made.from_hf(HF | more)) | dict(scan=False), vocab_size=131, visibility='causal')


def random_params(model, dtype=np.float32):
  rng = np.random.default_rng(0)
  params = {path: rng.normal(size=shape).astype(dtype) for path, shape in transfer.param_shapes(model).items()}
  for path in ('embed/embedding', 'head'):
    params[path][model.vocab_size:] = 0  # rows that no file holds
  return trees.unflatten(params)


@pytest.fixture
def folder(mixed, tmp_path):
  model = model_of(mixed)
  params = random_params(model)
  hf.save_folder(tmp_path / 'a', model, params, shard_bytes=4000)
  return hf.load_folder(tmp_path / 'a'), params


def equal(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert set(a) == set(b)
  for path in a:
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), path)


# ---- tables ------------------------------------------------------------------------------------------------------


def test_experts_are_a_tensor_each_there_and_one_array_here(folder):
  ours, params = folder
  names = {name for row in ours.rows if row.experts for name in row.theirs}
  assert names == {f'model.layers.{layer}.mlp.experts.{expert}.{w}.weight'
                   for layer in (1, 3) for expert in range(3) for w in ('w1', 'w2', 'w3')}
  up_EDF = params['stack']['layer_3']['mlp']['experts']['up']['kernel']
  assert up_EDF.shape == (3, 16, 24)
  np.testing.assert_array_equal(ours.weights['model.layers.3.mlp.experts.2.w3.weight'], up_EDF[2].T)
  assert ours.weights.shapes['model.layers.1.mlp.shared_gate.weight'] == (1, 16)
  equal(ours.params, params)


def test_a_row_can_depend_on_the_model(mixed):
  names = lambda model: {row.theirs[0] for row in transfer.rows(mixed, model) if row.ours == ('embed/embedding',)}
  assert names(model_of(mixed)) == {'model.words.weight'}
  assert names(model_of(mixed, hidden_size=32)) == {'model.tokens.weight'}


def test_a_parameter_without_a_row_is_named_and_one_with_two_is_a_fault_of_the_table(mixed):
  model = model_of(mixed)
  less = family(TEMPLATES=tuple(row for row in mixed.TEMPLATES if row[0] != 'final_norm/scale'))
  with pytest.raises(JaxlmError, match='has no name for parameters of this model: final_norm/scale'):
    transfer.rows(less, model)
  more = family(TEMPLATES=mixed.TEMPLATES + (('final_norm/scale', 'again', 'd -> d'),))
  with pytest.raises(ValueError, match='two rows for final_norm/scale'):
    transfer.rows(more, model)


def rewritten(folder, change):
  """A folder whose tensors have been changed by hand."""
  tensors = {name: np.array(weights.read_weights(folder)[name]) for name in weights.read_weights(folder)}
  for file in [*folder.glob('*.safetensors'), folder / weights.INDEX]:
    file.unlink()
  change(tensors)
  weights.write_weights(folder, [weights.Tensor(name, x.shape, x.dtype, lambda x=x: x)
                                 for name, x in tensors.items()], 10**9)
  return hf.load_folder(folder)


NORM, WORDS = 'model.norm.weight', 'model.words.weight'


@pytest.mark.parametrize('change, told', [
    (lambda t: t.update({'twin.weight': t[WORDS].copy()}), ''),
    (lambda t: t.update({'twin.weight': t.pop(WORDS)}), ''),
    (lambda t: t.update({'model.norm.gamma': t.pop(NORM)}), ''),
    (lambda t: t.pop('contacts.weight'), ''),
    (lambda t: t.update({'twin.weight': t[WORDS] + 1}), 'but twin.weight and model.words.weight differ'),
    (lambda t: t.update({'model.norm.gamma': t[NORM]}), 'Tensor model.norm.weight stands in the weights under two'),
    (lambda t: t.pop('model.layers.1.mlp.experts.1.w1.weight'), 'lack model.layers.1.mlp.experts.1.w1.weight, which'),
    (lambda t: t.update({'model.layers.1.mlp.experts.3.w1.weight': t['model.layers.1.mlp.experts.2.w1.weight']}),
     'hold model.layers.1.mlp.experts.3.w1.weight, which'),
    (lambda t: t.update({'model.layers.1.mlp.experts.0.w1.weight': t['model.layers.1.mlp.experts.0.w1.weight'].T}),
     r'has shape \(16, 24\); config.json calls for \(24, 16\)'),
], ids=['both twins', 'the other twin', 'an old name', 'what is not used may be missing', 'twins that differ',
        'old and new name', 'an expert less', 'an expert more', 'a misshapen expert'])
def test_twins_old_names_and_wrong_experts(change, told, folder, tmp_path):
  if told:
    with pytest.raises(JaxlmError, match=told):
      rewritten(tmp_path / 'a', change)
  else:
    equal(rewritten(tmp_path / 'a', change).params, folder[1])


def test_what_no_output_depends_on_is_written_as_zeros_and_carried_from_folder_to_folder(folder, tmp_path):
  ours, _ = folder
  assert not np.any(ours.unused['contacts.weight']) and ours.unused.shapes == {'contacts.weight': (1, 4)}
  ours = rewritten(tmp_path / 'a', lambda t: t['contacts.weight'].fill(3))
  hf.save_folder(tmp_path / 'b', ours.model, ours.lazy(), unused=ours.unused)
  assert (hf.load_folder(tmp_path / 'b').unused['contacts.weight'] == 3).all()


# ---- into shards -------------------------------------------------------------------------------------------------


MESHES = {'one': {}, 'fsdp': dict(fsdp=8), 'tensor': dict(fsdp=2, tensor=2, expert=-1), 'data': dict(data=8)}


def network(model, mesh, dtype='float32', scan=True):
  sizes = MESHES[mesh]
  made = sharding.make_mesh(sizes, jax.devices() if sizes else jax.devices()[:1])
  layout = sharding.Layout(made, (('expert', None), *base.default().sharding.rules) if mesh == 'tensor' else
                           tuple(base.default().sharding.rules))
  return Transformer(dataclasses.replace(model, scan=scan, param_dtype=dtype), layout)


@pytest.mark.parametrize('mesh, scan, block', [
    ('one', True, 1 << 26), ('one', False, 200), ('fsdp', True, 200), ('tensor', True, 1 << 26),
    ('tensor', False, 1 << 26), ('data', False, 200)])
def test_placed_equals_read_on_any_mesh_stacked_or_not_whole_or_in_blocks(mesh, scan, block, folder, monkeypatch):
  monkeypatch.setattr(transfer, 'BLOCK', block)  # 200 bytes: rows of a matrix go a few at a time
  ours, params = folder
  target = transfer.wanted(network(ours.model, mesh, scan=scan))
  placed = ours.place(target)
  jax.tree.map(lambda x, want: (x.sharding, x.dtype, x.shape) == (want.sharding, want.dtype, want.shape) or
               pytest.fail(f'{x.sharding} is not {want.sharding}'), placed, target)
  equal(placed, restack(params, dataclasses.replace(ours.model, scan=True)) if scan else params)


def test_placing_casts_to_what_is_asked_for(folder):
  ours, params = folder
  placed = ours.place(transfer.wanted(network(ours.model, 'one', 'bfloat16', scan=False)))
  router = placed['stack']['layer_1']['mlp']['router']['kernel']
  assert router.dtype == np.float32  # routers stay so: the model says of each leaf what it is
  equal(trees.map_paths(lambda path, x: x.astype(ml_dtypes.bfloat16), placed),
        jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))


def test_placed_parameters_outlive_their_file(folder, tmp_path):
  ours, params = folder
  placed = ours.place(transfer.wanted(network(ours.model, 'one', scan=False)))
  for file in (tmp_path / 'a').glob('*.safetensors'):
    with open(file, 'r+b') as f:
      f.write(b'\xff' * file.stat().st_size)
  equal(placed, params)


# ---- and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('form, dtype', [
    ('read', np.float32), ('read', np.float16), ('read', ml_dtypes.bfloat16), ('lazy', np.float32),
    ('lazy', np.float16), ('lazy', ml_dtypes.bfloat16), ('stacked', ml_dtypes.bfloat16), ('sharded', np.float32),
    ('sharded', np.float16)])
def test_export_of_an_import_is_the_identity_bit_for_bit(form, dtype, mixed, tmp_path):
  model = model_of(mixed)
  (tmp_path / 'a').mkdir()
  hf.save_folder(tmp_path / 'a', model, random_params(model, dtype))
  kept = json.loads((tmp_path / 'a/config.json').read_text())
  before = weights.read_weights(tmp_path / 'a')
  bits = np.random.default_rng(1)
  noise = {name: np.frombuffer(bits.bytes(x.nbytes), x.dtype).reshape(x.shape).copy() for name, x in before.items()}
  for x in noise.values():  # any bits but signalling nans, which devices quieten
    with np.errstate(invalid='ignore'):
      x[x != x] = np.nan
  weights.write_weights(tmp_path / 'a', [weights.Tensor(name, x.shape, x.dtype, lambda x=x: x)
                                         for name, x in noise.items()], 10**9)
  ours = hf.load_folder(tmp_path / 'a')
  if form in ('read', 'lazy'):
    params = ours.params if form == 'read' else ours.lazy()
  else:
    net = network(ours.model, 'one' if form == 'stacked' else 'fsdp', np.dtype(dtype).name)
    params = ours.place(transfer.wanted(net))
  hf.save_folder(tmp_path / 'b', ours.model, params, kept=kept, unused=ours.unused, dtype=np.dtype(dtype).name)
  after = weights.read_weights(tmp_path / 'b')
  assert set(after) == set(noise) and after.dtypes == before.dtypes
  assert [name for name, x in noise.items() if after[name].tobytes() != x.tobytes()] == []
