"""Turns a run directory into a Hugging Face folder, or the other way round, or writes such a folder anew.

  python -m jaxlm.convert --from=runs/gpt2 --to=gpt2-hf                  # of a family that has a form there
  python -m jaxlm.convert --from=Llama-3.2-1B --to=runs/llama            # for --config.checkpoint.init_from
  python -m jaxlm.convert --from=Llama-3.2-1B --to=half --form=hf --save_dtype=bfloat16
  python -m jaxlm.convert --from=llama.Q8_0.gguf --to=llama              # quantised tensors are expanded

Nothing is written over: --to must be new, or an empty folder, and appears when it is complete.
"""
import contextlib
import shutil
import uuid
from pathlib import Path
from typing import Any, Iterator, Mapping

from absl import flags
import jax
from ml_collections import ConfigDict

from jaxlm import config as config_module
from jaxlm import hf, programs, sharding, transfer, trees
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer
from jaxlm.rundir import RunDirectory
from jaxlm.sharding import Layout
from jaxlm.weights import Tensor, read_json, read_weights, write_json, write_weights

_FROM = flags.DEFINE_string('from', None, 'A run directory, a Hugging Face folder, or a GGUF file.')
_TO = flags.DEFINE_string('to', None, 'What to write: a new folder.')
_FORM = flags.DEFINE_enum('form', None, ['run', 'hf'], 'What --to shall be: a run directory or a Hugging Face folder. '
                          'By default what --from is not.')
_DTYPE = flags.DEFINE_enum('save_dtype', None, ['float32', 'bfloat16', 'float16'], 'Of the weights that are written; '
                           'by default as they are.')
_SHARD_BYTES = flags.DEFINE_integer('shard_bytes', 5 * 10**9, 'Size of a safetensors file, at most, but for a tensor '
                                    'that is larger.', lower_bound=1)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint of a run; by default the newest that is whole.')

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
  theirs = hf.recognises(source)
  if not theirs and not (source / 'config.json').is_file():
    raise JaxlmError(f'{source} has no config.json; give a run directory, a Hugging Face folder or a GGUF file.')
  form = _FORM.value or ('run' if theirs and (source / 'config.json').is_file() else 'hf')
  if form == 'run' and not theirs:
    raise JaxlmError(f'{source} is a run directory already; a Hugging Face folder is made of it by --form=hf.')
  if _STEP.value is not None and theirs:
    raise JaxlmError('--step chooses a checkpoint of a run directory; a Hugging Face folder has none. Leave it out.')
  with _new(target) as folder:
    if not theirs:
      told = run_to_hf(source, folder)
    elif form == 'hf':
      told = hf_to_hf(source, folder)
    else:
      told = hf_to_run(source, folder, target)
  print(f'{target}: {told}')


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


def _model(config: ConfigDict, vocab_size: int, dtype: str) -> Transformer:
  """The model of a config, its parameters stacked as training has them, on the host."""
  rules = tuple(config.sharding.rules)
  layout = Layout(sharding.make_mesh({}, jax.local_devices(backend='cpu')[:1]), rules)
  return Transformer(freeze(config_module.resolved(config)['model'] | dict(scan=True), vocab_size=vocab_size,
                            visibility='causal', param_dtype=dtype), layout)


def _told(params: Any, dtype: str) -> str:
  return f'{trees.count(params):,} parameters, {dtype}'


# ---- to a Hugging Face folder -----------------------------------------------------------------------------------


