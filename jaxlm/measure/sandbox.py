"""Runs programs that a model wrote: a process each, inside limits, passed only if the last line was reached."""
import collections
import concurrent.futures
import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from jaxlm.errors import JaxlmError

CELL = Path(__file__).with_name('cell.py')
START_S = 60.0             # for an interpreter on a busy machine to come up; the program's own time begins after it
MAX_OUTPUT = 1 << 20       # bytes
MAX_REPORT = 1 << 16       # bytes; a program that finds the pipe cannot fill memory through it


class Result(NamedTuple):
  """How a program ended.

  Attributes:
    passed: it ran to the end of its text, and tried nothing that is refused.
    why: what kept it from that, in a line; '' if it passed.
    output: what it printed, stdout and stderr together, a megabyte at most.
  """
  passed: bool
  why: str
  output: str


class _Ending(NamedTuple):
  """What a process left: its exit status, why it was killed, and both pipes' bytes."""
  status: int
  killed: str
  output: bytes
  report: bytes


def run(source: str, timeout_s: float = 10.0, memory_mb: int = 512, disk_mb: int = 32) -> Result:
  """Runs a program in a process of its own that can harm nothing outside it.

  Everywhere: a new interpreter of this Python with the standard library alone, an empty environment (HOME and TMPDIR
  are a new folder, which is also where it runs), no stdin, limits on memory, CPU time, file size and open files, an
  audit hook that refuses writes outside the folder, sockets, new processes, signals and foreign functions, and an end
  by SIGKILL. On Linux, each where the machine allows it (`guards` says): a user, network and mount namespace in which
  all but the folder is read-only; Landlock; no capabilities; seccomp without processes, sockets and signals.

  Guards against programs that go wrong and against most that mean harm: loops, huge allocations, fork bombs, writes and
  deletions, the network, a success that is feigned by leaving early. Not against: reading what its user may read (it
  can pass nothing on but `output`), faults of the kernel, or, where `guards` is empty, anyone who goes around an
  audit hook, which Python code can; and code that sets out to can find out how success is reported. Run programs of
  unknown origin in a container besides.

  Args:
    source: the program's text.
    timeout_s: wall time, from when the interpreter is up.
    memory_mb: address space of the process.
    disk_mb: all its files together, or each of them where there are no namespaces.
  Raises:
    JaxlmError: limits that are no limits, or a machine on which no sandbox starts.
  """
  return _run(source, timeout_s, memory_mb, disk_mb)[0]


def run_all(sources: Iterable[str], workers: int | None = None, **limits) -> Iterator[Result]:
  """The results of many programs in their order; a few run at a time, and texts are asked for as they are needed.

  Args:
    workers: processes at a time; the machine's cores by default. More than that makes timeouts a matter of luck.
    limits: those of `run`.
  """
  workers = workers or os.cpu_count() or 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
      for source in sources:
        waiting.append(pool.submit(run, source, **limits))
        if len(waiting) >= 2 * workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def guards() -> tuple[str, ...]:
  """Which of Linux's guards hold on this machine: namespaces, landlock, capabilities, seccomp."""
  return _run('', 10.0, 512, 32)[1]


