"""Mesh and layout: logical axes of arrays become axes of a device mesh, by rules."""
import dataclasses
import math
from typing import Any, Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.types import Array, Tree

# Slowest links outermost: neighbours on the last axis talk most.
MESH_AXES = ('replica', 'pipe', 'data', 'fsdp', 'expert', 'seq', 'tensor')

# What to set when a dimension of this logical axis does not divide.
REMEDY = {
    'vocab': 'set config.model.vocab_pad_to to a multiple of it',
    'act_batch': 'set config.batch_size (and config.accumulation) so that each microbatch divides by it',
    'act_length': 'set config.seq_len to a multiple of it',
    'act_stream': 'set config.seq_len to a multiple of it',
    'act_vocab': 'set config.model.vocab_pad_to to a multiple of it',
    'embed': 'set config.model.width to a multiple of it',
    'mlp': 'set config.model.mlp.width to a multiple of it',
    'act_mlp': 'set config.model.mlp.width to a multiple of it',
    'heads': 'choose fewer devices there, or config.model.attention.num_heads as a multiple of it',
    'act_heads': 'choose fewer devices there, or config.model.attention.num_heads as a multiple of it',
    'kv_heads': "choose fewer devices there, or give ('kv_heads', None) in config.sharding.rules",
}


def mesh_sizes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Fills in the one axis given as -1.

  Raises:
    JaxlmError: more than one -1, or sizes that do not multiply out to the devices there are.
  """
  sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  open_axes = [axis for axis, n in sizes.items() if n == -1]
  fixed = math.prod(n for n in sizes.values() if n != -1)
  told = ' × '.join(f'{axis}={n}' for axis, n in sizes.items() if n != 1) or 'all sizes 1'
  if len(open_axes) > 1:
    raise JaxlmError(f'config.mesh: only one axis may be -1; got {" and ".join(open_axes)}.')
  if open_axes:
    if num_devices % fixed:
      raise JaxlmError(f'config.mesh: {num_devices} devices do not divide by {fixed} ({told}); change a size.')
    sizes[open_axes[0]] = num_devices // fixed
  elif fixed != num_devices:
    raise JaxlmError(f'config.mesh: {told} needs {fixed} devices, there are {num_devices}; '
                     'change a size, or set one to -1 to take what is left.')
  return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """The device mesh; the only place where one is made. Every axis exists, most of size 1.

  Args:
    sizes: devices along each axis; one may be -1.
    devices: all of them if not given.
  """
  devices = jax.devices() if devices is None else devices
  filled = mesh_sizes(sizes, len(devices))
  # Auto: the default, Explicit, breaks linen's logical partitioning.
  types = (AxisType.Auto,) * len(filled)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    return jax.make_mesh(tuple(filled.values()), tuple(filled), types, devices=devices)
  between = _over_slices(filled, slices)
  within = [filled[axis] // n for axis, n in between.items()]
  return Mesh(mesh_utils.create_hybrid_device_mesh(within, list(between.values()), devices), tuple(filled),
              axis_types=types)


def _over_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
  """How many parts of each axis lie in different slices, which a slower network joins: the outermost axes' first.

  Raises:
    JaxlmError: an axis would be cut so that its parts lie unevenly.
  """
  between, left = {}, slices
  for axis, size in sizes.items():
    between[axis] = math.gcd(size, left)
    left //= between[axis]
    if left > 1 and between[axis] < size:
      raise JaxlmError(f'config.mesh: {slices} slices do not divide by {axis}={size} and the axes outside it; set '
                       'config.mesh.replica to the number of slices.')
  return between


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How a batch goes through the stages of a pipeline.

  Attributes:
    microbatches: parts a batch is cut into; 0: as many as there are stages.
    repeats: times each goes round all stages; 1 is GPipe's, more make stages of layers that are not neighbours
      (interleaved, circular), and bubbles shorter.
    remat: what is computed again at once, and kept one input of a microbatch for: a layer, or a whole stage.
  """
  microbatches: int = 0
  repeats: int = 1
  remat: str = 'layer'


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that lay arrays out on it.

  Rules are (logical axis, mesh axis | tuple of them | None), taken in order. The first rule of a logical axis must
  fit: a dimension that does not divide is an error. Further rules of the same axis add mesh axes which the array does
  not use yet, where they divide; so biases, too, can be split over `fsdp`. A mesh axis is used once in an array: the
  earlier rule takes it.
  """
  mesh: Mesh
  rules: tuple[tuple[str, Any], ...]
  schedule: Schedule = Schedule()

  def spec(self, axes: Sequence[str | None], shape: Sequence[int], name: str = 'array') -> PartitionSpec:
    """The partition of an array of `shape` whose dims have the logical `axes` (None: never split).

    Raises:
      JaxlmError: an axis without a rule, a rule that names no mesh axis, a dimension that does not divide.
    """
    known = {logical for logical, _ in self.rules}
    for axis in axes:
      if axis is not None and axis not in known:
        raise JaxlmError(f'{name}: no rule for logical axis {axis!r}; add one to config.sharding.rules.')
    chosen: dict[int, tuple[str, ...]] = {}
    used: set[str] = set()
    for logical, target in self.rules:
      wanted = (target,) if isinstance(target, str) else tuple(target or ())
      for axis in wanted:
        if axis not in self.mesh.shape:
          raise JaxlmError(f'config.sharding.rules: {logical!r} goes to unknown mesh axis {axis!r}. '
                           f'Known: {", ".join(self.mesh.shape)}.')
      for dim, axis_of_dim in enumerate(axes):
        if axis_of_dim != logical:
          continue
        free = tuple(a for a in wanted if a not in used and self.mesh.shape[a] > 1)
        before = chosen.get(dim)
        parts = math.prod(self.mesh.shape[a] for a in (before or ()) + free)
        if shape[dim] % parts:
          if before is not None:
            continue
          sizes = ' × '.join(f'{a}={self.mesh.shape[a]}' for a in free)
          remedy = REMEDY.get(logical, f'change that size, the mesh, or the rule for {logical!r}')
          raise JaxlmError(f'{name}: dim {dim} ({logical}={shape[dim]}) does not divide by mesh axis {sizes}; '
                           f'{remedy}.')
        chosen[dim] = (before or ()) + free
        used.update(free)
    parts = [chosen.get(dim, ()) for dim in range(len(axes))]
    return PartitionSpec(*(p[0] if len(p) == 1 else p or None for p in parts))

  def sharding(self, axes: Sequence[str | None], shape: Sequence[int], name: str = 'array') -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(axes, shape, name))

  def constrain(self, x: Array, *axes: str | None) -> Array:
    """Pins an activation's layout; raises on an axis without a rule, where linen's would do nothing."""
    return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, 'activation'))

  def gathered(self, x: Array, *axes: str | None) -> Array:
    """A weight as layers multiply by it: whole over mesh axes that split rows, where it is spread only to be kept."""
    rows = set(self.axes('act_batch'))
    kept = self.spec(axes, x.shape, 'weight')
    used = PartitionSpec(*(tuple(a for a in axes_of((part,)) if a not in rows) or None for part in kept))
    return x if used == kept else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, used))

  def summed(self, x_P: Array, *axes: str | None) -> Array:
    """A weight's gradient, of what each device with rows of its own makes of it: x_P [batch_parts, ...].

    Over the mesh axes that split the weight it is summed first, so that only a device's own part goes over the others.
    """
    rows, spec = self.axes('act_batch'), self.spec(axes, x_P.shape[1:], 'gradient')
    x = x_P.reshape(*(self.mesh.shape[a] for a in rows), *x_P.shape[1:])
    kept = [a for a in rows if a not in axes_of(spec)]
    x = x.sum([i for i, a in enumerate(rows) if a not in kept])
    x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*kept, *spec)))
    return x.sum(range(len(kept)))

  def by_device(self, local: Callable[..., Any], in_specs: Any, out_specs: Any, in_stage: bool = True
                ) -> Callable[..., Any]:
    """`local` as each device runs it on its part of the arrays.

    Args:
      in_stage: whether it may stand inside a pipeline, whose axis then stays XLA's: stages are a dim that vmap adds.
    """
    staged = in_stage and self.mesh.shape['pipe'] > 1
    manual = {axis for axis in self.mesh.shape if axis != 'pipe' or not staged}
    # The axes that vmap adds are not known inside loops (JAX 0.10, 0.12), so who differs along which cannot be checked.
    checked = not staged or self.mesh.size == self.mesh.shape['pipe']
    return jax.shard_map(local, mesh=self.mesh, axis_names=manual, in_specs=in_specs, out_specs=out_specs,
                         check_vma=checked)

  def axes(self, logical: str) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that split a dim of this logical axis by its first rule."""
    wanted = dict(reversed(self.rules)).get(logical) or ()
    return tuple(a for a in ((wanted,) if isinstance(wanted, str) else wanted) if self.mesh.shape[a] > 1)

  def parts(self, logical: str) -> int:
    """Into how many parts such a dim is split."""
    return math.prod(self.mesh.shape[a] for a in self.axes(logical))

  @property
  def platform(self) -> str:
    """Of the devices: cpu, gpu or tpu."""
    return self.mesh.devices.flat[0].platform

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  def batch(self, shape: Sequence[int]) -> NamedSharding:
    """The layout of a batch array: rows over the batch axes, then length, the rest whole."""
    axes = ('act_batch', 'act_length')[:len(shape)] + (None,) * (len(shape) - 2)
    return self.sharding(axes, shape, 'batch')

  @property
  def batch_parts(self) -> int:
    """Into how many parts rows are split: the smallest batch there can be."""
    return self.parts('act_batch')

  def host_rows(self, shape: Sequence[int]) -> tuple[int, int]:
    """(first, end) of the rows of a batch that this process's devices hold."""
    held = self.batch(shape).addressable_devices_indices_map(tuple(shape)).values()
    slices = [index[0].indices(shape[0]) for index in held]
    return min(start for start, _, _ in slices), max(stop for _, stop, _ in slices)

  def place(self, rows: Mapping[str, np.ndarray], batch_size: int, first: int = 0) -> dict[str, Array]:
    """Global arrays of `batch_size` rows, made of the rows from `first` on that this process has."""
    def one(x: np.ndarray) -> Array:
      shape = (batch_size, *x.shape[1:])
      def part(index):
        start, stop, _ = index[0].indices(batch_size)
        return x[(slice(start - first, stop - first), *index[1:])]
      return jax.make_array_from_callback(shape, self.batch(shape), part)
    return {key: one(x) for key, x in rows.items()}


