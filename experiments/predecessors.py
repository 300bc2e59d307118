"""What came before attention: RNN, GRU, LSTM, mLSTM and a Transformer of equal parameters under one trainer.

  for cell in rnn gru lstm mlstm attention; do
    python -m jaxlm.main --config=experiments/predecessors.py:cell=$cell --workdir=runs/predecessors-$cell
  done

Result, bits a held-out byte where `gzip -9` needs 2.059: rnn 1.740, gru 1.653, lstm 1.666, mlstm 1.640, attention
1.728; 13 minutes each on one core. Each run tells eval/heldout/loss_after_1, _2, _4, …: the loss by how many tokens
stand before the target. What attention lacks to the LSTM is 0.46 nats after 4 to 7 tokens and 0.10 after 128 to 255
(the table is in BUILD_NOTES.md): on 2.5 million tokens recurrence learns first, and what more context gives it ends
first. notebooks/03_predecessors.ipynb draws them together. All have two layers with a skip path around each, the same
2,048 pieces, rows, optimizer and steps, and 1.30 million parameters within 1%, embeddings included: what a cell saves
in gates it has in width. Sources: Elman 1990; Cho et al. 2014, arXiv:1406.1078; Hochreiter and Schmidhuber 1997;
Krause et al. 2016, arXiv:1609.07959; Vaswani et al. 2017, arXiv:1706.03762.
"""
from jaxlm import config as base

CELLS = ('rnn', 'gru', 'lstm', 'mlstm', 'attention')
WIDTHS = {'rnn': 368, 'gru': 254, 'lstm': 228, 'mlstm': 209, 'attention': 192}


def get_config(arg=None):
  arg = base.parse_arg(arg, cell=base.one_of('lstm', CELLS), laptop=False, smoke=False)
  config = base.default()
  config.update(steps=600, batch_size=16, seq_len=256, eval_every=200, save_every=200)
  config.model.update(mixer=arg.cell, width=WIDTHS[arg.cell], num_layers=2)
  config.model.norm.kind = 'rmsnorm'
  if arg.cell == 'attention':
    config.model.positions.kind = 'rope'
    config.model.attention.num_heads = 4
    config.model.mlp.width = 792
  else:
    config.model.positions.kind = 'none'
    config.model.mlp.width = 0
  config.data.update(tokenizer='bpe', vocab_size=2048, holdout=0.05)
  config.optim.update(lr=3e-3, warmup_steps=60)
  config.eval.update(by_context=True, max_tokens=1 << 17)
  if arg.laptop:  # it is of that size
    return config
  return base.smoke(config) if arg.smoke else config
