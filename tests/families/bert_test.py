"""BERT computes what transformers' does, in every class."""
import re

import numpy as np
import pytest
import tokenizers

import jaxlm
import parity
from jaxlm import hf
from jaxlm.errors import JaxlmError
from jaxlm.families import bert

transformers = pytest.importorskip('transformers')
import safetensors.numpy  # noqa: E402

TINY = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=40, type_vocab_size=3)


def tiny(name, **config):
  return getattr(transformers, f'Bert{name}')(transformers.BertConfig(**TINY | config))


def test_masked_lm_and_its_gradients_are_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM'), gradients=True)


def test_an_untied_output_layer_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM', tie_word_embeddings=False, hidden_act='relu'), packed=False)


@pytest.mark.parametrize('name', ['ForPreTraining', 'Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  labels = dict(num_labels=3) if name in ('ForSequenceClassification', 'ForTokenClassification') else {}
  parity.check(tmp_path, tiny(name, **labels), packed=False)


def test_an_encoder_that_sees_only_what_precedes_is_refused(tmp_path):
  tiny('ForMaskedLM', is_decoder=True).save_pretrained(tmp_path)
  with pytest.raises(JaxlmError, match='is_decoder=True changes'):
    jaxlm.load(str(tmp_path))


def test_a_tokenizer_that_pads_puts_no_padding_around_texts(tmp_path):
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[PAD]': 0, '[CLS]': 1, '[SEP]': 2, 'a': 3}, '[PAD]'))
  backend.add_special_tokens(['[PAD]', '[CLS]', '[SEP]'])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 1), ('[SEP]', 2)])
  backend.enable_padding(length=16)
  backend.save(str(tmp_path / 'tokenizer.json'))
  assert hf.frame(tmp_path / 'tokenizer.json') == ([1], [2])


def test_older_names_and_heads_of_other_classes_are_read(tmp_path):
  parity.randomised(tiny('ForPreTraining')).save_pretrained(tmp_path)
  file = tmp_path / 'model.safetensors'
  old = {re.sub('LayerNorm.weight$', 'LayerNorm.gamma', re.sub('LayerNorm.bias$', 'LayerNorm.beta', name)): x
         for name, x in safetensors.numpy.load_file(file).items()}
  old['bert.embeddings.position_ids'] = np.arange(40)[None]
  safetensors.numpy.save_file(old, file)
  config = tmp_path / 'config.json'
  config.write_text(config.read_text().replace('BertForPreTraining', 'BertForMaskedLM'))  # as the hub's folder has it
  lm = jaxlm.load(str(tmp_path))
  np.testing.assert_array_equal(lm.params['embed_norm']['scale'], old['bert.embeddings.LayerNorm.gamma'])
  assert lm.model.config.head.labels == 'none'


def test_a_decoder_made_of_it_is_refused():
  with pytest.raises(JaxlmError, match='is_decoder=True changes what is computed'):
    bert.from_hf(dict(is_decoder=True))
