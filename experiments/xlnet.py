"""XLNet, base and large, in random orders: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/xlnet.py:laptop  # 200 steps: 6.53 nats a predicted token
  python -m jaxlm.main --config=experiments/xlnet.py:size=base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/xlnet.py:smoke

Published (arXiv:1906.08237, section 3.1 and appendix A.4): 500,000 steps of 8,192 rows of 512 tokens, a sixth of them
predicted, Adam at 4e-4 with 40,000 steps of warmup and a straight decay, decay 0.01, dropout 0.1; the authors' code
reads 384 tokens before a row. Chosen: base trains with the same numbers.
"""
from jaxlm import config as base
from jaxlm.families import xlnet


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', xlnet.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(xlnet.SIZES[arg.size])
  config.model.update(remat='full', dropout=0.1)
  config.model.attention.dropout = 0.1
  config.update(seq_len=512, batch_size=8192, steps=500_000)
  config.objective.name = 'permutation'
  config.objective.permutation.memory = 384
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=xlnet.VOCAB_SIZE)
  config.optim.update(lr=4e-4, schedule='linear', final_fraction=0.0, warmup_steps=40_000, weight_decay=0.01)
  config.optim.adamw.update(b1=0.9, b2=0.999, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  if arg.laptop or arg.smoke:
    config.objective.permutation.memory = 32
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
