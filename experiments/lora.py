"""Summaries by a low-rank delta of a frozen model: compare with summarize.py; ROUGE not measured yet.

  python -m jaxlm.main --config=experiments/lora.py:start=runs/decoder
  python -m jaxlm.main --config=experiments/lora.py:start=runs/decoder,method=ia3
  python -m jaxlm.main --config=experiments/lora.py:start=runs/decoder,base=nf4            # QLoRA
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', method=base.one_of('lora', ('lora', 'ia3', 'bottleneck', 'bitfit')),
                       base=base.one_of('same', ('same', 'int8', 'nf4')), smoke=False)
  config = base.tune(base.default(), 'docstring', 'answer', arg.start)
  config.model.peft.update(method=arg.method, base=arg.base)
  config.optim.lr = 2e-3  # few parameters take larger steps
  return base.smoke(config) if arg.smoke else config
