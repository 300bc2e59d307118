"""OPT (Zhang et al. 2022, arXiv:2205.01068): sizes as published, names at Hugging Face.

The 350M is another block: norms after the sums, none at the end, and words of half the width that are projected in and,
before the output matrix, out again. A row's hidden states here are those before the projection out.
"""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys
from jaxlm.families.gpt_neox import BODY, LABELS, SEQUENCE, SPAN

VOCAB_SIZE = 50_272  # rows of the published tables

# What all sizes share.
BASE = dict(
    family='opt', tie_embeddings=True, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=True, out_bias=True, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='relu', gated=False, bias=True),
    norm=dict(kind='layernorm', bias=True, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='learned', offset=2))
AFTER = dict(residual=BASE['residual'] | dict(in_norm=False, post_norm=True, final_norm=False))


def _narrow(width: int) -> dict:
  """Words of another width than the model's."""
  return dict(embedding=dict(width=width, project_bias=False, project_first=True),
              head=dict(transform='linear', transform_bias=False))


def _shape(width: int, num_layers: int, num_heads: int) -> dict:
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=2048, mlp=BASE['mlp'] | dict(width=4 * width),
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=width // num_heads),
      init=dict(std=0.006, embedding_std=0.006, scale_by_depth=True))


SIZES = {
    '125m': _shape(768, 12, 12),
    '350m': _shape(1024, 24, 16) | AFTER | _narrow(512),
    '1.3b': _shape(2048, 24, 32),
    '2.7b': _shape(2560, 32, 32),
    '6.7b': _shape(4096, 32, 32),
    '13b': _shape(5120, 40, 40),
    '30b': _shape(7168, 48, 56),
    '66b': _shape(9216, 64, 72),
    '175b': _shape(12_288, 96, 96),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'opt'
ARCHITECTURES = {'OPTForCausalLM': {}, 'OPTModel': BODY, 'OPTForSequenceClassification': SEQUENCE,
                 'OPTForQuestionAnswering': SPAN}
PREFIX = 'model.'
TIED = {'lm_head.weight': 'model.decoder.embed_tokens.weight'}
BUFFERS = r'(model\.)?decoder\.version'

_LAYER, _THEIRS = 'stack/layer_{layer}', 'model.decoder.layers.{layer}'
TEMPLATES = (
    ('embed/embedding', 'model.decoder.embed_tokens.weight', 'v e -> v e'),
    ('embed_project/kernel', 'model.decoder.project_in.weight', 'd e -> e d'),
    ('position_embed/embedding', 'model.decoder.embed_positions.weight', 'p d -> p d'),
    (f'{_LAYER}/attention_norm/scale', f'{_THEIRS}.self_attn_layer_norm.weight', 'd -> d'),
    (f'{_LAYER}/attention_norm/bias', f'{_THEIRS}.self_attn_layer_norm.bias', 'd -> d'),
    (f'{_LAYER}/attention_post_norm/scale', f'{_THEIRS}.self_attn_layer_norm.weight', 'd -> d'),
    (f'{_LAYER}/attention_post_norm/bias', f'{_THEIRS}.self_attn_layer_norm.bias', 'd -> d'),
    (f'{_LAYER}/attention/query/kernel', f'{_THEIRS}.self_attn.q_proj.weight', '(n h) d -> d n h'),
    (f'{_LAYER}/attention/query/bias', f'{_THEIRS}.self_attn.q_proj.bias', '(n h) -> n h'),
    (f'{_LAYER}/attention/key/kernel', f'{_THEIRS}.self_attn.k_proj.weight', '(n h) d -> d n h'),
    (f'{_LAYER}/attention/key/bias', f'{_THEIRS}.self_attn.k_proj.bias', '(n h) -> n h'),
    (f'{_LAYER}/attention/value/kernel', f'{_THEIRS}.self_attn.v_proj.weight', '(n h) d -> d n h'),
    (f'{_LAYER}/attention/value/bias', f'{_THEIRS}.self_attn.v_proj.bias', '(n h) -> n h'),
    (f'{_LAYER}/attention/out/kernel', f'{_THEIRS}.self_attn.out_proj.weight', 'd (n h) -> n h d'),
    (f'{_LAYER}/attention/out/bias', f'{_THEIRS}.self_attn.out_proj.bias', 'd -> d'),
    (f'{_LAYER}/mlp_norm/scale', f'{_THEIRS}.final_layer_norm.weight', 'd -> d'),
    (f'{_LAYER}/mlp_norm/bias', f'{_THEIRS}.final_layer_norm.bias', 'd -> d'),
    (f'{_LAYER}/mlp_post_norm/scale', f'{_THEIRS}.final_layer_norm.weight', 'd -> d'),
    (f'{_LAYER}/mlp_post_norm/bias', f'{_THEIRS}.final_layer_norm.bias', 'd -> d'),
    (f'{_LAYER}/mlp/up/kernel', f'{_THEIRS}.fc1.weight', 'f d -> d f'),
    (f'{_LAYER}/mlp/up/bias', f'{_THEIRS}.fc1.bias', 'f -> f'),
    (f'{_LAYER}/mlp/down/kernel', f'{_THEIRS}.fc2.weight', 'd f -> f d'),
    (f'{_LAYER}/mlp/down/bias', f'{_THEIRS}.fc2.bias', 'd -> d'),
    ('final_norm/scale', 'model.decoder.final_layer_norm.weight', 'd -> d'),
    ('final_norm/bias', 'model.decoder.final_layer_norm.bias', 'd -> d'),
    ('head_transform/dense/kernel', 'model.decoder.project_out.weight', 'e d -> d e'),
    ('head', 'lm_head.weight', 'v e -> v e'),
    *LABELS,
)

KEYS = dict(
    vocab_size=(int, VOCAB_SIZE), hidden_size=(int, 768), num_hidden_layers=(int, 12), ffn_dim=(int, 3072),
    max_position_embeddings=(int, 2048), do_layer_norm_before=(bool, True), _remove_final_layer_norm=(bool, False),
    word_embed_proj_dim=(int, None), num_attention_heads=(int, 12), activation_function=(str, 'relu'),
    enable_bias=(bool, True), tie_word_embeddings=(bool, True))
FIXED = dict(layer_norm_elementwise_affine=True)
HARMLESS = r'dropout|layerdrop|init_std|learned_embeddings'  # of training, but for the last, which is never read


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, FIXED, HARMLESS)
  width, num_heads, bias, before = (hf['hidden_size'], hf['num_attention_heads'], hf['enable_bias'],
                                    hf['do_layer_norm_before'])
  word_width = hf['word_embed_proj_dim'] or width
  if word_width != width and given.get('architectures') not in (None, ['OPTForCausalLM']):
    raise JaxlmError(f'config.json: word_embed_proj_dim={word_width} is other than hidden_size={width}, so hidden '
                     'states are projected, which only OPTForCausalLM is read with here; take that class.')
  found = BASE | dict(
      width=width, num_layers=hf['num_hidden_layers'], vocab_size=hf['vocab_size'],
      max_length=hf['max_position_embeddings'], tie_embeddings=hf['tie_word_embeddings'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, bias=bias, out_bias=bias,
                                         head_dim=keys.heads('hidden_size', width, 'num_attention_heads', num_heads)),
      mlp=BASE['mlp'] | dict(width=hf['ffn_dim'], bias=bias,
                             activation=keys.activation('activation_function', hf['activation_function'])),
      residual=BASE['residual'] | dict(in_norm=before, post_norm=not before,
                                       final_norm=before and not hf['_remove_final_layer_norm']))
  return found | (_narrow(word_width) if word_width != width else {})


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  residual = model.residual
  if model.embedding.width != model.width and not model.head.lm:
    raise JaxlmError('words of another width than the model\'s go with an output layer alone.')
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, hidden_size=model.width, num_hidden_layers=model.num_layers,
      ffn_dim=model.mlp.width, max_position_embeddings=model.max_length, do_layer_norm_before=residual.in_norm,
      _remove_final_layer_norm=residual.in_norm and not residual.final_norm, word_embed_proj_dim=model.embedding.width,
      num_attention_heads=model.attention.num_heads,
      activation_function=keys.their_activation(model.mlp.activation), enable_bias=model.mlp.bias,
      tie_word_embeddings=model.tie_embeddings, init_std=model.init.std, dropout=model.dropout,
      attention_dropout=model.attention.dropout)
