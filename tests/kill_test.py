"""Killed runs, as real processes: whatever the moment, the resumed run ends like one that never stopped."""
import glob
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm import checkpoint, trees
from jaxlm.metrics import read_jsonl
from devices import xla_flags

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def start(corpus):
  """Starts main on a small model; 24 steps, saved every second one."""
  def run(workdir, *flags, devices=1, program=('-m', 'jaxlm.main'), more={}):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **more, XLA_FLAGS=xla_flags(devices))
    command = [sys.executable, *program, f'--config={ROOT}/experiments/quickstart.py:smoke',
               f'--workdir={workdir}', '--config.data.source=text', f'--config.data.paths={corpus}',
               '--config.steps=24', '--config.save_every=2', '--config.model.num_layers=2',
               '--config.tensorboard=False', '--config.eval.prompts=()', *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return run


def finish(process, code=0):
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, out
  return out


def result(workdir):
  """(logged losses, parameters after the last step)."""
  folder = checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True)
  step = folder.latest_valid()
  target = {p.removeprefix('params/'): x for p, x in folder.shapes(step).items() if p.startswith('params/')}
  logged = {line['step']: line['train/loss'] for line in read_jsonl(f'{workdir}/metrics.jsonl') if 'train/loss' in line}
  return step, logged, trees.flatten(folder.restore_params(trees.unflatten(target), step)[1])


def assert_same(found, expected):
  assert found[0] == expected[0] == 24 and found[1] == expected[1] and found[2].keys() == expected[2].keys()
  for path, array in expected[2].items():
    assert np.array_equal(found[2][path], array), path


def steps_done(workdir):
  try:
    return len(pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines())
  except OSError:
    return 0


