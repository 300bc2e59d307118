"""Mistral computes what transformers' does, with and without its window, in every class."""
import pytest

import parity

transformers = pytest.importorskip('transformers')

# Heads that do not add up to the width, two a key; a window shorter than the text.
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, sliding_window=5, pad_token_id=0)


def tiny(name, **config):
  return getattr(transformers, f'Mistral{name}')(transformers.MistralConfig(**TINY | config))


def test_a_window_shorter_than_the_text_is_theirs(tmp_path):
  lm = parity.check(tmp_path, tiny('ForCausalLM'))
  assert lm.model.config.attention.windows == (5,)


def test_without_a_window_and_tied_it_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', sliding_window=None, tie_word_embeddings=True, head_dim=None),
               greedy=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=1), packed=False)
