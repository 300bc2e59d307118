"""OPT computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.errors import JaxlmError
from jaxlm.families import opt


def tiny(**changes):
  return transformers.OPTConfig(**dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                                       ffn_dim=80, max_position_embeddings=64) | changes)


@pytest.mark.parametrize('changes', [
    {}, dict(do_layer_norm_before=False, word_embed_proj_dim=20),
    dict(enable_bias=False, _remove_final_layer_norm=True, tie_word_embeddings=False, activation_function='gelu')])
def test_opt_agrees_with_its_reference(tmp_path, changes):
  lm = parity.check(tmp_path, transformers.OPTForCausalLM(tiny(**changes)), greedy='enable_bias' not in changes)
  assert lm.model.config.residual.final_norm == (not changes)


@pytest.mark.parametrize('head', ['Model', 'ForSequenceClassification', 'ForQuestionAnswering'])
def test_opt_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'OPT{head}')(tiny(num_labels=3)), packed=False)


def test_projected_hidden_states_are_refused_but_under_an_output_layer():
  with pytest.raises(JaxlmError, match='word_embed_proj_dim'):
    opt.from_hf(dict(word_embed_proj_dim=512, architectures=['OPTModel']))
