"""Mixtral computes what transformers' does, gradients too, though it keeps experts in other tensors."""
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import parity
from jaxlm import hf

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2,
            pad_token_id=0)


def tiny(name, **config):
  return getattr(transformers, f'Mixtral{name}')(transformers.MixtralConfig(**TINY | config))


def test_experts_and_gradients_are_theirs(tmp_path):
  # Without the balance loss, which is of a row here and of a batch there.
  parity.check(tmp_path, tiny('ForCausalLM', router_aux_loss_coef=0.0), gradients=True)


def test_with_a_window_tied_and_three_of_four_experts_it_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', sliding_window=5, tie_word_embeddings=True, num_local_experts=4,
                              num_experts_per_tok=3), greedy=False)


def test_experts_of_several_dtypes_keep_all_their_values(tmp_path):
  parity.randomised(tiny('ForCausalLM')).save_pretrained(tmp_path / 'a')
  file, name = tmp_path / 'a/model.safetensors', 'model.layers.0.block_sparse_moe.experts.{}.w1.weight'
  tensors = safetensors.numpy.load_file(file)
  tensors[name.format(0)] = tensors[name.format(0)].astype(ml_dtypes.bfloat16)
  safetensors.numpy.save_file(tensors, file)
  folder = hf.load_folder(tmp_path / 'a')
  for i, params in enumerate((folder.params, folder.lazy())):
    hf.save_folder(tmp_path / str(i), folder.model, params, kept=folder.hf)
    back = safetensors.numpy.load_file(tmp_path / str(i) / 'model.safetensors')
    for expert in (0, 1):
      np.testing.assert_array_equal(back[name.format(expert)], tensors[name.format(expert)].astype(np.float32))


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=1), packed=False)
