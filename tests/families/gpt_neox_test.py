"""GPT-NeoX computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.families import gpt_neox


def tiny(**changes):
  return transformers.GPTNeoXConfig(**dict(
      vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
      max_position_embeddings=64, pad_token_id=0) | changes)


@pytest.mark.parametrize('changes', [{}, dict(use_parallel_residual=False, attention_bias=False, hidden_act='gelu_fast',
                                              tie_word_embeddings=True)])
def test_gpt_neox_agrees_with_its_reference(tmp_path, changes):
  rope = dict(rope_type='default', rope_theta=5_000.0, partial_rotary_factor=0.5 if changes else 0.25)
  lm = parity.check(tmp_path, transformers.GPTNeoXForCausalLM(tiny(rope_parameters=rope, **changes)),
                    greedy=not changes)
  assert lm.model.config.residual.parallel == (not changes)


@pytest.mark.parametrize('head', ['SequenceClassification', 'TokenClassification', 'QuestionAnswering'])
def test_gpt_neox_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'GPTNeoXFor{head}')(tiny(num_labels=3)), packed=False)


def test_older_names_of_rotary_positions_are_read():
  rope = gpt_neox.from_hf(dict(rotary_pct=0.5, rotary_emb_base=20_000))['positions']['rope']
  assert (rope['fraction'], rope['base']) == (0.5, 20_000.0)
