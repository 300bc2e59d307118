"""Llama 3 8B on rows of 131,072 tokens: each row over 16 devices, keys go round a ring of them.

  python -m jaxlm.plan --config=experiments/published/llama3_8b_131k.py --hardware=h100  # 17.1 GB a device
  python -m jaxlm.plan --config=experiments/published/llama3_8b_131k.py:devices=1024 --hardware=h100

Published (arXiv:2407.21783, section 3.3): the model, 131,072 tokens, 16 devices a row. Chosen: everything else. Weights
are split over the devices of a row, too.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(seq=16),
    '1024': dict(seq=16, data=64),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'llama.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=3-8b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  config.update(seq_len=131_072, batch_size=16 * config.mesh.data, accumulation=16)
  config.model.attention.update(kernel='ring', block=1024)
  config.loss.chunk = 8192
  return base.lay(config, embed=('fsdp', 'seq'))
