"""StarCoder2 computes what `transformers` computes, with and without biases and its window, in every class."""
import pytest

import parity

transformers = pytest.importorskip('transformers')

# Three queries a key, and a window shorter than the text.
TINY = dict(vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=5, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)


def tiny(name, **config):
  return getattr(transformers, f'Starcoder2{name}')(transformers.Starcoder2Config(**TINY | config))


def test_a_window_shorter_than_the_text_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM'))


def test_without_biases_or_a_window_and_untied_it_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', use_bias=False, sliding_window=None, tie_word_embeddings=False),
               greedy=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=1), packed=False)
