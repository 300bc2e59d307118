"""Turns a run directory into a Hugging Face folder, or the other way round, or writes such a folder anew.

  python -m jaxlm.convert --from=runs/gpt2 --to=gpt2-hf                  # of a family that has a form there
  python -m jaxlm.convert --from=Llama-3.2-1B --to=runs/llama            # for --config.checkpoint.init_from
  python -m jaxlm.convert --from=Llama-3.2-1B --to=half --form=hf --save_dtype=bfloat16
  python -m jaxlm.convert --from=llama.Q8_0.gguf --to=llama              # quantised tensors are expanded

A run that holds a delta beside a base (config.model.peft) becomes an adapter of the peft package; --merge puts the
delta into the base's weights, of which any folder is made. An adapter and its --base become a run, likewise:

  python -m jaxlm.convert --from=runs/lora --to=adapter                  # adapter_config.json and its weights
  python -m jaxlm.convert --from=runs/lora --to=tuned --merge            # a Hugging Face folder; --form=run: a run
  python -m jaxlm.convert --from=adapter --base=Llama-3.2-1B --to=runs/lora        # the delta, and where its base is
  python -m jaxlm.convert --from=adapter --base=Llama-3.2-1B --to=tuned --merge --form=hf

Nothing is written over: --to must be new, or an empty folder, and appears when it is complete.
"""
import contextlib
import dataclasses
import functools
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Iterator, Mapping

from absl import flags
import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import config as config_module
from jaxlm import adapters, adopt, hf, programs, sharding, targets, transfer, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM
from jaxlm.models import peft
from jaxlm.models.config import PeftConfig, freeze
from jaxlm.models.stack import restack
from jaxlm.models.transformer import Transformer
from jaxlm.rundir import RunDirectory
from jaxlm.sharding import Layout
from jaxlm.types import Tree
from jaxlm.weights import Tensor, cast, read_json, read_weights, write_json, write_weights

_FROM = flags.DEFINE_string('from', None, 'A run directory, a Hugging Face folder, a GGUF file, or an adapter of the '
                            'peft package.')
_TO = flags.DEFINE_string('to', None, 'What to write: a new folder.')
_FORM = flags.DEFINE_enum('form', None, ['run', 'hf'], 'What --to shall be: a run directory, or a Hugging Face folder '
                          'or adapter. By default what --from is not.')
_BASE = flags.DEFINE_string('base', None, 'What an adapter stands beside: a Hugging Face folder or a run directory.')
_MERGE = flags.DEFINE_bool('merge', False, 'Put a delta into the weights of its base: of lora, ia3 and bitfit.')
_DTYPE = flags.DEFINE_enum('save_dtype', None, ['float32', 'bfloat16', 'float16'], 'Of the weights that are written; '
                           'by default as they are.')
_SHARD_BYTES = flags.DEFINE_integer('shard_bytes', 5 * 10**9, 'Size of a safetensors file, at most, but for a tensor '
                                    'that is larger.', lower_bound=1)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint of the run that --from or --base is; by default the newest that '
                             'is whole.')

# What belongs to a tokenizer, and goes along as it is.
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
                   'chat_template.jinja', 'chat_template.json', 'vocab.json', 'merges.txt', 'vocab.txt', 'spiece.model',
                   'sentencepiece.bpe.model', 'tokenizer.model', 'tokenizer.model.v3', 'tekken.json', 'bpe.codes',
                   'source.spm', 'target.spm', 'target_vocab.json', 'additional_chat_templates')
GENERATION, TOKENIZER_CONFIG = 'generation_config.json', 'tokenizer_config.json'
UNUSED = 'unused'  # beside those in a run directory: tensors that no output depends on
SPECIAL = ('bos', 'eos', 'pad')


