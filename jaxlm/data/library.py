"""The standard library of the running Python as modules and functions: real code, for tasks that are made of it."""
import ast
import functools
import io
import warnings
from pathlib import Path
from typing import Iterator, NamedTuple

from jaxlm.data import sources


class Function(NamedTuple):
  """A function or method, not one inside another function; texts are dedented to its `def`.

  Attributes:
    id: path:line of its `def`.
    head: decorators and signature; all of the code if there is no docstring on lines of its own.
    doc_lines: the docstring as it stands, between `head` and `body`.
    doc: its value, '' if there is none.
    indent: columns that were taken off.
    first: its first line in the file, from 1, decorators included.
    body_lines: first and last line of `body` in the file, from 1.
    defaults: (parameter, text, where in `code` it starts), those on one line.
  """
  id: str
  name: str
  qualname: str
  head: str
  doc_lines: str
  doc: str
  body: str
  indent: int
  first: int
  body_lines: tuple[int, int]
  defaults: tuple[tuple[str, str, int], ...]

  @property
  def code(self) -> str:
    return self.head + self.body


class Module(NamedTuple):
  """A file of the library, its functions, and which of its lines (from 1) import."""
  path: str
  lines: tuple[str, ...]
  functions: tuple[Function, ...]
  imports: frozenset[int]

  @property
  def name(self) -> str:
    """As it is imported; '' if it cannot be."""
    parts = self.path.removesuffix('.py').removesuffix('/__init__').split('/')
    return '.'.join(parts) if all(part.isidentifier() for part in parts) else ''


def dedented(lines: list[str], indent: int) -> str:
  """Lines without so many spaces; a string's own line may have fewer, and loses those."""
  return ''.join(line[min(indent, len(line) - len(line.lstrip(' '))):] for line in lines)


def column(line: str, utf8: int) -> int:
  return len(line.encode()[:utf8].decode())


def _defaults(node, lines: list[str], first: int, indent: int) -> Iterator[tuple[str, str, int]]:
  arguments = node.args
  plain = [*arguments.posonlyargs, *arguments.args]
  pairs = [*zip(plain[len(plain) - len(arguments.defaults):], arguments.defaults),
           *zip(arguments.kwonlyargs, arguments.kw_defaults)]
  for argument, value in pairs:
    if value is not None and value.lineno == value.end_lineno:
      line = lines[value.lineno - 1]
      start, end = column(line, value.col_offset), column(line, value.end_col_offset)
      before = dedented(lines[first - 1:value.lineno - 1], indent)
      cut = len(line) - len(dedented([line], indent))
      yield argument.arg, line[start:end], len(before) + start - cut


def _function(node, path: str, scope: str, lines: list[str]) -> Function:
  first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
  last, indent = node.end_lineno, node.col_offset
  doc, body_from = ast.get_docstring(node, clean=False) or '', last + 1
  statement = node.body[0]
  alone = (not lines[statement.lineno - 1][:statement.col_offset].strip()
           and not lines[statement.end_lineno - 1].encode()[statement.end_col_offset:].strip())
  if doc and alone and len(node.body) > 1:
    doc_from, body_from = statement.lineno, statement.end_lineno + 1
  else:
    doc, doc_from = '', last + 1
  part = lambda start, end: dedented(lines[start - 1:end - 1], indent)
  return Function(f'{path}:{node.lineno}', node.name, scope + node.name, part(first, doc_from),
                  part(doc_from, body_from), doc, part(body_from, last + 1), indent, first, (body_from, last),
                  tuple(_defaults(node, lines, first, indent)))


def _statements(node, scope: str | None = '') -> Iterator[tuple[ast.AST, str | None]]:
  """(statement, the prefix of qualified names there; None inside a function), in order of the text."""
  for field in ('body', 'handlers', 'cases', 'orelse', 'finalbody'):
    for child in getattr(node, field, ()):
      yield child, scope
      inner = scope
      if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
        inner = None
      elif isinstance(child, ast.ClassDef) and scope is not None:
        inner = f'{scope}{child.name}.'
      yield from _statements(child, inner)


def parse(path: str, text: str) -> Module:
  """A file's functions and imports.

  Raises:
    SyntaxError: it is no Python of this version.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    tree = ast.parse(text)
  lines = io.StringIO(text, newline=None).readlines()
  functions, imports = [], set()
  for node, scope in _statements(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      imports.update(range(node.lineno, node.end_lineno + 1))
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and scope is not None:
      functions.append(_function(node, path, scope, lines))
  return Module(path, tuple(lines), tuple(functions), frozenset(imports))


@functools.cache
def modules() -> tuple[Module, ...]:
  """Every file of the standard library that this Python can read; seconds, once a process."""
  source = sources.stdlib(None, '')
  found = []
  for name, path in zip(source.names, source.paths):
    try:
      found.append(parse(name, Path(path).read_bytes().decode('utf-8').removeprefix('\ufeff')))
    except (UnicodeDecodeError, SyntaxError):
      continue
  return tuple(found)


def functions() -> Iterator[tuple[Module, Function]]:
  """Functions whose code does not stand elsewhere in the library before them."""
  seen = set()
  for module in modules():
    for function in module.functions:
      if function.code not in seen:
        seen.add(function.code)
        yield module, function
