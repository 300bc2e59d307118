"""A function's body from its head and docstring, scored by its doctests in a sandbox: pass@1 not measured yet.

  python -m jaxlm.main --config=experiments/code.py:start=runs/decoder
  python -m jaxlm.evaluate --model=runs/code-start=runs-decoder --tasks=body
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='body', smoke=False)
  config = base.tune(base.default(), arg.task, 'answer', arg.start)
  config.seq_len = 512
  return base.smoke(config, seq_len=256) if arg.smoke else config
