"""BLOOM 176B as published: tensor 4 × pipeline 12 × data 8, on 384 A100s.

  python -m jaxlm.plan --config=experiments/published/bloom_176b.py --hardware=a100
  python -m jaxlm.plan --config=experiments/published/bloom_176b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/bloom_176b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2211.05100, section 3): the model, 2,048 rows of 2,048 tokens, 366 billion tokens, ZeRO-1, 156 TFLOP/s
a device. Its 70 layers lie on 12 stages with two identities in the place of layers.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=4, pipe=12, data=8),
    '1024': dict(tensor=8, pipe=8, data=16),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'bloom.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=176b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  base.lay(config, act_stream=('seq', 'tensor'))
  config.pipeline.remat = 'stage'
  config.loss.chunk = 32
  config.model.vocab_pad_to = 8 * config.mesh.tensor * config.mesh.pipe
  base.lay(config, optimizer=(('embed', 'data'),))  # ZeRO-1
  config.pipeline.microbatches = config.batch_size // config.mesh.data  # of one row
  return config
