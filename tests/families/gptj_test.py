"""GPT-J computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.errors import JaxlmError
from jaxlm.families import keys


def tiny(**changes):
  return transformers.GPTJConfig(**dict(vocab_size=97, n_embd=48, n_layer=2, n_head=3, rotary_dim=6, n_positions=64,
                                        pad_token_id=0) | changes)


@pytest.mark.parametrize('changes', [{}, dict(n_inner=80, rotary_dim=16, tie_word_embeddings=True)])
def test_gptj_agrees_with_its_reference(tmp_path, changes):
  parity.check(tmp_path, transformers.GPTJForCausalLM(tiny(**changes)), greedy=not changes)


@pytest.mark.parametrize('head', ['Model', 'ForSequenceClassification', 'ForQuestionAnswering'])
def test_gptj_heads_agree_with_their_reference(tmp_path, head):
  labels = {} if head == 'ForQuestionAnswering' else dict(num_labels=3)
  parity.check(tmp_path, getattr(transformers, f'GPTJ{head}')(tiny(**labels)), packed=False)


def test_any_even_part_of_a_head_rotates():
  assert all(int(h * keys.rotated('rotary_dim', r, h)) == r for h in range(2, 257) for r in range(2, h + 1, 2))
  for odd in (3, 50):
    with pytest.raises(JaxlmError, match='rotary_dim'):
      keys.rotated('rotary_dim', odd, 16)
