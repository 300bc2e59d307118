"""What this machine can do at best: matrix products of a model's own shapes, and memory; and what it is."""
import collections
import importlib.metadata
import os
import platform
import statistics
import time
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import sharding
from jaxlm.speed.shapes import assembled, batches

READ = 1 << 30  # bytes that are read to find the rate: more than caches hold


def described() -> dict[str, Any]:
  """The machine, versions and flags that every line of `bench` carries."""
  versions = {}
  for name in ('jax', 'jaxlib', 'flax', 'torch', 'transformers'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  device = jax.devices()[0]
  flags = {name: os.environ[name] for name in ('XLA_FLAGS', 'GLIBC_TUNABLES', 'OMP_NUM_THREADS') if name in os.environ}
  return dict(python=platform.python_version(), **versions, device=device.device_kind, devices=len(jax.devices()),
              cores=os.cpu_count(), processor=_processor(), flags=flags)


def _processor() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as f:
      return next(line.partition(':')[2].strip() for line in f if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor()


def timed(fn: Callable[[], Any]) -> float:
  """Seconds of one call."""
  start = time.perf_counter()
  fn()
  return time.perf_counter() - start


def _seconds(fn: Callable[..., Any], *arguments: Any, rounds: int = 5) -> float:
  """Of a run: the median of so many rounds after one that compiles.

  An accelerator is given several runs before any is waited for, or the host's part of each would count: on an H200 the
  reading of 1 GB seemed to take twice its time. A CPU would run them side by side.
  """
  queued = 1 if jax.devices()[0].platform == 'cpu' else 8
  run = lambda: jax.block_until_ready([fn(*arguments) for _ in range(queued)])
  run()
  return statistics.median(timed(run) for _ in range(rounds)) / queued


def product_rate(config: Any) -> float:
  """FLOP/s of the products with weights of a model's forward pass, each run alone as a plain matrix product."""
  flops = seconds = 0.0
  for (m, k, n), count in _products(config).items():
    a, b = (jax.random.normal(jax.random.key(0), shape, config.precision.compute) for shape in ((m, k), (k, n)))
    multiply = jax.jit(jnp.matmul, compiler_options=sharding.compiler_options(jax.devices()[0].platform))
    flops += count * 2 * m * k * n
    seconds += count * _seconds(multiply, a, b)
  return flops / seconds


def _products(config: Any) -> collections.Counter[tuple[int, int, int]]:
  """How often a forward pass multiplies [m, k] by [k, n]."""
  parts = assembled(config)
  batch = jax.tree.map(jnp.asarray, next(batches(config, 1)))
  jaxpr = jax.make_jaxpr(lambda params: parts.loss_fn(params, batch, None))(parts.shapes.state.params)
  found = collections.Counter()
  for equation, times in _equations(jaxpr.jaxpr, 1):
    if equation.primitive is jax.lax.dot_general_p:
      (over, _), (of_batch, _) = equation.params['dimension_numbers']
      left, right = (x.aval.shape for x in equation.invars)
      if not of_batch:
        k = int(np.prod([left[dim] for dim in over]))
        found[int(np.prod(left)) // k, k, int(np.prod(right)) // k] += times
  return found


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
  """All equations of a program, those inside others too, and how often each runs."""
  for equation in jaxpr.eqns:
    inside = times * equation.params['length'] if equation.primitive.name == 'scan' else times
    yield equation, times
    for value in equation.params.values():
      for one in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(one, 'jaxpr'):
          one = one.jaxpr
        if hasattr(one, 'eqns'):
          yield from _equations(one, inside)


def read_rate() -> float:
  """Bytes a second that all cores together read from memory."""
  x = jnp.ones(READ // 4, jnp.float32)
  return READ / _seconds(jax.jit(jnp.sum), x)
