"""Qwen2 (Yang et al. 2024, arXiv:2407.10671) and Qwen2.5 (arXiv:2412.15115): Llama's block, its queries, keys and
values with a bias.

Sizes of 2.5 that Qwen2 has, too, are the same. Windows, which the code there knows, none of the published ones use.
"""
from typing import Any, Mapping

from jaxlm.families import keys, llama, llamas

_SMALL, _LARGE = 151_936, 152_064  # rows of embeddings; the tokenizer has 151,646 pieces
VOCAB_SIZES = {'0.5b': _SMALL, '1.5b': _SMALL, '7b': _LARGE, '72b': _LARGE, '2.5-3b': _SMALL, '2.5-14b': _LARGE,
               '2.5-32b': _LARGE}

# What all sizes share.
BASE = llama.BASE | dict(family='qwen2', attention=llama.BASE['attention'] | dict(bias=True))


def _shape(width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int, tied: bool = False,
           eps: float = 1e-6) -> dict:
  rope = dict(base=1_000_000.0, scaling='none', factor=1.0, original_length=131_072)
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=131_072, tie_embeddings=tied,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=width // num_heads),
      mlp=BASE['mlp'] | dict(width=mlp_width), norm=BASE['norm'] | dict(eps=eps),
      positions=dict(kind='rope', rope=rope), init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    '0.5b': _shape(896, 24, 14, 2, 4864, tied=True),
    '1.5b': _shape(1536, 28, 12, 2, 8960, tied=True),
    '7b': _shape(3584, 28, 28, 4, 18_944),
    '72b': _shape(8192, 80, 64, 8, 29_568, eps=1e-5),
    '2.5-3b': _shape(2048, 36, 16, 2, 11_008, tied=True),
    '2.5-14b': _shape(5120, 48, 40, 8, 13_824, eps=1e-5),
    '2.5-32b': _shape(5120, 64, 40, 8, 27_648, eps=1e-5),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'qwen2'
ARCHITECTURES = llamas.architectures('Qwen2')
PREFIX, TIED, BUFFERS = llama.PREFIX, llama.TIED, llama.BUFFERS
TEMPLATES = llamas.with_spans(llama.TEMPLATES, prefix='transformer.')

# Keys of windows, here and in the families that follow.
WINDOW_KEYS = dict(use_sliding_window=(bool, False), sliding_window=(int, None), max_window_layers=(keys.Index, 28),
                   layer_types=(list, None))
KEYS = llamas.KEYS | WINDOW_KEYS | dict(
    vocab_size=(int, _SMALL), intermediate_size=(int, 22_016), num_key_value_heads=(int, 32), head_dim=(int, None),
    max_position_embeddings=(int, 32_768))


def with_window(given: Mapping[str, Any]) -> dict[str, Any]:
  """A config.json whose window is there only if it is used, which another key says."""
  window = given.get('sliding_window', 4096) if given.get('use_sliding_window') else None
  return {**given, 'sliding_window': window}


def windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
  """config.model.attention.windows: without layer_types, layers from max_window_layers on have one."""
  kinds, num_layers = hf['layer_types'], hf['num_hidden_layers']
  if kinds is None:
    kinds = [keys.FULL if layer < hf['max_window_layers'] else keys.SLIDING for layer in range(num_layers)]
  return keys.windows(kinds, hf['sliding_window'], num_layers)


def their_windows(model: Any) -> dict[str, Any]:
  """Keys of a ModelConfig's windows."""
  window = keys.their_window(model)
  return dict(use_sliding_window=window is not None, sliding_window=window, layer_types=keys.their_layer_types(model))


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(with_window(given), KEYS, {}, keys.ROPE)
  ours = llamas.from_hf(hf, given)
  return ours | dict(family=BASE['family'], attention=ours['attention'] | dict(bias=True, windows=windows(hf)))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  theirs = llamas.to_hf(model, MODEL_TYPE) | their_windows(model)
  return {key: value for key, value in theirs.items() if key != 'attention_bias'}  # always there, and not said
