"""Qwen1.5-MoE and Qwen2-57B-A14B (arXiv:2407.10671): Qwen2's block with many small experts, and one for every token."""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys, llama, llamas, qwen2

VOCAB_SIZE = 151_936  # rows of embeddings

# What all sizes share.
BASE = qwen2.BASE | dict(family='qwen2_moe', moe=dict(every=1, first=0, router='softmax', normalise=False,
                                                      shared_gate=True, balance_loss=0.001))


def _shape(width: int, num_layers: int, num_heads: int, num_kv_heads: int, max_length: int, num_experts: int,
           top_k: int, expert_width: int, shared_width: int) -> dict:
  rope = dict(base=1_000_000.0, scaling='none', factor=1.0, original_length=max_length)
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=max_length,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128),
      mlp=BASE['mlp'] | dict(width=shared_width), norm=BASE['norm'] | dict(eps=1e-6),
      moe=BASE['moe'] | dict(num_experts=num_experts, top_k=top_k, width=expert_width, shared_width=shared_width),
      positions=dict(kind='rope', rope=rope), init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    '1.5-a2.7b': _shape(2048, 24, 16, 16, 8192, 60, 4, 1408, 5632),
    '57b-a14b': _shape(3584, 28, 28, 4, 131_072, 64, 8, 2560, 20_480),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'qwen2_moe'
ARCHITECTURES = llamas.architectures('Qwen2Moe')
PREFIX, TIED, BUFFERS = qwen2.PREFIX, qwen2.TIED, qwen2.BUFFERS

_MLP = 'stack/layer_{layer}/mlp/', 'model.layers.{layer}.mlp.'
# Of a mixture, in the families that follow, too.
MIXTURE = (
    (_MLP[0] + 'router/kernel', _MLP[1] + 'gate.weight', 'e d -> d e'),
    (_MLP[0] + 'experts/gate/kernel', _MLP[1] + 'experts.{expert}.gate_proj.weight', 'f d -> d f'),
    (_MLP[0] + 'experts/up/kernel', _MLP[1] + 'experts.{expert}.up_proj.weight', 'f d -> d f'),
    (_MLP[0] + 'experts/down/kernel', _MLP[1] + 'experts.{expert}.down_proj.weight', 'd f -> f d'),
)
TEMPLATES = llamas.with_spans((
    *MIXTURE,
    (_MLP[0] + 'shared/gate/kernel', _MLP[1] + 'shared_expert.gate_proj.weight', 'f d -> d f'),
    (_MLP[0] + 'shared/up/kernel', _MLP[1] + 'shared_expert.up_proj.weight', 'f d -> d f'),
    (_MLP[0] + 'shared/down/kernel', _MLP[1] + 'shared_expert.down_proj.weight', 'd f -> f d'),
    (_MLP[0] + 'shared_gate/kernel', _MLP[1] + 'shared_expert_gate.weight', '1 d -> d 1'),
    *llama.TEMPLATES))

# Keys of mixtures, here and in the families that follow.
MIXTURE_KEYS = dict(
    num_experts=(int, 60), num_experts_per_tok=(int, 4), moe_intermediate_size=(int, 1408),
    decoder_sparse_step=(int, 1), mlp_only_layers=(list, None), norm_topk_prob=(bool, False),
    router_aux_loss_coef=(float, 0.001))
KEYS = qwen2.KEYS | MIXTURE_KEYS | dict(
    hidden_size=(int, 2048), intermediate_size=(int, 5632), num_hidden_layers=(int, 24),
    num_attention_heads=(int, 16), num_key_value_heads=(int, 16), shared_expert_intermediate_size=(int, 5632),
    qkv_bias=(bool, True))


def mixture(hf: Mapping[str, Any]) -> dict[str, Any]:
  """config.model.moe of the keys of a mixture.

  Raises:
    JaxlmError: layers with experts that do not stand at one distance from each other.
  """
  step, dense, num_layers = hf['decoder_sparse_step'], hf['mlp_only_layers'] or [], hf['num_hidden_layers']
  mixed = [layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense]
  spans = [(step - 1, step)] + [(a, b - a) for a, b in zip(mixed, mixed[1:] + [num_layers])][:1]
  found = [(first, every) for first, every in spans if list(range(first, num_layers, every)) == mixed]
  if not mixed or not found:
    raise JaxlmError(f'config.json: mlp_only_layers={dense!r} and decoder_sparse_step={step} leave layers {mixed} with '
                     'experts; here they are every nth from some layer on.')
  return dict(first=found[0][0], every=found[0][1], num_experts=hf['num_experts'], top_k=hf['num_experts_per_tok'],
              width=hf['moe_intermediate_size'], normalise=hf['norm_topk_prob'],
              balance_loss=hf['router_aux_loss_coef'])


def their_mixture(model: Any) -> dict[str, Any]:
  """Keys of a ModelConfig's mixture."""
  moe, periodic = model.moe, model.moe.first == model.moe.every - 1
  dense = [layer for layer, kind in enumerate(model.layer_kinds()) if not kind.moe]
  return dict(num_experts=moe.num_experts, num_experts_per_tok=moe.top_k, moe_intermediate_size=moe.width,
              decoder_sparse_step=moe.every if periodic else 1, mlp_only_layers=[] if periodic else dense,
              norm_topk_prob=moe.normalise, router_aux_loss_coef=moe.balance_loss)


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(qwen2.with_window(given), KEYS, {}, keys.ROPE)
  if hf['layer_types'] is None:  # of the first layers, every second has a window
    hf['layer_types'] = [keys.FULL if layer % 2 or layer >= hf['max_window_layers'] else keys.SLIDING
                         for layer in range(hf['num_hidden_layers'])]
  ours = llamas.from_hf(hf, given)
  return ours | dict(
      family=BASE['family'], moe=BASE['moe'] | mixture(hf) | dict(shared_width=hf['shared_expert_intermediate_size']),
      attention=ours['attention'] | dict(bias=hf['qkv_bias'], windows=qwen2.windows(hf)))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  return qwen2.to_hf(model) | their_mixture(model) | dict(
      model_type=MODEL_TYPE, qkv_bias=model.attention.bias, shared_expert_intermediate_size=model.moe.shared_width)
