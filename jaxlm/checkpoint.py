"""Sealed checkpoints: what is restored is bit for bit what was saved, or it is not restored.

A step is an Orbax folder of items (`params`, `ema`, `rest`, `data`) and a manifest, the sha256 of every file, which is
on the disk before the folder gets its number: no manifest, no checkpoint. A step whose files are not what its manifest
says is named and moved to bad/. Only the preservation policy deletes.
"""
import contextlib
import dataclasses
import errno
import logging
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
from typing import Any, Iterator, Sequence

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import seal, trees
from jaxlm.errors import JaxlmError, RunFailed
from jaxlm.types import Tree

_ALONE = ('params', 'ema')  # fields of the state that are items of their own, to be read alone; the others are `rest`
_UNSEALED = ('_CHECKPOINT_METADATA', 'commit_success.txt')  # Orbax writes them when it commits; restoring needs neither

CHUNK = 1 << 25  # bytes of an array that are read by themselves, so that all cores have some: 0.7 s a GB, not 1.5
SLICE = 1 << 22  # bytes of a replicated array that are worth a program of each replica's own, that slices it
GROUP = 1 << 29  # bytes that are read at once, or one leaf: Orbax holds all of them twice on the host

_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)))

log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run. In a run of several processes all of them make every call.

  Args:
    folder: <workdir>/checkpoints; made unless read_only.
    keep_latest: newest steps kept; at least 2, for one may prove damaged.
    keep_every: steps that are multiples of this are kept for good; 0: none.
    keep_best: also so many steps with the lowest best_metric, or the highest; 0: none.
    best_metric: key of the `metrics` given to `save`; steps without a finite one are not among the best.
    read_only: to read another run, live ones too: nothing is written, moved or deleted.
  Raises:
    JaxlmError: the folder cannot be made or written.
  """

  def __init__(self, folder: str | os.PathLike, *, keep_latest: int = 2, keep_every: int = 0, keep_best: int = 0,
               best_metric: str = '', best_is_highest: bool = False, read_only: bool = False):
    if keep_latest < 2:
      raise JaxlmError(f'keep_latest={keep_latest}: one checkpoint may prove damaged; keep at least 2.')
    self.folder = pathlib.Path(folder).absolute()
    self._read_only = read_only
    self._best_metric = best_metric
    self._best = _Best(keep_best, -1 if best_is_highest else 1)
    self._policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep_latest), self._best]
    if keep_every:
      self._policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    self._contents: dict[str, Any] = {}  # of the save in flight: what its manifest says besides the files
    logging.getLogger('absl').addFilter(_not_orbax)
    if not read_only:
      self._prepare()
    for step in self.steps() if keep_best else ():
      with contextlib.suppress(seal.Damaged, OSError):
        self._best.note(step, seal.read(self.folder / str(step)).get('metrics', {}).get(best_metric))
    self._manager = self._open()

  def steps(self) -> list[int]:
    """Steps that were committed, oldest first; a save still being written is not among them."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      return sorted(int(p.name) for p in self.folder.iterdir() if re.fullmatch('0|[1-9][0-9]*', p.name) and p.is_dir())
    return []

  def latest_valid(self) -> int | None:
    """The newest step whose digests agree, or None; sets nothing aside."""
    self.wait()
    return next((step for step in reversed(self.steps()) if not self._fault(step)), None)

  def save(self, step: int, state: Tree, data: dict, metrics: dict | None = None) -> bool:
    """Starts saving; returns once the arrays are copied, so that `state` may be donated.

    Args:
      step: updates done.
      state: any pytree of jax arrays; its fields `params` and `ema` can later be read alone, None is left out.
      data: small JSON, given back by `restore`.
      metrics: {name: float}, of which best_metric ranks this step.
    Returns:
      Whether a save was started: False where this step is already there.
    Raises:
      JaxlmError: a newer step is there, which resuming would choose; `set_aside` it first.
      RunFailed: the save before this one failed.
    """
    if self._read_only:
      raise ValueError('These checkpoints were opened read_only.')
    self.wait()
    there = self._manager.all_steps()  # not steps(): processes may see a network folder change at different times
    if step in there:
      fault = self._fault(step, digests=False)
      if not fault:
        return False
      self.set_aside(step, fault)
    elif there and step < max(there):
      raise JaxlmError(f'Cannot save step {step} in {self.folder}: step {max(there)} is there, which resuming would '
                       'choose. Move the newer steps away, or use another workdir.')
    leaves = {path: _raw(x) for path, x in trees.flatten(state).items()}
    metrics = {name: float(x) for name, x in (metrics or {}).items() if math.isfinite(x)}
    self._contents = {'step': step, 'metrics': metrics,
                      'arrays': {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()}}
    self._best.note(step, metrics.get(self._best_metric))
    with self._failing(step):
      self._manager.save(step, force=True, args=ocp.args.Composite(
          data=ocp.args.JsonSave(data),
          **{item: _saving(tree) for item, tree in _by_item(leaves).items()}))
    return True

  def wait(self) -> None:
    """Blocks until the save in flight is committed.

    Raises:
      RunFailed: it was not (the disk is full, say). The steps before it stand, and it may be saved again.
    """
    with self._failing(self._contents.get('step')):
      self._manager.wait_until_finished()

  def restore(self, target: Tree, step: int | None = None) -> tuple[int, Tree, dict] | None:
    """The newest step whose digests agree; those that do not are named and set aside on the way.

    Args:
      target: the state as ShapeDtypeStructs with shardings (or as arrays); any mesh reads any checkpoint.
      step: this one and no other.
    Returns:
      (step, state, data), or None where there is nothing to go on from.
    Raises:
      JaxlmError: the state saved is another (what differs is listed; it stays where it is), or `step` is not there.
    """
    want = {path: _abstract(x) for path, x in trees.flatten(target).items()}
    for step in self._candidates(step):
      saved = self.shapes(step)
      dtypes = [f'{path}: dtype {saved[path].dtype}; wanted {x.dtype}.' for path, x in want.items()
                if path in saved and saved[path].dtype != x.dtype]
      self._refuse(step, trees.diff(want, saved) + dtypes)
      arrays, read = self._read(step, want, data=ocp.args.JsonRestore())
      return step, _like(target, arrays), read.data
    return None

  def restore_params(self, target: Tree, step: int | None = None, item: str = 'params') -> tuple[int, Tree] | None:
    """The parameters alone, or a part of them, of the newest step whose digests agree.

    Args:
      target: as in `restore`, but of the parameters; what it does not name is not read. Its dtypes are given, by
        rounding where need be: float32 parameters can be read as bfloat16.
      step: this one and no other.
      item: 'params', or 'ema' for their moving average.
    Returns:
      (step, params), or None where there is no checkpoint.
    Raises:
      JaxlmError: parameters are missing or of another shape (listed), or `step` is not there.
    """
    want = {path: _abstract(x) for path, x in trees.flatten({item: target}).items()}
    for step in self._candidates(step, (item,)):
      saved = self.shapes(step)
      self._refuse(step, trees.diff(want, {path: x for path, x in saved.items() if path in want}))
      arrays, _ = self._read(step, want)
      return step, _like({item: target}, arrays)[item]
    return None

  def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the state saved at `step`; 'params/…' are the parameters."""
    try:
      arrays = seal.read(self.folder / str(step))['arrays']
    except seal.Damaged as e:
      raise JaxlmError(f'Checkpoint {step} in {self.folder} is damaged: {e}. Use another step.') from e
    return {path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for path, (shape, dtype) in arrays.items()}

  def set_aside(self, step: int, why: str) -> None:
    """Moves a step to bad/<step>-<time> and says so; that step can then be saved again."""
    if self._read_only:
      log.warning('Checkpoint %s of %s is passed over: %s.', step, self.folder, why)
      return
    self.close()
    bad = self.folder / 'bad' / f'{step}-{time.time_ns()}'
    failure = ''
    if jax.process_index() == 0:
      try:
        bad.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(bad)
        log.warning('Checkpoint %s of %s is set aside as %s: %s.', step, self.folder, bad.relative_to(self.folder), why)
      except OSError as e:
        failure = reason(e)
    if failure := first_told(failure):  # the others wait here until the folder is moved
      raise JaxlmError(f'Cannot move checkpoint {step} ({why}) to {bad}: {failure}. Move it away by hand.')
    self._best.values.pop(step, None)
    self._manager = self._open()  # the old one's list of steps still has this one, and it would not save it again

  def close(self) -> None:
    """Waits for the save in flight, then lets go of threads."""
    self.wait()
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _prepare(self) -> None:
    """Makes the folder, and clears it of what a killed save left (Orbax would, but beside whatever comes next)."""
    failure = ''
    if jax.process_index() == 0:
      try:
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob('[0-9]*.orbax-checkpoint-tmp*'):
          _remove(unfinished)
        with tempfile.TemporaryFile(dir=self.folder):
          pass
      except OSError as e:
        failure = reason(e)
    if failure := first_told(failure):
      raise JaxlmError(f'Cannot write checkpoints to {self.folder}: {failure}. Give a workdir that can be written.')

  def _open(self) -> ocp.CheckpointManager:
    # No compression: zstd makes float32 weights 8% smaller, saving 2.2 times and restoring 3 times as long (205 MB).
    arrays = {item: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=_HANDLERS)
              for item in (*_ALONE, 'rest')}
    return ocp.CheckpointManager(
        self.folder, item_names=(*arrays, 'data'), item_handlers={**arrays, 'data': ocp.JsonCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=0 if self._read_only else 1, create=False, read_only=self._read_only,
            lightweight_initialize=True,  # else it reads every step's own metadata, and a damaged one stops it
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(self._policies),
            # Called by process 0, when all files of all processes are there and before the folder gets its number.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal)))

  def _seal(self) -> None:
    folder, = self.folder.glob(f'{self._contents["step"]}.orbax-checkpoint-tmp*')
    seal.write(folder, self._contents, leave_out=_UNSEALED)

  def _candidates(self, step: int | None, items: Sequence[str] = ()) -> Iterator[int]:
    """Steps whose files agree (those of `items`; none: all), newest first; others are set aside in passing."""
    self.wait()
    steps = self.steps()
    if step is not None and step not in steps:
      raise JaxlmError(f'There is no checkpoint {step} in {self.folder}. Steps: {_listed(steps)}.')
    for candidate in reversed(steps) if step is None else [step]:
      fault = self._fault(candidate, items)
      if not fault:
        yield candidate
        continue
      self.set_aside(candidate, fault)
      if step is not None:
        raise JaxlmError(f'Checkpoint {step} in {self.folder} is damaged: {fault}. Leave the step out, for the newest '
                         'that is not.')

  def _fault(self, step: int, items: Sequence[str] = (), digests: bool = True) -> str:
    """What is wrong with a step, or ''; each process reads its share of the files and all hear what any found."""
    fault = unreadable = ''
    try:
      seal.verify(self.folder / str(step), items, digests, jax.process_index(), jax.process_count())
    except seal.Damaged as e:
      fault = str(e)
    except OSError as e:
      unreadable = reason(e)
    if unreadable := first_told(unreadable):
      raise JaxlmError(f'Cannot read checkpoint {step} in {self.folder}: {unreadable}. Make it readable; it stays.')
    return first_told(fault)

  def _read(self, step: int, want: dict[str, jax.ShapeDtypeStruct], **others: Any) -> tuple[dict, ocp.args.Composite]:
    """({path: array} of what is wanted, all that was read); others: arguments of further items."""
    arrays, read = {}, None
    for group in _groups(want):
      parts = {item: trees.unflatten(leaves) for item, leaves in _by_item(group).items()}
      found = self._manager.restore(step, args=ocp.args.Composite(**(others if read is None else {}), **{
          item: ocp.args.PyTreeRestore(part, ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True)
          for item, part in parts.items()}))
      read = read or found
      arrays |= {path: x for item in parts for path, x in trees.flatten(found[item]).items()}
    return {path: arrays[path] if path in arrays else jnp.zeros(x.shape, x.dtype, device=x.sharding)
            for path, x in want.items()}, read

  def _refuse(self, step: int, differences: list[str]) -> None:
    if differences:
      more = f' … and {len(differences) - 8} more.' if len(differences) > 8 else ''
      raise JaxlmError(f'Checkpoint {step} in {self.folder} does not fit: {" ".join(differences[:8])}{more} '
                       'Use the config it was saved with, or a new workdir, where config.checkpoint.init_from takes '
                       'weights of the same shapes alone.')

  @contextlib.contextmanager
  def _failing(self, step: int | None) -> Iterator[None]:
    try:
      yield
    except Exception as e:  # whatever Orbax, TensorStore or the file system raise
      self._best.values.pop(step, None)
      raise RunFailed(f'Checkpoint {step} was not saved in {self.folder}: {reason(e)}. Steps that stand: '
                      f'{_listed(self.steps())}. Mend this and start the run again.') from e


def _remove(folder: pathlib.Path) -> None:
  """Deletes a folder in which writers of a save that failed in this very process may still be at work."""
  for wait_s in (0.1, 0.2, 0.4, 0.8, 1.6):
    try:
      return shutil.rmtree(folder)
    except OSError as e:
      if e.errno not in (errno.ENOTEMPTY, errno.ENOENT):
        raise
      time.sleep(wait_s)
  shutil.rmtree(folder, ignore_errors=not folder.exists())


@dataclasses.dataclass
class _Best:
  """Orbax preservation policy: the n steps whose value times `sign` is lowest.

  Its own BestN wants the metrics in a file of each step, unsealed, and one that does not parse stops it from opening.
  """
  n: int
  sign: int = 1
  values: dict[int, float] = dataclasses.field(default_factory=dict)

  def note(self, step: int, value: float | None) -> None:
    if value is not None:
      self.values[step] = value

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    known = [c.step for c in checkpoints if c.step in self.values]
    best = sorted(known, key=lambda step: (self.sign * self.values[step], step))[:self.n]
    return [c.step in best for c in checkpoints]


def _by_item(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """{item: {path: leaf}}, without the arrays that hold nothing, which Orbax refuses."""
  items: dict[str, dict[str, Any]] = {}
  for path, x in leaves.items():
    field = path.split('/')[0]
    if 0 not in x.shape:
      items.setdefault(field if field in _ALONE else 'rest', {})[path] = x
  return items


def _saving(leaves: dict[str, Any]) -> ocp.args.PyTreeSave:
  tree = trees.unflatten(leaves)
  return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree))


def _is_key(x: Any) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: jax.Array) -> jax.Array:
  """A typed PRNG key's integers; other arrays as they are."""
  return jax.random.key_data(x) if _is_key(x) else x


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  """What to read for a leaf of a target."""
  raw = jax.eval_shape(_raw, x)
  sharding = getattr(x, 'sharding', None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _like(target: Tree, arrays: dict[str, jax.Array]) -> Tree:
  """Arrays by path as a tree of the target's kind, keys typed again."""
  def typed(path: str, x: Any) -> jax.Array:
    if not _is_key(x):
      return arrays[path]
    impl: list[Any] = []  # a ShapeDtypeStruct does not tell its implementation; a tracer of it does
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), x)
    return jax.random.wrap_key_data(arrays[path], impl=impl[0])
  return trees.map_paths(typed, target)


