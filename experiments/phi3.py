"""Phi-3 mini and medium, 4K: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/phi3.py:laptop  # 200 steps: 2.540 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/phi3.py --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/phi3.py:smoke

Published (Abdin et al. 2024, arXiv:2404.14219): sizes, 4,096 tokens a row, 3.3 trillion tokens at mini and 4.8 at
medium, bfloat16. The report gives no rates. Chosen: Llama 2's at these sizes, its 4 million tokens a batch, warmup,
decay and clipping.
"""
from jaxlm import config as base
from jaxlm.families import phi3


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('mini-4k', phi3.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(phi3.SIZES[arg.size])
  config.model.remat = 'full'
  tokens = 3.3e12 if arg.size == 'mini-4k' else 4.8e12
  config.update(seq_len=4096, batch_size=1024, steps=round(tokens / 4_194_304))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=phi3.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
