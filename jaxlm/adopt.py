"""What a run takes over from another: weights it begins with, or stays beside; and what begins from those."""
import dataclasses
import os
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import hf, transfer, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.models import peft, quantised
from jaxlm.models.transformer import Transformer
from jaxlm.rundir import RunDirectory
from jaxlm.task_losses import REFERENCE
from jaxlm.types import Array, Tree

NEW = re.compile(r'(labels|pooler)/.*')  # heads that a base need not have; it may have others, which are left
LEFT = re.compile(r'(labels|pooler|generator|reference)/.*')
WORDS = re.compile(r'head_transform/.*|head|head_bias|future_\d+/.*')  # left, too, by a model that predicts no words
BY_ID = re.compile(r'embed/embedding|head|head_bias')  # whose rows are ids


def adopted(path: str, params: Tree, model: Transformer, tokenizer: Any, seed: int, step: int = 0) -> Tree:
  """Parameters with those of another run, or of a Hugging Face folder, in their places.

  New heads and deltas stay as drawn; a vocabulary that has grown gets the mean of the old rows for each new one
  (Hewitt 2021, Initializing new word embeddings for pretrained language models).

  Args:
    path: of the base.
    params: all of the model's, as drawn and where they lie.
    tokenizer: of this run.
    step: which checkpoint of a run; 0: the newest.
  Raises:
    JaxlmError: a base of another shape, or none that can be read.
  """
  ours = {p: x for p, x in trees.flatten(params).items() if not p.startswith(f'{REFERENCE}/')}
  theirs, vocab_size = _theirs(path, ours, model, step)
  theirs = trees.flatten(quantised.quantised(trees.unflatten(theirs), model.config))
  missing = [p for p in ours if p not in theirs and not peft.is_delta(p) and not NEW.fullmatch(p)]
  extra = [p for p in theirs if p not in ours and not _left(model, p)]
  if missing or extra:
    which = f'lacks {missing[0]}' if missing else f'has {extra[0]}, which this model lacks'
    raise JaxlmError(f'config.checkpoint.init_from: {path} {which} (and {len(missing) + len(extra) - 1} more like that); give '
                     "config.model the base's own shape: config.adopt(config, path) does.")
  kept = lambda p, x: p not in theirs or NEW.fullmatch(p) and theirs[p].shape != x.shape
  taken = {p: x if kept(p, x) else _fitted(p, theirs[p], x, vocab_size, tokenizer.vocab.size) for p, x in ours.items()}
  taken = begun(trees.unflatten(taken), model, tokenizer, seed)
  # A copy: what is trained is donated to each step.
  return taken | {REFERENCE: jax.tree.map(jnp.copy, taken)} if REFERENCE in params else taken


def base(config: Any, model: Transformer, tokenizer: Any) -> Tree:
  """All parameters of a run that keeps a delta alone, as they were before its first step.

  Raises:
    JaxlmError: the base is not where the run says, or another than that.
  """
  draw = jax.jit(lambda: nn.meta.unbox(model.init(jax.random.key(config.seed), transfer.DUMMY)['params']),
                 out_shardings=jax.tree.map(lambda x: x.sharding, transfer.wanted(model)))
  if not config.checkpoint.init_from:
    return draw()
  if not os.path.isdir(config.checkpoint.init_from):
    raise JaxlmError(f'This run holds a delta beside {config.checkpoint.init_from}, which is not there; put it back, or set '
                     'checkpoint.init_from in config.json to where it is.')
  return adopted(config.checkpoint.init_from, draw(), model, tokenizer, config.seed, config.checkpoint.init_step)


def pinned(config: Any, before: Any) -> Any:
  """The config with the checkpoints of runs that it stays beside, a delta's base and a teacher: those it began with, else
  the newest.

  Args:
    before: the run's config where it has begun, or None.
  """
  steps = {}
  if config.model.peft.method != 'none':
    steps['checkpoint.init_step'] = (config.checkpoint.init_from, lambda config: config.checkpoint.init_step)
  steps['loss.teacher.step'] = (config.loss.teacher.path, lambda config: config.loss.teacher.step)
  found = {key: (before and of(before)) or _newest(path) for key, (path, of) in steps.items()
           if path and not of(config) and not hf.recognises(path)}
  if not found:
    return config
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(found)
  return config


