"""Measures a model at tasks, with how sure each number is.

  python -m jaxlm.evaluate --model=runs/quickstart --tasks=stdlib,docstring --shots=2 --output=result.json
  python -m jaxlm.evaluate --model=runs/tuned --tasks=module --against=base.json     # paired with what base.json holds

A task is one of data/tasks.py, the path of a JSON file that describes one, or "module:attribute". Prints a table; --output
gets every prompt as it was given and every answer. Stopped, it goes on where it was, by what lies in FILE.said beside.
"""
import json
import os

from absl import flags

from jaxlm import programs
from jaxlm.errors import JaxlmError

_MODEL = flags.DEFINE_string('model', None, 'A run directory, a Hugging Face folder, or a GGUF file.')
_TASKS = flags.DEFINE_list('tasks', [], 'Tasks, joined by commas.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for numbers, prompts and answers.')
_SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'Whose examples are asked.')
_SHOTS = flags.DEFINE_integer('shots', 0, 'Examples with answers before each question, drawn from the training split.',
                              lower_bound=0)
_SEED = flags.DEFINE_integer('seed', 0, 'Of that draw, and of the intervals.')
_LIMIT = flags.DEFINE_integer('limit', 0, 'Examples of each task, drawn by the seed; 0: all.', lower_bound=0)
_NORM = flags.DEFINE_enum('norm', 'token', ['sum', 'token', 'byte', 'unconditional'],
                          'How scores of answers to choose from are compared.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Rows computed at once; changes no number.', lower_bound=1)
_AGAINST = flags.DEFINE_string('against', None, 'The --output of another model at the same tasks: differences are '
                               'tested in pairs.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of parameters and computing; default: the run\'s.')


def table(results: dict) -> str:
  """A line a number: task, measure, value, interval, examples; where there is another model, the difference and p."""
  lines = [('task', 'measure', 'value', '95% interval', 'examples', 'difference', 'p')]
  for name, found in results.items():
    for measure, value in found['metrics'].items():
      low, high = found['intervals'][measure]
      pair = found.get('paired', {}).get(measure)
      lines.append((name, measure, f'{value:.4f}', f'{low:.4f} to {high:.4f}', str(found['examples']),
                    f'{pair["difference"]:+.4f}' if pair else '', f'{pair["p_randomization"]:.4f}' if pair else ''))
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _other(path: str) -> dict:
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)['tasks']
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise JaxlmError(f'--against={path} is no --output of this program ({type(e).__name__}); make it first.') from e


def main(argv: list[str]) -> None:
  """Measures what the flags ask for."""
  del argv
  if not _MODEL.value:
    raise JaxlmError('--model is missing; give a run directory, a Hugging Face folder or a GGUF file.')
  from jaxlm.data import tasks
  if not _TASKS.value:
    raise JaxlmError(f'--tasks is missing; give some of {", ".join(tasks.TASKS)}, or a JSON file that describes one.')
  if _OUTPUT.value and os.path.exists(_OUTPUT.value):
    raise JaxlmError(f'--output={_OUTPUT.value} is there already; move it away, or name another file.')
  asked = {name: tasks.make(name) for name in _TASKS.value}
  other = _other(_AGAINST.value) if _AGAINST.value else {}
  from jaxlm import exam, loading  # late, for they import jax
  model = loading.load(_MODEL.value, dtype=_DTYPE.value)
  terms = exam.Terms(_SPLIT.value, _SHOTS.value, _SEED.value, _LIMIT.value, _NORM.value, _BATCH_SIZE.value)
  kept = f'{_OUTPUT.value}.said' if _OUTPUT.value else ''
  results = {}
  for name, task in asked.items():
    results[name] = exam.hold(model, task, terms, kept)
    if name in other:
      results[name]['paired'] = exam.compared(task, results[name], other[name], terms.seed)
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'x', encoding='utf-8') as file:
      json.dump(dict(model=_MODEL.value, tasks=results), file, indent=1)
    if os.path.exists(kept):
      os.remove(kept)
  print(table(results))


if __name__ == '__main__':
  programs.run(main)
