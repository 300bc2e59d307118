"""T5 11B as published: a million steps of 2,048 rows of 512 tokens, on 1,024 TPU chips.

  python -m jaxlm.plan --config=experiments/published/t5_11b.py --hardware=tpu_v4
  python -m jaxlm.plan --config=experiments/published/t5_11b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/t5_11b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:1910.10683, sections 2.1 and 3.7): the model, the batch, the steps, slices of TPU pods with 1,024 chips
(v3; planned here for later ones); not the mesh, which is chosen here.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=8, fsdp=128),
    '1024': dict(tensor=8, fsdp=128),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 't5.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=t5-11b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  return config
