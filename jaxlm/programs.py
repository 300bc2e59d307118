"""How a program starts and ends: flags, and every outcome as an exit code and at most one line.

Exit codes: 0 done; 1 the run failed; 2 the user can mend it, one line each on stderr; 75 preempted after saving.
"""
import errno
import os
import sys
import traceback
from typing import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxlm.config import KEYS
from jaxlm.lookup import nearest
from jaxlm.types import JaxlmError, Preempted, RunFailed

DONE, FAILED, USER_ERROR, PREEMPTED = 0, 1, 2, 75
_CONFIG = None


def define_config():
  """Defines --config=FILE[:ARGUMENTS] and with it --config.KEY=VALUE; `config()` reads them."""
  global _CONFIG
  _CONFIG = config_flags.DEFINE_config_file(
      'config', None, 'An experiment, as experiments/x.py or experiments/x.py:size=nano,smoke; '
      'any key is changed by --config.KEY=VALUE.', lock_config=True)


def config() -> ConfigDict:
  """The config that the flags describe.

  Raises:
    JaxlmError: none was given.
  """
  if _CONFIG.value is None:
    raise JaxlmError('--config is missing; give an experiment, for instance --config=experiments/quickstart.py.')
  return _CONFIG.value


def experiment_name() -> str:
  """'gpt2-size=nano' for --config=experiments/gpt2.py:size=nano."""
  path, _, arguments = flags.FLAGS['config'].config_filename.partition(':')
  name = os.path.splitext(os.path.basename(path))[0]
  return f'{name}-{arguments.replace(os.sep, "_")}' if arguments else name


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
  """Parses flags, runs `main`, exits; the last line of every program."""
  sys.exit(outcome(main, sys.argv if argv is None else argv))


def outcome(main: Callable[[list[str]], None], argv: list[str]) -> int:
  """The exit code of `main` under the flags in `argv`, its errors told."""
  if any(arg in ('--help', '-help', '-h', '--helpfull') for arg in argv[1:]):
    module = sys.modules[main.__module__]
    print(module.__doc__.strip() + '\n\nFlags:\n' + flags.FLAGS.module_help(module).strip())
    return DONE
  try:
    main(_parse(argv))
    return DONE
  except Preempted as e:
    print(f'preempted: {e}', file=sys.stderr)
    return PREEMPTED
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
  except Exception:  # a fault of jaxlm's own or of an experiment: the traceback is the message
    traceback.print_exc()
    return FAILED


def _told(message: str) -> int:
  for line in message.splitlines():
    print(f'error: {line}', file=sys.stderr)
  return USER_ERROR


def _parse(argv: list[str]) -> list[str]:
  """Reads flags from argv and returns the rest; what absl and ml_collections raise becomes one clear line."""
  file = next((arg.split('=', 1)[1] for arg in argv[1:] if arg.startswith(('--config=', '-config='))), None)
  if file is not None and not os.path.isfile(file.partition(':')[0]):
    raise JaxlmError(f'No config file {file.partition(":")[0]!r}; give an experiment such as experiments/quickstart.py.')
  try:
    rest = flags.FLAGS(argv, known_only=False)
  except AttributeError as e:  # an override of a key that is not there
    key = next((arg.lstrip('-').partition('=')[0] for arg in argv if arg.startswith('--config.')
                and arg.lstrip('-').partition('=')[0].removeprefix('config.') not in KEYS), None)
    if key is None:
      raise
    raise JaxlmError(f'Unknown key {key}.{nearest(key.removeprefix("config."), KEYS)} '
                     '--print_config shows them all.') from e
  except flags.Error as e:
    if isinstance(e.__cause__, JaxlmError) or isinstance(e.__context__, JaxlmError):
      raise (e.__cause__ or e.__context__) from None
    raise JaxlmError(str(e).splitlines()[0].removesuffix('.') + '.') from e
  if len(rest) > 1:
    raise JaxlmError(f'Unknown argument {rest[1]!r}; flags start with --, as --config={rest[1]}.')
  return rest
