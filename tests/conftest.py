"""Eight CPU devices, programs compiled fast rather than well, and nothing of the user's touched."""
import importlib.metadata
import os

FLAGS = ['--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0']
if importlib.metadata.version('jax').startswith('0.10.'):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')  # later ones have no other way, and no such flag

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join([*FLAGS, os.environ.get('XLA_FLAGS', '')])
os.environ['HF_HUB_OFFLINE'] = '1'
# Many tests compile the same tiny programs.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import pytest


def pytest_collection_modifyitems(items):
  """The files that take longest come first, so that no worker is left with one of them at the end."""
  items.sort(key=lambda item: item.path.name not in ('notebooks_test.py', 'tune_test.py'))


@pytest.fixture(autouse=True, scope='session')
def _caches_of_its_own(tmp_path_factory):
  """Token stores and compiled programs go to a folder of this session's, shared by its tests and what they start."""
  import jax
  cache = tmp_path_factory.getbasetemp().parent / 'cache'
  os.environ['XDG_CACHE_HOME'] = str(cache)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(cache / 'programs')
  jax.config.update('jax_compilation_cache_dir', str(cache / 'programs'))


@pytest.fixture(autouse=True, scope='module')
def _programs_of_a_module_go_with_it():
  """Thousands of compiled programs in one process exhaust its memory mappings, and XLA aborts."""
  yield
  import jax
  jax.clear_caches()


@pytest.fixture(scope='module')
def few_devices():
  """A mesh takes the first so many of the eight devices, so that one test run holds one device and eight."""
  import jax
  import numpy as np
  from jaxlm import sharding
  make = sharding.make_mesh
  take = lambda sizes: jax.devices()[:max(1, int(np.prod([n for n in dict(sizes).values() if n > 0])))]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda sizes, devices=None: make(sizes, devices or take(sizes)))
    yield


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """A glob of a small corpus: forty text files."""
  import random
  folder, rng = tmp_path_factory.mktemp('corpus'), random.Random(0)
  words = 'the model reads a token and predicts what follows it in every document of this small corpus'.split()
  for i in range(40):
    lines = (' '.join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(rng.randint(2, 12)))
    (folder / f'{i:02d}.txt').write_text('\n'.join(lines) + '\n')
  return f'{folder}/*.txt'


@pytest.fixture
def tiny(corpus):
  """A config that trains in seconds: two layers of width 32 on the corpus as bytes."""
  from jaxlm import config as base
  config = base.smoke(base.default())
  config.update(steps=4, batch_size=8, seq_len=32, tensorboard=False)
  config.model.update(num_layers=2, width=32, vocab_pad_to=64)
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=8)
  config.data.update(source='text', paths=corpus, holdout=0.1)
  config.eval.update(batch_size=8, max_tokens=2048, prompts=())
  return config
