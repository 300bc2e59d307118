"""Statements of Python in a Lisp: a translation whose right answer is known."""
import ast

OPERATORS = {
    ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/', ast.FloorDiv: '//', ast.Mod: 'mod', ast.Pow: 'expt',
    ast.LShift: 'shift-left', ast.RShift: 'shift-right', ast.BitOr: 'bit-or', ast.BitAnd: 'bit-and', ast.BitXor: 'bit-xor',
    ast.And: 'and', ast.Or: 'or', ast.Not: 'not', ast.Invert: 'bit-not', ast.USub: '-', ast.UAdd: '+',
    ast.Eq: '=', ast.NotEq: '/=', ast.Lt: '<', ast.LtE: '<=', ast.Gt: '>', ast.GtE: '>=', ast.Is: 'eq', ast.IsNot: 'not-eq',
    ast.In: 'member', ast.NotIn: 'not-member',
}


class Untranslatable(Exception):
  """There is no word for it."""


def translated(node: ast.AST) -> str:
  """The S-expression of a statement or expression.

  Operators and calls come first, `a.b` stays one symbol where `a` is one, keywords are `:name value`.

  Raises:
    Untranslatable: comprehensions, f-strings, what binds names or has a body.
  """
  match node:
    case ast.Expr(value):
      return translated(value)
    case ast.Assign([target], value):
      return _form('setq', target, value)
    case ast.AugAssign(target, op, value):
      return f'(setq {translated(target)} {_form(OPERATORS.get(type(op)), target, value)})'
    case ast.Return(value):
      return _form('return', *([] if value is None else [value]))
    case ast.Assert(test, None):
      return _form('assert', test)
    case ast.Raise(ast.AST() as raised, None):
      return _form('raise', raised)
    case ast.Name(id):
      return id
    case ast.Constant(value) if value is None or isinstance(value, (bool, int, float)):
      return {None: 'nil', True: 't', False: 'f'}[value] if value is None or isinstance(value, bool) else repr(value)
    case ast.Constant(str(value)) if value.isprintable():
      return '"' + value.replace('\\', '\\\\').replace('"', '\\"') + '"'
    case ast.Attribute(value, attribute):
      owner = translated(value)
      return f'(slot {owner} {attribute})' if owner.startswith(('(', '"')) else f'{owner}.{attribute}'
    case ast.Call(function, args, keywords):
      if any(keyword.arg is None for keyword in keywords):
        raise Untranslatable
      named = [f':{keyword.arg} {translated(keyword.value)}' for keyword in keywords]
      return f'({" ".join([*map(translated, [function, *args]), *named])})'
    case ast.BinOp(left, op, right):
      return _form(OPERATORS.get(type(op)), left, right)
    case ast.UnaryOp(op, operand):
      return _form(OPERATORS[type(op)], operand)
    case ast.BoolOp(op, values):
      return _form(OPERATORS[type(op)], *values)
    case ast.Compare(left, [op], [right]):
      return _form(OPERATORS[type(op)], left, right)
    case ast.IfExp(test, body, orelse):
      return _form('if', test, body, orelse)
    case ast.Subscript(value, index) if not isinstance(index, (ast.Slice, ast.Tuple)):
      return _form('elt', value, index)
    case ast.Subscript(value, ast.Slice(lower, upper, None)):
      return f'(subseq {translated(value)} {" ".join("nil" if x is None else translated(x) for x in (lower, upper))})'
    case ast.List(elements):
      return _form('list', *elements)
    case ast.Tuple(elements):
      return _form('values', *elements)
    case ast.Set(elements):
      return _form('set', *elements)
    case ast.Dict(keys, values) if all(key is not None for key in keys):
      return _form('hash', *(x for pair in zip(keys, values) for x in pair))
  raise Untranslatable


def _form(head: str | None, *parts: ast.AST) -> str:
  if head is None:
    raise Untranslatable
  return f'({" ".join([head, *map(translated, parts)])})'
