"""Where a text comes from: training documents behind what a model says, text it knows by heart, leaked tests.

All three compare token ids, so a paraphrase is not found, nor text that a tokenizer cuts otherwise where it stands (the
first and the last token of a passage, usually). They are functions of ids and an index; results are plain dicts that
JSON holds, and each of their rows has a readable `line`.
"""
import collections
import math
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from jaxlm.data.shards import Store
from jaxlm.data.suffixes import Suffixes
from jaxlm.errors import JaxlmError

Continue = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, most new tokens) -> greedy continuations


# ---- training documents behind a text ----------------------------------------------------------------------------


def provenance(index: Suffixes, ids: Sequence[int], shortest: int = 8, most: int = 5,
               decode: Callable[[list[int]], str] | None = None) -> dict[str, Any]:
  """The passages of a text that are in the training documents word for word, and in which.

  A passage is as long as it can be: none lies within another, though they may overlap. Those come first that chance
  explains least: `bits` is what the passage's tokens would need if drawn one by one as often as the store has them,
  so a long passage of rare tokens leads. That a passage stands in a document does not show that the model took it
  from there.

  Args:
    ids: of a generated text.
    shortest: tokens of a passage that counts; for bytes or characters, give several times as many.
    most: documents named for each passage, those with most occurrences first.
    decode: makes a line show the passage's own words.
  Returns:
    tokens; covered, the share of them in a passage; rows: start, end, tokens, bits, occurrences, documents (how many
    have it), sources (document, occurrences, start of the first, file, offset in `unit`s) and line.
  Source: Liu et al. 2025, OLMoTrace, arXiv:2504.07096, section 3.
  """
  spans = _maximal(index.longest(ids), shortest)
  total = index.store.num_train_tokens
  bits = {id: math.log2(total / index.count([id])) for id in {id for start, end in spans for id in ids[start:end]}}
  rows = []
  for start, end in spans:
    documents, sources = _sources(index, ids[start:end], most)
    rows.append(dict(start=start, end=end, tokens=end - start, bits=round(sum(bits[id] for id in ids[start:end]), 1),
                     occurrences=index.count(ids[start:end]), documents=documents, sources=sources))
  rows.sort(key=lambda row: (-row['bits'], row['occurrences'], row['start']))
  for row in rows:
    row['line'] = (f'tokens {row["start"]} to {row["end"]} ({row["tokens"]} tokens, {row["bits"]:.0f} bits): '
                   f'{_times(row["occurrences"])} in {_number(row["documents"], "document")}, '
                   f'{_place(index.store, row["sources"][0])}')
    if decode:
      row['line'] += f': {decode(list(ids[row["start"]:row["end"]]))!r}'
  return dict(tokens=len(ids), shortest=shortest, covered=_share(_covered(spans, len(ids)).sum(), len(ids)), rows=rows)


def _maximal(longest: np.ndarray, shortest: int) -> list[tuple[int, int]]:
  """(start, end) of the matches that lie in no other; ends never fall, so those whose end is new."""
  ends = np.arange(len(longest)) + longest
  new = np.diff(ends, prepend=-1) > 0
  starts = np.flatnonzero(new & (longest >= shortest))
  return list(zip(starts.tolist(), ends[starts].tolist()))


def _covered(spans: Sequence[tuple[int, int]], size: int) -> np.ndarray:
  """bool [size], which tokens lie in a span."""
  covered = np.zeros(size, bool)
  for start, end in spans:
    covered[start:end] = True
  return covered


def _sources(index: Suffixes, ids: Sequence[int], most: int) -> tuple[int, list[dict[str, Any]]]:
  """How many documents have a sequence, and some of them."""
  documents, starts = index.occurrences(ids)
  unique, first, counts = np.unique(documents, return_index=True, return_counts=True)
  chosen = np.argsort(-counts, kind='stable')[:most]
  return len(unique), [_source(index.store, int(unique[i]), occurrences=int(counts[i]), start=int(starts[first[i]]))
                       for i in chosen]


