"""Frozen kernels kept in 8 or 4 bits: codes in blocks that share a scale, made whole where they are multiplied.

In a kernel's place stands a folder of arrays that have the kernel's dims in its order, so that they are split over
devices and stacked over layers as it would be. Blocks run along the model's width, one dim of every projection: a split
of heads or of the MLP's width never meets them, and one of the width must divide its blocks. Of n elements there, b in
a block, the folder holds

  codes    int8: int8 [..., n, ...]; nf4: uint8 [..., n/2, ...], the earlier of two neighbours in the lower four bits
  scales   int8: float32 [..., n/b, ...], a step; nf4: uint8, the largest magnitude, between the two of `ranges`
  ranges   nf4: float32 [..., 2, ...], the least and the greatest scale along the width

Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3, and appendix E.
"""
import functools
from typing import Any, Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.models.config import ModelConfig, PeftConfig
from jaxlm.sharding import Layout
from jaxlm.types import Array, Tree

Parts = dict[str, Array]  # a kernel that is kept in codes

# Quantiles of the normal distribution, the largest made 1; 0 is one of them. Appendix E of the paper.
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
                1.0], np.float32)
LEAST_BLOCK = 4  # below it scales outweigh codes, and shapes of codes and scales no longer tell which dim is blocked

# Projections of the layers. Not routers and gates, which are small and decide much; not what a recurrent layer
# multiplies at every token.
_KEPT = (r'(.*/)?((attention|cross)/(query|key|value|out|relative|query_down|key_value_down)|'
         r'mlp/((experts|shared)/)?(gate|up|down))')


def is_kept(peft: PeftConfig, path: Sequence[str]) -> bool:
  """Whether the kernel of the projection at this path is kept in codes: what stays, and is not trained by name."""
  place = '/'.join(path)
  return (peft.method != 'none' and peft.base != 'same' and trees.matches(_KEPT, place)
          and not (peft.also and trees.matches(peft.also, f'{place}/kernel')))


def is_parts(kernel: Any) -> bool:
  return isinstance(kernel, dict) and 'codes' in kernel


def _width_dim(path: Sequence[str], front: int) -> int:
  """Which dim of a kernel is the model's width: the last of what writes to the residual stream, else the first.

  Args:
    front: dims of layers and experts before it.
  """
  return -1 if path[-1] in ('out', 'down') else front


# ---- codes -------------------------------------------------------------------------------------------------------


def encoded(kernel: Array, peft: PeftConfig, dim: int, name: str) -> Parts:
  """A kernel's codes.

  Args:
    kernel: any dims.
    dim: along which blocks run; where it does not divide by config.peft.block they are the largest that it does
      divide by, and even.
    name: for the error.
  Raises:
    JaxlmError: no block fits.
  """
  dim, n = dim % kernel.ndim, kernel.shape[dim]
  size = next((size for size in range(min(peft.block, n), LEAST_BLOCK - 1, -1) if size % 2 == 0 == n % size), None)
  if size is None:
    raise JaxlmError(f'{name}: dim {dim} of {n} does not divide into even blocks of {LEAST_BLOCK} to {peft.block} '
                     "elements; set config.model.peft.block higher, or config.model.peft.base='same'.")
  return {'int8': _int8, 'nf4': _nf4}[peft.base](kernel, dim, size)


def _blocks(kernel: Array, dim: int, size: int) -> tuple[Array, Array]:
  """float32 ([..., n/b, b, ...], [..., n/b, 1, ...]: the largest magnitude of each block)."""
  blocks = kernel.astype(jnp.float32).reshape(*kernel.shape[:dim], -1, size, *kernel.shape[dim + 1:])
  return blocks, jnp.abs(blocks).max(dim + 1, keepdims=True)


