"""What a program holds at its fullest moment: the buffers of its schedule, from first writing to last reading."""
import collections
import dataclasses
import math
import re

from jaxlm.hlo import ITEM_BYTES, Instruction, Program

# Results that are another name of an operand.
_SAME = ('bitcast', 'get-tuple-element', 'tuple', 'while', 'optimization-barrier', 'domain', 'add-dependency',
         'all-reduce-done', 'all-gather-done', 'collective-permute-done', 'copy-done')
ELEMENTWISE = ('add', 'multiply', 'subtract', 'divide', 'select', 'maximum', 'minimum', 'exponential', 'negate', 'tanh')
_FREE = ('parameter', 'constant', 'iota', 'partition-id', 'replica-id', 'after-all')


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A piece of memory: who wrote it, and what lies there."""
  owner: str
  kind: str
  dims: tuple[int, ...]
  source: str

  @property
  def bytes(self) -> float:
    return ITEM_BYTES.get(self.kind, 1) * math.prod(self.dims)


def fullest(program: Program) -> tuple[float, list[Buffer]]:
  """(bytes, the buffers) at the fullest moment, arguments and results that take their place apart.

  A model of the compiler's own assignment: loops work in the buffers they carry, an update in place needs none, what an
  elementwise operation reads for the last time it overwrites, and donated arguments that lie idle are used.
  """
  away = _hosted(program)
  away |= {b for b in _lives(program, program.entry)[0][program.root(program.entry)] if b is not None}
  return _peak(program, program.entry, away, {})


def _lives(program: Program, computation: str) -> tuple[dict[str, list[Buffer | None]], dict[Buffer, tuple[int, int]]]:
  """(leaves of each result, None for an argument's; instructions by number between which each buffer lives)."""
  held: dict[str, list[Buffer | None]] = {}
  first, last = {}, {}
  instructions = list(program.computations[computation].values())
  for i, x in enumerate(instructions):
    held[x.name] = _leaves(program, computation, x, held)
    for buffer in held[x.name]:
      if buffer is not None:
        first.setdefault(buffer, i)
    for name in (*x.operands, x.name):
      last.update((buffer, i) for buffer in held.get(name, ()) if buffer is not None)
  last.update((buffer, len(instructions)) for buffer in held[program.root(computation)] if buffer is not None)
  return held, {buffer: (i, last[buffer]) for buffer, i in first.items()}


def _loops(program: Program, x: Instruction) -> list[str]:
  return program.called(x) if x.opcode in ('while', 'call', 'conditional') else []


def _peak(program: Program, computation: str, away: set[Buffer], memo: dict[str, tuple[float, list[Buffer]]]
          ) -> tuple[float, list[Buffer]]:
  """`fullest` of one computation, without the buffers that are elsewhere."""
  if computation in memo:
    return memo[computation]
  instructions = list(program.computations[computation].values())
  held, lives = _lives(program, computation)
  ends = collections.defaultdict(list)
  for buffer, (_, end) in lives.items():
    ends[end].append(buffer)
  live: dict[Buffer, None] = {}
  now = best = 0.0
  at_best: list[Buffer] = []
  for i, x in enumerate(instructions):
    fresh = [b for b in held[x.name] if b is not None and b.owner == x.name and b not in live and b not in away]
    for buffer in fresh:
      if x.opcode == 'fusion' and 'kind=kLoop' in x.text or x.opcode in ELEMENTWISE:
        alike = [held[name][0] for name in x.operands if name in held and held[name]
                 and program.computations[computation][name].shapes == x.shapes]
        over = next((b for b in alike if b in live and b in ends[i] and b not in fresh), None)
        if over is not None:
          del live[over]
          now -= over.bytes
      live[buffer] = None
      now += buffer.bytes
    inner, inside = max((_peak(program, called, away, memo) for called in _loops(program, x)),
                        key=lambda found: found[0], default=(0.0, []))
    if now + inner > best:
      best, at_best = now + inner, [*live, *inside]
    for buffer in ends[i]:
      if buffer in live:
        del live[buffer]
        now -= buffer.bytes
  memo[computation] = best, at_best
  return memo[computation]


def _hosted(program: Program) -> set[Buffer]:
  """Buffers, a loop's too, that find place in donated arguments: read for the last time, not yet written again."""
  instructions = list(program.computations[program.entry].values())
  held, lives = _lives(program, program.entry)
  numbers = {int(x.inside): x for x in instructions if x.opcode == 'parameter'}
  read = {name: i for i, x in enumerate(instructions) for name in x.operands}
  results = held[program.root(program.entry)]
  idle: list[tuple[float, int, int, list[tuple]]] = []
  for to, of in program.donated.items():
    start, buffer = read.get(numbers[of].name, -1), results[to] if to < len(results) else None
    if buffer is not None and lives[buffer][0] > start:
      idle.append((numbers[of].bytes, start, lives[buffer][0], []))
  # A moment is (instruction, instruction of the loop's body that it runs).
  moments = {buffer: ((first, -1), (end, math.inf)) for buffer, (first, end) in lives.items()}
  for i, x in enumerate(instructions):
    for called in _loops(program, x):
      moments |= {buffer: ((i, first), (i, end)) for buffer, (first, end) in _lives(program, called)[1].items()}
  found = set()
  for buffer in sorted(moments, key=lambda b: -b.bytes):  # the largest first, as the compiler does
    first, end = moments[buffer]
    for size, start, stop, taken in idle:
      if buffer.bytes <= size and start < first[0] and end[0] < stop and all(end < a or b < first for a, b in taken):
        taken.append((first, end))
        found.add(buffer)
        break
  return found


def _leaves(program: Program, computation: str, x: Instruction,
            held: dict[str, list[Buffer | None]]) -> list[Buffer | None]:
  """The buffers of a result's leaves."""
  fresh = lambda: [Buffer(x.name, kind, dims, x.source) for kind, dims in x.shapes]
  if x.opcode in _FREE:
    return [None] * max(len(x.shapes), 1)
  given = [buffer for name in x.operands for buffer in held.get(name, ())]
  if x.opcode == 'get-tuple-element':
    index = int(re.search(r'index=(\d+)', x.text)[1])
    of = x.operands[0]
    return [held[of][index]] if len(held[of]) == len(program.computations[computation][of].shapes) else given[:1]
  if x.opcode in _SAME:
    return given[:len(x.shapes)] if len(given) >= len(x.shapes) else fresh()
  if x.opcode in ('dynamic-update-slice',):
    return held[x.operands[0]][:1]
  if x.opcode == 'fusion':
    return _of_fusion(program, x, held) or fresh()
  return fresh()


def _of_fusion(program: Program, x: Instruction, held: dict[str, list[Buffer | None]]) -> list[Buffer | None] | None:
  """A fusion that updates one of its operands in place."""
  (called,) = program.called(x)
  inside = program.computations[called]
  root = inside[program.root(called)]
  while root.opcode in ('bitcast', 'copy', 'convert') and root.operands:
    root = inside[root.operands[0]]
  if root.opcode != 'dynamic-update-slice':
    return None
  target = inside[root.operands[0]]
  while target.opcode in ('bitcast',) and target.operands:
    target = inside[target.operands[0]]
  if target.opcode == 'parameter':
    return held.get(x.operands[int(target.inside)], [None])[:1]
  return None
