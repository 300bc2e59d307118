"""Hugging Face folders: config.json, safetensors and tokenizer.json, read and written by the families' tables.

Only safetensors are read: nothing is unpickled, no name in a file becomes a path, no code of the folder runs.
"""
import dataclasses
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from ml_collections import ConfigDict

from jaxlm import config as base
from jaxlm import sharding, trees
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.families import bijections, keys, table
from jaxlm.models.config import ModelConfig, freeze
from jaxlm.models.transformer import Transformer, unstack
from jaxlm.types import JaxlmError, Tree

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16)}

# Parts of config.model that a config.json need not hold: how a model is trained and run, not what it computes.
FREE = re.compile(r'family|vocab_size|vocab_pad_to|dropout|remat.*|scan|init/.*|attention/(dropout|kernel|block)')
ROPE_KEYS = {kind: {'base', 'scaling'} | {keys.RENAMED.get(key, key) for key in read}
             for kind, read in keys.SCALINGS.items()}


@dataclasses.dataclass(frozen=True)
class Folder:
  """What a Hugging Face folder holds, in our terms.

  Attributes:
    config: a whole config; `model` is the folder's, `precision.params` the weights' dtype, `data.tokenizer` its
      tokenizer and `data.bos` whether that puts a first token before a text.
    model: the same, frozen, with scan=False as decoding wants it.
    params: NumPy arrays in the files' dtype, unstacked (stack/layer_0/…).
    tokenizer: its tokenizer.json, or None.
    headed: whether it has an output layer. A body has none: its hidden states count, its logits mean nothing.
    hf: config.json as it was.
  """
  config: ConfigDict
  model: ModelConfig
  params: Tree
  tokenizer: Path | None
  headed: bool
  hf: dict[str, Any]


# ---- weights -----------------------------------------------------------------------------------------------------


def _listed(names, most: int = 3) -> str:
  names = sorted(names)
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _read_json(file: Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise JaxlmError(f'{file} is missing; a Hugging Face folder has one.') from None
  except (ValueError, RecursionError) as e:
    raise JaxlmError(f'{file} is not valid JSON: {e}.') from None
  if not isinstance(value, dict):
    raise JaxlmError(f'{file} must hold a JSON object; got {type(value).__name__}.')
  return value


class Weights(Mapping[str, np.ndarray]):
  """The tensors of a folder by name; each is read from its file when it is asked for.

  Attributes:
    shapes: of each tensor, from the files' headers.
    dtypes: likewise, as safetensors names them: F32, BF16.
  """

  def __init__(self, files: Mapping[str, Path]):
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._file_of: dict[str, Any] = {}
    for title, path in files.items():
      try:
        file = safetensors.safe_open(path, framework='np')
        names = list(file.keys())
      except FileNotFoundError:
        raise JaxlmError(f'{path} is missing; {INDEX} lists it.') from None
      except (OSError, safetensors.SafetensorError) as e:
        raise JaxlmError(f'{path} is no whole safetensors file: {e}.') from None
      for name in names:
        # Dots and word characters: what every library writes, and nothing that a file system would read as a place.
        if not re.fullmatch(r'[\w\-]+(\.[\w\-]+)*', name):
          raise JaxlmError(f'{path} holds a tensor named {name!r}, which is no name of a parameter.')
        if name in self._file_of:
          raise JaxlmError(f'Tensor {name} stands in two files of the folder, {title} among them.')
        part = file.get_slice(name)
        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        self._file_of[name] = file

  def __getitem__(self, name: str) -> np.ndarray:
    return self._file_of[name].get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._file_of)

  def __len__(self) -> int:
    return len(self._file_of)


