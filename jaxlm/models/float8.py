"""Products of matrices in 8 bits, for cards that multiply them twice as fast as bfloat16."""
import jax
import jax.numpy as jnp

from jaxlm.types import Array

# What is multiplied in the forward direction has the finer numbers, gradients the wider range.
VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2


def scaled(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
  """(x in 8 bits, float32 factor that gives x back): its largest element becomes the largest that dtype has.

  The scale is that of x as it is now, so that a step keeps nothing from the one before: it costs a pass over x, and
  a batch alone decides what is computed. All zeros stay so.
  """
  largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
  factor = jnp.where(largest > 0, largest, 1.0) / float(jnp.finfo(dtype).max)
  return (x.astype(jnp.float32) / factor).astype(dtype), factor


def contracted(x: Array, y: Array, x_dtype: jnp.dtype, y_dtype: jnp.dtype, dims: tuple[tuple[int, ...], ...]) -> Array:
  """float32: x times y in 8 bits, summed in float32 over dims (of x, of y).

  Source: Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433.
  """
  (x, x_factor), (y, y_factor) = scaled(x, x_dtype), scaled(y, y_dtype)
  return jax.lax.dot_general(x, y, (dims, ((), ())), preferred_element_type=jnp.float32) * (x_factor * y_factor)
