"""Llama 2 (Touvron et al. 2023) and 3 (Grattafiori et al. 2024): sizes as published, names at Hugging Face."""
import math
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys

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
VOCAB_SIZES = {size: 32_000 if size.startswith('2-') else 128_256 for size in SIZES}  # of each generation's tokenizer

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'llama'
ARCHITECTURES = {
    'LlamaForCausalLM': {},
    'LlamaModel': dict(head=dict(lm=False)),
    'LlamaForSequenceClassification': dict(head=dict(lm=False, labels='sequence', pool='last', label_bias=False)),
    'LlamaForTokenClassification': dict(head=dict(lm=False, labels='token')),
}
PREFIX = 'model.'
TIED = {'lm_head.weight': 'model.embed_tokens.weight'}
BUFFERS = r'.*rotary_emb\.inv_freq|rope_freqs\.weight'  # wavelengths that old files hold, and GGUF ones

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
    ('labels/kernel', 'score.weight', 'c d -> d c'),
    ('labels/bias', 'score.bias', 'c -> c'),
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


# ---- GGUF --------------------------------------------------------------------------------------------------------

GGUF = 'llama'  # which also names Mistral's and Mixtral's

_GGUF_NAMES = {
    'model.embed_tokens.': 'token_embd.', 'model.layers.': 'blk.', '.input_layernorm.': '.attn_norm.',
    '.self_attn.q_proj.': '.attn_q.', '.self_attn.k_proj.': '.attn_k.', '.self_attn.v_proj.': '.attn_v.',
    '.self_attn.o_proj.': '.attn_output.', '.post_attention_layernorm.': '.ffn_norm.', '.mlp.gate_proj.': '.ffn_gate.',
    '.mlp.up_proj.': '.ffn_up.', '.mlp.down_proj.': '.ffn_down.', 'model.norm.': 'output_norm.', 'lm_head.': 'output.'}
_INTERLEAVED = {  # llama.cpp rotates neighbours, and orders the rows of queries and keys for that
    'query/kernel': '(n p 2) d -> d n (2 p)', 'query/bias': '(n p 2) -> n (2 p)',
    'key/kernel': '(k p 2) d -> d k (2 p)', 'key/bias': '(k p 2) -> k (2 p)'}
GGUF_TEMPLATES = tuple((ours, keys.renamed(theirs, _GGUF_NAMES),
                        _INTERLEAVED.get(ours.partition('/attention/')[2], bijection))
                       for ours, theirs, bijection in TEMPLATES)

_GGUF_NEEDED = {
    'context_length': 'max_position_embeddings', 'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size', 'block_count': 'num_hidden_layers',
    'attention.head_count': 'num_attention_heads', 'attention.layer_norm_rms_epsilon': 'rms_norm_eps'}
_GGUF_KNOWN = {
    'attention.head_count_kv': 'num_key_value_heads', 'attention.key_length': 'head_dim',
    'rope.freq_base': 'rope_theta',
    'attention.value_length': None, 'rope.dimension_count': None, 'vocab_size': None, 'rope.scaling.type': None,
    'rope.scaling.factor': None, 'rope.scaling.original_context_length': None, 'rope.scaling.finetuned': None}


def from_gguf(meta: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json that the metadata of a GGUF file amounts to."""
  hf = keys.read_gguf(meta, _GGUF_NEEDED, _GGUF_KNOWN) | dict(
      model_type=MODEL_TYPE, vocab_size=len(weights['token_embd.weight']) if 'token_embd.weight' in weights else 1,
      tie_word_embeddings='output.weight' not in weights, attention_bias='blk.0.attn_q.bias' in weights,
      mlp_bias='blk.0.ffn_up.bias' in weights)
  kind = meta.get('rope.scaling.type', 'none')
  if kind != 'none':
    hf['rope_scaling'] = dict(rope_type=kind, factor=meta.get('rope.scaling.factor'))
    if kind == 'yarn':
      hf['rope_scaling']['original_max_position_embeddings'] = meta.get('rope.scaling.original_context_length')
  elif 'rope_freqs.weight' in weights:
    hf['rope_scaling'] = _scaling_of(weights['rope_freqs.weight'], hf.get('rope_theta', 10_000.0))
  head_dim = hf.get('head_dim') or keys.heads('embedding_length', hf['hidden_size'], 'attention.head_count',
                                              hf['num_attention_heads'])
  for key in ('rope.dimension_count', 'attention.value_length'):
    if meta.get(key, head_dim) != head_dim:
      raise JaxlmError(f'{key} is {meta[key]}; this family rotates whole heads, and values have their size, '
                       f'{head_dim}.')
  return hf


def _scaling_of(factors: Any, base: float) -> dict[str, Any]:
  """`rope_scaling` of Llama 3.1 and later, of which GGUF keeps only what each wavelength is multiplied by."""
  scaling = dict(rope_type='llama3', factor=float(max(factors)), low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192)
  for i, found in enumerate(factors):
    turns = 8192 / (2 * math.pi * base ** (i / len(factors)))  # in the trained length
    smooth = min(max((turns - 1) / (4 - 1), 0), 1)
    if abs(found * ((1 - smooth) / scaling['factor'] + smooth) - 1) > 1e-3:
      raise JaxlmError('rope_freqs.weight is not what Llama 3.1 scales its wavelengths by (low 1, high 4, trained on '
                       '8,192 tokens), and GGUF does not say what made it; convert the original folder.')
  return scaling