def read_weights(folder: str | os.PathLike) -> Weights:
  """Opens model.safetensors, or the shards that model.safetensors.index.json lists.

  Raises:
    JaxlmError: neither is there, a file is damaged or missing, or an index that names a file elsewhere, or tensors
      other than those its files hold.
  """
  folder = Path(folder)
  if (folder / SINGLE).exists():
    return Weights({SINGLE: folder / SINGLE})
  if not (folder / INDEX).exists():
    pickled = [p.name for pattern in ('*.bin', '*.pt', '*.pth', '*.h5', '*.msgpack') for p in folder.glob(pattern)]
    remedy = f' {_listed(pickled)} can run code and is not read; save it as safetensors.' if pickled else ''
    raise JaxlmError(f'{folder} has no {SINGLE} and no {INDEX}.' + remedy)
  weight_map = _read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
    raise JaxlmError(f'{folder / INDEX} must hold weight_map, an object of tensor names and file names.')
  files = sorted(set(weight_map.values()))
  for name in files:
    if not re.fullmatch(r'[\w\-][\w\-.]*\.safetensors', name):
      raise JaxlmError(f'{folder / INDEX} names the file {name!r}; only *.safetensors beside it are read.')
  weights = Weights({name: folder / name for name in files})
  if set(weights) != set(weight_map):
    raise JaxlmError(f'{folder / INDEX} and its files disagree about {_listed(set(weights) ^ set(weight_map))}.')
  return weights


# ---- the table of a family, spelled out for a model ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of theirs, and the arrays of ours it holds."""
  theirs: str
  ours: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  bijection: bijections.Bijection


def param_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the unstacked parameters of a model; nothing is computed."""
  # Scanned, then unstacked: tracing a layer at a time would take seconds where there are 80.
  scanned = Transformer(dataclasses.replace(model, scan=True), sharding.single(base.default().sharding.rules))
  init = lambda: unstack(nn.unbox(scanned.init(jax.random.key(0), {'tokens': jnp.zeros((1, 1), jnp.int32)}))['params'],
                         model)
  return {path: tuple(x.shape) for path, x in trees.flatten(jax.eval_shape(init)).items()}


def rows(family: ModuleType, model: ModelConfig, prefix: bool = True) -> list[Row]:
  """The family's table for this very model.

  Args:
    family: from families.table.
    model: whose parameters they are.
    prefix: False leaves PREFIX out of their names, as bodies do.
  Raises:
    JaxlmError: a parameter of the model that the family has no name for.
  """
  shapes, found, covered = param_shapes(model), [], set()
  for ours, theirs, bijection in family.TEMPLATES:
    ours = (ours,) if isinstance(ours, str) else ours
    layers = range(model.num_layers) if '{layer}' in theirs else range(1)
    for layer in layers:
      paths = tuple(path.format(layer=layer) for path in ours)
      if not all(path in shapes for path in paths):
        continue
      name = theirs.format(layer=layer)
      covered.update(paths)
      found.append(Row(name if prefix else name.removeprefix(family.PREFIX), paths, tuple(shapes[p] for p in paths),
                       bijections.parse(bijection)))
  if nameless := set(shapes) - covered:
    raise JaxlmError(f'Family {family.MODEL_TYPE} has no name for parameters of this model: {_listed(nameless)}.')
  return found


def import_params(family: ModuleType, model: ModelConfig, weights: Weights) -> Tree:
  """Our parameters, unstacked, from their tensors.

  Args:
    family: whose table names them.
    model: whose parameters they shall be.
    weights: every parameter exactly once; tied embeddings may stand twice, where both are equal.
  Raises:
    JaxlmError: missing, unexpected or misshapen tensors, or a dtype that is no float of 16 or 32 bits.
  """
  prefix = any(name.startswith(family.PREFIX) for name in weights)
  wanted = rows(family, model, prefix)
  names = {row.theirs for row in wanted}
  if missing := names - set(weights):
    raise JaxlmError(f'The weights lack {_listed(missing)}, which config.json calls for.')
  extra = {name for name in weights if name not in names and not re.fullmatch(family.BUFFERS, name)}
  if model.tie_embeddings:
    for twin, name in family.TIED.items():
      name = name if prefix else name.removeprefix(family.PREFIX)
      if twin in extra and name in weights:
        if not np.array_equal(weights[twin], weights[name]):
          raise JaxlmError(f'config.json ties embeddings, but {twin} and {name} differ; set tie_word_embeddings to '
                           'false there if the model has an output layer of its own.')
        extra.remove(twin)
  if extra:
    raise JaxlmError(f'The weights hold {_listed(extra)}, which config.json does not call for.')
  for row in wanted:
    shape = row.bijection.their_shape(row.shapes, model.vocab_size)
    if weights.shapes[row.theirs] != shape:
      raise JaxlmError(f'Tensor {row.theirs} has shape {weights.shapes[row.theirs]}; config.json calls for {shape}.')
    if weights.dtypes[row.theirs] not in DTYPES:
      raise JaxlmError(f'Tensor {row.theirs} is {weights.dtypes[row.theirs]}; {", ".join(DTYPES)} are read.')
  params: dict[str, np.ndarray] = {}
  for row in wanted:
    arrays = row.bijection.forward(weights[row.theirs], row.shapes, model.vocab_size)
    params.update(zip(row.ours, arrays, strict=True))
  return trees.unflatten(params)


# ---- folders -----------------------------------------------------------------------------------------------------


def whole_model(overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The `model` part of the default config with overrides. Plain dicts: nothing follows anything any more."""
  def merge(old, new):
    return {k: merge(v, new[k]) if isinstance(v, dict) and k in new else new.get(k, v) for k, v in old.items()}
  return merge(base.resolved(base.default())['model'], overrides)


