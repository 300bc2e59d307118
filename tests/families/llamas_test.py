"""Families near Llama: defaults are the reference's, and whatever a file says is read or refused in a line."""
import pytest

from jaxlm.errors import JaxlmError
from jaxlm.families import (deepseek_v3, gemma, gemma2, gemma3, llama, llamas, mistral, mixtral, qwen2, qwen2_moe,
                            qwen3, qwen3_moe)

CONFIGS = {mistral: 'Mistral', mixtral: 'Mixtral', qwen2: 'Qwen2', qwen2_moe: 'Qwen2Moe', qwen3: 'Qwen3',
           qwen3_moe: 'Qwen3Moe', gemma: 'Gemma', gemma2: 'Gemma2', gemma3: 'Gemma3Text', deepseek_v3: 'DeepseekV3'}
FAMILIES = pytest.mark.parametrize('family', CONFIGS, ids=lambda family: family.MODEL_TYPE)


@FAMILIES
def test_defaults_are_those_of_the_reference(family):
  transformers = pytest.importorskip('transformers')
  config = getattr(transformers, f'{CONFIGS[family]}Config')()
  assert family.from_hf({}) == family.from_hf(config.to_dict())


@FAMILIES
def test_every_class_that_is_read_is_one_of_theirs(family):
  transformers = pytest.importorskip('transformers')
  assert all(hasattr(transformers, name) for name in family.ARCHITECTURES)


@FAMILIES
def test_no_value_of_any_key_ends_in_anything_but_one_line(family):
  odd = (None, True, 0, -1, 3, 2 ** 80, 0.5, float('inf'), '', 'x', [], [1], {}, {'a': 1}, {'rope_type': 3})
  for key in [*family.KEYS, *getattr(family, 'FIXED', {}), 'rope_scaling', 'rope_parameters', 'rope_theta', 'unknown',
              'rope_local_base_freq', 'num_local_experts', 'hidden_activation']:
    for value in odd:
      for more in ({}, dict(use_sliding_window=True), dict(num_hidden_layers=2)):
        try:
          family.from_hf(more | {key: value})
        except JaxlmError as e:
          assert '\n' not in str(e) and str(e).startswith('config.json: ')


def test_span_heads_have_names_of_their_own_and_only_where_there_are_spans():
  table = llamas.with_spans(llama.TEMPLATES, prefix='transformer.')
  model = lambda labels: type('model', (), dict(head=type('head', (), dict(labels=labels))))
  names = lambda labels: {theirs for _, theirs, _, when in table if when(model(labels))}
  assert names('token') == {theirs for _, theirs, _ in llama.TEMPLATES}
  assert {'transformer.norm.weight', 'qa_outputs.weight'} < names('span') and not any(
      name.startswith(('model.', 'score.')) for name in names('span'))
