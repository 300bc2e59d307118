"""DeepSeek-V3, 671B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/deepseek_v3.py:laptop  # 200 steps: 2.270 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/deepseek_v3.py:size=671b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/deepseek_v3.py:smoke

Published (arXiv:2412.19437, section 4.2): 14.8 trillion tokens, 4,096 of context, the rate 2.2e-4 after 2,000 steps,
flat for 10 trillion, then a cosine to a tenth; batches from 3,072 to 15,360 rows over 469 billion; Adam, decay 0.1,
clipping at 1. Chosen: the rate falls in a straight line, batches grow in four steps, the rotations are stretched from
the start, no further tokens are predicted; and as the routers' bias is not moved here, load is balanced by a loss of
0.01, where the paper needs only 1e-4.
"""
from jaxlm import config as base
from jaxlm.families import deepseek_v3


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('671b', deepseek_v3.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(deepseek_v3.SIZES[arg.size])
  config.model.remat = 'full'
  config.model.moe.balance_loss = 0.01
  ramp, until = [], 0
  for rows in range(3072, 15_360, 3072):
    until += round(469e9 / 4 / (rows * 4096))
    ramp.append((until, rows))
  steps = until + round((14.8e12 - 469e9) / (15_360 * 4096))
  config.update(seq_len=4096, batch_size=15_360, batch_ramp=tuple(ramp), steps=steps)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=deepseek_v3.VOCAB_SIZE)
  config.optim.update(lr=2.2e-4, schedule='wsd', decay_fraction=0.32, warmup_steps=2_000, weight_decay=0.1,
                      clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
