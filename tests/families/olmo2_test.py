"""OLMo 2 computes what `transformers` computes."""

import parity
import pytest
import transformers



def tiny(**changes):
  return transformers.Olmo2Config(**dict(
      vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
      num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1) | changes)


@pytest.mark.parametrize('changes', [{}, dict(head_dim=10, attention_bias=True, tie_word_embeddings=True)])
def test_olmo2_agrees_with_its_reference(tmp_path, changes):
  parity.check(tmp_path, transformers.Olmo2ForCausalLM(tiny(**changes)), greedy=not changes)


@pytest.mark.parametrize('head', ['Model', 'ForSequenceClassification'])
def test_olmo2_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'Olmo2{head}')(tiny(num_labels=3)), packed=False)
