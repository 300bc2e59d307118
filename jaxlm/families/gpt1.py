"""GPT (Radford et al. 2018): its one size as published, names at Hugging Face; GPT-2 with norms after the sums."""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import gpt2, keys
from jaxlm.families.gpt_neox import BODY, SEQUENCE

VOCAB_SIZE = 40_478  # of its tokenizer

BASE = dict(
    family='gpt1', tie_embeddings=True, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=True, out_bias=True, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='gelu_tanh', gated=False, bias=True),
    norm=dict(kind='layernorm', bias=True, eps=1e-5),
    residual=dict(in_norm=False, out_norm=False, post_norm=True, alpha=1.0, parallel=False, final_norm=False),
    positions=dict(kind='learned', offset=0))


def _block(width: int, num_layers: int, num_heads: int, head_dim: int) -> dict:
  return BASE | dict(
      width=width, num_layers=num_layers, mlp=BASE['mlp'] | dict(width=4 * width),
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim))


SIZES = {
    '117m': _block(768, 12, 12, 64) | dict(
        max_length=512, init=dict(std=0.02, embedding_std=0.02, scale_by_depth=False)),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'openai-gpt'
ARCHITECTURES = {'OpenAIGPTLMHeadModel': {}, 'OpenAIGPTModel': BODY, 'OpenAIGPTForSequenceClassification': SEQUENCE}
PREFIX = 'transformer.'
TIED = {'lm_head.weight': 'transformer.tokens_embed.weight'}
BUFFERS = r'(transformer\.)?(position_ids|h\.\d+\.attn\.bias)'  # causal masks and counts that old files hold

_OURS = {'/attention_norm/': '/attention_post_norm/', '/mlp_norm/': '/mlp_post_norm/'}
_THEIRS = {'transformer.wte.': 'transformer.tokens_embed.', 'transformer.wpe.': 'transformer.positions_embed.'}
TEMPLATES = tuple((keys.renamed(ours, _OURS) if isinstance(ours, str) else ours, keys.renamed(theirs, _THEIRS), *rest)
                  for ours, theirs, *rest in gpt2.TEMPLATES)

# Their name of an activation -> ours; the first that gives one of ours is what export writes.
ACTIVATIONS = {'gelu': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}

KEYS = dict(
    vocab_size=(int, VOCAB_SIZE), n_positions=(int, 512), n_embd=(int, 768), n_layer=(int, 12), n_head=(int, 12),
    afn=(str, 'gelu'), layer_norm_epsilon=(float, 1e-5), tie_word_embeddings=(bool, True))
FIXED = dict(n_special=0)
HARMLESS = r'n_ctx|summary_.*|predict_special_tokens'


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, FIXED, HARMLESS)
  if hf['afn'] not in ACTIVATIONS:
    raise JaxlmError(f'config.json: unknown afn {hf["afn"]!r}. Known: {", ".join(ACTIVATIONS)}.')
  width, num_heads = hf['n_embd'], hf['n_head']
  block = _block(width, hf['n_layer'], num_heads, keys.heads('n_embd', width, 'n_head', num_heads))
  return block | dict(
      vocab_size=hf['vocab_size'], max_length=hf['n_positions'], tie_embeddings=hf['tie_word_embeddings'],
      mlp=block['mlp'] | dict(activation=ACTIVATIONS[hf['afn']]),
      norm=BASE['norm'] | dict(eps=hf['layer_norm_epsilon']))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
  if model.mlp.activation not in theirs:
    raise JaxlmError(f'activation {model.mlp.activation!r} has no name there; {", ".join(theirs)} have.')
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, n_positions=model.max_length, n_embd=model.width,
      n_layer=model.num_layers, n_head=model.attention.num_heads, afn=theirs[model.mlp.activation],
      layer_norm_epsilon=model.norm.eps, tie_word_embeddings=model.tie_embeddings, initializer_range=model.init.std,
      resid_pdrop=model.dropout, embd_pdrop=model.dropout, attn_pdrop=model.attention.dropout)
