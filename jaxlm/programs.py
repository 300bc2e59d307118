"""How a program starts and ends: flags, and every outcome as an exit code and at most one line.

Exit codes: 0 done; 1 the run failed; 2 the user can mend it, one line each on stderr; 75 preempted after saving.
"""
import errno
import functools
import importlib.util
import inspect
import os
import re
import sys
import traceback
from typing import Callable, Mapping

from absl import flags
from ml_collections import ConfigDict

from jaxlm import cluster, folders, settings
from jaxlm.errors import JaxlmError, Preempted, RunFailed
from jaxlm.lookup import nearest

DONE, FAILED, USER_ERROR, PREEMPTED = 0, 1, 2, 75

_overrides: list[tuple[str, str]] = []  # of the command line that was parsed last: (key, text)


class Flags:
  """A program's own flags, DEFINE_string and the others as absl has them; programs of one process may share names."""

  def __init__(self):
    self.values = flags.FlagValues()

  def __getattr__(self, name: str):
    return functools.partial(getattr(flags, name), flag_values=self.values)


def define_config() -> None:
  """Defines --config=FILE[:ARGUMENTS] and with it --config.KEY=VALUE; `config()` reads them.

  ml_collections' own flag tells a key that is not there, a value of another type and a file that fails in several ways
  or with a traceback, one at a time; here each is one line, and all are told.
  """
  if 'config' not in flags.FLAGS:
    flags.DEFINE_string('config', None, 'An experiment, as experiments/x.py or experiments/x.py:size=nano,smoke; '
                        'any key is changed by --config.KEY=VALUE.')


def config() -> ConfigDict:
  """The config that the flags describe.

  Raises:
    JaxlmError: none was given, its file does not make one, or an override names no key or is of another type.
  """
  if not flags.FLAGS.config:
    raise JaxlmError('--config is missing; give an experiment, for instance --config=experiments/quickstart.py.')
  made, faults = _made(*_file_and_argument()), []
  for path, text in _overrides:
    try:
      settings.override(made, path, text)
    except JaxlmError as e:
      faults.append(str(e))
  if faults:
    raise JaxlmError('\n'.join(faults + settings.faults(made)))
  return made


def _file_and_argument() -> tuple[str, str | None]:
  """'experiments/x.py' and 'size=nano', or None where there is no colon."""
  file, colon, argument = flags.FLAGS.config.partition(':')
  return file, argument if colon else None


def _made(file: str, argument: str | None) -> ConfigDict:
  """What an experiment's `get_config` returns; its errors in a line each, with the line of the file."""
  if not os.path.isfile(file):
    meant = next((guess for guess in (f'{file}.py', f'experiments/{file}.py') if os.path.isfile(guess)), None)
    raise JaxlmError(f'No config file {file!r}; '
                     f'give {"an experiment such as experiments/quickstart.py" if meant is None else meant}.')
  spec = importlib.util.spec_from_file_location('experiment', file)
  if spec is None:
    raise JaxlmError(f'{file} is not a Python file; give an experiment such as experiments/quickstart.py.')
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # there, as dataclasses look it up
  try:
    spec.loader.exec_module(module)
    if not callable(getattr(module, 'get_config', None)):
      raise JaxlmError(f'{file} has no get_config; an experiment defines get_config(arg=None), which returns a config.')
    given = [] if argument is None else [argument]
    try:
      inspect.signature(module.get_config).bind(*given)
    except TypeError:
      raise JaxlmError(f'{file}: get_config takes no argument; leave :{argument} out.' if given else
                       f'{file}: get_config wants an argument; give --config={file}:ARGUMENT.') from None
    made = module.get_config(*given)
  except JaxlmError:
    raise
  except Exception as e:
    raise JaxlmError(_line_of(e, file)) from e
  if not isinstance(made, ConfigDict):
    raise JaxlmError(f'{file}: get_config must return a ConfigDict, as jaxlm.config.default() makes one; got '
                     f'{type(made).__name__}.')
  return made


