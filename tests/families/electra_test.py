"""ELECTRA, discriminator and generator, computes what transformers' does."""
import flax.linen as nn
import jax
import numpy as np
import pytest

import parity
from jaxlm import config as base
from jaxlm import hf, sharding
from jaxlm.families import electra
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer

transformers = pytest.importorskip('transformers')
import torch  # noqa: E402

TINY = dict(vocab_size=97, embedding_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=40, max_position_embeddings=40)


def tiny(name, **config):
  return getattr(transformers, f'Electra{name}')(transformers.ElectraConfig(**TINY | config))


def test_a_discriminator_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForPreTraining'))


def test_a_discriminator_as_wide_as_its_embeddings_is_theirs(tmp_path):
  lm = parity.check(tmp_path, tiny('ForPreTraining', embedding_size=32), packed=False)
  assert 'embed_project' not in lm.params


def test_a_generator_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM'), packed=False)


def test_a_generator_with_an_untied_output_layer_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForMaskedLM', tie_word_embeddings=False), packed=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name), packed=False)


def test_a_model_that_trains_both_is_written_as_two_folders(tmp_path):
  config = hf.whole_model(electra.SIZES['small'] | dict(
      width=32, num_layers=2, max_length=40, embedding=dict(width=24, norm=True, token_types=2), vocab_size=97,
      attention=dict(num_heads=4, num_kv_heads=4, head_dim=8), mlp=dict(width=40, activation='gelu'),
      generator=dict(width=16, num_layers=2, num_heads=2, mlp_width=20)))
  model = Transformer(freeze(config, vocab_size=97, visibility='full'), sharding.single(base.default().sharding.rules))
  tokens = np.random.default_rng(0).integers(3, 97, (2, 12)).astype(np.int32)
  index = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  params = nn.unbox(model.init(jax.random.key(0), {'tokens': tokens}))['params']
  params = jax.tree.map(lambda x: np.asarray(x) + np.random.default_rng(x.size).normal(size=x.shape, scale=0.1)
                        .astype(np.float32), params)
  hf.save_folder(tmp_path / 'out', model.config, params)
  scores = model.apply({'params': params}, {'tokens': tokens}).scores[..., 0]
  features = model.apply({'params': params}, {'tokens': tokens, 'masked_tokens': tokens, 'target_index': index},
                         method='replacements')
  matrix, bias = model.apply({'params': params}, method='generator_unembedding')
  for name, folder, want in (('ForPreTraining', 'out', scores),
                             ('ForMaskedLM', 'out/generator', (features @ matrix.T + bias)[..., :97])):
    theirs, told = getattr(transformers, f'Electra{name}').from_pretrained(tmp_path / folder, output_loading_info=True)
    assert not any(told[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told
    with torch.no_grad():
      got = theirs.eval()(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)
