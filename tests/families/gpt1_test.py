"""GPT-1 computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.errors import JaxlmError
from jaxlm.families import gpt1


def tiny(**changes):
  return transformers.OpenAIGPTConfig(**dict(vocab_size=97, n_embd=48, n_layer=2, n_head=3, n_positions=64,
                                             pad_token_id=0) | changes)


@pytest.mark.parametrize('changes', [{}, dict(afn='silu', tie_word_embeddings=False)])
def test_gpt1_agrees_with_its_reference(tmp_path, changes):
  parity.check(tmp_path, transformers.OpenAIGPTLMHeadModel(tiny(**changes)), greedy=not changes)


@pytest.mark.parametrize('head', ['Model', 'ForSequenceClassification'])
def test_gpt1_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'OpenAIGPT{head}')(tiny(num_labels=3)), packed=False)


def test_activations_are_named_as_gpt1_names_them():
  assert gpt1.from_hf(dict(afn='gelu'))['mlp']['activation'] == 'gelu_tanh'
  with pytest.raises(JaxlmError, match='afn'):
    gpt1.from_hf(dict(afn='gelu_new'))
