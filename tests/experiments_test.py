"""Every experiment validates as published, and trains two smoke steps."""
import importlib.util
import pathlib

import pytest

from jaxlm import check, config, train
from jaxlm.families import lstm, table

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / 'experiments').glob('*.py'))
ARGS = {name: [f'size={size}' for size in family.SIZES] for name, family in table.FAMILIES.items()}
ARGS['predecessors'] = [f'cell={cell}' for cell in ('rnn', 'gru', 'lstm', 'mlstm', 'attention')]
ARGS['lstm'] += [f'cell={cell},laptop' for cell in lstm.CELLS]


def get_config(name, arg=None):
  spec = importlib.util.spec_from_file_location(name, ROOT / f'experiments/{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_size_is_without_fault(name):
  for arg in [None, *ARGS.get(name, ())]:
    assert check.faults(get_config(name, arg)) == []


@pytest.mark.parametrize('name', sorted(set(EXPERIMENTS) & set(ARGS)))
def test_every_family_has_a_form_for_a_laptop(name):
  assert check.faults(get_config(name, 'laptop')) == []


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_two_smoke_steps_train(name, tmp_path):
  experiment = get_config(name, 'smoke')
  assert check.faults(config.loads(config.dumps(experiment))) == []
  experiment.update(steps=2, tensorboard=False)
  experiment.eval.prompts = ()
  last = train.run(experiment, str(tmp_path))
  measured = 'validation' if experiment.data.task else 'heldout'
  assert last['train/loss'] < 7 and 0 < last[f'eval/{measured}/loss'] < 7