def layout_of(config: Any, devices: Sequence[Any] | None = None) -> Layout:
  """The layout that a config asks for, over these devices, or all there are."""
  return Layout(make_mesh(config.mesh, devices), tuple(config.sharding.rules), Schedule(**config.pipeline.to_dict()))


def axes_of(spec: PartitionSpec | Sequence[Any]) -> tuple[str, ...]:
  """The mesh axes in a spec, or in a part of one."""
  return tuple(axis for part in spec for axis in ((part,) if isinstance(part, str) else part or ()))


def differ(x: Array, axes: tuple[str, ...]) -> Array:
  """Inside `by_device`: x, which is the same on all devices along these axes, as one that may differ."""
  return jax.lax.pcast(x, axes, to='varying') if axes else x


HOST = 'pinned_host'  # the kind of memory that offloading uses

# XLA options of every compiled program, by platform: what lets collectives run beside arithmetic.
OPTIONS = {
    # On a CPU this fusion library costs a training step a tenth or more; '' turns it off.
    'cpu': {'xla_cpu_experimental_ynn_fusion_type': ''},
    # Small collectives are sent together, up to so many bytes.
    'gpu': {'xla_gpu_enable_latency_hiding_scheduler': True} | {
        f'xla_gpu_{kind}_combine_threshold_bytes': 1 << 27 for kind in ('all_gather', 'all_reduce', 'reduce_scatter')},
    'tpu': {f'xla_tpu_enable_async_collective_fusion{part}': True
            for part in ('', '_fuse_all_gather', '_multiple_steps')} | {'xla_tpu_overlap_compute_collective_tc': True},
}


