"""Phi-3 computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.errors import JaxlmError
from jaxlm.families import phi3


def tiny(**changes):
  return transformers.Phi3Config(**dict(
      vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
      num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1) | changes)


@pytest.mark.parametrize('changes', [
    dict(sliding_window=5), dict(head_dim=16, tie_word_embeddings=True, rope_parameters=dict(
        rope_type='default', rope_theta=5_000.0, partial_rotary_factor=0.75))])
def test_phi3_agrees_with_its_reference(tmp_path, changes):
  lm = parity.check(tmp_path, transformers.Phi3ForCausalLM(tiny(**changes)), greedy='sliding_window' in changes)
  assert lm.model.config.attention.windows == (changes.get('sliding_window', 0),)


@pytest.mark.parametrize('head', ['SequenceClassification', 'TokenClassification'])
def test_phi3_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'Phi3For{head}')(tiny(num_labels=3)), packed=False)


@pytest.mark.parametrize('kind', ['longrope', 'su', 'yarn'])
def test_rotations_that_change_with_the_length_are_refused(kind):
  with pytest.raises(JaxlmError, match='rope_type'):
    phi3.from_hf(dict(rope_scaling=dict(type=kind, short_factor=[1.0] * 48, long_factor=[2.0] * 48, factor=2.0)))
