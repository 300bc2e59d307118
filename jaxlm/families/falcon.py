"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867): sizes as published, names at Hugging Face.

Three blocks under one name: branches in parallel from one norm with one key head (7B); in parallel, each from its own
norm, with grouped heads (40B, 180B; 11B has one norm again); one after the other with ALiBi (the RefinedWeb models).
"""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys
from jaxlm.families.gpt_neox import BODY, LABELS, SEQUENCE, SPAN, TOKEN

# Rows of the published tables.
VOCAB_SIZES = {'rw-1b': 50_304, '7b': 65_024, '11b': 65_024, '40b': 65_024, '180b': 65_024}

# What all sizes share.
BASE = dict(
    family='falcon', tie_embeddings=True, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=False, out_bias=False, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='gelu', gated=False, bias=False),
    norm=dict(kind='layernorm', bias=True, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=True, parallel_norms=False,
                  final_norm=True),
    positions=dict(kind='rope', rope=dict(base=10_000.0)))


def _shape(width: int, num_layers: int, num_heads: int, num_kv_heads: int, **changes) -> dict:
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=2048,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=width // num_heads),
      mlp=BASE['mlp'] | dict(width=4 * width), init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True)) | changes


def _alibi_positions(head_dim: int) -> dict:
  """Slopes are of scores before these are divided by sqrt(head_dim)."""
  return dict(kind='alibi', alibi_scale=head_dim ** -0.5, alibi_rounded=True)


def _alibi(size: dict) -> dict:
  """The block of the RefinedWeb models."""
  attention = size['attention'] | dict(bias=True, out_bias=True)
  return size | dict(attention=attention, mlp=size['mlp'] | dict(bias=True),
                     residual=size['residual'] | dict(parallel=False),
                     positions=_alibi_positions(attention['head_dim']))


_TWO_NORMS = dict(residual=BASE['residual'] | dict(parallel_norms=True))

SIZES = {
    'rw-1b': _alibi(_shape(2048, 24, 32, 32)),
    '7b': _shape(4544, 32, 71, 1),
    '11b': _shape(4096, 60, 32, 8, tie_embeddings=False, max_length=8192,
                  positions=dict(kind='rope', rope=dict(base=500_042.0))),
    '40b': _shape(8192, 60, 128, 8, **_TWO_NORMS),
    '180b': _shape(14_848, 80, 232, 8, **_TWO_NORMS),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'falcon'
ARCHITECTURES = {
    'FalconForCausalLM': {}, 'FalconModel': BODY, 'FalconForSequenceClassification': SEQUENCE,
    'FalconForTokenClassification': TOKEN, 'FalconForQuestionAnswering': SPAN}
PREFIX = 'transformer.'
TIED = {'lm_head.weight': 'transformer.word_embeddings.weight'}
BUFFERS = r'(transformer\.)?h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq'


def _two_norms(model: Any) -> bool:
  return model.residual.parallel and model.residual.parallel_norms


def _one_norm(model: Any) -> bool:
  return not _two_norms(model)


_LAYER, _THEIRS = 'stack/layer_{layer}', 'transformer.h.{layer}'
TEMPLATES = (
    ('embed/embedding', 'transformer.word_embeddings.weight', 'v d -> v d'),
    (f'{_LAYER}/attention_norm/scale', f'{_THEIRS}.input_layernorm.weight', 'd -> d', _one_norm),
    (f'{_LAYER}/attention_norm/bias', f'{_THEIRS}.input_layernorm.bias', 'd -> d', _one_norm),
    (f'{_LAYER}/attention_norm/scale', f'{_THEIRS}.ln_attn.weight', 'd -> d', _two_norms),
    (f'{_LAYER}/attention_norm/bias', f'{_THEIRS}.ln_attn.bias', 'd -> d', _two_norms),
    ((f'{_LAYER}/attention/query/kernel', f'{_LAYER}/attention/key/kernel', f'{_LAYER}/attention/value/kernel'),
     f'{_THEIRS}.self_attention.query_key_value.weight', '(k (g h | h | h)) d -> d (k g) h, d k h, d k h'),
    ((f'{_LAYER}/attention/query/bias', f'{_LAYER}/attention/key/bias', f'{_LAYER}/attention/value/bias'),
     f'{_THEIRS}.self_attention.query_key_value.bias', '(k (g h | h | h)) -> (k g) h, k h, k h'),
    (f'{_LAYER}/attention/out/kernel', f'{_THEIRS}.self_attention.dense.weight', 'd (n h) -> n h d'),
    (f'{_LAYER}/attention/out/bias', f'{_THEIRS}.self_attention.dense.bias', 'd -> d'),
    (f'{_LAYER}/mlp_norm/scale', f'{_THEIRS}.post_attention_layernorm.weight', 'd -> d', _one_norm),
    (f'{_LAYER}/mlp_norm/bias', f'{_THEIRS}.post_attention_layernorm.bias', 'd -> d', _one_norm),
    (f'{_LAYER}/mlp_norm/scale', f'{_THEIRS}.ln_mlp.weight', 'd -> d', _two_norms),
    (f'{_LAYER}/mlp_norm/bias', f'{_THEIRS}.ln_mlp.bias', 'd -> d', _two_norms),
    (f'{_LAYER}/mlp/up/kernel', f'{_THEIRS}.mlp.dense_h_to_4h.weight', 'f d -> d f'),
    (f'{_LAYER}/mlp/up/bias', f'{_THEIRS}.mlp.dense_h_to_4h.bias', 'f -> f'),
    (f'{_LAYER}/mlp/down/kernel', f'{_THEIRS}.mlp.dense_4h_to_h.weight', 'd f -> f d'),
    (f'{_LAYER}/mlp/down/bias', f'{_THEIRS}.mlp.dense_4h_to_h.bias', 'd -> d'),
    ('final_norm/scale', 'transformer.ln_f.weight', 'd -> d'),
    ('final_norm/bias', 'transformer.ln_f.bias', 'd -> d'),
    ('head', 'lm_head.weight', 'v d -> v d'),
    *LABELS,
)

OLDER = {'n_embed': 'hidden_size'}
KEYS = dict(
    vocab_size=(int, 65_024), hidden_size=(int, 4544), num_hidden_layers=(int, 32), num_attention_heads=(int, 71),
    num_kv_heads=(int, None), num_ln_in_parallel_attn=(int, None), layer_norm_epsilon=(float, 1e-5),
    alibi=(bool, False), new_decoder_architecture=(bool, False), multi_query=(bool, True), parallel_attn=(bool, True),
    bias=(bool, False), max_position_embeddings=(int, 2048), ffn_hidden_size=(int, None), activation=(str, 'gelu'),
    tie_word_embeddings=(bool, True))
FIXED = dict(apply_residual_connection_post_layernorm=False)
HARMLESS = 'ff_factor'  # of what ffn_hidden_size was made


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(keys.under(given, OLDER), KEYS, FIXED, f'{HARMLESS}|{keys.ROPE}')
  width, num_heads, bias, new = hf['hidden_size'], hf['num_attention_heads'], hf['bias'], hf['new_decoder_architecture']
  head_dim = keys.heads('hidden_size', width, 'num_attention_heads', num_heads)
  num_kv_heads = 1 if hf['multi_query'] and not new else hf['num_kv_heads'] or num_heads
  keys.heads('num_attention_heads', num_heads, 'num_kv_heads', num_kv_heads)
  if not new and num_kv_heads not in (1, num_heads):
    raise JaxlmError(f'config.json: num_kv_heads={num_kv_heads} needs new_decoder_architecture; without it there are '
                     f'{num_heads}, or one with multi_query.')
  norms = hf['num_ln_in_parallel_attn'] or (2 if new else 1)
  if norms > 1 + new or new and not hf['parallel_attn']:
    raise JaxlmError(f'config.json: num_ln_in_parallel_attn={norms} and parallel_attn={hf["parallel_attn"]} cannot be '
                     f'with new_decoder_architecture={new}.')
  positions = _alibi_positions(head_dim)
  if not hf['alibi']:
    positions = dict(kind='rope', rope=keys.rope(given, head_dim, hf['max_position_embeddings']))
  return BASE | dict(
      width=width, num_layers=hf['num_hidden_layers'], vocab_size=hf['vocab_size'],
      max_length=hf['max_position_embeddings'], tie_embeddings=hf['tie_word_embeddings'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias,
                                         out_bias=bias),
      mlp=BASE['mlp'] | dict(width=hf['ffn_hidden_size'] or 4 * width, bias=bias,
                             activation=keys.activation('activation', hf['activation'])),
      norm=BASE['norm'] | dict(eps=hf['layer_norm_epsilon']),
      residual=BASE['residual'] | dict(parallel=hf['parallel_attn'], parallel_norms=norms == 2), positions=positions)


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  attention = model.attention
  new = _two_norms(model) or attention.num_kv_heads not in (1, attention.num_heads)
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, hidden_size=model.width, num_hidden_layers=model.num_layers,
      num_attention_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads,
      num_ln_in_parallel_attn=(2 if _two_norms(model) else 1) if new else None,
      layer_norm_epsilon=model.norm.eps, alibi=model.positions.kind == 'alibi', new_decoder_architecture=new,
      multi_query=attention.num_kv_heads == 1, parallel_attn=model.residual.parallel, bias=attention.bias,
      max_position_embeddings=model.max_length, ffn_hidden_size=model.mlp.width,
      activation=keys.their_activation(model.mlp.activation), tie_word_embeddings=model.tie_embeddings,
      initializer_range=model.init.std, hidden_dropout=model.dropout, attention_dropout=attention.dropout,
      **keys.their_rope(model.positions.rope))
