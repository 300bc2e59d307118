"""The parts of a block: projections, norms, embeddings, activations, dropout."""
import functools
import math
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxlm.lookup import lookup
from jaxlm.models import peft, quantised
from jaxlm.models.config import ModelConfig
from jaxlm.models.products import OUTPUTS_FIRST, SMALL, of_one, product
from jaxlm.sharding import Layout, axes_of
from jaxlm.sums import over_lead
from jaxlm.types import Array


def _lean(act: Callable[[Array], Array]) -> Callable[[Array], Array]:
  """An activation whose slope is formed from its argument alone. What both directions could share, a tanh say, would be
  written and read once more: on a CPU that takes 1.2 to 1.6 times as long as forming it twice."""
  run = jax.custom_vjp(act)
  run.defvjp(lambda x: (act(x), x), lambda x, dy: jax.vjp(act, jax.lax.optimization_barrier(x))[1](dy))
  return run


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {name: _lean(act) for name, act in {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'relu': jax.nn.relu,
    'relu2': lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, Primer
    'silu': jax.nn.silu,
    'tanh': jnp.tanh,
}.items()}


def softcap(x: Array, cap: float) -> Array:
  """cap·tanh(x / cap); x itself where cap is 0 (Gemma 2, arXiv:2408.00118)."""
  return cap * jnp.tanh(x / cap) if cap else x


def example_keys(rng: Array, example_ids_B: Array) -> Array:
  """A key for each example, so that masks do not depend on how a batch is cut or spread."""
  return jax.vmap(jax.random.fold_in, (None, 0))(rng, example_ids_B)


