"""ModernBERT, base and large, on masks: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/modernbert.py:laptop  # 200 steps: 5.95 nats a predicted token
  python -m jaxlm.main --config=experiments/modernbert.py:size=base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/modernbert.py:smoke

Published (arXiv:2412.13663, appendix A, table 3): 1.719 trillion tokens in rows of 1,024, rows, peak rates, a warmup
of 3 (base) or 2 (large) billion tokens, then a constant rate that ends in a short decay, 30% of tokens masked, Adam
with b2 = 0.98, decay 1e-5, full rows without padding. Chosen: AdamW for StableAdamW, batches at their full size from
the start, one constant rate also at large; the 300 billion tokens of the longer context are left out.
"""
from jaxlm import config as base
from jaxlm.families import modernbert

RECIPES = {'base': (4608, 8e-4, 1e-5, 3e9), 'large': (4928, 5e-4, 1e-5, 2e9)}  # rows, peak, decay, tokens of warmup


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', modernbert.SIZES), laptop=False, smoke=False)
  batch_size, lr, weight_decay, warmup = RECIPES[arg.size]
  config = base.default()
  config.model.update(modernbert.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=1024, batch_size=batch_size, steps=round(1.719e12 / (batch_size * 1024)))
  config.objective.name = 'masked'
  config.objective.masked.rate = 0.3
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=modernbert.VOCAB_SIZE, packing='best_fit')
  config.optim.update(lr=lr, schedule='wsd', decay_fraction=0.03, final_fraction=0.0, weight_decay=weight_decay,
                      warmup_steps=round(warmup / (batch_size * 1024)),
                      decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)))
  config.optim.adamw.update(b1=0.9, b2=0.98, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