@pytest.mark.parametrize('kills', [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_and_resume_is_bitwise_identical(start, tmp_path, kills):
  whole, killed, rng = tmp_path / 'whole', tmp_path / 'killed', random.Random(kills)
  finish(start(whole))
  while_saving = done = 0
  while done < kills:
    process, before, deadline = start(killed), steps_done(killed), time.monotonic() + 300
    wants_save = while_saving < max(1, kills // 2)
    wanted = before + 1 + rng.randrange(3)
    while process.poll() is None and time.monotonic() < deadline:
      writing = glob.glob(f'{killed}/checkpoints/*orbax-checkpoint-tmp*')
      if (writing and steps_done(killed) > before) if wants_save else steps_done(killed) >= wanted:
        time.sleep(rng.random() * 0.02)
        break
      time.sleep(0.0005)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done += 1
    while_saving += bool(glob.glob(f'{killed}/checkpoints/*orbax-checkpoint-tmp*'))
  finish(start(killed))
  assert while_saving >= (3 if kills == 10 else 0)
  assert not os.path.exists(killed / 'checkpoints/bad')
  assert_same(result(killed), result(whole))


def test_sigterm_saves_leaves_with_75_and_resumes(start, tmp_path):
  finish(start(tmp_path / 'whole'))
  process = start(tmp_path / 'stopped', '--config.save_every=0')
  while steps_done(tmp_path / 'stopped') < 3 and process.poll() is None:
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  assert 'preempted: SIGTERM at step' in finish(process, 75)
  finish(start(tmp_path / 'stopped'))
  assert_same(result(tmp_path / 'stopped'), result(tmp_path / 'whole'))


# ---- several processes -------------------------------------------------------------------------------------------


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@pytest.fixture
def together(start):
  """Starts so many processes of one run, each with as many of eight devices; flags, and how they find each other."""
  def run(workdir, count, *flags, **kwargs):
    port = free_port()
    return [start(workdir, f'--coordinator=localhost:{port}', f'--num_processes={count}', f'--process_id={i}',
                  '--config.mesh.data=-1', '--config.mesh.fsdp=4', *flags, devices=8 // count, **kwargs)
            for i in range(count)]
  return run


def assert_near(found, expected):
  assert found.keys() == expected.keys() and len(expected) == 24
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)  # float32 sums in another order


def test_a_run_of_two_processes_survives_the_death_of_one(start, together, tmp_path):
  """The losses are one process's; kill -9 of one ends the other, which names it; 4, 2 and 1 go on with the stream."""
  finish(start(tmp_path / 'one'))
  many = tmp_path / 'many'
  first, second = together(many, 2, '--config.heartbeat_s=10')
  while steps_done(many) < 5 and first.poll() is None:
    time.sleep(0.002)
  second.send_signal(signal.SIGKILL)
  before = time.monotonic()
  out = finish(first, 1)
  assert time.monotonic() - before < 10
  assert re.search(rf'failed: process 1 \(host .*, pid {second.pid}\) has given no sign of life for \d+ s; it was at '
                   r'step \d+. Process 0 ends, too; the same command goes on from what was saved.', out), out
  told = f'failed: process 1 (host {socket.gethostname()}, pid {second.pid}) was ended from outside'
  assert told in finish(second, -9)
  first, second = together(many, 2)
  while steps_done(many) < 8 and first.poll() is None:
    time.sleep(0.002)
  first.send_signal(signal.SIGKILL)
  told = f'failed: process 0 (host {socket.gethostname()}, pid {first.pid}), which all'
  assert told in finish(second, -signal.SIGABRT)
  finish(first, -9)
  for count, steps in ((4, 10), (2, 16)):
    for process in together(many, count, f'--config.steps={steps}', '--config.optim.total_steps=24'):
      finish(process)
  finish(start(many))
  assert_near(result(many)[1], result(tmp_path / 'one')[1])


SLEEPER = '''
import sys, time
from jaxlm import main, programs
from jaxlm.data import plans

plain, calls = plans.Stream.examples, []

def examples(self, numbers):
  calls.append(numbers)
  if len(calls) == 3 and '--process_id=1' in sys.argv:
    oversleep()
  return plain(self, numbers)

def oversleep():
  time.sleep(1000)

plans.Stream.examples = examples
programs.run(main.main)
'''


def test_a_process_that_sleeps_trips_the_watchdog_and_the_dump_names_its_line(together, tmp_path):
  (tmp_path / 'sleeper.py').write_text(SLEEPER)
  processes = together(tmp_path / 'run', 2, '--config.watchdog_s=25', '--config.heartbeat_s=16',
                       '--config.data.prefetch=1',
                       program=[str(tmp_path / 'sleeper.py')])
  for index, process in enumerate(processes):
    out = finish(process, 1)
    assert f'failed: watchdog: process {index} of 2 has made no step for' in out and 'Current thread' in out
    line = 1 + SLEEPER.splitlines().index('  time.sleep(1000)')
    assert (f'sleeper.py", line {line} in oversleep' in out) == (index == 1), out


def test_emulated_slurm_variables_make_one_run_of_two_processes(start, tmp_path):
  """One or all devices a process is the launcher's choice; here all that each has."""
  finish(start(tmp_path / 'one', '--config.steps=4'))
  slurm = lambda i: {'SLURM_JOB_ID': job, 'SLURM_STEP_NODELIST': 'localhost',
                     'SLURM_NTASKS': '2', 'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i), 'SLURM_STEP_NUM_NODES': '1'}
  job = str(random.randrange(1 << 20))
  for process in [start(tmp_path / 'two', '--config.steps=4', '--config.mesh.fsdp=4', devices=4, more=slurm(i))
                  for i in range(2)]:
    finish(process)
  one, two = (read_jsonl(f'{tmp_path}/{name}/metrics.jsonl') for name in ('one', 'two'))
  losses = lambda lines: [line['train/loss'] for line in lines if 'train/loss' in line]
  np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
  assert json.loads((tmp_path / 'two/run.json').read_text())['starts'][0]['processes'] == 2
