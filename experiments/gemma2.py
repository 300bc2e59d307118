"""Gemma 2, 2B to 27B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gemma2.py:laptop  # 200 steps: 2.398 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gemma2.py:size=9b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gemma2.py:smoke

Published (arXiv:2408.00118, sections 2 and 3): the block, 8,192 tokens of context, 2, 8 and 13 trillion tokens. The 2B
and 9B were distilled from a larger model; here they learn from text. Chosen: the report gives no rates, so those,
warmup, decay and 4 million tokens a batch are Llama 2's (arXiv:2307.09288, section 2.1).
"""
from jaxlm import config as base
from jaxlm.families import gemma2


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('2b', gemma2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gemma2.SIZES[arg.size])
  config.model.remat = 'full'
  tokens = {'2b': 2e12, '9b': 8e12, '27b': 13e12}[arg.size]
  config.update(seq_len=8192, batch_size=512, steps=round(tokens / (512 * 8192)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gemma2.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
