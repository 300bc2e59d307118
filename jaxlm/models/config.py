"""What a model is, frozen: the `model` part of a config, plus what follows from objective, data and precision."""
import dataclasses
from typing import Any, Mapping

import jax.numpy as jnp

# Field names are the keys of schema.py, where each has its unit, reason and range.


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  width: int
  project_bias: bool
  project_first: bool
  norm: bool
  token_types: int
  task_types: int
  zeroed: int


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  lm: bool
  bias: bool
  transform: str
  transform_bias: bool
  labels: str
  num_labels: int
  label_bias: bool
  pool: str
  pooler: str
  pooler_bias: bool


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  kv_rank: int
  q_rank: int
  rope_dim: int
  value_dim: int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  num_heads: int
  num_kv_heads: int
  head_dim: int
  bias: bool
  out_bias: bool
  qk_norm: str
  softcap: float
  scale: float
  sink: bool
  dropout: float
  windows: tuple[int, ...]
  kernel: str
  block: int
  latent: LatentConfig


@dataclasses.dataclass(frozen=True)
class MlpConfig:
  width: int
  activation: str
  gated: bool
  bias: bool


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  num_experts: int
  top_k: int
  width: int
  every: int
  first: int
  router: str
  normalise: bool
  scale: float
  router_bias: bool
  num_groups: int
  top_groups: int
  shared_width: int
  shared_gate: bool
  mode: str
  capacity_factor: float
  balance_loss: float
  z_loss: float


@dataclasses.dataclass(frozen=True)
class NormConfig:
  kind: str
  bias: bool
  eps: float
  offset: float


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
  in_norm: bool
  first_norm: bool
  out_norm: bool
  post_norm: bool
  alpha: float
  parallel: bool
  parallel_norms: bool
  final_norm: bool


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  base: float
  local_base: float
  fraction: float
  interleaved: bool
  dtype: str
  scaling: str
  factor: float
  original_length: int
  low_freq_factor: float
  high_freq_factor: float
  beta_fast: float
  beta_slow: float
  attention_factor: float


@dataclasses.dataclass(frozen=True)
class PositionsConfig:
  kind: str
  offset: int
  two_dims: bool
  num_buckets: int
  max_distance: int
  alibi_scale: float
  alibi_rounded: bool
  rope: RopeConfig


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  method: str = 'none'
  sites: tuple[tuple[str, Any], ...] = ()
  also: str = ''
  rank: int = 8
  alpha: float = 16.0
  stabilised: bool = False
  dora: bool = False
  width: int = 64
  parallel: bool = False
  strength: float = 1.0
  tokens: int = 20
  encoder: str = 'none'
  start: str = 'vocabulary'
  text: str = ''
  base: str = 'same'
  block: int = 64


