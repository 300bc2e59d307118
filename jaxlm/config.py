"""A config: made by `default()`, changed by an experiment, checked once before any device is touched.

The keys themselves, with units, reasons and ranges, stand in schema.py.
"""
import dataclasses
import json
import math
from typing import Any, Mapping

from ml_collections import ConfigDict

from jaxlm.lookup import nearest
from jaxlm.schema import SCHEMA, Key
from jaxlm.types import JaxlmError


def _leaves(tree: Mapping[str, Any], prefix: str = ''):
  """Yields (dotted path, value) of each leaf; a tuple or Key is a leaf, an empty mapping has none."""
  for key, value in tree.items():
    path = f'{prefix}{key}'
    if isinstance(value, (Mapping, ConfigDict)):
      yield from _leaves(value, path + '.')
    else:
      yield path, value


KEYS: dict[str, Key] = dict(_leaves(SCHEMA))


def default() -> ConfigDict:
  """A config with every key at its default; derived ones follow what they derive from."""
  values = lambda tree: {k: v.value if isinstance(v, Key) else values(v) for k, v in tree.items()}
  config = ConfigDict(values(SCHEMA))
  for path, key in KEYS.items():
    if key.derive:
      *folders, last = path.split('.')
      parent = config
      for folder in folders:
        parent = parent[folder]
      parent[last] = key.derive(config)
  return config.lock()


def smoke(config: ConfigDict) -> ConfigDict:
  """Shrinks any experiment to seconds on a CPU: bytes of the standard library, 4 layers of width 64."""
  config.data.update(source='stdlib', paths='', mixture=(), phases=(), tokenizer='bytes', workers=0)
  config.update(steps=4, batch_size=16, batch_ramp=(), accumulation=1, seq_len=64, log_every=1, eval_every=0,
                save_every=0)
  config.model.update(width=64, num_layers=4, vocab_pad_to=512, vocab_size=0, max_length=64, dropout=0.0)
  config.model.mlp.width = 256
  config.model.attention.update(num_heads=8, head_dim=8, dropout=0.0,
                                num_kv_heads=4 if config.model.attention.num_kv_heads
                                < config.model.attention.num_heads else 8,
                                windows=tuple(min(w, 16) for w in config.model.attention.windows))
  config.optim.update(warmup_steps=min(config.optim.warmup_steps, 2), total_steps=4)
  config.eval.update(batch_size=16, max_tokens=4096, sample_tokens=8)
  config.model.positions.rope.original_length = 64
  return config


# ---- an experiment's argument ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OneOf:
  """An argument of an experiment that takes one of the known values."""
  value: str
  known: tuple[str, ...]


def one_of(value: str, known) -> OneOf:
  """An argument with a default and the values it may take."""
  return OneOf(value, tuple(known))


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """Reads what follows the colon in --config=experiments/x.py:size=nano,smoke.

  Args:
    arg: 'name=value,flag', or None. A bare name sets a flag.
    **defaults: each argument's default: a bool, an int, a float, a str, or `one_of(default, known)`.
  Raises:
    JaxlmError: an unknown argument, or a value it cannot take.
  """
  values = {k: d.value if isinstance(d, OneOf) else d for k, d in defaults.items()}
  for item in filter(None, (arg or '').split(',')):
    key, equals, given = item.partition('=')
    if key not in defaults:
      raise JaxlmError(f'Unknown argument {key!r} of the experiment. Known: {", ".join(defaults) or "none"}.'
                       + nearest(key, defaults))
    kind = defaults[key]
    if isinstance(kind, OneOf):
      if given not in kind.known:
        raise JaxlmError(f'Unknown {key} {given!r}. Known: {", ".join(kind.known)}.' + nearest(given, kind.known))
      values[key] = given
    elif isinstance(kind, bool):
      if given not in ('', 'true', 'True', 'false', 'False'):
        raise JaxlmError(f'Argument {key} is a flag, got {given!r}; say {key} or {key}=false.')
      values[key] = given not in ('false', 'False')
    else:
      try:
        values[key] = type(kind)(given) if equals else kind
      except ValueError:
        raise JaxlmError(f'Argument {key} wants {type(kind).__name__}, got {given!r}.') from None
  return ConfigDict(values)


# ---- checking ----------------------------------------------------------------------------------------------------


def _as_plain(value: Any) -> Any:
  """Lists, as JSON has them, become tuples."""
  return tuple(_as_plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def _kind(value: Any) -> str:
  names = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'text', tuple: 'a tuple'}
  return names[type(value)]


def _fault(path: str, key: Key, value: Any) -> str | None:
  """What is wrong with one value, or None."""
  wanted = _kind(key.value)
  if key.check and key.check.wanted != wanted:
    wanted += f', {key.check.wanted}'
  right = (type(value) is type(key.value)) or (isinstance(key.value, float) and type(value) is int)
  if right and isinstance(value, float) and not math.isfinite(value):
    right = False
  if right and (key.check is None or key.check.holds(value)):
    return None
  return f'config.{path} must be {wanted}; got {value!r} ({type(value).__name__}).'


def faults(config: ConfigDict) -> list[str]:
  """Everything wrong with single keys: missing, unknown, of another type, out of range. One line each."""
  found, given = [], {}
  for path, key in KEYS.items():
    value: Any = config
    try:
      for part in path.split('.'):
        value = value[part]
    except (KeyError, TypeError, AttributeError):
      found.append(f'config.{path} is missing; set it, for instance to its default {key.value!r}, '
                   'or start from jaxlm.config.default().')
      continue
    except ZeroDivisionError:
      found.append(f'config.{path} cannot be derived: a division by zero; set it.')
      continue
    given[path] = value
    fault = _fault(path, key, _as_plain(value) if isinstance(value, (list, tuple)) else value)
    if fault:
      found.append(fault)
  groups = {path.rpartition('.')[0] for path in KEYS} | {''}
  for path, _ in _leaves(config):
    if path not in KEYS and not any(path.startswith(known + '.') for known in KEYS):
      group = path.rpartition('.')[0]
      known = [k for k in KEYS if k.rpartition('.')[0] == group] if group in groups else list(KEYS)
      found.append(f'config.{path} is unknown.' + (nearest(path, known) or ' Known there: '
                   + ', '.join(k.rpartition(".")[2] for k in known[:40]) + '.'))
  return found


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as a plain nested dict, every reference replaced by its value."""
  return config.copy_and_resolve_references().to_dict()


def dumps(config: ConfigDict) -> str:
  """The resolved config as JSON, the content of config.json."""
  return json.dumps(resolved(config), indent=2)


def loads(text: str) -> ConfigDict:
  """A config from config.json."""
  tree = lambda v: {k: tree(x) for k, x in v.items()} if isinstance(v, dict) else _as_plain(v)
  return ConfigDict(tree(json.loads(text))).lock()


def differences(config: ConfigDict, other: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """Dotted key -> (value in config, value in other), where they differ; None where there is none."""
  mine, theirs = dict(_leaves(resolved(config))), dict(_leaves(resolved(other)))
  return {k: (mine.get(k), theirs.get(k)) for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)}
