"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): sizes as published, names at Hugging Face."""
import math
from typing import Any, Mapping

from jaxlm.families import keys

# Rows of the published tables.
VOCAB_SIZES = {'70m': 50_304, '160m': 50_304, '410m': 50_304, '1b': 50_304, '1.4b': 50_304, '2.8b': 50_304,
               '6.9b': 50_432, '12b': 50_688, '20b': 50_432}

# What all sizes share.
BASE = dict(
    family='gpt_neox', tie_embeddings=False, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=True, out_bias=True, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='gelu', gated=False, bias=True),
    norm=dict(kind='layernorm', bias=True, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=True, parallel_norms=True,
                  final_norm=True),
    positions=dict(kind='rope', rope=dict(base=10_000.0, fraction=0.25)))


def _shape(width: int, num_layers: int, num_heads: int, activation: str = 'gelu') -> dict:
  std = round(math.sqrt(2 / (5 * width)), 5)  # Nguyen and Salazar 2019, as published
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=2048,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=width // num_heads),
      mlp=BASE['mlp'] | dict(width=4 * width, activation=activation),
      init=dict(std=std, embedding_std=std, scale_by_depth=True))


SIZES = {
    '70m': _shape(512, 6, 8),
    '160m': _shape(768, 12, 12),
    '410m': _shape(1024, 24, 16),
    '1b': _shape(2048, 16, 8),
    '1.4b': _shape(2048, 24, 16),
    '2.8b': _shape(2560, 32, 32),
    '6.9b': _shape(4096, 32, 32),
    '12b': _shape(5120, 36, 40),
    '20b': _shape(6144, 44, 64, activation='gelu_tanh'),  # GPT-NeoX-20B; the others are Pythia's
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

# What heads that many decoders have stand for, and where their weights are.
BODY = dict(head=dict(lm=False))
SEQUENCE = dict(head=dict(lm=False, labels='sequence', pool='last', label_bias=False))
TOKEN = dict(head=dict(lm=False, labels='token'))
SPAN = dict(head=dict(lm=False, labels='span'))
LABELS = (
    ('labels/kernel', 'score.weight', 'c d -> d c', lambda model: model.head.labels == 'sequence'),
    ('labels/kernel', 'classifier.weight', 'c d -> d c', lambda model: model.head.labels == 'token'),
    ('labels/bias', 'classifier.bias', 'c -> c', lambda model: model.head.labels == 'token'),
    ('labels/kernel', 'qa_outputs.weight', 'c d -> d c', lambda model: model.head.labels == 'span'),
    ('labels/bias', 'qa_outputs.bias', 'c -> c', lambda model: model.head.labels == 'span'),
)

MODEL_TYPE = 'gpt_neox'
ARCHITECTURES = {
    'GPTNeoXForCausalLM': {}, 'GPTNeoXModel': BODY, 'GPTNeoXForSequenceClassification': SEQUENCE,
    'GPTNeoXForTokenClassification': TOKEN, 'GPTNeoXForQuestionAnswering': SPAN}
PREFIX = 'gpt_neox.'
RENAMED = ((r'lm_head\.weight', 'embed_out.weight'),)  # the newer name; every version reads the older
TIED = {'embed_out.weight': 'gpt_neox.embed_in.weight'}
BUFFERS = r'(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)'

_LAYER, _THEIRS = 'stack/layer_{layer}', 'gpt_neox.layers.{layer}'
TEMPLATES = (
    ('embed/embedding', 'gpt_neox.embed_in.weight', 'v d -> v d'),
    (f'{_LAYER}/attention_norm/scale', f'{_THEIRS}.input_layernorm.weight', 'd -> d'),
    (f'{_LAYER}/attention_norm/bias', f'{_THEIRS}.input_layernorm.bias', 'd -> d'),
    ((f'{_LAYER}/attention/query/kernel', f'{_LAYER}/attention/key/kernel', f'{_LAYER}/attention/value/kernel'),
     f'{_THEIRS}.attention.query_key_value.weight', '(n (h | h | h)) d -> d n h, d n h, d n h'),
    ((f'{_LAYER}/attention/query/bias', f'{_LAYER}/attention/key/bias', f'{_LAYER}/attention/value/bias'),
     f'{_THEIRS}.attention.query_key_value.bias', '(n (h | h | h)) -> n h, n h, n h'),
    (f'{_LAYER}/attention/out/kernel', f'{_THEIRS}.attention.dense.weight', 'd (n h) -> n h d'),
    (f'{_LAYER}/attention/out/bias', f'{_THEIRS}.attention.dense.bias', 'd -> d'),
    (f'{_LAYER}/mlp_norm/scale', f'{_THEIRS}.post_attention_layernorm.weight', 'd -> d'),
    (f'{_LAYER}/mlp_norm/bias', f'{_THEIRS}.post_attention_layernorm.bias', 'd -> d'),
    (f'{_LAYER}/mlp/up/kernel', f'{_THEIRS}.mlp.dense_h_to_4h.weight', 'f d -> d f'),
    (f'{_LAYER}/mlp/up/bias', f'{_THEIRS}.mlp.dense_h_to_4h.bias', 'f -> f'),
    (f'{_LAYER}/mlp/down/kernel', f'{_THEIRS}.mlp.dense_4h_to_h.weight', 'd f -> f d'),
    (f'{_LAYER}/mlp/down/bias', f'{_THEIRS}.mlp.dense_4h_to_h.bias', 'd -> d'),
    ('final_norm/scale', 'gpt_neox.final_layer_norm.weight', 'd -> d'),
    ('final_norm/bias', 'gpt_neox.final_layer_norm.bias', 'd -> d'),
    ('head', 'embed_out.weight', 'v d -> v d'),
    *LABELS,
)

KEYS = dict(
    vocab_size=(int, 50432), hidden_size=(int, 6144), num_hidden_layers=(int, 44), num_attention_heads=(int, 64),
    intermediate_size=(int, 24_576), hidden_act=(str, 'gelu'), max_position_embeddings=(int, 2048),
    layer_norm_eps=(float, 1e-5), use_parallel_residual=(bool, True), attention_bias=(bool, True),
    tie_word_embeddings=(bool, False), rotary_pct=(float, 0.25), rotary_emb_base=(float, 10_000.0))


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json, with rotary positions under their older names or their newer."""
  hf = keys.read(given, KEYS, {}, keys.ROPE)
  width, num_heads, bias = hf['hidden_size'], hf['num_attention_heads'], hf['attention_bias']
  head_dim = keys.heads('hidden_size', width, 'num_attention_heads', num_heads)
  return BASE | dict(
      width=width, num_layers=hf['num_hidden_layers'], vocab_size=hf['vocab_size'],
      max_length=hf['max_position_embeddings'], tie_embeddings=hf['tie_word_embeddings'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, bias=bias,
                                         out_bias=bias),
      mlp=BASE['mlp'] | dict(width=hf['intermediate_size'],
                             activation=keys.activation('hidden_act', hf['hidden_act'])),
      norm=BASE['norm'] | dict(eps=hf['layer_norm_eps']),
      residual=BASE['residual'] | dict(parallel=hf['use_parallel_residual']),
      positions=dict(kind='rope', rope=keys.rope(given, head_dim, hf['max_position_embeddings'],
                                                 hf['rotary_emb_base'], hf['rotary_pct'])))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  rope = model.positions.rope
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, hidden_size=model.width, num_hidden_layers=model.num_layers,
      num_attention_heads=model.attention.num_heads, intermediate_size=model.mlp.width,
      hidden_act=keys.their_activation(model.mlp.activation), max_position_embeddings=model.max_length,
      layer_norm_eps=model.norm.eps, use_parallel_residual=model.residual.parallel,
      attention_bias=model.attention.bias, tie_word_embeddings=model.tie_embeddings, rotary_pct=rope.fraction,
      rotary_emb_base=rope.base, rope_scaling=keys.their_rope(rope)['rope_scaling'], initializer_range=model.init.std,
      hidden_dropout=model.dropout, attention_dropout=model.attention.dropout)
