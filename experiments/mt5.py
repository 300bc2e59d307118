"""mT5 on 101 languages: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/mt5.py:laptop  # 200 steps: 4.97 nats a predicted token
  python -m jaxlm.main --config=experiments/mt5.py:size=small \\
    --config.data.mixture='(("en", "jsonl", "corpus/en-*.jsonl", 1), ("sw", "jsonl", "corpus/sw-*.jsonl", 1))'
  python -m jaxlm.main --config=experiments/mt5.py:smoke

Published (arXiv:2010.11934, sections 3.1 and 3.2): a million steps of 1,024 rows of 1,024 tokens, languages weighed by
size to the power 0.3, T5's spans and schedule, no dropout. Chosen: the rate as experiments/t5.py has it.
"""
from jaxlm import config as base
from jaxlm.families import mt5


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', mt5.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(mt5.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=1024, batch_size=1024, steps=1_000_000)
  config.objective.name = 'span'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=250_000, bos=False, temperature=1 / 0.3)
  config.optim.update(name='adafactor', lr=5e-4, schedule='rsqrt', warmup_steps=10_000, weight_decay=0.0,
                      clip_norm=0.0, lr_rules=(('embed/.*|.*/scale', 20.0), ('.*', 1.0)))
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