def _newest(path: str) -> int:
  """The newest valid checkpoint of a run; 0: none."""
  with Checkpoints(os.path.join(path, 'checkpoints'), read_only=True) as checkpoints:
    return checkpoints.latest_valid() or 0


def begun(params: Tree, model: Transformer, tokenizer: Any, seed: int) -> Tree:
  """Parameters with what a delta takes from the base: lengths of weights, embeddings of virtual tokens."""
  config, params = model.config.peft, peft.settled(params)
  if config.method != 'prompt' or config.start == 'normal':
    return params
  table_VE = params['embed']['embedding']
  if config.start == 'text':
    ids = tokenizer.encode(config.text)
    if not ids:
      raise JaxlmError("config.model.peft.start='text' wants a text in config.model.peft.text; it is empty.")
    ids = np.resize(ids, config.tokens)
  else:
    ids = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64))).integers(0, tokenizer.vocab.size,
                                                                                            config.tokens)
  old = params['virtual']['embedding']
  rows = jnp.take(jax.device_get(table_VE), ids, axis=0).astype(old.dtype)
  return trees.combine(params, {'virtual': {'embedding': jax.device_put(rows, getattr(old, 'sharding', None))}})


def _theirs(path: str, ours: dict[str, Array], model: Transformer, step: int) -> tuple[dict[str, Array], int]:
  """({path: array} of the base, its vocabulary's size)."""
  abstract = lambda shape, dtype, like: jax.ShapeDtypeStruct(shape, dtype, sharding=(
      ours[like].sharding if like in ours and ours[like].shape == shape else model.layout.replicated))
  if hf.recognises(path):
    folder = hf.load_folder(path)
    base = Transformer(dataclasses.replace(folder.model, scan=model.config.scan, param_dtype=model.config.param_dtype),
                       model.layout)
    return trees.flatten(folder.place(transfer.wanted(base))), folder.model.vocab_size
  directory = RunDirectory(path)
  if directory.config is None:
    raise JaxlmError(f'config.checkpoint.init_from: {path} is neither a run directory nor a Hugging Face folder.')
  if directory.config.model.peft.method != 'none':
    raise JaxlmError(f'config.checkpoint.init_from: {path} holds a delta beside another base; merge it first, with '
                     'python -m jaxlm.convert.')
  with Checkpoints(os.path.join(path, 'checkpoints'), read_only=True) as checkpoints:
    step = step or checkpoints.latest_valid()
    if step is None:
      raise JaxlmError(f'config.checkpoint.init_from: {path} has no valid checkpoint to take weights from.')
    shapes = {p.removeprefix('params/'): x for p, x in checkpoints.shapes(step).items() if p.startswith('params/')}
    target = {p: abstract(x.shape, ours[p].dtype if p in ours else x.dtype, p) for p, x in shapes.items()
              if p in ours or not _left(model, p)}
    _, found = checkpoints.restore_params(trees.unflatten(target), step)
  size = directory.config.model.vocab_size or tokenizers.load(os.path.join(path, 'tokenizer')).vocab.size
  return trees.flatten(found), size


def _left(model: Transformer, path: str) -> bool:
  """Whether a parameter of the base is of no use to a model that has none like it."""
  return bool(LEFT.fullmatch(path)) or not model.config.head.lm and bool(WORDS.fullmatch(path))


def _fitted(path: str, theirs: Array, ours: Array, old_size: int, new_size: int) -> Array:
  """Their array, where ours lies; rows of ids may be more or fewer."""
  if theirs.shape != ours.shape or BY_ID.fullmatch(path) and new_size > old_size:
    if not BY_ID.fullmatch(path) or theirs.shape[1:] != ours.shape[1:]:
      raise JaxlmError(f'config.checkpoint.init_from: {path} has shape {tuple(theirs.shape)} there, {tuple(ours.shape)} '
                       "here; give config.model the base's own shape: config.adopt(config, path) does.")
    old = np.asarray(jax.device_get(theirs))[:old_size]
    rows = np.broadcast_to(old.mean(0), ours.shape).copy()
    rows[:min(old_size, len(rows))] = old[:len(rows)]
    theirs = rows
  return jax.device_put(jnp.asarray(theirs, ours.dtype), ours.sharding)
