"""RoBERTa, base and large, on masks alone: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/roberta.py:laptop  # 200 steps: 6.74 nats a predicted token
  python -m jaxlm.main --config=experiments/roberta.py:size=base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/roberta.py:smoke

Published (arXiv:1907.11692, table 9): 8,192 rows of 512 tokens, 500,000 steps, rates, warmup, linear decay, Adam with
b2 = 0.98, decay 0.01, dropout 0.1, no clipping; rows are full sentences across documents, which see each other
(section 4.2), and masks are new every time.
"""
from jaxlm import config as base
from jaxlm.families import roberta

LR = {'base': (6e-4, 24_000), 'large': (4e-4, 30_000)}  # peak, steps of warmup


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', roberta.SIZES), laptop=False, smoke=False)
  lr, warmup_steps = LR[arg.size]
  config = base.default()
  config.model.update(roberta.SIZES[arg.size])
  config.model.update(dropout=0.1, remat='full')
  config.model.attention.dropout = 0.1
  config.update(seq_len=512, batch_size=8192, steps=500_000)
  config.objective.name = 'masked'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=roberta.VOCAB_SIZE, mask_documents=False)
  config.optim.update(lr=lr, schedule='linear', final_fraction=0.0, warmup_steps=warmup_steps, weight_decay=0.01,
                      decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)), clip_norm=0.0)
  config.optim.adamw.update(b1=0.9, b2=0.98, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
