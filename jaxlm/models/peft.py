"""Adaptation of projections: low-rank updates and scales beside frozen weights, where they sit, and merging them.

What a method adds to a model, its delta, lies in folders of reserved names inside the tree of parameters, so that it is
found by path: whatever stack, mesh or family, no other list says what is trained, stored and saved.
"""
import math
import re
from typing import Any, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.models import quantised
from jaxlm.models.config import ModelConfig, PeftConfig
from jaxlm.models.products import product
from jaxlm.sharding import Layout
from jaxlm.types import Array, Tree

LORA, SCALE, BOTTLENECK, VIRTUAL, PREFIX = 'lora', 'scale_by', 'bottleneck', 'virtual', 'prefix'
_DELTA = re.compile(rf'(.*/)?({LORA}|{SCALE}|{VIRTUAL}|{PREFIX}|\w+_{BOTTLENECK})/.*')

# Where a method sits if the config does not say: as its paper has it. Values of LoRA are ranks, True the config's; of
# (IA)³ the side of a projection that is scaled.
SITES: dict[str, tuple[tuple[str, Any], ...]] = {
    'lora': ((r'(.*/)?attention/(query|value)', True),),                              # Hu et al. 2021, section 4.2
    'ia3': ((r'(.*/)?(attention|cross)/(key|value)', 'out'), (r'(.*/)?mlp/(experts/)?down', 'in')),
    'bottleneck': ((r'(.*/)?(attention|mlp)', True),),                                # Houlsby et al. 2019: two a layer
}
_LAYER = re.compile(r'(^|/)(stack|period|(slot|prefix|suffix|layer)_\d+)(?=/|$)')


def site(path: Sequence[str]) -> str:
  """The name of a place, the same in every layer, stacked or not: 'attention/query', 'encoder/mlp/up'."""
  return _LAYER.sub('', '/'.join(path)).strip('/')


def at(peft: PeftConfig, method: str, path: Sequence[str]) -> Any:
  """What the rules say of this place: the first that matches; None where the method is another, or none does."""
  if peft.method != method:
    return None
  name = site(path)
  return next((value for pattern, value in peft.sites or SITES[method] if trees.matches(pattern, name)), None) or None


def rank_at(peft: PeftConfig, path: Sequence[str]) -> int:
  """Of the low-rank update here; 0: none."""
  value = at(peft, 'lora', path)
  return peft.rank if value is True else value or 0


def is_delta(path: str) -> bool:
  """Whether a parameter is what a method added."""
  return _DELTA.fullmatch(path) is not None


def is_bias(path: str) -> bool:
  """Whether BitFit trains it."""
  return path.rpartition('/')[2] in ('bias', 'head_bias')


def is_trained(peft: PeftConfig, path: str) -> bool:
  """Whether a parameter is trained, stored and saved: the delta; of BitFit the biases; a label head, which no base can
  know; and what the config names."""
  if peft.method == 'none':
    return True
  biases = peft.method == 'bitfit' and is_bias(path)
  return is_delta(path) or path.startswith('labels/') or biases or bool(peft.also) and trees.matches(peft.also, path)


def strength(peft: PeftConfig, rank: int) -> float:
  """What an update of this rank counts: alpha / rank; rank-stabilised, alpha / √rank (Kalajdzievski 2023)."""
  return peft.alpha / (math.sqrt(rank) if peft.stabilised else rank)


class LowRank(nn.Module):
  """W + s·A·B in the place of W, of which A and B alone are trained; the same as W at the start, when B is 0.

  With `dora` each output's weights are also scaled to a trained length (`magnitude`), at the start their own, which
  the weights that are loaded decide: `settled`.

  Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353, eq. 5.
  """
  config: ModelConfig
  layout: Layout
  rank: int
  inputs: tuple[int, ...]
  features: tuple[int, ...]
  axes: tuple[str | None, ...]

  def setup(self):
    num, dtype = len(self.inputs), jnp.dtype(self.config.param_dtype)
    param = lambda name, init, axes, shape: self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    low = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=tuple(range(num)), out_axis=-1)
    self.a = param('a', low, (*self.axes[:num], None), (*self.inputs, self.rank))
    self.b = param('b', nn.initializers.zeros, (None, *self.axes[num:]), (self.rank, *self.features))
    if self.config.peft.dora:
      self.magnitude = param('magnitude', nn.initializers.ones, self.axes[num:], self.features)

  def __call__(self, x: Array, y: Array, kernel: Array | quantised.Parts) -> Array:
    """What W + s·A·B makes of x [..., I], of which W makes y [..., O]."""
    config, num = self.config, len(self.inputs)
    low = product(self.layout, (*self.axes[:num], None), False, x, self.a, None)
    more = product(self.layout, (None, *self.axes[num:]), False, low, self.b, None)
    y = y + jnp.asarray(strength(config.peft, self.rank), y.dtype) * more
    if not config.peft.dora:
      return y
    kernel = quantised.whole(kernel, jnp.float32)
    # The length counts as a constant for the gradient (section 4.3), which halves the memory.
    length = jax.lax.stop_gradient(lengths(kernel, _update(config.peft, self.a, self.b, kernel), num))
    return y * (self.magnitude / length).reshape(-1).astype(y.dtype)


def _update(peft: PeftConfig, a: Array, b: Array, kernel: Array) -> Array:
  """s·A·B in the kernel's shape; any number of dims of layers (or experts) may stand in front of all three."""
  front = a.ndim + b.ndim - 2 - kernel.ndim
  rank, lead = a.shape[-1], kernel.shape[:front]
  update = jnp.matmul(a.reshape(*lead, -1, rank).astype(jnp.float32), b.reshape(*lead, rank, -1).astype(jnp.float32))
  return (strength(peft, rank) * update).reshape(kernel.shape)


