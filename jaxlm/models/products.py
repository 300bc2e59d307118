"""Activations times weights: one product and its gradients, whatever the layout and the precision."""
import functools

import jax
import jax.numpy as jnp

from jaxlm.models import float8, quantised
from jaxlm.sharding import Layout
from jaxlm.sums import over_lead
from jaxlm.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(layout: Layout, axes: tuple[str | None, ...], eight: bool, x: Array, kernel: Array | quantised.Parts,
            bias: Array | None) -> Array:
  """x [..., I] times a kernel of I inputs, flattened to [..., O], and a bias added.

  A kernel that is spread over devices which have rows of their own is gathered for each direction and kept in neither.
  It is multiplied in x's dtype, and gathered in that; gradients are summed in float32 over rows and devices.

  Args:
    axes: logical axes of the kernel.
    eight: all three products, forward and backward, multiply in 8 bits (`float8`).
    kernel: any number of dims, I·O elements; or kept in codes, which get no gradient and which each direction makes
      whole for itself.
    bias: O elements, or None.
  """
  return _product(layout, axes, eight, x, kernel, bias)[0]


def _product(layout, axes, eight, x, kernel, bias):
  y = _times(eight, float8.VALUES, _rows(layout, x), _matrix(layout, axes, x, kernel))
  y = y if bias is None else y + bias.reshape(-1).astype(y.dtype)
  return y.reshape(*x.shape[:-1], -1), (x, kernel, bias)


def _product_backward(layout, axes, eight, saved, dy):
  x, kernel, bias = saved
  x_RI, dy_RO = _rows(layout, x), _rows(layout, dy)
  lead = tuple(range(x_RI.ndim - 1))
  dkernel = None
  if not quantised.is_parts(kernel):
    dkernel = (float8.contracted(x_RI, dy_RO, float8.VALUES, float8.GRADIENTS, (lead, lead)) if eight
               else over_lead(x_RI, dy_RO, len(lead)))
    dkernel = layout.constrain(dkernel.reshape(kernel.shape), *axes).astype(kernel.dtype)
  dbias = None if bias is None else over_lead(jnp.ones(x_RI.shape[:-1], dy.dtype), dy_RO)
  dx = _times(eight, float8.GRADIENTS, dy_RO, _matrix(layout, axes, x, kernel).T)
  return dx.reshape(x.shape), dkernel, None if bias is None else dbias.reshape(bias.shape).astype(bias.dtype)


def _times(eight, dtype, x, matrix):
  if not eight:
    return jnp.matmul(x, matrix)
  return float8.contracted(x, matrix, dtype, float8.VALUES, ((x.ndim - 1,), (0,))).astype(x.dtype)


def _rows(layout: Layout, x: Array) -> Array:
  """[..., I] as [R, I]: of a product of matrices XLA on a CPU makes one call, where of two dims of rows it first turns
  x round. As it is where devices have rows of their own: which dim they split is not known here."""
  split = any(layout.axes(logical) for logical in ('act_batch', 'act_length', 'act_stream'))
  return x if split else x.reshape(-1, x.shape[-1])


def _matrix(layout, axes, x, kernel):
  # One contracted and one free dim: the CPU and GPU libraries' own shape, whatever the heads.
  return quantised.gathered(layout, axes, kernel, x.dtype).reshape(x.shape[-1], -1)


product.defvjp(_product, _product_backward)


# ---- one row, on a CPU -------------------------------------------------------------------------------------------

# XLA multiplies a row by fewer weights than SMALL on one core, which does not read as fast as the memory gives. A sum
# over the last dim it splits over cores, and reads in order: 0.45 to 0.72 of the time at 256 to 640 thousand weights.
# But not where OF_ONE does not stop it from cutting sums in pieces, each written down.
SMALL = 1 << 20
OUTPUTS_FIRST = 'outputs_first'  # the name of a kernel that is kept so, [O, I]
OF_ONE = {'xla_cpu_experimental_ynn_fusion_type': '', 'xla_disable_hlo_passes': 'tree_reduction_rewriter'}


def of_one(x: Array, kernel_OI: Array, bias: Array | None) -> Array:
  """What `product` returns, without gradients, of a kernel outputs first; fast for one row in a program compiled with
  OF_ONE. Sums are float32."""
  x_R1I = x.reshape(-1, 1, x.shape[-1]).astype(jnp.float32)
  y_RO = (x_R1I * kernel_OI.astype(x.dtype)).sum(-1).astype(x.dtype)
  y_RO = y_RO if bias is None else y_RO + bias.reshape(-1).astype(x.dtype)
  return y_RO.reshape(*x.shape[:-1], -1)
