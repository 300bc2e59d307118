"""Measures a model at tasks, with how sure each number is.

  python -m jaxlm.evaluate --model=runs/quickstart --tasks=stdlib,docstring --shots=2 --output=result.json
  python -m jaxlm.evaluate --model=runs/tuned --tasks=module --against=base.json     # paired with what base.json holds
  python -m jaxlm.evaluate --baseline=tfidf --tasks=module --output=base.json          # what any model should beat
  python -m jaxlm.evaluate --model=runs/quickstart --audits=memorisation,toxicity --audit_settings=audits.json
  python -m jaxlm.evaluate --model=Llama-3.2-1B --harness=hellaswag,arc_* --shots=5 --limit=100     # tasks of lm-eval

A task is one of data/tasks.py, the path of a JSON file that describes one, or "module:attribute". Prints a table;
--output gets every prompt as it was given and every answer. Stopped, it goes on where it was, by what lies in FILE.said
beside.

Audits (jaxlm/audits.py) look for one fault each: stereotypes, toxicity, truthfulness, memorisation, provenance,
contamination. Their settings are a JSON file, {"toxicity": {"files": "prompts.jsonl"}}.

Tasks of lm-eval (pip install "jaxlm[harness]") are asked after the others and in their own words: --split, --seed,
--norm, --against and FILE.said are not theirs. Their intervals are 1.96 standard errors to either side.
"""
import json
import os
from typing import Any, Iterator

from jaxlm import programs
from jaxlm.errors import JaxlmError

flags = programs.Flags()
_MODEL = flags.DEFINE_string('model', None, 'A run directory, a Hugging Face folder, or a GGUF file.')
_TASKS = flags.DEFINE_list('tasks', [], 'Tasks, joined by commas.')
_HARNESS = flags.DEFINE_list('harness', [], 'Tasks of lm-eval, joined by commas; with * several are meant.')
_HARNESS_TASKS = flags.DEFINE_string('harness_tasks', None, 'A folder of YAML tasks, which go before lm-eval\'s own; '
                                     'without --harness all of these are asked.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for numbers, prompts and answers.')
_SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'Whose examples are asked.')
_SHOTS = flags.DEFINE_integer('shots', 0, 'Examples with answers before each question, drawn from the training split; not '
                              'where a label head or embeddings answer. Where it is not given, tasks of lm-eval have '
                              'as many as they say.', lower_bound=0)
_SEED = flags.DEFINE_integer('seed', 0, 'Of that draw, and of the intervals.')
_LIMIT = flags.DEFINE_integer('limit', 0, 'Examples of each task, drawn by the seed, of lm-eval the first; 0: all.',
                              lower_bound=0)
_NORM = flags.DEFINE_enum('norm', 'token', ['sum', 'token', 'byte', 'unconditional'],
                          'How scores of answers to choose from are compared.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Rows computed at once; changes no number.', lower_bound=1)
_SAMPLES = flags.DEFINE_integer('samples', 1, 'Programs drawn for a question, for the measures pass@10 and pass@100.',
                                lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'Of what is generated for tasks; 0: the likeliest token.',
                                  lower_bound=0.0)
_MAX_LENGTH = flags.DEFINE_integer('max_length', None, 'Tokens that are read at most in tasks of lm-eval; by default '
                                   'as many as the model was made for.', lower_bound=1)
_CHAT_TEMPLATE = flags.DEFINE_string('chat_template', None, 'Asks tasks of lm-eval as conversations: the name of a '
                                     'template, or a folder that holds one.')
_AUDITS = flags.DEFINE_list('audits', [], 'Audits, joined by commas.')
_AUDIT_SETTINGS = flags.DEFINE_string('audit_settings', None, 'A JSON file: {audit: {setting: value}}.')
_BASELINE = flags.DEFINE_string('baseline', None, 'In the place of a model: majority, tfidf, lead or copy, whichever '
                                'the tasks can be answered by.')
_AGAINST = flags.DEFINE_string('against', None, 'The --output of another model at the same tasks: differences are '
                               'tested in pairs.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of parameters and computing; default: the run\'s.')

