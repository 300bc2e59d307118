"""The inside of a sandbox: a script that binds its own process, runs a program's text, and tells how it ended.

`sandbox.run` starts it, a new interpreter each time; nothing imports it. It imports little, to start fast.
"""
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import socket
import sys
import types

CLONE_THREAD = 0x10000
DENIED = {  # what a lone program that computes never asks of Linux: (x86_64, aarch64) numbers, None where there is none
    'socket': (41, 198), 'connect': (42, 203), 'bind': (49, 200),
    'fork': (57, None), 'vfork': (58, None), 'execve': (59, 221), 'execveat': (322, 281),
    'tkill': (200, 130), 'rt_sigqueueinfo': (129, 138), 'rt_tgsigqueueinfo': (297, 240),
    'pidfd_send_signal': (424, 424), 'ptrace': (101, 117), 'process_vm_readv': (310, 270),
    'process_vm_writev': (311, 271), 'process_madvise': (440, 440),
    'setpriority': (141, 140), 'ioprio_set': (251, 30), 'sched_setparam': (142, 118), 'sched_setscheduler': (144, 119),
    'sched_setaffinity': (203, 122), 'sched_setattr': (314, 274), 'migrate_pages': (256, 238), 'move_pages': (279, 239),
    'shmget': (29, 194), 'semget': (64, 190), 'msgget': (68, 186), 'memfd_create': (319, 279),
    'mount': (165, 40), 'umount2': (166, 39), 'pivot_root': (155, 41), 'chroot': (161, 51), 'unshare': (272, 97),
    'setns': (308, 268), 'open_tree': (428, 428), 'move_mount': (429, 429), 'fsopen': (430, 430), 'fsmount': (432, 432),
    'mount_setattr': (442, 442), 'add_key': (248, 217), 'request_key': (249, 218), 'keyctl': (250, 219),
    'bpf': (321, 280), 'perf_event_open': (298, 241), 'userfaultfd': (323, 282), 'io_uring_setup': (425, 425),
}
OWN = {'kill': (62, 129), 'tgkill': (234, 131), 'prlimit64': (302, 261)}  # allowed on the process itself
CLONE, CLONE3 = (56, 220), 435
MACHINES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}  # column above, AUDIT_ARCH

# Audit events, and which of their arguments are (path, the folder's descriptor it is relative to or None).
WRITES = {
    'os.remove': [(0, 1)], 'os.rmdir': [(0, 1)], 'os.mkdir': [(0, 2)], 'os.truncate': [(0, None)],
    'os.rename': [(0, 2), (1, 3)], 'os.link': [(0, 2), (1, 3)], 'os.symlink': [(1, 2)],
    'os.chmod': [(0, 2)], 'os.chown': [(0, 3)], 'os.chflags': [(0, None)], 'os.utime': [(0, 3)],
    'os.setxattr': [(0, None)], 'os.removexattr': [(0, None)], 'sqlite3.connect': [(0, None)],
}
REFUSED = {
    'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.system', 'os.killpg', 'pty.spawn',
    'subprocess.Popen', 'socket.connect', 'socket.bind', 'socket.sendto', 'socket.sendmsg', 'socket.getaddrinfo',
    'socket.gethostbyname', 'socket.gethostbyaddr', 'socket.getnameinfo', 'socket.sethostname', 'syslog.openlog',
    'syslog.syslog', 'ctypes.dlopen', 'ctypes.dlsym', 'ctypes.dlsym/handle', 'ctypes.call_function', 'ctypes.cdata',
    'ctypes.cdata/buffer', 'ctypes.string_at', 'ctypes.wstring_at',
}


def _checked(value: int, *arguments) -> int:
  if value < 0:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), *arguments)
  return value


