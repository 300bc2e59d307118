"""What every module agrees on: shape letters, the batch, the model's output, the training state.

Shape letters, the suffix of every array's name:

  B batch         T query length   S key length     D width        N query heads
  K kv heads      G = N / K        H head dim       F mlp width    V vocab
  E experts       C capacity       L layers         R rank         P prompt length

A batch is a flat dict of arrays; `BATCH` says what each key holds. Rows are examples; what a row holds beyond
its text is padding, whose segment is 0.
"""
import dataclasses
from typing import Any, Sequence

import flax.struct
import jax

Array = jax.Array
Tree = Any  # a nested dict of arrays
Ids = Sequence[int]

# key: (shape letters, what it is). Integers are int32, weights float32. Which of them a batch has depends on objective
# and structure; M, here alone, counts the places of a row where something is predicted.
BATCH = {
    'tokens': ('BT', 'what the model reads; in an encoder-decoder, what its decoder reads'),
    'masked_tokens': ('BT', 'tokens with the predicted ones hidden: what a generator reads (ELECTRA)'),
    'targets': ('BT', 'what it must predict at each position; BM where target_index or query_positions says which'),
    'loss_weights': ('BT', 'how much each target counts; the only thing that masks the loss; shaped as targets'),
    'segment_ids': ('BT', 'which document a token belongs to, from 1; 0 is padding'),
    'positions': ('BT', 'place of a token in its document, from 0'),
    'order': ('BT', 'when a token is produced: 0 is context that all see; only with visibility "order"'),
    'block_positions': ('BT', 'place of a token in its blank, from 1; 0 outside blanks (GLM\'s second dimension)'),
    'token_types': ('BT', 'which of two texts a token belongs to, from 0 (BERT, XLNet)'),
    'task_types': ('BT', 'which task a token is read for, from 0 (ERNIE)'),
    'target_index': ('BM', 'column of each target, where only some columns are predicted'),
    'query_positions': ('BM', 'two streams: the positions that are predicted, as positions'),
    'query_order': ('BM', 'two streams: when the token there is produced, as order; it is not seen itself'),
    'query_segment_ids': ('BM', 'two streams: the document it belongs to'),
    'memory_tokens': ('BS', 'two streams: text before the row\'s, read without gradient'),
    'memory_segment_ids': ('BS', 'of the memory; the rows\' segments go on from it'),
    'memory_positions': ('BS', 'of the memory'),
    'source_tokens': ('BS', 'encoder-decoder: what the encoder reads'),
    'source_segment_ids': ('BS', 'of the source; a target sees the source of its own segment'),
    'source_positions': ('BS', 'of the source'),
    'future_targets': ('BTP', 'the P tokens after the target, for models with future heads'),
    'future_weights': ('BTP', 'how much each counts'),
    'labels': ('B', 'the class of a row (whether two texts follow each other)'),
    'label_weights': ('B', 'how much it counts; of rows with label_values and span_labels, too'),
    'label_values': ('BC', 'numbers to tell of a row: one, or for each of C labels 1 or 0'),
    'span_labels': ('B2', 'the first and the last column of an answer; where there is none, twice the first of text'),
    'token_labels': ('BT', 'the tag of each token'),
    'token_label_weights': ('BT', 'how much it counts: a word is told by its first piece'),
    'advantages': ('B', 'of a rollout: how much better it was than others for the same prompt; BT: than was expected'),
    'old_values': ('BT', 'what was expected before each target when it was written'),
    'returns': ('BT', 'what should have been'),
    'old_log_probs': ('BT', 'of its targets, by the policy that wrote them; where there is none, that is the policy'),
    'teacher_log_probs': ('BTV', 'of a teacher; BTK with teacher_ids: of these, and of all others together'),
    'teacher_ids': ('BTK', 'the tokens it holds likeliest'),
    'teacher_scores': ('BC', 'of a teacher\'s label head; BTC of tags'),
    'example_ids': ('B', 'row number in the global batch; keys dropout'),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is continued.

  Attributes:
    ids: what the decoder has read; at least one.
    source: what the encoder reads; of an encoder-decoder.
    context: how many of the ids are context that all see, as a prefix is; read where visibility is 'order'.
    blank: the column of the mask that the continuation stands for, whose position all of it has; -1: positions run on
      from the context's.
  """
  ids: Ids
  source: Ids = ()
  context: int = 0
  blank: int = -1


@flax.struct.dataclass
class Output:
  """What a model returns.

  Attributes:
    logits: float32 [B, T, V_padded], or None where the caller asked for none, or a body has none. [B, M, V_padded]
      where the batch says which places are predicted.
    hidden: [B, T, D] after the final norm, in the compute dtype; of an encoder-decoder, the decoder's.
    features: [B, T, E] (or M for T), what the output matrix multiplies: hidden, after the head's transform. Those of
      future heads follow in `future`.
    cache: the cache with this call's tokens written, or None.
    aux: float32 [B] by name, extra losses of each example (a mixture's balance); empty for most models.
    future: a future head each, [B, T, E].
    scores: float32 [B, labels] or [B, T, labels] of the model's label head; None without one.
  """
  logits: Array | None
  hidden: Array
  features: Array
  cache: Tree | None
  aux: dict[str, Array]
  future: tuple[Array, ...] = ()
  scores: Array | None = None


@flax.struct.dataclass
class LossScale:
  """What a loss is multiplied by before its gradient is taken: float16 has no numbers below 6e-8.

  Attributes:
    value: float32 [].
    steps: int32 [], updates since it changed.
  """
  value: Array
  steps: Array


@flax.struct.dataclass
class TrainState:
  """Everything a step changes.

  Attributes:
    step: int32 [], updates done.
    params: the trainable parameters only.
    opt_state: the optimizer's.
    ema: moving average of params, or None.
    rng: the run's base key; a step folds its number in and never changes it.
    loss_scale: of float16; None where computing is in another dtype.
  """
  step: Array
  params: Tree
  opt_state: Tree
  ema: Tree | None
  rng: Array
  loss_scale: LossScale | None = None
