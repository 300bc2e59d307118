"""Summaries rewarded for the words they share with a function's own docstring: 0.163 of held-out
functions after 100 steps, 3 minutes; before them not measured. The verifier is a setting.

  python -m jaxlm.main --config=experiments/grpo.py:start=runs/summarize
  python -m jaxlm.main --config=experiments/grpo.py:start=runs/code,task=body,verifier=program   # doctests that pass
  python -m jaxlm.main --config=experiments/grpo.py:start=runs/summarize,objective=ppo         # values in groups' place
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='docstring', verifier='f1', smoke=False,
                       objective=base.one_of('grpo', ('grpo', 'ppo')))
  config = base.tune(base.default(), arg.task, arg.objective, arg.start)
  config.objective[arg.objective].verifier = arg.verifier
  if arg.objective == 'ppo':
    config.model.head.update(labels='token', num_labels=1)
  config.optim.lr = 1e-5  # of a policy: steps stay near what was drawn
  return base.smoke(config) if arg.smoke else config