def _source(store: Store, document: int, **more: Any) -> dict[str, Any]:
  file, offset = store.provenance(document)
  return dict(document=document, **more, file=file, offset=offset, unit=store.manifest['unit'])


# ---- text known by heart -----------------------------------------------------------------------------------------

UNSEEN = '0'  # the bucket of held-out text
Z = 1.96      # of intervals: 95%


class _Sample(NamedTuple):
  """A text of the store, in two parts: what the model is given, and what follows it there."""
  document: int
  start: int
  repeats: int
  prompt: list[int]
  target: list[int]


def memorised(index: Suffixes, continue_: Continue, prefix: int = 50, length: int = 50, samples: int = 500,
              draws: int = 20_000, near: float = 0.1, batch_size: int = 64, seed: int = 0) -> dict[str, Any]:
  """How much training text a model recites when given what stands before it, by how often the text is repeated.

  Texts of `prefix` + `length` tokens are drawn evenly from all places of the training documents that have room, equal
  ones counted once, and put into buckets by how often the store has them: 1, 2-10, 11-100 and so on. The model
  recites one if its greedy continuation is what follows (`exact`), and nearly (`near`) if the edit distance is at most
  that share of `length`; these two are what papers count. It is `memorised` if it is exact and not predictable, for
  which nobody needs to have seen that document:

    the store has the continuation as often, or more often, after another prefix (licences, page headers);
    or the model says it after the same prefix with its tokens shuffled (runs, repeated tokens);
    or the model says the same at a place where something else follows (a favourite phrase).

  So text seen once that is recited is flagged, in bucket 1, unless it is predictable: being unique is no excuse. What
  is left of chance is in bucket 0: the same measure on held-out text that the training documents do not have. A bucket
  is `above_chance` if its 95% interval lies above that of bucket 0; None if there is no held-out text to say.
  Intervals are Wilson's and take texts as independent; those of one document are not, quite.

  Args:
    continue_: the model, greedy. Called with up to `batch_size` prompts of `prefix` tokens each; results may be
      shorter than `length`, and what is longer is cut.
    samples: texts measured a bucket, at most.
    draws: places drawn to fill the buckets; more find rarer repeats.
  Returns:
    the arguments; share, of all training places, that is memorised: the buckets weighed by what was drawn; rows:
    repeats, drawn (places), texts, exact, near, predictable, memorised, share, low, high, above_chance and line;
    found: each text that is memorised or nearly so, rarest first, with its document.
  Raises:
    JaxlmError: no document is long enough, or continuations are not as many as prompts.
  Source: Carlini et al. 2023, Quantifying Memorization, arXiv:2202.07646; near: Ippolito et al. 2023, Preventing
    Verbatim Memorization in Language Models Gives a False Sense of Privacy, arXiv:2210.17546.
  """
  store = index.store
  drawn, buckets = _drawn(index, store.train, prefix, length, samples, draws, seed)
  if not drawn:
    raise JaxlmError(f'No training document of store {store.name!r} has prefix + length = {prefix + length} tokens, '
                     f'the longest has {int(store.lengths[store.train].max())} with its ends; lower prefix or length.')
  # Held-out text that training documents have too is no measure of chance.
  _, unseen = _drawn(index, store.heldout, prefix, length, samples, draws, seed)
  buckets = {UNSEEN: unseen[UNSEEN]} | buckets if UNSEEN in unseen else buckets
  taken = [(name, sample) for name, bucket in buckets.items() for sample in bucket]
  texts = [sample for _, sample in taken]
  limit = near * length
  said = _continued(continue_, [sample.prompt for sample in texts], length, batch_size)
  distances = edit_distances(said, np.array([sample.target for sample in texts]))
  close = np.flatnonzero(distances <= limit).tolist()
  predictable = _predictable(index, continue_, texts, said, close, length, limit, batch_size, seed)
  rows, found = [], []
  for name in buckets:
    here = [i for i in close if taken[i][0] == name]
    exact = [i for i in here if not distances[i]]
    known = [i for i in exact if i not in predictable]
    low, high = _wilson(len(known), len(buckets[name]))
    rows.append(dict(repeats=name, drawn=drawn.get(name, 0), texts=len(buckets[name]), exact=len(exact),
                     near=len(here), predictable=sum(i in predictable for i in here), memorised=len(known),
                     share=_share(len(known), len(buckets[name])), low=low, high=high))
    if name != UNSEEN:
      found += [_found(store, texts[i], int(distances[i])) for i in here if i not in predictable]
  chance = next((row['high'] for row in rows if row['repeats'] == UNSEEN), None)
  for row in rows:
    row['above_chance'] = None if chance is None else row['low'] > chance
    row['line'] = _told(row)
  return dict(prefix=prefix, length=length, samples=samples, draws=draws, near=near, seed=seed,
              share=_share(sum(row['share'] * row['drawn'] for row in rows), sum(drawn.values())), rows=rows,
              found=sorted(found, key=lambda text: (text['repeats'], text['distance'], text['document'])))


