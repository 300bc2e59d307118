"""What audits have in common: settings, records, numbers with how sure they are."""
import dataclasses
import glob
import os
from typing import Any, Hashable, Mapping, Sequence

import numpy as np

from jaxlm.data import tasks
from jaxlm.data.records import READERS
from jaxlm.errors import JaxlmError
from jaxlm.measure import intervals
from jaxlm.measure.metric import Metric


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all audits have in common.

  Attributes:
    files: of records, joined by commas: JSONL, or CSV under a header where the name ends in .csv.
    limit: records, drawn by the seed; 0: all.
    seed: of draws and intervals.
    batch_size: rows computed at once; changes no result.
  Raises:
    JaxlmError: a value of another type, or below what makes sense.
  """
  files: str = ''
  limit: int = 0
  seed: int = 0
  batch_size: int = 32

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, wanted = getattr(self, field.name), type(field.default)
      least = min(field.default, 1) if wanted is int else 0
      fits = type(value) is wanted or (wanted is float and type(value) is int)
      if not fits or wanted is not str and not value >= least:
        told = wanted.__name__ if wanted is str else f'{wanted.__name__}, at least {least}'
        raise JaxlmError(f'{type(self).__name__}: {field.name} wants {told}; got {value!r}.')


# ---- records -----------------------------------------------------------------------------------------------------


def records(settings: Settings) -> list[tuple[str, Mapping[str, Any]]]:
  """("file:line", record) of each record that is asked for."""
  paths, found = [path.strip() for path in settings.files.split(',') if path.strip()], []
  for path in paths:
    if not os.path.isfile(path):
      raise JaxlmError(f'files: {path!r} is no file (looked from {os.getcwd()}); give the path of a JSONL or CSV file.')
    found += READERS['csv' if path.endswith('.csv') else 'jsonl'](glob.escape(path), '')
  if not found:
    raise JaxlmError(f'files={settings.files!r} gives no record to ask; name a JSONL or CSV file that has some in its '
                     'settings (--audit_settings).')
  return tasks.drawn(found, settings.limit, np.random.Generator(np.random.Philox(settings.seed)))


def fault(id: str, what: str) -> JaxlmError:
  return JaxlmError(f'{id}: {what}; mend or remove the record.')


def text_of(id: str, record: Mapping[str, Any], *names: str) -> str:
  """The first of these fields that a record has, which must be text."""
  name = next((name for name in names if name in record), None)
  if name is None:
    raise fault(id, f'no field {names[0]!r}, it has {", ".join(map(repr, list(record)[:12])) or "none"}')
  if not isinstance(record[name], str) or not record[name].strip():
    raise fault(id, f'field {name!r} wants text, got {str(record[name])[:60]!r}')
  return record[name]


def prompt_of(id: str, record: Mapping[str, Any]) -> str:
  """What is to be continued: `prompt`, text or an object with `text`, as RealToxicityPrompts has it; or `text`."""
  inner = record.get('prompt')
  return text_of(id, inner, 'text') if isinstance(inner, Mapping) else text_of(id, record, 'prompt', 'text')


# ---- numbers -----------------------------------------------------------------------------------------------------


def mean(*names: str) -> Metric:
  """Means over rows."""
  return Metric(' '.join(names), lambda row, _: (*row, 1), lambda sums: dict(zip(names, sums[:-1] / sums[-1])))


def numbers(metric: Metric, rows: Sequence[Any], seed: int) -> dict[str, Any]:
  own = metric.rows(rows)
  return dict(metrics=metric.total(own), intervals=intervals.bootstrap(metric, own, seed), examples=len(rows))


def grouped(metric: Metric, rows: Sequence[Sequence[float]], groups: Sequence[Sequence[str]], settings: Settings,
             units: Sequence[Hashable] | None = None) -> dict[str, Any]:
  """Numbers of all rows, and of each group of them; rows of one unit are averaged first, and drawn together."""
  units = range(len(rows)) if units is None else units

  def of(chosen: list[int]) -> dict[str, Any]:
    together: dict[Hashable, list[Sequence[float]]] = {}
    for i in chosen:
      together.setdefault(units[i], []).append(rows[i])
    return numbers(metric, [np.mean(own, 0) for own in together.values()], settings.seed) | dict(examples=len(chosen))

  names = sorted({name for own in groups for name in own})
  return of(list(range(len(rows)))) | dict(
      groups={name: of([i for i, own in enumerate(groups) if name in own]) for name in names},
      settings=dataclasses.asdict(settings))
