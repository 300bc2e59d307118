"""Deltas beside a base: of a run or an adapter of the peft package, written as either, or merged into the base."""
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import adapters, adopt, forms, hf, settings, targets, transfer, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.forms import Source
from jaxlm.lm import LM
from jaxlm.models import peft
from jaxlm.models.config import PeftConfig
from jaxlm.models.stack import restack
from jaxlm.models.transformer import Transformer
from jaxlm.types import Tree
from jaxlm.weights import cast


@dataclasses.dataclass(frozen=True)
class Delta:
  """A delta, and the run that holds it beside its base.

  Attributes:
    path: of what it was read from.
    config: the run's: model.peft, and checkpoint.init_from, the base.
    model: with the delta.
    params: the delta, and what is trained with it.
    base: None where that is not there.
    goes: what goes along with the whole model.
  """
  path: Path
  config: ConfigDict
  model: Transformer
  params: Tree
  base: Source | None
  goes: Source


def of_run(source: Path, run: Source, step: int | None) -> Delta:
  """A checkpoint of a run that holds a delta, None: the newest; weights of the base are not read."""
  _, params = forms.restored(source, run, step)
  path = run.config.checkpoint.init_from
  base = forms.source_of(Path(path)) if path and os.path.isdir(path) else None
  digest = lambda folder: folder and tokenizers.load(folder).digest
  is_same = base is not None and digest(base.tokenizer) == digest(run.tokenizer)
  return Delta(source, run.config, run.model, params, base, base if is_same else run)


def of_adapter(source: Path, path: Path, step: int | None) -> Delta:
  """An adapter of the peft package, as a run at step 0 beside its base.

  Args:
    source: of the adapter.
    path: of the base.
    step: checkpoint of the base, where that is a run; None: the newest.
  """
  if not path.is_dir():
    raise JaxlmError(f'--base={path} is no folder; give a Hugging Face folder or a run directory.')
  base = forms.source_of(path)
  forms.check_tokenizer(path, base)
  if base.config.model.peft.method != 'none':
    raise JaxlmError(f'--base={path} holds a delta itself; make a whole model of it first, with --merge.')
  if _is_averaged(path, base):
    raise JaxlmError(f'--base={path} keeps a moving average, which its Hugging Face folder has, while a delta stands '
                     'beside the parameters themselves; give that folder.')
  method, params = adapters.load(source, base.model.config)
  config = base.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.peft.update(dataclasses.asdict(method))
    config.checkpoint.update(init_from=os.path.abspath(path), init_step=_pinned(path, step), resume='')
  if faults := settings.faults(config):
    raise JaxlmError('\n'.join(f'{source}: {fault}' for fault in faults))
  model = forms.model_of(config, base.model.config.vocab_size, config.precision.params)
  return Delta(source, config, model, params, base, base)


def _is_averaged(path: Path, base: Source) -> bool:
  return not hf.recognises(path) and bool(base.config.optim.ema_decay)


def _pinned(path: Path, step: int | None) -> int:
  """Which checkpoint of a base is meant for good; 0: of a Hugging Face folder, or the only one."""
  if hf.recognises(path):
    return 0
  with Checkpoints(path / 'checkpoints', read_only=True) as checkpoints:
    known = checkpoints.steps()
    step = checkpoints.latest_valid() if step is None else step
  if step not in known or step == 0 and len(known) > 1:  # 0 means the newest
    raise JaxlmError(f'--base={path} has no checkpoint {step} that a delta can stay beside. Steps: {known}.')
  return step


def to_adapter(delta: Delta, folder: Path, dtype: str | None) -> str:
  """Writes what `peft.PeftModel.from_pretrained` reads over the base's Hugging Face form."""
  _check_apart(delta)
  params, path = delta.params, delta.config.checkpoint.init_from
  if dtype:
    params = trees.map_paths(lambda name, x: cast(np.asarray(x), np.dtype(dtype), name), params)
  adapters.save(folder, delta.model.config, params, base_model=path)
  kept = delta.model.config.peft.base
  beside = '' if kept == 'same' else f'; trained beside weights in {kept}, of which --merge makes an exact model'
  return f'an adapter of {path}, {forms.told(params, forms.dtypes(params))}{beside}'


