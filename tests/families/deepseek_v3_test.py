"""DeepSeek-V3 computes what transformers' does: latents, groups of experts, a bias that chooses."""
import pytest

import parity
from jaxlm.errors import JaxlmError
from jaxlm.families import deepseek_v3

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=20, qk_rope_head_dim=6,
            qk_nope_head_dim=9, v_head_dim=11, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
            first_k_dense_replace=1, max_position_embeddings=64, pad_token_id=0)


def tiny(name, **config):
  model = getattr(transformers, f'DeepseekV3{name}')(transformers.DeepseekV3Config(**TINY | config))
  for path, bias in model.named_buffers():
    if path.endswith('e_score_correction_bias'):  # which training moves, and which is 0 here
      bias.copy_(torch.linspace(-0.3, 0.3, len(bias)))
  return model


def test_latents_groups_and_the_bias_are_theirs(tmp_path):
  parity.check(tmp_path, tiny('ForCausalLM'))


def test_stretched_rotations_halves_whole_queries_biases_and_two_shared_experts_are_theirs(tmp_path):
  rope = dict(rope_type='yarn', rope_theta=10_000.0, factor=4.0, mscale=1.0, mscale_all_dim=0.7,
              original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
  lm = parity.check(tmp_path, tiny(
      'ForCausalLM', q_lora_rank=None, rope_interleave=False, attention_bias=True, n_shared_experts=2,
      norm_topk_prob=False, rope_parameters=rope, first_k_dense_replace=0, tie_word_embeddings=True, n_group=1,
      topk_group=1), greedy=False)
  assert lm.model.config.attention.scale > 15 ** -0.5  # not that of the heads' size


@pytest.mark.parametrize('name', ['Model', 'ForSequenceClassification', 'ForTokenClassification'])
def test_every_class_is_theirs(tmp_path, name):
  parity.check(tmp_path, tiny(name), packed=False)


@pytest.mark.parametrize('key, value', [('scoring_func', 'softmax'), ('topk_method', 'greedy'), ('moe_layer_freq', 2),
                                        ('rms_norm_eps', 1e-5)])
def test_what_would_compute_something_else_is_refused(key, value):
  with pytest.raises(JaxlmError, match=f'{key}=.* changes what is computed'):
    deepseek_v3.from_hf({key: value})


def test_the_published_file_says_the_size():
  published = dict(
      hidden_size=7168, num_hidden_layers=61, max_position_embeddings=163_840, num_key_value_heads=128,
      rope_theta=10_000,
      rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, type='yarn',
                        original_max_position_embeddings=4096),
      num_nextn_predict_layers=1, scoring_func='sigmoid', topk_method='noaux_tc', moe_layer_freq=1, seq_aux=True,
      ep_size=1, aux_loss_alpha=0.001)
  size, found = deepseek_v3.SIZES['671b'], deepseek_v3.from_hf(published)
  assert {key: found[key] for key in ('attention', 'moe', 'positions', 'norm')} == {
      key: size[key] for key in ('attention', 'moe', 'positions', 'norm')}
