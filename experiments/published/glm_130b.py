"""GLM-130B as published: tensor 4 × pipeline 8 × data 24, on 768 A100s.

  python -m jaxlm.plan --config=experiments/published/glm_130b.py --hardware=a100
  python -m jaxlm.plan --config=experiments/published/glm_130b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/glm_130b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2210.02414, section 2.3): the model, 4,224 rows of 2,048 tokens, 400 billion tokens, ZeRO-1, 135
TFLOP/s a device, of 40 GB. 70 layers lie on 8 stages with two identities among them.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=4, pipe=8, data=24),
    '1024': dict(tensor=4, pipe=8, data=32),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'glm.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=130b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  base.lay(config, act_stream=('seq', 'tensor'))
  config.pipeline.remat = 'stage'
  config.loss.chunk = 32
  config.model.vocab_pad_to = 8 * config.mesh.tensor * config.mesh.pipe
  base.lay(config, optimizer=(('embed', 'data'),))  # ZeRO-1
  config.model.attention.dropout = 0.0
  config.pipeline.microbatches = config.batch_size // config.mesh.data
  return config
