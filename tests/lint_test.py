"""Every experiment's step goes by its layout; what does not is told, and where."""
import jax
import pytest

from experiments_test import EXPERIMENTS, get_config
from jaxlm import config as base
from jaxlm import bill, check, lint, losses, sharding
from jaxlm.errors import JaxlmError

MESH = dict(data=2, fsdp=2, tensor=2)
# One of each kind of model in the ordinary suite, the others with the slow ones.
ORDINARY = ('llama', 'bert', 't5', 'xlnet', 'mixtral', 'lstm', 'lora', 'embed')


def compiled(name, mesh=MESH, **changes):
  config = get_config(name, 'smoke')
  config.mesh.update({axis: mesh.get(axis, 1) for axis in config.mesh})
  config.update(seq_len=48, **changes)  # no dim of the model
  config.objective.answer.target_length = min(config.objective.answer.target_length, 48)
  if config.model.attention.num_kv_heads % config.mesh.tensor:
    base.lay(config, kv_heads=None)
  check.validate(config)
  return bill.compiled(config, bill.mesh_of(config))


def faults(step):
  return lint.faults(step.program, step.parts, step.config)


@pytest.mark.parametrize('name', [
    name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS])
def test_an_experiment_goes_by_its_layout(name):
  assert faults(compiled(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize('name', EXPERIMENTS)
@pytest.mark.parametrize('mesh', [dict(fsdp=8), dict(fsdp=2, pipe=2, tensor=2)], ids=['fsdp', 'stages'])
def test_it_does_on_other_meshes(name, mesh):
  try:
    found = faults(compiled(name, mesh))
  except JaxlmError as e:
    assert 'pipe' in mesh and 'config.mesh.pipe=2' in str(e)
  else:
    assert found == []


@pytest.mark.parametrize('mesh', [dict(expert=4), dict(expert=2, data=2, tensor=2)], ids=['alone', 'with others'])
def test_experts_on_their_own_axis_do(mesh):
  assert faults(compiled('mixtral', mesh)) == []


# ---- what does not -------------------------------------------------------------------------------------------------


def test_weights_gathered_beyond_their_layer_are_named(monkeypatch):
  def whole(model, vocabulary, params, batch, rng):
    params = jax.lax.with_sharding_constraint(params, jax.tree.map(lambda _: model.layout.replicated, params))
    return losses.lm_loss(model, vocabulary, params, batch, rng)
  monkeypatch.setitem(losses.LOSSES, 'lm', whole)
  found = faults(compiled('llama', dict(fsdp=8)))
  assert found and all('more than the whole of the largest weight of a layer' in line for line in found)


def test_an_activation_that_is_whole_where_a_rule_splits_it_is_named(monkeypatch):
  pin = sharding.Layout.constrain
  whole = lambda self, x, *axes: pin(self, x, *(None if axis == 'act_mlp' else axis for axis in axes))
  monkeypatch.setattr(sharding.Layout, 'constrain', whole)
  found = faults(compiled('llama', dict(data=2, tensor=4)))
  assert any('has all 256 of act_mlp, which 4 devices share' in line for line in found)
  assert any('all-gather over tensor' in line and 'no all-gather is expected there' in line for line in found)


def test_rows_that_all_devices_hold_are_named(monkeypatch):
  pin = sharding.Layout.constrain
  whole = lambda self, x, *axes: pin(self, x, *(None if axis == 'act_batch' else axis for axis in axes))
  monkeypatch.setattr(sharding.Layout, 'constrain', whole)
  found = faults(compiled('llama', dict(data=8)))
  assert any('holds all 16 rows, which go to 8 devices (act_batch)' in line for line in found)
