"""Weights between files and a model: a family's table spelled out and checked, then tensors moved one by one."""
import dataclasses
import functools
import re
from types import MappingProxyType, ModuleType
from typing import Any, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import config as base
from jaxlm import sharding, trees
from jaxlm.errors import JaxlmError
from jaxlm.families import bijections
from jaxlm.models.config import ModelConfig
from jaxlm.models.stack import unstack
from jaxlm.models.transformer import Transformer
from jaxlm.types import Tree
from jaxlm.weights import DTYPES, Tensor, Weights, cast, listed, same

BLOCK = 1 << 26  # bytes that are copied at once on their way to a device
DUMMY = {'tokens': np.zeros((1, 1), np.int32)}  # a batch; a model that is initialised adds what its structure can read


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of theirs and the arrays of ours it holds; or one of each expert, and arrays that hold all experts'.

  Attributes:
    theirs: its name; or those of the experts, in order.
    ours: paths of unstacked parameters.
    shapes: of those.
    bijection: of the tensor, or of an expert's: then without the first dim of ours.
    experts: whether there is one for each expert.
  """
  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  bijection: bijections.Bijection
  experts: bool = False

  @property
  def parts(self) -> tuple[tuple[int, ...], ...]:
    """Shapes of what one tensor of theirs holds."""
    return tuple(shape[1:] for shape in self.shapes) if self.experts else self.shapes


# ---- shapes of a model -------------------------------------------------------------------------------------------


def wanted(model: Transformer) -> Tree:
  """The model's parameters as ShapeDtypeStructs with shardings: what to fill, and where it goes."""
  # Parameters do not depend on the batch, so a row on one device will do, whatever the mesh.
  alone = model.clone(layout=sharding.single(model.layout.rules))
  boxed = jax.eval_shape(lambda: alone.init(jax.random.key(0), DUMMY)['params'])
  shapes = nn.meta.unbox(boxed)
  shardings = sharding.param_shardings(shapes, sharding.logical_axes(boxed), model.layout)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


