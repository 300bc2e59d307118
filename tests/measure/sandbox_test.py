"""Programs that a model might write end as failed cases with a reason, soon, and harm nothing outside."""
import os
import socket
import subprocess
import sys
import time

import pytest

from jaxlm.errors import JaxlmError
from jaxlm.measure import cell, sandbox

HELD = sandbox.guards()


@pytest.fixture
def outside(tmp_path):
  """A file that no program may touch."""
  path = tmp_path / 'outside.txt'
  path.write_text('unchanged')
  before = path.stat()
  yield path
  after = path.stat()
  assert path.read_text() == 'unchanged' and (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
  assert os.listdir(tmp_path) == ['outside.txt']


@pytest.mark.parametrize('source', [
    'print("hello")',
    'import threading\nt = threading.Thread(target=print, args=("hello",))\nt.start()\nt.join()',
    'import asyncio\nasync def f():\n  await asyncio.sleep(0)\n  print("hello")\nasyncio.run(f())',
    'import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n  x: str\n'
    'print(pickle.loads(pickle.dumps(A("hello"))).x)',
    'import pathlib, shutil\npathlib.Path("a").write_text("hello")\nshutil.copy2("a", "b")\nprint(open("b").read())',
    'import tempfile\nwith tempfile.TemporaryDirectory() as d:\n  open(d + "/x", "w").close()\nprint("hello")',
    'import os\nassert not set(os.environ) - {"HOME", "TMPDIR", "PYTHONHASHSEED", "LC_CTYPE"}\n'
    'assert os.path.samefile(os.environ["HOME"], ".") and not os.listdir()\nprint("hello")',
    'import os, sys\nassert sys.stdin.read() == ""\nprint("x", file=open(os.devnull, "w"))\nprint("hello")'])
def test_good_programs_pass(source):
  result = sandbox.run(source)
  assert result.passed and result.why == '' and result.output == 'hello\n', result


@pytest.mark.parametrize('source, why', [
    ('while True: pass', 'took longer than 2 s'),
    ('import time\ntime.sleep(60)', 'took longer than 2 s'),
    ('import os\nos.closerange(0, 64)\nwhile True: pass', 'took longer than 2 s'),
    ('x = bytearray(10 << 30)', 'MemoryError'),
    ('x = [0]\nwhile True: x += x', 'MemoryError'),
    ('while True: print("x" * 1000)', 'printed more than 1024 KiB'),
    ('import os\nwhile True: os.write(2, b"x" * 1000)', 'printed more than 1024 KiB'),
    ('import sys\nsys.exit(0)\nassert 0', 'left by SystemExit(0) before its end'),
    ('import os\nos._exit(0)\nassert 0', 'left with exit code 0 before its end'),
    ('assert 1 + 1 == 3, "sum"', 'AssertionError: sum'),
    ('def f(:', 'SyntaxError'),
    ('x = "\\ud800"\nraise ValueError(x)', 'ValueError'),
    ('\ud800', 'UnicodeEncodeError'),
    ('class E(Exception):\n  def __str__(self): raise self\nraise E', 'E'),
    ('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)', 'killed: Killed'),
    ('f = open("big", "wb")\nwhile True: f.write(bytes(1 << 20))', 'OSError'),
    ('import os\nfor fd in range(3, 64):\n  try: os.write(fd, b\'["", ""]\\n\')\n  except OSError: pass\nos._exit(0)',
     'left with exit code 0 before its end')])
def test_bad_programs_fail_soon_with_a_reason(source, why):
  begin = time.monotonic()
  result = sandbox.run(source, timeout_s=2, memory_mb=128)
  assert not result.passed and result.why.startswith(why), result
  assert time.monotonic() - begin < 30 and len(result.output) <= sandbox.MAX_OUTPUT


@pytest.mark.parametrize('action, event', [
    ('open({path!r}, "w").close()', 'open'),
    ('open({path!r}, "a").close()', 'open'),
    ('open({path!r} + ".new", "x").close()', 'open'),
    ('os.open({path!r}, os.O_TRUNC | os.O_WRONLY)', 'open'),
    ('os.remove({path!r})', 'os.remove'),
    ('os.remove(os.path.basename({path!r}), dir_fd=os.open(os.path.dirname({path!r}), os.O_RDONLY))', 'os.remove'),
    ('os.rename({path!r}, "mine")', 'os.rename'),
    ('open("mine", "w").close()\nos.replace("mine", {path!r})', 'os.rename'),
    ('os.truncate({path!r}, 0)', 'os.truncate'),
    ('os.chmod({path!r}, 0)', 'os.chmod'),
    ('os.fchmod(os.open({path!r}, os.O_RDONLY), 0)', 'os.chmod'),
    ('os.utime({path!r}, (0, 0))', 'os.utime'),
    ('os.link({path!r}, "mine")', 'os.link'),
    ('os.symlink({path!r}, "mine")\nopen("mine", "w")', 'open'),
    ('import shutil\nshutil.rmtree(os.path.dirname({path!r}))', 'os.'),
    ('os.mkdir(os.path.dirname({path!r}) + "/new")', 'os.mkdir'),
    ('import sqlite3\nsqlite3.connect({path!r} + ".db").execute("create table t (x)")', 'sqlite3.connect'),
    ('import socket\nsocket.create_connection(("127.0.0.1", 9), 1)', 'socket.'),
    ('import urllib.request\nurllib.request.urlopen("http://example.com", timeout=1)', 'socket.'),
    ('while True: os.fork()', 'os.fork'),
    ('import subprocess\nsubprocess.run(["true"])', 'subprocess.Popen'),
    ('os.system("true")', 'os.system'),
    ('os.execv("/bin/true", ["true"])', 'os.exec'),
    ('import multiprocessing\nmultiprocessing.get_context("fork").Process(target=print).start()', 'os.fork'),
    ('os.kill(os.getppid(), 0)', 'os.kill'),
    ('import ctypes\nassert ctypes.c_int32(1 << 31).value < 0\nctypes.CDLL(None)', 'ctypes.dlopen')])
def test_what_reaches_outside_is_refused_even_if_the_refusal_is_caught(outside, action, event):
  lines = f'import os\n{action.format(path=str(outside))}'.replace('\n', '\n  ')
  result = sandbox.run(f'try:\n  {lines}\nexcept Exception as e: print(e)', timeout_s=5)
  assert not result.passed and result.why.startswith(f'the sandbox refuses {event}'), result


# What each guard of the kernel keeps out alone, and what it must leave alone.
ALONE = {
    'namespaces': ('set_namespaces(libc, folder, 1)', [
        'open(outside, "w")', 'os.remove(outside)', 'os.chmod(outside, 0)', 'os.utime(outside, (0, 0))',
        'open("big", "wb", 0).write(bytes(2 << 20)) == 2 << 20 or fail()',
        'socket.create_connection(("127.0.0.1", port), 1)']),
    'landlock': ('set_landlock(libc, folder)', [
        'open(outside, "w")', 'os.remove(outside)', 'os.truncate(outside, 0)', 'os.rename(outside, "mine")',
        'os.link(outside, "mine")', 'os.mkdir(outside + "d")']),
    'seccomp': ('set_seccomp(libc)', [
        'os.fork()', 'subprocess.run(["true"])', 'os.execv("/bin/true", ["true"])', 'os.kill(os.getppid(), 0)',
        'os.posix_spawn("/bin/true", ["true"], {})', 'socket.socket()', 'os.memfd_create("x")',
        'resource.prlimit(os.getppid(), resource.RLIMIT_CORE)', 'os.setpriority(os.PRIO_PROCESS, os.getppid(), 9)']),
}
SCRIPT = """
import ctypes, os, resource, socket, subprocess, sys, threading
sys.path.insert(0, {place!r})
import cell
def fail(): raise OSError
libc, folder, outside, port = ctypes.CDLL(None, use_errno=True), os.getcwd(), {outside!r}, {port}
libc.prctl(38, 1, 0, 0, 0)
cell.{guard}
try:
  {action}
except OSError as e:
  print('refused', e)
thread = threading.Thread(target=open('inside', 'w').close)
thread.start()
thread.join()
os.kill(os.getpid(), 0)
open(os.devnull, 'w').close()
os.rename('inside', 'moved')
os.remove('moved')
a, b = socket.socketpair()
"""


@pytest.mark.parametrize('name, action', [(name, action) for name in ALONE for action in ALONE[name][1]])
def test_each_guard_of_the_kernel_holds_alone(outside, tmp_path_factory, name, action):
  if name not in HELD:
    pytest.skip(f'this machine has no {name}')
  with socket.create_server(('127.0.0.1', 0)) as server:
    script = SCRIPT.format(place=os.path.dirname(cell.__file__), outside=str(outside), guard=ALONE[name][0],
                           action=action, port=server.getsockname()[1])
    done = subprocess.run([sys.executable, '-S', '-c', script], cwd=tmp_path_factory.mktemp('folder'), timeout=60,
                          capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.startswith('refused'), (done.stdout, done.stderr)


def test_programs_leave_no_folder_and_no_process_behind(tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  sandbox.run('import os\nd = "x"\nfor _ in range(1500):\n  os.mkdir(d)\n  os.chdir(d)\nos.chmod(".", 0)')
  result = sandbox.run('import os, time\nopen("x", "w").close()\nprint(os.getpid(), flush=True)\ntime.sleep(60)',
                       timeout_s=2)
  assert os.listdir(tmp_path) == []
  with pytest.raises(ProcessLookupError):
    os.kill(int(result.output), 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such signal')
def test_a_program_dies_with_who_started_it(tmp_path):
  script = ('from jaxlm.measure import sandbox\nprint("up", flush=True)\n'
            'sandbox.run("import time; time.sleep(60)", timeout_s=60)')
  with subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE,
                        env={**os.environ, 'TMPDIR': str(tmp_path)}) as parent:
    parent.stdout.readline()
    children, begin = '', time.monotonic()
    while time.monotonic() - begin < 30 and b'cell.py' not in (_command(children) if children else b''):
      children = ''.join(open(f'/proc/{parent.pid}/task/{parent.pid}/children').read().split()[:1])
      time.sleep(0.01)
    time.sleep(1)  # until it is bound
    parent.kill()
  begin = time.monotonic()
  while os.path.exists(f'/proc/{children}') and time.monotonic() - begin < 10:
    time.sleep(0.01)
  assert children and not os.path.exists(f'/proc/{children}')


def _command(process: str) -> bytes:
  try:
    return open(f'/proc/{process}/cmdline', 'rb').read()
  except FileNotFoundError:
    return b''


def test_many_run_in_order_and_are_asked_for_as_needed():
  asked = []

  def sources():
    for i in range(50):
      asked.append(i)
      yield f'import time\ntime.sleep({0.2 if i == 0 else 0})\nprint({i})\nassert {i} % 3'
  results = sandbox.run_all(sources(), workers=2, timeout_s=10)
  first = [next(results) for _ in range(6)]
  assert [int(r.output.split('\n')[0]) for r in first] == [*range(6)]
  assert [r.passed for r in first] == [False, True, True, False, True, True]
  assert len(asked) < 15
  results.close()


def test_sets_print_the_same_in_every_run():
  assert len({sandbox.run('print({"a", "b", "c", "d", "e"})').output for _ in range(3)}) == 1


def test_limits_that_are_none_are_refused():
  for limits in (dict(timeout_s=0), dict(memory_mb=1), dict(disk_mb=0)):
    with pytest.raises(JaxlmError, match='A sandbox wants'):
      sandbox.run('', **limits)


def test_a_machine_without_a_python_that_starts_says_so(monkeypatch):
  monkeypatch.setattr(sandbox, 'CELL', sandbox.CELL.with_name('missing.py'))
  with pytest.raises(JaxlmError, match="No sandbox starts here: exit code 2; it said .*missing.py"):
    sandbox.run('')
