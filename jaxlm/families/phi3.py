"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): sizes as published, names at Hugging Face; Llama with fused projections.

The long-context versions (rope_type longrope) are refused: their rotations change with the length of the text.
"""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys, llama

VOCAB_SIZE = 32_064  # rows of the published tables: Llama 2's 32,000 pieces and room for more

# What all sizes share.
BASE = dict(
    family='phi3', tie_embeddings=False, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=False, out_bias=False, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='silu', gated=True, bias=False),
    norm=dict(kind='rmsnorm', bias=False, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='rope', rope=dict(base=10_000.0, fraction=1.0)))


def _shape(width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> dict:
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=4096, mlp=BASE['mlp'] | dict(width=mlp_width),
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=width // num_heads,
                                         windows=(2047,)),
      init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    'mini-4k': _shape(3072, 32, 32, 32, 8192),
    'medium-4k': _shape(5120, 40, 40, 10, 17_920),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'phi3'
ARCHITECTURES = {
    'Phi3ForCausalLM': {},
    'Phi3Model': dict(head=dict(lm=False)),
    'Phi3ForSequenceClassification': dict(head=dict(lm=False, labels='sequence', pool='last', label_bias=False)),
    'Phi3ForTokenClassification': dict(head=dict(lm=False, labels='token')),
}
PREFIX = 'model.'
TIED = {'lm_head.weight': 'model.embed_tokens.weight'}
BUFFERS = r'.*rotary_emb\.inv_freq'

_LAYER, _THEIRS = 'stack/layer_{layer}', 'model.layers.{layer}'
_FUSED = tuple(f'{_LAYER}/{name}/kernel' for name in ('attention/query', 'attention/key', 'attention/value', 'mlp/gate',
                                                      'mlp/up'))
TEMPLATES = (
    *(row for row in llama.TEMPLATES if row[0] not in _FUSED),
    (_FUSED[:3], f'{_THEIRS}.self_attn.qkv_proj.weight', '(n h | k h | k h) d -> d n h, d k h, d k h'),
    (_FUSED[3:], f'{_THEIRS}.mlp.gate_up_proj.weight', '(f | f) d -> d f, d f'),
)

KEYS = dict(
    vocab_size=(int, VOCAB_SIZE), hidden_size=(int, 3072), intermediate_size=(int, 8192), num_hidden_layers=(int, 32),
    num_attention_heads=(int, 32), num_key_value_heads=(int, None), head_dim=(int, None), hidden_act=(str, 'silu'),
    max_position_embeddings=(int, 4096), rms_norm_eps=(float, 1e-5), sliding_window=(int, None),
    tie_word_embeddings=(bool, False))
FIXED = dict(attention_bias=False, mlp_bias=False)


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, FIXED, keys.ROPE)
  width, num_heads, num_layers = hf['hidden_size'], hf['num_attention_heads'], hf['num_hidden_layers']
  head_dim = hf['head_dim'] or keys.heads('hidden_size', width, 'num_attention_heads', num_heads)
  num_kv_heads = hf['num_key_value_heads'] or num_heads
  keys.heads('num_attention_heads', num_heads, 'num_key_value_heads', num_kv_heads)
  rope = keys.rope(given, head_dim, hf['max_position_embeddings'], fraction=1.0)
  if rope['scaling'] != 'none':
    raise JaxlmError(f'config.json: rope_type {rope["scaling"]!r} of a {MODEL_TYPE} is not what it is elsewhere: the '
                     'reference reads "yarn" as "longrope", and knows no other.')
  return BASE | dict(
      width=width, num_layers=num_layers, vocab_size=hf['vocab_size'], max_length=hf['max_position_embeddings'],
      tie_embeddings=hf['tie_word_embeddings'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
                                         windows=keys.windows(None, hf['sliding_window'], num_layers)),
      mlp=BASE['mlp'] | dict(width=hf['intermediate_size'], activation=keys.activation('hidden_act', hf['hidden_act'])),
      norm=BASE['norm'] | dict(eps=hf['rms_norm_eps']), positions=dict(kind='rope', rope=rope))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  attention, rope = model.attention, model.positions.rope
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.mlp.width,
      num_hidden_layers=model.num_layers, num_attention_heads=attention.num_heads,
      num_key_value_heads=attention.num_kv_heads, head_dim=attention.head_dim,
      hidden_act=keys.their_activation(model.mlp.activation), max_position_embeddings=model.max_length,
      original_max_position_embeddings=model.max_length, rms_norm_eps=model.norm.eps,
      sliding_window=keys.their_window(model), tie_word_embeddings=model.tie_embeddings,
      partial_rotary_factor=rope.fraction, initializer_range=model.init.std, attention_dropout=attention.dropout,
      resid_pdrop=model.dropout, embd_pdrop=model.dropout, **keys.their_rope(rope))
