"""Text that is produced in an order of its own: prefixes, XLNet's permutations, GLM's blanks."""
from typing import NamedTuple

import numpy as np

from jaxlm import masking, rows, spans
from jaxlm.masking import Masking
from jaxlm.rows import Example, Item, Row


# ---- prefix ------------------------------------------------------------------------------------------------------


def prefix(item: Item, rng, min_rate: float, max_rate: float, mask_documents: bool, filler: int) -> Example:
  """Every segment's beginning is context that all of the segment sees; the rest is predicted from left to right.

  Source: Liu et al. 2018, arXiv:1801.10198; Raffel et al. 2019, T5, arXiv:1910.10683, 3.2.1.
  """
  row = rows.text(item, mask_documents)
  length = len(item['tokens']) - 1
  begins = rows.changes(row.segments)
  sizes = np.diff(np.flatnonzero(begins), append=len(row.tokens))
  share = min_rate + rng.random(len(sizes)) * (max_rate - min_rate)
  known = np.repeat(np.clip((share * sizes).astype(np.int64), 1, np.maximum(sizes - 1, 1)), sizes)
  order = np.maximum(rows.within(row.segments) - known + 1, 0)
  return dict(rows.next_tokens(row.tokens, row.segments, order > 0, length, filler),
              positions=rows.padded(row.positions[:length], length), order=rows.padded(order[:length], length))


# ---- permutation -------------------------------------------------------------------------------------------------


def permutation(item: Item, rng, chosen: Masking, memory: int, mask_documents: bool, filler: int) -> Example:
  """XLNet's: some spans are predicted, token by token in a random order; the rest is context.

  The content stream sees a token from its own place in the order on; the query stream does not see the one it predicts.
  The first `memory` tokens of a row are read once, without gradient.

  Source: Yang et al. 2019, XLNet, arXiv:1906.08237, 2.2 to 2.4.
  """
  length = len(item['tokens']) - memory
  whole = rows.text(item, mask_documents)
  row = Row(*(x[memory:] for x in whole))
  allowed = ~chosen.pieces.special[row.tokens]
  n, M = np.count_nonzero(allowed), masking.slots(chosen, length)
  count = min(rows.about(chosen.rate * n, rng), M, n)
  if len(row.tokens):
    row.begins[0] = True
  index, _ = masking.choose(masking.groups(row, allowed, chosen, rng), allowed, count, rng)
  order = np.zeros(length, np.int32)
  order[index] = rng.permutation(len(index)) + 1
  example = dict(
      tokens=item['tokens'][memory:], segment_ids=rows.padded(row.segments, length),
      positions=rows.padded(row.positions, length), order=order,
      targets=rows.padded(row.tokens[index], M, filler), query_positions=rows.padded(row.positions[index], M),
      query_order=rows.padded(order[index], M), query_segment_ids=rows.padded(row.segments[index], M),
      loss_weights=rows.padded(np.ones(len(index)), M, 0, np.float32))
  if memory:
    example.update(memory_tokens=item['tokens'][:memory],
                   memory_segment_ids=rows.padded(whole.segments[:memory], memory),
                   memory_positions=rows.padded(whole.positions[:memory], memory))
  return example


# ---- blank infilling ---------------------------------------------------------------------------------------------


class Blanks(NamedTuple):
  """GLM's: the keys of `config.objective.infilling`, and the tokens it writes."""
  rate: float
  mean: float
  long: float
  long_min: float
  sentences: float
  mask: int
  gmask: int
  smask: int
  sop: int
  eop: int
  pieces: object
  one_dim: bool = False


def _most(n: int, rate: float, mean: float) -> int:
  """Blanks that n tokens may have; lengths are Poisson's without 0."""
  some = 1 - np.exp(-mean)
  average = mean / some
  return spans.most_spans(rate * n, average, average * (1 + mean) - average ** 2)


def blanks_length(n: int, rate: float, mean: float) -> int:
  """Columns that a row of n tokens may need: each blank a mask and a start."""
  return n + 2 * _most(n, rate, mean)


def infilling_raw(seq_len: int, rate: float, mean: float) -> int:
  """The longest text that fits with its blanks."""
  return spans.longest(lambda n: blanks_length(n, rate, mean) <= seq_len, seq_len)


def infilling(item: Item, rng, settings: Blanks, length: int, mask_documents: bool, filler: int) -> Example:
  """Blanks stand in the text, part A, which all see; what they hid follows, part B, blank by blank in random order.

  A row has many short blanks, or blanks that are sentences, or one long blank at the end of each document. A blank that
  would reach across documents becomes two. In part B a blank begins with sop, its last token predicts eop, `positions`
  are those of the blank and `block_positions` count in it from 1. Where the model reads one dim alone, positions of a
  long blank run on from its mask (GLM-130B).

  Source: Du et al. 2021, GLM, arXiv:2103.10360, 2.1; long blanks at the end: Zeng et al. 2022, arXiv:2210.02414, 2.2.
  """
  row = rows.text(item, mask_documents)
  n = len(row.tokens)
  begins = rows.changes(row.segments)
  most = (length - n) // 2
  kind, drawn = settings.mask, rng.random()
  if drawn < settings.long:
    kind, hidden, starts = settings.gmask, *_long(begins, settings, rng)
  elif drawn < settings.long + settings.sentences:
    kind, hidden, starts = settings.smask, *_sentences(row, begins, settings, rng)
  else:
    most_blanks = _most(n, settings.rate, settings.mean)
    lengths = spans.drawn(settings.rate * n, settings.mean, 1, most_blanks, max(n - 1, 0), rng)
    hidden, _ = spans.scattered(n, lengths, rng)
    starts = hidden & (begins | ~np.roll(hidden, 1)) if n else hidden
    starts[:1] = hidden[:1]
  return _blanked(row, *_at_most(hidden, starts, most, rng), kind, settings, length, filler, rng)


