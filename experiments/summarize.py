"""What a function does, in a sentence: ROUGE not measured yet; the baseline is the function's first line.

  python -m jaxlm.main --config=experiments/summarize.py:start=runs/decoder
  python -m jaxlm.main --config=experiments/summarize.py:start=runs/t5,structure=encoder_decoder
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='docstring', structure=base.one_of('decoder', ('decoder', 'encoder_decoder')),
                       smoke=False)
  config = base.tune(base.default(), arg.task, 'answer', arg.start)
  config.model.update(structure=arg.structure)
  config.objective.answer.target_length = 64
  return base.smoke(config) if arg.smoke else config
