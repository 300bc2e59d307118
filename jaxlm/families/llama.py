"""Llama 2 (Touvron et al. 2023) and 3 (Grattafiori et al. 2024): sizes as published, names at Hugging Face."""
from typing import Any, Mapping

from jaxlm.families import keys

VOCAB_SIZES = {'2': 32_000, '3': 128_256, '3.1': 128_256}  # of each generation's tokenizer

# What all sizes share.
BASE = dict(
    family='llama', tie_embeddings=False, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=False, out_bias=False, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='silu', gated=True, bias=False),
    norm=dict(kind='rmsnorm', bias=False, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='rope'))

# Rotary positions and length of each generation.
ROPES = {
    '2': dict(max_length=4096, rope=dict(base=10_000.0, scaling='none', factor=1.0, original_length=4096)),
    '3': dict(max_length=8192, rope=dict(base=500_000.0, scaling='none', factor=1.0, original_length=8192)),
    '3.1': dict(max_length=131_072, rope=dict(base=500_000.0, scaling='llama3', factor=8.0, original_length=8192,
                                              low_freq_factor=1.0, high_freq_factor=4.0)),
}


def _shape(generation: str, width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> dict:
  positions = ROPES[generation]
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=positions['max_length'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=width // num_heads),
      mlp=BASE['mlp'] | dict(width=mlp_width), positions=dict(kind='rope', rope=positions['rope']),
      init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    '2-7b': _shape('2', 4096, 32, 32, 32, 11_008),
    '2-13b': _shape('2', 5120, 40, 40, 40, 13_824),
    '2-70b': _shape('2', 8192, 80, 64, 8, 28_672),
    '3-8b': _shape('3', 4096, 32, 32, 8, 14_336),
    '3-70b': _shape('3', 8192, 80, 64, 8, 28_672),
    '3.1-8b': _shape('3.1', 4096, 32, 32, 8, 14_336),
    '3.1-70b': _shape('3.1', 8192, 80, 64, 8, 28_672),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'llama'
ARCHITECTURES = {'LlamaForCausalLM': True, 'LlamaModel': False}  # whether the model has its output layer
PREFIX = 'model.'                                               # which a body's names leave out
TIED = {'lm_head.weight': 'model.embed_tokens.weight'}          # what a file may hold twice where embeddings are tied
BUFFERS = r'.*rotary_emb\.inv_freq'                             # wavelengths that old files hold

TEMPLATES = (
    ('embed/embedding', 'model.embed_tokens.weight', 'v d -> v d'),
    ('stack/layer_{layer}/attention_norm/scale', 'model.layers.{layer}.input_layernorm.weight', 'd -> d'),
    ('stack/layer_{layer}/attention/query/kernel', 'model.layers.{layer}.self_attn.q_proj.weight', '(n h) d -> d n h'),
    ('stack/layer_{layer}/attention/query/bias', 'model.layers.{layer}.self_attn.q_proj.bias', '(n h) -> n h'),
    ('stack/layer_{layer}/attention/key/kernel', 'model.layers.{layer}.self_attn.k_proj.weight', '(k h) d -> d k h'),
    ('stack/layer_{layer}/attention/key/bias', 'model.layers.{layer}.self_attn.k_proj.bias', '(k h) -> k h'),
    ('stack/layer_{layer}/attention/value/kernel', 'model.layers.{layer}.self_attn.v_proj.weight', '(k h) d -> d k h'),
    ('stack/layer_{layer}/attention/value/bias', 'model.layers.{layer}.self_attn.v_proj.bias', '(k h) -> k h'),
    ('stack/layer_{layer}/attention/out/kernel', 'model.layers.{layer}.self_attn.o_proj.weight', 'd (n h) -> n h d'),
    ('stack/layer_{layer}/attention/out/bias', 'model.layers.{layer}.self_attn.o_proj.bias', 'd -> d'),
    ('stack/layer_{layer}/mlp_norm/scale', 'model.layers.{layer}.post_attention_layernorm.weight', 'd -> d'),
    ('stack/layer_{layer}/mlp/gate/kernel', 'model.layers.{layer}.mlp.gate_proj.weight', 'f d -> d f'),
    ('stack/layer_{layer}/mlp/gate/bias', 'model.layers.{layer}.mlp.gate_proj.bias', 'f -> f'),
    ('stack/layer_{layer}/mlp/up/kernel', 'model.layers.{layer}.mlp.up_proj.weight', 'f d -> d f'),
    ('stack/layer_{layer}/mlp/up/bias', 'model.layers.{layer}.mlp.up_proj.bias', 'f -> f'),
    ('stack/layer_{layer}/mlp/down/kernel', 'model.layers.{layer}.mlp.down_proj.weight', 'd f -> f d'),
    ('stack/layer_{layer}/mlp/down/bias', 'model.layers.{layer}.mlp.down_proj.bias', 'd -> d'),
    ('final_norm/scale', 'model.norm.weight', 'd -> d'),
    ('head', 'lm_head.weight', 'v d -> v d'),
)

KEYS = dict(
    vocab_size=(int, 32_000), hidden_size=(int, 4096), intermediate_size=(int, 11_008), num_hidden_layers=(int, 32),
    num_attention_heads=(int, 32), num_key_value_heads=(int, None), head_dim=(int, None), hidden_act=(str, 'silu'),
    max_position_embeddings=(int, 2048), rms_norm_eps=(float, 1e-6), attention_bias=(bool, False),
    mlp_bias=(bool, False), tie_word_embeddings=(bool, False))


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json, with rotary positions in either form."""
  hf = keys.read(given, KEYS, {}, keys.ROPE)
  width, num_heads, bias = hf['hidden_size'], hf['num_attention_heads'], hf['attention_bias']
  head_dim = hf['head_dim'] or keys.heads('hidden_size', width, 'num_attention_heads', num_heads)
  num_kv_heads = hf['num_key_value_heads'] or num_heads
  keys.heads('num_attention_heads', num_heads, 'num_key_value_heads', num_kv_heads)
  return BASE | dict(
      width=width, num_layers=hf['num_hidden_layers'], vocab_size=hf['vocab_size'],
      max_length=hf['max_position_embeddings'], tie_embeddings=hf['tie_word_embeddings'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias,
                                         out_bias=bias),
      mlp=BASE['mlp'] | dict(width=hf['intermediate_size'], activation=keys.activation('hidden_act', hf['hidden_act']),
                             bias=hf['mlp_bias']),
      norm=BASE['norm'] | dict(eps=hf['rms_norm_eps']),
      positions=dict(kind='rope', rope=keys.rope(given, head_dim, hf['max_position_embeddings'])))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  attention = model.attention
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.mlp.width,
      num_hidden_layers=model.num_layers, num_attention_heads=attention.num_heads,
      num_key_value_heads=attention.num_kv_heads, head_dim=attention.head_dim,
      hidden_act=keys.their_activation(model.mlp.activation), max_position_embeddings=model.max_length,
      rms_norm_eps=model.norm.eps, attention_bias=attention.bias, mlp_bias=model.mlp.bias,
      tie_word_embeddings=model.tie_embeddings, initializer_range=model.init.std, attention_dropout=attention.dropout,
      **keys.their_rope(model.positions.rope))
