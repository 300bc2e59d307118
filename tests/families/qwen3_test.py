"""Qwen3 and its mixtures compute what transformers' do."""
import pytest

import parity

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, pad_token_id=0)
MIXED = TINY | dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24)


def tiny(name, **config):
  return getattr(transformers, f'Qwen3{name}')(transformers.Qwen3Config(**TINY | config))


def mixed(name, **config):
  return getattr(transformers, f'Qwen3Moe{name}')(transformers.Qwen3MoeConfig(**MIXED | config))


def test_norms_of_heads_are_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM'))


def test_tied_with_biases_and_a_window_it_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', tie_word_embeddings=True, attention_bias=True, use_sliding_window=True,
                              sliding_window=5, layer_types=['sliding_attention', 'full_attention']),
               greedy=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=1), packed=False)


def test_experts_are_theirs(tmp_path):
  parity.check(tmp_path, mixed('ForCausalLM', norm_topk_prob=True), greedy=False)


def test_experts_after_a_dense_layer_whose_weights_do_not_sum_to_one_are_theirs(tmp_path):
  parity.check(tmp_path, mixed('ForCausalLM', mlp_only_layers=[0], use_sliding_window=True, sliding_window=5))


def test_a_mixture_that_finds_spans_is_theirs(tmp_path):
  parity.check(tmp_path, mixed('ForQuestionAnswering', num_hidden_layers=1), packed=False)