def fold(keys_B: Array | None, number: int | Array) -> Array | None:
  """Keys of a place in the model: a layer, a site in it."""
  return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x: Array, rate: float, keys_B: Array | None, site: int) -> Array:
  """Zeroes elements with probability `rate` and scales the rest; nothing without keys.

  Args:
    x: [B, ...].
    keys_B: one key an example, already folded with the layer; None: not training.
    site: which of the layer's dropouts this is.
  Source: Srivastava et al. 2014.
  """
  if keys_B is None or rate == 0.0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys_B)
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class Dense(nn.Module):
  """A linear map from the last dims of x to `features`; every projection of a model is one.

  Attributes:
    config: for dtypes and the initial scale.
    layout: where kernels are gathered.
    features: sizes of the output dims.
    axes: logical axes of the kernel, input dims then output dims.
    num_inputs: how many last dims of x are contracted.
    bias: adds one of shape `features`.
    residual: the output adds to the residual stream, so its initial scale shrinks with depth (GPT-2).
    zero: the kernel is 0 at the start.
  """
  config: ModelConfig
  layout: Layout
  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  num_inputs: int = 1
  bias: bool = True
  residual: bool = False
  zero: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init, dtype = self.config.init, jnp.dtype(self.config.param_dtype)
    inputs = x.shape[x.ndim - self.num_inputs:]
    std = init.std / math.sqrt(2 * self.config.num_layers) if self.residual and init.scale_by_depth else init.std
    normal = nn.initializers.zeros if self.zero else nn.initializers.normal(std)
    shape = inputs + self.features
    outputs_first = self.config.outputs_first and math.prod(shape) < SMALL
    if outputs_first:
      kernel = self.param(OUTPUTS_FIRST, normal, (math.prod(self.features), math.prod(inputs)), dtype)
    else:
      kernel = self.param('kernel', quantised.initialiser(self.config.peft, self.path, normal, self.axes), shape, dtype)
    out_axes = self.axes[self.num_inputs:]
    bias = None
    if self.bias:
      bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, out_axes), self.features, dtype)
    lead = x.shape[:x.ndim - self.num_inputs]
    x = x.reshape(lead + (math.prod(inputs),)).astype(self.config.dtype)
    rank = peft.rank_at(self.config.peft, self.path)
    scaled = peft.at(self.config.peft, 'ia3', self.path)
    if scaled == 'in':
      x = peft.Scale(self.config, self.axes[:self.num_inputs], inputs, name=peft.SCALE)(x)
    if outputs_first:
      y = of_one(x, kernel, bias)
    else:
      y = product(self.layout, self.axes, self.config.products == 'float8', x, kernel, None if rank else bias)
    if rank:
      y = peft.LowRank(self.config, self.layout, rank, inputs, self.features, self.axes, name=peft.LORA)(x, y, kernel)
      y = y if bias is None else y + bias.reshape(-1).astype(y.dtype)
    if scaled == 'out':
      y = peft.Scale(self.config, out_axes, self.features, name=peft.SCALE)(y)
    return y.reshape(lead + self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def normed(centred: bool, dims: int, eps: float, x: Array, scale: Array, bias: Array | None) -> Array:
  """float32: x over its root mean square in the last `dims` dims, scaled and shifted; less its mean first if `centred`.

  Args:
    x: [..., *last].
    scale, bias: float32, the shape of some last dims of x.
  """
  return _normed(centred, dims, eps, x, scale, bias)[0]


def _unit(centred: bool, dims: int, eps: float, x: Array) -> tuple[Callable[[Array], Array], Array, Array]:
  """(means over what is normalised together, x normalised, what it was multiplied by)."""
  mean = functools.partial(jnp.mean, axis=tuple(range(-dims, 0)), keepdims=True)
  x = x.astype(jnp.float32)
  if centred:
    x = x - mean(x)
  factor = jax.lax.rsqrt(mean(jnp.square(x)) + eps)
  return mean, x * factor, factor


def _normed(centred, dims, eps, x, scale, bias):
  _, unit, _ = _unit(centred, dims, eps, x)
  return unit * scale if bias is None else unit * scale + bias, (x, scale, bias)


def _normed_backward(centred, dims, eps, saved, dy):
  x, scale, bias = saved
  mean, unit, factor = _unit(centred, dims, eps, x)
  dunit = dy * scale
  dx = factor * (dunit - unit * mean(dunit * unit) - (mean(dunit) if centred else 0))
  over_rows = lambda y: over_lead(jnp.ones(y.shape[:y.ndim - scale.ndim], y.dtype), y)
  return dx.astype(x.dtype), over_rows(dy * unit), None if bias is None else over_rows(dy)


normed.defvjp(_normed, _normed_backward)


class Norm(nn.Module):
  """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), in float32.

  Attributes:
    config: kind, bias, eps, and what is added to the stored scale.
    axes: logical axes of the scale, which has the shape of the last dims of x.
    dims: how many last dims are normalised together.
  """
  config: ModelConfig
  axes: tuple[str, ...] = ('embed',)
  dims: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm, dtype = self.config.norm, jnp.dtype(self.config.param_dtype)
    param = lambda name, init: self.param(name, nn.with_logical_partitioning(init, self.axes),
                                          x.shape[x.ndim - len(self.axes):], dtype).astype(jnp.float32)
    centred = norm.kind == 'layernorm'
    scale = param('scale', nn.initializers.constant(1.0 - norm.offset)) + norm.offset
    bias = param('bias', nn.initializers.zeros) if centred and norm.bias else None
    return normed(centred, self.dims, norm.eps, x, scale, bias).astype(self.config.dtype)


def look_up(layout: Layout, axes: tuple[str | None, str | None], table_VD: Array, ids_BT: Array, dtype: Any) -> Array:
  """[B, T, D], the rows of a table that ids name.

  Where columns are spread over devices that have rows of a batch of their own, each looks up, in the columns it keeps,
  what all of them need; then they exchange columns for rows. XLA would hold all rows on the devices of other axes.

  Args:
    axes: logical axes of the table.
    dtype: of the result; gradients are summed in the table's own.
  """
  rows = layout.axes('act_batch')
  table = layout.spec(axes, table_VD.shape, 'embedding') if rows else (None, None)
  by_row, by_column = (axes_of(table[dim:dim + 1]) for dim in (0, 1))
  exchanged = tuple(axis for axis in by_column if axis in rows)
  if not exchanged or set(by_row) & set(rows):
    return jnp.take(table_VD, ids_BT, axis=0).astype(dtype)
  gathered = tuple(axis for axis in by_column if axis not in exchanged)
  ids = layout.spec(('act_batch', 'act_length'), ids_BT.shape)

  def local(table_VD, ids_BT):
    ids_BT = jax.lax.all_gather(ids_BT, exchanged, axis=0, tiled=True)
    if by_row:
      ids_BT = ids_BT - jax.lax.axis_index(by_row) * table_VD.shape[0]
    mine_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
    x_BTD = jnp.take(table_VD, jnp.where(mine_BT, ids_BT, 0) if by_row else ids_BT, axis=0).astype(dtype)
    if by_row:
      x_BTD = jax.lax.psum(jnp.where(mine_BT[..., None], x_BTD, 0), by_row)
    if gathered:
      x_BTD = jax.lax.all_gather(x_BTD, gathered, axis=2, tiled=True)
    return jax.lax.all_to_all(x_BTD, exchanged, 0, 2, tiled=True)

  return layout.by_device(local, (table, ids), PartitionSpec(*ids, None), in_stage=False)(table_VD, ids_BT)


class Embedding(nn.Module):
  """A table of vectors; rows beyond the vocabulary only round its size up. Drawn with `std`, or init.embedding_std."""
  config: ModelConfig
  layout: Layout
  size: int
  width: int
  axes: tuple[str | None, str]
  std: float | None = None

  def setup(self):
    std = self.config.init.embedding_std if self.std is None else self.std
    self.embedding = self.param(
        'embedding', nn.with_logical_partitioning(nn.initializers.normal(std), self.axes), (self.size, self.width),
        jnp.dtype(self.config.param_dtype))

  def __call__(self, ids_BT: Array) -> Array:
    return look_up(self.layout, self.axes, self.embedding, ids_BT, self.config.dtype)


class Mlp(nn.Module):
  """Two projections around an activation; gated ones multiply it by a third (Shazeer 2020, GLU variants)."""
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    mlp, width = self.config.mlp, self.config.width
    into = lambda name: Dense(self.config, self.layout, (mlp.width,), ('embed', 'mlp'), bias=mlp.bias, name=name)
    act = lookup(ACTIVATIONS, mlp.activation, 'activation')
    h_BTF = act(into('gate')(x_BTD)) * into('up')(x_BTD) if mlp.gated else act(into('up')(x_BTD))
    h_BTF = checkpoint_name(self.layout.constrain(h_BTF, 'act_batch', 'act_length', 'act_mlp'), 'mlp_hidden')
    return Dense(self.config, self.layout, (width,), ('mlp', 'embed'), bias=mlp.bias, residual=True, name='down')(h_BTF)
