"""UL2 20B on its mixture of denoisers: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/ul2.py:laptop  # 200 steps: 5.17 nats a predicted token
  python -m jaxlm.main --config=experiments/ul2.py --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/ul2.py:smoke

Published (arXiv:2205.05131, table 1 and section 5.1): seven denoisers named by mode tokens, 1,024 rows of 512 tokens,
2 million steps (a trillion tokens), Adafactor with T5's schedule, no dropout. Chosen: the rate as experiments/t5.py
has it.
"""
from jaxlm import config as base
from jaxlm.families import ul2


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('20b', ul2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(ul2.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=512, batch_size=1024, steps=2_000_000)
  config.objective.name = 'ul2'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=32_000, bos=False)
  config.optim.update(name='adafactor', lr=5e-4, schedule='rsqrt', warmup_steps=10_000, weight_decay=0.0,
                      clip_norm=0.0, lr_rules=(('embed/.*|.*/scale', 20.0), ('.*', 1.0)))
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
