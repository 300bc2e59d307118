"""What a reward model gives for answers."""
import dataclasses
from typing import Sequence

import numpy as np

from jaxlm.data import examples as rows_module
from jaxlm.data.tasks import Example
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM


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
                     f'{config.head.labels!r} with {config.num_labels}. Train one with config.objective.name=\'reward\'.')
  form = dataclasses.replace(rows_module.form_of(lm.config, lm.tokenizer), front=())
  form = dataclasses.replace(form, length=form.length // 2 - len(lm.front))  # two of them shared a row
  parts = [rows_module.joined_text(form, example, text).ids for example, text in zip(examples, texts)]
  found = np.zeros(len(parts))
  order = sorted(range(len(parts)), key=lambda i: -len(parts[i]))
  for start in range(0, len(order), batch_size):
    chosen = order[start:start + batch_size]
    ids, real = np.zeros((2, len(chosen), len(parts[chosen[0]])), np.int32)
    for row, i in enumerate(chosen):
      ids[row, :len(parts[i])], real[row, :len(parts[i])] = parts[i], 1
    found[chosen] = np.asarray(lm.scores(ids, mask=real))[:, 0]
  return found.tolist()
