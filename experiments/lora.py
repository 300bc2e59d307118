"""Summaries by a low-rank delta of a frozen model: ROUGE-L 0.182 (0.170 to 0.195) with 32,768 trained parameters, where all
4.2 million have 0.202 (summarize.py) and the function's first line 0.146; 300 steps, 4 minutes.

  python -m jaxlm.main --config=experiments/lora.py:start=runs/decoder
  python -m jaxlm.main --config=experiments/lora.py:start=runs/decoder,method=ia3
  python -m jaxlm.main --config=experiments/lora.py:start=runs/decoder,base=nf4            # QLoRA
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='docstring', method=base.one_of('lora', ('lora', 'ia3', 'bottleneck', 'bitfit')),
                       base=base.one_of('same', ('same', 'int8', 'nf4')), smoke=False)
  config = base.tune(base.default(), arg.task, 'answer', arg.start)
  config.model.peft.update(method=arg.method, base=arg.base)
  config.optim.lr = 2e-3  # few parameters take larger steps
  return base.smoke(config) if arg.smoke else config