def _headed(family: ModuleType, hf: Mapping[str, Any]) -> bool:
  named = hf.get('architectures') or [next(name for name, headed in family.ARCHITECTURES.items() if headed)]
  if not isinstance(named, list) or len(named) != 1 or str(named[0]) not in family.ARCHITECTURES:
    raise JaxlmError(f'config.json: architectures is {named!r}; known for model_type {family.MODEL_TYPE!r}: '
                     f'{", ".join(family.ARCHITECTURES)}.')
  return family.ARCHITECTURES[named[0]]


def load_folder(path: str | os.PathLike) -> Folder:
  """Reads a Hugging Face folder of a family that families/table.py knows.

  Raises:
    JaxlmError: anything missing, damaged, unexpected, or not understood; one line.
  """
  path = Path(path)
  hf = _read_json(path / 'config.json')
  family = table.by_model_type(hf.get('model_type'))
  overrides = family.from_hf(hf)
  headed = _headed(family, hf)
  if not headed:
    overrides = overrides | dict(tie_embeddings=True)  # no parameter for an output layer that is not there
  weights = read_weights(path)
  if overrides['num_layers'] > len(weights):
    raise JaxlmError(f'config.json says {overrides["num_layers"]} layers; the weights hold {len(weights)} tensors.')
  values = base.resolved(base.default())
  values['model'] = whole_model(overrides)
  values['precision']['params'] = 'bfloat16' if set(weights.dtypes.values()) == {'BF16'} else 'float32'
  tokenizer = path / 'tokenizer.json'
  tokenizer = tokenizer if tokenizer.is_file() else None
  if tokenizer:
    values['data'].update(tokenizer=str(tokenizer), bos=_adds_bos(tokenizer), eos=False)
  config = ConfigDict(values).lock()
  if found := base.faults(config):
    raise JaxlmError(f'{path / "config.json"}: {found[0]}')
  model = freeze(values['model'] | dict(scan=False), vocab_size=overrides['vocab_size'], visibility='causal',
                 compute_dtype=values['precision']['compute'], param_dtype=values['precision']['params'])
  return Folder(config, model, import_params(family, model, weights), tokenizer, headed, hf)


def _adds_bos(tokenizer: Path) -> bool:
  """Whether a tokenizer puts a token before each text."""
  try:
    return bool(tokenizers.Tokenizer.from_file(str(tokenizer)).encode('').ids)
  except Exception as e:  # the library raises bare Exception
    raise JaxlmError(f'{tokenizer} is not a tokenizer.json that the tokenizers library can read: {e}.') from None


