"""Hugging Face folders: config.json, weights and tokenizer.json, read and written by the families' tables.

Nothing is unpickled and no code of the folder runs: what asks for either is refused.
"""
import dataclasses
import functools
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Mapping

import numpy as np
import tokenizers
from ml_collections import ConfigDict

from jaxlm import config as base
from jaxlm import gguf, settings, transfer
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError
from jaxlm.families import keys, table
from jaxlm.models.config import ModelConfig, freeze
from jaxlm.types import Tree
from jaxlm.weights import INDEX, SINGLE, Tensor, Weights, cast, read_json, read_weights, write_json, write_weights

KEPT = 'hf'  # in a run directory: what the folder that it came from said and a run has no place for

# Who sees whom in a folder's model, and the objective that says so, by structure.
VISIBILITY = {'encoder': 'full', 'decoder': 'causal', 'encoder_decoder': 'causal', 'two_stream': 'order'}
OBJECTIVE = {'encoder': 'masked', 'decoder': 'causal', 'encoder_decoder': 'prefix', 'two_stream': 'permutation'}


@dataclasses.dataclass(frozen=True)
class Folder:
  """What a Hugging Face folder holds, in our terms; its tensors are read when they are asked for.

  Attributes:
    path: of the folder, or of a GGUF file.
    config: a whole config; `model` is the folder's, `precision.params` the weights' dtype, `data.tokenizer` its
      tokenizer; `data.bos` and `data.eos` say whether that puts tokens before a text, and after it.
    model: the same, frozen, with scan=False as decoding wants it.
    tokenizer: its tokenizer.json, or None.
    hf: config.json as it was.
    architecture: the class named there whose weights these are.
    rows: which tensor holds which parameters.
    weights: exactly the tensors that rows name.
    unused: tensors that no output depends on, carried from folder to folder.
  """
  path: Path
  config: ConfigDict
  model: ModelConfig
  tokenizer: Path | None
  hf: dict[str, Any]
  architecture: str
  rows: list[transfer.Row]
  weights: Weights
  unused: Weights

  @property
  def headed(self) -> bool:
    """Whether it scores the vocabulary. A body does not: its hidden states count."""
    return self.model.head.lm

  @property
  def frame(self) -> tuple[list[int], list[int]]:
    """Ids that its tokenizer puts before and after a text."""
    return frame(self.tokenizer) if self.tokenizer else ([], [])

  @functools.cached_property
  def params(self) -> Tree:
    """NumPy arrays in the files' dtype, unstacked (stack/layer_0/…): all of them at once."""
    return transfer.read(self.rows, self.weights, self.model)

  def lazy(self) -> Tree:
    """The same, none of them read before NumPy asks for it."""
    return transfer.lazy(self.rows, self.weights, self.model)

  def place(self, target: Tree) -> Tree:
    """The parameters on devices, read tensor by tensor; `target` from `transfer.wanted`, stacked or not."""
    return transfer.place(self.rows, self.weights, self.model, target)


# ---- a model's config, theirs and ours -----------------------------------------------------------------------------


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict with the values of another put over it."""
  both = lambda a, b: merged(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else b
  return {**old, **{k: both(old[k], v) if k in old else v for k, v in new.items()}}


def whole_model(overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The `model` part of the default config with overrides; what derives from others follows them."""
  config = base.default()
  config.model.update(overrides)
  return base.resolved(config)['model']


ROPE_KEYS = {{'default': 'none'}.get(kind, kind): {'base', 'local_base', 'fraction', 'interleaved', 'dtype', 'scaling'}
             | {keys.RENAMED.get(key, key) for key in read} for kind, read in keys.SCALINGS.items()}

