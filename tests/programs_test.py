"""How a program starts and ends: exit codes, lines, flags, help, the printed config."""
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxlm import config as base
from jaxlm import main as main_module
from jaxlm import programs
from jaxlm.errors import JaxlmError, Preempted, RunFailed

ROOT = pathlib.Path(__file__).parents[1]

EXPERIMENT = '''from jaxlm import config as base
def get_config(arg=None):
  config = base.default()
  config.update(steps=7)
  return config
'''


@pytest.fixture(autouse=True)
def experiment(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'x.py').write_text(EXPERIMENT)


def ends(error: BaseException | None) -> int:
  def main(argv):
    if error:
      raise error
  return programs.outcome(main, ['x'])


@pytest.mark.parametrize('error, code, told', [
    (None, 0, ''),
    (JaxlmError('one\ntwo'), 2, 'error: one\nerror: two\n'),
    (RunFailed('the loss is nan'), 1, 'failed: the loss is nan\n'),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 38656804056 bytes.'), 1,
     'failed: Out of memory allocating 38656804056 bytes; ask for less at once: a smaller batch_size, shorter rows, fewer '
     'shots.\n'),
    (Preempted('SIGTERM at step 3'), 75, 'preempted: SIGTERM at step 3\n'),
    (PermissionError(errno.EACCES, 'Permission denied', 'f'), 2,
     'error: Cannot write or read f: Permission denied; choose another folder or change its permissions.\n'),
    (OSError(errno.EROFS, 'Read-only file system', 'f'), 2,
     'error: Cannot write or read f: Read-only file system; choose another folder or change its permissions.\n'),
    (OSError(errno.ENOSPC, 'No space left on device', 'f'), 2,
     'error: No space left for f: No space left on device; free some, then start again to resume.\n'),
    (OSError(errno.ENOSPC, 'No space left on device'), 2,
     'error: No space left for a file: No space left on device; free some, then start again to resume.\n'),
])
def test_every_outcome_has_its_code_and_its_line(error, code, told, capsys):
  assert ends(error) == code
  assert capsys.readouterr().err == told


def test_a_fault_of_our_own_keeps_its_traceback(capsys):
  assert ends(ZeroDivisionError('x')) == 1
  assert 'Traceback' in capsys.readouterr().err


def test_run_exits_with_the_code():
  def main(argv):
    raise JaxlmError('x')
  with pytest.raises(SystemExit) as e:
    programs.run(main, ['x'])
  assert e.value.code == 2


def parsed(*argv: str) -> base.ConfigDict:
  """The config of these flags."""
  found = []
  assert programs.outcome(lambda _: found.append(programs.config()), ['x', *argv]) == 0
  return found[0]


@pytest.mark.parametrize('argv', [
    ['--config=x.py', '--config.optim.lr=1e-4'], ['--config', 'x.py', '--config.optim.lr', '1e-4'],
    ['--config.optim.lr=1e-4', '--config=x.py'], ['-config=x.py', '-config.optim.lr=1e-4'],
    ['--config.optim.lr=5', '--config=x.py', '--config.optim.lr=1e-4'],
])
def test_overrides_come_in_any_order_and_the_last_wins(argv):
  config = parsed(*argv)
  assert (config.optim.lr, config.steps) == (1e-4, 7)


def test_overrides_of_an_earlier_command_line_are_forgotten():
  assert parsed('--config=x.py', '--config.steps=9').steps == 9
  assert parsed('--config=x.py').steps == 7


def test_derived_keys_follow_overrides():
  config = parsed('--config=x.py', '--config.seq_len=64', '--config.model.width=96')
  assert (config.model.max_length, config.model.mlp.width) == (64, 384)


@pytest.mark.parametrize('argv, value', [
    (['--config.tensorboard'], True), (['--noconfig.tensorboard'], False), (['--config.tensorboard=false'], False),
])
def test_keys_that_are_true_or_false_are_flags(argv, value):
  assert parsed('--config=x.py', *argv).tensorboard is value


