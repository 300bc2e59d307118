"""Objectives of tasks: rows of questions and answers, laid out for a loss. NumPy, whole blocks of rows.

What is read (an item; R columns of tokens, S of a source): `tokens`, `segment_ids` (a text each, from 1; 0 is padding) and
`marks`, which say of each token how much it counts as an answer, or which tag it has (-1: none); `types`, which of two
texts it belongs to; `labels`, of the row, as the kind has them; `source_tokens`, `source_segment_ids` of an
encoder-decoder.
"""
import numpy as np

from jaxlm.rows import Example, Item


def _positions(segment_ids: np.ndarray) -> np.ndarray:
  """Place of each token in its text, [B, R] or [R]."""
  length = segment_ids.shape[-1]
  begins = np.ones(segment_ids.shape, bool)
  begins[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
  here = np.broadcast_to(np.arange(length, dtype=np.int32), segment_ids.shape)
  return np.where(segment_ids > 0, here - np.maximum.accumulate(np.where(begins, here, 0), axis=-1), 0).astype(np.int32)


def _read(item: Item, types: bool) -> Example:
  segment_ids = item['segment_ids']
  read = dict(tokens=item['tokens'], segment_ids=segment_ids, positions=_positions(segment_ids))
  return read | dict(token_types=item['types']) if types else read


def labelled(item: Item, rng, types: bool, key: str) -> Example:
  """A text a row, and what is to be said of it, under `key`."""
  del rng
  real = (item['segment_ids'] > 0).any(-1)
  return _read(item, types) | {key: item['labels'], 'label_weights': real.astype(np.float32)}


def tagged(item: Item, rng, types: bool) -> Example:
  """A text a row, and a tag for each word, at its first piece."""
  del rng
  marks = item['marks'].astype(np.int32)
  return _read(item, types) | dict(token_labels=np.maximum(marks, 0), token_label_weights=(
      (marks >= 0) & (item['segment_ids'] > 0)).astype(np.float32))


def answered(item: Item, rng) -> Example:
  """Each token predicts the next one of its text, and counts as that is marked."""
  del rng
  segment_ids, positions = item['segment_ids'], _positions(item['segment_ids'])
  same = (segment_ids[..., :-1] == segment_ids[..., 1:]) & (segment_ids[..., 1:] > 0)
  return dict(tokens=item['tokens'][..., :-1], targets=item['tokens'][..., 1:], segment_ids=segment_ids[..., :-1],
              positions=positions[..., :-1], loss_weights=np.where(same, item['marks'][..., 1:], 0).astype(np.float32))


def translated(item: Item, rng, start: int) -> Example:
  """An encoder reads the questions, a decoder their answers one place late, after a start token."""
  del rng
  tokens, segment_ids, positions = item['tokens'], item['segment_ids'], _positions(item['segment_ids'])
  before = np.roll(tokens, 1, axis=-1)
  read = np.where((positions == 0) & (segment_ids > 0), start, before).astype(np.int32)
  return dict(tokens=read, targets=tokens, segment_ids=segment_ids, positions=positions,
              loss_weights=np.where(segment_ids > 0, item['marks'], 0).astype(np.float32),
              source_tokens=item['source_tokens'], source_segment_ids=item['source_segment_ids'],
              source_positions=_positions(item['source_segment_ids']))


def embedded(item: Item, rng) -> Example:
  """A query and its documents, the right one first, each a text of the row."""
  del rng
  return _read(item, False) | dict(label_weights=(item['segment_ids'] > 0).any(-1).astype(np.float32))


def preferred(item: Item, rng) -> Example:
  """The better and the worse answer, each after the question, as two texts of the row."""
  return answered(item, rng) | dict(label_weights=(item['segment_ids'] > 0).any(-1).astype(np.float32))


def single(item: Item, rng) -> Example:
  """A good or a bad answer to a question, and one that answers another, as two texts of the row."""
  return preferred(item, rng) | dict(labels=item['labels'])


def written(item: Item, rng, kept: bool) -> Example:
  """An answer that a policy wrote; what it is worth, and with `kept` its log-probs, are filled in by who let it write."""
  read = answered(item, rng)
  read['advantages'] = np.zeros(item['tokens'].shape[:-1], np.float32)
  return read | (dict(old_log_probs=np.zeros_like(read['loss_weights'])) if kept else {})


def valued(item: Item, rng) -> Example:
  """The same; what each token was worth, and what was thought of it, is filled in, too."""
  read = answered(item, rng)
  return read | {key: np.zeros_like(read['loss_weights']) for key in ('old_log_probs', 'old_values', 'advantages', 'returns')}
