"""Mixtral 8×7B: its published shape on a mesh that splits experts.

  python -m jaxlm.plan --config=experiments/published/mixtral_8x7b.py --hardware=h100
  python -m jaxlm.plan --config=experiments/published/mixtral_8x7b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/mixtral_8x7b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2401.04088): the model alone. Chosen: everything about its training; rows are shorter than the 32,768
tokens of its context.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(expert=8, fsdp=16, tensor=4),
    '1024': dict(expert=8, fsdp=32, tensor=4),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'mixtral.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=8x7b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  config.update(seq_len=4096, batch_size=1024)
  config.model.attention.kernel = 'blockwise'
  return config
