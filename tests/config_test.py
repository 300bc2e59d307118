"""Every key of `default()`: missing, of another type, out of range; references; the command line; arguments."""
import math

from ml_collections import ConfigDict
import pytest

from jaxlm import config as base
from jaxlm import settings
from jaxlm.errors import JaxlmError
from jaxlm.settings import GROUPS, KEYS

# Values of every type that some key refuses. A probe of a key's own type tests its range, the others its type.
PROBES = {
    bool: [True],
    int: [-2, -1, 0, 1, 259, 10 ** 9],
    float: [-1.0, 0.0, 0.5, 1.0, 2.0, math.nan, math.inf, -math.inf],
    str: ['', ' ', 'no such choice', 'x\ny', 'x\0y'],
    tuple: [(), (1,), (-1,), ('a',), ((1,),), ((1, 2, 3),), (('a', math.nan),), ((-1, 1),), (('a', 'b', 'c', 0),),
            ((3, ()),)],
    type(None): [None],
    dict: [{'a': 1}],
}
# Keys whose range is their whole type; besides, of numbers only nan and the infinities are refused.
FREE = {path for path, key in KEYS.items() if isinstance(key.value, bool)}


def plain() -> dict:
  return base.resolved(base.default())


def replaced(path: str, value) -> ConfigDict:
  """The default, resolved, with another value at a path."""
  tree = plain()
  *folders, last = path.split('.')
  node = tree
  for folder in folders:
    node = node[folder]
  node[last] = value
  return ConfigDict(tree, type_safe=False)


def removed(path: str) -> ConfigDict:
  tree = plain()
  *folders, last = path.split('.')
  node = tree
  for folder in folders:
    node = node[folder]
  del node[last]
  return ConfigDict(tree)


def wrong_types(path: str):
  kind = type(KEYS[path].value)
  return [v for other, values in PROBES.items() for v in values[:1]
          if other is not kind and not (kind is float and other is int)]


def out_of_range(path: str):
  kind = type(KEYS[path].value)
  return [v for v in PROBES[kind] if not settings._fits(KEYS[path], v)]


def test_the_default_has_no_fault():
  assert settings.faults(base.default()) == []
  assert settings.faults(ConfigDict(plain())) == []


@pytest.mark.parametrize('path', KEYS)
def test_a_missing_key_is_one_line_that_names_it_and_its_default(path):
  line, = settings.faults(removed(path))
  assert line == (f'config.{path} is missing; set it, for instance to its default {KEYS[path].value!r}, or start from '
                  'jaxlm.config.default().')


@pytest.mark.parametrize('path', KEYS)
def test_a_value_of_another_type_is_one_line_with_what_was_wanted_and_what_came(path):
  values = wrong_types(path)
  assert len(values) >= 4
  for value in values:
    line, = settings.faults(replaced(path, value))
    assert line.startswith(f'config.{path} must be ') and '; got ' in line and '\n' not in line
    assert repr(value) in line or isinstance(value, dict)


@pytest.mark.parametrize('path', KEYS)
def test_a_value_out_of_range_is_one_line_with_the_range_and_the_value(path):
  values = out_of_range(path)
  assert bool(values) == (path not in FREE), 'a key without a range is listed, one with a range has a probe it refuses'
  for value in values:
    line, = settings.faults(replaced(path, value))
    kind = settings.KINDS[type(KEYS[path].value)]
    assert line.startswith(f'config.{path} must be {kind}') or KEYS[path].check.wanted in line
    assert KEYS[path].check.wanted in line
    assert line.endswith(f'; got {value!r} ({type(value).__name__}).') and '\n' not in line


@pytest.mark.parametrize('path', [p for p in KEYS if isinstance(KEYS[p].value, float)])
def test_no_number_may_be_nan_or_infinite(path):
  for value in (math.nan, math.inf, -math.inf):
    assert len(settings.faults(replaced(path, value))) == 1


@pytest.mark.parametrize('path', GROUPS)
def test_a_missing_group_and_one_that_is_no_group_are_one_line(path):
  assert settings.faults(removed(path)) == [f'config.{path} is missing; start from jaxlm.config.default().']
  assert settings.faults(replaced(path, 3)) == [f'config.{path} must be a group of keys; got 3 (int).']


def test_all_faults_are_told_at_once():
  config = replaced('optim.lr', -1.0)
  config.steps = 0
  config.model.wdth = 3
  del config['seed']
  assert [line.split()[0] for line in settings.faults(config)] == ['config.seed', 'config.steps', 'config.optim.lr',
                                                              'config.model.wdth']


