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


def trained(name, arg, tmp_path):
  """A few steps of an experiment; by its own argument, where there is one."""
  experiment = get_config(name, ','.join(filter(None, [arg, 'smoke'])))
  assert check.faults(config.loads(config.dumps(experiment))) == []
  experiment.update(steps=2, tensorboard=False)
  experiment.eval.prompts = ()
  last = train.run(experiment, str(tmp_path))
  measured = 'validation' if experiment.data.task else 'heldout'
  most = 26 if arg == 'loss=ipo' else 7  # IPO's begins at 1 / (2 · beta)²
  assert last['train/loss'] < most and 0 < last[f'eval/{measured}/loss'] < most


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_two_smoke_steps_train(name, tmp_path):
  trained(name, '', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name, arg', [
    *(('prompt_tuning', f'method={method},encoder={encoder}') for method, encoder in (
        ('prompt', 'none'), ('prompt', 'mlp'), ('prompt', 'lstm'), ('prefix', 'none'))),
    *(('lora', f'method={method}') for method in ('ia3', 'bottleneck', 'bitfit')), ('lora', 'base=int8'), ('lora', 'base=nf4'),
    *(('dpo', f'loss={loss}') for loss in ('ipo', 'orpo', 'simpo', 'kto')), ('grpo', 'objective=ppo'), ('code', 'task=line'),
    ('summarize', 'structure=encoder_decoder'), ('translate', 'structure=decoder'), ('embed', 'task=comments'),
    *(('small', f'structure={structure}') for structure in ('encoder', 'encoder_decoder'))])
def test_every_argument_of_an_adaptation_trains(name, arg, tmp_path):
  trained(name, arg, tmp_path)
