"""Llama 2 70B as published: 2 trillion tokens in batches of 4 million.

  python -m jaxlm.plan --config=experiments/published/llama2_70b.py --hardware=a100 --price_per_hour=1.5
  python -m jaxlm.plan --config=experiments/published/llama2_70b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/llama2_70b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2307.09288, section 2): the model, the batch, the tokens, 1,720,320 hours of A100s with 80 GB, up to
2,000 of them; not the mesh, which is chosen here, of 2,048.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=8, fsdp=256),
    '1024': dict(tensor=8, fsdp=128),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'llama.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=2-70b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  base.lay(config, act_stream=('seq', 'tensor'))
  config.model.attention.kernel = 'blockwise'
  return config
