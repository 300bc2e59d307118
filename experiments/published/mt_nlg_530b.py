"""Megatron-Turing NLG 530B as published: tensor 8 × pipeline 35 × data 8, on 2,240 A100s.

  python -m jaxlm.plan --config=experiments/published/mt_nlg_530b.py --hardware=a100
  python -m jaxlm.plan --config=experiments/published/mt_nlg_530b.py:devices=1024 --hardware=h100
  python -m jaxlm.main --config=experiments/published/mt_nlg_530b.py --config.data.paths=corpus/*.jsonl.zst

Published (arXiv:2201.11990, section 2): the model, 1,920 rows of 2,048 tokens, 280 devices a replica of the model, 8,
10 and 12 replicas at 126, 121 and 113 TFLOP/s a device. Chosen: the last batch from the beginning. 105 layers lie on 16
stages with 7 identities among them.
"""
import os

from jaxlm import config as base

MESHES = {
    'published': dict(tensor=8, pipe=35, data=8),
    '1024': dict(tensor=8, pipe=16, data=8),
}
RECIPE = os.path.join(os.path.dirname(__file__), '..', 'mt_nlg.py')


def get_config(arg=None):
  arg = base.parse_arg(arg, devices=base.one_of('published', MESHES))
  config = base.experiment(RECIPE, 'size=530b')
  config.mesh.update(dict(data=1, fsdp=1) | MESHES[arg.devices])
  base.lay(config, act_stream=('seq', 'tensor'))
  config.pipeline.remat = 'stage'
  config.loss.chunk = 32
  config.model.vocab_pad_to = 8 * config.mesh.tensor * config.mesh.pipe
  config.pipeline.microbatches = config.batch_size // config.mesh.data  # of one row
  config.batch_ramp = ()
  return config
