"""The Transformer of 2017, base and big: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/transformer2017.py:laptop  # 400 steps: 6.49 nats a predicted token
  python -m jaxlm.main --config=experiments/transformer2017.py:size=big --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/transformer2017.py:smoke

Published (arXiv:1706.03762, section 5): 25,000 tokens a batch on either side, 100,000 steps (big: 300,000), Adam at
1 / sqrt(width·step) after 4,000 steps of warmup, dropout 0.1 (big: 0.3), label smoothing 0.1. Chosen: what is read and
written is the beginning and the end of a text, for no objective here translates.
"""
from jaxlm import config as base
from jaxlm.families import transformer2017


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', transformer2017.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(transformer2017.SIZES[arg.size])
  config.model.dropout = {'base': 0.1, 'big': 0.3}[arg.size]
  config.update(seq_len=256, batch_size=100, steps={'base': 100_000, 'big': 300_000}[arg.size])
  config.objective.name = 'prefix'
  config.loss.label_smoothing = 0.1
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=transformer2017.VOCAB_SIZE)
  config.optim.update(lr=(config.model.width * 4000) ** -0.5, schedule='rsqrt', warmup_steps=4_000, weight_decay=0.0,
                      clip_norm=0.0)
  config.optim.adamw.update(b1=0.9, b2=0.98, eps=1e-9)
  if arg.laptop or arg.smoke:
    config = base.laptop(config) if arg.laptop else base.smoke(config)
    config.model.init.std = config.model.width ** -0.5
  if arg.laptop:  # what stands for a position is learned late, and post-norm bears no higher rate
    config.update(steps=400)
    config.optim.update(lr=1e-3, warmup_steps=40)
  return config