Line = tuple[str, ...]  # cells of the table


def table(results: dict[str, Any], harness: dict[str, Any] | None = None) -> str:
  """A line a number: task, measure, value, interval, examples; where there is another model, the difference and p.

  Args:
    results: {task: what `exam.hold` returns}.
    harness: what `harness.run` returns.
  """
  lines = [('task', 'measure', 'value', '95% interval', 'examples', 'difference', 'p'), *_lines(results)]
  lines += _harness_lines(harness) if harness else ()
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _lines(results: dict[str, Any]) -> Iterator[Line]:
  for name, found in results.items():
    for measure, value in found['metrics'].items():
      low, high = found['intervals'][measure]
      pair = found.get('paired', {}).get(measure)
      yield (name, measure, f'{value:.4f}', f'{low:.4f} to {high:.4f}', str(found['examples']),
             f'{pair["difference"]:+.4f}' if pair else '', f'{pair["p_randomization"]:.4f}' if pair else '')
    for group, part in found.get('groups', {}).items():
      for measure, value in part['metrics'].items():
        yield (f'{name}: {group}', measure, f'{value:.4f}', '', str(part['examples']), '', '')


def _harness_lines(found: dict[str, Any]) -> Iterator[Line]:
  for name, scores in found['results'].items():
    for key, value in scores.items():
      measure, comma, kind = key.partition(',')  # 'acc,none', and 'acc_stderr,none'
      if not comma or measure.endswith('_stderr') or not isinstance(value, (int, float)):
        continue
      error = scores.get(f'{measure}_stderr,{kind}')
      sure = f'{value - 1.96 * error:.4f} to {value + 1.96 * error:.4f}' if isinstance(error, float) else ''
      yield (name, measure if kind == 'none' else f'{measure} ({kind})', f'{value:.4f}', sure,
             str(found.get('n-samples', {}).get(name, {}).get('effective', '')), '', '')


def _other(path: str, asked: list[str]) -> dict[str, Any]:
  """{task: what another model's measurement found}."""
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)['tasks']
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise JaxlmError(f'--against={path} is no --output of this program ({type(e).__name__}); make it first.') from e
  if not set(asked) & set(found):
    raise JaxlmError(f'--against={path} holds {", ".join(found) or "no task"}, and none of --tasks; measure the other '
                     'model at the same.')
  for name in set(asked) & set(found):
    for flag in (_SPLIT, _LIMIT, _SEED) if _LIMIT.value else (_SPLIT, _LIMIT):
      theirs = found[name].get('terms', {}).get(flag.name, flag.value)
      if theirs != flag.value:
        raise JaxlmError(f'--against={path}: {name} was measured there with {flag.name}={theirs}, here it would be with '
                         f'{flag.value}, so of other examples; give --{flag.name}={theirs}.')
  return found