def _told(row: dict[str, Any]) -> str:
  seen = {UNSEEN: 'held out', '1': 'seen once'}.get(row['repeats'], f'seen {row["repeats"]} times')
  line = (f'{seen}: {row["memorised"]} of {_number(row["texts"], "text")} memorised ({row["share"]:.1%}, 95% interval '
          f'{row["low"]:.1%} to {row["high"]:.1%}); {row["exact"]} recited, {row["near"]} nearly or wholly, '
          f'{row["predictable"]} of them predictable')
  if row['repeats'] == UNSEEN:
    return f'{line}; this is what chance gives'
  return line + {True: '; above chance', False: '; not above chance', None: '; no held-out text to compare with'}[
      row['above_chance']]


def _found(store: Store, text: _Sample, distance: int) -> dict[str, Any]:
  source = _source(store, text.document, start=text.start)
  how = 'recited' if not distance else f'recited but for {_number(distance, "edit")}'
  return dict(source, repeats=text.repeats, distance=distance, target=text.target,
              line=f'seen {_times(text.repeats)}, {how}: {_place(store, source)}')


def _drawn(index: Suffixes, documents: np.ndarray, prefix: int, length: int, samples: int, draws: int,
           seed: int) -> tuple[dict[str, int], dict[str, list[_Sample]]]:
  """How many places were drawn of each bucket, rarest first, and up to `samples` unlike texts of each."""
  store = index.store
  first, last = (int(store.manifest['settings'][end]) for end in ('bos', 'eos'))  # texts without end tokens
  room = np.maximum(store.lengths[documents] - first - last - prefix - length + 1, 0)
  ends = np.cumsum(room)
  total = int(room.sum())
  numbers = np.random.default_rng(seed).choice(total, min(draws, total), replace=False) if total else np.empty(0, int)
  rows = np.searchsorted(ends, numbers, 'right')
  starts = numbers - ends[rows] + room[rows] + first
  drawn, buckets, known = collections.Counter(), collections.defaultdict(list), set()
  for document, start in zip(documents[rows].tolist(), starts.tolist()):
    ids = store.read(document, start, start + prefix + length)
    repeats = index.count(ids)
    name = _bucket(repeats)
    drawn[name] += 1
    if len(buckets[name]) < samples and ids.tobytes() not in known:
      known.add(ids.tobytes())
      buckets[name].append(_Sample(document, start, repeats, ids[:prefix].tolist(), ids[prefix:].tolist()))
  order = sorted(drawn, key=lambda name: int(name.partition('-')[0]))
  return {name: drawn[name] for name in order}, {name: buckets[name] for name in order}


