"""Gemma, 2B and 7B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gemma.py:laptop  # 200 steps: 2.353 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gemma.py:size=7b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gemma.py:smoke

Published (arXiv:2403.08295, sections 2 and 3): the block, 8,192 tokens of context, 3 trillion tokens for the 2B and 6
trillion for the 7B. Chosen: the report gives no rates, so those, warmup, decay and 4 million tokens a batch are Llama
2's (arXiv:2307.09288, section 2.1).
"""
from jaxlm import config as base
from jaxlm.families import gemma


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('2b', gemma.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gemma.SIZES[arg.size])
  config.model.remat = 'full'
  tokens = {'2b': 3e12, '7b': 6e12}[arg.size]
  config.update(seq_len=8192, batch_size=512, steps=round(tokens / (512 * 8192)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gemma.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