def test_what_is_no_config_is_told():
  assert settings.faults({'steps': 3}) == ["A config must be a ConfigDict, as jaxlm.config.default() makes one; got "
                                       "{'steps': 3} (dict)."]


@pytest.mark.parametrize('path, told', [
    ('optim.lrr', "config.optim.lrr is unknown. Did you mean 'optim.lr'?"),
    ('model.attention.heads', "config.model.attention.heads is unknown. Did you mean 'model.attention.num_heads'?"),
    ('sed', "config.sed is unknown. Did you mean 'seed'?"),
    ('lr', "config.lr is unknown. Did you mean 'optim.lr'?"),
    ('qq', 'config.qq is unknown. Known there: seed, steps, batch_size, batch_ramp, accumulation, seq_len, log_every, '
           'eval_every, save_every, heartbeat_s, watchdog_s, compiler_options, tensorboard, on_nonfinite, '
           'max_rewinds.'),
    ('precision.x', 'config.precision.x is unknown. Known there: compute, params, products.'),
])
def test_an_unknown_key_is_told_with_the_nearest_right_one(path, told):
  assert settings.faults(replaced(path, 3)) == [told]


def test_a_long_value_is_cut_to_one_line():
  line, = settings.faults(replaced('steps', '\n'.join('x' * 100 for _ in range(100))))
  assert len(line) < 220 and '\n' not in line


# ---- derived keys ------------------------------------------------------------------------------------------------

DERIVED = {path: key.derive.sources for path, key in KEYS.items() if key.derive}


def test_derived_keys_follow_their_sources():
  config = base.default()
  config.update(seq_len=512, steps=7, batch_size=9)
  config.model.update(width=96)
  config.model.attention.num_heads = 4
  assert (config.model.max_length, config.optim.total_steps, config.eval.batch_size) == (512, 7, 9)
  assert (config.model.attention.head_dim, config.model.mlp.width, config.model.attention.num_kv_heads) == (24, 384, 4)


@pytest.mark.parametrize('path', DERIVED)
def test_setting_a_derived_key_leaves_its_sources_alone(path):
  config = base.default()
  before = {source: settings._value(config, source) for source in DERIVED[path]}
  settings.override(config, path, '0.5' if isinstance(KEYS[path].value, float) else '5')
  assert {source: settings._value(config, source) for source in DERIVED[path]} == before
  assert settings._value(config, path) in (5, 0.5)


@pytest.mark.parametrize('source', sorted({s for sources in DERIVED.values() for s in sources}))
def test_a_bad_source_is_told_once_and_not_again_for_what_follows_it(source):
  for value in (-1 if isinstance(KEYS[source].value, int) else -1.0, 'text', (), None):
    config = base.default()
    *folders, last = source.split('.')
    node = config
    for folder in folders:
      node = node[folder]
    node.get_ref(last).set(value, type_safe=False)
    line, = settings.faults(config)
    assert line.startswith(f'config.{source} must be ')


def test_a_reference_that_cannot_be_computed_does_not_crash():
  config = base.default()
  config.model.attention.num_heads = 0
  assert settings.faults(config) == ['config.model.attention.num_heads must be an integer, at least 1; got 0 (int).']
  config = base.default()
  config.model.attention.get_ref('head_dim').set(config.get_ref('steps') // (config.get_ref('seed') * 1))
  assert settings.faults(config) == [
      'config.model.attention.head_dim follows other keys and cannot be computed from them (integer division or modulo '
      'by zero); set it.']


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path, text, value', [
    ('steps', '7', 7), ('steps', '1_000', 1000), ('optim.lr', '3e-4', 3e-4), ('optim.lr', '1', 1.0),
    ('tensorboard', 'false', False), ('tensorboard', 'True', True), ('data.paths', 'a/*.txt,b.txt', 'a/*.txt,b.txt'),
    ('model.attention.windows', '0,128', (0, 128)), ('model.attention.windows', '64', (64,)),
    ('batch_ramp', '((10, 8), (20, 16))', ((10, 8), (20, 16))), ('batch_ramp', '[[10, 8]]', ((10, 8),)),
    ('batch_ramp', '()', ()), ('eval.prompts', 'def ', ('def ',)), ('eval.prompts', "('a', 'b')", ('a', 'b')),
    ('optim.freeze', '.*bias', ('.*bias',)),
])
def test_an_override_reads_what_the_key_holds(path, text, value):
  config = base.default()
  settings.override(config, path, text)
  assert settings._value(config, path) == value and type(settings._value(config, path)) is type(value)
  assert settings.faults(config) == []