def set_namespaces(libc, folder: str, disk_mb: int) -> None:
  """No network but a dead loopback; every mount read-only but the folder, which is `disk_mb` of memory."""
  owner = {'uid_map': os.geteuid(), 'gid_map': os.getegid()}
  newuser, newnet, newns, newipc = 0x10000000, 0x40000000, 0x20000, 0x8000000
  _checked(libc.unshare(newuser | newnet | newns | newipc))
  for name, text in {'setgroups': 'deny', **{k: f'{v} {v} 1' for k, v in owner.items()}}.items():
    with open(f'/proc/self/{name}', 'w') as f:
      f.write(text)
  place, nosuid_nodev, recursive = os.fsencode(folder), 2 | 4, 0x8000
  _checked(libc.mount(b'tmpfs', place, b'tmpfs', nosuid_nodev, f'size={disk_mb}m,nr_inodes=10000,mode=700'.encode()))
  os.chdir(folder)
  readonly, writable = (ctypes.c_uint64 * 4)(1, 0), (ctypes.c_uint64 * 4)(0, 1)
  _checked(libc.syscall(442, -1, b'/', recursive, readonly, 32))  # mount_setattr
  _checked(libc.syscall(442, -1, place, 0, writable, 32))


def set_landlock(libc, folder: str) -> None:
  """No write outside the folder, no TCP, no signal and no abstract socket out of the process."""
  abi = _checked(libc.syscall(444, None, 0, 1))
  files = sum(1 << bit for bit in (1, *range(4, 13), *([13] if abi > 1 else []), *([14] if abi > 2 else [])))
  attributes = (ctypes.c_uint64 * 3)(files, 3 if abi > 3 else 0, 3 if abi > 5 else 0)
  ruleset = _checked(libc.syscall(444, attributes, 8 * (1 + (abi > 3) + (abi > 5)), 0))
  for path, access in ((folder, files), (os.devnull, files & (1 << 1 | 1 << 14))):
    fd = os.open(path, os.O_PATH)
    rule = access.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
    _checked(libc.syscall(445, ruleset, 1, rule, 0), path)
    os.close(fd)
  _checked(libc.syscall(446, ruleset, 0))
  os.close(ruleset)


def set_seccomp(libc) -> None:
  """No process is started, signalled or looked into, and no socket opened; threads and socket pairs are allowed."""
  column, arch = MACHINES[platform.machine()]
  load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
  allow, deny, absent = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
  code = [(load, 0, 0, 4), (equal, 1, 0, arch), (leave, 0, 0, deny), (load, 0, 0, 0)]
  code += [(at_least, 0, 1, 0x40000000), (leave, 0, 0, deny)]  # x32's calls
  code += [(equal, 0, 1, CLONE3), (leave, 0, 0, absent)]       # glibc then makes threads by clone, whose flags show
  code += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_THREAD), (leave, 0, 0, allow),
           (leave, 0, 0, deny)]
  for numbers in OWN.values():
    code += [(equal, 0, 5, numbers[column]), (load, 0, 0, 16), (equal, 1, 0, os.getpid()), (equal, 0, 1, 0),
             (leave, 0, 0, allow), (leave, 0, 0, deny)]
  for numbers in DENIED.values():
    if numbers[column] is not None:
      code += [(equal, 0, 1, numbers[column]), (leave, 0, 0, deny)]
  code.append((leave, 0, 0, allow))
  filters = b''.join(op.to_bytes(2, sys.byteorder) + bytes((yes, no)) + k.to_bytes(4, sys.byteorder)
                     for op, yes, no, k in code)

  class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('filters', ctypes.c_char_p)]
  _checked(libc.prctl(22, 2, ctypes.byref(Program(len(code), filters)), 0, 0))


def drop_capabilities(libc) -> None:
  """Root, of the machine or of the namespace, becomes a user like others."""
  header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
  _checked(libc.capset(header, none))


def set_kernel_guards(folder: str, disk_mb: int) -> list[str]:
  """Everything Linux offers a process against itself; the names of what this machine allowed."""
  if sys.platform != 'linux':
    return []
  libc = ctypes.CDLL(None, use_errno=True)
  libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
  held = []
  for name, guard in (('namespaces', lambda: set_namespaces(libc, folder, disk_mb)),
                      ('landlock', lambda: set_landlock(libc, folder)),
                      ('capabilities', lambda: drop_capabilities(libc)),
                      ('seccomp', lambda: set_seccomp(libc))):
    try:
      guard()
      held.append(name)
    except (OSError, AttributeError, KeyError):  # a kernel, a libc or a machine without it
      continue
  libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, last: a change of capabilities would clear it
  return held