def _line_of(error: Exception, file: str) -> str:
  """'experiments/x.py:7: what went wrong there'."""
  file_of = lambda name: file if name == os.path.abspath(file) else name
  if isinstance(error, SyntaxError):
    return f'{file_of(error.filename)}:{error.lineno}: {error.msg}.'
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file_of(frame.filename) == file]
  where = f'{file}:{lines[-1]}' if lines else file
  if unknown := re.search(r'Key "(\w+)" does not exist and cannot be added', str(error)):
    names = {path.rpartition('.')[2] for path in (*settings.KEYS, *settings.GROUPS)}
    return f'{where}: no key {unknown[1]!r} there.{nearest(unknown[1], sorted(names))}'
  told = next(iter(str(error).splitlines()), '')[:200].rstrip('.')
  return f'{where}: {type(error).__name__}{": " * bool(told)}{told}.'


def experiment_name() -> str:
  """'gpt2-size=nano' for --config=experiments/gpt2.py:size=nano."""
  file, arguments = _file_and_argument()
  name = os.path.splitext(os.path.basename(file))[0]
  return f'{name}-{arguments.replace(os.sep, "_")}' if arguments else name


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
  """Parses flags, runs `main`, exits; the last line of every program.

  Its flags are those of a `Flags` named `flags` in the module of `main`.
  """
  wanted = surroundings(os.environ)
  if argv is None and wanted.get(PAGES) != os.environ.get(PAGES) and _is_the_program(main):
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
  os.environ.update(wanted)
  cluster.leave(outcome(main, sys.argv if argv is None else argv))


PAGES = 'GLIBC_TUNABLES'


def surroundings(given: Mapping[str, str]) -> dict[str, str]:
  """The environment a program should run in: what it was given, and what that does not say.

  What XLA compiled is kept in the user's cache folder. Memory comes in pages of 2 MB where the system gives them to
  those who ask: a training step takes and returns all its arrays, and on a CPU spent up to a tenth of its time on pages
  of 4 kB. The C library reads that only when a process starts.
  """
  wanted = {'JAX_COMPILATION_CACHE_DIR': str(folders.cache('programs'))} | dict(given)
  tunables = given.get(PAGES, '')
  if 'glibc.malloc.hugetlb' not in tunables and _gives_large_pages():
    wanted[PAGES] = ':'.join([*filter(None, [tunables]), 'glibc.malloc.hugetlb=1'])
  return wanted


def _gives_large_pages() -> bool:
  try:
    library, version = os.confstr('CS_GNU_LIBC_VERSION').split()
    with open('/sys/kernel/mm/transparent_hugepage/enabled', encoding='utf-8') as f:
      return library == 'glibc' and tuple(map(int, version.split('.'))) >= (2, 35) and '[madvise]' in f.read()
  except (AttributeError, OSError, ValueError):
    return False