def microbatches(batch: dict[str, Array], number: int) -> dict[str, Array]:
  """Arrays of rows as so many microbatches, [number, rows / number, ...].

  Strided: contiguous rows of a batch split over devices would be gathered.
  """
  return {key: jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1) for key, x in batch.items()}


def rejoined(micros: dict[str, Array]) -> dict[str, Array]:
  """The inverse of `microbatches`."""
  return {key: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for key, x in micros.items()}


def compiler_options(platform: str, more: Sequence[tuple[str, Any]] = ()) -> dict[str, Any]:
  """XLA options of a compiled program.

  Args:
    platform: of the devices, as JAX calls it.
    more: pairs that come beside, or instead of, the platform's own; None as a value takes one away.
  """
  options = OPTIONS.get({'cuda': 'gpu', 'rocm': 'gpu'}.get(platform, platform), {}) | dict(more)
  return {name: value for name, value in options.items() if value is not None}


def check_host_memory(devices: Sequence[Any], what: str) -> None:
  """Raises JaxlmError where a backend has no memory of the host's to offload to."""
  kinds = [memory.kind for memory in devices[0].addressable_memories()]
  if HOST not in kinds:
    raise JaxlmError(f'{what} needs memory of kind {HOST!r}, and a {devices[0].platform} device has '
                     f'{", ".join(kinds)}; leave it off here.')


FLOAT8_FROM = 8.9  # the compute capability of the first NVIDIA cards (Ada, Hopper) that multiply 8-bit floats


