"""BERT, tiny to large, on masks and next sentences: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/bert.py:laptop  # 200 steps: 6.62 nats a predicted token, 66% of labels
  python -m jaxlm.main --config=experiments/bert.py:size=base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/bert.py:smoke

Published (arXiv:1810.04805, appendix A.2): 256 rows of 512 tokens, a million steps, Adam at 1e-4 with 10,000 steps of
warmup and a linear decay, decay 0.01, dropout 0.1; the sizes below base in arXiv:1908.08962. Chosen: 512 tokens from
the start, where the paper has 128 for nine tenths of the steps.
"""
from jaxlm import config as base
from jaxlm.families import bert


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', bert.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(bert.SIZES[arg.size])
  config.model.update(dropout=0.1, remat='full')
  config.model.attention.dropout = 0.1
  config.update(seq_len=512, batch_size=256, steps=1_000_000)
  config.objective.name = 'next_sentence'
  config.data.update(source='jsonl', tokenizer='wordpiece', vocab_size=bert.VOCAB_SIZE, packing='padded')
  config.optim.update(lr=1e-4, schedule='linear', final_fraction=0.0, warmup_steps=10_000, weight_decay=0.01,
                      decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)))
  config.optim.adamw.update(b1=0.9, b2=0.999, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
