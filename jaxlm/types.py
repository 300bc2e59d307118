"""What every module agrees on: shape letters, the batch, the model's output, the training state.

Shape letters, the suffix of every array's name:

  B batch         T query length   S key length     D width        N query heads
  K kv heads      G = N / K        H head dim       F mlp width    V vocab
  E experts       C capacity       L layers         R rank         P prompt length

A batch is a flat dict of arrays; `BATCH` says what each key holds. Rows are examples; what a row holds beyond
its text is padding, whose segment is 0.
"""
from typing import Any

import flax.struct
import jax

Array = jax.Array
Tree = Any  # a nested dict of arrays

# key: (shape letters, what it is). Integers are int32, weights float32.
BATCH = {
    'tokens': ('BT', 'what the model reads'),
    'targets': ('BT', 'what it must predict at each position'),
    'loss_weights': ('BT', 'how much each target counts; the only thing that masks the loss'),
    'segment_ids': ('BT', 'which document a token belongs to, from 1; 0 is padding'),
    'positions': ('BT', 'place of a token in its document, from 0'),
    'order': ('BT', 'when a token is produced: 0 is context that all see; only with visibility "order"'),
    'example_ids': ('B', 'row number in the global batch; keys dropout'),
}


class JaxlmError(Exception):
  """A fault the user can mend: programs print it as one line and exit with 2."""


class Preempted(Exception):
  """The run was asked to stop and saved; programs exit with 75."""


class RunFailed(Exception):
  """The run itself failed (a loss that is not finite, say): programs print one line and exit with 1."""


@flax.struct.dataclass
class Output:
  """What a model returns.

  Attributes:
    logits: float32 [B, T, V_padded], or None where the caller asked for none.
    hidden: [B, T, D] after the final norm, in the compute dtype.
    cache: the cache with this call's tokens written, or None.
    aux: extra loss terms as (sum, count) pairs by name; empty for dense models.
  """
  logits: Array | None
  hidden: Array
  cache: Tree | None
  aux: dict[str, tuple[Array, Array]]


@flax.struct.dataclass
class TrainState:
  """Everything a step changes.

  Attributes:
    step: int32 [], updates done.
    params: the trainable parameters only.
    opt_state: the optimizer's.
    ema: moving average of params, or None.
    rng: the run's base key; a step folds its number in and never changes it.
  """
  step: Array
  params: Tree
  opt_state: Tree
  ema: Tree | None
  rng: Array