def main(argv: list[str]) -> None:
  """Converts what the flags say."""
  del argv
  for flag in (_FROM, _TO):
    if not flag.value:
      raise JaxlmError(f'--{flag.name} is missing; give a folder.')
  source, target = Path(_FROM.value), Path(_TO.value)
  if not source.exists():
    raise JaxlmError(f'--from={source} is not there; give a run directory, a Hugging Face folder or a GGUF file.')
  with _new(target) as folder:
    told = _converted(source, folder, target)
  print(f'{target}: {told}')


def _converted(source: Path, folder: Path, target: Path) -> str:
  """Writes what the flags ask for into a folder that becomes the target; says what it was."""
  is_folder = hf.recognises(source)
  is_adapter = not is_folder and (source / targets.CONFIG).is_file()
  run = None if is_folder or is_adapter else _run(source)
  holds_delta = is_adapter or run is not None and run.config.model.peft.method != 'none'
  form = _FORM.value or ('run' if is_adapter or is_folder and (source / 'config.json').is_file() else 'hf')
  if is_adapter != bool(_BASE.value):
    raise JaxlmError(f'{source} is an adapter; say what it stands beside: --base, a Hugging Face folder or a run '
                     'directory.' if is_adapter else f'--base is what an adapter stands beside, and {source} has no '
                     f'{targets.CONFIG}; leave it out.')
  if _MERGE.value and not holds_delta:
    raise JaxlmError(f'--merge puts a delta into its base, and {source} holds none; leave it out.')
  if run and form == 'run' and not _MERGE.value:
    raise JaxlmError(f'{source} is a run directory already; a Hugging Face folder is made of it by --form=hf.')
  if is_adapter and form == 'hf' and not _MERGE.value:
    raise JaxlmError(f'{source} is an adapter of the peft package already; --merge makes a Hugging Face folder of it '
                     'and --base.')
  if _STEP.value is not None and (is_folder or is_adapter and hf.recognises(_BASE.value)):
    raise JaxlmError('--step chooses a checkpoint of a run directory; a Hugging Face folder has none. Leave it out.')
  if form == 'run' and _DTYPE.value == 'float16':
    raise JaxlmError('--save_dtype=float16: a run directory keeps float32 or bfloat16; choose one of these.')
  if holds_delta:
    delta = delta_of_adapter(source, Path(_BASE.value)) if is_adapter else delta_of_run(source, run)
    if _MERGE.value:
      return merged_to_run(delta, folder, target) if form == 'run' else merged_to_hf(delta, folder)
    return delta_to_run(delta, folder, target) if form == 'run' else delta_to_adapter(delta, folder)
  if run:
    return run_to_hf(source, run, folder)
  return hf_to_hf(source, folder) if form == 'hf' else hf_to_run(source, folder, target)


@contextlib.contextmanager
def _new(target: Path) -> Iterator[Path]:
  """A folder to write to, which becomes the target when all is done, and vanishes where it is not."""
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise JaxlmError(f'{target} is there already and is never written over; name a new folder.')
  target = target.absolute()
  folder = target.with_name(f'.{target.name}.{uuid.uuid4().hex[:12]}.tmp')
  folder.mkdir(parents=True)
  try:
    yield folder
    folder.rename(target)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


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


def _run(path: Path) -> Source:
  config, kept = RunDirectory(str(path)).config, path / hf.KEPT
  if config is None:
    raise JaxlmError(f'{path} has no config.json; give a run directory, a Hugging Face folder or a GGUF file.')
  if faults := config_module.faults(config):
    raise JaxlmError('\n'.join(f'{path}/config.json: {fault}' for fault in faults))
  size = tokenizers.load(path / 'tokenizer').vocab.size
  return Source(config, _model(config, size, config.precision.params), path / 'tokenizer',
                _json_if_there(kept / 'config.json'), kept,
                read_weights(kept / UNUSED) if (kept / UNUSED).exists() else {})


def _folder(given: hf.Folder) -> Source:
  beside = given.path if given.path.is_dir() else given.path.parent
  return Source(given.config, _model(given.config, given.model.vocab_size, given.config.precision.params),
                given.tokenizer and beside, given.hf, beside, given.unused)


