"""ModernBERT computes what transformers' does, windows, bases and all."""
import pytest

import parity
from jaxlm.errors import JaxlmError
from jaxlm.families import modernbert

transformers = pytest.importorskip('transformers')

# Four layers, of which the first and the last see everything, and windows shorter than the text.
TINY = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=64, local_attention=6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2)
BIASED = dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, decoder_bias=False)


def tiny(name, **config):
  return getattr(transformers, f'ModernBert{name}')(transformers.ModernBertConfig(**TINY | config))


def test_masked_lm_with_windows_shorter_than_the_text_is_theirs(tmp_path):
  lm = parity.check(tmp_path, tiny('ForMaskedLM'))
  assert lm.model.config.attention.windows == (0, 4, 4)
  assert 'attention_norm' not in lm.params['stack']['layer_0'] and 'attention_norm' in lm.params['stack']['layer_1']


def test_biases_and_an_untied_output_layer_are_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM', tie_word_embeddings=False, num_hidden_layers=2, **BIASED), packed=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=2, classifier_pooling='mean'), packed=False)


def test_old_and_new_folders_say_the_same():
  old = dict(global_attn_every_n_layers=3, global_rope_theta=160_000.0, local_rope_theta=10_000.0, local_attention=128,
             position_embedding_type='absolute', layer_norm_eps=1e-5, repad_logits_with_grad=False)
  assert modernbert.from_hf(old) == modernbert.from_hf(transformers.ModernBertConfig().to_dict())


@pytest.mark.parametrize('key, value, told', [('classifier_activation', 'relu', 'which the heads here share'),
                                              ('classifier_pooling', 'max', 'unknown classifier_pooling')])
def test_heads_that_are_not_computed_are_refused(key, value, told):
  with pytest.raises(JaxlmError, match=told):
    modernbert.from_hf({key: value})
