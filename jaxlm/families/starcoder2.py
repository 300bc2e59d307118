"""StarCoder2 (Lozhkov et al. 2024, arXiv:2402.19173): Llama's block with biases and LayerNorms, no gate; a window."""
from typing import Any, Mapping

from jaxlm.families import keys, llama, llamas

VOCAB_SIZE = 49_152

# What all sizes share.
BASE = llama.BASE | dict(
    family='starcoder2', tie_embeddings=True,
    attention=llama.BASE['attention'] | dict(bias=True, out_bias=True),
    mlp=dict(activation='gelu_tanh', gated=False, bias=True), norm=dict(kind='layernorm', bias=True, eps=1e-5))


def _shape(width: int, num_layers: int, num_heads: int, num_kv_heads: int, base: float, std: float) -> dict:
  rope = dict(base=base, scaling='none', factor=1.0, original_length=16_384)
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=16_384,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128, windows=(4096,)),
      mlp=BASE['mlp'] | dict(width=4 * width), positions=dict(kind='rope', rope=rope),
      init=dict(std=std, embedding_std=std, scale_by_depth=False))


SIZES = {
    '3b': _shape(3072, 30, 24, 2, 999_999.4420358813, 0.018042),
    '7b': _shape(4608, 32, 36, 4, 1_000_000.0, 0.018042),
    '15b': _shape(6144, 40, 48, 4, 100_000.0, 0.01275) | dict(tie_embeddings=False),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'starcoder2'
ARCHITECTURES = {name: heads for name, heads in llamas.architectures('Starcoder2').items()
                 if not name.endswith('QuestionAnswering')}
PREFIX, TIED, BUFFERS = llama.PREFIX, llama.TIED, llama.BUFFERS

_NORMS = {'attention_norm': 'layers.{layer}.input_layernorm', 'mlp_norm': 'layers.{layer}.post_attention_layernorm'}
TEMPLATES = (
    *((ours, keys.renamed(theirs, {'up_proj': 'c_fc', 'down_proj': 'c_proj'}), bijection)
      for ours, theirs, bijection in llama.TEMPLATES),
    *((f'stack/layer_{{layer}}/{ours}/bias', f'model.{theirs}.bias', 'd -> d') for ours, theirs in _NORMS.items()),
    ('final_norm/bias', 'model.norm.bias', 'd -> d'),
)

RENAMED_KEYS = {'rms_norm_eps': 'norm_epsilon', 'attention_bias': 'use_bias', 'mlp_bias': 'use_bias'}  # Llama's, here
KEYS = {key: known for key, known in llamas.KEYS.items() if key not in RENAMED_KEYS} | dict(
    vocab_size=(int, 49_152), hidden_size=(int, 3072), intermediate_size=(int, 12_288), num_hidden_layers=(int, 30),
    num_attention_heads=(int, 24), num_key_value_heads=(int, 2), hidden_act=(str, 'gelu_pytorch_tanh'),
    max_position_embeddings=(int, 4096), norm_epsilon=(float, 1e-5), sliding_window=(int, None),
    use_bias=(bool, True), tie_word_embeddings=(bool, True))
FIXED = dict(mlp_type='default', norm_type='layer_norm')  # of its first folders


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, FIXED, keys.ROPE)
  ours = llamas.from_hf(hf | {key: hf[name] for key, name in RENAMED_KEYS.items()}, given)
  return ours | dict(
      family=BASE['family'], norm=BASE['norm'] | dict(eps=hf['norm_epsilon']), mlp=ours['mlp'] | dict(gated=False),
      attention=ours['attention'] | dict(windows=(hf['sliding_window'] or 0,)))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  theirs = llamas.to_hf(model, MODEL_TYPE)
  return {key: value for key, value in theirs.items() if key not in ('head_dim', *RENAMED_KEYS)} | dict(
      norm_epsilon=model.norm.eps, use_bias=model.attention.bias, sliding_window=keys.their_window(model),
      residual_dropout=model.dropout, embedding_dropout=model.dropout)
