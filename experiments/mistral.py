"""Mistral 7B and NeMo 12B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/mistral.py:laptop  # 200 steps: 2.546 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/mistral.py:size=7b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/mistral.py:smoke

Published (arXiv:2310.06825): the block, 8,192 tokens of context, windows of 4,096. Chosen: the paper says nothing of
its training, so rates, warmup, decay and 4 million tokens a batch are Llama 2's (arXiv:2307.09288, section 2.1), for 2
trillion tokens.
"""
from jaxlm import config as base
from jaxlm.families import mistral


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('7b', mistral.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(mistral.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=8192, batch_size=512, steps=round(2e12 / (512 * 8192)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=mistral.VOCAB_SIZES[arg.size])
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-5)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
