"""Imports point one way, and importing never pulls in another framework."""
import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A module imports only what stands above it. Families stand among themselves as their imports ask, in no circle.
ORDER = """
errors types lastwords folders cluster lookup hardware hlo liveness ranges schema settings config trees sums sharding
rows answers masking spans orders middles pairs prompts fits objectives
data.words data.pieces data.tokenizers data.templates data.chat data.files data.tables data.tokenfiles data.lisp data.wordkinds
data.sources data.library data.stdlib_tasks
data.shards data.mixtures data.records data.expressions data.tasks data.store data.suffixes data.exports data.plans
data.encoders data.examples data.pipeline
measure.metric measure.labels measure.numbers measure.texts measure.candidates measure.scores measure.intervals
measure.cell measure.sandbox measure.origins measure.verdicts measure.baselines
models.config models.float8 models.quantised models.products models.peft models.layers models.virtual models.positions
models.kernels models.blocks models.cudnn models.ring models.attention models.stages models.recurrent models.moe
models.stack models.tower models.transformer models.cost
families.keys families.bijections families.* families.table
losses preferences policies task_losses optim metrics seal checkpoint rundir sampling weights gguf transfer targets
adapters hf reading beams speculation decode passes wording lm adopt loading harness heads nearness evaluators journal
exam inquiries stereotypes recall audits state distil rollouts check train lint bill search pictures forms deltas
programs
speed.shapes speed.ours speed.peers speed.worker speed.machine speed.duel speed.alone
plan generate evaluate main prepare bench convert
""".split()
BLIND = {'objectives', 'data', 'models'}  # do not see each other
PARTS = {'rows', 'answers', 'masking', 'spans', 'orders', 'middles', 'pairs', 'prompts'}  # of objectives
FORBIDDEN = ('torch', 'transformers', 'tensorflow')


def modules() -> dict[str, pathlib.Path]:
  paths = (p for p in (ROOT / 'jaxlm').rglob('*.py') if p.name != '__init__.py')
  return {'.'.join(p.relative_to(ROOT / 'jaxlm').with_suffix('').parts): p for p in paths}


def imported(path: pathlib.Path) -> set[str]:
  """Every module that a file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def seen(path: pathlib.Path) -> set[str]:
  """The modules of jaxlm among them: of 'jaxlm.data.store.Store' the longest part that is one."""
  names = {name.removeprefix('jaxlm.') for name in imported(path) if name.partition('.')[0] == 'jaxlm'}
  known = modules()
  return {name if name in known else name.rpartition('.')[0] or name for name in names}


def _families() -> list[str]:
  """Modules of families, each below what it imports of the others; a circle among them raises."""
  names = {name for name in modules() if name.startswith('families.')} - set(ORDER)
  return [*graphlib.TopologicalSorter({name: seen(modules()[name]) & names for name in sorted(names)}).static_order()]


ORDER[ORDER.index('families.*'):ORDER.index('families.*') + 1] = _families()
PROGRAMS = ORDER[ORDER.index('plan'):]


def package_of(module: str) -> str:
  return 'objectives' if module in PARTS else module.partition('.')[0]


def test_every_module_has_a_place_in_the_order():
  assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize('module', ORDER)
def test_a_module_imports_only_what_stands_above_it(module):
  assert seen(modules()[module]) <= set(ORDER[:ORDER.index(module)])


@pytest.mark.parametrize('module', ORDER)
def test_objectives_data_and_models_do_not_see_each_other(module):
  package = package_of(module)
  if package in BLIND:
    assert not {package_of(name) for name in seen(modules()[module])} & (BLIND - {package})


def test_programs_do_not_see_each_other_and_nothing_sees_them():
  for module, path in modules().items():
    assert not seen(path) & (set(PROGRAMS) - {module}), module


def test_data_and_objectives_do_not_import_jax():
  for module, path in modules().items():
    if package_of(module) in ('data', 'objectives'):
      assert not {name.partition('.')[0] for name in imported(path)} & {'jax', 'flax', 'optax'}, module


def test_experiments_see_config_and_families_alone():
  for path in (ROOT / 'experiments').glob('*.py'):
    assert all(name == 'config' or name.startswith('families') for name in seen(path)), path


def test_packages_have_empty_inits():
  inits = [p for p in (ROOT / 'jaxlm').rglob('__init__.py') if p.parent != ROOT / 'jaxlm']
  assert inits and not any(p.read_text() for p in inits)


IMPORT_ALL = """
import sys
import jaxlm
assert not set(sys.modules) & {{'jax', 'numpy'}}, 'import jaxlm is instant'
for module in {modules}:
  __import__('jaxlm.' + module)
  assert not set(sys.modules) & {forbidden}, module
"""


def test_importing_never_imports_torch_transformers_or_tensorflow():
  code = IMPORT_ALL.format(modules=ORDER, forbidden=set(FORBIDDEN))
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
