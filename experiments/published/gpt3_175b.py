"""GPT-3 175B as published: 300 billion tokens in batches of 3.2 million.

  python -m jaxlm.plan --config=experiments/published/gpt3_175b.py --hardware=v100 --sustained_tflops=28 --price_per_hour=1.5
  python -m jaxlm.plan --config=experiments/published/gpt3_175b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/gpt3_175b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2005.14165, section 2.3, table D.1): the model, the batch, the tokens, V100s of a large cluster; not
how many, nor the mesh, which is chosen here.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=8, pipe=16, data=8),
    '1024': dict(tensor=8, pipe=16, data=8),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'gpt3.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=175b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  base.lay(config, act_stream=('seq', 'tensor'))
  config.pipeline.remat = 'stage'
  config.loss.chunk = 32
  config.model.vocab_pad_to = 8 * config.mesh.tensor * config.mesh.pipe
  config.pipeline.microbatches = config.batch_size // config.mesh.data  # of one row
  return config
