"""Recurrent language models, RNN to mLSTM: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/lstm.py:laptop  # 200 steps: 2.691 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/lstm.py:cell=gru,laptop  # 200 steps: 2.496 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/lstm.py:size=lstm-large --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/lstm.py:smoke

Published, LSTMs (Zaremba et al. 2014, section 4.1): 39 and 55 times through 929,589 words, 20 rows at once, dropout 0.5
and 0.65 between layers, SGD at 1 on a loss summed over 35 columns, which is 35 on its mean, gradients clipped at 5 and
10, rates that fall after 6 and 14 epochs. mLSTM (Radford et al. 2017, section 3): a million steps of 128 rows of 256
bytes, Adam at 5e-4 that falls to 0. Chosen: rows have 256 tokens and begin from nothing, where theirs go on from the
rows before; rates fall in a straight line; other cells train as the LSTM does; the small forms use Adam.
"""
from jaxlm import config as base
from jaxlm.families import lstm

# size: (epochs, of them at the full rate, dropout, clipping)
TRAINING = {'medium': (39, 6, 0.5, 5.0), 'large': (55, 14, 0.65, 10.0)}
WORDS, COLUMNS = 929_589, 35


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('lstm-medium', lstm.SIZES), cell=base.one_of('', lstm.CELLS),
                       laptop=False, smoke=False)
  config = base.default()
  config.model.update(lstm.SIZES[arg.size])
  if arg.cell:
    config.model.mixer = arg.cell
  shape = arg.size.partition('-')[2]
  config.update(seq_len=256, batch_size=128, steps=1_000_000)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bytes')
  config.optim.update(lr=5e-4, schedule='linear', final_fraction=0.0, weight_decay=0.0)
  if shape in TRAINING:
    epochs, flat, dropout, clip = TRAINING[shape]
    config.update(batch_size=20, steps=round(epochs * WORDS / (20 * 256)))
    config.model.dropout = dropout
    config.data.update(tokenizer='bpe', vocab_size=lstm.VOCAB_SIZES[arg.size])
    config.optim.update(name='sgd', lr=float(COLUMNS), schedule='wsd', decay_fraction=1 - flat / epochs,
                        clip_norm=clip / COLUMNS)
    config.optim.sgd.momentum = 0.0
  if arg.laptop or arg.smoke:
    config = base.laptop(config) if arg.laptop else base.smoke(config)
    config.optim.update(name='adamw', lr=5e-3, clip_norm=1.0)
    config.model.init.update(std=config.model.width ** -0.5, embedding_std=1.0)
  if arg.laptop:
    config.model.num_layers = lstm.SIZES[arg.size]['num_layers']
  return config
