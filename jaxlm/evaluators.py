"""Evaluation during training: held-out text of every source, and what the model says."""
import collections
import functools
import math
from typing import Any, Callable, Iterator

import jax
import numpy as np

from jaxlm import decode, losses, reading, sharding
from jaxlm.data.examples import TaskBatches
from jaxlm.data.pipeline import HeldoutBatches
from jaxlm.errors import JaxlmError
from jaxlm.measure import verdicts
from jaxlm.models import stages, virtual
from jaxlm.models.transformer import Transformer
from jaxlm.types import Tree

HELDOUT = 'heldout'  # the name of all sources together


def measure_step(loss_fn: Any, by_context: Any = None):
  """Returns a compiled (params, batch) -> {name: (sum, count)} over the batch, by the training loss without dropout.

  Args:
    by_context: (params, batch) -> more of the same, or None.
  """
  def step(params: Tree, batch: dict[str, Any]) -> dict[str, Any]:
    sums = loss_fn(params, batch, None)[1]
    return sums if by_context is None else sums | by_context(params, batch)
  return jax.jit(step, compiler_options=sharding.compiler_options(jax.devices()[0].platform))


def score_step(model: Transformer):
  """Returns a compiled (params, batch) -> what the label head says, the same on all processes."""
  def step(params: Tree, batch: dict[str, Any]) -> Any:
    scores = model.apply({'params': params}, batch, with_logits=False).scores
    return jax.lax.with_sharding_constraint(scores, model.layout.replicated)
  return jax.jit(step, compiler_options=sharding.compiler_options(jax.devices()[0].platform))


def _check_best(settings: Any, name: str, told: list[str]) -> None:
  """Raises JaxlmError, before any training, if the task has no such measure as checkpoints are to be kept by."""
  known = [f'eval/{name}/{metric}' for metric in ('loss', 'accuracy', 'teacher_kl', *told)]
  if (settings.keep_best or settings.patience) and settings.best_metric not in known:
    raise JaxlmError(f'config.checkpoint.best_metric={settings.best_metric!r} is not measured of this task; set it to one of '
                     f'{", ".join(dict.fromkeys(known))}, and best_is_highest to fit.')


