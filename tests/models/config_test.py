"""ModelConfig, and how a depth is cut into segments."""
import dataclasses
import itertools

import pytest

from jaxlm import config as base
from jaxlm.models import config as models
from jaxlm.schema import SCHEMA


def test_a_model_config_has_the_keys_of_the_schema_and_no_others():
  def fields(kind):
    return {f.name: fields(f.type) if dataclasses.is_dataclass(f.type) else None for f in dataclasses.fields(kind)}

  def keys(tree):
    return {k: keys(v) if isinstance(v, dict) else None for k, v in tree.items()}

  mine = fields(models.ModelConfig)
  assert {k: mine.pop(k) for k in ('visibility', 'compute_dtype', 'param_dtype', 'products', 'outputs_first')}
  assert mine == keys(SCHEMA['model'])


def test_freezing_takes_the_tokenizers_vocabulary_where_none_is_given():
  model = base.resolved(base.default())['model']
  frozen = models.freeze(model, vocab_size=257, visibility='full')
  assert (frozen.vocab_size, frozen.padded_vocab, frozen.visibility) == (257, 384, 'full')
  assert models.freeze(model | {'vocab_size': 384}, vocab_size=257, visibility='full').padded_vocab == 384
  assert hash(frozen) is not None and frozen.attention.head_dim == 64


def test_windows_repeat_over_the_depth():
  model = base.resolved(base.default())['model']
  model['attention']['windows'] = (4, 4, 0)
  frozen = models.freeze(model, vocab_size=1, visibility='causal')
  assert [frozen.window(i) for i in range(5)] == [4, 4, 0, 4, 4]


@pytest.mark.parametrize('kinds, cut', [
    ('a', ('', 'a', 1, '')),
    ('aaaa', ('', 'a', 4, '')),
    ('lllllg' * 3, ('', 'lllllg', 3, '')),          # Gemma 3
    ('lllllg' * 2 + 'll', ('', 'lllllg', 2, 'll')),
    ('dd' + 'm' * 6, ('dd', 'm', 6, '')),            # DeepSeek: dense first
    ('dm' * 4, ('', 'dm', 4, '')),
    ('abc', None),
])
def test_a_depth_is_cut_into_prefix_period_and_suffix(kinds, cut):
  found = models.segments(tuple(kinds))
  if cut is not None:
    assert tuple(''.join(x) if isinstance(x, tuple) else x for x in dataclasses.astuple(found)) == cut
  assert ''.join(found.prefix + found.period * found.repeats + found.suffix) == kinds


def test_every_short_depth_is_cut_into_the_fewest_programs():
  for length in range(1, 8):
    for kinds in itertools.product('ab', repeat=length):
      cut = models.segments(kinds)
      assert cut.prefix + cut.period * cut.repeats + cut.suffix == kinds
      fewest = min(a + p + length - a - p * n for a in range(length) for p in range(1, length - a + 1)
                   for n in range(1, (length - a) // p + 1) if kinds[a:a + p] * n == kinds[a:a + p * n])
      assert len(cut.prefix + cut.period + cut.suffix) == fewest, kinds


def test_a_layers_path_is_its_own():
  cut = models.segments(tuple('d' + 'lg' * 3 + 'l'))
  paths = [cut.path(i) for i in range(8)]
  assert paths[0] == ('prefix_0', None) and paths[-1] == ('suffix_0', None)
  assert paths[1:4] == [('period/slot_0', 0), ('period/slot_1', 0), ('period/slot_0', 1)]
  assert len(set(paths)) == 8
