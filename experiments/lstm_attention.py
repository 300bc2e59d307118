"""Recurrent encoder-decoders with attention: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/lstm_attention.py:laptop  # 200 steps: 4.92 nats a predicted token
  python -m jaxlm.main --config=experiments/lstm_attention.py:size=gnmt --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/lstm_attention.py:smoke

Published (Wu et al. 2016, arXiv:1609.08144, section 8.3): 128 rows at once, 60,000 steps of Adam at 2e-4 before SGD
takes over, gradients clipped at 5, dropout 0.2. Chosen: it ends with those 60,000 steps, the other sizes train in the
same way, and what is read and written is the beginning and the end of a text, for no objective here translates.
"""
from jaxlm import config as base
from jaxlm.families import lstm_attention


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('gnmt', lstm_attention.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(lstm_attention.SIZES[arg.size])
  config.model.dropout = 0.2
  config.update(seq_len=128, batch_size=128, steps=60_000)
  config.objective.name = 'prefix'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=lstm_attention.VOCAB_SIZES[arg.size])
  config.optim.update(lr=2e-4, schedule='constant', weight_decay=0.0, clip_norm=5.0)
  config.optim.adamw.update(b1=0.9, b2=0.999)
  if arg.laptop or arg.smoke:
    config = base.laptop(config) if arg.laptop else base.smoke(config)
    config.optim.update(lr=5e-3, clip_norm=1.0)
    config.model.init.update(std=0.5 * config.model.width ** -0.5, embedding_std=1.0)
  if arg.laptop:
    config.model.num_layers = 2
    base.follow(config, 'model.encoder_layers')
  return config
