"""What a model has of its training text: recited, told where from, or leaked into a test."""
import dataclasses
from typing import Any, Mapping, Sequence

from jaxlm import objectives
from jaxlm.data import store, suffixes, tasks
from jaxlm.errors import JaxlmError
from jaxlm.inquiries import Settings, numbers, prompt_of, records, text_of
from jaxlm.lm import LM
from jaxlm.measure import origins
from jaxlm.measure.metric import Metric
from jaxlm.rundir import RunDirectory


@dataclasses.dataclass(frozen=True)
class Trained(Settings):
  """Whose text is looked for among what the model learned.

  Attributes:
    run: the run directory whose text the model learned, itself or, of one that was fine-tuned, its base's.
    paths: where that text is now; '': where it was.
  """
  run: str = ''
  paths: str = ''


def _indexes(lm: LM, settings: Trained) -> list[suffixes.Suffixes]:
  """An index of each token store that a run learned from, made again where it is gone."""
  directory = RunDirectory(settings.run)
  config, record = directory.config, directory.record
  if config is None or not record.get('data_digest'):
    raise JaxlmError(f'run={settings.run!r} lacks config.json, or a run.json that tells its text; name another run.')
  if config.data.task:
    raise JaxlmError(f'run={settings.run!r} learned task {config.data.task!r}, not text; give the run it began with.')
  if lm.tokenizer is None or lm.tokenizer.digest != record.get('tokenizer_digest'):
    raise JaxlmError(f'run={settings.run!r} has another tokenizer than this model; give the run whose text it learned.')
  if settings.paths and config.data.mixture:
    raise JaxlmError(f'run={settings.run!r} learned a mixture, whose sources have paths of their own; put files back '
                     'where they were, without `paths`.')
  if settings.paths:
    config.data.paths = settings.paths
  prepared = store.prepare(config, objectives.roles(config))
  if prepared.keys != record.get('data_digest'):
    raise JaxlmError(f'The text of run={settings.run!r} is no longer what it learned (its digest is not that in '
                     'run.json); put the old files back, or say in `paths` where they are.')
  return [suffixes.index(own) for own in prepared.stores]


@dataclasses.dataclass(frozen=True)
class Memorisation(Trained):
  """Attributes: `Trained`'s (`files` and `limit` are not read) and those of `origins.memorised`."""
  prefix: int = 50
  length: int = 50
  samples: int = 500
  draws: int = 20_000
  near: float = 0.1


def memorisation(lm: LM, settings: Memorisation) -> dict[str, Any]:
  """How much of its training text a model recites, by how often the text is repeated there; see `origins.memorised`.

  The numbers are the shares of the buckets, `memorised 2-10`; `stores` has what was found, by source.
  """
  whole = settings.prefix + settings.length
  if lm.model.config.positions.kind == 'learned' and whole > lm.model.config.max_length - len(lm.front):
    raise JaxlmError(f'prefix + length = {whole} tokens, but the model learned {lm.model.config.max_length} positions; '
                     'lower prefix or length.')
  keys = ('prefix', 'length', 'samples', 'draws', 'near', 'batch_size', 'seed')
  continue_ = lambda prompts, length: lm.generate(prompts, length, batch_size=settings.batch_size)
  results = {index.store.name: origins.memorised(index, continue_, **{key: getattr(settings, key) for key in keys})
             for index in _indexes(lm, settings)}
  rows = {f'{_of(name, results)}memorised {row["repeats"]}': row
          for name, own in results.items() for row in own['rows']}
  return dict(metrics={name: row['share'] for name, row in rows.items()}, stores=results,
              intervals={name: (row['low'], row['high']) for name, row in rows.items()},
              examples=sum(row['texts'] for row in rows.values()), settings=dataclasses.asdict(settings))


def _of(name: str, results: Mapping[str, Any]) -> str:
  """What a number's name begins with: its source, where there are several."""
  return f'{name}: ' if len(results) > 1 else ''


@dataclasses.dataclass(frozen=True)
class Provenance(Trained):
  """Whose records are texts (`text`), or prompts (`prompt`), of which the model's greedy continuation is the text.

  Attributes:
    max_new_tokens: of a continuation, at most.
    shortest, most: as in `origins.provenance`.
  """
  max_new_tokens: int = 128
  shortest: int = 8
  most: int = 5


