"""The two forms of a saved model, a run directory and a Hugging Face folder, and what goes along with its weights.

Reading one, `of_run` and `of_folder`, leaves the parameters where they are; writing one takes any model's.
"""
import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import config as config_module
from jaxlm import hf, settings, sharding, transfer, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.models import peft
from jaxlm.models.config import ModelConfig, freeze
from jaxlm.models.transformer import Transformer
from jaxlm.rundir import RunDirectory
from jaxlm.sharding import Layout
from jaxlm.types import Tree
from jaxlm.weights import Tensor, read_json, read_weights, write_json, write_weights

# What belongs to a tokenizer, and goes along as it is.
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
                   'chat_template.jinja', 'chat_template.json', 'vocab.json', 'merges.txt', 'vocab.txt', 'spiece.model',
                   'sentencepiece.bpe.model', 'tokenizer.model', 'tokenizer.model.v3', 'tekken.json', 'bpe.codes',
                   'source.spm', 'target.spm', 'target_vocab.json', 'additional_chat_templates')
GENERATION, TOKENIZER_CONFIG = 'generation_config.json', 'tokenizer_config.json'
UNUSED = 'unused'  # beside those in a run directory: tensors that no output depends on
SPECIAL = ('bos', 'eos', 'pad')


@dataclasses.dataclass(frozen=True)
class Source:
  """A run directory or a Hugging Face folder, its parameters unread, and what goes along with them.

  Attributes:
    config: the run's; of a folder, one that stands for it.
    model: parameters as training has them, on the host.
    tokenizer: the folder of that, or None.
    said: config.json of the Hugging Face folder that it is, or came from; {}: of none.
    beside: the folder of other files of that.
    unused: tensors that no output depends on.
  """
  config: ConfigDict
  model: Transformer
  tokenizer: Path | None
  said: Mapping[str, Any]
  beside: Path
  unused: Mapping[str, np.ndarray]


def of_run(path: Path) -> Source:
  """A run directory; raises JaxlmError where it is none."""
  config, kept = RunDirectory(str(path)).config, path / hf.KEPT
  if config is None:
    raise JaxlmError(f'{path} has no config.json; give a run directory, a Hugging Face folder or a GGUF file.')
  if faults := settings.faults(config):
    raise JaxlmError('\n'.join(f'{path}/config.json: {fault}' for fault in faults))
  size = tokenizers.load(path / 'tokenizer').vocab.size
  return Source(config, model_of(config, size, config.precision.params), path / 'tokenizer',
                _json_if_there(kept / 'config.json'), kept,
                read_weights(kept / UNUSED) if (kept / UNUSED).exists() else {})


def of_folder(given: hf.Folder) -> Source:
  """A Hugging Face folder, or a GGUF file."""
  beside = given.path if given.path.is_dir() else given.path.parent
  return Source(given.config, model_of(given.config, given.model.vocab_size, given.config.precision.params),
                given.tokenizer and beside, given.hf, beside, given.unused)


def source_of(path: Path) -> Source:
  """Whichever of both a path is."""
  return of_folder(hf.load_folder(path)) if hf.recognises(path) else of_run(path)


def check_tokenizer(path: Path, source: Source) -> None:
  """Raises JaxlmError where a folder has no tokenizer that a run directory can keep."""
  if source.tokenizer is None:
    raise JaxlmError(f'{path} has no tokenizer.json, which a run directory needs; save the tokenizer in that form.')


def model_of(config: ConfigDict, vocab_size: int, dtype: str) -> Transformer:
  """The model of a config, on the host."""
  rules = tuple(config.sharding.rules)
  layout = Layout(sharding.make_mesh({}, jax.local_devices(backend='cpu')[:1]), rules)
  return Transformer(freeze(config_module.resolved(config)['model'], vocab_size=vocab_size, visibility='causal',
                            param_dtype=dtype), layout)


def restored(path: Path, run: Source, step: int | None) -> tuple[int, Tree]:
  """(step, what the run trains) of that checkpoint, None: the newest; the moving average, where it has one."""
  wanted, _ = trees.partition(transfer.wanted(run.model), functools.partial(peft.is_trained, run.model.config.peft))
  with Checkpoints(path / 'checkpoints', read_only=True) as checkpoints:
    found = checkpoints.restore_params(wanted, step, item='ema' if run.config.optim.ema_decay else 'params')
  if found is None:
    raise JaxlmError(f'{path} has no checkpoint that can be read; let the run go on until its next save.')
  return found


def told(params: Any, dtype: str) -> str:
  """What a program says of parameters."""
  return f'{trees.count(params):,} parameters, {dtype}'


def dtypes(params: Any) -> str:
  """Those that parameters have, joined by "and"."""
  return ' and '.join(sorted({str(leaf.dtype) for leaf in trees.flatten(params).values()}))


# ---- written as a Hugging Face folder ------------------------------------------------------------------------------


