"""A teacher: another model that says of each target of a batch what it might be."""
import dataclasses
import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from jaxlm import heads, loading, losses, sharding
from jaxlm.errors import JaxlmError
from jaxlm.models.transformer import Transformer
from jaxlm.types import Array


class Teacher:
  """Adds what a frozen model says to batches: a loss stays a function of the batch, and no state has a teacher in it.

  The model is any that can be loaded: another size, a delta over its base, an average, a folder of Hugging Face's. It
  reads a batch in as many pieces as training does.

  Args:
    config: of the student; `loss` and `accumulation` are read.
    student: on whose mesh the teacher lies.
    objective: of the student, who sees whom.
    tokenizer: the student's.
    labels: the student's, of classes or tags; (): none.
  Raises:
    JaxlmError: a teacher of another vocabulary, structure or other labels.
  Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
  """

  def __init__(self, config: Any, student: Transformer, objective: Any, tokenizer: Any, labels: Sequence[str] = ()):
    settings = config.loss.teacher
    try:
      lm = loading.load(settings.path, mesh=student.layout.mesh, step=settings.step)
    except JaxlmError as e:
      raise JaxlmError(f'config.loss.teacher.path: {settings.path} cannot teach here: {e}') from e
    _check(settings, lm, student, objective, tokenizer, config.seq_len)
    model = lm.model.clone(config=dataclasses.replace(lm.model.config, visibility=objective.visibility))
    if objective.loss == 'labels':
      _check_labels(settings, lm, labels)
      say = _scores
    else:
      say = functools.partial(_words, vocabulary=losses.vocabulary_of(model, config.loss), top_k=settings.top_k,
                              width=student.config.padded_vocab)
    self._params = lm.params
    self._step = jax.jit(functools.partial(_by_pieces, functools.partial(say, model), config.accumulation),
                         compiler_options=sharding.compiler_options(student.layout.platform, config.compiler_options))

  def taught(self, batch: dict[str, Array]) -> dict[str, Array]:
    """The batch, placed on the mesh, with `teacher_log_probs` and `teacher_ids`, or `teacher_scores`."""
    return batch | self._step(self._params, batch)


def _by_pieces(say: Any, pieces: int, params: Any, batch: dict[str, Array]) -> dict[str, Array]:
  """What is said of every piece's rows."""
  if pieces == 1:
    return say(params, batch)
  return sharding.rejoined(jax.lax.map(functools.partial(say, params), sharding.microbatches(batch, pieces)))


def _words(model: Transformer, params: Any, batch: dict[str, Array], vocabulary: losses.Vocabulary, top_k: int,
           width: int) -> dict[str, Array]:
  features_BTE = model.apply({'params': params}, batch, with_logits=False).features
  said = losses.opinion(vocabulary, features_BTE, *model.apply({'params': params}, method='unembedding'), top_k)
  if not top_k and width != model.config.padded_vocab:  # columns beyond the vocabulary, which nobody counts
    beyond = [(0, 0), (0, 0), (0, max(0, width - model.config.padded_vocab))]
    said = {key: jnp.pad(x[..., :width], beyond, constant_values=-jnp.inf) for key, x in said.items()}
  return said


def _scores(model: Transformer, params: Any, batch: dict[str, Array]) -> dict[str, Array]:
  return dict(teacher_scores=model.apply({'params': params}, batch, with_logits=False).scores)


def _check(settings: Any, lm: loading.LM, student: Transformer, objective: Any, tokenizer: Any, seq_len: int) -> None:
  """Raises JaxlmError where a model cannot teach another."""
  ours, theirs, at = student.config, lm.model.config, f'config.loss.teacher.path: {settings.path}'
  if theirs.structure != ours.structure:
    raise JaxlmError(f'{at} is of structure {theirs.structure!r}, this model of {ours.structure!r}; take a teacher of '
                     'the same.')
  same = theirs.vocab_size == ours.vocab_size and (lm.tokenizer is None or lm.tokenizer.digest == tokenizer.digest)
  if not same:
    raise JaxlmError(f'{at} has another tokenizer ({theirs.vocab_size} tokens there, {ours.vocab_size} here); set '
                     "config.data.tokenizer to the teacher's.")
  if lm.front:
    raise JaxlmError(f'{at} reads virtual tokens before its texts, which a student has not; take a teacher without '
                     'them.')
  if theirs.positions.kind == 'learned' and theirs.max_length < seq_len:
    raise JaxlmError(f'{at} reads {theirs.max_length} columns at most; config.seq_len={seq_len}: lower it.')
  if objective.loss == 'labels':
    wanted, got = ((c.head.labels, c.head.num_labels) for c in (ours, theirs))
    if wanted != got:
      raise JaxlmError(f'{at} has a label head of kind {got[0]!r} with {got[1]} labels, this model {wanted[0]!r} with '
                       f'{wanted[1]}; take a teacher of the same task.')
  elif not theirs.head.lm:
    raise JaxlmError(f'{at} predicts no tokens; take a teacher with a language model head.')
  elif settings.top_k >= ours.vocab_size:
    raise JaxlmError(f'config.loss.teacher.top_k={settings.top_k} of {ours.vocab_size} tokens; set it lower, or to 0 '
                     'for all.')


def _check_labels(settings: Any, lm: loading.LM, labels: Sequence[str]) -> None:
  """Raises JaxlmError where a teacher's classes are not the student's, one by one."""
  found = heads.labels_of(lm)
  if found != tuple(labels):
    raise JaxlmError(f'config.loss.teacher.path: {settings.path} tells apart {", ".join(found) or "classes without names"}, '
                     f'this task {", ".join(labels)}; take a teacher of the same labels, in the same order.')