def provenance(lm: LM, settings: Provenance) -> dict[str, Any]:
  """Which passages of texts, or of what the model says, stand word for word in its training documents, and in which.

  `covered` is the share of their tokens in such a passage. In `stores`, by source, each text's `origins.provenance`.
  """
  found = records(settings)
  texts = [record['text'] if isinstance(record.get('text'), str) else None for _, record in found]
  asked = [i for i, text in enumerate(texts) if text is None]
  prompts = [prompt_of(*found[i]) for i in asked]
  if prompts:
    said = lm.generate(prompts, min(settings.max_new_tokens, lm.room(prompts)), batch_size=settings.batch_size)
    for i, text in zip(asked, said):
      texts[i] = text
  ids = [lm.tokenizer.encode(text) for text in texts]
  of = lambda index, own: origins.provenance(index, own, settings.shortest, settings.most, lm.tokenizer.decode)
  results = {index.store.name: [dict(id=id, text=text) | of(index, own)
                                for (id, _), text, own in zip(found, texts, ids)]
             for index in _indexes(lm, settings)}
  return _by_store('covered', {name: [(own['covered'] * own['tokens'], own['tokens']) for own in each]
                               for name, each in results.items()}, results, settings)


def _by_store(what: str, rows: Mapping[str, Sequence[tuple[float, float]]], results: Mapping[str, Any],
              settings: Settings) -> dict[str, Any]:
  """A share of each store, of rows (part, whole); there is none where nothing is whole."""
  whole = dict(metrics={}, intervals={}, examples=max(map(len, rows.values())), settings=dataclasses.asdict(settings),
               stores=results)
  for name, own in rows.items():
    own = [row for row in own if row[1]]
    if own:
      told = f'{_of(name, rows)}{what}'
      metric = Metric(told, lambda row, _: row, lambda sums: {told: sums[0] / sums[1]})
      found = numbers(metric, own, settings.seed)
      whole['metrics'] |= found['metrics']
      whole['intervals'] |= found['intervals']
  return whole


@dataclasses.dataclass(frozen=True)
class Contamination(Trained):
  """Whose records are test examples (`text`); or examples of tasks are.

  Attributes:
    tasks: names as `tasks.make` has them, joined by commas; then neither files nor limit is read.
    split: whose examples.
    n, threshold, least, most: as in `origins.contamination`; n and least in tokens, several times as many for bytes.
  """
  tasks: str = ''
  split: str = 'test'
  n: int = 13
  threshold: float = 0.2
  least: int = 8
  most: int = 5


def contamination(lm: LM, settings: Contamination) -> dict[str, Any]:
  """Which examples of test sets stand in the training documents, and in which; see `origins.contamination`.

  `flagged` is the share of examples of which that can be told. Of a task all of a record's text is looked for, the
  right answer too where that is text; of choices the right one.
  """
  if settings.tasks:
    found = [(example.id, _whole(example)) for name in settings.tasks.split(',')
             for example in tasks.examples(tasks.make(name.strip()), settings.split)]
  else:
    found = [(id, text_of(id, record, 'text')) for id, record in records(settings)]
  ids = [lm.tokenizer.encode(text) for _, text in found]
  keys = ('n', 'threshold', 'least', 'most')
  results = {index.store.name: origins.contamination(index, ids, **{key: getattr(settings, key) for key in keys})
             for index in _indexes(lm, settings)}
  for own in results.values():
    own['rows'] = [dict(id=id, text=text) | row for (id, text), row in zip(found, own['rows'])]
  judged = {name: [row['verdict'] for row in own['rows']] for name, own in results.items()}
  return _by_store('flagged', {name: [(verdict == 'flagged', verdict != 'undecided') for verdict in own]
                               for name, own in judged.items()}, results, settings)


def _whole(example: tasks.Example) -> str:
  """All text of an example."""
  answer = example.choices[example.target] if example.choices and type(example.target) is int else example.target
  said = [message['content'] for message in example.messages if isinstance(message.get('content'), str)]
  return '\n'.join(filter(None, [example.input, example.second, answer if isinstance(answer, str) else '',
                                 ' '.join(example.words), *said]))