def lengths(kernel: Array, update: Array | float, num_inputs: int, front: int = 0) -> Array:
  """float32 [*front, *features]: the length of each output's weights."""
  whole = kernel.astype(jnp.float32) + update
  return jnp.sqrt(jnp.square(whole).sum(tuple(range(front, front + num_inputs))))


class Scale(nn.Module):
  """Trained factors of a vector, 1 at the start.

  Source: Liu et al. 2022, (IA)³, arXiv:2205.05638, section 3.3.
  """
  config: ModelConfig
  axes: tuple[str | None, ...]
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, self.axes), self.shape,
                       jnp.dtype(self.config.param_dtype))
    return x * scale.reshape(-1).astype(x.dtype)


class ExpertDelta(nn.Module):
  """The same methods for the matrices of experts [E, I, O]: what is multiplied is the changed matrix itself.

  Tokens go to experts by sorting; an update of the matrix costs a product of its size, and needs no second sorting.
  """
  config: ModelConfig
  axes: tuple[str | None, str | None]
  rank: int = 0
  side: str = ''

  @nn.compact
  def __call__(self, kernel_EIO: Array) -> Array:
    peft, (E, I, O), dtype = self.config.peft, kernel_EIO.shape, jnp.dtype(self.config.param_dtype)
    param = lambda name, init, axes, shape: self.param(name, nn.with_logical_partitioning(init, ('expert', *axes)),
                                                       (E, *shape), dtype)
    if self.side:
      inward = self.side == 'in'
      scale = param('scale', nn.initializers.ones, self.axes[:1] if inward else self.axes[1:], (I if inward else O,))
      return kernel_EIO * (scale[:, :, None] if inward else scale[:, None])
    low = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=1, out_axis=2, batch_axis=0)
    a = param('a', low, (self.axes[0], None), (I, self.rank))
    b = param('b', nn.initializers.zeros, (None, self.axes[1]), (self.rank, O))
    changed = kernel_EIO + _update(peft, a, b, kernel_EIO)
    if not peft.dora:
      return changed.astype(kernel_EIO.dtype)
    magnitude = param('magnitude', nn.initializers.ones, self.axes[1:], (O,))
    return (changed * (magnitude / jnp.sqrt(jnp.square(changed).sum(1)))[:, None]).astype(kernel_EIO.dtype)


# ---- deltas and weights ------------------------------------------------------------------------------------------


def settled(params: Tree) -> Tree:
  """Parameters with what a delta takes from the weights it begins beside: lengths of DoRA."""
  leaves = quantised.together(params)
  for path in [path for path in leaves if path.endswith(f'/{LORA}/magnitude')]:
    home = path.removesuffix(f'{LORA}/magnitude')
    kernel = quantised.whole(leaves[f'{home}kernel'], jnp.float32)
    a, b = leaves[f'{home}{LORA}/a'], leaves[f'{home}{LORA}/b']
    front = a.ndim + b.ndim - 2 - kernel.ndim
    leaves[path] = lengths(kernel, 0.0, a.ndim - 1 - front, front).astype(leaves[path].dtype)
  return trees.unflatten(leaves)


def merge(params: Tree, peft: PeftConfig, dtype: Any = jnp.float32) -> Tree:
  """The parameters of a model without the method that computes the same.

  Args:
    params: unstacked, a layer by itself.
    dtype: of kernels that were kept in codes, which are made whole.
  Raises:
    JaxlmError: the method adds what weights cannot express.
  """
  if peft.method not in ('lora', 'ia3', 'bitfit', 'none'):
    raise JaxlmError(f'peft method {peft.method!r} cannot be merged: its delta is no change of weights. Keep it beside '
                     'the base; lora, ia3 and bitfit can be.')
  leaves = {path: quantised.whole(leaf, dtype) if quantised.is_parts(leaf) else leaf
            for path, leaf in quantised.together(params).items()}
  for home in sorted({path.partition(f'{folder}/')[0] for folder in (LORA, SCALE) for path in leaves
                      if f'/{folder}/' in path}):
    kernel, bias = leaves[f'{home}kernel'], leaves.get(f'{home}bias')
    take = lambda name: leaves.pop(f'{home}{name}', None)
    a, b, magnitude, scale = take(f'{LORA}/a'), take(f'{LORA}/b'), take(f'{LORA}/magnitude'), take(f'{SCALE}/scale')
    if a is not None:
      front = a.ndim + b.ndim - 2 - kernel.ndim
      changed = kernel.astype(jnp.float32) + _update(peft, a, b, kernel)
      if magnitude is not None:
        of_output = magnitude.astype(jnp.float32) / lengths(changed, 0.0, a.ndim - 1 - front, front)
        changed = changed * _beside(of_output, kernel, front, inward=False)
      leaves[f'{home}kernel'] = changed.astype(kernel.dtype)
    if scale is not None:
      inward = at(peft, 'ia3', home.strip('/').split('/')) == 'in'
      leaves[f'{home}kernel'] = (kernel * _beside(scale, kernel, int('/experts/' in home), inward)).astype(kernel.dtype)
      if bias is not None and not inward:
        leaves[f'{home}bias'] = (bias * scale).astype(bias.dtype)
  return trees.unflatten(leaves)


def _beside(scale: Array, kernel: Array, front: int, inward: bool) -> Array:
  """A scale of a kernel's inputs or outputs, as it multiplies the kernel; `front` dims of experts stand before both."""
  ones = (1,) * (kernel.ndim - scale.ndim)
  if inward:
    return scale.reshape(*scale.shape, *ones)
  return scale.reshape(*scale.shape[:front], *ones, *scale.shape[front:])
