"""BART and the 2017 Transformer (Marian) beside `transformers`."""

import numpy as np
import pytest

import jaxlm
from jaxlm import hf
from jaxlm.errors import JaxlmError
from jaxlm.families import bart, transformer2017
from tests.families.parity import check, randomised

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def config(kind, **given):
  return kind(**dict(
      vocab_size=97, d_model=30, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
      max_position_embeddings=64, decoder_attention_heads=3, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=1,
      bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None) | given)


def biased(model):
  """With logits that the bias decides about."""
  model.final_logits_bias = torch.randn(model.final_logits_bias.shape)
  return model


def test_bart_is_theirs(tmp_path):
  theirs = config(transformers.BartConfig, encoder_layers=2, decoder_layers=1)
  check(tmp_path, biased(transformers.BartForConditionalGeneration(theirs)))


def test_bart_with_scaled_embeddings_and_relu_is_theirs(tmp_path):
  theirs = config(transformers.BartConfig, scale_embedding=True, activation_function='relu', decoder_start_token_id=0)
  lm = check(tmp_path, biased(transformers.BartForConditionalGeneration(theirs)), packed=False)
  assert lm.model.config.embedding_scale == 30 ** 0.5


def test_marian_is_theirs(tmp_path):
  theirs = config(transformers.MarianConfig, d_model=36, decoder_layers=2, scale_embedding=True,
                  activation_function='swish', pad_token_id=96, decoder_start_token_id=96)
  lm = check(tmp_path, biased(transformers.MarianMTModel(theirs)))
  assert lm.model.config.family == 'transformer2017' and lm.model.config.positions.kind == 'sinusoidal'


def test_body_of_marian_is_theirs_but_for_tables_of_sines(tmp_path):
  model = randomised(transformers.MarianModel(config(transformers.MarianConfig)))
  model.save_pretrained(tmp_path / 'theirs')
  lm = jaxlm.load(str(tmp_path / 'theirs'))
  ids = np.random.default_rng(0).integers(3, 96, (2, 7))
  with torch.no_grad():
    want = model(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(ids[:, ::-1].copy())).last_hidden_state
  np.testing.assert_allclose(lm.hidden(ids[:, ::-1], ids), want.numpy(), atol=1e-4)
  folder = hf.load_folder(tmp_path / 'theirs')
  hf.save_folder(tmp_path / 'ours', folder.model, lm.params, kept=folder.hf)
  _, told = type(model).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert told['missing_keys'] == {f'{side}.embed_positions.weight' for side in ('encoder', 'decoder')}  # made anew


@pytest.mark.parametrize('name', ['BartModel', 'BartForQuestionAnswering'])
def test_other_classes_are_theirs(tmp_path, name):
  kind = getattr(transformers, name)
  check(tmp_path, kind(config(kind.config_class)), packed=False)


def test_classifier_reads_the_last_token_of_the_text_shifted(tmp_path):
  model = randomised(transformers.BartForSequenceClassification(config(transformers.BartConfig, num_labels=3)))
  model.save_pretrained(tmp_path / 'theirs')
  ids = np.random.default_rng(0).integers(3, 97, (3, 9))
  mask = np.arange(9) < np.array([[9], [4], [6]])
  ids[np.arange(3), mask.sum(1) - 1] = 2  # the end token, whose place in the decoder stands for the row
  shifted = np.concatenate([np.full((3, 1), 2), ids[:, :-1]], axis=1)
  with torch.no_grad():
    want = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                 decoder_input_ids=torch.tensor(shifted)).logits.numpy()
  lm = jaxlm.load(str(tmp_path / 'theirs'))
  np.testing.assert_allclose(lm.scores(shifted, ids, mask, mask), want, atol=1e-4)
  folder = hf.load_folder(tmp_path / 'theirs')
  hf.save_folder(tmp_path / 'ours', folder.model, lm.params, kept=folder.hf)
  _, told = type(model).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not any(told[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told


@pytest.mark.parametrize('kind, given, fault', [
    ('BartConfig', dict(decoder_ffn_dim=48), 'encoder_ffn_dim=24 and decoder_ffn_dim=48'),
    ('BartConfig', dict(tie_word_embeddings=False), 'tie_word_embeddings=False'),
    ('BartConfig', dict(normalize_before=True), 'normalize_before=True'),
    ('MarianConfig', dict(share_encoder_decoder_embeddings=False), 'share_encoder_decoder_embeddings=False'),
    ('MarianConfig', dict(decoder_vocab_size=50), 'decoder_vocab_size=50'),
])
def test_what_changes_the_computation_is_refused_by_name(kind, given, fault):
  theirs = config(getattr(transformers, kind), **given).to_dict()
  family = bart if kind == 'BartConfig' else transformer2017
  with pytest.raises(JaxlmError, match=fault):
    family.from_hf(theirs)