def _bucket(repeats: int) -> str:
  """0, 1, 2-10, 11-100, 101-1000, …"""
  if repeats < 2:
    return str(repeats)
  tens = len(str(repeats - 1))
  return f'{10 ** (tens - 1) + 1}-{10 ** tens}'


def _continued(continue_: Continue, prompts: list[list[int]], length: int, batch_size: int) -> list[list[int]]:
  said = []
  for i in range(0, len(prompts), batch_size):
    batch = prompts[i:i + batch_size]
    answers = continue_(batch, length)
    if len(answers) != len(batch):
      raise JaxlmError(f'Wanted a continuation of each of {len(batch)} prompts, got {len(answers)}; continue_(prompts, '
                       'length) must return one list of ids for each.')
    said += [list(answer)[:length] for answer in answers]
  return said


def _predictable(index: Suffixes, continue_: Continue, texts: list[_Sample], said: list[list[int]], close: list[int],
                 length: int, limit: float, batch_size: int, seed: int) -> set[int]:
  """Which of the recited texts need no memory of their document; see `memorised`."""
  shuffled = [np.random.default_rng([seed, texts[i].document, texts[i].start]).permutation(texts[i].prompt).tolist()
              for i in close]
  again = _continued(continue_, shuffled, length, batch_size)
  phrases = {tuple(said[i]) for i in set(range(len(texts))) - set(close)}
  found = set()
  for i, answer in zip(close, again):
    elsewhere = index.count(texts[i].target) - texts[i].repeats
    distance = edit_distances([answer], np.array([texts[i].target]))[0]
    if elsewhere >= max(texts[i].repeats, 1) or distance <= limit or tuple(said[i]) in phrases:
      found.add(i)
  return found


def edit_distances(said: Sequence[Sequence[int]], targets: np.ndarray) -> np.ndarray:
  """int64 [N]: insertions, deletions and substitutions that make each sequence its target.

  Args:
    targets: ids [N, L]; the sequences may be of any length.
  Source: Wagner and Fischer 1974, The String-to-String Correction Problem.
  """
  lengths = np.array([len(s) for s in said], int)
  padded = np.full((len(said), int(lengths.max(initial=0))), -1)
  for row, ids in zip(padded, said):
    row[:len(ids)] = ids
  steps = np.arange(targets.shape[1] + 1)
  row = np.tile(steps, (len(said), 1))
  for i in range(padded.shape[1]):
    best = np.minimum(row[:, 1:] + 1, row[:, :-1] + (padded[:, i:i + 1] != targets))
    new = np.concatenate([row[:, :1] + 1, best], axis=1)
    new = np.minimum.accumulate(new - steps, axis=1) + steps  # insertions
    row = np.where(i < lengths[:, None], new, row)
  return row[:, -1]


def _wilson(hits: int, of: int) -> tuple[float, float]:
  """The 95% interval of a share.

  Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
  """
  share, scale = hits / of, 1 + Z * Z / of
  centre = (share + Z * Z / (2 * of)) / scale
  half = Z / scale * math.sqrt(share * (1 - share) / of + Z * Z / (4 * of * of))
  return max(centre - half, 0.0), min(centre + half, 1.0)


# ---- leaked tests ------------------------------------------------------------------------------------------------


