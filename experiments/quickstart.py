"""A small GPT on the running Python's standard library.

  python -m jaxlm.main --config=experiments/quickstart.py
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, smoke=False)
  config = base.default()
  config.update(steps=560, batch_size=16, seq_len=256, log_every=10, eval_every=0, save_every=140)
  config.model.update(width=192, num_layers=3)
  config.model.attention.num_heads = 6
  config.model.positions.kind = 'rope'
  config.data.update(tokenizer='bpe', vocab_size=2048)
  config.optim.update(lr=3e-3, warmup_steps=40)
  config.eval.prompts = ('def ', 'class ', 'import ')
  return base.smoke(config) if arg.smoke else config
