"""GPT-3 by its paper (Brown et al. 2020, arXiv:2005.14165, table 2.1): GPT-2 with every second layer banded.

Published: depth, width, heads, learning rate, batch, length 2,048, GPT-2's block and tokenizer, "alternating dense and
locally banded sparse attention patterns in the layers". Chosen: dense layers come first, and a band is the last 128
tokens, the stride of the Sparse Transformer (Child et al. 2019) on text; the paper gives neither. Two rows of the
table contradict their own sums and are mended: 1.3B has 16 heads of 128 (24 are printed, which makes 1.5B), and 13B
is 5,120 wide, 40 heads of 128 (5,140 is printed).
"""
from jaxlm.families import gpt2

VOCAB_SIZE = gpt2.VOCAB_SIZE


def _shape(width: int, num_layers: int, num_heads: int) -> dict:
  size = gpt2.shape(width, num_layers, num_heads, max_length=2048)
  return size | dict(family='gpt3', attention=size['attention'] | dict(windows=(0, 128)))


SIZES = {
    '125m': _shape(768, 12, 12),
    '350m': _shape(1024, 24, 16),
    '760m': _shape(1536, 24, 16),
    '1.3b': _shape(2048, 24, 16),
    '2.7b': _shape(2560, 32, 32),
    '6.7b': _shape(4096, 32, 32),
    '13b': _shape(5120, 40, 40),
    '175b': _shape(12288, 96, 96),
}

# Published with each size: (peak learning rate, tokens a batch).
TRAINING = {
    '125m': (6.0e-4, 500_000), '350m': (3.0e-4, 500_000), '760m': (2.5e-4, 500_000), '1.3b': (2.0e-4, 1_000_000),
    '2.7b': (1.6e-4, 1_000_000), '6.7b': (1.2e-4, 2_000_000), '13b': (1.0e-4, 2_000_000), '175b': (0.6e-4, 3_200_000),
}
