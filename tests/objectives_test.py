"""Objectives against brute force."""
import pickle

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import objectives
from jaxlm.types import BATCH, JaxlmError


def _item(lengths, raw_length):
  """Pieces of the given lengths, then padding."""
  segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  positions = np.concatenate([np.arange(n) for n in lengths])
  pad = raw_length - len(segments)
  tokens = np.random.default_rng(0).integers(0, 250, raw_length)
  column = lambda x: np.pad(x, (0, pad)).astype(np.int32)
  return dict(tokens=tokens.astype(np.int32), segment_ids=column(segments), positions=column(positions),
              starts=column(positions == 0).astype(bool))


@pytest.mark.parametrize('lengths', [[9], [4, 5], [1, 1, 3], [2], [3, 5]])
def test_causal_counts_every_token_that_follows_one_of_its_own_document(lengths):
  objective = objectives.make(configs.default(), None)
  item = _item(lengths, objective.raw_length(8))
  example = objective.example(item, None)
  assert set(example) == set(BATCH) - {'example_ids', 'order'}
  for t in range(8):
    assert example['tokens'][t] == item['tokens'][t] and example['targets'][t] == item['tokens'][t + 1]
    same = item['segment_ids'][t] == item['segment_ids'][t + 1] > 0
    assert example['loss_weights'][t] == float(same)
  assert example['loss_weights'].sum() == sum(lengths) - len(lengths)
  assert all(v.shape == (8,) and v.dtype == (np.float32 if k == 'loss_weights' else np.int32)
             for k, v in example.items())


def test_unmasked_documents_are_one_text_with_running_positions():
  config = configs.default()
  config.data.mask_documents = False
  objective = objectives.make(config, None)
  example = objective.example(_item([3, 4], 9), None)
  np.testing.assert_array_equal(example['segment_ids'], [1] * 7 + [0])
  np.testing.assert_array_equal(example['positions'], np.arange(8))
  np.testing.assert_array_equal(example['loss_weights'], [1] * 6 + [0] * 2)


def test_a_block_of_rows_is_its_rows():
  objective = objectives.make(configs.default(), None)
  rows = [_item([9], 9), _item([2, 3], 9), _item([1, 8], 9)]
  block = objective.example({k: np.stack([r[k] for r in rows]) for k in rows[0]}, None)
  for i, row in enumerate(rows):
    for key, value in objective.example(row, None).items():
      np.testing.assert_array_equal(block[key][i], value)


def test_an_objective_pickles_for_worker_processes():
  objective = pickle.loads(pickle.dumps(objectives.make(configs.default(), None)))
  assert objective.raw_length(8) == 9 and objective.overlap == 1 and objective.visibility == 'causal'


def test_an_unknown_objective_names_the_known_ones():
  config = configs.default()
  config.objective.name = 'casual'
  with pytest.raises(JaxlmError, match="Unknown objective 'casual'. Known: causal.*Did you mean 'causal'"):
    objectives.make(config, None)
