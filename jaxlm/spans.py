"""Spans of text are cut out and predicted: T5's corruption, UL2's mixture of it, BART's noise.

What is corrupted becomes a source and a target. A span is cut out of the row as a whole: where it reaches across the
end of a document, which masked documents allow, its second part is cut out of the next one without a sentinel of its
own. That document's target then begins with the text before its source. So lengths stay exact whatever a row holds.
"""
import functools
import math
from typing import Callable, NamedTuple, Sequence

import numpy as np

from jaxlm import rows
from jaxlm.rows import Example, Item, Row

Part = tuple[np.ndarray, np.ndarray]  # (tokens, segments)


class Layout(NamedTuple):
  """How source and target become a row: T5's two, or one after the other in a decoder.

  Attributes:
    source, target: columns of either; with `together` source is 0 and target is the row's.
    start: what the decoder reads first.
  """
  source: int
  target: int
  together: bool
  start: int
  filler: int

  def __call__(self, source: Part, target: Part) -> Example:
    if self.together:
      return rows.joined(source, target, self.target, self.filler)
    return rows.translated(source, target, (self.source, self.target), self.start, self.filler)


# ---- where the noise is ------------------------------------------------------------------------------------------


def counts(n: int, rate: float, mean: float) -> tuple[int, int]:
  """(tokens cut out, spans) of a row of n; mean 0: one span."""
  noise = min(max(round(n * rate), 1), n - 1) if n > 1 else 0
  spans = max(round(noise / mean), 1) if mean else 1
  return noise, min(spans, noise, n - noise)


def noise(n: int, num_noise: int, num_spans: int, tail: bool, rng) -> np.ndarray:
  """bool [N]: spans alternate, beginning with text; all masks with these counts are equally likely.

  T5's end with noise, always. With `tail` text may follow, and noise is as likely there as elsewhere.

  Source: Raffel et al. 2019, T5, arXiv:1910.10683, 3.1.4; its `random_spans_noise_mask`.
  """
  if not num_spans:
    return np.zeros(n, bool)
  spans = rows.split(num_noise, num_spans, rng)
  if tail:
    kept = rows.split(n - num_noise + 1, num_spans + 1, rng)
    kept[-1] -= 1
  else:
    kept = rows.split(n - num_noise, num_spans, rng)
  lengths = np.zeros(2 * len(kept), np.int64)
  lengths[::2], lengths[1:2 * num_spans:2] = kept, spans
  return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def longest(fits: Callable[[int], bool], at_most: int) -> int:
  """The largest n that fits, by trying one after the other: lengths grow with n."""
  n = 1
  while n < at_most and fits(n + 1):
    n += 1
  return n


# ---- T5 ----------------------------------------------------------------------------------------------------------


def cut(row: Row, noise_N: np.ndarray, sentinels: np.ndarray, eos: int | None) -> tuple[Part, Part]:
  """Spans become sentinels, numbered anew in each segment; the target is each sentinel and its span.

  Args:
    eos: ends the source and the target of the row's last segment.
  """
  begins = rows.changes(row.segments)
  starts = noise_N.copy()
  starts[1:] &= ~noise_N[:-1]
  number = rows.counted(starts, begins) - 1
  kept = ~noise_N | starts
  source = np.where(starts, sentinels[number], row.tokens)[kept]
  copies = noise_N + starts.astype(np.int64)
  index = np.repeat(np.arange(len(noise_N)), copies)
  target = row.tokens[index]
  target[np.cumsum(copies)[starts] - 2] = sentinels[number[starts]]
  parts = (source, row.segments[kept]), (target, row.segments[index])
  if eos is None or not len(noise_N):
    return parts
  return tuple((np.append(tokens, eos), np.append(segments, row.segments[-1])) for tokens, segments in parts)


