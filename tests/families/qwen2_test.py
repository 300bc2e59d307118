"""Qwen2 and its mixtures compute what transformers' do."""
import pytest

import parity
from jaxlm.errors import JaxlmError
from jaxlm.families import qwen2_moe

transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
MIXED = TINY | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=20)


def tiny(name, **config):
  return getattr(transformers, f'Qwen2{name}')(transformers.Qwen2Config(**TINY | config))


def mixed(name, **config):
  return getattr(transformers, f'Qwen2Moe{name}')(transformers.Qwen2MoeConfig(**MIXED | config))


def test_the_last_layers_see_a_window_and_heads_do_not_fill_the_width(tmp_path):
  lm = parity.check(tmp_path, tiny('ForCausalLM', head_dim=10, use_sliding_window=True, sliding_window=5,
                                   max_window_layers=1))
  assert lm.model.config.attention.windows == (0, 5)


def test_tied_it_is_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM', tie_word_embeddings=True), greedy=False)


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification',
                                  'ForQuestionAnswering'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name, num_hidden_layers=1), packed=False)


def test_experts_beside_a_shared_one_are_theirs(tmp_path):
  parity.check(tmp_path, mixed('ForCausalLM'), greedy=False)


def test_experts_in_every_second_layer_and_windows_are_theirs(tmp_path):
  lm = parity.check(tmp_path, mixed('ForCausalLM', num_hidden_layers=3, decoder_sparse_step=2, norm_topk_prob=True,
                                    qkv_bias=False, use_sliding_window=True, sliding_window=5, max_window_layers=2))
  assert [kind.moe for kind in lm.model.config.layer_kinds()] == [False, True, False]
  assert lm.model.config.attention.windows == (5, 0, 0)


def test_a_mixture_that_labels_tokens_after_a_dense_layer_is_theirs(tmp_path):
  parity.check(tmp_path, mixed('ForTokenClassification', mlp_only_layers=[0]), packed=False)


@pytest.mark.parametrize('dense, step, first_and_every', [
    ([], 1, (0, 1)), ([], 2, (1, 2)), ([0, 1], 1, (2, 1)), ([0, 2, 4], 1, (1, 2)), ([0, 1, 2], 2, (3, 2)),
    ([0, 1, 2, 3, 4], 1, (5, 1))])
def test_layers_with_experts_are_every_nth(dense, step, first_and_every):
  moe = qwen2_moe.from_hf(dict(num_hidden_layers=6, mlp_only_layers=dense, decoder_sparse_step=step))['moe']
  assert (moe['first'], moe['every']) == first_and_every


@pytest.mark.parametrize('dense, step', [([2], 1), ([0, 3], 1), ([3], 2), (list(range(8)), 1)])
def test_layers_with_experts_that_are_not_every_nth_are_refused(dense, step):
  with pytest.raises(JaxlmError, match='mlp_only_layers='):
    qwen2_moe.from_hf(dict(num_hidden_layers=8, mlp_only_layers=dense, decoder_sparse_step=step))
