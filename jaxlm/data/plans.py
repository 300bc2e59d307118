"""Which tokens example i is made of: windows, the pieces of documents in them, and the stream they form."""
import collections
import contextlib
import hashlib
import json
import os
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from jaxlm.data.mixtures import Permutation, Schedule, remembered
from jaxlm.data.shards import Store
from jaxlm.data.store import weights
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup

FORMAT = 1             # of plans kept as files
CACHED_FROM = 1 << 16  # documents; a smaller plan is made faster than it is read
CACHED_PLANS = 8       # files kept a store; an older epoch's goes


# ---- windows -----------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
  """Parts [start, end) of documents; `row` says which of the windows asked for each belongs to, ascending."""
  row: np.ndarray
  document: np.ndarray
  start: np.ndarray
  end: np.ndarray


def _expand(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(row, index): for each row r the indices first[r], first[r] + 1, … count[r] of them."""
  row = np.repeat(np.arange(len(count)), count)
  ends = np.cumsum(count)
  return row, np.arange(len(row)) - np.repeat(ends - count - first, count)


class Cut:
  """Documents laid end to end and cut into windows that overlap by a fixed number of tokens.

  Attributes:
    arrays: what the plan consists of: documents in their order, and where each begins in the whole, and the end.
    windows: how many; the last is shorter and nothing is lost.
  """

  def __init__(self, order: np.ndarray, begins: np.ndarray, raw_length: int, overlap: int):
    self.arrays = dict(order=order, begins=begins)
    self._order, self._begins, self._raw, self._stride = order, begins, raw_length, raw_length - overlap
    self.total = int(begins[-1])
    self.windows = max(-(-(self.total - overlap) // self._stride), 1) if self.total else 0

  def pieces(self, windows: np.ndarray) -> Pieces:
    lo = windows * self._stride
    hi = np.minimum(lo + self._raw, self.total)
    first = np.searchsorted(self._begins, lo, 'right') - 1
    row, index = _expand(first, np.searchsorted(self._begins, hi, 'left') - first)
    begin, end = self._begins[index], self._begins[index + 1]
    return Pieces(row, self._order[index].astype(np.int64), np.maximum(lo[row] - begin, 0),
                  np.minimum(hi[row], end) - begin)


class Packed:
  """Windows of whole pieces: window w holds pieces offsets[w] to offsets[w + 1]."""

  def __init__(self, document: np.ndarray, start: np.ndarray, end: np.ndarray, offsets: np.ndarray):
    self.arrays = dict(document=document, start=start, end=end, offsets=offsets)
    self._offsets = offsets
    self.windows = len(offsets) - 1

  def pieces(self, windows: np.ndarray) -> Pieces:
    first = self._offsets[windows]
    row, index = _expand(first, self._offsets[windows + 1] - first)
    return Pieces(row, *(self.arrays[name][index].astype(np.int64) for name in ('document', 'start', 'end')))


class Lengths(NamedTuple):
  """What a planner reads: documents to be packed, their lengths, and the form of a window."""
  document: np.ndarray
  length: np.ndarray
  raw_length: int
  overlap: int


def _laid_out(text: Lengths, order: np.ndarray | None) -> Cut:
  document, length = (text.document, text.length) if order is None else (text.document[order], text.length[order])
  small = np.int32 if int(document.max(initial=0)) < 1 << 31 else np.int64
  return Cut(document.astype(small), np.concatenate([[0], np.cumsum(length)]), text.raw_length, text.overlap)


def concatenated(text: Lengths, permutation: Permutation | None) -> Cut:
  """Documents in a new order every epoch, end to end, cut into windows."""
  return _laid_out(text, None if permutation is None else permutation(np.arange(len(text.document))))


def contiguous(text: Lengths, permutation: Permutation | None) -> Cut:
  """Documents as the store has them, end to end, cut into windows; only the windows change their order."""
  del permutation
  return _laid_out(text, None)


def _cut_up(text: Lengths, permutation: Permutation | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(document, start, end): every document cut into pieces that fit a window, each with a target at least."""
  document, length = text.document, text.length
  if permutation is not None:
    order = permutation(np.arange(len(document)))
    document, length = document[order], length[order]
  stride = text.raw_length - text.overlap
  row, number = _expand(np.zeros(len(length), np.int64), np.maximum(-(-(length - text.overlap) // stride), 0))
  start = number * stride
  return document[row], start, np.minimum(start + text.raw_length, length[row])


def padded(text: Lengths, permutation: Permutation | None) -> Packed:
  """One piece a window: what packing is measured against."""
  del permutation
  pieces = _cut_up(text, None)
  return Packed(*pieces, np.arange(len(pieces[0]) + 1))


def best_fit(text: Lengths, permutation: Permutation | None) -> Packed:
  """Pieces, longest first, each into the fullest window that still has room; no piece is cut to fill a window.

  Equal lengths meet others every epoch; how many windows there are never changes.
  Source: Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv:2404.10830.
  """
  document, start, end = _cut_up(text, permutation)
  bins = best_fit_bins(end - start, text.raw_length)
  order = np.argsort(bins, kind='stable')
  offsets = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=1 if len(bins) else 0))])
  return Packed(document[order], start[order], end[order], offsets)


