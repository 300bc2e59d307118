"""Command R computes what `transformers` computes."""

import parity
import pytest
import transformers



def tiny(**changes):
  return transformers.CohereConfig(**dict(
      vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
      num_key_value_heads=2, max_position_embeddings=64, logit_scale=0.3, bos_token_id=1, eos_token_id=2) | changes)


@pytest.mark.parametrize('changes', [dict(use_qk_norm=True), dict(head_dim=10, attention_bias=True,
                                                                  tie_word_embeddings=False)])
def test_cohere_agrees_with_its_reference(tmp_path, changes):
  lm = parity.check(tmp_path, transformers.CohereForCausalLM(tiny(**changes)), greedy='head_dim' not in changes)
  assert lm.model.config.attention.qk_norm == ('heads' if 'use_qk_norm' in changes else 'none')


def test_a_cohere_body_agrees_with_its_reference(tmp_path):
  parity.check(tmp_path, transformers.CohereModel(tiny()), packed=False)