# Paths of config.model that say nothing about what is computed, and where that is so. The first two lines: how a
# model is trained and run.
UNREAD: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    (r'family|vocab_size|vocab_pad_to|dropout|remat.*|scan|init/.*|peft/.*', lambda m: True),
    (r'attention/(dropout|kernel|block)', lambda m: True),
    (r'moe/(mode|capacity_factor|balance_loss|z_loss)', lambda m: True),
    (r'encoder_layers', lambda m: m['structure'] != 'encoder_decoder'),
    (r'max_length|positions/offset', lambda m: m['positions']['kind'] != 'learned'),
    (r'tie_embeddings|logit_.*|head/(bias|transform.*)', lambda m: not m['head']['lm']),
    (r'head/transform_bias', lambda m: m['head']['transform'] == 'none'),
    (r'head/label_bias', lambda m: m['head']['labels'] == 'none'),
    (r'head/num_labels', lambda m: m['head']['labels'] not in ('sequence', 'token')),
    (r'head/pool', lambda m: m['head']['labels'] != 'sequence' and m['head']['pooler'] == 'none'),
    (r'head/pooler_bias', lambda m: m['head']['pooler'] == 'none'),
    (r'embedding/project_.*', lambda m: m['embedding']['width'] == m['width']),
    (r'attention/latent/(?!kv_rank).*', lambda m: not m['attention']['latent']['kv_rank']),
    (r'mlp/width', lambda m: m['moe']['num_experts'] > 0 and m['moe']['every'] == 1 and m['moe']['first'] == 0),
    (r'moe/(?!num_experts).*', lambda m: not m['moe']['num_experts']),
    (r'moe/shared_gate', lambda m: not m['moe']['shared_width']),
    (r'norm/bias', lambda m: m['norm']['kind'] == 'rmsnorm'),
    (r'residual/first_norm', lambda m: not m['residual']['in_norm']),
    (r'residual/parallel_norms', lambda m: not m['residual']['parallel']),
    (r'positions/two_dims', lambda m: m['positions']['kind'] not in ('learned', 'rope')),
    (r'positions/(num_buckets|max_distance)', lambda m: m['positions']['kind'] != 'buckets'),
    (r'positions/alibi_.*', lambda m: m['positions']['kind'] != 'alibi'),
    (r'positions/rope/.*', lambda m: m['positions']['kind'] != 'rope'),
    (r'generator/(?!width).*', lambda m: not m['generator']['width']),
)


def computed(model: Mapping[str, Any]) -> dict[str, Any]:
  """{path: value} of what decides what a model computes; what is not read, or only steers training, is left out."""
  def leaves(tree, start=''):
    for key, value in tree.items():
      if isinstance(value, Mapping):
        yield from leaves(value, f'{start}{key}/')
      else:
        yield start + key, value
  rope = ROPE_KEYS.get(model['positions']['rope']['scaling'])
  read = lambda path: rope is None or not path.startswith('positions/rope/') or path.rpartition('/')[2] in rope
  return {path: value for path, value in leaves(model)
          if read(path) and not any(re.fullmatch(pattern, path) and unread(model) for pattern, unread in UNREAD)}


def _num_labels(hf: Mapping[str, Any]) -> int:
  names = hf.get('id2label')
  return len(names) if isinstance(names, dict) and names else keys.check('num_labels', hf.get('num_labels', 2), int)


def _overrides(family: ModuleType, hf: Mapping[str, Any], architecture: str) -> dict[str, Any]:
  """Overrides of config.model: the family's reading of config.json, then what the class stands for."""
  found = merged(merged(family.from_hf(hf), dict(head=dict(num_labels=_num_labels(hf)))),
                 family.ARCHITECTURES[architecture])
  if not whole_model(found)['head']['lm']:
    found = found | dict(tie_embeddings=True)  # no parameter for an output layer that is not there
  return found


def _architecture(family: ModuleType, hf: Mapping[str, Any]) -> str:
  named = hf.get('architectures') or [next(iter(family.ARCHITECTURES))]
  if not isinstance(named, list) or len(named) != 1 or str(named[0]) not in family.ARCHITECTURES:
    raise JaxlmError(f'config.json: architectures is {named!r}; known for model_type {family.MODEL_TYPE!r}: '
                     f'{", ".join(family.ARCHITECTURES)}.')
  return named[0]


