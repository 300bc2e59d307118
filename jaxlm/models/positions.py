"""Where a token stands: tables added to embeddings, rotations of queries and keys, biases of scores."""
import math
from typing import Callable

import jax.numpy as jnp
import numpy as np

from jaxlm.lookup import lookup
from jaxlm.models.config import RopeConfig
from jaxlm.types import Array


def sinusoidal(positions_BT: Array, width: int) -> Array:
  """Sines of the position in the first half of the width, cosines in the second, wavelengths 2π to 20000π.

  Source: Vaswani et al. 2017, section 3.5, with the halves as tensor2tensor (and Marian) lay them out.
  """
  half = width // 2
  freqs = np.exp(-math.log(10_000.0) * np.arange(half) / half).astype(np.float32)
  angles = positions_BT[..., None].astype(jnp.float32) * freqs
  table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
  return jnp.pad(table, ((0, 0), (0, 0), (0, width - 2 * half)))


# ---- rotary ------------------------------------------------------------------------------------------------------


def _inverse_wavelengths(base: float, head_dim: int) -> np.ndarray:
  return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _plain(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  return _inverse_wavelengths(rope.base, head_dim), 1.0


def _linear(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""
  return _inverse_wavelengths(rope.base, head_dim) / rope.factor, 1.0


def _ntk(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """A larger base, so that the longest wavelength grows by the factor and the shortest stays (NTK-aware)."""
  # A head of one pair has the shortest wavelength alone, whatever the base.
  return _inverse_wavelengths(rope.base * rope.factor ** (head_dim / max(head_dim - 2, 1)), head_dim), 1.0


def _yarn(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """Fast dimensions kept, slow ones interpolated, a ramp between; scores sharpened.

  Source: Peng et al. 2023, YaRN, arXiv:2309.00071, section 3.
  """
  freqs = _inverse_wavelengths(rope.base, head_dim)
  dim_of = lambda turns: head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
  low, high = max(math.floor(dim_of(rope.beta_fast)), 0), min(math.ceil(dim_of(rope.beta_slow)), head_dim - 1)
  scaled = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
  factor = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
  return freqs * (1 - scaled) + freqs / rope.factor * scaled, factor


def _llama3(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """Long wavelengths stretched by the factor, short ones kept, a ramp between (Llama 3.1)."""
  freqs = _inverse_wavelengths(rope.base, head_dim)
  turns = rope.original_length * freqs / (2 * math.pi)
  kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
  return freqs * kept + freqs / rope.factor * (1 - kept), 1.0


ROPE_SCALINGS: dict[str, Callable[[RopeConfig, int], tuple[np.ndarray, float]]] = {
    'none': _plain, 'linear': _linear, 'ntk': _ntk, 'yarn': _yarn, 'llama3': _llama3}


def rope_tables(positions_BT: Array, rope: RopeConfig, head_dim: int) -> tuple[Array, Array]:
  """Cosines and sines, float32 [B, T, H/2], made once and used in every layer.

  Raises:
    ValueError: head_dim is odd.
  """
  if head_dim % 2:
    raise ValueError(f'rope needs an even head_dim; got {head_dim}.')
  freqs, factor = lookup(ROPE_SCALINGS, rope.scaling, 'rope scaling')(rope, head_dim)
  # float32 loses the angle of position 10⁶ only by 0.06; the references compute in it, too.
  angles = positions_BT[..., None].astype(jnp.float32) * freqs.astype(np.float32)
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x_BTNH: Array, tables: tuple[Array, Array]) -> Array:
  """Rotates query or key pairs by position.

  Pairs are (i, i + H/2), the GPT-NeoX and Hugging Face layout; GPT-J interleaves them.

  Args:
    x_BTNH: queries or keys. Computed in float32, returned in x's dtype.
    tables: from `rope_tables`, for the positions of x.
  Source: Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 34.
  """
  cos, sin = (t[:, :, None, :] for t in tables)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)


# ---- biases ------------------------------------------------------------------------------------------------------


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slopes 2^(-8/n), 2^(-16/n), …; for other than powers of two, filled with every second of the next power.

  Source: Press et al. 2021, ALiBi, arXiv:2108.12409, and its published code.
  """
  power = 2 ** math.floor(math.log2(num_heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
  return np.asarray(slopes, np.float32)


def alibi_bias(slopes_N: Array, position_q_BT: Array, position_k_BS: Array) -> Array:
  """-slope · distance, [B, N, T, S]; the form kernels take as a `Bias`."""
  distance = jnp.abs(position_q_BT[:, :, None] - position_k_BS[:, None, :]).astype(jnp.float32)
  return -slopes_N[None, :, None, None] * distance[:, None]


POSITIONS = {'learned': 'a table added to embeddings', 'sinusoidal': 'sines added to embeddings',
             'rope': 'queries and keys rotated', 'alibi': 'scores fall with distance',
             'none': 'order by visibility alone'}