def _over(x: Array, by: Array) -> Array:
  """x / by, and x where by is 0."""
  return x / jnp.where(by > 0, by, 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _int8(kernel: Array, dim: int, size: int) -> Parts:
  blocks, largest = _blocks(kernel, dim, size)
  scales = largest / 127
  return {'codes': jnp.round(_over(blocks, scales)).astype(jnp.int8).reshape(kernel.shape),
          'scales': scales.squeeze(dim + 1)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nf4(kernel: Array, dim: int, size: int) -> Parts:
  blocks, largest = _blocks(kernel, dim, size)
  unit = _over(blocks, largest)
  codes = sum((unit > middle).astype(jnp.uint8) for middle in (NF4[1:] + NF4[:-1]) / 2)
  pairs = codes.reshape(*kernel.shape[:dim], -1, 2, *kernel.shape[dim + 1:])
  early, late = (jax.lax.index_in_dim(pairs, i, dim + 1, keepdims=False) for i in (0, 1))
  # The paper subtracts the mean and keeps signs. With the least subtracted both ends are exact, so that what was
  # decoded has the same codes, of scales too.
  scales = largest.squeeze(dim + 1)
  least, greatest = scales.min(dim, keepdims=True), scales.max(dim, keepdims=True)
  return {'codes': early | late << 4,
          'scales': jnp.round(255 * _over(scales - least, greatest - least)).astype(jnp.uint8),
          'ranges': jnp.concatenate([least, greatest], dim)}


def whole(kernel: Array | Parts, dtype: Any) -> Array:
  """A kernel in this dtype, whether it is kept in codes or not. No gradient goes to codes or scales."""
  if not is_parts(kernel):
    return kernel.astype(dtype)
  kernel = jax.tree.map(jax.lax.stop_gradient, kernel)
  codes, scales = kernel['codes'], kernel['scales']
  dim = _blocked_dim(kernel)
  if 'ranges' in kernel:
    least, greatest = jnp.split(kernel['ranges'], 2, dim)
    scales = least + (greatest - least) * (scales.astype(jnp.float32) / 255)
    codes = jnp.stack([codes & 15, codes >> 4], dim + 1)
    values = jnp.asarray(NF4).at[codes].get(mode='promise_in_bounds')
  else:
    values = codes.astype(jnp.float32)
  front, back = scales.shape[:dim], scales.shape[dim + 1:]
  values = values.reshape(*front, scales.shape[dim], -1, *back) * jnp.expand_dims(scales, dim + 1)
  return values.reshape(*front, -1, *back).astype(dtype)


def _blocked_dim(parts: Parts) -> int:
  return next(i for i, (n, blocks) in enumerate(zip(parts['codes'].shape, parts['scales'].shape)) if n != blocks)


def gathered(layout: Layout, axes: tuple[str | None, ...], kernel: Array | Parts, dtype: Any) -> Array:
  """A kernel as layers multiply by it (`Layout.gathered`): in this dtype, or in codes first, fewer bytes to send."""
  if not is_parts(kernel):
    return layout.gathered(kernel.astype(dtype), *axes)
  dim = _blocked_dim(kernel)
  return whole({name: layout.gathered(part, *_axes(name, axes, dim)) for name, part in kernel.items()}, dtype)


def _axes(name: str, axes: tuple[str | None, ...], dim: int) -> tuple[str | None, ...]:
  """Logical axes of a part of a kernel that has these."""
  return (*axes[:dim], None, *axes[dim + 1:]) if name == 'ranges' else axes


# ---- parameters --------------------------------------------------------------------------------------------------


def initialiser(peft: PeftConfig, path: Sequence[str], init: Callable[..., Array], axes: tuple[str | None, ...],
                front: int = 0) -> Callable[..., Any]:
  """What draws a kernel, with logical axes; and codes it, where it `is_kept`.

  Args:
    path: of its projection.
    front: dims of experts.
  """
  if not is_kept(peft, path):
    return nn.with_logical_partitioning(init, axes)
  dim = _width_dim(path, front) % len(axes)

  def draw(*args: Any) -> dict[str, nn.LogicallyPartitioned]:
    parts = encoded(init(*args), peft, dim, '/'.join((*path, 'kernel')))
    return {name: nn.LogicallyPartitioned(part, _axes(name, axes, dim)) for name, part in parts.items()}

  return draw


def together(params: Tree) -> dict[str, Any]:
  """`trees.flatten` in which a kernel that is kept in codes is one leaf, all its parts; `trees.unflatten` undoes it."""
  return {trees.path_of(keys): leaf
          for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_parts)[0]}


def quantised(params: Tree, config: ModelConfig) -> Tree:
  """Parameters of a model of plain kernels, stacked or not, as those of this config's, which keeps some in codes.

  What is in codes already stays so.
  """
  leaves = together(params)
  for path, leaf in leaves.items():
    *home, last = path.split('/')
    if last == 'kernel' and not is_parts(leaf) and is_kept(config.peft, home):
      front = ('period' in home and not config.share_layers) + ('experts' in home)
      leaves[path] = encoded(jnp.asarray(leaf), config.peft, _width_dim(home, front), path)
  return trees.unflatten(leaves)


def restored(params: Tree, config: ModelConfig) -> Tree:
  """The inverse of `quantised`, but for what rounding took: kernels in config.param_dtype."""
  return trees.unflatten({path: whole(leaf, config.param_dtype) if is_parts(leaf) else leaf
                          for path, leaf in together(params).items()})
