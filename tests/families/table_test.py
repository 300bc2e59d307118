"""Every experiment is valid at every size, and has a form for a smoke test."""
import importlib.util
from pathlib import Path

import pytest

from jaxlm import config as base
from jaxlm import hf, settings
from jaxlm.families import gpt3, table
from jaxlm.models.config import freeze

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'

SIZES = [(name, size) for name, family in table.FAMILIES.items() for size in family.SIZES]


def frozen(overrides, vocab_size):
  return freeze(hf.whole_model(overrides), vocab_size=vocab_size, visibility='causal')


def test_gpt3_alternates_dense_and_banded_layers():
  model = frozen(gpt3.SIZES['175b'], gpt3.VOCAB_SIZE)
  assert [model.window(layer) for layer in range(4)] == [0, 128, 0, 128]


def experiment(name, arg):
  name = {'esm': 'protein'}.get(name, name)
  spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


@pytest.mark.parametrize('name, size', SIZES)
def test_every_experiment_is_valid_at_every_size_and_trains_the_model_of_that_size(name, size):
  config = experiment(name, f'size={size}')
  assert settings.faults(config) == []
  # Not a family's: ELECTRA's generator, which its folders lack; the id of the mask, which is the tokenizer's (ESM-2).
  kept = lambda model: {path: value for path, value in hf.computed(model).items()
                        if not path.startswith('generator/') and path != 'embedding/zeroed'}
  assert kept(base.resolved(config)['model']) == kept(hf.whole_model(table.FAMILIES[name].SIZES[size]))


@pytest.mark.parametrize('name, size', SIZES)
def test_every_experiment_has_a_smoke_form(name, size):
  config = experiment(name, f'size={size},smoke')
  assert settings.faults(config) == []
  assert (config.model.width, config.model.num_layers, config.seq_len, config.batch_size) == (64, 4, 64, 16)


def test_gpt3_trains_on_300_billion_tokens_and_lowers_its_rate_over_260():
  for size in gpt3.SIZES:
    config = experiment('gpt3', f'size={size}')
    tokens = lambda steps: steps * config.batch_size * config.seq_len / 1e9
    assert abs(tokens(config.steps) - 300) < 0.01 and abs(tokens(config.optim.total_steps) - 260) < 0.01


def test_llama_31_trains_at_the_length_its_rotations_are_scaled_from():
  config = experiment('llama', 'size=3.1-8b')
  assert (config.seq_len, config.model.positions.rope.original_length, config.model.max_length) == (8192, 8192, 131_072)


@pytest.mark.parametrize('name', [n for n, f in table.FAMILIES.items() if hasattr(f, 'MODEL_TYPE')])
def test_config_of_every_size_survives_hugging_face(name):
  family = table.FAMILIES[name]
  for overrides in family.SIZES.values():
    model = frozen(overrides, 1000)
    assert hf.computed(hf.whole_model(family.from_hf(family.to_hf(model)))) == hf.computed(hf.whole_model(overrides))
