"""Gemma 3, text, 270M to 27B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gemma3.py:laptop  # 200 steps: 2.394 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gemma3.py:size=4b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gemma3.py:smoke

Published (arXiv:2503.19786, sections 2 and 3): the block, 2, 4, 12 and 14 trillion tokens, most of them at 32,768 of
context and without the rotary scaling of longer ones; all distilled from a larger model, here they learn from text. The
270M came later, with 6 trillion tokens. Chosen: 8,192 tokens of context; the report gives no rates, so those, warmup,
decay and 4 million tokens a batch are Llama 2's (arXiv:2307.09288, section 2.1).
"""
from jaxlm import config as base
from jaxlm.families import gemma3


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('1b', gemma3.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gemma3.SIZES[arg.size])
  config.model.remat = 'full'
  tokens = {'270m': 6e12, '1b': 2e12, '4b': 4e12, '12b': 12e12, '27b': 14e12}[arg.size]
  config.update(seq_len=8192, batch_size=512, steps=round(tokens / (512 * 8192)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gemma3.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
