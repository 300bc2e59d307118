"""Dialogues about functions, in ChatML; the assistant's turns alone count: loss not measured yet.

  python -m jaxlm.main --config=experiments/chat.py:start=runs/decoder
  python -m jaxlm.main --config=experiments/chat.py:start=runs/llama,task=dialogues.json --config.data.template=llama3
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='assistant', smoke=False)
  config = base.tune(base.default(), arg.task, 'answer', arg.start)
  config.seq_len = 512
  return base.smoke(config, seq_len=512) if arg.smoke else config
