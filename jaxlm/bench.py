"""Measures jaxlm: beside a peer where one is named, and by itself; ratios and shares, the median of several rounds.

  python -m jaxlm.bench --suites=train,decode --against=transformers,transformers-compiled [--shapes=gpt2-6x384,...]
  python -m jaxlm.bench --suites=train,decode --against=transformers-compiled   # on a GPU: its own shapes
  python -m jaxlm.bench --suites=compile,data,prepare,loop,memory [--output=lines.jsonl] [--chart=bars.png]

train     tokens a second of training, losses and peak memory, beside the others on the same weights and batches
decode    tokens a second of greedy continuations of 1 and 8 prompts, likewise
long      training steps of 8,192 and 32,768 tokens a row: seconds, memory
attention time and temporaries of blockwise against dense, by length
data      tokens a second from the store to batches on one core, planning a sample, starting anywhere
checkpoint   how long a save of 1 GB blocks, and rates of saving and restoring over dd's
compile   a 96-layer model's compile time over a 4-layer one's
programs  arithmetic, bytes and copies of the compiled training steps; exact
start     seconds to the quickstart's first loss, caches warm
prepare   the rate of preparing text over that of `tokenizers` alone on the same blocks
loop      the share of a training run's time outside its jitted step, saves included
memory    temporaries of the attention kernels by length; bytes of state a device under fsdp=8
cached    tokens a second of the cached decoding loop over a forward pass a token

Prints a table, and writes a JSON object a line with --output, a bar chart with --chart. Times are noisy on a shared
machine, ratios less so: sides take turns, each in a process of its own.
"""
import json
import os
from typing import Any, Callable, Iterator, Sequence

from jaxlm import programs
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup

flags = programs.Flags()
SUITES = flags.DEFINE_list('suites', ['train', 'decode'], 'What to measure.')
AGAINST = flags.DEFINE_list('against', [], 'Peers of train and decode: transformers, transformers-compiled.')
SHAPES = flags.DEFINE_list('shapes', [], 'Models of train and decode; by default those for the device that is there.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Alternating rounds of each pair.', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'Also append a JSON object a line to this file.')
CHART = flags.DEFINE_string('chart', None, 'Also draw the ratios to this PNG; needs matplotlib.')

Line = dict[str, Any]


def _train(rounds: int) -> Iterator[Line]:
  from jaxlm.speed import duel, shapes
  for shape in _shapes(shapes.trained(_platform())):
    yield duel.training(shape, _sides(), rounds)


def _decode(rounds: int) -> Iterator[Line]:
  from jaxlm.speed import duel, shapes
  for shape in _shapes(shapes.decoded(_platform())):
    for rows in (1, 8):
      yield duel.generating(shape, _sides(), rounds, rows)


def _long(rounds: int) -> Iterator[Line]:
  from jaxlm.speed import duel
  return duel.long(rounds)


def _alone(name: str) -> Callable[[int], Iterator[Line]]:
  def run(rounds: int) -> Iterator[Line]:
    from jaxlm.speed import alone
    return getattr(alone, name)(rounds)
  return run


TABLE = {'train': _train, 'decode': _decode, 'long': _long} | {
    name: _alone(function) for name, function in (
        ('attention', 'attention'), ('data', 'data'), ('checkpoint', 'checkpoint'), ('compile', 'compile_time'),
        ('programs', 'compiled_programs'), ('start', 'start'), ('prepare', 'prepare'), ('loop', 'loop'),
        ('memory', 'memory'), ('cached', 'cached'))}


def _sides() -> list[str]:
  from jaxlm.speed import duel
  for name in AGAINST.value:
    if name not in duel.SIDES[1:]:
      raise JaxlmError(f'--against={name}: unknown; name some of {", ".join(duel.SIDES[1:])}.')
  return [duel.SIDES[0], *AGAINST.value]


def _platform() -> str:
  import jax
  return jax.devices()[0].platform


def _shapes(usual: Sequence[str]) -> list[str]:
  from jaxlm.speed.shapes import LARGE, SHAPES as small
  known = [*small, *LARGE]
  for name in SHAPES.value:
    if name not in known:
      raise JaxlmError(f'--shapes={name}: unknown; name some of {", ".join(known)}.')
  return SHAPES.value or list(usual)


def rows(line: Line) -> Iterator[str]:
  """A line as a person reads it: a row a side, or one of all that was found."""
  if 'sides' not in line:
    yield line['measure'] + '   ' + ', '.join(f'{key} {value}' for key, value in line.items() if key != 'measure')
    return
  share = next(key for key in line if key.startswith('share_of_'))
  for i, side in enumerate(line['sides']):
    told = [f'{line["measure"] if not i else "":38s} {side:22s} {line["speed"][i]:>9,.0f} {line["unit"]}',
            f'{100 * line[share][i]:5.1f}% {share.removeprefix("share_").replace("_", " ")}']
    if 'mfu' in line:
      told.append(f'MFU {100 * line["mfu"][i]:.1f}%')
    if 'peak_bytes' in line:
      told.append(f'{line["peak_bytes"][i] / 1e9:5.2f} GB')
    if i:
      told.append(f'jaxlm is {line["ratio"][i - 1]:.2f} times as fast ({line["least"][i - 1]:.2f} to '
                  f'{line["most"][i - 1]:.2f})')
      told.append(f'losses within {line["loss_difference"][i - 1]:.1e}' if 'loss_difference' in line else
                  'the same ids' if line['same'][i - 1] else 'OTHER IDS')
    yield '  '.join(told)


def draw(lines: Sequence[Line], path: str) -> None:
  """A bar a comparison: how many times as fast jaxlm is."""
  from jaxlm import pictures
  bars = [(f'{line["measure"]}\n{side}', line['ratio'][i], (line['least'][i], line['most'][i]))
          for line in lines if 'sides' in line for i, side in enumerate(line['sides'][1:])]
  if not bars:
    raise JaxlmError('--chart draws ratios, and there are none; give --against=transformers.')
  pictures.ratios(bars).figure.savefig(path, dpi=150, bbox_inches='tight')


def main(argv: list[str]) -> None:
  """Prints what the suites find."""
  del argv
  suites = [lookup(TABLE, name, 'suite') for name in SUITES.value]
  if not suites:
    raise JaxlmError(f'--suites is empty; name some of {", ".join(TABLE)}.')
  _sides()
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # sides share a GPU's memory
  from jaxlm.speed import machine
  lines, told = [], machine.described()
  print(json.dumps(told, ensure_ascii=False), flush=True)
  for suite in suites:
    for line in suite(ROUNDS.value):
      lines.append(line)
      for row in rows(line):
        print(row, flush=True)
      if OUTPUT.value:
        with open(OUTPUT.value, 'a', encoding='utf-8') as f:
          f.write(json.dumps(line | told, ensure_ascii=False) + '\n')
  if CHART.value:
    draw(lines, CHART.value)


if __name__ == '__main__':
  programs.run(main)
