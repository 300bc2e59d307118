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
import shutil
import uuid
from pathlib import Path
from typing import Iterator

from jaxlm import deltas, forms, hf, programs, targets, transfer
from jaxlm.errors import JaxlmError

flags = programs.Flags()
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
  run = None if is_folder or is_adapter else forms.of_run(source)
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
    return _of_delta(source, run, form, folder, target)
  if run:
    return run_to_hf(source, run, folder)
  return hf_to_hf(source, folder) if form == 'hf' else hf_to_run(source, folder, target)


def _of_delta(source: Path, run: forms.Source | None, form: str, folder: Path, target: Path) -> str:
  """Writes a delta, of a run or of an adapter, or the whole model that it makes of its base."""
  delta = (deltas.of_run(source, run, _STEP.value) if run else
           deltas.of_adapter(source, Path(_BASE.value), _STEP.value))
  dtype, size = _DTYPE.value, _SHARD_BYTES.value
  if _MERGE.value:
    return (deltas.merged_to_run(delta, folder, target, dtype, size) if form == 'run' else
            deltas.merged_to_hf(delta, folder, dtype, size))
  return deltas.to_run(delta, folder, target, dtype, size) if form == 'run' else deltas.to_adapter(delta, folder, dtype)


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


def run_to_hf(source: Path, run: forms.Source, folder: Path) -> str:
  """Writes the newest checkpoint of a run, its moving average where it has one; says what it was."""
  step, params = forms.restored(source, run, _STEP.value)
  half = step == 0 and 'float16' in (run.said.get('dtype'), run.said.get('torch_dtype'))  # a run keeps that as float32
  dtype = _DTYPE.value or ('float16' if half else run.config.precision.params)
  forms.save_folder(folder, run, run.config, run.model, params, dtype, _SHARD_BYTES.value)
  pool = run.config.model.head.pool if run.config.objective.name == 'contrast' else 'mean'
  lost = '' if pool == 'mean' else f'; read again it embeds by the mean of states, for it cannot say {pool!r}'
  return f'step {step} as a {run.model.config.family} folder, {forms.told(params, dtype)}{lost}'


def hf_to_hf(source: Path, folder: Path) -> str:
  """Writes a folder anew, tensor by tensor: in one file or many, in another dtype, what was quantised expanded."""
  given = hf.load_folder(source)
  params = given.lazy()
  hf.save_folder(folder, given.model, params, kept=given.hf, unused=given.unused, dtype=_DTYPE.value,
                 shard_bytes=_SHARD_BYTES.value)
  beside = source if source.is_dir() else source.parent
  forms.copy_tokenizer(beside, folder)
  forms.save_generation(beside, folder, given.model)
  return f'a {given.architecture}, {forms.told(params, _DTYPE.value or forms.dtypes(params))}'


def hf_to_run(source: Path, folder: Path, target: Path) -> str:
  """Makes a run that has done no step: jaxlm.load reads it, and training starts from it by checkpoint.init_from."""
  given = hf.load_folder(source)
  goes = forms.of_folder(given)
  forms.check_tokenizer(source, goes)
  dtype = _DTYPE.value or given.config.precision.params
  params = given.place(transfer.wanted(forms.model_of(given.config, given.model.vocab_size, dtype)))
  forms.save_run(folder, target, goes, given.config, params, dtype, _SHARD_BYTES.value)
  return f'a run at step 0, {forms.told(params, dtype)}'


if __name__ == '__main__':
  programs.run(main)
