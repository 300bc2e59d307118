"""Processes of one run: how they find each other, and how they end when one of them is gone or stands still."""
import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable

from jaxlm import lastwords
from jaxlm.errors import JaxlmError, Preempted

# Environment variables by which launchers tell a process that it is one of several; jax.distributed reads the rest.
SIGNS: dict[str, Callable[[str], bool]] = {
    'SLURM_NTASKS': lambda n: int(n) > 1 and 'SLURM_PROCID' in os.environ,      # under srun
    'OMPI_COMM_WORLD_SIZE': lambda n: int(n) > 1,                               # mpirun of Open MPI
    'PMI_SIZE': lambda n: int(n) > 1,                                           # of others, by mpi4py
    'JOB_COMPLETION_INDEX': lambda _: 'KUBERNETES_SERVICE_HOST' in os.environ,  # a JobSet, or an indexed job
    'TPU_WORKER_HOSTNAMES': lambda names: ',' in names,                         # a TPU pod slice
    'MEGASCALE_COORDINATOR_ADDRESS': lambda _: True,                            # several slices
    'JAX_COORDINATOR_ADDRESS': lambda _: True,
}


def detected() -> str | None:
  """The variable that says that this process is one of several, or None."""
  for name, several in SIGNS.items():
    try:
      if name in os.environ and several(os.environ[name]):
        return name
    except ValueError:
      continue
  return None


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_s: float) -> None:
  """Joins the processes of a run, if there are several; before anything touches a device.

  Args:
    coordinator: host:port of process 0, with the two below; or None for all three: what the launcher says is taken.
    heartbeat_s: JAX's own check of who is alive strikes after twice this time, when `Watch` has not.
  Raises:
    JaxlmError: numbers that do not fit together, or processes that do not find each other.
  """
  given = [coordinator, num_processes, process_id]
  sign = detected() if all(value is None for value in given) else None
  if all(value is None for value in given) and sign is None:
    return
  if sign is None and None in given:
    raise JaxlmError('--coordinator, --num_processes and --process_id go together; give all three, or none where a '
                     'launcher tells.')
  if sign is None and process_id >= num_processes:
    raise JaxlmError(f'--process_id={process_id} must be below --num_processes={num_processes}.')
  if sign is None and not (coordinator.rpartition(':')[0] and coordinator.rpartition(':')[2].isdigit()):
    raise JaxlmError(f'--coordinator must be host:port of process 0; got {coordinator!r}.')
  import jax
  method = {'PMI_SIZE': 'mpi4py'}.get(sign)
  try:
    jax.distributed.initialize(*given, cluster_detection_method=method,
                               heartbeat_timeout_seconds=max(1, round(2 * heartbeat_s)))
  except (ValueError, RuntimeError, ImportError) as e:
    told = ' '.join(str(e).split())[:300]
    raise JaxlmError(f'The processes of this run did not find each other ({sign or "--coordinator"}): {told}; give '
                     '--coordinator, --num_processes and --process_id, or start one process alone.') from e


def leave(code: int) -> None:
  """Ends this process; one that failed among several does not wait for the others."""
  jax = sys.modules.get('jax')
  if code in (1, 2) and jax is not None and jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


