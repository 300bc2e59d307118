"""Summaries rewarded for being a function's own docstring: reward not measured yet; the verifier is a setting.

  python -m jaxlm.main --config=experiments/grpo.py:start=runs/summarize
  python -m jaxlm.main --config=experiments/grpo.py:start=runs/code,task=body,verifier=program   # doctests that pass
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='docstring', verifier='contains', smoke=False)
  config = base.tune(base.default(), arg.task, 'grpo', arg.start)
  config.objective.grpo.verifier = arg.verifier
  config.optim.lr = 1e-5  # of a policy: steps stay near what was drawn
  return base.smoke(config) if arg.smoke else config
