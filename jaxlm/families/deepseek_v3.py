"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437): latent attention; many experts, chosen by sigmoids within groups,
beside a shared one; the first layers without.

The heads that predict further tokens, whose tensors published files hold as one more layer, are not read, as the code
there does not read them. Their routers' bias is kept; training does not move it (models/moe.py).
"""
import math
from typing import Any, Mapping

from jaxlm.families import keys, llama, llamas, qwen2_moe

VOCAB_SIZE = 129_280  # rows of embeddings

# What all sizes share.
BASE = llama.BASE | dict(
    family='deepseek_v3', norm=llama.BASE['norm'] | dict(eps=1e-6),
    moe=dict(every=1, router='sigmoid', normalise=True, router_bias=True, shared_gate=False, balance_loss=1e-4))

# Of the attention's scale, by which YaRN with mscale_all_dim multiplies it.
_mscale = lambda factor, mscale: (0.1 * mscale * math.log(factor) + 1.0) ** 2

SIZES = {
    '671b': BASE | dict(
        width=7168, num_layers=61, max_length=163_840,
        attention=BASE['attention'] | dict(
            num_heads=128, num_kv_heads=128, head_dim=128, scale=192 ** -0.5 * _mscale(40.0, 1.0),
            latent=dict(kv_rank=512, q_rank=1536, rope_dim=64, value_dim=128)),
        mlp=BASE['mlp'] | dict(width=18_432),
        moe=BASE['moe'] | dict(num_experts=256, top_k=8, width=2048, first=3, scale=2.5, num_groups=8, top_groups=4,
                               shared_width=2048),
        positions=dict(kind='rope', rope=dict(
            base=10_000.0, interleaved=True, scaling='yarn', factor=40.0, original_length=4096, beta_fast=32.0,
            beta_slow=1.0, attention_factor=1.0)),
        init=dict(std=0.006, embedding_std=0.006, scale_by_depth=False)),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'deepseek_v3'
ARCHITECTURES = {name: head for name, head in llamas.architectures('DeepseekV3').items() if 'Question' not in name}
PREFIX, TIED = llama.PREFIX, llama.TIED
BUFFERS = rf'{llama.BUFFERS}|model\.layers\.61\..*'

_ATTENTION = 'stack/layer_{layer}/attention/', 'model.layers.{layer}.self_attn.'
_MLP = 'stack/layer_{layer}/mlp/', 'model.layers.{layer}.mlp.'
_small_queries = lambda model: bool(model.attention.latent.q_rank)
TEMPLATES = (
    (_ATTENTION[0] + 'query/kernel', _ATTENTION[1] + 'q_proj.weight', '(n h) d -> d n h',
     lambda model: not _small_queries(model)),
    (_ATTENTION[0] + 'query/kernel', _ATTENTION[1] + 'q_b_proj.weight', '(n h) r -> r n h', _small_queries),
    (_ATTENTION[0] + 'query_down/kernel', _ATTENTION[1] + 'q_a_proj.weight', 'r d -> d r'),
    (_ATTENTION[0] + 'query_down/bias', _ATTENTION[1] + 'q_a_proj.bias', 'r -> r'),
    (_ATTENTION[0] + 'query_norm/scale', _ATTENTION[1] + 'q_a_layernorm.weight', 'r -> r'),
    (_ATTENTION[0] + 'key_value_down/kernel', _ATTENTION[1] + 'kv_a_proj_with_mqa.weight', 'r d -> d r'),
    (_ATTENTION[0] + 'key_value_down/bias', _ATTENTION[1] + 'kv_a_proj_with_mqa.bias', 'r -> r'),
    (_ATTENTION[0] + 'key_value_norm/scale', _ATTENTION[1] + 'kv_a_layernorm.weight', 'r -> r'),
    ((_ATTENTION[0] + 'key', _ATTENTION[0] + 'value'), _ATTENTION[1] + 'kv_b_proj.weight',
     '(n (h | f)) r -> r n h, r n f'),
    (_MLP[0] + 'router/bias', _MLP[1] + 'gate.e_score_correction_bias', 'e -> e'),
    (_MLP[0] + 'shared/gate/kernel', _MLP[1] + 'shared_experts.gate_proj.weight', 'f d -> d f'),
    (_MLP[0] + 'shared/up/kernel', _MLP[1] + 'shared_experts.up_proj.weight', 'f d -> d f'),
    (_MLP[0] + 'shared/down/kernel', _MLP[1] + 'shared_experts.down_proj.weight', 'd f -> f d'),
    *qwen2_moe.MIXTURE, *llamas.without(llama.TEMPLATES, '/query/'))

KEYS = llamas.KEYS | dict(
    vocab_size=(int, VOCAB_SIZE), hidden_size=(int, 7168), intermediate_size=(int, 18_432), num_hidden_layers=(int, 61),
    num_attention_heads=(int, 128), max_position_embeddings=(int, 4096), attention_bias=(bool, False),
    kv_lora_rank=(int, 512), q_lora_rank=(int, None), qk_nope_head_dim=(int, 128), qk_rope_head_dim=(int, 64),
    v_head_dim=(int, 128), rope_interleave=(bool, True), n_routed_experts=(int, 256), num_experts_per_tok=(int, 8),
    moe_intermediate_size=(int, 2048), n_shared_experts=(keys.Index, 1), n_group=(int, 8), topk_group=(int, 4),
    norm_topk_prob=(bool, True), routed_scaling_factor=(float, 2.5), first_k_dense_replace=(int, None))
DEFAULTS = dict(q_lora_rank=1536, first_k_dense_replace=3)  # where left out
# eps is that of the norms of latents, whatever the file says; the others are of the authors' own code.
FIXED = dict(rms_norm_eps=1e-6, scoring_func='sigmoid', topk_method='noaux_tc', moe_layer_freq=1)
HARMLESS = r'qk_head_dim|head_dim|num_nextn_predict_layers|num_mtp_layers|aux_loss_alpha|seq_aux|ep_size'


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  given = DEFAULTS | given
  hf = keys.read(given | dict(first_k_dense_replace=given['first_k_dense_replace'] or None), KEYS, FIXED,
                 f'{keys.ROPE}|{HARMLESS}')
  rotating = hf['qk_rope_head_dim']
  ours = llamas.from_hf(hf | dict(head_dim=rotating), given)
  rope, scale = ours['positions']['rope'] | dict(interleaved=hf['rope_interleave']), 0.0
  mscale = (given.get('rope_scaling') or given.get('rope_parameters') or {}).get('mscale_all_dim')
  if mscale and rope['scaling'] != 'none':
    scale = (hf['qk_nope_head_dim'] + rotating) ** -0.5 * _mscale(rope['factor'], keys.check('mscale', mscale, float))
  return ours | dict(
      family=BASE['family'], norm=BASE['norm'], positions=dict(kind='rope', rope=rope),
      attention=ours['attention'] | dict(
          num_kv_heads=hf['num_attention_heads'], head_dim=hf['qk_nope_head_dim'], scale=scale,
          latent=dict(kv_rank=hf['kv_lora_rank'], q_rank=hf['q_lora_rank'] or 0, rope_dim=rotating,
                      value_dim=hf['v_head_dim'])),
      moe=BASE['moe'] | dict(
          num_experts=hf['n_routed_experts'], top_k=hf['num_experts_per_tok'], width=hf['moe_intermediate_size'],
          first=hf['first_k_dense_replace'] or 0, normalise=hf['norm_topk_prob'], scale=hf['routed_scaling_factor'],
          num_groups=hf['n_group'], top_groups=hf['topk_group'],
          shared_width=hf['n_shared_experts'] * hf['moe_intermediate_size']))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  attention, latent, moe = model.attention, model.attention.latent, model.moe
  theirs = llamas.to_hf(model, MODEL_TYPE)
  if attention.scale and theirs['rope_scaling'] and model.positions.rope.factor > 1:
    times = attention.scale * math.sqrt(attention.head_dim + latent.rope_dim)
    mscale = (math.sqrt(times) - 1.0) / (0.1 * math.log(model.positions.rope.factor))
    theirs['rope_scaling'] |= dict(mscale_all_dim=round(mscale, 6))
  return theirs | dict(
      head_dim=latent.rope_dim, qk_nope_head_dim=attention.head_dim, qk_rope_head_dim=latent.rope_dim,
      v_head_dim=latent.value_dim, kv_lora_rank=latent.kv_rank, q_lora_rank=latent.q_rank or None,
      rope_interleave=model.positions.rope.interleaved, n_routed_experts=moe.num_experts,
      num_experts_per_tok=moe.top_k, moe_intermediate_size=moe.width, n_shared_experts=moe.shared_width // moe.width,
      n_group=moe.num_groups, topk_group=moe.top_groups, norm_topk_prob=moe.normalise,
      routed_scaling_factor=moe.scale, first_k_dense_replace=moe.first)
