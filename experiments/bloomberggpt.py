"""BloombergGPT by its paper, 50B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/bloomberggpt.py:laptop  # 200 steps: 2.390 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/bloomberggpt.py:size=50b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/bloomberggpt.py:smoke

Published (arXiv:2303.17564, section 3): 1,024 rows of 2,048 tokens for 7,200 steps, then 2,048 rows, 139,200 steps, the
rate 6e-5, 1,800 steps of warmup, the cosine down to a tenth, Adam, decay 0.1, clipping at 0.3, no dropout at first.
"""
from jaxlm import config as base
from jaxlm.families import bloomberggpt


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('50b', bloomberggpt.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(bloomberggpt.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=2048, batch_size=2048, batch_ramp=((7_200, 1024),), steps=139_200)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=bloomberggpt.VOCAB_SIZE)
  config.optim.update(lr=6e-5, warmup_steps=1_800, weight_decay=0.1, clip_norm=0.3)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