def _run(source: str, timeout_s: float, memory_mb: int, disk_mb: int) -> tuple[Result, tuple[str, ...]]:
  if min(timeout_s, memory_mb - 63, disk_mb) <= 0:
    raise JaxlmError(f'A sandbox wants timeout_s above 0, memory_mb of 64 or more and disk_mb above 0, got '
                     f'{timeout_s}, {memory_mb} and {disk_mb}; raise what is too low.')
  token = secrets.token_hex(16)
  limits = dict(AS=memory_mb << 20, CPU=int(timeout_s) + 1, FSIZE=disk_mb << 20, NOFILE=64, CORE=0, MSGQUEUE=0)
  folder = tempfile.mkdtemp(prefix='jaxlm-sandbox-')
  try:
    ending = _process(folder, dict(source=source, token=token, limits=limits, disk_mb=disk_mb), timeout_s)
  finally:
    with contextlib.suppress(RecursionError):  # a program may nest folders beyond it
      shutil.rmtree(folder, ignore_errors=True)
  output = ending.output[:MAX_OUTPUT].decode('utf-8', 'replace')
  said = list(_said(ending.report, token))
  if not said:
    raise JaxlmError(f'No sandbox starts here: {ending.killed or f"exit code {ending.status}"}; it said '
                     f'{output[-500:].strip()!r}. Run as a user who can read Python\'s own library, or in a container.')
  if ending.killed:
    why = ending.killed
  elif len(said) > 1:
    why = said[1]
  elif ending.status < 0:
    why = f'killed: {signal.strsignal(-ending.status)}'
  else:
    why = f'left with exit code {ending.status} before its end'
  return Result(not why, why, output), tuple(said[0])


def _said(report: bytes, token: str) -> Iterator:
  """What the cell reported: its guards, then why the program failed; lines without the token are the program's."""
  for line in report.splitlines():
    with contextlib.suppress(ValueError, TypeError):
      secret, what = json.loads(line)
      if secret == token:
        yield what


def _process(folder: str, order: dict, timeout_s: float) -> _Ending:
  """Starts the cell, reads what it writes within bounds, and ends it and its group whatever happens.

  No `preexec_fn`: forking a process that has threads (JAX has many) to run Python can deadlock; the cell binds itself.
  """
  reading, writing = os.pipe()
  # -P -s -S: nothing but the standard library. Not -I, which would ignore the seed: sets print the same in every run.
  command = [sys.executable, '-P', '-s', '-S', '-B', '-X', 'utf8', str(CELL)]
  environment = {'HOME': folder, 'TMPDIR': folder, 'PYTHONHASHSEED': '0'}
  with os.fdopen(reading, 'rb', 0) as report, tempfile.TemporaryFile() as stdin:
    try:
      stdin.write(json.dumps(dict(order, report=writing)).encode())
      stdin.seek(0)
      process = subprocess.Popen(command, cwd=folder, env=environment, stdin=stdin, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, pass_fds=[writing], start_new_session=True, bufsize=0)
    finally:
      os.close(writing)
    with process.stdout as stdout:
      try:
        killed, texts = _read(process, stdout, report, timeout_s)
      finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError if it has ended
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  return _Ending(process.returncode, killed, *texts)


def _read(process: subprocess.Popen, stdout, report, timeout_s: float) -> tuple[str, tuple[bytes, bytes]]:
  """(why it must be killed or '', (output, report)): reads both pipes until the process ends or breaks a bound."""
  texts = {stdout: bytearray(), report: bytearray()}
  deadline, started = time.monotonic() + START_S, False
  with selectors.DefaultSelector() as selector:
    for pipe in texts:
      selector.register(pipe, selectors.EVENT_READ)
    killed = ''
    while not killed and selector.get_map():
      left = deadline - time.monotonic()
      for key, _ in selector.select(max(left, 0)) if left > 0 else ():
        data = key.fileobj.read(1 << 16)
        texts[key.fileobj] += data
        if not data:
          selector.unregister(key.fileobj)
      if not started and texts[report]:
        started, deadline = True, time.monotonic() + timeout_s
      elif left <= 0:
        killed = f'took longer than {timeout_s:g} s' if started else f'did not start within {START_S:g} s'
      if len(texts[stdout]) > MAX_OUTPUT:
        killed = f'printed more than {MAX_OUTPUT >> 10} KiB'
      elif len(texts[report]) > MAX_REPORT:
        killed = 'wrote to what is not its own'
  if not killed:  # both pipes are closed: it has ended, or closed them itself
    try:
      process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
      killed = f'took longer than {timeout_s:g} s'
  return killed, (bytes(texts[stdout]), bytes(texts[report]))