@pytest.mark.parametrize('path, text, told', [
    ('steps', 'abc', "config.steps must be an integer, at least 1; got 'abc'."),
    ('steps', '1.5', "config.steps must be an integer, at least 1; got '1.5'."),
    ('optim.lr', '', "config.optim.lr must be a number, above 0.0; got ''."),
    ('tensorboard', 'maybe', "config.tensorboard must be True or False; got 'maybe'."),
    ('batch_ramp', '((3,', "config.batch_ramp must be a tuple of (until this step, batch size) pairs; got '((3,'."),
    ('optim', 'adamw', 'config.optim is a group of keys; set one of them, for instance config.optim.name.'),
    ('objective.causal', 'x', 'config.objective.causal is a group of keys that holds none; there is nothing to set.'),
    ('optm.lr', '1', "config.optm.lr is unknown. Did you mean 'optim.lr'?"),
    ('zzz.qqq', '1', 'config.zzz.qqq is unknown. Known groups: model, objective, data, loss, optim, mesh, sharding, '
                     'pipeline, precision, checkpoint, eval.'),
])
def test_an_override_that_cannot_be_read_is_told(path, text, told):
  with pytest.raises(JaxlmError) as e:
    settings.override(base.default(), path, text)
  assert str(e.value) == told


@pytest.mark.parametrize('path', KEYS)
def test_every_default_can_be_written_on_a_command_line(path):
  config = base.default()
  value = settings._value(config, path)
  settings.override(config, path, str(value))
  assert settings._value(config, path) == value


# ---- arguments of experiments, smoke, JSON -----------------------------------------------------------------------


def test_arguments_are_read_by_their_defaults():
  args = base.parse_arg('size=large,fast,rate=2e-3,n=4', size=base.one_of('small', ('small', 'large')), fast=False,
                        rate=1e-3, n=1)
  assert (args.size, args.fast, args.rate, args.n) == ('large', True, 2e-3, 4)
  assert base.parse_arg(None, fast=True).fast and not base.parse_arg('fast=false', fast=True).fast


@pytest.mark.parametrize('arg, told', [
    ('size=lage', "Unknown size 'lage'. Known: small, large. Did you mean 'large'?"),
    ('sise=small', "Unknown argument 'sise' of the experiment. Known: size, fast, n. Did you mean 'size'?"),
    ('fast=maybe', "Argument fast is a flag, got 'maybe'; say fast or fast=false."),
    ('n=x', "Argument n wants int, got 'x'."),
])
def test_a_wrong_argument_is_told(arg, told):
  with pytest.raises(JaxlmError) as e:
    base.parse_arg(arg, size=base.one_of('small', ('small', 'large')), fast=False, n=1)
  assert str(e.value) == told


def test_smoke_shrinks_and_stays_valid():
  config = base.smoke(base.default())
  assert settings.faults(config) == []
  assert (config.steps, config.model.num_layers, config.model.attention.num_heads, config.model.width) == (4, 4, 8, 64)


def test_a_config_returns_from_json_unchanged():
  config = base.default()
  config.batch_ramp = ((10, 8),)
  again = base.loads(base.dumps(config))
  assert base.differences(again, config) == {} and settings.faults(again) == []
  again.steps = 5
  assert base.differences(again, config) == {'steps': (5, 1000)}


def test_a_longer_model_keeps_the_length_it_was_trained_at():
  config = base.default()
  config.update(seq_len=256)
  config.model.positions.kind = 'rope'
  longer = base.lengthen(config, 1024)
  rope = longer.model.positions.rope
  assert (longer.seq_len, rope.scaling, rope.factor, rope.original_length) == (1024, 'yarn', 4.0, 256)
  assert base.lengthen(longer, 2048).model.positions.rope.factor == 8.0  # of the first length, not the last
  with pytest.raises(JaxlmError, match="scaled by 'yarn' cannot go on by 'linear'"):
    base.lengthen(longer, 4096, 'linear')
  for kind, length in (('learned', 4096), ('rope', 2048)):
    config.model.positions.kind = kind
    told = f"positions '{kind}' that reads 2048 tokens cannot be lengthened to {length}"
    with pytest.raises(JaxlmError, match=told):
      base.lengthen(config, length)
