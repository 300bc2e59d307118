"""What a function does, in a sentence: ROUGE-L 0.202 (0.187 to 0.216) on held-out files, where the function's first line has
0.146 (0.133 to 0.159; in pairs p = 0.001); 300 steps, 10 minutes beside other work. The
encoder-decoder: 0.171 (0.159 to 0.184), 6 minutes.

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