def _source(path: Path) -> Source:
  return _folder(hf.load_folder(path)) if hf.recognises(path) else _run(path)


def _needs_tokenizer(path: Path, source: Source) -> None:
  if source.tokenizer is None:
    raise JaxlmError(f'{path} has no tokenizer.json, which a run directory needs; save the tokenizer in that form.')


def _model(config: ConfigDict, vocab_size: int, dtype: str) -> Transformer:
  """The model of a config, on the host."""
  rules = tuple(config.sharding.rules)
  layout = Layout(sharding.make_mesh({}, jax.local_devices(backend='cpu')[:1]), rules)
  return Transformer(freeze(config_module.resolved(config)['model'], vocab_size=vocab_size, visibility='causal',
                            param_dtype=dtype), layout)


def _restored(path: Path, run: Source) -> tuple[int, Tree]:
  """(step, what the run trains) of its newest checkpoint, or of --step: the moving average, where it has one."""
  wanted, _ = trees.partition(transfer.wanted(run.model), functools.partial(peft.is_trained, run.model.config.peft))
  with Checkpoints(path / 'checkpoints', read_only=True) as checkpoints:
    found = checkpoints.restore_params(wanted, _STEP.value, item='ema' if run.config.optim.ema_decay else 'params')
  if found is None:
    raise JaxlmError(f'{path} has no checkpoint that can be read; let the run go on until its next save.')
  return found


def _told(params: Any, dtype: str) -> str:
  return f'{trees.count(params):,} parameters, {dtype}'


def _dtypes(params: Any) -> str:
  return ' and '.join(sorted({str(leaf.dtype) for leaf in trees.flatten(params).values()}))


# ---- to a Hugging Face folder -----------------------------------------------------------------------------------


def run_to_hf(source: Path, run: Source, folder: Path) -> str:
  """Writes the newest checkpoint of a run, its moving average where it has one; says what it was."""
  step, params = _restored(source, run)
  half = step == 0 and 'float16' in (run.said.get('dtype'), run.said.get('torch_dtype'))  # a run keeps that as float32
  dtype = _DTYPE.value or ('float16' if half else run.config.precision.params)
  _save_folder(folder, run, run.config, run.model, params, dtype)
  return f'step {step} as a {run.model.config.family} folder, {_told(params, dtype)}'


def _save_folder(folder: Path, goes: Source, config: ConfigDict, model: Transformer, params: Tree, dtype: str) -> None:
  """Writes a model and what goes along with it, the tokenizer framing a text as training did."""
  vocab, structure = tokenizers.load(goes.tokenizer).vocab, model.config.structure
  hf.save_folder(folder, model.config, params, kept=goes.said or _special_ids(vocab, structure), unused=goes.unused,
                 dtype=dtype, shard_bytes=_SHARD_BYTES.value)
  _tokenizer_files(goes.tokenizer, folder)
  if (goes.beside / TOKENIZER_CONFIG).is_file():
    shutil.copyfile(goes.beside / TOKENIZER_CONFIG, folder / TOKENIZER_CONFIG)
  encodes = structure in ('encoder', 'encoder_decoder')
  _frame(folder, vocab.bos if config.data.bos else None, vocab.eos if config.data.eos and encodes else None)
  _generation(goes.beside, folder, model.config)


def hf_to_hf(source: Path, folder: Path) -> str:
  """Writes a folder anew, tensor by tensor: in one file or many, in another dtype, what was quantised expanded."""
  given = hf.load_folder(source)
  params = given.lazy()
  hf.save_folder(folder, given.model, params, kept=given.hf, unused=given.unused, dtype=_DTYPE.value,
                 shard_bytes=_SHARD_BYTES.value)
  beside = source if source.is_dir() else source.parent
  _tokenizer_files(beside, folder)
  _generation(beside, folder, given.model)
  return f'a {given.architecture}, {_told(params, _DTYPE.value or _dtypes(params))}'


def _json_if_there(file: Path) -> dict[str, Any]:
  return read_json(file) if file.is_file() else {}


