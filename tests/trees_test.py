"""Paths and rules."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.types import TrainState


def tree():
  return {'a': {'w': np.ones((2, 3), np.float32), 'b': np.zeros(3, np.float32)}, 'c': np.ones(4, np.int16)}


def test_unflatten_inverts_flatten():
  again = trees.unflatten(trees.flatten(tree()))
  assert jax.tree.structure(again) == jax.tree.structure(tree())
  assert list(trees.flatten(tree())) == ['a/b', 'a/w', 'c']


def test_paths_name_dict_keys_list_numbers_and_fields():
  state = TrainState(jnp.zeros(()), {'w': jnp.zeros(1)}, [jnp.zeros(1), (jnp.zeros(1),)], None, jnp.zeros(2))
  assert list(trees.flatten(state)) == ['step', 'params/w', 'opt_state/0', 'opt_state/1/0', 'rng']


def test_the_first_rule_that_matches_the_whole_path_wins():
  rules = (('a/.*', 1), ('a/w', 2), ('.*', 3))
  assert trees.matched(rules, tree()) == {'a': {'b': 1, 'w': 1}, 'c': 3}
  assert trees.match((('w', 1), ('.*', 2)), 'a/w') == 2  # not a search


def test_a_path_that_no_rule_matches_is_an_error_that_names_it():
  with pytest.raises(JaxlmError) as e:
    trees.matched((('a/.*', 1),), tree(), 'decay rule')
  assert str(e.value) == "No decay rule matches 'c'. Patterns: 'a/.*'; add one, or end them with ('.*', value)."
  with pytest.raises(JaxlmError, match='Patterns: none'):
    trees.match((), 'c')


def test_partition_and_combine_are_inverse():
  chosen, others = trees.partition(tree(), lambda path: path.endswith('w'))
  assert list(trees.flatten(chosen)) == ['a/w'] and list(trees.flatten(others)) == ['a/b', 'c']
  assert jax.tree.structure(trees.combine(chosen, others)) == jax.tree.structure(tree())
  assert trees.partition(tree(), lambda _: False)[0] == {}


def test_combine_lets_the_later_tree_win():
  assert trees.combine({'a': {'x': 1, 'y': 2}}, {'a': {'x': 3}}) == {'a': {'x': 3, 'y': 2}}


def test_counts_and_bytes_work_on_arrays_and_on_shapes():
  shapes = jax.eval_shape(tree)
  assert trees.count(tree()) == trees.count(shapes) == 13
  assert trees.num_bytes(tree()) == trees.num_bytes(shapes) == 9 * 4 + 4 * 2


def test_diff_names_each_path_that_is_missing_left_over_or_of_another_shape():
  other = tree()
  del other['c']
  other['d'], other['a']['w'] = np.ones(1), np.ones((2, 2))
  assert trees.diff(tree(), other) == [
      'c: missing; wanted shape (4,).', 'd: not expected.', 'a/w: shape (2, 2); wanted (2, 3).']
  assert trees.diff(tree(), tree()) == []


def test_map_paths_gives_path_and_leaves():
  assert trees.map_paths(lambda path, x, y: (path, x.size + y.size), tree(), tree())['a']['w'] == ('a/w', 12)
