"""Falcon computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.errors import JaxlmError
from jaxlm.families import falcon


BLOCKS = {
    'of the 7b': dict(),
    'of the 40b': dict(new_decoder_architecture=True, num_attention_heads=6, num_kv_heads=2),
    'of the 11b': dict(new_decoder_architecture=True, num_attention_heads=6, num_kv_heads=2, num_ln_in_parallel_attn=1,
                       tie_word_embeddings=False),
    # 24 heads have slopes that bfloat16 rounds.
    'of refined web': dict(multi_query=False, parallel_attn=False, alibi=True, bias=True, ffn_hidden_size=80,
                           num_attention_heads=24)}


def tiny(**changes):
  return transformers.FalconConfig(**dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                                          max_position_embeddings=64, pad_token_id=0) | changes)


@pytest.mark.parametrize('block', BLOCKS)
def test_falcon_agrees_with_its_reference(tmp_path, block):
  lm = parity.check(tmp_path, transformers.FalconForCausalLM(tiny(**BLOCKS[block])), greedy=block == 'of the 7b')
  assert lm.model.config.residual.parallel == (block != 'of refined web')


@pytest.mark.parametrize('head', ['SequenceClassification', 'TokenClassification', 'QuestionAnswering'])
def test_falcon_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'FalconFor{head}')(tiny(num_labels=3)), packed=False)


@pytest.mark.parametrize('given', [dict(num_ln_in_parallel_attn=2), dict(multi_query=False, num_attention_heads=8,
                                                                        hidden_size=64, num_kv_heads=2),
                                   dict(new_decoder_architecture=True, parallel_attn=False)])
def test_blocks_that_cannot_be_are_refused(given):
  with pytest.raises(JaxlmError, match='new_decoder_architecture'):
    falcon.from_hf(given)
