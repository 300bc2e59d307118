"""Jurassic-1 Jumbo 178B as published: 300 billion tokens in batches of 3.2 million, on 800 GPUs.

  python -m jaxlm.plan --config=experiments/published/jurassic1_178b.py --hardware=a100
  python -m jaxlm.plan --config=experiments/published/jurassic1_178b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/jurassic1_178b.py --config.data.paths=corpus/*.jsonl.zst

Published (white paper, 2021): the model, the batch, the tokens, how many GPUs; not the mesh, which is chosen here, with
1,600 rows. 76 layers lie on 10 stages with 4 identities among them.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=8, pipe=10, data=10),
    '1024': dict(tensor=8, pipe=16, data=8),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'jurassic1.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=jumbo-178b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  base.lay(config, act_stream=('seq', 'tensor'))
  config.pipeline.remat = 'stage'
  config.loss.chunk = 32
  config.model.vocab_pad_to = 8 * config.mesh.tensor * config.mesh.pipe
  config.batch_size = 1600
  config.pipeline.microbatches = config.batch_size // config.mesh.data  # of one row
  return config
