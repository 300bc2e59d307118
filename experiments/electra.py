"""ELECTRA, small to large, generator and discriminator: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/electra.py:laptop  # 200 steps: 6.49 nats a predicted token
  python -m jaxlm.main --config=experiments/electra.py:size=small --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/electra.py:smoke

Published (arXiv:2003.10555, table 6): rows, steps, rates, 10,000 steps of warmup, linear decay, decay 0.01, dropout
0.1, a quarter of the tokens masked at large, generators' sizes. Chosen: 512 tokens a row at base and large.
"""
from jaxlm import config as base
from jaxlm.families import electra

# (tokens a row, rows, steps, peak rate, tokens masked)
RECIPES = {'small': (128, 128, 1_000_000, 5e-4, 0.15), 'base': (512, 256, 766_000, 2e-4, 0.15),
           'large': (512, 2048, 1_750_000, 2e-4, 0.25)}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('small', electra.SIZES), laptop=False, smoke=False)
  seq_len, batch_size, steps, lr, rate = RECIPES[arg.size]
  config = base.default()
  config.model.update(electra.SIZES[arg.size])
  config.model.generator.update(electra.GENERATORS[arg.size])
  config.model.update(dropout=0.1, remat='full')
  config.model.attention.dropout = 0.1
  config.update(seq_len=seq_len, batch_size=batch_size, steps=steps)
  config.objective.name = 'replaced'
  config.objective.replaced.rate = rate
  config.data.update(source='jsonl', tokenizer='wordpiece', vocab_size=electra.VOCAB_SIZE)
  config.optim.update(lr=lr, schedule='linear', final_fraction=0.0, warmup_steps=10_000, weight_decay=0.01,
                      decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)))
  config.optim.adamw.update(b1=0.9, b2=0.999, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
