"""Recipes for clusters are what shells, Kubernetes and launchers can read; and several processes know of each other."""
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import yaml

from jaxlm import cluster, lastwords
from devices import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = ROOT / 'experiments/cluster'

# Keys of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 by place, as far as the manifest uses them: required, optional.
FIELDS = {
    '': ({'apiVersion', 'kind', 'metadata', 'spec'}, set()),
    'spec': ({'replicatedJobs'}, {'failurePolicy', 'successPolicy', 'network', 'suspend', 'coordinator'}),
    'spec.failurePolicy': (set(), {'maxRestarts', 'restartStrategy', 'rules'}),
    'spec.replicatedJobs': ({'name', 'template'}, {'replicas'}),
    'spec.replicatedJobs.template.spec': (
        {'template'}, {'parallelism', 'completions', 'completionMode', 'backoffLimit'}),
    'spec.replicatedJobs.template.spec.template.spec': (
        {'containers', 'restartPolicy'}, {'terminationGracePeriodSeconds', 'volumes', 'nodeSelector'}),
    'spec.replicatedJobs.template.spec.template.spec.containers': (
        {'name', 'image'}, {'command', 'args', 'ports', 'resources', 'volumeMounts', 'workingDir', 'env'}),
}


def test_the_manifest_has_the_fields_that_its_kinds_know():
  manifest = yaml.safe_load((RECIPES / 'jobset.yaml').read_text())
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  for path, (required, optional) in FIELDS.items():
    node = manifest
    for part in filter(None, path.split('.')):
      node = node[part]
      node = node[0] if isinstance(node, list) else node
    assert required <= node.keys() <= required | optional, path
  job = manifest['spec']['replicatedJobs'][0]
  spec, name = job['template']['spec'], manifest['metadata']['name']
  container = spec['template']['spec']['containers'][0]
  command, = container['args']
  assert spec['parallelism'] == spec['completions'] and spec['completionMode'] == 'Indexed'
  assert f'--num_processes={spec["completions"]}' in command and '--process_id="$JOB_COMPLETION_INDEX"' in command
  # A pod's name in its headless service: JOBSET-JOB-REPLICA-INDEX.JOBSET
  assert f'--coordinator={name}-{job["name"]}-0-0.{name}:{container["ports"][0]["containerPort"]}' in command
  assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in spec['template']['spec']['volumes']}
  assert subprocess.run(['bash', '-n', '-c', command], check=False).returncode == 0


@pytest.mark.parametrize('name', ['slurm.sbatch', 'tpu_pod.sh', 'one_box.sh'])
def test_scripts_are_read_by_a_shell_and_say_what_they_miss(name):
  assert subprocess.run(['bash', '-n', RECIPES / name], check=False).returncode == 0
  done = subprocess.run(['bash', RECIPES / name], capture_output=True, text=True, check=False)
  assert done.returncode and 'give ' in done.stderr


def test_one_box_runs_several_processes(corpus, tmp_path):
  done = subprocess.run(
      ['bash', RECIPES / 'one_box.sh', '2', f'{ROOT}/experiments/quickstart.py:smoke', f'--workdir={tmp_path}/run',
       '--config.data.source=text', f'--config.data.paths={corpus}', '--config.steps=2', '--config.eval.prompts=()'],
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
           'XLA_FLAGS': xla_flags(1)},
      capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / 'run/run.json').read_text())['starts'][0]['processes'] == 2


@pytest.mark.parametrize('variables, sign', [
    ({}, None), ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None), ({'SLURM_NTASKS': '4'}, None),
    ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, 'SLURM_NTASKS'),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'OMPI_COMM_WORLD_SIZE'),
    ({'PMI_SIZE': '2'}, 'PMI_SIZE'), ({'PMI_SIZE': 'x'}, None), ({'JOB_COMPLETION_INDEX': '0'}, None),
    ({'JOB_COMPLETION_INDEX': '0', 'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, 'JOB_COMPLETION_INDEX'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU_WORKER_HOSTNAMES'), ({'TPU_WORKER_HOSTNAMES': 'a'}, None)])
def test_launchers_are_told_by_what_they_set(variables, sign, monkeypatch):
  for name in (*cluster.SIGNS, 'SLURM_PROCID', 'KUBERNETES_SERVICE_HOST'):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert cluster.detected() == sign


# ---- who is alive ------------------------------------------------------------------------------------------------


def signed(folder, index, beat, status='', step=3):
  (folder / f'{index}.json').write_text(json.dumps(dict(host='there', pid=7, beat=beat, step=step, status=status)))


def test_a_file_that_is_no_longer_renewed_is_a_death_and_one_that_never_was_is_none(tmp_path):
  watch = cluster.Watch(str(tmp_path), 0, 2, heartbeat_s=0.3, watchdog_s=0)
  signed(tmp_path, 1, 1)  # left from an earlier start
  assert watch._dead() is None
  time.sleep(0.3)
  assert watch._dead() is None
  signed(tmp_path, 1, 2)
  assert watch._dead() is None
  time.sleep(0.25)
  assert 'process 1 (host there, pid 7) has given no sign of life for' in watch._dead()
  signed(tmp_path, 1, 3)
  assert watch._dead() is None
  (tmp_path / '1.json').unlink()  # it has ended well
  assert watch._dead() is None


@pytest.mark.parametrize('status, told', [('watchdog', 'watchdog'),
                                          ('failed: no space', 'process 1 (host there, pid 7) failed: no space.')])
def test_what_a_process_says_of_its_end_is_told(status, told, tmp_path):
  watch = cluster.Watch(str(tmp_path), 0, 2, heartbeat_s=10, watchdog_s=0)
  signed(tmp_path, 1, 1)
  watch._dead()
  signed(tmp_path, 1, 2, status)
  assert watch._dead() == told


def test_last_words_blame_the_coordinator_only_if_it_is_gone(tmp_path):
  signed(tmp_path, 0, 5)
  signed(tmp_path, 1, 5)
  other, own = (lastwords.words(str(tmp_path), process, 0.0) for process in (1, 0))
  assert other.startswith('failed: process 0 (host there, pid 7), which all others hang')
  assert own.startswith('failed: process 0 (host there, pid 7) was ended from outside')