def _long(begins_N: np.ndarray, settings: Blanks, rng) -> tuple[np.ndarray, np.ndarray]:
  """(hidden, starts): the end of each segment, a share of it from `long_min` to all."""
  sizes = np.diff(np.flatnonzero(begins_N), append=len(begins_N))
  share = settings.long_min + rng.random(len(sizes)) * (1 - settings.long_min)
  left = np.repeat(sizes - np.maximum(np.round(share * sizes).astype(np.int64), 1), sizes)
  place = rows.since(begins_N)
  return place >= left, place == left


def _sentences(row: Row, begins_N: np.ndarray, settings: Blanks, rng) -> tuple[np.ndarray, np.ndarray]:
  """(hidden, starts): sentences drawn until they are `rate` of the row; the one that passes it counts half the time."""
  starts = rows.sentence_starts(row, settings.pieces) | begins_N
  sentence = np.cumsum(starts) - 1
  sizes = np.bincount(sentence)
  drawn = rng.permutation(len(sizes))
  before = np.cumsum(sizes[drawn]) - sizes[drawn]
  wanted = settings.rate * len(row.tokens)
  taken = np.zeros(len(sizes), bool)
  taken[drawn] = before + sizes[drawn] * rng.random() <= wanted
  hidden = taken[sentence]
  return hidden, hidden & starts


def _at_most(hidden_N: np.ndarray, starts_N: np.ndarray, most: int, rng) -> tuple[np.ndarray, np.ndarray]:
  """The same blanks, or as many of them as the row has columns for; the others are text again."""
  num = int(np.count_nonzero(starts_N))
  if num <= most:
    return hidden_N, starts_N
  kept = np.zeros(num + 1, bool)
  kept[rng.permutation(num)[:most] + 1] = True
  kept = kept[np.cumsum(starts_N)]
  return hidden_N & kept, starts_N & kept


def _blanked(row: Row, hidden_N, starts_N, kind: int, settings: Blanks, length: int, filler: int, rng) -> Example:
  """Parts A and B of a row whose blanks are known."""
  kept = ~hidden_N | starts_N
  a_tokens = np.where(starts_N, kind, row.tokens)[kept]
  a_segments = row.segments[kept]
  a_positions = rows.within(a_segments)
  num = int(np.count_nonzero(starts_N))
  blank = (np.cumsum(starts_N) - 1)[hidden_N]                  # of each hidden token
  place = a_positions[starts_N[kept]]                          # of each blank's mask
  turn = rng.permutation(num)                                  # when each blank is filled
  copies = 1 + starts_N[hidden_N]                              # its first token comes after sop
  index = np.repeat(np.flatnonzero(hidden_N), copies)
  first = np.zeros(len(index), bool)
  first[np.cumsum(copies)[starts_N[hidden_N]] - 2] = True
  blank = np.repeat(blank, copies)
  last = np.append(first[1:], True)[:len(first)]
  tokens = np.where(first, settings.sop, row.tokens[index])
  following = np.append(tokens[1:], 0)[:len(tokens)]
  targets = np.where(last, settings.eop, following)
  sort = np.argsort(turn[blank], kind='stable')
  block = rows.since(first) + 1 if len(first) else np.zeros(0, np.int64)
  runs_on = settings.one_dim and kind == settings.gmask
  B, A = len(index), len(a_tokens)
  column = lambda a, b: rows.padded(np.concatenate([a, b[sort]]), length)
  return dict(
      tokens=rows.padded(np.concatenate([a_tokens, tokens[sort]]), length, filler),
      targets=rows.padded(np.concatenate([np.full(A, filler), targets[sort]]), length, filler),
      loss_weights=rows.padded(np.repeat([0.0, 1.0], [A, B]), length, 0, np.float32),
      segment_ids=column(a_segments, row.segments[index]),
      positions=column(a_positions, place[blank] + block * runs_on),
      block_positions=column(np.zeros(A), block),
      order=rows.padded(np.append(np.zeros(A), np.arange(1, B + 1)), length))


def restore(example: Example, segment: int, sop: int) -> list[int]:
  """The text of one segment of a row that `infilling` made."""
  here = {k: v[example['segment_ids'] == segment] for k, v in example.items() if k != 'targets'}
  targets = example['targets'][example['segment_ids'] == segment]
  part_b = here['block_positions'] > 0
  block, position = here['block_positions'], here['positions']
  # Every blank has a second column: where its position is another than sop's, positions run on from the mask.
  second = np.flatnonzero(block == 2)
  runs_on = bool(len(second)) and bool((position[second] != position[second - 1]).all())
  place, found = position - block * runs_on, {}
  for mask in np.unique(place[part_b]).tolist():
    found[mask] = targets[part_b & (place == mask)][:-1].tolist()  # the last is eop
  part_a = zip(here['positions'][~part_b].tolist(), here['tokens'][~part_b].tolist())
  return [t for position, token in part_a for t in found.get(position, [token])]
