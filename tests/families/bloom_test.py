"""BLOOM computes what `transformers` computes."""

import parity
import pytest
import transformers

from jaxlm.errors import JaxlmError
from jaxlm.families import bloom


def tiny(**changes):
  return transformers.BloomConfig(**dict(vocab_size=97, hidden_size=48, n_layer=2, n_head=3, pad_token_id=0) | changes)


def test_bloom_agrees_with_its_reference_and_so_do_its_gradients(tmp_path):
  parity.check(tmp_path, transformers.BloomForCausalLM(tiny()), gradients=True)


def test_an_untied_bloom_agrees_with_its_reference(tmp_path):
  parity.check(tmp_path, transformers.BloomForCausalLM(tiny(tie_word_embeddings=False, n_head=6)), greedy=False)


@pytest.mark.parametrize('head', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_bloom_heads_agree_with_their_reference(tmp_path, head):
  parity.check(tmp_path, getattr(transformers, f'Bloom{head}')(tiny(num_labels=3)), packed=False)


def test_older_names_of_sizes_are_read_and_contradictions_refused():
  older = dict(n_embed=64, num_attention_heads=4, num_hidden_layers=3)
  found = bloom.from_hf(older)
  assert (found['width'], found['attention']['num_heads'], found['num_layers']) == (64, 4, 3)
  with pytest.raises(JaxlmError, match='hidden_size=32 and n_embed=64'):
    bloom.from_hf(older | dict(hidden_size=32))