def _check_apart(delta: Delta) -> None:
  """Raises JaxlmError where the adapter over the base's Hugging Face form would be another model than this run."""
  path, base = delta.config.checkpoint.init_from, delta.base
  if not path:
    raise JaxlmError(f'The base of {delta.path} is drawn by its seed, and no folder holds it; add --merge.')
  if base is None:
    return
  if _is_averaged(Path(path), base):
    raise JaxlmError(f'{path} keeps a moving average, which its Hugging Face folder has, while this delta stands '
                     'beside the parameters themselves; add --merge.')
  if base.model.config.vocab_size < delta.model.config.vocab_size:
    raise JaxlmError(f'The vocabulary of {delta.path} has {delta.model.config.vocab_size} entries, that of its base '
                     f'{path} {base.model.config.vocab_size}; an adapter adds none, so add --merge.')
  ours, theirs = (transfer.param_shapes(targets.plain(model.config)) for model in (delta.model, base.model))
  for name, shape in ours.items():
    kept = adopt.BY_ID.fullmatch(name) or peft.is_trained(delta.model.config.peft, name)
    if not kept and theirs.get(name) != shape:
      raise JaxlmError(f'{name} of {delta.path} is neither in its base {path} nor trained; add --merge, or train it by '
                       'config.model.peft.also.')


def to_run(delta: Delta, folder: Path, target: Path, dtype: str | None, shard_bytes: int) -> str:
  """Makes a run that holds the delta alone, and says where its base is: jaxlm.load reads both."""
  # As fine as the finer of both, so that nothing is lost.
  finer = delta.config.precision.params if forms.dtypes(delta.params) == 'bfloat16' else 'float32'
  dtype, (device,) = dtype or finer, delta.model.layout.mesh.devices.flat
  params = jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(dtype), device), delta.params)
  forms.save_run(folder, target, delta.goes, delta.config, params, dtype, shard_bytes)
  return f'a delta beside {_base_of(delta)}, {forms.told(params, dtype)}'


def _merged(delta: Delta) -> LM:
  """The whole model; its parameters a layer by itself."""
  tokenizer = tokenizers.load(delta.goes.tokenizer)
  params = adopt.base(delta.config, delta.model, tokenizer)
  return LM(delta.config, delta.model, trees.combine(params, delta.params), tokenizer).merged()


def merged_to_hf(delta: Delta, folder: Path, dtype: str | None, shard_bytes: int) -> str:
  """Writes the delta's whole model as a Hugging Face folder."""
  lm, dtype = _merged(delta), dtype or delta.config.precision.params
  forms.save_folder(folder, delta.goes, lm.config, lm.model, lm.params, dtype, shard_bytes)
  told = forms.told(lm.params, dtype)
  return f'{delta.path} merged into {_base_of(delta)}, a {lm.model.config.family} folder, {told}'


def merged_to_run(delta: Delta, folder: Path, target: Path, dtype: str | None, shard_bytes: int) -> str:
  """Writes the delta's whole model as a run that has done no step."""
  lm, dtype = _merged(delta), dtype or delta.config.precision.params
  with lm.config.unlocked():
    lm.config.model.peft.update(dataclasses.asdict(PeftConfig()))
    lm.config.checkpoint.init_step, lm.config.optim.ema_decay = 0, 0.0  # what is merged is the average already
  params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
  params = restack(params, lm.model.config) if lm.config.model.scan else params
  forms.save_run(folder, target, delta.goes, lm.config, params, dtype, shard_bytes)
  return f'{delta.path} merged into {_base_of(delta)}, a run at step 0, {forms.told(params, dtype)}'


def _base_of(delta: Delta) -> str:
  return delta.config.checkpoint.init_from or 'what its seed draws'
