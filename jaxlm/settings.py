"""Keys of a config by their paths; their settings, read as a command line writes them, judged by type and range."""
import ast
import math
from typing import Any, Iterator, Mapping

from ml_collections import ConfigDict

from jaxlm.errors import JaxlmError
from jaxlm.lookup import closest
from jaxlm.ranges import Key
from jaxlm.schema import SCHEMA


def leaves(tree: Mapping[str, Any], prefix: str = ''):
  """Yields (dotted path, value) of each leaf; a tuple or Key is a leaf, an empty mapping has none."""
  for key, value in tree.items():
    path = f'{prefix}{key}'
    if isinstance(value, (Mapping, ConfigDict)):
      yield from leaves(value, path + '.')
    else:
      yield path, value


def _groups(tree: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
  """Dotted paths of all inner mappings, empty ones too."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield f'{prefix}{key}'
      yield from _groups(value, f'{prefix}{key}.')


KEYS: dict[str, Key] = dict(leaves(SCHEMA))
GROUPS: tuple[str, ...] = tuple(_groups(SCHEMA))

KINDS = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'text', tuple: 'a tuple'}
BOOLS = {'true': True, 'false': False, '1': True, '0': False}


def as_plain(value: Any) -> Any:
  """Lists, as JSON has them, become tuples."""
  return tuple(as_plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def _wanted(key: Key) -> str:
  """'a number, above 0.0'."""
  kind = KINDS[type(key.value)]
  if key.check is None:
    return kind
  return key.check.wanted if key.check.wanted.startswith(kind) else f'{kind}, {key.check.wanted}'


def _shown(value: Any) -> str:
  """A value on one line of bearable length."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= 120 else text[:117] + '...'


def _fits(key: Key, value: Any) -> bool:
  """Whether a value has the type and lies in the range of a key."""
  if isinstance(key.value, float) and type(value) in (int, float):
    try:
      value = float(value)
    except OverflowError:
      return False
    if not math.isfinite(value):
      return False
  elif type(value) is not type(key.value):
    return False
  return key.check is None or key.check.holds(value)


def _unknown(path: str) -> str:
  """The fault of a path that is no key, with the nearest right one or those beside it."""
  if path in GROUPS:
    inside = [k for k in KEYS if k.startswith(path + '.')]
    return f'config.{path} is a group of keys' + (f'; set one of them, for instance config.{inside[0]}.' if inside
                                                  else ' that holds none; there is nothing to set.')
  group, _, last = path.rpartition('.')
  beside = {k.rpartition('.')[2]: k for k in KEYS if k.rpartition('.')[0] == group}
  elsewhere = [k for k in KEYS if k.endswith(f'.{last}')]
  meant = (beside.get(closest(last, beside)) or (elsewhere[0] if len(elsewhere) == 1 else None)
           or (None if beside else closest(path, KEYS)))
  return f'config.{path} is unknown. ' + (
      f'Did you mean {meant!r}?' if meant else f'Known there: {", ".join(beside)}.' if beside else
      f'Known groups: {", ".join(g for g in GROUPS if "." not in g)}.')


def _read(path: str, text: str) -> Any:
  """The value that a command line means by `text`."""
  key = KEYS[path]
  try:
    match key.value:
      case str():
        return text
      case bool():
        return BOOLS[text.lower()]
      case int():
        return int(text)
      case float():
        return float(text)
    value = as_plain(ast.literal_eval(text))
    return value if isinstance(value, tuple) else (value,)
  except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
    if isinstance(key.value, tuple) and key.check.holds((text,)):
      return (text,)
    raise JaxlmError(f'config.{path} must be {_wanted(key)}; got {_shown(text)}.') from None


def override(config: ConfigDict, path: str, text: str) -> None:
  """Sets one key as a command line writes it: 3e-4, true, text as it is, a tuple as in Python.

  Where the config lacks the key, nothing happens: `faults` says that it is missing.

  Raises:
    JaxlmError: no such key, or not a value of its type. Its range is judged later, by `faults`.
  """
  if path not in KEYS:
    raise JaxlmError(_unknown(path))
  value = _read(path, text)
  *folders, last = path.split('.')
  for folder in folders:
    if not isinstance(config, ConfigDict) or folder not in config:
      return
    config = config[folder]
  if isinstance(config, ConfigDict) and last in config:
    config.get_ref(last).set(value, type_safe=False)  # locking or iterating would compute every reference


class _Absent(Exception):
  """A path leads nowhere; says so in one line."""


def _value(config: ConfigDict, path: str) -> Any:
  """What stands at a path, references followed."""
  value, reached = config, ''
  for part in path.split('.'):
    if not isinstance(value, ConfigDict):
      return _value(config, reached)
    reached = f'{reached}.{part}' if reached else part
    if part not in value:
      remedy = f'set it, for instance to its default {KEYS[reached].value!r}, or ' if reached in KEYS else ''
      raise _Absent(f'config.{reached} is missing; {remedy}start from jaxlm.config.default().')
    value = value[part]
  if path in GROUPS and not isinstance(value, ConfigDict):
    raise _Absent(f'config.{path} must be a group of keys; got {_shown(value)} ({type(value).__name__}).')
  return value


def _paths(config: ConfigDict, prefix: str = '') -> Iterator[str]:
  """Dotted paths of all leaves, also of those whose reference cannot be followed."""
  for key in config.keys():
    path = f'{prefix}{key}'
    try:
      value = config[key]
    except Exception:  # a reference computes anything; `faults` tells
      value = None
    if isinstance(value, ConfigDict) and path not in KEYS:
      yield from _paths(value, path + '.')
    else:
      yield path


def _depth(path: str) -> int:
  """0 for a key that follows no other; else one more than what it follows."""
  derive = KEYS[path].derive
  return 1 + max(map(_depth, derive.sources)) if derive else 0


def faults(config: ConfigDict) -> list[str]:
  """Everything wrong with single keys: missing, unknown, of another type, out of range. One line each.

  A derived key is judged where what it follows is right.
  """
  if not isinstance(config, ConfigDict):
    return [f'A config must be a ConfigDict, as jaxlm.config.default() makes one; got {_shown(config)} '
            f'({type(config).__name__}).']
  found: dict[str, str] = {}
  for path in GROUPS:
    try:
      _value(config, path)
    except _Absent as e:
      found[path] = str(e)
  left_out: set[str] = set()
  for path, key in sorted(KEYS.items(), key=lambda item: _depth(item[0])):
    if key.derive and any(source in found or source in left_out for source in key.derive.sources):
      left_out.add(path)
      continue
    try:
      value = _value(config, path)
    except _Absent as e:
      found[path] = str(e)
      continue
    except Exception as e:  # a reference computes anything
      found[path] = f'config.{path} follows other keys and cannot be computed from them ({e}); set it.'
      continue
    if not _fits(key, as_plain(value)):
      found[path] = f'config.{path} must be {_wanted(key)}; got {_shown(value)} ({type(value).__name__}).'
  unknown = [_unknown(path) for path in _paths(config) if path not in KEYS and path not in GROUPS]
  return list(dict.fromkeys(found[path] for path in (*GROUPS, *KEYS) if path in found)) + unknown
