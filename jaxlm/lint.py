"""Whether a compiled step is laid out as its rules say: what is gathered, what is whole, which messages are sent."""
import math
from typing import Any, Iterator

import jax
import numpy as np

from jaxlm import sharding, trees
from jaxlm.hlo import Instruction, Message, Program
from jaxlm.models import stages
from jaxlm.models.moe import SCOPE
from jaxlm.task_losses import MEETING, without_reference
from jaxlm.train import Parts

SMALL = 1 / 64  # of a device's part of the residual stream: messages up to so many bytes are nobody's concern


def faults(program: Program, parts: Parts, config: Any) -> list[str]:
  """What in a step does not go by its layout; one line each, nothing where all does.

  Three things are looked for: a weight that is gathered beyond its own layer, an activation of which a device holds
  more than the rules give it, and a collective along an axis on which the layout has none of that kind.

  Args:
    program: of the step.
    parts: it was compiled of.
    config: it was compiled with; the batch is that of all devices.
  """
  messages = program.messages()
  if config.optim.name == 'muon':  # it multiplies whole matrices by themselves, however they are spread
    messages = [message for message in messages if 'Transformer' in message.source]
  found = [*_gathers(messages, parts), *_activations(program, parts, config), *_messages(messages, parts, config)]
  return list(dict.fromkeys(found))


# ---- weights -------------------------------------------------------------------------------------------------------


def _weights(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
  """All parameters by path, frozen ones too."""
  return trees.flatten(trees.combine(without_reference(parts.shapes.frozen), parts.shapes.state.params))


def _storage(parts: Parts) -> set[str]:
  """Mesh axes that split rows, and weights too, to keep them."""
  rows = set(parts.shapes.layout.axes('act_batch'))
  specs = [x.sharding.spec for x in _weights(parts).values()]
  return {axis for spec in specs for axis in sharding.axes_of(spec)} & rows


def _gathers(messages: list[Message], parts: Parts) -> Iterator[str]:
  storage, shapes = _storage(parts), parts.shapes
  stages_, rounds, _ = stages.sizes(shapes.layout)
  largest, of = 0, ''
  for path, x in _weights(parts).items():
    kept = math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    size = kept * math.prod(shapes.layout.mesh.shape[a] for a in sharding.axes_of(x.sharding.spec) if a in storage)
    if shapes.layers(path):
      held = x.sharding.shard_shape(x.shape)[0]
      size //= held if stages_ == 1 else rounds  # a pipeline gathers what a stage has of a round once a step
    if size > largest:
      largest, of = size, path
  for message in messages:
    if SCOPE not in message.source and (  # where a token's experts are is known to nobody before: all are sent
        message.kind == 'all-gather' and set(message.axes) <= storage and message.bytes > 1.01 * largest):
      yield f'{_told(message)}: more than the whole of the largest weight of a layer, {of}, {largest:,.0f} bytes.'


# ---- activations ---------------------------------------------------------------------------------------------------


def _activations(program: Program, parts: Parts, config: Any) -> Iterator[str]:
  layout, model = parts.shapes.layout, parts.model.config
  _, _, M = stages.sizes(layout)
  heads = model.attention
  wholes = {config.batch_size // config.accumulation // m for m in (1, M)} | {config.batch_size}
  wholes -= {heads.num_heads, heads.num_kv_heads}  # scores are [rows, heads, queries, keys]
  local = {rows // layout.batch_parts for rows in wholes}
  cuts = 1, layout.parts('act_length'), layout.parts('act_stream')
  lengths = {n // parts_of for n in parts.lengths.values() for parts_of in cuts}
  sizes = {'act_mlp': model.mlp.width, 'act_vocab': model.padded_vocab, 'act_heads': model.attention.num_heads}
  common = {model.width, model.embedding.width, heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim,
            heads.head_dim, *lengths, *local, *wholes}
  common |= {n // layout.parts(axis) for axis, n in sizes.items()}
  split = {axis: n for axis, n in sizes.items() if layout.parts(axis) > 1 and n not in common
           and list(sizes.values()).count(n) == 1}
  for x in _arrays(program):
    dims = x.shapes[0][1]
    at = next((i for i, n in enumerate(dims[:-2]) if n in wholes | local and dims[i + 1] in lengths), None)
    # All rows of a share of the columns are no more than all columns of a share of the rows.
    if at is not None and dims[at] in wholes - local and x.elements * layout.batch_parts > math.prod(
        dims[:at + 2]) * max(model.width, model.embedding.width):
      yield (f'{_place(x)}: {_dims(dims)} holds all {dims[at]} rows, which go to {layout.batch_parts} devices '
             '(act_batch).')
    rows = next((i for i, n in enumerate(dims[:-2]) if n in local and any(m in lengths for m in dims[i + 1:])), None)
    for axis, n in split.items() if rows is not None else ():
      if n in dims[rows + 1:]:
        yield f'{_place(x)}: {_dims(dims)} has all {n} of {axis}, which {layout.parts(axis)} devices share.'


# Opcodes that write nothing, and one whose dims are windows: what XLA makes of a sum on its way.
PASSED = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'reduce-window')


def _arrays(program: Program) -> Iterator[Instruction]:
  """Arrays of floats that exist in memory."""
  for computation, x, _, _ in program.walk():
    if SCOPE in x.source or computation in program.fused or x.opcode in PASSED or len(x.shapes) != 1:
      continue
    dtype, dims = x.shapes[0]
    if dtype in ('f32', 'bf16', 'f16') and len(dims) > 2:
      yield x


# ---- messages ------------------------------------------------------------------------------------------------------


def _messages(messages: list[Message], parts: Parts, config: Any) -> Iterator[str]:
  layout = parts.shapes.layout
  storage, along = _storage(parts), {*layout.axes('act_length'), *layout.axes('act_stream')}
  rows = set(layout.axes('act_batch'))
  inside = {axis for logical in ('act_heads', 'act_mlp', 'act_vocab') for axis in layout.axes(logical)}
  expected = {
      'all-gather': storage | along,
      'reduce-scatter': rows | along | inside,
      'all-reduce': rows | along | inside | {stages.AXIS},
      # An embedding's columns lie with others than the rows that look them up.
      'all-to-all': storage | along | {'expert'},
      'collective-permute': along | {stages.AXIS},
  }
  rows_here = config.batch_size // config.accumulation // layout.batch_parts
  small = SMALL * rows_here * max(parts.lengths.values()) * parts.model.config.width * 4
  weight = max(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in _weights(parts).values())
  for message in messages:
    if message.bytes <= small or set(message.axes) <= expected[message.kind]:
      continue
    if MEETING in message.source and set(message.axes) <= rows:
      continue
    # Where devices are idle that share no weight, XLA lets them multiply a part of its gradient, and moves that;
    # outside of the stages, those along them are idle.
    idle = storage | inside if '_staged' in message.source else storage | inside | {stages.AXIS}
    moved = message.kind == 'collective-permute' or stages.AXIS in message.axes
    if not moved or message.bytes > weight or not set(message.axes) <= idle:
      yield f'{_told(message)}: no {message.kind} is expected there.'


def _told(message: Message) -> str:
  return f'{message.source or "?"}: {message.kind} over {" × ".join(message.axes)} of {message.bytes:,.0f} bytes'


def _place(x: Instruction) -> str:
  return x.source or x.name


def _dims(dims: tuple[int, ...]) -> str:
  return '×'.join(map(str, dims))
