"""Killed runs, as real processes: whatever the moment, the resumed run ends like one that never stopped."""
import glob
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm import checkpoint, trees
from jaxlm.metrics import read_jsonl

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def start(corpus):
  """Starts main on a small model; 24 steps, saved every second one."""
  def run(workdir, *flags, devices=1):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}')
    command = [sys.executable, '-m', 'jaxlm.main', f'--config={ROOT}/experiments/quickstart.py:smoke',
               f'--workdir={workdir}', '--config.data.source=text', f'--config.data.paths={corpus}',
               '--config.steps=24', '--config.save_every=2', '--config.model.num_layers=2', '--config.tensorboard=False',
               '--config.eval.prompts=()', *flags]
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


def test_two_processes_of_four_devices_equal_one_device(start, tmp_path):
  import socket
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  finish(start(tmp_path / 'one'))
  join = lambda i: start(tmp_path / 'two', f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}',
                         '--config.mesh.data=2', '--config.mesh.fsdp=4', devices=4)
  for process in [join(0), join(1)]:
    finish(process)
  one, two = result(tmp_path / 'one'), result(tmp_path / 'two')
  assert one[1].keys() == two[1].keys() and len(one[1]) == 24
  np.testing.assert_allclose(list(two[1].values()), list(one[1].values()), rtol=1e-5)  # float32 sums in another order
