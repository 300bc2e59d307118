"""Eight CPU devices, and nothing of the user's touched."""
import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['HF_HUB_OFFLINE'] = '1'

import pytest


@pytest.fixture(autouse=True, scope='session')
def _caches_of_its_own(tmp_path_factory):
  """Token stores go to a folder of this session's, shared by its tests."""
  os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.getbasetemp().parent / 'cache')