def _special_ids(vocab: tokenizers.Vocab, structure: str) -> dict[str, int]:
  """Ids that a config.json names."""
  ids = {f'{role}_token_id': getattr(vocab, role) for role in SPECIAL}
  if structure == 'encoder_decoder':
    roles = (getattr(vocab, role, None) for role in ('start', 'pad', 'bos'))
    ids['decoder_start_token_id'] = next((id for id in roles if id is not None), None)
  return {key: id for key, id in ids.items() if id is not None}


def _generation(source: Path, folder: Path, model: Any) -> None:
  """generation_config.json, as it was, or with the special ids, where a model produces text."""
  if (source / GENERATION).is_file():
    write_json(folder / GENERATION, read_json(source / GENERATION))
  elif model.head.lm and model.structure != 'encoder':
    config = read_json(folder / 'config.json')
    ids = {key: config[key] for key in (*(f'{role}_token_id' for role in SPECIAL), 'decoder_start_token_id')
           if config.get(key) is not None}
    write_json(folder / GENERATION, dict(_from_model_config=True, **ids))


def _tokenizer_files(source: Path, folder: Path) -> None:
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


# ---- to a run directory ------------------------------------------------------------------------------------------


def hf_to_run(source: Path, folder: Path, target: Path) -> str:
  """Makes a run that has done no step: jaxlm.load reads it, and training starts from it by checkpoint.init_from."""
  given = hf.load_folder(source)
  goes = _folder(given)
  _needs_tokenizer(source, goes)
  dtype = _DTYPE.value or given.config.precision.params
  params = given.place(transfer.wanted(_model(given.config, given.model.vocab_size, dtype)))
  _save_run(folder, target, goes, given.config, params, dtype)
  return f'a run at step 0, {_told(params, dtype)}'


def _save_run(folder: Path, target: Path, goes: Source, config: ConfigDict, params: Tree, dtype: str) -> None:
  """Writes a run at step 0 and what goes along with it."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.tokenizer, config.precision.params = str(target / 'tokenizer'), dtype
  directory = RunDirectory(str(folder))
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    checkpoints.save(0, {'params': params}, {})
  tokenizer = tokenizers.load(goes.tokenizer)
  tokenizer.save(folder / 'tokenizer')
  roles = _json_if_there(folder / 'tokenizer' / TOKENIZER_CONFIG)
  _tokenizer_files(goes.tokenizer, folder / 'tokenizer')
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
                  _SHARD_BYTES.value)
  directory.accept(config, {}, tokenizers.load(folder / 'tokenizer').digest, ())


# ---- deltas beside a base ----------------------------------------------------------------------------------------


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


def delta_of_run(source: Path, run: Source) -> Delta:
  """The newest checkpoint of a run that holds a delta; weights of the base are not read."""
  _, params = _restored(source, run)
  path = run.config.checkpoint.init_from
  base = _source(Path(path)) if path and os.path.isdir(path) else None
  digest = lambda folder: folder and tokenizers.load(folder).digest
  is_same = base is not None and digest(base.tokenizer) == digest(run.tokenizer)
  return Delta(source, run.config, run.model, params, base, base if is_same else run)


def delta_of_adapter(source: Path, path: Path) -> Delta:
  """An adapter of the peft package, as a run at step 0 beside its base."""
  if not path.is_dir():
    raise JaxlmError(f'--base={path} is no folder; give a Hugging Face folder or a run directory.')
  base = _source(path)
  _needs_tokenizer(path, base)
  if base.config.model.peft.method != 'none':
    raise JaxlmError(f'--base={path} holds a delta itself; make a whole model of it first, with --merge.')
  if _is_averaged(path, base):
    raise JaxlmError(f'--base={path} keeps a moving average, which its Hugging Face folder has, while a delta stands '
                     'beside the parameters themselves; give that folder.')
  method, params = adapters.load(source, base.model.config)
  config = base.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.peft.update(dataclasses.asdict(method))
    config.checkpoint.update(init_from=os.path.abspath(path), init_step=_pinned(path), resume='')
  if faults := config_module.faults(config):
    raise JaxlmError('\n'.join(f'{source}: {fault}' for fault in faults))
  model = _model(config, base.model.config.vocab_size, config.precision.params)
  return Delta(source, config, model, params, base, base)


def _is_averaged(path: Path, base: Source) -> bool:
  return not hf.recognises(path) and bool(base.config.optim.ema_decay)


def _pinned(path: Path) -> int:
  """Which checkpoint of a base is meant for good; 0: of a Hugging Face folder, or the only one."""
  if hf.recognises(path):
    return 0
  with Checkpoints(path / 'checkpoints', read_only=True) as checkpoints:
    known, step = checkpoints.steps(), _STEP.value
    step = checkpoints.latest_valid() if step is None else step
  if step not in known or step == 0 and len(known) > 1:  # 0 means the newest
    raise JaxlmError(f'--base={path} has no checkpoint {step} that a delta can stay beside. Steps: {known}.')
  return step


def delta_to_adapter(delta: Delta, folder: Path) -> str:
  """Writes what `peft.PeftModel.from_pretrained` reads over the base's Hugging Face form."""
  _check_apart(delta)
  params, path = delta.params, delta.config.checkpoint.init_from
  if _DTYPE.value:
    params = trees.map_paths(lambda name, x: cast(np.asarray(x), np.dtype(_DTYPE.value), name), params)
  adapters.save(folder, delta.model.config, params, base_model=path)
  kept = delta.model.config.peft.base
  beside = '' if kept == 'same' else f'; trained beside weights in {kept}, of which --merge makes an exact model'
  return f'an adapter of {path}, {_told(params, _dtypes(params))}{beside}'


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