@dataclasses.dataclass(frozen=True)
class InitConfig:
  std: float
  embedding_std: float
  scale_by_depth: bool


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What is static of a layer.

  Attributes:
    moe: a mixture of experts in the MLP's place.
    bare: no norm before its first branch.
  """
  moe: bool = False
  bare: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One model. `visibility` is the objective's; `vocab_size` is known here, whatever the config said."""
  family: str
  structure: str
  mixer: str
  width: int
  num_layers: int
  encoder_layers: int
  share_layers: bool
  vocab_size: int
  vocab_pad_to: int
  max_length: int
  tie_embeddings: bool
  embedding_scale: float
  logit_scale: float
  logit_softcap: float
  future_heads: int
  dropout: float
  remat: str
  remat_names: tuple[str, ...]
  scan: bool
  embedding: EmbeddingConfig
  head: HeadConfig
  attention: AttentionConfig
  mlp: MlpConfig
  moe: MoeConfig
  norm: NormConfig
  residual: ResidualConfig
  positions: PositionsConfig
  generator: GeneratorConfig
  init: InitConfig
  peft: PeftConfig = PeftConfig()
  visibility: str = 'causal'
  compute_dtype: str = 'float32'
  param_dtype: str = 'float32'
  products: str = 'compute'  # what multiplies activations by weights: in the compute dtype, or float8
  outputs_first: bool = False  # small kernels are kept so, for one row at a time: `products.of_one`

  @property
  def padded_vocab(self) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of `vocab_pad_to`."""
    return -(-self.vocab_size // self.vocab_pad_to) * self.vocab_pad_to

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.compute_dtype)

  def window(self, layer: int) -> int:
    """Tokens layer number `layer` sees back, itself included; 0: all."""
    return self.attention.windows[layer % len(self.attention.windows)]

  @property
  def num_labels(self) -> int:
    """Outputs of the label head, for a row or for each token."""
    return {'span': 2, 'replaced': 1}.get(self.head.labels, self.head.num_labels)

  @property
  def aux_losses(self) -> dict[str, float]:
    """{name in Output.aux: what it counts in the loss}."""
    return {'balance': self.moe.balance_loss, 'router_z': self.moe.z_loss}

  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """What is statically different between layers; numbers that differ (windows) are scanned as data."""
    moe = self.moe
    mixes = lambda layer: bool(moe.num_experts) and layer >= moe.first and (layer - moe.first) % moe.every == 0
    return tuple(LayerKind(mixes(layer), layer == 0 and not self.residual.first_norm)
                 for layer in range(self.num_layers))

  def towers(self) -> dict[str, 'ModelConfig']:
    """{start of its parameters' paths: config} of each stack with all that stands around it; '' is the model's own."""
    found = {'': self}
    body = dataclasses.replace(self.head, lm=False, labels='none', pooler='none')
    if self.structure == 'encoder_decoder':
      found['encoder/'] = dataclasses.replace(self, structure='encoder', num_layers=self.encoder_layers, head=body,
                                              visibility='full', future_heads=0)
    if self.generator.width:
      small, heads = self.generator, self.generator.num_heads
      found['generator/'] = dataclasses.replace(
          self, width=small.width, num_layers=small.num_layers, generator=dataclasses.replace(small, width=0),
          attention=dataclasses.replace(self.attention, num_heads=heads, num_kv_heads=heads,
                                        head_dim=max(small.width // heads, 1)),
          mlp=dataclasses.replace(self.mlp, width=small.mlp_width), moe=dataclasses.replace(self.moe, num_experts=0),
          head=dataclasses.replace(body, lm=True, bias=True, transform='full', transform_bias=True))
    return found


def freeze(model: Mapping[str, Any], *, vocab_size: int, visibility: str, compute_dtype: str = 'float32',
           param_dtype: str = 'float32', products: str = 'compute') -> ModelConfig:
  """Turns the `model` part of a resolved config into a ModelConfig.

  Args:
    model: nested mapping with the keys of schema.py's `model`.
    vocab_size: of the tokenizer; used where the config says 0.
    visibility: the objective's: causal, full or order.
  """
  def build(kind, values):
    fields = {f.name: f for f in dataclasses.fields(kind)}
    return kind(**{k: build(fields[k].type, v) if isinstance(v, Mapping) else v for k, v in values.items()})
  values = dict(model, vocab_size=model['vocab_size'] or vocab_size, visibility=visibility,
                compute_dtype=compute_dtype, param_dtype=param_dtype, products=products)
  return build(ModelConfig, values)


@dataclasses.dataclass(frozen=True)
class Segments:
  """A depth cut into layers before, a repeated period, and layers after."""
  prefix: tuple[LayerKind, ...]
  period: tuple[LayerKind, ...]
  repeats: int
  suffix: tuple[LayerKind, ...]

  def path(self, layer: int) -> tuple[str, int | None]:
    """Where layer number `layer` keeps its parameters: (path under the stack, index into their first dim)."""
    if layer < len(self.prefix):
      return f'prefix_{layer}', None
    layer -= len(self.prefix)
    if layer < len(self.period) * self.repeats:
      return f'period/slot_{layer % len(self.period)}', layer // len(self.period)
    return f'suffix_{layer - len(self.period) * self.repeats}', None


def segments(kinds: tuple[LayerKind, ...]) -> Segments:
  """The cut that leaves fewest different programs: the shortest prefix + period + suffix."""
  best = None
  for start in range(len(kinds)):
    for length in range(1, len(kinds) - start + 1):
      period = kinds[start:start + length]
      repeats = 1
      while kinds[start + repeats * length:start + (repeats + 1) * length] == period:
        repeats += 1
      end = start + repeats * length
      programs = start + length + len(kinds) - end
      if best is None or programs < best[0]:
        best = programs, Segments(kinds[:start], period, repeats, kinds[end:])
    if best[0] <= start + 1:
      break
  return best[1]