def contamination(index: Suffixes, texts: Sequence[Sequence[int]], n: int = 13, threshold: float = 0.2,
                  least: int = 8, most: int = 5) -> dict[str, Any]:
  """Which examples of a test set are in the training documents, and in which.

  An example is `flagged` if at least `threshold` of its tokens lie in one of its n-grams that the store has. (GPT-3
  asks for one 13-gram, which is `any`; Llama 2 calls a sample not clean from 20% on, the default here, and dirty from
  80%.) What all examples share, a template or an instruction, counts like the rest: give examples without it.

  An example of fewer than n tokens is looked for by its `least`-grams, and its row has a note. One of fewer than
  `least` is `undecided`, whether the store has it or not: so few tokens occur by chance, and their absence says little.

  Args:
    texts: ids of each example, by the store's tokenizer, without end tokens.
    n: in tokens, 8 to 13 for subwords; for bytes or characters, give several times as many.
    most: documents named for each example, those with its longest passages first.
  Returns:
    the arguments; examples, flagged, clean, undecided, any (how many); share flagged of those decided; rows: example,
    verdict, n, tokens, ngrams (share of its n-grams in the store), covered (share of its tokens in those), longest
    (share of it that its longest match is), sources, note and line.
  Source: Brown et al. 2020, GPT-3, arXiv:2005.14165, appendix C; Touvron et al. 2023, Llama 2, arXiv:2307.09288,
    appendix A.6.
  """
  if not 1 <= least <= n:
    raise JaxlmError(f'contamination wants 1 <= least <= n, got least={least}, n={n}; lower least, or raise n.')
  rows = [_example(index, number, list(ids), n, threshold, least, most) for number, ids in enumerate(texts)]
  verdicts = collections.Counter(row['verdict'] for row in rows)
  flagged, clean = verdicts['flagged'], verdicts['clean']
  return dict(n=n, threshold=threshold, least=least, examples=len(rows), flagged=flagged, clean=clean,
              undecided=verdicts['undecided'], any=sum(row['ngrams'] > 0 for row in rows),
              share=_share(flagged, flagged + clean), rows=rows)


def _example(index: Suffixes, number: int, ids: list[int], n: int, threshold: float, least: int,
             most: int) -> dict[str, Any]:
  used, note = (n, '') if len(ids) >= n else (min(least, max(len(ids), 1)), 'shorter than n: {}-grams instead')
  matches = index.longest(ids) if ids else np.empty(0, int)
  spans = _maximal(matches, used)
  covered = _share(_covered(spans, len(ids)).sum(), len(ids))
  verdict = 'flagged' if covered >= threshold and spans else 'clean'
  if len(ids) < least:
    verdict = 'undecided'
    note = ('too short to tell, ' + ('the store has all of it' if spans else 'the store has not all of it')
            if ids else 'empty')
  row = dict(example=number, verdict=verdict, n=used, tokens=len(ids),
             ngrams=_share((matches >= used).sum(), len(ids) - used + 1), covered=covered,
             longest=_share(matches.max(initial=0), len(ids)), sources=_leaking(index, ids, spans, most),
             note=note.format(used))
  row['line'] = (f'example {number}: {verdict}, {row["covered"]:.0%} of {_number(len(ids), "token")} in '
                 f'{row["ngrams"]:.0%} of its {used}-grams, longest match {row["longest"]:.0%}')
  if row['sources']:
    row['line'] += f'; {_place(index.store, row["sources"][0])}'
  if note:
    row['line'] += f' ({row["note"]})'
  return row


def _leaking(index: Suffixes, ids: list[int], spans: list[tuple[int, int]], most: int) -> list[dict[str, Any]]:
  """Documents that have passages of an example, with their longest, longest first."""
  found: dict[int, dict[str, Any]] = {}
  for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
    for document, at in index.find(ids[start:end], most):
      found.setdefault(document, dict(tokens=end - start, start=at))
    if len(found) >= most:
      break
  return [_source(index.store, document, **what) for document, what in list(found.items())[:most]]


# ---- lines -------------------------------------------------------------------------------------------------------


def _share(part: float, whole: float) -> float:
  return float(part / whole) if whole else 0.0


def _number(count: int, noun: str) -> str:
  return f'{count} {noun}' if count == 1 else f'{count} {noun}s'


def _times(count: int) -> str:
  return 'once' if count == 1 else f'{count} times'


def _place(store: Store, source: dict[str, Any]) -> str:
  return (f'{source["file"]} at {source["unit"]} {source["offset"]}, document {source["document"]}, token '
          f'{source["start"]}')