def _is_the_program(main: Callable[[list[str]], None]) -> bool:
  """Whether this process is `python -m` of main's own module, and has loaded little: then it may start again."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  begun = spec is not None and main.__module__ == '__main__' and '-m' in sys.orig_argv
  return begun and sys.orig_argv[sys.orig_argv.index('-m') + 1] == spec.name and 'jax' not in sys.modules


def outcome(main: Callable[[list[str]], None], argv: list[str]) -> int:
  """The exit code of `main` under the flags in `argv` alone, its errors told."""
  module = sys.modules[main.__module__]
  own = getattr(module, 'flags', None)
  own = own if isinstance(own, Flags) else Flags()
  if any(arg in ('--help', '-help', '-h', '--helpfull') for arg in argv[1:]):
    print(_help(module.__doc__, own))
    return DONE
  try:
    main(_parse(argv, own))
    return DONE
  except Preempted as e:
    print(f'preempted: {e}', file=sys.stderr)
    return PREEMPTED
  except KeyboardInterrupt:
    print('failed: interrupted; the same command goes on from what it has saved, if it saves anything.', file=sys.stderr)
    return FAILED
  except RunFailed as e:
    print(f'failed: {e}', file=sys.stderr)
    return FAILED
  except JaxlmError as e:
    return _told(str(e))
  except OSError as e:
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
      return _told(f'Cannot write or read {e.filename}: {e.strerror}; choose another folder or change its permissions.')
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      return _told(f'No space left for {e.filename or "a file"}: {e.strerror}; free some, then start again to resume.')
    traceback.print_exc()
    return FAILED
  except Exception as e:  # a fault of jaxlm's own or of an experiment: the traceback is the message
    if str(e).startswith('RESOURCE_EXHAUSTED'):  # JAX's, which this module does not import
      print(f'failed: {str(e).splitlines()[0].partition(": ")[2].rstrip(".")}; ask for less at once: a smaller batch_size, '
            'shorter rows, fewer shots.', file=sys.stderr)
    else:
      traceback.print_exc()
    return FAILED


def _told(message: str) -> int:
  for line in message.splitlines():
    print(f'error: {line}', file=sys.stderr)
  return USER_ERROR


def _help(told: str, own: Flags) -> str:
  """The program's docstring and all its flags."""
  texts = [flags.FLAGS.module_help(sys.modules[__name__]), own.values.get_help(include_special_flags=False)]
  shown = [line for text in texts for line in text.splitlines() if line.startswith('  ')]  # not the modules' names
  return told.strip() + '\n\nFlags:\n' + '\n'.join(shown)


def _parse(argv: list[str], own: Flags) -> list[str]:
  """Reads flags from argv, forgets those of before, and returns the rest; what absl raises becomes one clear line."""
  _overrides.clear()
  if 'config' in flags.FLAGS and flags.FLAGS.find_module_defining_flag('config') == __name__:
    argv, given = _split(argv)
    _overrides.extend(given)
  every = flags.FlagValues()
  every.append_flag_values(own.values)
  for name in flags.FLAGS:
    if name == flags.FLAGS[name].name and name not in every:
      every[name] = flags.FLAGS[name]
  every.unparse_flags()
  try:
    rest = every(argv, known_only=False)
    for values in (own.values, flags.FLAGS):
      values.mark_as_parsed()
  except flags.UnrecognizedFlagError as e:
    known = [name for name in every if len(name) > 1]
    raise JaxlmError(f'Unknown flag --{e.flagname}.{nearest(e.flagname, known)} --help lists them.') from e
  except flags.Error as e:
    raise JaxlmError(str(e).splitlines()[0].removesuffix('.') + '.') from e
  if len(rest) > 1:
    raise JaxlmError(f'Unknown argument {rest[1]!r}; flags start with --, as --config={rest[1]}.')
  return rest


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """(argv without --config.KEY=VALUE, those as (key, text)); --config.KEY VALUE and --[no]config.KEY too."""
  rest, overrides, left = [], [], iter(argv)
  for arg in left:
    found = re.fullmatch(r'--?(no)?config\.([^=]+)(?:=(.*))?', arg, re.DOTALL)
    if arg == '--':
      rest += [arg, *left]
    elif not found:
      rest.append(arg)
    else:
      no, path, text = found.groups()
      key = settings.KEYS.get(path)
      is_flag = key is not None and isinstance(key.value, bool)
      if no and (text is not None or not is_flag):
        raise JaxlmError(f'Unknown flag {arg}; --noconfig.KEY switches a key off that is True or False.')
      if text is None:
        text = ('false' if no else 'true') if is_flag else next(left, None)
      if text is None:
        raise JaxlmError(f'--config.{path} has no value; give --config.{path}=VALUE.')
      overrides.append((path, text))
  return rest, overrides
