"""Where a loaded model comes from: a run directory, a Hugging Face folder, or a GGUF file."""
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any, Mapping

import jax

from jaxlm import config as config_module
from jaxlm import adopt, hf, objectives, reading, settings, sharding, transfer, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM
from jaxlm.models import peft, quantised
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer
from jaxlm.rundir import RunDirectory
from jaxlm.sharding import Layout
from jaxlm.types import Prompt


def load(path: str | os.PathLike, mesh: Any = None, dtype: str | None = None,
         base: LM | str | os.PathLike | None = None, step: int = 0) -> LM:
  """The model of a run directory (its newest valid checkpoint), or of a Hugging Face folder.

  A run that kept a moving average of its parameters gives that.

  Args:
    path: what `python -m jaxlm.main` wrote, or a folder with config.json, safetensors and tokenizer.
    mesh: a `jax.sharding.Mesh` from `sharding.make_mesh`, or sizes of its axes as in config.mesh; None: one device.
    dtype: of parameters and computing, 'float32' or 'bfloat16'; None: as the run had them.
    base: of a run that holds a delta alone (config.model.peft): the model it adapts, whose arrays are then shared by all
      deltas that are loaded with it; or where that lies. None: it is read from where the run says.
    step: which checkpoint of a run; 0: the newest that is valid.
  Raises:
    JaxlmError: neither kind of folder, or one that is not complete.
  """
  path = os.fspath(path)
  if dtype not in (None, 'float32', 'bfloat16'):
    raise JaxlmError(f"dtype must be 'float32', 'bfloat16' or None; got {dtype!r}.")
  if hf.recognises(path):
    if base is not None:
      raise JaxlmError(f'{path} is a whole model, which stands on no base; leave base out.')
    return _load_folder(path, mesh, dtype)
  if not os.path.isfile(os.path.join(path, 'config.json')):
    what = ('has no config.json' if os.path.isdir(path) else 'is no such thing' if os.path.exists(path) else
            'is not there')
    raise JaxlmError(f'{path} {what}; give a run directory, a Hugging Face folder or a GGUF file.')
  return _load_run(path, mesh, dtype, load(base, mesh, dtype) if isinstance(base, (str, os.PathLike)) else base, step)


def _layout(config: Any, mesh: Any) -> Layout:
  if mesh is None:
    return sharding.single(config.sharding.rules)
  return Layout(sharding.make_mesh(mesh) if isinstance(mesh, Mapping) else mesh, tuple(config.sharding.rules))


def _load_run(path: str, mesh: Any, dtype: str | None, base: LM | None, step: int) -> LM:
  run = RunDirectory(path)
  config = run.config
  if faults := settings.faults(config):
    raise JaxlmError('\n'.join(f'{path}/config.json: {fault}' for fault in faults))
  tokenizer = tokenizers.load(os.path.join(path, 'tokenizer'))
  objective = objectives.make(config, tokenizer.vocab)
  model = Transformer(freeze(
      config_module.resolved(config)['model'], vocab_size=tokenizer.vocab.size, visibility=objective.visibility,
      compute_dtype=dtype or config.precision.compute, param_dtype=dtype or config.precision.params),
      _layout(config, mesh))
  delta, wanted = model.config.peft.method != 'none', transfer.wanted(model)
  if base is not None and not delta:
    raise JaxlmError(f'{path} is a whole model, which stands on no base; leave base out.')
  if delta:
    wanted, _ = trees.partition(wanted, functools.partial(peft.is_trained, model.config.peft))
  with Checkpoints(os.path.join(path, 'checkpoints'), read_only=True) as checkpoints:
    found = checkpoints.restore_params(wanted, step or None, item='ema' if config.optim.ema_decay else 'params')
  if found is None:
    raise JaxlmError(f'{path} has no checkpoint that can be read; let the run go on until its next save.')
  file = Path(path, 'tokenizer', 'tokenizer.json')  # one that came with a folder may put more around a text
  frame = hf.frame(file) if file.exists() else ([], [])
  kept = os.path.join(path, hf.KEPT)
  chosen = _object(kept, 'config.json') | _object(kept, 'generation_config.json')
  params = found[1]
  if delta and base is not None:
    shapes = jax.eval_shape(lambda tree: reading.unrolled(model, tree)[1], transfer.wanted(model))
    model, params = reading.unrolled(model, params)
    kept = quantised.quantised(base.params, model.config)
    kept, _ = trees.partition(kept, trees.flatten(shapes).__contains__)  # a head of the base's own is not ours
    params = trees.combine(kept, params)
    if differences := trees.diff(shapes, params):
      raise JaxlmError(f'{path} is no delta of this base: {differences[0]}')
  elif delta:
    params = trees.combine(adopt.base(config, model, tokenizer), params)
  return LM(config, model, params, tokenizer, eos=_ends_of(chosen, tokenizer) or None,
            frame=frame if any(frame) else None, prompting=objective.prompt, labels=run.labels)


def _load_folder(path: str, mesh: Any, dtype: str | None) -> LM:
  folder = hf.load_folder(path)
  model = Transformer(dataclasses.replace(folder.model, compute_dtype=dtype or folder.model.compute_dtype,
                                          param_dtype=dtype or folder.model.param_dtype),
                      _layout(folder.config, mesh))
  tokenizer = tokenizers.load(path) if folder.tokenizer else None
  chosen = folder.hf | _object(path, 'generation_config.json')  # what that says goes before config.json
  prompting = functools.partial(_prompt_of_folder, structure=model.config.structure,
                                start=next((chosen[key] for key in ('decoder_start_token_id', 'bos_token_id')
                                            if chosen.get(key) is not None), 0))
  return LM(folder.config, model, folder.place(transfer.wanted(model)), tokenizer, eos=_ends_of(chosen, tokenizer),
            frame=folder.frame, prompting=prompting)


def _prompt_of_folder(ids: list[int], structure: str, start: int) -> Prompt:
  """What a model of another project continues: nothing is known of its objective but what its structure says."""
  if structure == 'encoder_decoder':
    return Prompt([start], ids)
  return Prompt(ids, context=len(ids) if structure == 'two_stream' else 0)


def _object(path: str, name: str) -> dict[str, Any]:
  """What a JSON file says, where there is one."""
  try:
    with open(os.path.join(path, name), encoding='utf-8') as f:
      found = json.load(f)
  except (OSError, ValueError):
    found = None
  return {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}


def _ends_of(chosen: Mapping[str, Any], tokenizer: tokenizers.Tokenizer | None) -> list[int]:
  """All ids that end a text: a chat model has several."""
  given = chosen.get('eos_token_id')
  ends = [i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int)]
  if not ends and tokenizer is not None and tokenizer.vocab.eos is not None:
    ends = [tokenizer.vocab.eos]
  return ends
