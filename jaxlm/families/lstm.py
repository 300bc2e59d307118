"""Recurrent language models: LSTMs by Zaremba et al. 2014, the mLSTM of Radford et al. 2017, and other cells in place.

Published: two layers of 650 or 1,500 units on 10,000 words, arXiv:1409.2329, section 4.1; one layer of 4,096 units on
bytes, arXiv:1704.01444, section 3. Chosen: RNN and GRU of the same shape as the medium LSTM. As torch and cuDNN have
it, a cell has two biases. A layer is as wide as what it reads: so the mLSTM embeds bytes in 4,096 dims where the
published one has 64, which makes its input maps 83 million parameters larger; and the tapering layers of AWD-LSTM
(Merity et al. 2017) and the projected ones of Jozefowicz et al. 2016 are not here.
"""
# What all sizes share: layers on each other, without skip paths, norms or MLPs.
BASE = dict(
    family='lstm', structure='decoder', tie_embeddings=False, embedding_scale=1.0, logit_softcap=0.0,
    head=dict(bias=True), attention=dict(num_heads=1, bias=True, windows=(0,)), mlp=dict(width=0),
    residual=dict(in_norm=False, out_norm=False, post_norm=False, alpha=0.0, parallel=False, final_norm=False),
    positions=dict(kind='none'))


def _shape(mixer: str, width: int, num_layers: int, uniform: float) -> dict:
  """Weights begin between -uniform and uniform there, and with the same variance here."""
  std = uniform / 3 ** 0.5
  return BASE | dict(mixer=mixer, width=width, num_layers=num_layers,
                     init=dict(std=std, embedding_std=std, scale_by_depth=False))


SIZES = {
    'lstm-medium': _shape('lstm', 650, 2, 0.05),
    'lstm-large': _shape('lstm', 1500, 2, 0.04),
    'rnn-medium': _shape('rnn', 650, 2, 0.05),
    'gru-medium': _shape('gru', 650, 2, 0.05),
    'mlstm-4096': _shape('mlstm', 4096, 1, 0.04),
}
VOCAB_SIZES = {size: 256 if size == 'mlstm-4096' else 10_000 for size in SIZES}  # bytes, or words
CELLS = ('rnn', 'gru', 'lstm', 'mlstm')
