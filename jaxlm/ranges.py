"""A key of a config: its default, how it follows from others, the range it must lie in."""
import dataclasses
import math
from typing import Any, Callable

from ml_collections import ConfigDict, FieldReference


@dataclasses.dataclass(frozen=True)
class Check:
  """A range a value must lie in, and how to say so."""
  wanted: str
  holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Derived:
  """A value that follows other keys, the sources, until it is set itself; setting it leaves them alone."""
  sources: tuple[str, ...]
  then: Callable[..., Any]

  def __call__(self, config: ConfigDict) -> FieldReference:
    return FieldReference(self.then(*(_reference(config, path) for path in self.sources)))


@dataclasses.dataclass(frozen=True)
class Key:
  """One key: its default, or how it follows from others, and its range."""
  value: Any
  check: Check | None = None
  derive: Derived | None = None


def at_least(low) -> Check:
  return Check(f'at least {low}', lambda x: x >= low)


def above(low) -> Check:
  return Check(f'above {low}', lambda x: x > low and x != math.inf)


def between(low, high) -> Check:
  return Check(f'from {low} to {high}', lambda x: low <= x <= high)


def fraction() -> Check:
  """At least 0 and less than 1: a rate of dropping, holding out, forgetting."""
  return Check('at least 0 and less than 1', lambda x: 0 <= x < 1)


def choice(*names: str) -> Check:
  return Check('one of ' + ', '.join(repr(n) for n in names), lambda x: x in names)


def name() -> Check:
  """The name of something looked up where it is used, in a table or as "module:attribute"."""
  return Check('a name', lambda x: bool(x.strip()))


def text() -> Check:
  """Any text that can stand on one line; '' means none."""
  return Check('one line of text', lambda x: '\n' not in x and '\0' not in x)


def texts() -> Check:
  return Check('a tuple of texts', lambda x: all(isinstance(i, str) for i in x))


def integers(low: int) -> Check:
  return Check(f'a tuple of integers, each at least {low}',
               lambda x: all(type(i) is int and i >= low for i in x))


def pairs(check: Callable[[Any, Any], bool], wanted: str) -> Check:
  return Check(f'a tuple of {wanted} pairs',
               lambda x: all(isinstance(p, tuple) and len(p) == 2 and check(*p) for p in x))


def flag() -> Check:
  return Check('True or False', lambda x: isinstance(x, bool))


def is_number(x) -> bool:
  return type(x) is int or (isinstance(x, float) and math.isfinite(x))


def is_scheduled(first, value) -> bool:
  return type(first) is int and first >= 0 and value(first)


def _reference(config: ConfigDict, path: str) -> FieldReference:
  *folders, last = path.split('.')
  for folder in folders:
    config = config[folder]
  return config.get_ref(last)


def ref(*sources: str, then: Callable[..., Any] = lambda x: x) -> Derived:
  """What follows the keys at these paths, in order."""
  return Derived(sources, then)


def share() -> Check:
  return Check('above 0 and below 1', lambda x: 0 < x < 1)


def rules() -> Check:
  return pairs(lambda a, m: isinstance(a, str) and (m is None or isinstance(m, (str, tuple))),
               '(logical axis, mesh axis)')