@pytest.mark.parametrize('value, name', [
    ('experiments/gpt2.py', 'gpt2'), ('experiments/gpt2.py:size=nano', 'gpt2-size=nano'),
    ('gpt2.py:size=nano,smoke', 'gpt2-size=nano,smoke'), ('x.py:path=a/b', 'x-path=a_b'),
])
def test_an_experiment_is_named_with_its_arguments(value, name):
  found = []
  assert programs.outcome(lambda _: found.append(programs.experiment_name()), ['x', f'--config={value}']) == 0
  assert found == [name]


def test_help_prints_every_flag_and_leaves_with_0(capsys):
  assert programs.outcome(main_module.main, ['jaxlm.main', '--help']) == 0
  out, err = capsys.readouterr()
  assert err == '' and out.startswith(main_module.__doc__.strip())
  for name in main_module.flags.values:
    assert f'  --{name}:' in out or f'  --[no]{name}:' in out
  assert all(flag in out for flag in ('--config:', '--workdir:', '--allow_change:', '--[no]print_config:'))


def test_print_config_shows_the_resolved_config_and_what_differs(capsys):
  assert programs.outcome(main_module.main, ['m', '--config=x.py', '--config.seq_len=64', '--print_config']) == 0
  out = capsys.readouterr().out
  text, end, differences = out.partition('\n}\n')
  shown = json.loads(text + end)
  assert (shown['seq_len'], shown['model']['max_length'], shown['steps']) == (64, 64, 7)
  assert set(differences.splitlines()) == {
      'config.steps = 7  # default 1000', 'config.optim.total_steps = 7  # default 1000',
      'config.seq_len = 64  # default 1024', 'config.objective.grpo.max_new_tokens = 32  # default 512',
      'config.objective.ppo.max_new_tokens = 32  # default 512',
      'config.model.max_length = 64  # default 1024',
      'config.model.positions.rope.original_length = 64  # default 1024'}


def test_print_config_tells_faults_too(capsys):
  argv = ['m', '--config=x.py', '--config.model.attention.num_heads=0', '--print_config']
  assert programs.outcome(main_module.main, argv) == 2
  assert capsys.readouterr().err == (
      'error: config.model.attention.num_heads must be an integer, at least 1; got 0 (int).\n')


def test_what_xla_compiles_is_kept_in_the_users_cache_folder_unless_told_otherwise(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert programs.surroundings({})['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path / 'jaxlm' / 'programs')
  assert programs.surroundings({'JAX_COMPILATION_CACHE_DIR': 'there'})['JAX_COMPILATION_CACHE_DIR'] == 'there'


@pytest.mark.parametrize('given, wanted', [
    (None, 'glibc.malloc.hugetlb=1'),
    ('glibc.malloc.check=1', 'glibc.malloc.check=1:glibc.malloc.hugetlb=1'),
    ('glibc.malloc.hugetlb=0', 'glibc.malloc.hugetlb=0'),
])
def test_pages_are_large_where_the_system_gives_them_and_nobody_said_otherwise(given, wanted, monkeypatch):
  given = {} if given is None else {'GLIBC_TUNABLES': given}
  monkeypatch.setattr(programs, '_gives_large_pages', lambda: True)
  assert programs.surroundings(given)['GLIBC_TUNABLES'] == wanted
  monkeypatch.setattr(programs, '_gives_large_pages', lambda: False)
  assert programs.surroundings(given).get('GLIBC_TUNABLES') == given.get('GLIBC_TUNABLES')


def test_a_program_starts_again_once_with_what_it_wants_and_goes_on_as_it_was_called(tmp_path):
  (tmp_path / 'told.py').write_text('''
import os, sys
from jaxlm import programs
programs._gives_large_pages = lambda: True
programs.define_config()
def main(argv):
  print(os.getpid(), sys.argv[1:], os.environ['GLIBC_TUNABLES'], 'jax' in sys.modules, flush=True)
print('start', os.getpid(), flush=True)
programs.run(main)
''')
  environ = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  process = subprocess.Popen([sys.executable, '-u', '-m', 'told', '--config=x'], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, env=environ | {'PYTHONPATH': str(ROOT)})
  told = process.communicate()[0].splitlines()
  assert told == [f'start {process.pid}'] * 2 + [f"{process.pid} ['--config=x'] glibc.malloc.hugetlb=1 False"]