def _their_config(family: ModuleType, model: ModelConfig) -> dict[str, Any]:
  """The config.json of a model, which must say everything that is computed.

  Raises:
    JaxlmError: reading it back would give another model.
  """
  try:
    hf = family.to_hf(model)
    back = whole_model(family.from_hf(hf))
  except JaxlmError as e:
    raise JaxlmError(f'A {family.MODEL_TYPE} folder cannot hold this model: {e}') from None
  theirs = computed(back)
  for path, value in computed({k: v for k, v in dataclasses.asdict(model).items() if k in back}).items():
    if theirs.get(path) != value:
      raise JaxlmError(f'A {family.MODEL_TYPE} folder cannot hold config.model.{path.replace("/", ".")}={value!r}; it '
                       f'would read back as {theirs.get(path)!r}.')
  return hf


def computed(model: Mapping[str, Any], start: str = '') -> dict[str, Any]:
  """{path: value} of what decides what a model computes; keys that are not read, or only steer training, left out."""
  out: dict[str, Any] = {}
  for key, value in model.items():
    path = f'{start}{key}'
    if path == 'positions/rope':
      read = ROPE_KEYS.get(value['scaling'], value) if model['kind'] == 'rope' else ()
      out.update({f'{path}/{k}': v for k, v in value.items() if k in read})
    elif isinstance(value, dict):
      out.update(computed(value, path + '/'))
    elif not FREE.fullmatch(path):
      out[path] = value
  return out


def save_folder(path: str | os.PathLike, model: ModelConfig, params: Tree, *, headed: bool = True,
                tokenizer: Tokenizer | None = None, kept: Mapping[str, Any] | None = None,
                shard_bytes: int = 5 * 10**9) -> None:
  """Writes a folder that `transformers` reads. Rows beyond the vocabulary are left out.

  Args:
    path: a new folder; files go in one by one, config.json last.
    model: what the params are of; its family names them.
    params: unstacked, NumPy or jax arrays; dtypes are kept.
    headed: False writes the body.
    tokenizer: written beside it.
    kept: a config.json whose other keys (what a folder said when it was read) go along.
    shard_bytes: a file holds at most this, or one tensor.
  Raises:
    JaxlmError: the folder holds a model already, or the family cannot hold this one.
  """
  path, family = Path(path), table.by_name(model.family)
  if any((path / name).exists() for name in ('config.json', SINGLE, INDEX)):
    raise JaxlmError(f'{path} holds a model already; name a new folder.')
  architecture = next(name for name, has_head in family.ARCHITECTURES.items() if has_head == headed)
  leaves, kept = trees.flatten(params), dict(kept or {})
  config = {key: value for key, value in kept.items() if not re.fullmatch(f'dtype|{keys.ROPE}', key)}
  config |= _their_config(family, model) | dict(architectures=[architecture])
  written = [row for row in rows(family, model, prefix=headed) if headed or row.ours != ('head',)]
  config['torch_dtype'] = np.dtype(leaves[written[0].ours[0]].dtype).name
  if not headed and 'tie_word_embeddings' in kept:  # of the model that this body came from
    config['tie_word_embeddings'] = kept['tie_word_embeddings']

  shards, size = [[]], 0
  for row in written:
    row_bytes = sum(leaves[p].nbytes for p in row.ours)
    if shards[-1] and size + row_bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(row)
    size += row_bytes
  path.mkdir(parents=True, exist_ok=True)
  weight_map: dict[str, str] = {}
  for i, shard in enumerate(shards):
    name = SINGLE if len(shards) == 1 else f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    tensors = {row.theirs: row.bijection.inverse([np.asarray(leaves[p]) for p in row.ours], model.vocab_size)
               for row in shard}
    safetensors.numpy.save_file(tensors, path / (name + '.tmp'), metadata={'format': 'pt'})
    (path / (name + '.tmp')).replace(path / name)
    weight_map.update({theirs: name for theirs in tensors})
  if len(shards) > 1:
    _write_json(path / INDEX, dict(metadata=dict(total_size=sum(leaf.nbytes for leaf in leaves.values())),
                                   weight_map=weight_map))
  if tokenizer is not None:
    tokenizer.save(path)
  _write_json(path / 'config.json', config)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
  temporary = file.with_suffix('.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
  temporary.replace(file)
