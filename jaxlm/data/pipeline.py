"""Batches: rows [examples, examples + batch size) of the stream, made ahead; and what they were made of."""
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxlm import config as configs
from jaxlm.data.plans import Cut, Stream, assemble, check_ids, check_second, examples_of, second_texts
from jaxlm.data.store import Store, prepare
from jaxlm.errors import JaxlmError

Batch = dict[str, np.ndarray]
Skips = Sequence[tuple[int, int]]  # ranges [start, end) of the stream that are passed over


# ---- batch sizes -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BatchSizes:
  """How large each batch is: `ramp` pairs (until this step, size), then `size`.

  What has been consumed is counted in examples, so a run that resumes with another size says where it stood:
  `examples` were consumed when `step` steps were done.
  """
  size: int
  ramp: tuple[tuple[int, int], ...] = ()
  step: int = 0
  examples: int = 0

  @classmethod
  def of(cls, config, step: int = 0, examples: int | None = None) -> 'BatchSizes':
    """The config's, from `step` on; `examples` default to what the config alone would have consumed by then."""
    sizes = cls(config.batch_size, tuple((int(s), int(b)) for s, b in config.batch_ramp))
    consumed = sizes.consumed(step) if examples is None else examples
    return dataclasses.replace(sizes, step=step, examples=consumed)

  def _phases(self) -> Iterator[tuple[int | None, int]]:
    """(last step, size) pairs in order; None is for ever."""
    yield from sorted(self.ramp)
    yield None, self.size

  def at_step(self, step: int) -> int:
    """Size of the batch of a step; the first step is 1."""
    return next(size for until, size in self._phases() if until is None or step <= until)

  def consumed(self, step: int) -> int:
    """Examples consumed when `step` steps are done."""
    done, examples = self.step, self.examples
    for until, size in self._phases():
      steps = max((step if until is None else min(step, until)) - done, 0)
      done, examples = done + steps, examples + steps * size
    return examples

  def __call__(self, examples: int) -> int:
    """Size of the batch that begins when so many examples are consumed."""
    done, begun = self.step, self.examples
    for until, size in sorted(self.ramp):
      steps = max(until - done, 0)
      if examples < begun + steps * size:
        return size
      done, begun = done + steps, begun + steps * size
    return self.size


def whole(batch_size: int) -> tuple[int, int]:
  """All rows of a batch: what one host needs that is alone."""
  return 0, batch_size


def host_rows(host: int, hosts: int) -> Callable[[int], tuple[int, int]]:
  """The contiguous part of a batch's rows that is one host's; pickles.

  Raises (when called):
    JaxlmError: the batch does not divide.
  """
  return _HostRows(host, hosts)


@dataclasses.dataclass(frozen=True)
class _HostRows:
  host: int
  hosts: int

  def __call__(self, batch_size: int) -> tuple[int, int]:
    each, left = divmod(batch_size, self.hosts)
    if left:
      raise JaxlmError(f'A batch of {batch_size} rows does not divide by {self.hosts} hosts; set config.batch_size '
                       'to a multiple.')
    return self.host * each, (self.host + 1) * each


# ---- training batches --------------------------------------------------------------------------------------------


def stream_indices(numbers: np.ndarray, skips: Skips) -> np.ndarray:
  """Where in the stream the examples are that are consumed as number 0, 1, 2, …: those in `skips` do not count."""
  indices = np.array(numbers, np.int64)
  for start, end in _merged(skips):
    indices[indices >= start] += end - start
  return indices


def _merged(skips: Skips) -> list[tuple[int, int]]:
  """The same ranges in order, none touching another."""
  merged: list[tuple[int, int]] = []
  for start, end in sorted((int(s), int(e)) for s, e in skips):
    if merged and start <= merged[-1][1]:
      merged[-1] = merged[-1][0], max(end, merged[-1][1])
    elif end > start:
      merged.append((start, end))
  return merged


@dataclasses.dataclass
class _Upcoming:
  """The batches from `examples` on, as the random-access sequence that Grain reads; element 0 has `first` rows."""
  stream: Stream
  rows: Callable[[int], tuple[int, int]]
  sizes: Callable[[int], int]
  examples: int
  first: int
  skips: tuple[tuple[int, int], ...]

  def __post_init__(self):
    self._begins = [self.examples, self.examples + self.first]

  def __len__(self) -> int:
    return 1 << 40  # no end; Grain wants a number

  def __getitem__(self, number) -> Batch:
    while len(self._begins) <= number + 1:
      self._begins.append(self._begins[-1] + self.sizes(self._begins[-1]))
    begin, end = self._begins[number], self._begins[number + 1]
    lo, hi = self.rows(end - begin)
    batch = self.stream.examples(stream_indices(np.arange(begin + lo, begin + hi), self.skips))
    batch['example_ids'] = np.arange(lo, hi, dtype=np.int32)
    return {key: np.ascontiguousarray(value) for key, value in batch.items()}


