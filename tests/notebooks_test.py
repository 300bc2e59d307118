"""Every notebook runs from top to bottom."""
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('steps', [30, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, steps, tmp_path, monkeypatch):
  nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
  pytest.importorskip('matplotlib')
  notebook, resources = nbformat.read(path, 4), {'metadata': {'path': tmp_path}}
  for package in notebook.metadata.get('jaxlm', {}).get('requires', ()):
    pytest.importorskip(package)
  assert not any(cell.get('outputs') for cell in notebook.cells), 'commit notebooks without outputs'
  if not steps:  # they train: programs shall be fast
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  else:
    for cell in notebook.cells:
      cell.source = re.sub(r'\b(steps ?= ?)(\d+)', lambda m: f'{m[1]}{min(int(m[2]), steps)}', cell.source, flags=re.I)
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources=resources).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  assert sum('image/png' in output.get('data', {}) for output in outputs) >= 2
