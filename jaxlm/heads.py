"""What a label head says of texts of any length, and what a reward model gives for answers."""
import dataclasses
from typing import Sequence

import jax
import numpy as np

from jaxlm.data import encoders, tasks
from jaxlm.data.examples import Encoded, encode
from jaxlm.data.tasks import Example, Task
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM


def padded(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """(ids, which are real), [B, T] each."""
  tokens_BT, real_BT = np.zeros((2, len(texts), max(map(len, texts))), np.int32)
  for row, ids in enumerate(texts):
    tokens_BT[row, :len(ids)], real_BT[row, :len(ids)] = ids, 1
  return tokens_BT, real_BT


def scores(lm: LM, texts: Sequence[Sequence[int]], batch_size: int,
           types: Sequence[Sequence[int]] | None = None) -> list[np.ndarray]:
  """What the label head says of each text, [labels], or of each of its batch's columns, [T, labels].

  Args:
    texts: ids; like lengths are read together.
    types: of each token, as `LM.scores` takes them.
  """
  found: list[np.ndarray] = [np.empty(0)] * len(texts)
  order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
  for start in range(0, len(order), batch_size):
    chosen = order[start:start + batch_size]
    ids_BT, real_BT = padded([texts[i] for i in chosen])
    types_BT = None if types is None else padded([types[i] for i in chosen])[0]
    for i, said in zip(chosen, np.asarray(lm.scores(ids_BT, mask=real_BT, types=types_BT))):
      found[i] = said
  return found


def asked(lm: LM, task: Task, split: str, examples: Sequence[Example],
          batch_size: int) -> tuple[Encoded, encoders.Form, list[np.ndarray]]:
  """(examples as the model reads them, in which form, what its label head says of each)."""
  form = encoders.form_of(lm.config, lm.tokenizer)
  form = dataclasses.replace(form, front=(), length=form.length - len(form.front))  # the model itself puts them there
  encoded = encode(task, split, form, examples)
  cuts = encoded.begins[encoded.first[1:-1]]
  return encoded, form, scores(lm, np.split(encoded.ids, cuts), batch_size, np.split(encoded.types, cuts))


def labels_of(lm: LM) -> tuple[str, ...]:
  """Names of what the label head tells apart; of a run that did not keep them, its task's as that is now."""
  return lm.labels or (tasks.make(lm.config.data.task).labels if lm.config.data.task else ())


def classify(lm: LM, texts: Sequence[str | tuple[str, str]], batch_size: int = 32) -> list[dict[str, float]]:
  """{label: probability} of each text, or pair of texts, laid out as the model was fine-tuned.

  Args:
    lm: of a run that learned a task of kind classify or multi_label.
  Raises:
    JaxlmError: another model; a text that does not fit into its window.
  """
  kind = lm.config.objective.name
  if not lm.config.data.task or kind not in ('classify', 'multi_label') or lm.model.config.head.labels != 'sequence':
    raise JaxlmError('classify needs a run that learned a task of kind classify or multi_label; this model has a label '
                     f'head of kind {lm.model.config.head.labels!r} and learned {lm.config.data.task or "no task"!r}.')
  task = Task(kind, labels=labels_of(lm))
  none = (0,) * len(task.labels) if kind == 'multi_label' else 0  # of a right answer, which nobody reads
  pairs = [(text, '') if isinstance(text, str) else text for text in texts]
  examples = [Example(f'text {i}', first, second, target=none) for i, (first, second) in enumerate(pairs)]
  said = np.stack(asked(lm, task, 'test', examples, batch_size)[2])
  chances = 1 / (1 + np.exp(-said)) if kind == 'multi_label' else np.asarray(jax.nn.softmax(said))
  return [dict(zip(task.labels, row.tolist())) for row in chances]


def rewards(lm: LM, examples: Sequence[Example], texts: Sequence[str], batch_size: int = 32) -> list[float]:
  """The score of each answer behind its question, laid out as the model was trained (objective reward).

  Args:
    lm: with a label head of one output, for a row.
    examples: whose questions were asked.
    texts: the answers.
  Raises:
    JaxlmError: another model; an answer that does not fit into its window.
  """
  config = lm.model.config
  if config.head.labels != 'sequence' or config.num_labels != 1:
    raise JaxlmError(f'A reward model has a label head of kind \'sequence\' with 1 output; this one has '
                     f'{config.head.labels!r} with {config.num_labels}. Train one with '
                     "config.objective.name='reward'.")
  form = dataclasses.replace(encoders.form_of(lm.config, lm.tokenizer), front=())
  form = dataclasses.replace(form, length=form.length // 2 - len(lm.front))  # two of them shared a row
  parts = [encoders.joined_text(form, example, text).ids for example, text in zip(examples, texts)]
  return [float(said[0]) for said in scores(lm, parts, batch_size)]
