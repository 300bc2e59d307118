"""Faults between keys, all told at once, before any device is touched."""
import pathlib
import subprocess
import sys

import pytest

from jaxlm import check, settings
from jaxlm import config as base
from jaxlm.errors import JaxlmError
from jaxlm.settings import KEYS


def faults(**changes: str) -> list[str]:
  """The faults of the smoke config with keys set as a command line would; '__' is a dot."""
  config = base.smoke(base.default())
  for path, text in changes.items():
    settings.override(config, path.replace('__', '.'), text)
  return check.faults(config)


def test_the_default_and_smoke_can_be_run():
  assert check.faults(base.default()) == [] == faults()


def test_every_name_that_is_looked_up_exists_and_is_checked():
  for path, (table, kind) in check.NAMED.items():
    assert KEYS[path].value in table, path
    line, = [line for line in faults(**{path.replace('.', '__'): 'nonesuch'}) if line.startswith(f'config.{path}: ')]
    assert line.startswith(f"config.{path}: Unknown {kind} 'nonesuch'. Known: ")


@pytest.mark.parametrize('path, name', [(path, name) for path, (table, _) in check.NAMED.items() for name in table])
def test_every_known_name_passes(path, name):
  assert [line for line in faults(**{path.replace('.', '__'): name}) if 'Unknown' in line] == []


@pytest.mark.parametrize('changes, told', [
    (dict(model__attention__num_kv_heads='3'), 'num_heads=8 does not divide by num_kv_heads=3'),
    (dict(model__width='65', model__attention__head_dim='8'), 'model.width=65 does not divide by attention.num_heads'),
    (dict(model__positions__kind='rope', model__attention__head_dim='7'),
     'head_dim times positions.rope.fraction is 7; rope rotates pairs'),
    (dict(model__max_length='63'), 'config.seq_len=64 is longer than config.model.max_length=63'),
    (dict(model__attention__dropout='0.1', model__attention__kernel='blockwise'), 'the blockwise kernel cannot drop'),
    (dict(model__positions__rope__scaling='llama3', model__positions__rope__low_freq_factor='4'),
     'low_freq_factor=4.0 must be below high_freq_factor=4.0'),
    (dict(model__remat_names='a,b'), "unknown 'a,b'"),
    (dict(accumulation='3'), 'config.batch_size=16 does not divide by config.accumulation=3'),
    (dict(batch_ramp='((2, 9),)', accumulation='2'), 'config.batch_size=9 does not divide by config.accumulation=2'),
    (dict(batch_ramp='((2, 8), (2, 8))'), 'steps must rise; got (2, 2)'),
    (dict(optim__warmup_steps='5'), 'config.optim.warmup_steps=5 is more than total_steps=4'),
    (dict(optim__freeze='('), "config.optim.freeze: '(' is not a regular expression"),
    (dict(optim__decay_rules="(('[', 1.0),)"), "config.optim.decay_rules: '[' is not a regular expression"),
    (dict(mesh__tensor='-1'), 'only one axis may be -1; got data, tensor'),
    (dict(checkpoint__resume='nowhere'), "no folder 'nowhere'"),
    (dict(checkpoint__resume='.', checkpoint__init_from='.'), 'resume and init_from are both set'),
    (dict(data__mixture="(('a', 'text', 'x', 1), ('a', 'text', 'y', 1))"), 'names must differ; got a, a'),
    (dict(data__mixture="(('a', 'texts', 'x', 1),)"), "config.data.mixture: a: Unknown source 'texts'"),
    (dict(data__phases='((5, (1, 2)),)'), '2 weights from example 5, but the mixture has 1 sources'),
    (dict(data__phases='((5, (1,)), (4, (1,)))'), 'first examples must rise; got (5, 4)'),
    (dict(data__tokenizer='nowhere/tokenizer.json'), 'config.data.tokenizer: Wanted a tokenizer.json'),
])
def test_keys_that_cannot_work_together_are_one_line(changes, told):
  line, = faults(**changes)
  assert told in line and '\n' not in line


def test_validate_tells_all_faults_at_once():
  config = base.smoke(base.default())
  config.accumulation, config.optim.name, config.mesh.tensor = 3, 'adam', -1
  with pytest.raises(JaxlmError) as e:
    check.validate(config)
  assert len(str(e.value).splitlines()) == 3


def test_faults_of_single_keys_come_first_and_alone():
  assert faults(steps='0', optim__name='adam') == ['config.steps must be an integer, at least 1; got 0 (int).']


def test_checking_touches_no_device():
  code = ('from jaxlm import check, config\nimport jax\ncheck.validate(config.default())\n'
          'from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()')
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
