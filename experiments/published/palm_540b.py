"""PaLM 540B as published: 12 ways within a layer and 256 of rows on each of two TPU v4 pods.

  python -m jaxlm.plan --config=experiments/published/palm_540b.py --hardware=tpu_v4
  python -m jaxlm.plan --config=experiments/published/palm_540b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/palm_540b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2204.02311, sections 4 and 5): the model, 2,048 rows of 2,048 tokens at the end, 780 billion tokens,
6,144 chips, 46.2% of the peak. Chosen: of the 256 ways, weights are split over 128; more than 2,048 devices are
compiled by leaving out data and replica alone. The last batch from the beginning.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=12, fsdp=128, data=2, replica=2),
    '1024': dict(tensor=8, fsdp=128),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'palm.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=540b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  config.update(batch_ramp=(), accumulation=4)
  config.model.vocab_pad_to = 128 * config.mesh.tensor
  base.lay(config, kv_heads=None)  # one for all query heads
  return config