class Watch:
  """Ends this process when another is gone, or when there has been no step for long.

  Each process keeps a file in a folder that all see and renews it all the time; from the others' files it knows who is
  alive. Where one stops being renewed, the others name it and end within the heartbeat: a collective would wait for it.
  Where no step comes, each writes the stack of every thread to stderr and ends.

  Args:
    folder: in the run directory.
    index, count: this process, and how many there are.
    heartbeat_s: after this long without a sign a process is taken for dead.
    watchdog_s: after this long without a step the run is given up; 0: never.
  """

  def __init__(self, folder: str, index: int, count: int, heartbeat_s: float, watchdog_s: float):
    self.folder, self.index, self.count = folder, index, count
    self.heartbeat_s, self.watchdog_s = heartbeat_s, watchdog_s
    self._beat, self._step, self._at = 0, 0, time.monotonic()
    self._closed = threading.Event()
    # Of each process: (what its file said last, when it began to say so).
    self._seen: dict[int, tuple[dict[str, Any], float, bool]] = {}
    self._thread = threading.Thread(target=self._run, daemon=True, name='watch')
    self._companion: subprocess.Popen | None = None

  def __enter__(self) -> 'Watch':
    if self.count > 1:
      os.makedirs(self.folder, exist_ok=True)
      self._write('')
      self._companion = subprocess.Popen([sys.executable, '-I', '-S', lastwords.__file__, self.folder, str(self.index)],
                                         stdin=subprocess.PIPE)
    self._at = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, kind, error, _):
    self._closed.set()
    self._thread.join()
    if self.count > 1:
      if error is None or isinstance(error, Preempted):
        self._remove()
      else:
        self._write(f'failed: {" ".join(str(error).split())[:200] or kind.__name__}')
    self._dismiss()

  def step(self, step: int) -> None:
    """Notes that something was done."""
    self._step, self._at = step, time.monotonic()

  def blame(self, error: BaseException | None) -> None:
    """Where an error is the device's or the network's, gives time to find whose death it was, and to end with it."""
    jax = sys.modules['jax']
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
      error = error.__cause__ or error.__context__
    if error is not None and self.count > 1:
      self._closed.wait(self.heartbeat_s)

  def _run(self) -> None:
    period = min(1.0, self.heartbeat_s / 10, (self.watchdog_s or 10.0) / 10)
    while not self._closed.wait(period):
      told = None
      if self.count > 1:
        self._write('')
        told = self._dead()
      still = time.monotonic() - self._at
      if self.watchdog_s and still > self.watchdog_s or told == 'watchdog':
        self._give_up(still)
      elif told:
        self._end(f'failed: {told} Process {self.index} ends, too; the same command goes on from what was saved.')

  def _give_up(self, still: float) -> None:
    print(f'failed: watchdog: process {self.index} of {self.count} has made no step for {still:.0f} s, since step '
          f'{self._step} (config.watchdog_s={self.watchdog_s:g}). What every thread was doing:', file=sys.stderr,
          flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    if self.count > 1:
      self._write('watchdog')
      time.sleep(min(2.0, self.heartbeat_s / 4))  # until the others have seen it and tell their own stacks
    self._end('')

  def _end(self, line: str) -> None:
    if line:
      print(line, file=sys.stderr, flush=True)
    if self.index == 0:
      time.sleep(0.15 * self.heartbeat_s)  # the others are aborted when it goes: they shall have spoken
    self._dismiss()
    sys.stdout.flush()
    os._exit(1)

  def _dismiss(self) -> None:
    """Tells the companion that all has been said."""
    if self._companion is not None:
      self._companion.communicate(b'done')

  def _dead(self) -> str | None:
    """What is to be told of a process that is gone, 'watchdog' if one has given up; None while all are well."""
    now = time.monotonic()
    for other in range(self.count):
      if other == self.index:
        continue
      said = self._read(other)
      before, since, alive = self._seen.get(other, (None, now, False))
      if said is None:
        self._seen.pop(other, None)  # has ended well, or has not begun
      elif said != before:
        # A file that never changes is left from an earlier start.
        self._seen[other] = said, now, alive or before is not None
        if self._seen[other][2] and said['status']:
          how = said['status']
          return how if how == 'watchdog' else f'process {other} ({_place(said)}) {how}.'
      elif alive and now - since > 0.7 * self.heartbeat_s:
        return (f'process {other} ({_place(said)}) has given no sign of life for {now - since:.0f} s; it was at step '
                f'{said["step"]}.')
    return None

  def _file(self, index: int) -> str:
    return os.path.join(self.folder, f'{index}.json')

  def _write(self, status: str) -> None:
    self._beat += 1
    temporary = self._file(self.index) + '.tmp'
    try:
      with open(temporary, 'w', encoding='utf-8') as f:
        json.dump(dict(host=socket.gethostname(), pid=os.getpid(), beat=self._beat, step=self._step, status=status), f)
      os.replace(temporary, self._file(self.index))
    except OSError as e:
      print(f'watch: cannot write {self._file(self.index)}: {e.strerror}', file=sys.stderr)

  def _read(self, index: int) -> dict[str, Any] | None:
    try:
      with open(self._file(index), encoding='utf-8') as f:
        return json.load(f)
    except FileNotFoundError:
      return None
    except (OSError, ValueError):  # a network file system between two versions
      return self._seen.get(index, (None,))[0]

  def _remove(self) -> None:
    try:
      os.remove(self._file(self.index))
    except OSError:
      pass


def _place(said: dict[str, Any]) -> str:
  return f'host {said["host"]}, pid {said["pid"]}'
