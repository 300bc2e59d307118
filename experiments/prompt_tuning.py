"""Summaries by 20 virtual tokens before the text of a frozen model: ROUGE not measured yet.

  python -m jaxlm.main --config=experiments/prompt_tuning.py:start=runs/decoder
  python -m jaxlm.main --config=experiments/prompt_tuning.py:start=runs/decoder,method=prefix,encoder=mlp
  python -m jaxlm.main --config=experiments/prompt_tuning.py:start=runs/decoder,encoder=lstm       # P-tuning
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', method=base.one_of('prompt', ('prompt', 'prefix')),
                       encoder=base.one_of('none', ('none', 'mlp', 'lstm')), smoke=False)
  config = base.tune(base.default(), 'docstring', 'answer', arg.start)
  config.model.peft.update(method=arg.method, encoder=arg.encoder)
  config.optim.lr = 1e-2  # a prompt's few vectors take large steps (Lester et al. 2021: 0.3 of Adafactor)
  return base.smoke(config) if arg.smoke else config
