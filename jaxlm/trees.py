"""Paths of a tree, and the one matcher: ordered (pattern, value) rules, the first that matches wins."""
import re
from typing import Any, Callable, Sequence

import jax
import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.types import Tree

Rules = Sequence[tuple[str, Any]]


def path_of(keys) -> str:
  """'a/b/0' for a jax key path."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in keys)


def flatten(tree: Tree) -> dict[str, Any]:
  """{path: leaf}, in the tree's own order."""
  return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(leaves: dict[str, Any]) -> Tree:
  """The nested dict whose `flatten` is `leaves`."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *folders, last = path.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def map_paths(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """`jax.tree.map` whose function takes the path first."""
  return jax.tree_util.tree_map_with_path(lambda keys, *leaves: fn(path_of(keys), *leaves), tree, *rest)


def matches(pattern: str, path: str) -> bool:
  """Whether a rule's pattern means this path: it must match all of it."""
  return re.fullmatch(pattern, path) is not None


def match(rules: Rules, path: str, what: str = 'rule') -> Any:
  """The value of the first rule whose pattern matches the whole path.

  Raises:
    JaxlmError: none does. Rules must cover everything; end them with ('.*', value).
  """
  for pattern, value in rules:
    if matches(pattern, path):
      return value
  raise JaxlmError(f'No {what} matches {path!r}. Patterns: {", ".join(repr(p) for p, _ in rules) or "none"}; '
                   "add one, or end them with ('.*', value).")


def matched(rules: Rules, tree: Tree, what: str = 'rule') -> Tree:
  """Each leaf replaced by the value of its rule.

  Raises:
    JaxlmError: a leaf that no rule matches.
  """
  return map_paths(lambda path, _: match(rules, path, what), tree)


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
  """(leaves whose path is chosen, the others), each a smaller nested dict."""
  leaves = flatten(tree)
  return (unflatten({p: x for p, x in leaves.items() if chosen(p)}),
          unflatten({p: x for p, x in leaves.items() if not chosen(p)}))


def combine(*trees: Tree) -> Tree:
  """The nested dict that holds the leaves of all; later ones win."""
  return unflatten({path: leaf for tree in trees for path, leaf in flatten(tree).items()})


def count(tree: Tree) -> int:
  """Elements in all arrays of a tree; works on shapes too."""
  return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
  """Bytes of all arrays of a tree; works on shapes too."""
  return sum(int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def diff(expected: Tree, given: Tree) -> list[str]:
  """One line for each path that is missing, left over or of another shape in `given`."""
  want, got = flatten(expected), flatten(given)
  lines = [f'{p}: missing; wanted shape {tuple(x.shape)}.' for p, x in want.items() if p not in got]
  lines += [f'{p}: not expected.' for p in got if p not in want]
  lines += [f'{p}: shape {tuple(got[p].shape)}; wanted {tuple(x.shape)}.' for p, x in want.items()
            if p in got and tuple(got[p].shape) != tuple(x.shape)]
  return lines
