"""RoBERTa and XLM-R compute what transformers' do, in every class."""
import pytest

import parity
from jaxlm import fits, config as base
from jaxlm.families import roberta

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=40, type_vocab_size=1)


def tiny(name, kind='Roberta', **config):
  return getattr(transformers, f'{kind}{name}')(getattr(transformers, f'{kind}Config')(**TINY | config))


def test_masked_lm_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM'))


def test_an_untied_output_layer_is_theirs_and_positions_begin_behind_padding(tmp_path):
  lm = parity.check(tmp_path, tiny('ForMaskedLM', tie_word_embeddings=False, pad_token_id=2), packed=False)
  assert lm.model.config.positions.offset == 3


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name), packed=False)


def test_xlm_r_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM', 'XLMRoberta'), packed=False)


@pytest.mark.parametrize('objective', ['translation', 'next_sentence'])
def test_two_texts_are_refused_by_a_table_of_one_token_type(objective):
  config = base.default()
  config.model.update(roberta.SIZES['base'] | dict(head=dict(labels='sequence')))
  config.objective.name = objective
  assert 'embedding.token_types to be 0, or at least 2; it is 1' in fits.mismatch(config)
  config.model.embedding.token_types = 2
  assert fits.mismatch(config) is None