def best_fit_bins(lengths: np.ndarray, capacity: int) -> np.ndarray:
  """The bin of each item by best-fit decreasing, whole groups of equal items and equal bins at a time."""
  order = np.argsort(-lengths, kind='stable')
  bins = np.empty(len(lengths), np.int64)
  sizes, counts = np.unique(lengths, return_counts=True)
  rooms: dict[int, list[np.ndarray]] = collections.defaultdict(list)  # room left -> bins with that room
  known, num_bins, done = 0, 0, 0                                     # bit r of known: some bin has room r
  for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
    items, placed = order[done:done + count], 0
    done += count
    while placed < count:
      fitting = known >> size
      room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
      each = room // size                                             # the fullest stays the fullest until it is full
      wanted = -(-(count - placed) // each)
      if fitting:
        chosen = rooms[room].pop()
        if len(chosen) > wanted:
          rooms[room].append(chosen[wanted:])
          chosen = chosen[:wanted]
        if not rooms[room]:
          known ^= 1 << room
      else:
        chosen = np.arange(num_bins, num_bins + wanted)
        num_bins += wanted
      taken = min(count - placed, each * len(chosen))
      bins[items[placed:placed + taken]] = np.repeat(chosen, each)[:taken]
      placed += taken
      whole = taken // each                                           # bins that took all they could
      for part, left in ((chosen[:whole], room - each * size), (chosen[whole:], room - taken % each * size)):
        if len(part) and left:
          rooms[left].append(part)
          known |= 1 << left
  return bins


class Planner(NamedTuple):
  """How windows are made, and whether anew every epoch; (Lengths, Permutation or None) -> plan."""
  make: Callable[[Lengths, Permutation | None], Any]
  by_epoch: bool


PLANNERS = {'concatenated': Planner(concatenated, True), 'best_fit': Planner(best_fit, True),
            'contiguous': Planner(contiguous, False), 'padded': Planner(padded, False)}


def make_plan(store: Store, packing: str, raw_length: int, overlap: int, seed: int, source: int, epoch: int,
              shuffle: bool):
  """The plan of an epoch of a store; large ones are kept as files beside the store, where that can be written."""
  planner = lookup(PLANNERS, packing, 'packing')
  anew = planner.by_epoch and shuffle
  key = [FORMAT, store.key, packing, raw_length, overlap, [seed, source, epoch] if anew else None]
  folder = store.folder / 'plans' / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
  if len(store.train) >= CACHED_FROM and folder.exists():
    arrays = {file.stem: np.load(file, mmap_mode='r') for file in folder.glob('*.npy')}
    return Cut(**arrays, raw_length=raw_length, overlap=overlap) if 'order' in arrays else Packed(**arrays)
  text = Lengths(store.train, store.lengths[store.train], raw_length, overlap)
  plan = planner.make(text, Permutation(len(text.document), seed, source, epoch, 1) if anew else None)
  if len(store.train) >= CACHED_FROM:
    with contextlib.suppress(OSError):
      _keep(folder, plan.arrays)
  return plan


def _keep(folder, arrays: dict[str, np.ndarray]) -> None:
  """Writes a plan; the folder appears whole. The oldest beyond CACHED_PLANS go; whoever maps one keeps it."""
  temporary = folder.with_name(f'{folder.name}.{os.getpid()}.tmp')
  temporary.mkdir(parents=True)
  for name, array in arrays.items():
    np.save(temporary / f'{name}.npy', array)
  temporary.rename(folder)
  kept = sorted(folder.parent.iterdir(), key=lambda f: f.stat().st_mtime_ns)
  for old in kept[:-CACHED_PLANS]:
    for file in old.glob('*.npy'):
      file.unlink()
    old.rmdir()


# ---- the stream --------------------------------------------------------------------------------------------------


def assemble(store: Store, pieces: Pieces, rows: int, raw_length: int, filler: int) -> dict[str, np.ndarray]:
  """Windows of text as an objective reads them: tokens, segment_ids, positions, starts, each [rows, raw_length]."""
  shape = rows, raw_length
  if not len(pieces.row):
    zeros = np.zeros(shape, np.int32)
    return dict(tokens=zeros + np.int32(filler), segment_ids=zeros, positions=zeros, starts=zeros.astype(bool))
  length = pieces.end - pieces.start
  ends = np.cumsum(length)
  begins = ends - length
  count = np.bincount(pieces.row, minlength=rows)
  first = np.cumsum(count) - count                                    # first piece of each row
  begin_of_row = begins[np.minimum(first, len(begins) - 1)]
  place = begins - begin_of_row[pieces.row] + pieces.row * raw_length  # in the flat arrays
  segment = (np.arange(len(length)) - first[pieces.row] + 1).astype(np.int32)
  tokens = np.full(rows * raw_length, filler, np.int32)
  store.copy(pieces.document, pieces.start, length, tokens, place)
  starts = np.zeros(rows * raw_length, bool)
  starts[place[pieces.start == 0]] = True
  total = int(ends[-1])
  segments = np.repeat(segment, length)
  positions = np.arange(total, dtype=np.int32) - np.repeat(begins.astype(np.int32), length)
  if total != rows * raw_length:
    where = np.arange(total) + np.repeat(place - begins, length)
    padded_segments, padded_positions = np.zeros((2, rows * raw_length), np.int32)
    padded_segments[where], padded_positions[where] = segments, positions
    segments, positions = padded_segments, padded_positions
  return dict(tokens=tokens.reshape(shape), segment_ids=segments.reshape(shape), positions=positions.reshape(shape),
              starts=starts.reshape(shape))


SECOND = 1 << 62  # where in a row's random numbers those begin that choose its second text; an objective needs few


def second_texts(store: Store, candidates: np.ndarray, pieces: Pieces, seed: int, numbers: np.ndarray,
                 raw_length: int) -> np.ndarray:
  """int32 [rows, raw_length]: text of a document that is not in the row, -1 where it has ended.

  It depends on (seed, the row's number) and the row's documents alone, and begins anywhere in its document.

  Args:
    candidates: documents to choose from.
  """
  out = np.full((len(numbers), raw_length), -1, np.int32)
  for row, number in enumerate(numbers.tolist()):
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64), counter=SECOND))
    own = set(pieces.document[pieces.row == row].tolist())
    at = int(rng.integers(len(candidates)))
    turns = (int(candidates[(at + i) % len(candidates)]) for i in range(min(len(own) + 1, len(candidates))))
    document = next((d for d in turns if d not in own), int(candidates[at]))
    length = int(store.lengths[document])
    start = int(rng.integers(max(length - 1, 1)))
    text = store.read(document, start, min(start + raw_length, length))
    out[row, :len(text)] = text
  return out


