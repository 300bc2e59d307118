"""T5, mT5 and UL2 beside `transformers`."""
import json
import math

import numpy as np
import pytest

import jaxlm
from jaxlm import hf, transfer
from jaxlm.families import ul2
from jaxlm.models.config import freeze
from tests.families.parity import check, randomised

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def count(family, size):
  model = freeze(hf.whole_model(family.SIZES[size]), vocab_size=family.VOCAB_SIZE, visibility='causal')
  return sum(math.prod(shape) for shape in transfer.param_shapes(model).values())


def config(kind=None, **given):
  # 3 heads of 5 are not the width; 97 pieces do not divide by 8; the far buckets are reached.
  return (kind or transformers.T5Config)(**dict(
      vocab_size=97, d_model=32, d_kv=5, d_ff=24, num_layers=1, num_heads=3,
      relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=0) | given)


def untied(model):
  model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
  return model


def test_t5_is_theirs_with_gradients(tmp_path):
  lm = check(tmp_path, transformers.T5ForConditionalGeneration(config(num_layers=2)), gradients=True)
  assert lm.model.config.tie_embeddings and lm.model.config.logit_scale == 32 ** -0.5


def test_t5_of_version_1_1_is_theirs_gated_and_untied(tmp_path):
  model = untied(transformers.T5ForConditionalGeneration(config(feed_forward_proj='gated-gelu',
                                                                tie_word_embeddings=False)))
  lm = check(tmp_path, model, packed=False, greedy=False)
  assert not lm.model.config.tie_embeddings and lm.model.config.logit_scale == 1.0
  assert json.loads((tmp_path / 'ours/config.json').read_text())['tie_word_embeddings'] is False


def test_untied_t5_as_the_hub_has_it_says_so_in_config_json_alone(tmp_path):
  model = randomised(untied(transformers.T5ForConditionalGeneration(config(tie_word_embeddings=False))))
  model.save_pretrained(tmp_path)
  given = json.loads((tmp_path / 'config.json').read_text())
  del given['scale_decoder_outputs'], given['dense_act_fn'], given['is_gated_act']
  (tmp_path / 'config.json').write_text(json.dumps(given | dict(tie_word_embeddings=False)))
  found = hf.load_folder(tmp_path).model
  assert (found.tie_embeddings, found.logit_scale) == (False, 1.0)


def test_ul2_is_t5_with_a_gated_silu(tmp_path):
  lm = check(tmp_path, transformers.T5ForConditionalGeneration(config(feed_forward_proj='gated-silu')), packed=False,
             greedy=False)
  assert lm.model.config.mlp.activation == ul2.SIZES['20b']['mlp']['activation'] == 'silu'


def test_mt5_is_theirs(tmp_path):
  model = untied(transformers.MT5ForConditionalGeneration(config(transformers.MT5Config)))
  assert check(tmp_path, model, packed=False).model.config.family == 'mt5'


def test_bodies_are_theirs(tmp_path):
  check(tmp_path / 'both', transformers.T5Model(config(num_decoder_layers=2)), packed=False)
  check(tmp_path / 'encoder', transformers.T5EncoderModel(config(num_layers=2, num_decoder_layers=1)))


def test_token_and_span_heads_are_theirs(tmp_path):
  check(tmp_path / 'token', transformers.T5ForTokenClassification(config(num_labels=5)), packed=False)
  check(tmp_path / 'span', transformers.T5ForQuestionAnswering(config(num_labels=2)), packed=False)


def test_classifier_reads_the_last_token_of_the_text_shifted(tmp_path):
  model = randomised(transformers.T5ForSequenceClassification(config(num_labels=3)))
  model.save_pretrained(tmp_path / 'theirs')
  ids = np.random.default_rng(0).integers(3, 97, (3, 9))
  mask = np.arange(9) < np.array([[9], [4], [6]])
  ids = np.where(mask, ids, 0)
  ids[np.arange(3), mask.sum(1) - 1] = 1  # the end token, whose place in the decoder stands for the row
  with torch.no_grad():
    want = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
  lm = jaxlm.load(str(tmp_path / 'theirs'))
  shifted = np.concatenate([np.zeros((3, 1), int), ids[:, :-1]], axis=1)
  np.testing.assert_allclose(lm.scores(shifted, ids, mask, mask), want, atol=1e-4)
  folder = hf.load_folder(tmp_path / 'theirs')
  hf.save_folder(tmp_path / 'ours', folder.model, lm.params, kept=folder.hf)
  _, told = type(model).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not any(told[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told