def delta_to_run(delta: Delta, folder: Path, target: Path) -> str:
  """Makes a run that holds the delta alone, and says where its base is: jaxlm.load reads both."""
  # As fine as the finer of both, so that nothing is lost.
  finer = delta.config.precision.params if _dtypes(delta.params) == 'bfloat16' else 'float32'
  dtype, (device,) = _DTYPE.value or finer, delta.model.layout.mesh.devices.flat
  params = jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(dtype), device), delta.params)
  _save_run(folder, target, delta.goes, delta.config, params, dtype)
  return f'a delta beside {_base_of(delta)}, {_told(params, dtype)}'


def _merged(delta: Delta) -> LM:
  """The whole model; its parameters a layer by itself."""
  tokenizer = tokenizers.load(delta.goes.tokenizer)
  params = adopt.base(delta.config, delta.model, tokenizer)
  return LM(delta.config, delta.model, trees.combine(params, delta.params), tokenizer).merged()


def merged_to_hf(delta: Delta, folder: Path) -> str:
  """Writes the delta's whole model as a Hugging Face folder."""
  lm, dtype = _merged(delta), _DTYPE.value or delta.config.precision.params
  _save_folder(folder, delta.goes, lm.config, lm.model, lm.params, dtype)
  return f'{delta.path} merged into {_base_of(delta)}, a {lm.model.config.family} folder, {_told(lm.params, dtype)}'


def merged_to_run(delta: Delta, folder: Path, target: Path) -> str:
  """Writes the delta's whole model as a run that has done no step."""
  lm, dtype = _merged(delta), _DTYPE.value or delta.config.precision.params
  with lm.config.unlocked():
    lm.config.model.peft.update(dataclasses.asdict(PeftConfig()))
    lm.config.checkpoint.init_step, lm.config.optim.ema_decay = 0, 0.0  # what is merged is the average already
  params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
  params = restack(params, lm.model.config) if lm.config.model.scan else params
  _save_run(folder, target, delta.goes, lm.config, params, dtype)
  return f'{delta.path} merged into {_base_of(delta)}, a run at step 0, {_told(params, dtype)}'


def _base_of(delta: Delta) -> str:
  return delta.config.checkpoint.init_from or 'what its seed draws'


if __name__ == '__main__':
  programs.run(main)