def main(argv: list[str]) -> None:
  """Measures what the flags ask for."""
  del argv
  if _MODEL.value and _BASELINE.value:
    raise JaxlmError(f'--baseline={_BASELINE.value} stands in the place of --model={_MODEL.value}; give one of them.')
  if not _MODEL.value and not _BASELINE.value:
    raise JaxlmError('--model is missing; give a run directory, a Hugging Face folder or a GGUF file, or a --baseline '
                     'in its place.')
  from jaxlm.data import tasks
  with_harness = bool(_HARNESS.value or _HARNESS_TASKS.value)
  if not _TASKS.value and not with_harness and not _AUDITS.value:
    raise JaxlmError(f'--tasks is missing; give some of {", ".join(tasks.TASKS)}, or a JSON file that describes one; '
                     'or --harness, tasks of lm-eval; or --audits.')
  if _BASELINE.value and (with_harness or _AUDITS.value):
    raise JaxlmError('--baseline answers --tasks alone; leave --harness and --audits out, or give a --model.')
  for flag in (_MAX_LENGTH, _CHAT_TEMPLATE):
    if flag.value is not None and not with_harness:
      raise JaxlmError(f'--{flag.name} is of tasks of lm-eval; leave it out, or give --harness.')
  if _OUTPUT.value and os.path.exists(_OUTPUT.value):
    raise JaxlmError(f'--output={_OUTPUT.value} is there already; move it away, or name another file.')
  asked = {name: tasks.make(name) for name in _TASKS.value}
  other = _other(_AGAINST.value, _TASKS.value) if _AGAINST.value else {}
  if _OUTPUT.value:
    os.makedirs(os.path.dirname(os.path.abspath(_OUTPUT.value)), exist_ok=True)
  from jaxlm import audits, exam, loading  # late, for they import jax
  asked_audits = _audits(audits)
  model = None if _BASELINE.value else loading.load(_MODEL.value, dtype=_DTYPE.value)
  terms = exam.Terms(_SPLIT.value, _SHOTS.value, _SEED.value, _LIMIT.value, _NORM.value, _BATCH_SIZE.value,
                     _SAMPLES.value, _TEMPERATURE.value)
  if terms.shots and asked and (model is None or not any(exam.reads_shots(model, task) for task in asked.values())):
    raise JaxlmError(f'--shots={terms.shots}: of {", ".join(asked)} none is asked by a prompt of {_MODEL.value or "a baseline"}'
                     ', before which examples could stand; leave it 0.')
  kept = f'{_OUTPUT.value}.said' if _OUTPUT.value else ''
  results: dict[str, Any] = {}
  for name, task in asked.items():
    try:
      results[name] = (exam.hold_baseline(_BASELINE.value, task, terms) if model is None else
                       exam.hold(model, task, terms, kept))
      if name in other:
        results[name]['paired'] = exam.compared(task, results[name], other[name], terms.seed)
    except JaxlmError as e:
      if results:
        print(table(results))  # what is done is told, whatever became of the others
      raise JaxlmError(f'{name}: {e}' if len(asked) > 1 else str(e)) from e
  audited = {}
  for name, (audit, settings) in asked_audits.items():
    try:
      audited[name] = audit(model, settings)
    except JaxlmError as e:
      if results | audited:
        print(table(results | audited))
      raise JaxlmError(f'{name}: {e}') from e
  found = _harness(model) if with_harness else None
  if _OUTPUT.value:
    _write(_OUTPUT.value, dict(model=_MODEL.value or _BASELINE.value, tasks=results)
           | (dict(audits=audited) if audited else {}) | (dict(harness=found) if found else {}))
    if os.path.exists(kept):
      os.remove(kept)
  print(table(results | audited, found))


def _audits(audits: Any) -> dict[str, Any]:
  """{name: (audit, its settings)} of those asked for, before any model is loaded."""
  values: dict[str, Any] = {}
  if _AUDIT_SETTINGS.value:
    try:
      with open(_AUDIT_SETTINGS.value, encoding='utf-8') as file:
        values = json.load(file)
    except (OSError, ValueError) as e:
      raise JaxlmError(f'--audit_settings={_AUDIT_SETTINGS.value} is no JSON file that can be read: {e}.') from e
    if not isinstance(values, dict) or not set(values) <= set(_AUDITS.value):
      raise JaxlmError(f'--audit_settings={_AUDIT_SETTINGS.value} wants an object whose keys are among --audits='
                       f'{",".join(_AUDITS.value)}.')
  return {name: audits.make(name, values.get(name, {}), _MODEL.value or '') for name in _AUDITS.value}


def _harness(model: Any) -> dict[str, Any]:
  from jaxlm import harness
  return harness.run(model, _HARNESS.value or None, _HARNESS_TASKS.value, limit=_LIMIT.value or None,
                     num_fewshot=_SHOTS.value if _SHOTS.present else None, batch_size=_BATCH_SIZE.value,
                     max_length=_MAX_LENGTH.value, chat_template=_CHAT_TEMPLATE.value)


def _write(path: str, found: dict[str, Any]) -> None:
  default = None
  if 'harness' in found:
    from lm_eval.utils import handle_non_serializable as default
  text = json.dumps(found, indent=1, default=default)
  with open(path, 'x', encoding='utf-8') as file:
    file.write(text)


if __name__ == '__main__':
  programs.run(main)
