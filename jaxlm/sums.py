"""Sums over rows, as products of matrices."""
import jax
import jax.numpy as jnp

from jaxlm.types import Array


def over_lead(x: Array, y: Array, num_lead: int | None = None) -> Array:
  """float32: the product of x and y, summed over their first dims, by default all of x.

  With ones for x it is a sum over y's rows. XLA on a CPU would write down what it sums, and sum it slowly, as a tree.
  """
  lead = tuple(range(x.ndim if num_lead is None else num_lead))
  return jax.lax.dot_general(x, y, ((lead, lead), ((), ())), preferred_element_type=jnp.float32)
