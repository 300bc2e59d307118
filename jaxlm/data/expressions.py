"""What a record gives to a template or an expression of jinja2; what it lacks is an error that names the record."""
import functools
import json
import re
from typing import Any, Callable

from jaxlm.data.records import Record
from jaxlm.errors import JaxlmError


@functools.cache
def _environment():
  """Where templates are compiled; a field that is missing is an error."""
  import jinja2
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def there(value):
    if value is None:
      raise jinja2.TemplateError('a field is null')
    return value

  found = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=there)
  found.filters['split'] = _split
  # jinja2's own writes for HTML, and halves of characters beyond U+FFFF, which are no text in Python.
  found.filters['tojson'] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent, default=str)
  return found


def _split(text: str, pattern: str) -> list[str]:
  """What stands between and behind matches of a pattern, and before the first, if anything; no space at the ends."""
  ends = [0, *(at for found in re.finditer(pattern, text) for at in found.span()), len(text)]
  first, *others = (text[start:end].rstrip() for start, end in zip(ends[::2], ends[1::2]))
  return [first, *others] if first else others


@functools.lru_cache(256)
def _compiled(source: str, is_text: bool) -> Callable[[Record], Any]:
  """A template, or an expression in {{ }}, as a function of a record."""
  import jinja2
  try:
    if is_text:
      return _environment().from_string(source).render
    inner = source.strip()
    if not (inner.startswith('{{') and inner.endswith('}}')):
      raise jinja2.TemplateError('an expression stands in {{ }}, and nothing beside it')
    return _environment().compile_expression(inner[2:-2], undefined_to_none=False)
  except jinja2.TemplateError as e:
    raise JaxlmError(f'Template {source!r}: {e}.') from e


def made(source: str, id: str, record: Record, is_text: bool) -> Any:
  """The text of a template, or the value of an expression in {{ }}; raises JaxlmError, naming the record by its id."""
  import jinja2
  try:
    value = _compiled(source, is_text)({key: x for key, x in record.items() if x is not None})  # null is no text "None"
    return str(value) if isinstance(value, jinja2.Undefined) else value  # which raises what is missing
  except (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as e:
    raise JaxlmError(f'{id}: template {source!r}: {e}; the record has {listed(record)}. Mend the record, or the '
                     'template.') from e


def listed(record: Record) -> str:
  """The names of its first fields, and of those that are null."""
  name = lambda null: ', '.join(map(repr, [key for key, x in record.items() if (x is None) == null][:12]))
  return (name(False) or 'no fields') + (f' (null: {name(True)})' if name(True) else '')
