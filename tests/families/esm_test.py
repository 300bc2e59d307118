"""ESM computes what transformers' does, in every class, with wavelengths as its files hold them."""
import numpy as np
import pytest

import jaxlm
import parity
from jaxlm import convert, hf, programs, weights
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.families import esm

transformers = pytest.importorskip('transformers')
import torch  # noqa: E402

TINY = dict(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=40, pad_token_id=1, mask_token_id=32, position_embedding_type='rotary',
            token_dropout=True)
ONE_B = dict(position_embedding_type='absolute', emb_layer_norm_before=True)


def tiny(name, **config):
  return getattr(transformers, f'Esm{name}')(transformers.EsmConfig(**TINY | config))


def test_esm_2_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM'))


def test_esm_1b_untied_is_theirs(tmp_path):
  lm = parity.check(tmp_path, tiny('ForMaskedLM', vocab_size=97, tie_word_embeddings=False, **ONE_B), packed=False)
  assert lm.model.config.positions.kind == 'learned'


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, token_dropout=False), packed=False)


def test_what_no_output_depends_on_comes_back_from_a_run(tmp_path):
  parity.randomised(tiny('ForMaskedLM', vocab_size=300)).save_pretrained(tmp_path / 'a')
  tokenizers.bytes_tokenizer().save(tmp_path / 'a')
  for source, target in (('a', 'run'), ('run', 'b')):
    assert programs.outcome(convert.main, ['', f'--from={tmp_path / source}', f'--to={tmp_path / target}']) == 0
  a, b = (weights.read_weights(tmp_path / name) for name in 'ab')
  for name in ('esm.contact_head.regression.weight', 'esm.contact_head.regression.bias'):
    np.testing.assert_array_equal(a[name], b[name])


def test_masks_embed_as_zero_and_the_rest_makes_up_for_them(tmp_path):
  model = parity.randomised(tiny('ForMaskedLM'))
  model.save_pretrained(tmp_path)
  lm = jaxlm.load(str(tmp_path))
  tokens = np.array([[0, 5, 32, 7, 32, 9, 2], [0, 32, 6, 7, 2, 1, 1]])
  mask = tokens != 1
  with torch.no_grad():
    want = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
  np.testing.assert_allclose(np.asarray(lm.logits(tokens, mask))[mask], want[mask], atol=1e-4)


def test_wavelengths_of_half_precision_are_computed_with_and_written_back(tmp_path):
  model = parity.randomised(tiny('ForMaskedLM'))
  waves = model.esm.rotary_embeddings.inv_freq
  tokens = np.random.default_rng(0).integers(4, 24, (1, 300))
  with torch.no_grad():
    plain = model(torch.tensor(tokens)).logits.numpy()
    waves.copy_(waves.half().float())
    want = model(torch.tensor(tokens)).logits.numpy()
  model.save_pretrained(tmp_path / 'theirs')
  lm = jaxlm.load(str(tmp_path / 'theirs'))
  np.testing.assert_allclose(lm.logits(tokens), want, atol=1e-4)
  assert np.abs(want - plain).max() > 1e-3  # which it would be without
  folder = hf.load_folder(tmp_path / 'theirs')
  hf.save_folder(tmp_path / 'ours', folder.model, lm.params, kept=folder.hf, unused=folder.unused)
  back, told = type(model).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not told['missing_keys'] and not told['unexpected_keys']
  np.testing.assert_array_equal(back.esm.rotary_embeddings.inv_freq, waves)
  assert hf.load_folder(tmp_path / 'ours').model == folder.model


def test_wavelengths_of_another_base_are_refused():
  name = 'esm.rotary_embeddings.inv_freq'
  with pytest.raises(JaxlmError, match='does not hold the wavelengths of rope_theta=10000'):
    esm.settled(TINY, {name: np.ones(4, np.float32)})
  with pytest.raises(JaxlmError, match='config.json or another layer says float16'):
    esm.settled(TINY | dict(rope_inv_freq_dtype='float16'), {name: esm._waves(10_000.0, 8, 'float32')})


@pytest.mark.parametrize('key, value, told', [
    ('position_embedding_type', 'relative_key', 'unknown position_embedding_type'),
    ('is_folding_model', True, 'is_folding_model=True changes'), ('mask_token_id', None, 'set mask_token_id'),
    ('num_attention_heads', 32, 'heads of an even size'),
    ('rope_inv_freq_dtype', 'int8', 'unknown rope_inv_freq_dtype')])
def test_what_is_not_computed_is_refused(key, value, told):
  with pytest.raises(JaxlmError, match=told):
    esm.from_hf(TINY | {key: value})