def set_limits(limits: dict[str, int], held: list[str]) -> None:
  """Resource limits, soft and hard, where the system has them."""
  if 'seccomp' not in held:
    limits = {**limits, 'NPROC': 0}   # forks, and threads with them
  elif 'namespaces' in held:
    limits = {**limits, 'NPROC': 64}  # counted inside the namespace
  for name, value in limits.items():
    number = getattr(resource, f'RLIMIT_{name}', None)
    if number is not None:
      hard = resource.getrlimit(number)[1]
      value = value if hard == resource.RLIM_INFINITY else min(value, hard)
      try:
        resource.setrlimit(number, (value, value))
      except (OSError, ValueError):
        if sys.platform == 'linux':
          raise


class Guard:
  """The audit hook: refuses what reaches outside the folder, and remembers it."""

  def __init__(self, folder: str):
    self._folder = os.path.realpath(folder)
    self.refused: list[str] = []

  def _inside(self, path, base: int | None) -> bool:
    if isinstance(path, int):
      path = f'/dev/fd/{path}'
    elif base is not None and base >= 0:
      path = os.path.join(os.path.realpath(f'/dev/fd/{base}'), os.fsdecode(path))
    path = os.path.realpath(os.fsdecode(path))
    return path == os.devnull or os.path.commonpath([path, self._folder]) == self._folder

  def __call__(self, event: str, arguments: tuple) -> None:
    if event == 'open':
      path, mode, flags = arguments
      writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
      if writing and not isinstance(path, int) and not self._inside(path, None):
        self._refuse(event, f'for writing {path!r}')
    elif event in WRITES:
      for path, base in WRITES[event]:
        path, base = arguments[path], None if base is None else arguments[base]
        if path == ':memory:' and event == 'sqlite3.connect':
          continue
        if not self._inside(path, base):
          self._refuse(event, repr(path))
    elif event in REFUSED:
      self._refuse(event)
    elif event == 'os.kill' and arguments[0] != os.getpid():
      self._refuse(event, str(arguments[0]))
    elif event == 'resource.prlimit' and arguments[0] not in (0, os.getpid()):
      self._refuse(event, str(arguments[0]))
    elif event == 'socket.__new__' and arguments[1] != socket.AF_UNIX:  # asyncio wakes itself through a pair of these
      self._refuse(event)

  def _refuse(self, event: str, what: str = '') -> None:
    reason = f'the sandbox refuses {event} {what}'.rstrip()[:300]
    self.refused.append(reason)
    raise PermissionError(reason)


def execute(source: str) -> str:
  """Runs a program as `__main__`; why it did not come to its end, or ''."""
  main = types.ModuleType('__main__')
  main.__dict__['__builtins__'] = __builtins__
  sys.modules['__main__'], sys.argv = main, ['program']
  try:
    exec(compile(source, '<program>', 'exec', dont_inherit=True), main.__dict__)
  except SystemExit as e:
    return f'left by SystemExit({str(e.code)[:100]}) before its end'
  except BaseException as e:
    try:
      sys.stdout.flush()                         # what it printed stands before how it failed
      e.__traceback__ = e.__traceback__.tb_next  # without this frame
      sys.__excepthook__(type(e), e, e.__traceback__)
      return f'{type(e).__name__}: {e}'[:300].rstrip(': ')
    except BaseException:  # a program's own exception may not even print
      return type(e).__name__
  return ''


def main() -> None:
  order = json.loads(sys.stdin.buffer.read())
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  folder, token, report = os.getcwd(), order['token'], order['report']
  held = set_kernel_guards(folder, order['disk_mb'])
  set_limits(order['limits'], held)
  os.listdir(os.path.dirname(os.__file__))  # a library that the guards made unreadable fails here, not in the program
  os.write(report, json.dumps([token, held]).encode() + b'\n')
  guard = Guard(folder)
  sys.addaudithook(guard)
  why = execute(order['source'])
  try:
    sys.stdout.flush()
  except BaseException:
    pass
  os.write(report, json.dumps([token, guard.refused[0] if guard.refused else why]).encode() + b'\n')
  os._exit(0)  # threads and exit handlers have no say any more


if __name__ == '__main__':
  main()
