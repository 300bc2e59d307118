"""The run directory: one job at a time, what a run is, kept as data, and whether a config may continue it."""
import contextlib
import copy
import fcntl
import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
import time
from importlib import metadata
from typing import Any, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from jaxlm import config as config_module
from jaxlm import settings, sharding
from jaxlm.checkpoint import first_told, reason
from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest

FORMAT = 1
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml-collections', 'tokenizers', 'numpy')

# What a resumed run may change freely: periods, layout, how and where, but not what is learned from what.
FREE = (r'steps|optim\.total_steps|\w+_every|tensorboard|heartbeat_s|watchdog_s|compiler_options',
        r'on_nonfinite|max_rewinds|accumulation|loss\.chunk',
        r'(mesh|sharding|pipeline|eval|checkpoint)\..*', r'data\.(paths|store|workers|prefetch)',
        r'model\.(remat|remat_names|attention\.kernel|attention\.block)')


def group(key: str) -> str:
  """What `--allow_change` calls a key: its first part, but the tokenizer's by itself."""
  return 'tokenizer' if key.startswith(('data.tokenizer', 'data.vocab_size')) else key.partition('.')[0]


GROUPS = tuple(dict.fromkeys(group(key) for key in settings.KEYS))


# Keys, and beginnings of keys, that came later: a run that does not have them means their defaults.
LATER = (
    'heartbeat_s', 'watchdog_s', 'compiler_options', 'pipeline.microbatches', 'pipeline.repeats', 'pipeline.remat',
    'sharding.optimizer_rules', 'sharding.offload_optimizer', 'precision.products', 'optim.layer_decay', 'model.peft',
    'data.task', 'data.task_examples', 'data.too_long', 'data.template', 'data.stride', 'loss.class_weights',
    'loss.teacher', 'objective.prefer.by_token', 'checkpoint.best_is_highest', 'checkpoint.patience', 'checkpoint.init_step',
    *(f'objective.{name}' for name in ('classify', 'multi_label', 'regress', 'tag', 'extract', 'answer', 'contrast',
                                       'prefer', 'grpo', 'ppo', 'kto', 'reward')))


def completed(values: dict[str, Any]) -> ConfigDict:
  """The config of a config.json, with what an earlier version did not know."""
  keys = {path: key.value for path, key in settings.KEYS.items()} | {path: {} for path in settings.GROUPS}
  for path in (path for path in keys if any(path == later or path.startswith(f'{later}.') for later in LATER)):
    *groups, last = path.split('.')
    inside = values
    for name in groups:
      inside = inside.setdefault(name, {})
    inside.setdefault(last, copy.copy(keys[path]))
  rules = values.get('sharding', {}).get('rules', [])
  known = {axis for axis, _ in rules}
  rules += [rule for rule in settings.KEYS['sharding.rules'].value if rule[0] not in known]
  return config_module.from_plain(values)