def check_second(store: Store, documents: np.ndarray, objective) -> None:
  """Refuses an objective that needs another document's text where there is none."""
  if objective.second and len(documents) < 2:
    raise JaxlmError(f'This objective pairs texts of two documents, but source {store.name!r} has {len(documents)} to '
                     'choose from; set config.data.document to what divides it, or give more files.')


def examples_of(objective, items: dict[str, np.ndarray], seed: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
  """The objective's arrays for a block of windows; each row's rng depends on (seed, its number) alone."""
  if not objective.random:
    return objective.example(items, None)
  rows = [objective.example({k: v[r] for k, v in items.items()},
                            np.random.Generator(np.random.Philox(key=np.array([seed, n], np.uint64))))
          for r, n in enumerate(numbers.tolist())]
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class Stream:
  """The endless sequence of training examples: `sample(i)` is a pure function of (config, i).

  Pickles, for worker processes.

  Args:
    config: the whole config; seed, seq_len, data and model.vocab_size are read.
    stores: one for each source of the mixture, in its order.
    objective: an `objectives.Objective`.
    vocab: the tokenizer's.
  Raises:
    JaxlmError: a store without training text, weights that do not fit the sources, or ids that the model lacks.
  """

  def __init__(self, config, stores: Sequence[Store], objective, vocab):
    data = config.data
    phases = [(0, tuple(weights(data, [store.num_train_tokens for store in stores]))),
              *((n, tuple(w)) for n, w in data.phases)]
    for start, given in phases:
      if len(given) != len(stores):
        raise JaxlmError(f'config.data.phases: the weights {given} from example {start} on are {len(given)}, but '
                         f'there are {len(stores)} sources; give one weight each.')
    for (start, _), (following, _) in zip(phases, phases[1:]):
      if following <= start:
        raise JaxlmError(f'config.data.phases: example {following} comes after {start}; first examples must rise, '
                         'from 1 on.')
    check_ids(stores, vocab, config.model.vocab_size, objective.ids)
    self._setup(list(stores), objective, vocab.filler, phases, objective.raw_length(config.seq_len), config.seed,
                data.packing, data.shuffle)

  def _setup(self, *arguments):
    (self.stores, self.objective, self.filler, phases, self.raw_length, self.seed, self.packing,
     self.shuffle) = self._arguments = arguments
    self._plans: dict[tuple[int, int], Any] = {}
    windows = [self._plan(source, 0).windows for source in range(len(self.stores))]
    for store, count in zip(self.stores, windows):
      if not count:
        raise JaxlmError(f'Source {store.name!r} has no text to train on: {store.manifest["documents"]} documents, '
                         f'{store.manifest["heldout_documents"]} of them held out; lower config.data.holdout or give '
                         'more text.')
      check_second(store, store.train, self.objective)
    self.schedule = Schedule(phases, windows, self.seed, self.shuffle)

  def __reduce__(self):
    return _stream, self._arguments

  def _plan(self, source: int, epoch: int):
    if not (self.shuffle and lookup(PLANNERS, self.packing, 'packing').by_epoch):
      epoch = 0
    return remembered(self._plans, (source, epoch), 2 * len(self.stores), lambda: make_plan(
        self.stores[source], self.packing, self.raw_length, self.objective.overlap, self.seed, source, epoch,
        self.shuffle))

  def plan(self, i: int) -> tuple[int, int, int]:
    """(source, epoch, window) of example i."""
    source, epoch, window = self.schedule.locate(np.array([i]))
    return int(source[0]), int(epoch[0]), int(window[0])

  def documents(self, i: int) -> list[dict[str, Any]]:
    """Where example i comes from: a dict a piece, with source, file, offset, document, start and end (in tokens)."""
    source, epoch, window = self.plan(i)
    store, pieces = self.stores[source], self._plan(source, epoch).pieces(np.array([window]))
    found = []
    for _, document, start, end in zip(*(column.tolist() for column in pieces)):
      file, offset = store.provenance(document)
      found.append(dict(source=store.name, file=file, offset=offset, document=document, start=start, end=end))
    return found

  def items(self, examples: np.ndarray) -> dict[str, np.ndarray]:
    """The windows of text of many examples, as an objective reads them."""
    source, epoch, window = self.schedule.locate(examples)
    groups = np.unique(np.stack([source, epoch]), axis=1).T.tolist()
    items: dict[str, np.ndarray] = {}
    for number, turn in groups:
      here = np.flatnonzero((source == number) & (epoch == turn))
      store, pieces = self.stores[number], self._plan(number, turn).pieces(window[here])
      part = assemble(store, pieces, len(here), self.raw_length, self.filler)
      if self.objective.second:
        part['second'] = second_texts(store, store.train, pieces, self.seed, examples[here], self.raw_length)
      if len(groups) == 1:
        return part
      for key, value in part.items():
        items.setdefault(key, np.empty((len(examples), self.raw_length), value.dtype))[here] = value
    return items

  def examples(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Many examples, a row each, with the keys of `types.BATCH` but `example_ids`."""
    numbers = np.asarray(numbers, np.int64)
    return examples_of(self.objective, self.items(numbers), self.seed, numbers)

  def sample(self, i: int) -> dict[str, np.ndarray]:
    """Example i alone."""
    return {key: value[0] for key, value in self.examples(np.array([i])).items()}


def _stream(*arguments) -> Stream:
  stream = Stream.__new__(Stream)
  stream._setup(*arguments)
  return stream


def check_ids(stores: Sequence[Store], vocab, model_size: int, special: Sequence[int] = ()) -> None:
  """Refuses stores that hold ids beyond the model's vocabulary, and special tokens that are.

  Args:
    model_size: config.model.vocab_size; 0 means the tokenizer's.
    special: ids that the objective writes.
  Raises:
    JaxlmError: an id that the model has no embedding for. (Indexing would clamp it silently.)
  """
  size = model_size or vocab.size
  for store in stores:
    highest = max(store.manifest['max_id'], vocab.filler)
    if highest >= size:
      raise JaxlmError(f'Source {store.name!r} was tokenised by {store.manifest["tokenizer"]!r} and holds id '
                       f'{highest}, but the model has {size} ids; set config.model.vocab_size to 0 or at least '
                       f'{highest + 1}, or use the tokenizer that belongs to the model.')
  if max(special, default=0) >= size:
    raise JaxlmError(f'The objective writes special tokens up to id {max(special)}, but the model has {size} ids; set '
                     f'config.model.vocab_size to 0 or at least {max(special) + 1}.')
