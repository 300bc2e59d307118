"""A compiled program, read: its products and messages, counted as often as loops run them."""
import collections
import dataclasses
import functools
import itertools
import math
import re
from typing import Iterator, Mapping, Sequence

import numpy as np

ITEM_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4,
              'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16, 'token': 0}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

# Opcodes whose result is their operand, put differently.
_SAME = frozenset(('bitcast', 'copy', 'reshape', 'transpose', 'convert'))

# Opcodes whose result is written down, where they are not part of a fusion.
_WRITING = frozenset(('fusion', 'reduce', 'copy', 'transpose', 'dot', 'concatenate', 'dynamic-update-slice'))

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?) ([\w\-]+)\((.*)$')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One operation of a program.

  Attributes:
    shapes: (type, dims) of its result; several of a tuple.
    operands: names.
    inside: what stands in the parentheses: the operands, or a parameter's number.
    text: what follows: attributes and metadata.
  """
  name: str
  opcode: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  operands: tuple[str, ...]
  inside: str
  text: str

  @property
  def bytes(self) -> float:
    return sum(ITEM_BYTES.get(kind, 1) * math.prod(dims) for kind, dims in self.shapes)

  @property
  def elements(self) -> int:
    return math.prod(self.shapes[0][1])

  @property
  def source(self) -> str:
    """Where in the model it comes from: jit(step)/…/stack/…"""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ''

  def numbers(self, attribute: str) -> tuple[int, ...]:
    """What stands in braces after an attribute: lhs_contracting_dims={1,2}."""
    found = re.search(rf'{attribute}=\{{([\d,]*)\}}', self.text)
    return tuple(map(int, filter(None, found[1].split(',')))) if found else ()


@dataclasses.dataclass(frozen=True)
class Dot:
  """A matrix product of one device.

  Attributes:
    flops: of one run, a multiply-add counted as two.
    times: how often the program runs it.
    counted: False inside a loop whose number of rounds depends on data: `times` then counts one round.
  """
  flops: float
  times: int
  counted: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Message:
  """A collective of one device.

  Attributes:
    kind: one of COLLECTIVES; an all-reduce of which each device then takes a part is a reduce-scatter, which the CPU's
      compiler never emits itself.
    bytes: of the whole: what is gathered, reduced, exchanged or passed on. All-reduces whose results are only added up
      count once: other compilers add before they reduce.
    axes: mesh axes along which it goes.
    size: devices in a group.
    times: how often.
    emitted: the kind as it stands in the program.
    emitted_bytes: of the whole, as they stand there.
  """
  kind: str
  bytes: float
  axes: tuple[str, ...]
  size: int
  times: int
  emitted: str
  emitted_bytes: float
  source: str

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, by the ring algorithm."""
    share = (self.size - 1) / self.size
    return self.bytes * {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)


class Program:
  """A compiled program's text, `compiled.as_text()`.

  Args:
    text: after partitioning: what one device runs.
    mesh: {axis: size} in the order in which devices are numbered.
  """

  def __init__(self, text: str, mesh: Mapping[str, int]):
    self.mesh = dict(mesh)
    self.computations: dict[str, dict[str, Instruction]] = {}
    self._root: dict[str, str] = {}
    self.entry = ''
    # Which result takes which argument's memory, {number of the result: of the argument}.
    self.donated: dict[int, int] = {}
    here: dict[str, Instruction] = {}
    current = ''
    for line in text.splitlines():
      if found := _INSTRUCTION.match(line):
        root, name, shape, opcode, rest = found.groups()
        inside, outside = _split(rest)
        shapes = tuple((kind, tuple(map(int, filter(None, dims.split(','))))) for kind, dims in _SHAPE.findall(shape))
        here[name] = Instruction(name, opcode, shapes, tuple(re.findall(r'%([\w.\-]+)', inside)), inside, outside)
        if root:
          self._root[current] = name
      elif line.startswith('HloModule'):
        self.donated = {int(to): int(of) for to, of in re.findall(r'\{(\d+)\}: \((\d+), \{\}', line)}
      elif found := _COMPUTATION.match(line):
        current = found[2]
        here = self.computations[current] = {}
        self.entry = current if found[1] else self.entry

  def walk(self) -> Iterator[tuple[str, Instruction, int, bool]]:
    """(computation, instruction, how often it runs, whether all loops around it tell how often)."""
    def visit(name: str, times: int, counted: bool):
      for instruction in self.computations[name].values():
        yield name, instruction, times, counted
        if instruction.opcode == 'while':
          rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
          n = int(rounds[1]) if rounds else 1
          for called in self.called(instruction):
            yield from visit(called, times * n, counted and rounds is not None)
        elif instruction.opcode in ('call', 'fusion', 'conditional', 'async-start'):
          for called in self.called(instruction):
            yield from visit(called, times, counted)
    yield from visit(self.entry, 1, True)

  def root(self, computation: str) -> str:
    """The name of what a computation returns."""
    return self._root[computation]

  def called(self, instruction: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    found = re.findall(r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)',
                       instruction.text)
    branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.text)
    return [name for name in found + (re.findall(r'[\w.\-]+', branches[1]) if branches else [])
            if name in self.computations]

  @functools.cached_property
  def fused(self) -> set[str]:
    """Computations inside fusions, whose values never exist in memory."""
    return {name for instructions in self.computations.values() for x in instructions.values()
            if x.opcode == 'fusion' for name in self.called(x)}

  def written(self) -> float:
    """Bytes of all results that are memory's: of an update in place, those that are new."""
    total = 0.0
    for computation, x, times, _ in self.walk():
      if computation not in self.fused and x.opcode in _WRITING:
        total += times * self._new(computation, x)
    return total

  def _new(self, computation: str, x: Instruction) -> float:
    """Bytes that an instruction writes."""
    if x.opcode == 'fusion':
      inside = self.called(x)[0]
      root = self.computations[inside][self._root[inside]]
      while root.opcode in _SAME and root.operands:
        root = self.computations[inside][root.operands[0]]
      return self._new(inside, root) if root.opcode == 'dynamic-update-slice' else x.bytes
    if x.opcode == 'dynamic-update-slice':
      return self.computations[computation][x.operands[1]].bytes
    return x.bytes

  def dots(self) -> list[Dot]:
    """Every matrix product."""
    found = []
    for computation, x, times, counted in self.walk():
      if x.opcode == 'dot':
        _, left = self.computations[computation][x.operands[0]].shapes[0]
        inner = math.prod(left[dim] for dim in x.numbers('lhs_contracting_dims'))
        found.append(Dot(2.0 * math.prod(x.shapes[0][1]) * inner, times, counted, x.source))
    return found

  def messages(self) -> list[Message]:
    """Every collective between devices."""
    found, added = [], set()
    for computation, x, times, _ in self.walk():
      emitted = x.opcode.removesuffix('-start')
      if emitted not in COLLECTIVES:
        continue
      size, axes = self._group(x)
      if size == 1:
        continue
      here = self.computations[computation]
      operands = [here[name].bytes for name in x.operands if name in here]
      if emitted != 'all-reduce':
        whole = sum(operands) * (size if emitted == 'all-gather' else 1)
        found.append(Message(emitted, whole, axes, size, times, emitted, whole, x.source))
        continue
      counted, standing = collections.Counter(), collections.Counter()
      for i, (size_of_one, result) in enumerate(zip(operands, self._results(computation, x))):
        kind = 'reduce-scatter' if self._is_sliced(computation, result, size) else 'all-reduce'
        sums = self._sums(computation, result)
        standing[kind] += size_of_one
        if not sums or (computation, axes, sums) not in added:
          counted[kind] += size_of_one
        added.add((computation, axes, sums))
      found += [Message(kind, counted[kind], axes, size, times, emitted, standing[kind], x.source) for kind in standing]
    return found

  # ---- groups of devices -------------------------------------------------------------------------------------------

  def _group(self, x: Instruction) -> tuple[int, tuple[str, ...]]:
    """(devices in a group, mesh axes along which they differ)."""
    if x.opcode.startswith('collective-permute'):
      pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', x.text)
      ends = [tuple(map(int, pair.split(','))) for pair in re.findall(r'\{?(\d+,\d+)', pairs[1])] if pairs else []
      return (2, self._axes_between(ends)) if ends else (1, ())
    return self._group_of(re.search(r'replica_groups=(mesh.*?\}|.*?)(?:, [a-z_]+=|$)', x.text)[1])

  @functools.lru_cache(maxsize=None)
  def _group_of(self, text: str) -> tuple[int, tuple[str, ...]]:
    first = _first_group(text, math.prod(self.mesh.values()))
    return len(first), self._axes_between([(first[0], other) for other in first[1:]])

  def _axes_between(self, pairs: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    sizes = tuple(self.mesh.values())
    a, b = (np.array(np.unravel_index(np.array(side, int), sizes)) for side in zip(*pairs)) if pairs else ([], [])
    return tuple(axis for i, axis in enumerate(self.mesh) if len(a) and (a[i] != b[i]).any())

  # ---- what happens to a result ------------------------------------------------------------------------------------

  @functools.cached_property
  def _users(self) -> dict[str, dict[str, list[Instruction]]]:
    users: dict[str, dict[str, list[Instruction]]] = {}
    for name, instructions in self.computations.items():
      of = users[name] = {}
      for x in instructions.values():
        for operand in x.operands:
          of.setdefault(operand, []).append(x)
    return users

  def _results(self, computation: str, x: Instruction) -> list[list[Instruction]]:
    """What stands for each element of a result: the instruction itself, or those that take it out of a tuple."""
    if len(x.shapes) == 1:
      return [[x]]
    taken = self._users[computation].get(x.name, [])
    return [[user for user in taken if re.search(rf'index={i}\b', user.text)] for i in range(len(x.shapes))]

  def _uses(self, computation: str, x: Instruction, through: frozenset[str]) -> list[tuple[str, Instruction] | None]:
    """(computation, user) of a value, after opcodes that it goes `through`; None: it leaves the computation."""
    found: list[tuple[str, Instruction] | None] = [None] if self._root.get(computation) == x.name else []
    for user in self._users[computation].get(x.name, []):
      if user.opcode in through:
        found += self._uses(computation, user, through)
      elif user.opcode == 'fusion':
        (called,) = self.called(user)
        inside = {int(y.inside): y for y in self.computations[called].values() if y.opcode == 'parameter'}
        uses = [use for i, name in enumerate(user.operands) if name == x.name
                for use in self._uses(called, inside[i], through)]
        found += [use for use in uses if use] + (self._uses(computation, user, through) if None in uses else [])
      else:
        found.append((computation, user))
    return found

  def _is_sliced(self, computation: str, results: list[Instruction], size: int) -> bool:
    """Whether every device goes on with its own part of a result alone."""
    uses = [use for x in results for use in self._uses(computation, x, _SAME)]
    return bool(uses) and all(use and use[1].opcode == 'dynamic-slice'
                              and use[1].elements * size <= 1.01 * results[0].elements for use in uses)

  def _sums(self, computation: str, results: list[Instruction]) -> frozenset[str]:
    """Where a result is but a summand: the last of the additions that follow each other; nothing where it is more."""
    roots = set()
    for use in (use for x in results for use in self._uses(computation, x, _SAME | {'dynamic-slice'})):
      if use is None or use[1].opcode != 'add':
        return frozenset()
      here, add = use
      while len(users := self._users[here].get(add.name, [])) == 1 and users[0].opcode == 'add':
        add = users[0]
      roots.add(f'{here}/{add.name}')
    return frozenset(roots)


def _split(rest: str) -> tuple[str, str]:
  """('operands', 'attributes') of what follows an opcode's opening parenthesis."""
  depth = 1
  for i, c in enumerate(rest):
    depth += (c == '(') - (c == ')')
    if depth == 0:
      return rest[:i], rest[i + 1:]
  return rest, ''


def _first_group(text: str, devices: int) -> list[int]:
  """The first of the groups that `replica_groups` tells in one of its three forms; all devices where it tells none."""
  # mesh['a'=4,'b'=2] {'a'}; of parts of an axis, {'a':(2)2}; of devices in another order, device_ids=([2,4]T(1,0)).
  if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{(.*)\}", text):
    sizes = {name: int(n) for name, n in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
    ids = np.arange(math.prod(sizes.values()))
    if order := re.match(r'\[([\d,]+)\](?:T\(([\d,]+))?', found[2] or ''):
      ids = ids.reshape(tuple(map(int, order[1].split(','))))
      ids = ids.transpose(tuple(map(int, order[2].split(',')))) if order[2] else ids
    ids = ids.reshape(tuple(sizes.values()))
    names, index = list(sizes), [slice(0, 1)] * len(sizes)
    for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", found[3]):
      if not size:
        index[names.index(name)] = slice(None)
      else:  # the middle of (before, size, rest)
        rest = sizes[name] // (int(before) * int(size))
        index[names.index(name)] = slice(0, int(size) * rest, rest)
    return ids[tuple(index)].ravel().tolist()
  if found := re.match(r'\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    groups, size = int(found[1]), int(found[2])
    sizes = tuple(map(int, found[3].split(',')))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if found[4]:
      ids = ids.transpose(tuple(map(int, found[4].split(','))))
    return ids.reshape(groups, size)[0].tolist()
  if found := re.match(r'\{\{([\d,]+)\}', text):
    return list(map(int, found[1].split(',')))
  return list(itertools.chain(range(devices)))
