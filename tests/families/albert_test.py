"""ALBERT computes what transformers' does, in every class."""
import pytest

import parity

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, embedding_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=40, max_position_embeddings=40)


def tiny(name, **config):
  return getattr(transformers, f'Albert{name}')(transformers.AlbertConfig(**TINY | config))


def test_masked_lm_with_one_layer_for_all_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM'))


def test_an_untied_output_layer_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM', tie_word_embeddings=False, hidden_act='gelu'), packed=False)


@pytest.mark.parametrize('name', ['ForPreTraining', 'Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name), packed=False)
