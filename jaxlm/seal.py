"""Sealed folders: a manifest of sha256 digests, written last, tells whether a folder is still what was written.

Folders are on a file system (local, NFS, Lustre), whose fsync does what it says.
"""
import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any, Sequence

from jaxlm.errors import JaxlmError

MANIFEST = 'manifest.json'
FORMAT = 1
_THREADS = 8  # that hash: hashlib lets go of the interpreter, 1.5 GB/s a core


class Damaged(Exception):
  """A folder that is not what its manifest says, or has none."""


def write(folder: pathlib.Path, contents: dict[str, Any], leave_out: Sequence[str] = ()) -> None:
  """Seals a folder: syncs every file to the disk, then writes size and sha256 of each beside `contents`.

  Args:
    folder: complete but for the manifest.
    contents: JSON; whatever else the manifest should say.
    leave_out: names of files that may still change.
  """
  files = {name: path for name, path in _files(folder).items() if name not in leave_out}
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = list(pool.map(_sync_and_digest, files.values()))
  body = {**contents, 'format': FORMAT,
          'files': {name: [path.stat().st_size, digest] for (name, path), digest in zip(files.items(), digests)}}
  with open(folder / MANIFEST, 'w', encoding='utf-8') as f:
    json.dump({**body, 'seal': _seal(body)}, f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  for parent in {path.parent for path in files.values()} | {folder}:
    _sync_folder(parent)


def read(folder: pathlib.Path) -> dict[str, Any]:
  """What a folder's manifest says: the contents given to `write`, and `files`, {name: [size, sha256]}.

  Raises:
    Damaged: there is none, or it is not what was written.
    JaxlmError: another version wrote it.
  """
  try:
    body = json.loads((folder / MANIFEST).read_bytes())
    seal = body.pop('seal')
  except FileNotFoundError:
    raise Damaged(f'{MANIFEST} is missing' if _files(folder) else 'the folder is empty') from None
  except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or no object with a seal
    raise Damaged(f'{MANIFEST} is not what was written: it cannot be read') from None
  if seal != _seal(body):
    raise Damaged(f'{MANIFEST} is not what was written: its own sha256 differs')
  if body['format'] != FORMAT:
    raise JaxlmError(f'{folder} has format {body["format"]}; this jaxlm reads {FORMAT}. Use the version that wrote it.')
  return body


def verify(folder: pathlib.Path, parts: Sequence[str] = (), digests: bool = True, share: int = 0,
           shares: int = 1) -> None:
  """Compares a folder with its manifest; files that the manifest does not name are nobody's concern.

  Args:
    folder: what `write` sealed.
    parts: top-level names to look at; none: all.
    digests: also read the files; without, sizes alone are compared.
    share: which of the files to read, where `shares` processes divide the work.
    shares: how many they are.
  Raises:
    Damaged: what was found first.
    OSError: a file cannot be read, which says nothing about what is in it.
  """
  files = {name: entry for name, entry in read(folder)['files'].items() if not parts or name.split('/')[0] in parts}
  there = _files(folder)  # the manifest's names are looked up here, never opened
  try:
    for name, (size, _) in files.items():
      if name not in there:
        raise Damaged(f'{name} is missing')
      if (found := there[name].stat().st_size) != size:
        raise Damaged(f'{name} has {found:,} bytes; {size:,} were written')
    mine = sorted(files, key=lambda name: (files[name][0], name))[share::shares] if digests else []
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      for name, digest in zip(mine, pool.map(lambda name: _digest(there[name]), mine)):
        if digest != files[name][1]:
          raise Damaged(f'{name} is not what was written: its sha256 differs')
  except FileNotFoundError as e:
    raise Damaged(f'{e.filename} vanished') from None


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{name: path} of all files under a folder but the manifest, in a fixed order."""
  paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}
  return {name: path for name, path in paths.items() if name != MANIFEST}


def _digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _sync_and_digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    os.fsync(f.fileno())
  return _digest(path)


def _sync_folder(folder: pathlib.Path) -> None:
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _seal(body: dict[str, Any]) -> str:
  """The manifest's digest of itself: a digit that flipped in a shape would else look like another model."""
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