class Batches:
  """Batches of the stream, wherever one asks; those that follow are made ahead in the background.

  `at` is a function of its arguments: what was asked before only decides whether the answer is ready.

  Args:
    config: the whole config; data.workers and data.prefetch are read.
    stream: where examples come from.
    rows: batch size -> (lo, hi), the rows this host holds; all of them by default. With workers it must pickle.
    sizes: examples consumed -> size of the next batch, used to work ahead; the config's by default.
  """

  def __init__(self, config, stream: Stream, rows: Callable[[int], tuple[int, int]] | None = None,
               sizes: Callable[[int], int] | None = None):
    self._stream, self._rows, self._sizes = stream, rows or whole, sizes or BatchSizes.of(config)
    self._workers, self._prefetch = config.data.workers, config.data.prefetch
    self._iterator, self._next = None, None

  def at(self, examples: int, batch_size: int | None = None, skips: Skips = ()) -> Batch:
    """The batch that begins when `examples` were consumed.

    Args:
      examples: consumed so far; skipped ones do not count.
      batch_size: rows of the global batch; what `sizes` says by default.
      skips: ranges [start, end) of the stream that are passed over, as after a rewind.
    Returns:
      This host's rows: a dict by `types.BATCH`; `example_ids` are row numbers in the global batch.
    """
    batch_size = batch_size or self._sizes(examples)
    skips = tuple(_merged(skips))
    if self._next != (examples, batch_size, skips):
      self.close()
      self._iterator = self._iterate(_Upcoming(self._stream, self._rows, self._sizes, examples, batch_size, skips))
    batch = next(self._iterator)
    if self._workers:  # Grain's arrays live in shared memory, which is gone when the process ends
      batch = {key: np.array(value) for key, value in batch.items()}
    following = examples + batch_size
    self._next = following, self._sizes(following), skips
    return batch

  def _iterate(self, upcoming: _Upcoming):
    import grain
    if not self._workers:
      reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)  # more would share the GIL
      return iter(grain.MapDataset.source(upcoming).to_iter_dataset(reading))
    from absl import flags
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which a notebook never parses
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ahead = -(-self._prefetch // self._workers)
    dataset = grain.MapDataset.source(upcoming).to_iter_dataset(reading)
    return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(self._workers, ahead)))

  def close(self) -> None:
    """Ends the thread or the processes that work ahead."""
    iterator, self._iterator, self._next = self._iterator, None, None
    if iterator is not None and hasattr(iterator, 'close'):
      iterator.close()

  def __enter__(self) -> 'Batches':
    return self

  def __exit__(self, *_) -> None:
    self.close()


# ---- held-out text -----------------------------------------------------------------------------------------------

HELDOUT_NUMBERS = 1 << 62  # the random streams of evaluation are none of training's


