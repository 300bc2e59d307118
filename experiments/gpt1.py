"""GPT-1 117M: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gpt1.py:laptop  # 200 steps: 2.840 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gpt1.py --config.data.paths=books/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gpt1.py:smoke

Published (Radford et al. 2018, section 4.1): 100 epochs of 64 rows of 512 tokens, the rate 2.5e-4 after 2,000 steps of
warmup, a cosine to 0, Adam, dropout 0.1, decay 0.01 of all but biases and gains, weights from N(0, 0.02). Chosen:
BooksCorpus as 1 billion tokens, which makes 3 million steps; clipping at 1, as in the code of the fine-tuning.
"""
from jaxlm import config as base
from jaxlm.families import gpt1


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('117m', gpt1.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gpt1.SIZES[arg.size])
  config.model.dropout = 0.1
  config.model.attention.dropout = 0.1
  config.update(seq_len=512, batch_size=64, steps=3_000_000)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gpt1.VOCAB_SIZE, packing='contiguous')
  config.optim.update(lr=2.5e-4, warmup_steps=2_000, final_fraction=0.0, weight_decay=0.01, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.999, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
