"""T5 1.0 and 1.1 on spans cut out of text: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/t5.py:laptop  # 200 steps: 4.97 nats a predicted token
  python -m jaxlm.main --config=experiments/t5.py:size=v1_1-base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/t5.py:smoke

Published (arXiv:1910.10683, sections 3.1.2, 3.3.4 and 3.7): 2,048 rows of 512 tokens, a million steps, 15% of tokens in
spans of 3, Adafactor at 1 / sqrt(step) from step 10,000 on, no dropout in 1.1. Chosen: the rate rises over those first
10,000 steps, where the paper's stays at 0.01; and that is a multiple of each parameter's size, so it is 0.01 for
embeddings and norms, which begin at 1, and 5e-4 for matrices.
"""
from jaxlm import config as base
from jaxlm.families import t5


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('v1_1-base', t5.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(t5.SIZES[arg.size])
  config.model.update(remat='full', dropout=0.0 if arg.size.startswith('v1_1') else 0.1)
  config.update(seq_len=512, batch_size=2048, steps=1_000_000)
  config.objective.name = 'span'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=32_000, bos=False)
  config.optim.update(name='adafactor', lr=5e-4, schedule='rsqrt', warmup_steps=10_000, weight_decay=0.0,
                      clip_norm=0.0, lr_rules=(('embed/.*|.*/scale', 20.0), ('.*', 1.0)))
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