def _their_config(family: ModuleType, model: ModelConfig, kept: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """(config.json of a model, the class that it is), which together must say everything that is computed.

  Args:
    kept: keys that go along; the class named there is taken where it fits.
  Raises:
    JaxlmError: reading it back would give another model.
  """
  mine = whole_model({})
  mine = {k: v for k, v in dataclasses.asdict(model).items() if k in mine}
  named = kept.get('architectures') if isinstance(kept.get('architectures'), list) else []
  order = sorted(family.ARCHITECTURES, key=lambda name: name not in named)  # stable
  best: dict[str, Any] | None = None
  for name in order:
    try:
      hf = family.to_hf(model)
      if model.head.labels in ('sequence', 'token') and 'num_labels' not in family.ARCHITECTURES[name].get('head', {}):
        hf |= _labels(model.head.num_labels, kept)
      back = whole_model(_overrides(family, hf, name))
    except JaxlmError as e:
      raise JaxlmError(f'A {family.MODEL_TYPE} folder cannot hold this model: {e}') from None
    ours, theirs = computed(mine), computed(back)
    differ = {path: (ours.get(path), theirs.get(path)) for path in {**ours, **theirs}
              if ours.get(path) != theirs.get(path)}
    if not differ:
      return hf, name
    if best is None or len(differ) < len(best):
      best = differ
  path, (value, other) = next(iter(best.items()))
  raise JaxlmError(f'A {family.MODEL_TYPE} folder cannot hold config.model.{path.replace("/", ".")}={value!r}; it '
                   f'would read back as {other!r}.')


def _labels(count: int, kept: Mapping[str, Any]) -> dict[str, Any]:
  """Names of the classes, those that were kept where they are as many."""
  names = kept.get('id2label')
  if not isinstance(names, Mapping) or len(names) != count:
    names = {str(i): f'LABEL_{i}' for i in range(count)}
  return dict(id2label=dict(names), label2id={name: int(i) for i, name in names.items()})


# ---- reading -----------------------------------------------------------------------------------------------------


def recognises(path: str | os.PathLike) -> bool:
  """Whether a path is what `load_folder` reads, be it damaged: a folder with a config.json of theirs, or GGUF."""
  path = Path(path)
  if not (path / 'config.json').is_file():
    return gguf.file_of(path) is not None
  try:
    return 'model_type' in read_json(path / 'config.json')
  except JaxlmError:
    return False


def load_folder(path: str | os.PathLike) -> Folder:
  """Reads a Hugging Face folder of a family that families/table.py knows, or a GGUF file; tensors are left for later.

  Raises:
    JaxlmError: anything missing, damaged, unexpected, or not understood; one line.
  """
  path = Path(path)
  file = None if (path / 'config.json').exists() else gguf.file_of(path)
  source = gguf.read(file) if file else None
  hf = source.hf if source else read_json(path / 'config.json')
  for key in ('auto_map', 'custom_pipelines', 'trust_remote_code'):
    if hf.get(key):
      raise JaxlmError(f'config.json: {key} asks for code that comes with the folder, which never runs here. If '
                       f'the weights are a plain {hf.get("model_type")}, take {key} out of the file.')
  family = table.by_model_type(hf.get('model_type'))
  architecture = _architecture(family, hf)
  weights = source.weights if source else transfer.renamed(family, read_weights(path))
  _bounded(hf, len(weights))
  overrides = _overrides(family, family.settled(hf, weights) if hasattr(family, 'settled') else hf, architecture)
  values = base.resolved(base.default())
  values['model'] = whole_model(overrides)
  structure = values['model']['structure']
  key, other = ('is_decoder', True) if structure == 'encoder' else ('is_causal', False)
  if hf.get(key) is other:
    raise JaxlmError(f'config.json: {key}={other} changes who sees whom, and a {hf["model_type"]} is built as that is '
                     'elsewhere; its weights cannot be used here.')
  values['objective']['name'] = getattr(family, 'OBJECTIVE', OBJECTIVE[structure])
  values['precision']['params'] = 'bfloat16' if set(weights.dtypes.values()) == {'BF16'} else 'float32'
  values['seq_len'] = max(2, min(values['seq_len'], values['model']['max_length']))
  tokenizer = (file.parent if file else path) / 'tokenizer.json'
  tokenizer = tokenizer if tokenizer.is_file() else None
  if tokenizer:
    start, end = frame(tokenizer)
    values['data'].update(tokenizer=str(tokenizer), bos=bool(start), eos=bool(end))
  config = ConfigDict(values).lock()
  if found := settings.faults(config):
    raise JaxlmError(f'{file or path / "config.json"}: {found[0]}')
  model = freeze(values['model'] | dict(scan=False), vocab_size=overrides['vocab_size'],
                 visibility=VISIBILITY[structure], compute_dtype=values['precision']['compute'],
                 param_dtype=values['precision']['params'])
  prefix = source is not None or any(name.startswith(family.PREFIX) for name in weights)
  rows = transfer.rows(family, model, prefix, source.templates if source else ())
  bare = lambda name: name if prefix else name.removeprefix(family.PREFIX)
  unused = {name: weights.entries[bare(name)] for name in transfer.unused_shapes(family, model)
            if bare(name) in weights}
  return Folder(path, config, model, tokenizer, hf, architecture, rows,
                transfer.match(family, model, weights, rows, prefix), Weights(unused))


def _bounded(hf: Mapping[str, Any], tensors: int) -> None:
  """Refuses counts of layers and experts that no model of so many tensors has, before anything is made as often."""
  for key, value in hf.items():
    if re.fullmatch(r'.*_(layers?|experts)', key) and type(value) is int and value > max(1_000, tensors):
      raise JaxlmError(f'config.json says {key}={value}; the weights hold {tensors} tensors.')


def frame(tokenizer: Path) -> tuple[list[int], list[int]]:
  """(ids that a tokenizer.json puts before a text, ids after it)."""
  try:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    backend.no_padding()
    encoding = backend.encode('a')
  except Exception as e:  # the library raises bare Exception
    raise JaxlmError(f'{tokenizer} is not a tokenizer.json that the tokenizers library can read: {e}.') from None
  added = [i for i, id in enumerate(encoding.special_tokens_mask) if id]
  first = next((i for i in range(len(encoding.ids) + 1) if i not in added), 0)
  last = next((i for i in range(len(encoding.ids) - 1, -1, -1) if i not in added), first - 1)
  return encoding.ids[:first], encoding.ids[last + 1:]


# ---- writing -----------------------------------------------------------------------------------------------------


def _apart(path: Path, model: ModelConfig, params: Tree) -> list[tuple[Path, ModelConfig, Tree]]:
  """(folder, model, its parameters) of a model and of the generator that trains beside it and shares its embeddings."""
  alone = dataclasses.replace(model, generator=dataclasses.replace(model.generator, width=0))
  shared = ('embed', 'position_embed', 'type_embed', 'embed_norm')
  return [(path, alone, {name: leaves for name, leaves in params.items() if name != 'generator'}),
          (path / 'generator', model.towers()['generator/'],
           {name: params[name] for name in shared if name in params} | params['generator'])]


def save_folder(path: str | os.PathLike, model: ModelConfig, params: Tree, *, tokenizer: Tokenizer | None = None,
                kept: Mapping[str, Any] | None = None, unused: Mapping[str, np.ndarray] | None = None,
                dtype: str | None = None, shard_bytes: int = 5 * 10**9) -> None:
  """Writes a folder that `transformers` reads. Rows beyond the vocabulary are left out.

  Args:
    path: a new folder; files go in one by one, config.json last. A generator (ELECTRA's) goes into a folder in it.
    model: what the params are of; its family names them, and the class there follows from its heads.
    params: stacked or not, NumPy or jax arrays; one is copied at a time.
    tokenizer: written beside it.
    kept: a config.json whose other keys (what a folder said when it was read) go along.
    unused: tensors of the folder that the model came from; those that it lacks are written as zeros.
    dtype: float32, bfloat16 or float16; None keeps each array's.
    shard_bytes: a file holds at most this, or one tensor.
  Raises:
    JaxlmError: the folder holds a model already, or the family cannot hold this one.
  """
  path, family, unused = Path(path), table.by_name(model.family), unused or {}
  if model.generator.width:
    for folder, part, leaves in _apart(path, model, params):
      save_folder(folder, part, leaves, tokenizer=tokenizer, kept=kept, dtype=dtype, shard_bytes=shard_bytes)
    return
  if any((path / name).exists() for name in ('config.json', SINGLE, INDEX)):
    raise JaxlmError(f'{path} holds a model already; name a new folder.')
  kept = dict(kept or {})
  theirs, architecture = _their_config(family, model, kept)
  config = {key: value for key, value in kept.items() if not re.fullmatch(f'dtype|{keys.ROPE}', key)}
  config |= {key: value for key, value in theirs.items() if key not in config or not re.fullmatch(keys.CHOICES, key)}
  config['architectures'] = [architecture]
  body = not model.head.lm and model.head.labels == 'none'
  if not model.head.lm and 'tie_word_embeddings' in kept:  # of the model that this body came from
    config['tie_word_embeddings'] = kept['tie_word_embeddings']
  wide = None if dtype is None else np.dtype(dtype)
  rows = transfer.rows(family, model, prefix=not body)
  tensors = transfer.outgoing(rows, params, model, wide)
  config['torch_dtype'] = tensors[0].dtype.name
  bare = lambda name: name.removeprefix(family.PREFIX) if body else name
  for name, shape in transfer.unused_shapes(family, model).items():
    array = np.asarray(unused.get(name, np.zeros(shape)))
    tensors.append(Tensor(bare(name), shape, tensors[0].dtype, functools.partial(cast, array, tensors[0].dtype, name)))
  for name, array in getattr(family, 'constants', lambda model: {})(model).items():
    tensors.append(Tensor(bare(name), array.shape, array.dtype, functools.partial(np.asarray, array)))
  path.mkdir(parents=True, exist_ok=True)
  write_weights(path, tensors, shard_bytes)
  if tokenizer is not None:
    tokenizer.save(path)
  write_json(path / 'config.json', config)