def check_compute(precision: Any, layout: Layout) -> None:
  """Raises JaxlmError where a backend cannot compile a layout's step: XLA ends the process on a CPU that sums bfloat16
  of stages beside other axes; or where a card would only imitate 8 bits. A CPU does, for tests."""
  dtype, pipe, device = precision.compute, layout.mesh.shape['pipe'], layout.mesh.devices.flat[0]
  if precision.products == 'float8' and float(getattr(device, 'compute_capability', FLOAT8_FROM)) < FLOAT8_FROM:
    raise JaxlmError(f"config.precision.products='float8' needs a card of compute capability {FLOAT8_FROM} or more; "
                     f"{device.device_kind} has {device.compute_capability}. Set it to 'compute' here.")
  if dtype == 'bfloat16' and layout.platform == 'cpu' and 1 < pipe < layout.mesh.size:
    raise JaxlmError(f'config.precision.compute={dtype!r} with mesh.pipe={pipe} beside other axes cannot be compiled '
                     "for a CPU; set it to 'float32' here.")


def single(rules: Sequence[tuple[str, Any]]) -> Layout:
  """One device: a mesh of ones."""
  return Layout(make_mesh({}, jax.local_devices()[:1]), tuple(rules))


# ---- parameters and what follows them ----------------------------------------------------------------------------


def logical_axes(boxed: Tree) -> dict[str, tuple[str | None, ...]]:
  """{path: logical axes} of parameters as linen initialises them, boxed."""
  is_box = lambda x: isinstance(x, nn.Partitioned)
  leaves = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_box)[0]
  return {trees.path_of(keys): tuple(leaf.names) if is_box(leaf) else (None,) * leaf.ndim for keys, leaf in leaves}


def param_shardings(shapes: Tree, axes: Mapping[str, tuple[str | None, ...]], layout: Layout) -> Tree:
  """The sharding of each parameter."""
  return trees.map_paths(lambda path, x: layout.sharding(axes[path], x.shape, path), shapes)


def state_shardings(state: Tree, params: Tree, shardings: Tree, layout: Layout) -> Tree:
  """Shardings of anything that holds arrays shaped like parameters: optimizer states, averages, gradients.

  A leaf whose path ends with a parameter's path takes its layout; one with some of its dims (Adafactor's rows and
  columns) takes those dims'; the rest, counters for the most part, is replicated.
  """
  known = {path: (x.shape, s.spec) for (path, x), s in zip(trees.flatten(params).items(), jax.tree.leaves(shardings))}

  def of(path: str, leaf) -> NamedSharding:
    parts = path.split('/')
    for start in range(len(parts)):
      if (found := known.get('/'.join(parts[start:]))) is not None:
        shape, spec = found
        spec = tuple(spec) + (None,) * (len(shape) - len(spec))
        return NamedSharding(layout.mesh, _spec_of_dims(leaf.shape, shape, spec))
    return layout.replicated

  return trees.map_paths(of, state)


def _spec_of_dims(shape, full_shape, full_spec) -> PartitionSpec:
  """The spec of an array that keeps some dims, in order, of one with `full_spec`."""
  parts, at = [], 0
  for size in shape:
    while at < len(full_shape) and full_shape[at] != size:
      at += 1
    if at == len(full_shape):
      return PartitionSpec()
    parts.append(full_spec[at])
    at += 1
  return PartitionSpec(*parts)


def explain(shapes: Tree, axes: Mapping[str, tuple[str | None, ...]], layout: Layout) -> str:
  """A table: parameter, shape, logical axes, spec, bytes a device; totals last."""
  rows, total, held = [('parameter', 'shape', 'logical axes', 'spec', 'bytes a device')], 0, 0
  for path, x in trees.flatten(shapes).items():
    sharding = layout.sharding(axes[path], x.shape, path)
    size = np.dtype(x.dtype).itemsize
    mine = math.prod(sharding.shard_shape(x.shape)) * size
    total, held = total + math.prod(x.shape) * size, held + mine
    spec = ', '.join('+'.join(p) if isinstance(p, tuple) else str(p or '-') for p in sharding.spec)
    rows.append((path, '×'.join(map(str, x.shape)), ' '.join(a or '-' for a in axes[path]), spec, f'{mine:,}'))
  widths = [max(len(row[i]) for row in rows) for i in range(5)]
  lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
  used = ' × '.join(f'{a}={n}' for a, n in layout.mesh.shape.items() if n > 1) or 'one device'
  return '\n'.join(lines + [f'{held:,} of {total:,} bytes on each device ({used})'])
