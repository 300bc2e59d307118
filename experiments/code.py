"""A function's body from its head and docstring, scored by its doctests in a sandbox: pass@1 0 of 34
held-out functions, from a model of 4 million parameters; of functions of one line (`task=line`, right when they parse to the
same tree) 2 of 310, where the commonest line is 1; 4 from a decoder of three times the steps. 300 steps, 10 minutes beside
other work.

  python -m jaxlm.main --config=experiments/code.py:start=runs/decoder
  python -m jaxlm.main --config=experiments/code.py:start=runs/decoder,task=line
  python -m jaxlm.evaluate --model=runs/code-start=runs_decoder --tasks=body
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='body', smoke=False)
  config = base.tune(base.default(), arg.task, 'answer', arg.start)
  config.seq_len = 512
  return base.smoke(config, seq_len=256) if arg.smoke else config