class Evaluators:
  """Measures a model on the held-out documents of each source.

  Args:
    config: eval and loss are read.
    model: whose layout places batches.
    prepared: stores of the sources, or a task's examples; and the tokenizer, for samples.
    objective: as in training.
    loss_fn: as in training, (params, batch, rng) -> (sum, sums and counts).
    arrange: what a batch's columns go through before they are placed.
  """

  def __init__(self, config: Any, model: Transformer, prepared: Any, objective: Any, loss_fn: Any,
               arrange: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch):
    self._config, self._model, self._tokenizer, self._task = config, model, prepared.tokenizer, prepared.task
    self._layout, self._size = model.layout, config.eval.batch_size
    shape = (self._size, config.seq_len)
    self._rows = self._layout.host_rows(shape)
    rows = lambda size: self._rows
    self._heldout = [HeldoutBatches(s, objective, config, self._tokenizer.vocab, rows)
                     for s in prepared.stores if len(s.heldout)]
    self._validation = TaskBatches(config, prepared.task, objective, rows) if prepared.task else None
    self._scores = score_step(model) if objective.loss == 'labels' else None
    if self._scores is not None and self._validation:
      _check_best(config.checkpoint, self._validation.name, verdicts.told(prepared.task.task, prepared.task.examples))
    if self._heldout or self._validation:
      stages.check_rows(self._size, self._layout)  # before any training
    self._covers, by_context = objective.covers, None
    if config.eval.by_context and objective.covers:
      by_context = functools.partial(losses.loss_by_context, model, losses.vocabulary_of(model, config.loss))
    self._step = measure_step(loss_fn, by_context)
    self._prompt, self._arrange = objective.prompt, arrange

  def measure(self, params: Tree, going_on: Callable[[], None] = lambda: None) -> dict[str, float]:
    """eval/<name>/loss (nats a target), perplexity, accuracy, and whatever else the loss tells.

    Where the objective predicts every token of a text once, also bits_per_byte and gzip_bits_per_byte, and with
    config.eval.by_context loss_after_1, _2, _4, … tokens. <name> is the source's, and 'heldout' for all together.
    """
    if self._validation is not None:
      return self._measure_task(params, going_on)
    found: dict[str, float] = {}
    everything, every_byte = collections.Counter(), collections.Counter()
    for heldout in self._heldout:
      sums: collections.Counter = collections.Counter()
      bytes_ = collections.Counter(bytes=heldout.text_bytes, gzip=heldout.gzip_bits_per_byte * heldout.text_bytes)
      for rows in heldout:
        placed = self._layout.place(self._arrange(rows), self._size, self._rows[0])
        for name, parts in self._step(params, placed).items():
          sums.update({(name, i): float(part) for i, part in enumerate(parts)})
        going_on()
      everything.update(sums)
      every_byte.update(bytes_)
      if len(self._heldout) > 1:
        found |= self._told(heldout.name, sums, bytes_)
    return found | self._told(HELDOUT, everything, every_byte) if everything['loss', 1] else found

  def _measure_task(self, params: Tree, going_on: Callable[[], None]) -> dict[str, float]:
    """eval/validation/…: the loss and what it tells; of tasks with labels also their metric."""
    sums, scores = collections.Counter(), []
    for rows in self._validation:
      placed = self._layout.place(self._arrange(rows), self._size, self._rows[0])
      for name, parts in self._step(params, placed).items():
        sums.update({(name, i): float(part) for i, part in enumerate(parts)})
      if self._scores is not None:
        scores.append(np.asarray(self._scores(params, placed)))
      going_on()
    told = {metric: sums[metric, 0] / max(sums[metric, 1], 1e-9)
            for metric, i in sums if i == 0 and metric != 'objective'}
    if scores:
      data = self._task
      told |= verdicts.of_scores(data.task, data.examples, self._validation.encoded, data.form, np.concatenate(scores))
    return {f'eval/{self._validation.name}/{name}': value for name, value in told.items()}

  def _told(self, name: str, sums: collections.Counter, bytes_: collections.Counter) -> dict[str, float]:
    values = {metric: sums[metric, 0] / max(sums[metric, 1], 1e-9) for metric, i in sums if i == 0}
    values.pop('objective', None)
    values['perplexity'] = math.exp(min(values['loss'], 700))
    if self._covers:
      values['bits_per_byte'] = sums['loss', 0] / math.log(2) / max(bytes_['bytes'], 1)
      values['gzip_bits_per_byte'] = bytes_['gzip'] / max(bytes_['bytes'], 1)
    return {f'eval/{name}/{metric}': value for metric, value in values.items()}

  def samples(self, params: Tree, step: int) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) of each prompt in the config; a prompt starts as documents do, and so has no virtual
    tokens: of a model with such there are none."""
    settings, vocab = self._config.eval, self._tokenizer.vocab
    if not settings.prompts or not reading.continues(self._model.config) or virtual.count(self._model.config.peft):
      return
    start = [vocab.first] if self._config.data.bos and vocab.first is not None else []
    encoded, first = zip(*map(self._tokenizer.encode_prompt, settings.prompts))
    prompts = [self._prompt(start + ids) for ids in encoded]
    room = self._model.config.max_length if self._model.config.positions.kind == 'learned' else math.inf
    length = min(settings.sample_tokens, int(min(room - max(len(prompt.ids) for prompt in prompts), 1 << 30)))
    if length < 1 or not all(prompt.ids for prompt in prompts):
      return
    sampling = decode.Sampling(temperature=settings.temperature, seed=step)
    eos = [vocab.last] if vocab.last is not None else []
    found = decode.generate(self._model, params, prompts, length, sampling, eos, first=first)
    for prompt, allowed, ids in zip(settings.prompts, first, found):
      text = self._tokenizer.decode(ids)
      yield prompt, text if allowed is None else text[1:]  # the space is the prompt's