def save_folder(folder: Path, goes: Source, config: ConfigDict, model: Transformer, params: Tree, dtype: str,
                shard_bytes: int) -> None:
  """Writes a model and what goes along with it, the tokenizer framing a text as training did."""
  vocab, structure = tokenizers.load(goes.tokenizer).vocab, model.config.structure
  hf.save_folder(folder, model.config, params, kept=goes.said or _special_ids(vocab, structure), unused=goes.unused,
                 dtype=dtype, shard_bytes=shard_bytes)
  copy_tokenizer(goes.tokenizer, folder)
  if (goes.beside / TOKENIZER_CONFIG).is_file():
    shutil.copyfile(goes.beside / TOKENIZER_CONFIG, folder / TOKENIZER_CONFIG)
  encodes = structure in ('encoder', 'encoder_decoder')
  _frame(folder, vocab.bos if config.data.bos else None, vocab.eos if config.data.eos and encodes else None)
  save_generation(goes.beside, folder, model.config)


def _json_if_there(file: Path) -> dict[str, Any]:
  return read_json(file) if file.is_file() else {}


def _special_ids(vocab: tokenizers.Vocab, structure: str) -> dict[str, int]:
  """Ids that a config.json names."""
  ids = {f'{role}_token_id': getattr(vocab, role) for role in SPECIAL}
  if structure == 'encoder_decoder':
    roles = (getattr(vocab, role, None) for role in ('start', 'pad', 'bos'))
    ids['decoder_start_token_id'] = next((id for id in roles if id is not None), None)
  return {key: id for key, id in ids.items() if id is not None}


def save_generation(source: Path, folder: Path, model: ModelConfig) -> None:
  """Writes generation_config.json, as it was, or with the special ids, where a model produces text."""
  if (source / GENERATION).is_file():
    write_json(folder / GENERATION, read_json(source / GENERATION))
  elif model.head.lm and model.structure != 'encoder':
    saved = read_json(folder / 'config.json')
    ids = {key: saved[key] for key in (*(f'{role}_token_id' for role in SPECIAL), 'decoder_start_token_id')
           if saved.get(key) is not None}
    write_json(folder / GENERATION, dict(_from_model_config=True, **ids))


def copy_tokenizer(source: Path, folder: Path) -> None:
  """Every file of a tokenizer, as it is."""
  for name in TOKENIZER_FILES:
    if (source / name).is_dir():
      shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    elif (source / name).is_file():
      shutil.copyfile(source / name, folder / name)


def _frame(folder: Path, first: int | None, last: int | None) -> None:
  """Makes a tokenizer put these ids around each text, as the run did, unless it puts some already."""
  file = folder / 'tokenizer.json'
  definition = read_json(file)
  if hf.frame(file) != ([], []) or (first is None and last is None):
    return
  names = {id: token for token, id in _pieces(file).items()}
  one = lambda id: [dict(SpecialToken=dict(id=names[id], type_id=0))] if id is not None else []
  text = lambda name: [dict(Sequence=dict(id=name, type_id=0))]
  template = dict(type='TemplateProcessing', single=one(first) + text('A') + one(last),
                  pair=one(first) + text('A') + one(last) + text('B') + one(last),
                  special_tokens={names[id]: dict(id=names[id], ids=[id], tokens=[names[id]])
                                  for id in {first, last} if id is not None})
  old = definition.get('post_processor')
  definition['post_processor'] = template if old is None else dict(type='Sequence', processors=[old, template])
  write_json(file, definition)


def _pieces(file: Path) -> Mapping[str, int]:
  return tokenizers.load(file).backend.get_vocab(with_added_tokens=True)


# ---- written as a run directory ------------------------------------------------------------------------------------


def save_run(folder: Path, target: Path, goes: Source, config: ConfigDict, params: Tree, dtype: str,
             shard_bytes: int) -> None:
  """Writes a run at step 0 and what goes along with it, to a folder that becomes the target."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.tokenizer, config.precision.params = str(target / 'tokenizer'), dtype
  directory = RunDirectory(str(folder))
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    checkpoints.save(0, {'params': params}, {})
  tokenizer = tokenizers.load(goes.tokenizer)
  tokenizer.save(folder / 'tokenizer')
  roles = _json_if_there(folder / 'tokenizer' / TOKENIZER_CONFIG)
  copy_tokenizer(goes.tokenizer, folder / 'tokenizer')
  said = _json_if_there(folder / 'tokenizer' / TOKENIZER_CONFIG)
  # Ids that only the folder's config.json named are named here, where there is none.
  write_json(folder / 'tokenizer' / TOKENIZER_CONFIG,
             roles | {key: value for key, value in said.items() if value is not None})
  kept = folder / hf.KEPT
  kept.mkdir()
  if goes.said:
    write_json(kept / 'config.json', goes.said)
  for name in (GENERATION, TOKENIZER_CONFIG):
    if (goes.beside / name).is_file():
      write_json(kept / name, read_json(goes.beside / name))
  if len(goes.unused):
    (kept / UNUSED).mkdir()
    write_weights(kept / UNUSED, [Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in goes.unused.items()],
                  shard_bytes)
  directory.accept(config, {}, tokenizers.load(folder / 'tokenizer').digest, (), ())
