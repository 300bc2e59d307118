"""Sums over rows, all at once as products of matrices, or piece by piece."""
from typing import Callable

import jax
import jax.numpy as jnp

from jaxlm.types import Array, Tree


def over_lead(x: Array, y: Array, num_lead: int | None = None) -> Array:
  """float32: the product of x and y, summed over their first dims, by default all of x.

  With ones for x it is a sum over y's rows. XLA on a CPU would write down what it sums, and sum it slowly, as a tree.
  """
  lead = tuple(range(x.ndim if num_lead is None else num_lead))
  return jax.lax.dot_general(x, y, ((lead, lead), ((), ())), preferred_element_type=jnp.float32)


def by_pieces(columns: int, fn: Callable, carry: Tree, *arrays: Array, whole: int = 1) -> tuple[Tree, Tree]:
  """Scans `fn(carry, arrays) -> carry, outputs` over pieces of the length, each of about so many columns.

  Arrays and outputs are [B, T, …]; inside `fn`, T is the length of a piece. A piece has columns from everywhere: where
  the length is split over devices, each has its share of every piece; `whole` is into how many parts.
  """
  length = arrays[0].shape[1]
  pieces = -(-length // columns)
  size = -(-length // (pieces * whole)) * whole

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], size, pieces, *x.shape[2:]), 2, 0)

  if pieces == 1:
    return fn(carry, arrays)
  carry, outputs = jax.lax.scan(fn, carry, tuple(map(cut, arrays)))
  join = lambda y: jnp.moveaxis(y, 0, 2).reshape(y.shape[1], pieces * size, *y.shape[3:])[:, :length]
  return carry, jax.tree.map(join, outputs)