def _found_again(config: ConfigDict, path: str) -> ConfigDict:
  """The config; its base, if told from a folder that is not the current one, is sought from those above the run."""
  if settings.faults(config):
    return config  # its reader tells them
  told = config.checkpoint.init_from
  if told and not os.path.isabs(told) and not os.path.isdir(told):
    config.checkpoint.init_from = next(
        (str(above / told) for above in pathlib.Path(path).parents if (above / told).is_dir()), told)
  return config


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds a run directory: one job each.

  The kernel lets go when the process ends, however it ends; the file stays, unless what was begun here failed before it
  left anything: then there is no directory, as before. In a run of several processes all of them call this, and the first
  one holds it.

  Raises:
    JaxlmError: another process holds it (named), or the directory cannot be written.
  """
  path = pathlib.Path(workdir).absolute() / 'lock'
  failure, file, is_new = '', None, False
  if jax.process_index() == 0:
    try:
      is_new = not path.parent.exists()
      path.parent.mkdir(parents=True, exist_ok=True)
      file = open(path, 'a+')  # not 'w': the holder's name is in it
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      file.truncate(0)
      file.write(f'host {socket.gethostname()}, pid {os.getpid()}')
      file.flush()
    except BlockingIOError:
      file.seek(0)
      failure = (f'{path.parent} is in use by another process ({file.read().strip() or "unnamed"}). '
                 'Wait for it, stop it, or use another workdir.')
    except OSError as e:
      failure = f'Cannot lock {path.parent}: {reason(e)}. Give a workdir that can be written.'
  try:
    if failure := first_told(failure):
      raise JaxlmError(failure)
    yield
  except BaseException:
    if file and is_new and not failure:  # else it is another's
      _forget(path)
    raise
  finally:
    if file:
      file.close()


def _forget(path: pathlib.Path) -> None:
  """Removes a lock with its run directory, if nothing else is there."""
  checkpoints = path.with_name('checkpoints')
  with contextlib.suppress(OSError):  # it may have gone, or another job may begin in this very moment
    if {*path.parent.iterdir()} <= {path, checkpoints}:
      if checkpoints.exists():
        checkpoints.rmdir()  # raises if it holds any
      path.unlink()
      path.parent.rmdir()


class RunDirectory:
  """config.json and run.json of one run.

  Attributes:
    path: absolute.
    config: the config that was last accepted, or None in a new directory.
    record: run.json's content, or {}.
  """

  def __init__(self, path: str):
    self.path = os.path.abspath(path)
    self.config: ConfigDict | None = None
    self.record: dict[str, Any] = {}
    if os.path.exists(self._file('config.json')):
      self.record = self._read('run.json') if os.path.exists(self._file('run.json')) else {}
      if self.record.get('format', FORMAT) != FORMAT:
        raise JaxlmError(f'{self.path} has format {self.record["format"]}, this version reads {FORMAT}; '
                         'use the jaxlm that made it.')
      self.config = _found_again(completed(self._read('config.json')), self.path)
    elif os.path.isdir(self._file('checkpoints')) and os.listdir(self._file('checkpoints')):
      raise JaxlmError(f'{self.path} has checkpoints but no config.json; put that back, or use another workdir.')

  def _file(self, name: str) -> str:
    return os.path.join(self.path, name)

  def _read(self, name: str) -> dict[str, Any]:
    try:
      with open(self._file(name), encoding='utf-8') as f:
        content = json.load(f)
    except ValueError as e:
      raise JaxlmError(f'{self._file(name)} is not JSON ({e}); put it back, or use another workdir.') from e
    if not isinstance(content, dict):
      raise JaxlmError(f'{self._file(name)} holds no JSON object; put it back, or use another workdir.')
    return content

  def check(self, config: ConfigDict, data: dict[str, str], tokenizer: str, labels: Sequence[str],
            allow: Sequence[str]) -> dict[str, Any]:
    """Says whether `config` may start or continue this run; writes nothing.

    Args:
      config: validated.
      data: digest of each source's token store, by name.
      tokenizer: its digest.
      labels: names of the task's classes or tags, in their order.
      allow: groups of keys that may differ from the run's: model, objective, optim, tokenizer, data, seed, batch_size.
    Returns:
      The keys that differ: (value now, value before).
    Raises:
      JaxlmError: the directory holds a run that differs in something that is not allowed, or there is no such group.
    """
    for name in allow:
      if name not in GROUPS:
        raise JaxlmError(f'--allow_change: unknown {name!r}. Known: {", ".join(GROUPS)}.{nearest(name, GROUPS)}')
    changes = {}
    if self.config is not None and not self.record and not {'data', 'tokenizer'} <= set(allow):
      raise JaxlmError(f'{self.path} has no run.json, which tells its data and tokenizer; put it back, or go on with '
                       '--allow_change=data,tokenizer.')
    if self.config is not None:
      changes = config_module.differences(config, self.config)
      same_tokenizer = self.record.get('tokenizer_digest') == tokenizer
      may = lambda key: (group(key) in allow or any(re.fullmatch(pattern, key) for pattern in FREE)
                         or (key == 'data.tokenizer' and same_tokenizer))
      lines = [f'{self.path} holds a run with config.{key}={before!r}, now {after!r}; go on with '
               f'--allow_change={group(key)}, set it back, or use another --workdir.'
               for key, (after, before) in changes.items() if not may(key)]
      # Another tokenizer makes other token stores of the same text, so their digests say nothing then.
      name, before, now = (('data', self.record.get('data_digest'), data) if same_tokenizer else
                           ('tokenizer', self.record.get('tokenizer_digest'), tokenizer))
      if before != now and name not in allow and not lines:
        lines = [f'{self.path} was trained with other {name} (digest {_short(before)}, now {_short(now)}); put the old '
                 f'back, go on with --allow_change={name}, or use another --workdir.']
      if not lines and self.labels not in ((), tuple(labels)) and 'data' not in allow:
        lines = [f'{self.path} learned the labels {", ".join(self.labels)}, and the task now has {", ".join(labels) or "none"}; '
                 'put the old names back, in their order, go on with --allow_change=data, or use another --workdir.']
      if lines:
        raise JaxlmError('\n'.join(lines))
    return changes

  @property
  def labels(self) -> tuple[str, ...]:
    """Names of what the label head tells apart, as they were when the run began; (): it has none."""
    return tuple(self.record.get('labels', ()))

  def accept(self, config: ConfigDict, data: dict[str, str], tokenizer: str, labels: Sequence[str],
             allow: Sequence[str]) -> None:
    """Records that `config` starts or continues this run, if `check` lets it; then it is the run's config.

    To be called when the state is there: a checkpoint that does not fit must leave the old config in its place.
    """
    changes = self.check(config, data, tokenizer, labels, allow)
    if jax.process_index():
      return
    start = {'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'argv': sys.argv, 'devices': [str(d) for d in jax.devices()],
             'processes': jax.process_count(), 'xla_flags': os.environ.get('XLA_FLAGS', ''),
             'compiler_options': sharding.compiler_options(jax.devices()[0].platform, config.compiler_options),
             'versions': versions(), 'git_commit': git_commit(),
             'changes': {key: {'from': before, 'to': after} for key, (after, before) in changes.items()}}
    self.record = {'format': FORMAT, 'data_digest': data, 'tokenizer_digest': tokenizer, 'labels': list(labels),
                   **{k: start[k] for k in ('versions', 'git_commit', 'argv', 'devices', 'xla_flags')},
                   'starts': self.record.get('starts', []) + [start]}
    self.config = config
    self._write('run.json', json.dumps(self.record, indent=2))
    self._write('config.json', config_module.dumps(config))

  def _write(self, name: str, text: str) -> None:
    """Replaces a file at once: a killed process leaves the old one or the new one."""
    temporary = self._file(f'.{name}.tmp')
    with open(temporary, 'w', encoding='utf-8') as f:
      f.write(text + '\n')
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, self._file(name))


def _short(digest: Any) -> str:
  if isinstance(digest, dict):
    return ', '.join(f'{name} {_short(value)}' for name, value in digest.items())
  return str(digest)[:12] if digest else 'unknown'


def versions() -> dict[str, str]:
  """Of Python and the packages that decide what a run computes."""
  found = {'python': platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return found


def git_commit() -> str:
  """The commit of the code that runs, '+' if it has been changed since; '' outside a repository."""
  here = os.path.dirname(os.path.abspath(__file__))
  git = lambda *args: subprocess.run(['git', '-C', here, *args], capture_output=True, text=True, timeout=10, check=True)
  try:
    changed = git('status', '--porcelain', '--untracked-files=no').stdout.strip()
    return git('rev-parse', 'HEAD').stdout.strip() + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return ''