def restore(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list[int]:
  """The text of one segment, from what `cut` made of it, an end-of-text of each left out."""
  places = set(int(s) for s in sentinels)
  found: dict[int, list[int]] = {}
  here = text = []
  for token in map(int, target):
    if token in places:
      here = found[token] = []
    else:
      here.append(token)
  return text + [t for token in map(int, source) for t in (found[token] if token in places else [token])]


def t5_lengths(n: int, rate: float, mean: float) -> tuple[int, int]:
  """(source, target) of a row of n tokens, each with its end-of-text."""
  num_noise, num_spans = counts(n, rate, mean)
  return n - num_noise + num_spans + 1, num_noise + num_spans + 1


def cut_raw(seq_len: int, laws: tuple[tuple[float, float], ...], together: bool, lead: int) -> int:
  """The longest text whose source and target fit, whichever noise is drawn; `lead` tokens stand before the source."""
  def columns(source: int, target: int) -> int:
    return lead + source + target - 1 if together else max(lead + source, target)
  fits = lambda n: max(columns(*t5_lengths(n, rate, mean)) for rate, mean in laws) <= seq_len
  return longest(fits, 2 * seq_len)


def cut_target(seq_len: int, raw: Callable[[int], int], laws: tuple[tuple[float, float], ...]) -> int:
  """Columns of the target, whichever noise is drawn."""
  return max(t5_lengths(raw(seq_len), rate, mean)[1] for rate, mean in laws)


def t5(item: Item, rng, rate: float, mean: float, tail: bool, sentinels: np.ndarray, eos: int, mask_documents: bool,
       layout: Layout) -> Example:
  """Span corruption: exactly so many tokens are cut out, in exactly so many spans, and no column is left over."""
  row = rows.text(item, mask_documents)
  n = len(row.tokens)
  return layout(*cut(row, noise(n, *counts(n, rate, mean), tail, rng), sentinels, eos))


# ---- UL2 ---------------------------------------------------------------------------------------------------------


class Denoiser(NamedTuple):
  """One of a mixture: the token that names its mode, its noise, and how often it is drawn. mean 0: the row's end."""
  mode: int
  rate: float
  mean: float
  weight: float


def ul2(item: Item, rng, denoisers: tuple[Denoiser, ...], sentinels: np.ndarray, eos: int, mask_documents: bool,
        layout: Layout) -> Example:
  """One denoiser a row; every document's source begins with the token of its mode.

  Columns are kept for one document. Where more do not fit, as many fewer spans are cut, and if there are no more, the
  last documents have no mode token.

  Source: Tay et al. 2022, UL2, arXiv:2205.05131, table 1 and 3.1.
  """
  row = rows.text(item, mask_documents)
  n = len(row.tokens)
  weights = np.cumsum([d.weight for d in denoisers])
  denoiser = denoisers[np.searchsorted(weights, rng.random() * weights[-1], 'right')]
  num_noise, num_spans = counts(n, denoiser.rate, denoiser.mean)
  first = row.segments[rows.changes(row.segments)]
  if layout.together:
    room, each = layout.target + 1 - (n + 2), 2
  else:
    room, each = layout.source - (n - num_noise + 1), 1
  num_spans = min(num_spans, max((room - len(first)) // each, 1)) if num_noise else 0
  first = first[:max(room - each * num_spans, 0)]
  mask = noise(n, num_noise, num_spans, denoiser.mean > 0, rng)
  (source, segments), target = cut(row, mask, sentinels, eos)
  segments = np.concatenate([first, segments])
  sort = np.argsort(segments, kind='stable')
  source = np.concatenate([np.full(len(first), denoiser.mode, np.int32), source])[sort]
  return layout((source, segments[sort]), target)


# ---- BART --------------------------------------------------------------------------------------------------------


class Noise(NamedTuple):
  """BART's: the keys of `config.objective.denoising`, and what the vocabulary says."""
  rate: float
  mean: float
  permute: float
  delete: float
  rotate: float
  mask: int
  pieces: object


def most_spans(noise_tokens: float, mean: float, variance: float) -> int:
  """Spans of random lengths that hardly ever are more: the mean of a renewal process and two deviations.

  A draw that reaches it makes its last span as long as it must be (one row in forty).
  """
  return int(np.ceil(noise_tokens / mean + 2 * np.sqrt(noise_tokens * variance / mean ** 3)))


class Law(NamedTuple):
  """Poisson's law of lengths from `shortest` on, those above the table's end cut to it.

  Attributes:
    below: probability of a length of at most l.
    sums: what lengths drawn until they sum to t or more sum to on average, for each t.
  """
  below: np.ndarray
  sums: np.ndarray


@functools.lru_cache(maxsize=256)
def _law(mean: float, shortest: int, size: int) -> Law:
  lengths = np.arange(size + 1)
  p = np.exp(lengths * np.log(mean) - mean - np.array([math.lgamma(x + 1) for x in lengths]))
  p[:shortest] = 0
  p[size] += max(1 - np.exp(-mean) * (shortest > 0) - p.sum(), 0)
  p /= p.sum()
  number = np.zeros(size + 1)  # drawn until they are t or more: one, and what the rest takes; 0 leaves all of it
  for t in range(1, size + 1):
    number[t] = (1 + p[1:t] @ number[t - 1:0:-1]) / (1 - p[0])
  return Law(np.cumsum(p), (p @ lengths) * number)


def _law_for(tokens: float, mean: float, shortest: int) -> Law:
  """A table long enough for so many tokens; few different ones are ever made."""
  return _law(mean, shortest, 1 << max(int(tokens + 4 * mean) + 2, 8).bit_length())


def least(expected: float, mean: float, shortest: int) -> int:
  """Tokens that `drawn` surely covers."""
  return int(np.searchsorted(_law_for(expected, mean, shortest).sums, expected, 'right')) - 1


def drawn(expected: float, mean: float, shortest: int, most: int, limit: int, rng) -> np.ndarray:
  """Lengths that follow Poisson's law and sum to `expected` on average.

  They are drawn until a threshold is reached, and the last one is kept as it is: cut to a fixed sum, lengths would be
  shorter than nominal. The threshold is the one, or the next, for which the sum is right on average (Wald's identity).

  Args:
    shortest: 0 or 1; shorter ones are drawn again.
    most, limit: lengths and tokens there may be at most; what this takes from or adds to the last one is rare.
  """
  law = _law_for(expected, mean, shortest)
  t = int(np.searchsorted(law.sums, expected, 'right')) - 1
  t = min(t + (rng.random() * (law.sums[t + 1] - law.sums[t]) < expected - law.sums[t]), limit)
  lengths = np.searchsorted(law.below[:-1], rng.random(most), 'right') * (t > 0)
  sums = np.cumsum(lengths)
  num = min(int(np.searchsorted(sums, t)) + 1, most) if t else 0
  lengths, sums = lengths[:num], np.minimum(sums[:num], limit)
  sums[-1:] = np.maximum(sums[-1:], t)
  return np.diff(sums, prepend=0)


def bart_length(n: int, rate: float, mean: float) -> int:
  """Columns that the source of n tokens may need."""
  return n - least(rate * n, mean, 0) + (most_spans(rate * n, mean, mean) if rate else 0)


def bart_raw(seq_len: int, rate: float, mean: float, together: bool) -> int:
  """The longest text that fits as a target, and as a source whatever its spans."""
  fits = lambda n: bart_length(n, rate, mean) + (n - 1) * together <= seq_len
  return longest(fits, seq_len)


def bart(item: Item, rng, settings: Noise, mask_documents: bool, layout: Layout) -> Example:
  """The source is the text with sentences permuted, spans of any length behind one mask each; the target is the text.

  Spans of length 0 put a mask where nothing is missing.

  Source: Lewis et al. 2019, BART, arXiv:1910.13461, 2.2.
  """
  row = rows.text(item, mask_documents)
  target = row.tokens, row.segments
  if rng.random() < settings.permute:
    row = permuted(row, settings.pieces, rng)
  if rng.random() < settings.rotate:
    row = rotated(row, rng)
  if settings.delete:
    kept = rng.random(len(row.tokens)) >= settings.delete
    row = Row(*(x[kept] for x in row))
  n = len(row.tokens)
  most = most_spans(settings.rate * n, settings.mean, settings.mean)
  lengths = drawn(settings.rate * n, settings.mean, 0, most, max(n - 1, 0), rng)
  mask, inserted = scattered(n, lengths, rng)
  starts = mask.copy()
  starts[1:] &= ~mask[:-1]
  copies = (~mask | starts) + inserted
  index = np.repeat(np.arange(n), copies)
  source = row.tokens[index]
  hidden = np.arange(len(index)) < np.repeat(np.cumsum(copies) - copies + inserted + starts, copies)
  source[hidden] = settings.mask
  return layout((source, row.segments[index]), target)


def scattered(n: int, lengths: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
  """(bool [N]: spans of these lengths with text between them; int [N]: how many empty ones stand before each token)."""
  spans = lengths[lengths > 0]
  inserted = np.bincount(rng.integers(max(n, 1), size=len(lengths) - len(spans)), minlength=n)[:n]
  total = int(spans.sum())
  spans = spans[:n - total + 1]
  spans[-1:] += total - spans.sum()
  gaps = rows.split(n - total + 2, len(spans) + 1, rng)
  gaps[0] -= 1
  gaps[-1] -= 1
  pattern = np.zeros(2 * len(gaps) - 1, np.int64)
  pattern[::2], pattern[1::2] = gaps, spans
  return np.repeat(np.arange(len(pattern)) % 2 == 1, pattern), inserted


def permuted(row: Row, pieces, rng) -> Row:
  """The sentences of each document in another order; special tokens at its ends stay there."""
  special = pieces.special[row.tokens]
  sentence = np.cumsum(rows.sentence_starts(row, pieces)) - 1
  key = rng.random(sentence[-1] + 1)[sentence] if len(sentence) else np.zeros(0)
  key = np.where(special, np.where(row.begins, -1.0, 2.0), key)
  document = np.cumsum(row.begins)
  sort = np.lexsort((key, document))
  return row._replace(tokens=row.tokens[sort])


def rotated(row: Row, rng) -> Row:
  """Each document begins at another of its tokens, and goes on at its end with what stood before."""
  first = np.flatnonzero(row.begins)
  sizes = np.diff(first, append=len(row.tokens))
  shift = (rng.random(len(first)) * sizes).astype(np.int64)
  document = np.cumsum(row.begins) - 1
  index = first[document] + (rows.since(row.begins) + shift[document]) % sizes[document]
  return row._replace(tokens=row.tokens[index])


# ---- prefix ------------------------------------------------------------------------------------------------------


def prefix_raw(seq_len: int, min_rate: float, max_rate: float) -> int:
  """The longest text of which no drawn part is longer than a row."""
  return int(seq_len / max(max_rate, 1 - min_rate))


def prefix_target(seq_len: int, raw: Callable[[int], int], min_rate: float) -> int:
  """Columns of the target: all but the shortest beginning."""
  return raw(seq_len) - int(min_rate * raw(seq_len))


def prefix(item: Item, rng, min_rate: float, max_rate: float, mask_documents: bool, layout: Layout) -> Example:
  """The source is the beginning of each segment, the target the rest; one share for all of a row.

  Sums of shares are rounded, not shares, so that a row of many documents fits its columns.
  """
  row = rows.text(item, mask_documents)
  share = min_rate + rng.random() * (max_rate - min_rate)
  ends = np.flatnonzero(np.append(rows.changes(row.segments)[1:], True)) + 1 if len(row.tokens) else np.zeros(0, int)
  before = np.diff(np.floor(share * ends).astype(np.int64), prepend=0)
  sizes = np.diff(ends, prepend=0)
  source = rows.within(row.segments) < np.repeat(before, sizes)
  return layout((row.tokens[source], row.segments[source]), (row.tokens[~source], row.segments[~source]))
