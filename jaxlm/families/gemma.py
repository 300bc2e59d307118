"""Gemma (Gemma Team 2024, arXiv:2403.08295): Llama's block with GeGLU, heads of 256, scaled embeddings, norms that
store what their scale is above 1."""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys, llama, llamas

VOCAB_SIZE = 256_000  # rows of embeddings, of Gemma 2's, too

# What all sizes share.
BASE = llama.BASE | dict(
    family='gemma', tie_embeddings=True, mlp=llama.BASE['mlp'] | dict(activation='gelu_tanh'),
    norm=dict(kind='rmsnorm', bias=False, eps=1e-6, offset=1.0))


def shape(base: Mapping[str, Any], width: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int,
          mlp_width: int, max_length: int = 8192, **attention: Any) -> dict:
  """Overrides of config.model for one size, of the families that follow, too."""
  rope = dict(base=10_000.0, scaling='none', factor=1.0, original_length=max_length)
  return dict(base) | dict(
      width=width, num_layers=num_layers, max_length=max_length, embedding_scale=width ** 0.5,
      attention=base['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
                                         **attention),
      mlp=base['mlp'] | dict(width=mlp_width), positions=dict(kind='rope', rope=rope),
      init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    '2b': shape(BASE, 2048, 18, 8, 1, 256, 16_384),
    '7b': shape(BASE, 3072, 28, 16, 16, 256, 24_576),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'gemma'
ARCHITECTURES = {name: head for name, head in llamas.architectures('Gemma').items() if 'Question' not in name}
PREFIX, TIED, BUFFERS, TEMPLATES = llama.PREFIX, llama.TIED, llama.BUFFERS, llama.TEMPLATES

GELU = 'gelu_pytorch_tanh'
KEYS = llamas.KEYS | dict(
    vocab_size=(int, VOCAB_SIZE), hidden_size=(int, 3072), intermediate_size=(int, 24_576),
    num_hidden_layers=(int, 28), num_attention_heads=(int, 16), num_key_value_heads=(int, 16), head_dim=(int, 256),
    hidden_act=(str, GELU), max_position_embeddings=(int, 8192), attention_bias=(bool, False),
    tie_word_embeddings=(bool, True))


def overrides(base: Mapping[str, Any], hf: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """Those of Llama's values, with what all sizes of a family of Gemmas share put over them."""
  ours = llamas.from_hf(hf, given)
  return ours | dict(family=base['family'], embedding_scale=hf['hidden_size'] ** 0.5, residual=base['residual'],
                     norm=base['norm'] | dict(eps=hf['rms_norm_eps']))


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, {}, f'{keys.ROPE}|hidden_activation')
  if given.get('hidden_activation') not in (None, GELU):  # which an older version of the code read
    raise JaxlmError(f'config.json: hidden_activation={given["hidden_activation"]!r} changes what is computed, and '
                     f'this family is built with {GELU!r} only.')
  if hf['hidden_act'] == 'gelu':  # as the first files say, which means the other
    hf['hidden_act'] = GELU
  return overrides(BASE, hf, given)


def named_gelu(theirs: Mapping[str, Any]) -> str:
  """The name of an activation that a config.json has under hidden_act, by which Gemma's files call it."""
  return GELU if keys.ACTIVATIONS[theirs['hidden_act']] == 'gelu_tanh' else theirs['hidden_act']


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  theirs = llamas.to_hf(model, MODEL_TYPE)
  return theirs | dict(hidden_act=named_gelu(theirs))