@functools.lru_cache(8)
def param_shapes(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
  """{path: shape} of the unstacked parameters of a model; nothing is computed."""
  # Scanned, then unstacked: tracing a layer at a time would take seconds where there are 80.
  scanned = Transformer(dataclasses.replace(model, scan=True), sharding.single(base.default().sharding.rules))
  init = lambda: unstack(nn.unbox(scanned.init(jax.random.key(0), DUMMY))['params'], model)
  shapes = {path: tuple(x.shape) for path, x in trees.flatten(jax.eval_shape(init)).items()}
  return MappingProxyType(shapes)


class _Slot:
  """Stands for a leaf, or what indices leave of it, while `unstack` says where layers are kept."""

  def __init__(self, path: str, shape: tuple[int, ...], index: tuple[int, ...] = ()):
    self.path, self.shape, self.index = path, tuple(shape), index

  def __getitem__(self, i: int) -> '_Slot':
    return _Slot(self.path, self.shape[1:], self.index + (int(i),))


def locate(params: Tree, model: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
  """{path of an unstacked parameter: (path in these, index into its leading dims)}; these may be stacked or not."""
  leaves = trees.flatten(params)
  if any(re.match(r'(.*/)?stack/layer_\d+/', path) for path in leaves):
    return {path: (path, ()) for path in leaves}
  slots = unstack(trees.unflatten({path: _Slot(path, x.shape) for path, x in leaves.items()}), model)
  return {path: (slot.path, slot.index) for path, slot in trees.flatten(slots).items()}


# ---- the table of a family, spelled out for a model ---------------------------------------------------------------


def rows(family: ModuleType, model: ModelConfig, prefix: bool = True, templates: Sequence[tuple] = ()) -> list[Row]:
  """The family's table for this very model.

  Args:
    family: from families.table.
    model: whose parameters they are.
    prefix: False leaves PREFIX out of their names, as bodies do.
    templates: others than the family's TEMPLATES.
  Raises:
    JaxlmError: a parameter of the model that the family has no name for.
  """
  shapes, found, covered = param_shapes(model), [], set()
  numbers = [int(n) for path in shapes for n in re.findall(r'(?:^|/)layer_(\d+)/', path)]
  for ours, theirs, bijection, *when in templates or family.TEMPLATES:
    if when and not when[0](model):
      continue
    ours = (ours,) if isinstance(ours, str) else ours
    for layer in range(max(numbers, default=0) + 1) if '{layer}' in theirs else range(1):
      paths = tuple(path.format(layer=layer) for path in ours)
      if not all(path in shapes for path in paths):
        continue
      if twice := covered & set(paths):
        raise ValueError(f'The table of {family.MODEL_TYPE} has two rows for {listed(twice)} of this model.')
      covered.update(paths)
      each = tuple(shapes[path] for path in paths)
      experts = range(each[0][0]) if '{expert}' in theirs else range(1)
      names = tuple(theirs.format(layer=layer, expert=expert) for expert in experts)
      names = names if prefix else tuple(name.removeprefix(family.PREFIX) for name in names)
      found.append(Row(names, paths, each, bijections.parse(bijection), '{expert}' in theirs))
  if nameless := set(shapes) - covered:
    raise JaxlmError(f'Family {family.MODEL_TYPE} has no name for parameters of this model: {listed(nameless)}.')
  return found


def renamed(family: ModuleType, weights: Weights) -> Weights:
  """The same weights under the names that the family's table uses, where files have older ones."""
  entries: dict[str, Any] = {}
  for old, entry in weights.entries.items():
    name = old
    for pattern, replacement in getattr(family, 'RENAMED', ()):
      name = re.sub(pattern, replacement, name)
    if name in entries:
      raise JaxlmError(f'Tensor {name} stands in the weights under two names, {old} among them.')
    entries[name] = entry
  return Weights(entries)


def match(family: ModuleType, model: ModelConfig, weights: Weights, table: Sequence[Row],
          prefix: bool = True) -> Weights:
  """Exactly the tensors that the rows name.

  Args:
    weights: every tensor once, but for what the family lists: twins (TIED), which must be equal, and what is not read
      (BUFFERS, UNUSED).
    table: from `rows`.
    prefix: as given there.
  Raises:
    JaxlmError: missing, unexpected or misshapen tensors, or a dtype that is no float of 16 or 32 bits.
  """
  names = {name for row in table for name in row.theirs}
  bare = lambda name: name if prefix else name.removeprefix(family.PREFIX)
  entries, left = {}, dict(weights.entries)
  twins = [(bare(twin), bare(name)) for twin, name in family.TIED.items()]
  for twin, name in twins:  # a file may hold a tied tensor under any of its names
    if name in names and name not in left and twin in left and twin not in names:
      left[name] = left.pop(twin)
  if missing := names - set(left):
    raise JaxlmError(f'The weights lack {listed(missing)}, which config.json calls for.')
  entries = {name: left.pop(name) for name in names}
  shapes = {name: row.bijection.their_shape(row.parts, model.vocab_size) for row in table for name in row.theirs}
  twins = [(twin, name) for twin, name in twins if twin in left and name in entries]
  shapes |= {twin: shapes[name] for twin, name in twins}
  unused = {bare(name): shape for name, shape in unused_shapes(family, model).items()}
  found = entries | left
  for name, shape in (unused | shapes).items():
    if name in found and found[name].shape != shape:
      raise JaxlmError(f'Tensor {name} has shape {found[name].shape}; config.json calls for {shape}.')
    if name in found and found[name].dtype not in DTYPES:
      raise JaxlmError(f'Tensor {name} is {found[name].dtype}; {", ".join(DTYPES)} are read.')
  for twin, name in twins:
    if not same(left.pop(twin).read(), entries[name].read()):
      raise JaxlmError(f'config.json ties embeddings, but {twin} and {name} differ; set tie_word_embeddings to '
                       'false there if the model has an output layer of its own.')
  if extra := {name for name in left if name not in unused and not re.fullmatch(family.BUFFERS, name)}:
    raise JaxlmError(f'The weights hold {listed(extra)}, which config.json does not call for.')
  return Weights(entries)


def unused_shapes(family: ModuleType, model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """{name: shape} of tensors that their files hold and no output depends on."""
  found = {name: shape(model) for name, shape in getattr(family, 'UNUSED', {}).items()}
  return {name: shape for name, shape in found.items() if shape is not None}


# ---- in ----------------------------------------------------------------------------------------------------------


def pieces(table: Sequence[Row], weights: Weights, model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...],
                                                                                        np.ndarray]]:
  """Yields (path of an unstacked parameter, index into its leading dims, that part of it): an array, or an expert's.

  Arrays may be views of files. Rows beyond the vocabulary are left out.
  """
  for row in table:
    for expert, name in enumerate(row.theirs):
      index = (expert,) if row.experts else ()
      arrays = row.bijection.forward(weights[name], row.parts, model.vocab_size, pad=False)
      for path, array in zip(row.ours, arrays, strict=True):
        yield path, index, array


def read(table: Sequence[Row], weights: Weights, model: ModelConfig) -> Tree:
  """All parameters, unstacked, as NumPy arrays in the files' dtypes."""
  want = {path: (shape, _dtype(row, weights)) for row in table for path, shape in zip(row.ours, row.shapes)}
  leaves: dict[str, np.ndarray] = {}
  for path, index, array in pieces(table, weights, model):
    if path not in leaves:
      leaves[path] = np.zeros(*want[path])
    leaves[path][index + tuple(map(slice, array.shape))] = array
  return trees.unflatten(leaves)


def _dtype(row: Row, weights: Weights) -> np.dtype:
  """One that holds all values of a row, whose experts may differ."""
  found = {DTYPES[weights.entries[name].dtype] for name in row.theirs}
  return found.pop() if len(found) == 1 else np.dtype(np.float32)


class Lazy:
  """A parameter that is read from its file whenever NumPy asks for it, whole or an expert of it."""

  def __init__(self, row: Row, part: int, weights: Weights, model: ModelConfig):
    self._row, self._part, self._weights, self._vocab_size = row, part, weights, model.vocab_size
    self.shape, self.dtype = row.shapes[part], _dtype(row, weights)

  def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
    if not self._row.experts:
      return np.asarray(self)[index]
    return self._one(index[0])[index[1:]]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    if self._row.experts:
      whole = np.stack([self._one(i).astype(self.dtype, copy=False) for i in range(self.shape[0])])
    else:
      whole = self._one(0)
    return whole if dtype is None else whole.astype(dtype)

  def _one(self, expert: int) -> np.ndarray:
    row = self._row
    return row.bijection.forward(self._weights[row.theirs[expert]], row.parts, self._vocab_size)[self._part]


def lazy(table: Sequence[Row], weights: Weights, model: ModelConfig) -> Tree:
  """All parameters, unstacked, none of them read yet: what `outgoing` takes one by one."""
  return trees.unflatten({path: Lazy(row, part, weights, model) for row in table
                          for part, path in enumerate(row.ours)})


def place(table: Sequence[Row], weights: Weights, model: ModelConfig, target: Tree) -> Tree:
  """All parameters where they belong, read tensor by tensor.

  The host holds one tensor of a file, and a block of it that is on its way, besides what its own devices hold: layers
  of a stack and experts are written into the whole array on the devices.

  Args:
    table: from `rows`, for the same model.
    weights: from `match`.
    model: says which layer stands where in a stack.
    target: ShapeDtypeStructs with shardings, stacked or not, of any dtype; from `wanted`.
  """
  places, want = locate(target, model), trees.flatten(target)
  leaves: dict[str, jax.Array] = {}
  for path, index, array in pieces(table, weights, model):
    path, start = places[path]
    leaves[path] = _put(leaves.get(path), want[path], start + index, array)
  return jax.tree.map(lambda _, x: x, target, trees.unflatten(leaves))


def _put(leaf: jax.Array | None, want: Any, index: tuple[int, ...], array: np.ndarray) -> jax.Array:
  """The leaf with an array at an index of its leading dims; the array may lack the rows beyond the vocabulary."""
  many = max(1, BLOCK * len(array) // max(1, array.nbytes)) if array.ndim else 1
  parts = [(index, array)]
  if array.ndim and many < len(array):
    parts = [(index + (start,), array[start:start + many]) for start in range(0, len(array), many)]
  if len(parts) == 1 and array.shape == tuple(want.shape):
    return _block(array, want.dtype, want.sharding)
  if leaf is None:
    leaf = _zeros(tuple(want.shape), want.dtype, want.sharding)
  for start, part in parts:
    where = _within(want.sharding, want.shape[len(index):], len(index), part.shape)
    leaf = _update(leaf, _block(part, want.dtype, where), start)
    leaf.block_until_ready()  # or blocks would pile up on the host
  return leaf


def _block(array: np.ndarray, dtype: Any, where: Any) -> jax.Array:
  """A copy of the array, each device getting its part. A copy: the array may be a view of a file."""
  part = lambda index: np.array(array[index], dtype, order='C')
  if where is None:
    return jnp.asarray(part(...))
  return jax.make_array_from_callback(array.shape, where, part)


def _within(where: Any, whole: Sequence[int], indexed: int, part: Sequence[int]) -> Any:
  """The sharding of part of what remains of an array after so many indexed dims; cut dims are not divided."""
  if not isinstance(where, NamedSharding):
    return where
  spec = tuple(where.spec)[indexed:]
  spec += (None,) * (len(part) - len(spec))
  return NamedSharding(where.mesh, PartitionSpec(*(s if n == m else None for s, n, m in zip(spec, part, whole))))


def _zeros(shape: tuple[int, ...], dtype: Any, where: Any) -> jax.Array:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()


def _update(leaf: jax.Array, block: jax.Array, index: Sequence[int]) -> jax.Array:
  """The leaf, given away, with the block at an index; one program serves all layers."""
  return _updater(leaf.sharding)(leaf, block, np.asarray(index, np.int32))


@functools.cache
def _updater(where: Any):
  def update(leaf, block, index):
    starts = [index[i] if i < len(index) else 0 for i in range(leaf.ndim)]
    block = block.reshape((1,) * (leaf.ndim - block.ndim) + block.shape)
    return jax.lax.dynamic_update_slice(leaf, block, starts)
  return jax.jit(update, donate_argnums=0, out_shardings=where)


# ---- out ---------------------------------------------------------------------------------------------------------


def outgoing(table: Sequence[Row], params: Tree, model: ModelConfig, dtype: np.dtype | None = None) -> list[Tensor]:
  """Their tensors, each made of our parameters when it is written.

  Args:
    table: from `rows`.
    params: stacked or not, NumPy or jax arrays.
    dtype: None keeps each array's.
  """
  places, leaves = locate(params, model), trees.flatten(params)

  def tensor(row: Row, expert: int, name: str) -> Tensor:
    found = [places[path] for path in row.ours]
    index = (expert,) if row.experts else ()
    kept = dtype or np.dtype(leaves[found[0][0]].dtype)
    def make() -> np.ndarray:
      arrays = [np.asarray(leaves[path][at + index] if at + index else leaves[path]) for path, at in found]
      return cast(row.bijection.inverse(arrays, model.vocab_size), kept, name)
    return Tensor(name, row.bijection.their_shape(row.parts, model.vocab_size), kept, make)
  return [tensor(row, expert, name) for row in table for expert, name in enumerate(row.theirs)]
