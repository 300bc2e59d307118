"""A name becomes a thing: a key of a table, or "package.module:attribute"."""
import difflib
import importlib
from typing import Any, Iterable, Mapping

from jaxlm.errors import JaxlmError


def closest(name: str, known: Iterable[str]) -> str | None:
  """The known name most like `name`, or None if none is like it."""
  return next(iter(difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)), None)


def nearest(name: str, known: Iterable[str]) -> str:
  """' Did you mean …?' for the known name most like `name`, or ''."""
  found = closest(name, known)
  return f' Did you mean {found!r}?' if found else ''


def lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
  """Returns `table[name]`, or imports "package.module:attribute".

  Args:
    table: what the project knows by name.
    name: a key of it, or a module path and an attribute joined by a colon.
    kind: what the table holds, for the message: 'objective', 'optimizer'.
  Raises:
    JaxlmError: the name is neither, or does not import.
  """
  if name in table:
    return table[name]
  if ':' in name:
    module, _, attribute = name.partition(':')
    try:
      return getattr(importlib.import_module(module), attribute)
    except Exception as e:  # importing runs the module
      told = next(iter(str(e).splitlines()), '') or type(e).__name__
      raise JaxlmError(f'Cannot import {kind} {name!r}: {told.rstrip(".")}.') from e
  raise JaxlmError(f'Unknown {kind} {name!r}. Known: {", ".join(sorted(table))}; or pass "module:attribute".'
                   + nearest(name, table))