class HeldoutBatches:
  """Batches that hold every token of a store's first held-out documents once, in a fixed order.

  Each iteration begins anew. All have `config.eval.batch_size` rows; what the last one lacks is rows of padding, whose
  loss weights are 0. Where `objective.covers`, bits per byte of a model are its loss, summed over all of them, in nats,
  over ln 2 · text_bytes: with config.data.bos every token of the text is a target, without it the first of each
  document goes uncounted.

  Attributes:
    name: the store's.
    documents: how many are measured on; `config.eval.max_tokens` limits them.
    text_bytes: their text's bytes of UTF-8.
    gzip_bits_per_byte: what `gzip -9` of all that text, concatenated, needs.
  """

  def __init__(self, store: Store, objective, config, vocab, rows: Callable[[int], tuple[int, int]] | None = None):
    check_ids([store], vocab, config.model.vocab_size, objective.ids)
    sample = store.heldout_sample(config.eval.max_tokens)
    # second texts are only told from the rows' own, so those of training will do where one document is held out
    self._others = store.heldout if len(store.heldout) > 1 else np.arange(len(store.lengths))
    check_second(store, self._others, objective)
    self.name, self.documents, self.text_bytes = store.name, len(sample.documents), sample.text_bytes
    self.gzip_bits_per_byte = 8 * sample.gzip_bytes / max(sample.text_bytes, 1)
    self._store, self._objective, self._filler, self._seed = store, objective, vocab.filler, config.seed
    self._batch_size, self._rows, self._raw_length = (config.eval.batch_size, rows or whole,
                                                      objective.raw_length(config.seq_len))
    begins = np.concatenate([[0], np.cumsum(store.lengths[sample.documents])])
    self._plan = Cut(sample.documents, begins, self._raw_length, objective.overlap)

  def __len__(self) -> int:
    return -(-self._plan.windows // self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    lo, hi = self._rows(self._batch_size)
    for number in range(len(self)):
      windows = number * self._batch_size + np.arange(lo, hi)
      pieces = self._plan.pieces(windows[windows < self._plan.windows])
      items = assemble(self._store, pieces, hi - lo, self._raw_length, self._filler)
      if self._objective.second:
        items['second'] = second_texts(self._store, self._others, pieces, self._seed, HELDOUT_NUMBERS + windows,
                                       self._raw_length)
      batch = examples_of(self._objective, items, self._seed, HELDOUT_NUMBERS + windows)
      batch['example_ids'] = np.arange(lo, hi, dtype=np.int32)
      yield {key: np.ascontiguousarray(value) for key, value in batch.items()}


# ---- provenance --------------------------------------------------------------------------------------------------


def documents_at(where, step: int, make_objective: Callable[[Any, Any], Any],
                 roles: Callable[[Any], Sequence[str]] = lambda config: ()) -> list[dict[str, Any]]:
  """Which documents were in the batch of a step.

  Args:
    where: a run directory, whose metrics.jsonl says how many examples were consumed when, through batch ramps, resumed
      batch sizes and rewinds; or a config, for what a run of it would read.
    step: from 1.
    make_objective: `objectives.make`; its windows decide what a row holds.
    roles: `objectives.roles`, for objectives that write special tokens.
  Returns:
    A dict a piece: row of the global batch, example (its number in the stream), source, file, offset (bytes into the
    file), document (its number in the store), start and end (tokens of it).
  Raises:
    JaxlmError: no such run, or its records do not tell.
  """
  if step < 1:
    raise JaxlmError(f'Steps are counted from 1, got {step}.')
  if isinstance(where, (str, os.PathLike)):
    folder = Path(where)
    if not (folder / 'config.json').exists():
      raise JaxlmError(f'{folder} is no run directory: it has no config.json.')
    config = configs.loads((folder / 'config.json').read_text(encoding='utf-8'))
    record = folder / 'run.json'
    recorded = json.loads(record.read_text(encoding='utf-8'))['data_digest'] if record.exists() else None
    begin, end, skips = _recorded(folder / 'metrics.jsonl', BatchSizes.of(config), step)
  else:
    config, skips, sizes, recorded = where, (), BatchSizes.of(where), None
    begin, end = sizes.consumed(step - 1), sizes.consumed(step)
  if config.data.task:
    raise JaxlmError(f'{where} learned the task {config.data.task!r}, whose rows are of examples, not of documents.')
  stores, tokenizer = prepare(config, roles(config))
  if recorded is not None and recorded != {store.name: store.key for store in stores}:
    raise JaxlmError(f'{where} was trained on other text than its sources hold now, or other tokens of it; put the old '
                     'files back to see what a batch was made of.')
  stream = Stream(config, stores, make_objective(config, tokenizer.vocab), tokenizer.vocab)
  examples = stream_indices(np.arange(begin, end), skips).tolist()
  return [dict(row=row, example=example, **piece)
          for row, example in enumerate(examples) for piece in stream.documents(example)]


def _recorded(metrics: Path, sizes: BatchSizes, step: int) -> tuple[int, int, Skips]:
  """(first example, end, skipped ranges) of a step by a run's records.

  Lines have "step" and "examples" (consumed when that step was done), or "skips": [[start, end], …] of the stream.
  Between two recorded steps the config's sizes count, or one size if only that fits.
  """
  consumed, skips = {0: 0}, []
  for line in metrics.read_text(encoding='utf-8').splitlines() if metrics.exists() else ():
    try:
      record: Mapping[str, Any] = json.loads(line)
    except ValueError:
      continue  # a torn last line
    if 'step' in record and 'examples' in record:
      consumed[record['step']] = record['examples']  # of a repeated step the last line counts
    skips += record.get('skips', ())
  known = max(s for s in consumed if s < step)
  following = min((s for s in consumed if s >= step), default=None)
  anchored = dataclasses.replace(sizes, step=known, examples=consumed[known])
  if following is not None and anchored.consumed(following) != consumed[following]:
    size, left = divmod(consumed[following] - consumed[known], following - known)
    if left:
      raise JaxlmError(f'{metrics}: between steps {known} and {following} the batch size changed, and the records do '
                       f'not tell whether before step {step}; set log_every=1 for runs that change it.')
    anchored = BatchSizes(size, (), known, consumed[known])
  return anchored.consumed(step - 1), anchored.consumed(step), skips
