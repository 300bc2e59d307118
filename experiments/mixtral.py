"""Mixtral 8x7B and 8x22B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/mixtral.py:laptop  # 200 steps: 2.582 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/mixtral.py:size=8x7b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/mixtral.py:smoke

Published (arXiv:2401.04088): the block, 32,768 tokens of context. Chosen: the paper says nothing of its training, so
rates, warmup, decay and 4 million tokens a batch are Llama 2's (arXiv:2307.09288, section 2.1), for 2 trillion tokens.
"""
from jaxlm import config as base
from jaxlm.families import mixtral


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('8x7b', mixtral.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(mixtral.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=32_768, batch_size=128, steps=round(2e12 / (128 * 32_768)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=mixtral.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-5)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
