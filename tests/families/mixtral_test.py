"""Mixtral computes what transformers' does, gradients too, though it keeps experts in other tensors."""
import pytest

import parity

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2,
            pad_token_id=0)


def tiny(name, **config):
  return getattr(transformers, f'Mixtral{name}')(transformers.MixtralConfig(**TINY | config))


def test_experts_and_gradients_are_theirs(tmp_path):
  # Without the balance loss, which is of a row here and of a batch there.
  parity.check(tmp_path, tiny('ForCausalLM', router_aux_loss_coef=0.0), gradients=True)


def test_with_a_window_tied_and_three_of_four_experts_it_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', sliding_window=5, tie_word_embeddings=True, num_local_experts=4,
                              num_experts_per_tok=3), greedy=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=1), packed=False)
