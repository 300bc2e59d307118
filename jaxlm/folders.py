"""Folders outside a run's."""
import os
from pathlib import Path


def cache(name: str) -> Path:
  """A folder for what can be made again, in the user's cache folder."""
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxlm' / name
