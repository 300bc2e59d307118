"""Qwen2 and 2.5, 0.5B to 72B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/qwen2.py:laptop  # 200 steps: 2.489 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/qwen2.py:size=7b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/qwen2.py:smoke

Published (arXiv:2407.10671, section 3; arXiv:2412.15115): the block, 4,096 tokens of context for most of 7 trillion
(12 trillion the 0.5B, 18 trillion 2.5). Chosen: neither report gives rates, so those, warmup, decay and 4 million
tokens a batch are Llama 2's (arXiv:2307.09288, section 2.1).
"""
from jaxlm import config as base
from jaxlm.families import qwen2


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('7b', qwen2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(qwen2.SIZES[arg.size])
  config.model.remat = 'full'
  tokens = 18e12 if arg.size.startswith('2.5') else 12e12 if arg.size == '0.5b' else 7e12
  config.update(seq_len=4096, batch_size=1024, steps=round(tokens / (1024 * 4096)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=qwen2.VOCAB_SIZES[arg.size])
  config.optim.update(lr=1.5e-4 if arg.size == '72b' else 3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
