"""What is learned from a window of text: raw tokens become a batch's arrays, in NumPy.

An objective never sees the model and the model never sees it; they meet in the batch (`types.BATCH`).
"""
import dataclasses
import functools
from typing import Any, Callable, Mapping

import numpy as np

from jaxlm.lookup import lookup

# What an objective reads, int32 [R] or [B, R] with R = raw_length(seq_len):
#   tokens       the text, padded
#   segment_ids  which piece a token belongs to, from 1; 0 is padding
#   positions    place of a token in its piece, from 0
#   starts       bool: the first token of a document (a piece may begin further on in one)
Item = Mapping[str, np.ndarray]
Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective, as data, model and loss see it. It pickles, so that worker processes can hold it.

  Attributes:
    example: (item, rng) -> the keys of `types.BATCH` but `example_ids`. With `random` the item is one row [R] and
      rng a `np.random.Generator` keyed by (seed, example number); without, a whole block [B, R] and rng is None.
    raw_length: seq_len -> R, the tokens of text that an example is made from.
    visibility: which tokens see which: 'causal', 'full', or 'order' (then the batch has `order`).
    overlap: tokens that a window shares with the one before it; 1 where the last token is only a target, so that
      cutting a document into windows loses no target.
    random: whether `example` draws from rng.
  """
  example: Callable[[Item, Any], Example]
  raw_length: Callable[[int], int]
  visibility: str
  overlap: int = 0
  random: bool = True


def make(config, vocab) -> Objective:
  """The objective that `config.objective.name` selects.

  Args:
    config: the whole config; an objective reads its own sub-config of `config.objective`, and `config.data`.
    vocab: the tokenizer's `Vocab` (size and special ids).
  Raises:
    JaxlmError: no objective has that name.
  """
  return lookup(OBJECTIVES, config.objective.name, 'objective')(config, vocab)


# ---- causal ------------------------------------------------------------------------------------------------------


def causal(config, vocab) -> Objective:
  """Predict the next token: of the same document, or of whatever follows where documents are not masked."""
  del vocab
  return Objective(functools.partial(_causal_example, mask_documents=config.data.mask_documents), _one_more,
                   visibility='causal', overlap=1, random=False)


def _one_more(seq_len: int) -> int:
  return seq_len + 1


def _causal_example(item: Item, rng, mask_documents: bool) -> Example:
  del rng
  tokens, segment_ids, positions = item['tokens'], item['segment_ids'], item['positions']
  if not mask_documents:
    segment_ids = (segment_ids > 0).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
  here, following = segment_ids[..., :-1], segment_ids[..., 1:]
  return dict(tokens=tokens[..., :-1], targets=tokens[..., 1:],
              loss_weights=((here == following) & (here > 0)).astype(np.float32),
              segment_ids=here, positions=positions[..., :-1])


OBJECTIVES = {'causal': causal}
