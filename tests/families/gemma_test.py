"""Gemma, Gemma 2 and Gemma 3's text models compute what transformers' do."""
import pytest

import parity
from jaxlm.errors import JaxlmError
from jaxlm.families import gemma, gemma2, gemma3

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, pad_token_id=0)
# Gemma 3's three largest: embeddings and the rest as the report's table 1 prints them; the others counted in the


def tiny(name, **config):
  return getattr(transformers, f'Gemma{name}')(transformers.GemmaConfig(**TINY | config))


def tiny2(name, **config):
  return getattr(transformers, f'Gemma2{name}')(transformers.Gemma2Config(**TINY | dict(sliding_window=5) | config))


def tiny3(name, **config):
  return getattr(transformers, f'Gemma3{name}')(transformers.Gemma3TextConfig(**TINY | dict(sliding_window=5) | config))


def test_gemma_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM'))


def test_gemma_untied_with_one_key_head_and_biases_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', tie_word_embeddings=False, num_key_value_heads=1, attention_bias=True,
                              hidden_act='gelu'), greedy=False)


def test_gemma2_with_caps_and_windows_is_theirs(tmp_path):
  lm = parity.check(tmp_path, tiny2('ForCausalLM', query_pre_attn_scalar=8))
  assert lm.model.config.attention.windows == (5, 0)


def test_gemma2_without_caps_and_untied_is_theirs(tmp_path):
  parity.check(tmp_path, tiny2('ForCausalLM', attn_logit_softcapping=None, final_logit_softcapping=None,
                               tie_word_embeddings=False, query_pre_attn_scalar=10), greedy=False)


def test_gemma3_with_two_kinds_of_rotations_is_theirs(tmp_path):
  rope = dict(full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1_000.0),
              sliding_attention=dict(rope_type='default', rope_theta=100.0))
  lm = parity.check(tmp_path, tiny3('ForCausalLM', num_hidden_layers=3, sliding_window_pattern=3, rope_parameters=rope,
                                    query_pre_attn_scalar=8))
  assert lm.model.config.attention.windows == (5, 5, 0)


@pytest.mark.parametrize('make, name', [
    (make, name) for make in (tiny, tiny2) for name in ('Model', 'ForSequenceClassification', 'ForTokenClassification')
] + [(tiny3, 'TextModel'), (tiny3, 'TextForSequenceClassification')])
def test_every_class_is_theirs(tmp_path, make, name):
  parity.check(tmp_path, make(name, num_hidden_layers=1), packed=False)


@pytest.mark.parametrize('family, config, told', [
    (gemma, dict(hidden_activation='relu'), "hidden_activation='relu' changes"),
    (gemma2, dict(use_bidirectional_attention=True), 'use_bidirectional_attention=True is not understood'),
    (gemma2, dict(layer_types=['full_attention']), 'layer_types has 1 entries for 26 layers'),
    (gemma3, dict(use_bidirectional_attention=True), 'use_bidirectional_attention=True is not understood'),
])
def test_what_would_compute_something_else_is_refused(family, config, told):
  with pytest.raises(JaxlmError, match=told):
    family.from_hf(config)


def test_older_files_mean_the_same():
  old = dict(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=dict(rope_type='linear', factor=8.0),
             sliding_window_pattern=6, sliding_window=1024, num_hidden_layers=34, hidden_size=2560,
             intermediate_size=10_240, cache_implementation='hybrid')
  new = {key: value for key, value in old.items() if not key.startswith(('rope', 'sliding_window_p'))} | dict(
      layer_types=[('sliding', 'full')[i % 6 == 5] + '_attention' for i in range(34)],
      rope_parameters=dict(full_attention=dict(rope_theta=1e6, rope_type='linear', factor=8.0),
                           sliding_attention=dict(rope_theta=1e4, rope_type='default')))
  assert gemma3.from_hf(old) == gemma3.from_hf(new)
  assert gemma3.from_hf(old)['attention']['windows'] == gemma3.SIZES['4b']['attention']['windows']
