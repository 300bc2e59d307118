"""ERNIE computes what transformers' does, with and without tasks."""
import pytest

import parity

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=40)


def tiny(name, **config):
  return getattr(transformers, f'Ernie{name}')(transformers.ErnieConfig(**TINY | config))


def test_with_a_table_of_tasks_it_is_theirs(tmp_path):
  lm = parity.check(tmp_path, tiny('ForMaskedLM', use_task_id=True, task_type_vocab_size=4))
  assert lm.params['task_embed']['embedding'].shape == (4, 32)


def test_an_untied_output_layer_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM', tie_word_embeddings=False, hidden_act='relu'), packed=False)


@pytest.mark.parametrize('name', ['ForPreTraining', 'Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name), packed=False)