def run_to_hf(source: Path, folder: Path) -> str:
  """Writes the newest checkpoint of a run, its moving average where it has one; says what it was."""
  config = RunDirectory(str(source)).config
  if faults := config_module.faults(config):
    raise JaxlmError('\n'.join(f'{source}/config.json: {fault}' for fault in faults))
  tokenizer = tokenizers.load(source / 'tokenizer')
  model = _model(config, tokenizer.vocab.size, config.precision.params)
  with Checkpoints(source / 'checkpoints', read_only=True) as checkpoints:
    found = checkpoints.restore_params(transfer.wanted(model), _STEP.value,
                                       item='ema' if config.optim.ema_decay else 'params')
  if found is None:
    raise JaxlmError(f'{source} has no checkpoint that can be read; let the run go on until its next save.')
  step, params = found
  said = _json_if_there(source / hf.KEPT / 'config.json')
  half = step == 0 and 'float16' in (said.get('dtype'), said.get('torch_dtype'))  # a run keeps that as float32
  dtype = _DTYPE.value or ('float16' if half else config.precision.params)
  unused = source / hf.KEPT / UNUSED
  hf.save_folder(folder, model.config, params, kept=said or _special_ids(tokenizer.vocab, model.config.structure),
                 unused=read_weights(unused) if unused.exists() else None, dtype=dtype, shard_bytes=_SHARD_BYTES.value)
  _tokenizer_files(source / 'tokenizer', folder)
  if (source / hf.KEPT / TOKENIZER_CONFIG).is_file():
    shutil.copyfile(source / hf.KEPT / TOKENIZER_CONFIG, folder / TOKENIZER_CONFIG)
  vocab, encodes = tokenizer.vocab, model.config.structure in ('encoder', 'encoder_decoder')
  _frame(folder, vocab.bos if config.data.bos else None, vocab.eos if config.data.eos and encodes else None)
  _generation(source / hf.KEPT, folder, model.config)
  return f'step {step} as a {model.config.family} folder, {_told(params, dtype)}'


def hf_to_hf(source: Path, folder: Path) -> str:
  """Writes a folder anew, tensor by tensor: in one file or many, in another dtype, what was quantised expanded."""
  given = hf.load_folder(source)
  params = given.lazy()
  hf.save_folder(folder, given.model, params, kept=given.hf, unused=given.unused, dtype=_DTYPE.value,
                 shard_bytes=_SHARD_BYTES.value)
  beside = source if source.is_dir() else source.parent
  _tokenizer_files(beside, folder)
  _generation(beside, folder, given.model)
  dtypes = {str(leaf.dtype) for leaf in trees.flatten(params).values()}
  return f'a {given.architecture}, {_told(params, _DTYPE.value or " and ".join(sorted(dtypes)))}'


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
  if given.tokenizer is None:
    raise JaxlmError(f'{source} has no tokenizer.json, which a run directory needs; save the tokenizer in that form.')
  if _DTYPE.value == 'float16':
    raise JaxlmError('--save_dtype=float16: a run directory keeps float32 or bfloat16; choose one of these.')
  values = config_module.resolved(given.config)
  values['precision']['params'] = dtype = _DTYPE.value or values['precision']['params']
  values['data']['tokenizer'] = str(target / 'tokenizer')
  config, directory = ConfigDict(values).lock(), RunDirectory(str(folder))
  model = _model(config, given.model.vocab_size, dtype)
  params = given.place(transfer.wanted(model))
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    checkpoints.save(0, {'params': params}, {})
  tokenizer = tokenizers.load(given.tokenizer.parent)
  tokenizer.save(folder / 'tokenizer')
  roles = _json_if_there(folder / 'tokenizer' / TOKENIZER_CONFIG)
  _tokenizer_files(given.tokenizer.parent, folder / 'tokenizer')
  said = _json_if_there(folder / 'tokenizer' / TOKENIZER_CONFIG)
  # Ids that only the folder's config.json named are named here, where there is none.
  write_json(folder / 'tokenizer' / TOKENIZER_CONFIG,
             roles | {key: value for key, value in said.items() if value is not None})
  kept = folder / hf.KEPT
  kept.mkdir()
  write_json(kept / 'config.json', given.hf)
  for name in (GENERATION, TOKENIZER_CONFIG):
    if (given.tokenizer.parent / name).is_file():
      write_json(kept / name, read_json(given.tokenizer.parent / name))
  if len(given.unused):
    (kept / UNUSED).mkdir()
    write_weights(kept / UNUSED, [Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in given.unused.items()],
                  _SHARD_BYTES.value)
  directory.accept(config, {}, tokenizers.load(folder / 'tokenizer').digest, ())
  return f'a run at step 0, {_told(params, dtype)}'


if __name__ == '__main__':
  programs.run(main)