def first_told(text: str) -> str:
  """The first text that is not empty of all processes; '' where all are. A barrier too."""
  if jax.process_count() == 1:
    return text
  letters = np.zeros(512, np.uint8)
  mine = text.encode()[:512]
  letters[:len(mine)] = np.frombuffer(mine, np.uint8)
  told = (bytes(row).rstrip(b'\0').decode(errors='ignore') for row in multihost_utils.process_allgather(letters))
  return next(filter(None, told), '')


def _listed(steps: Sequence[int]) -> str:
  return ', '.join(map(str, steps)) or 'none'


def _groups(want: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
  """Yields leaves to be read at once."""
  group, size = {}, 0
  for path, x in want.items():
    if group and size + x.size * x.dtype.itemsize > GROUP:
      yield group
      group, size = {}, 0
    group[path] = x
    size += x.size * x.dtype.itemsize
  yield group


def reason(e: BaseException) -> str:
  """One line of an exception; of TensorStore's several hundred letters, what the system said."""
  if code := getattr(e, 'errno', None) or re.search(r"os_error_code='(\d+)'", str(e)):
    return os.strerror(code if isinstance(code, int) else int(code[1]))
  lines = str(e).strip().splitlines()
  return (lines[0][:300] if lines else type(e).__name__).rstrip('.')


def _not_orbax(record: logging.LogRecord) -> bool:
  """A log filter: what Orbax fails at is raised and told in one line, not also as a traceback of a thread."""
  return f'{os.sep}orbax{os.sep}' not in record.pathname
