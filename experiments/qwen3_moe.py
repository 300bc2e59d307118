"""Qwen3-30B-A3B and 235B-A22B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/qwen3_moe.py:laptop  # 200 steps: 2.520 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/qwen3_moe.py:size=30b-a3b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/qwen3_moe.py:smoke

Published (arXiv:2505.09388, sections 2 and 3): the block, 36 trillion tokens, 4,096 of context but for the last stage,
load balanced over the whole batch. Chosen: the report gives no rates, so those, warmup, decay and 4 million tokens a
batch are Llama 2's (arXiv:2307.09288, section 2.1); load is balanced over each row.
"""
from jaxlm import config as base
from jaxlm.families import qwen3_moe


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('30b-a3b', qwen3_moe.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(qwen3_moe.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=4096, batch_size=1024, steps=round(36e12 / (1024 * 4096)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=qwen3_moe.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
