"""BLOOM, 560M to 176B: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/bloom.py:laptop  # 200 steps: 2.417 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/bloom.py:size=1b1 --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/bloom.py:smoke

Published: rates, batches, tokens, warmup over 375 million, the cosine over 410 billion, Adam, decay, clipping
(BigScience 2022, arXiv:2211.05100, table 3). Many languages are a mixture with config.data.temperature. Chosen: the
rate falls to a tenth at every size; the paper's small sizes stop at 1e-5.
"""
from jaxlm import config as base
from jaxlm.families import bloom

# (peak learning rate, rows a batch, tokens)
TRAINING = {'560m': (3e-4, 256, 341e9), '1b1': (2.5e-4, 256, 341e9), '1b7': (2e-4, 512, 341e9),
            '3b': (1.6e-4, 512, 341e9), '7b1': (1.2e-4, 512, 341e9), '176b': (6e-5, 2048, 366e9)}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('560m', bloom.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(bloom.SIZES[arg.size])
  config.model.remat = 'full'
  lr, batch_size, tokens = TRAINING[arg.size]
  steps = lambda tokens: round(tokens / (batch_size * 2048))
  config.update(seq_len=2048, batch_size=batch_size, steps=steps(tokens))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=bloom.VOCAB_SIZE)
  config.optim.update(lr=lr, warmup_steps=steps(375e6), total_steps=steps(410e9), weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
