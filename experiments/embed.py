"""The function that a docstring describes, found among all: nDCG@10 not measured yet; the baseline is TF-IDF.

  python -m jaxlm.main --config=experiments/embed.py:start=runs/encoder
  python -m jaxlm.evaluate --model=runs/embed-start=runs-encoder --tasks=find
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='find', smoke=False)
  config = base.tune(base.default(), arg.task, 'contrast', arg.start)
  config.model.update(structure='encoder')
  config.model.head.pool = 'mean'
  config.update(steps=200, batch_size=64)  # every document of a batch is a wrong one for the others
  return base.smoke(config) if arg.smoke else config
