"""ALBERT, base to xxlarge, on masks and sentence order: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/albert.py:laptop  # 200 steps: 7.00 nats a predicted token, 66% of labels
  python -m jaxlm.main --config=experiments/albert.py:size=base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/albert.py:smoke

Published (arXiv:1909.11942, section 4.1): 4,096 rows of 512 tokens, 125,000 steps, LAMB at 0.00176, masks of up to
three words, n of them with probability in proportion to 1/n. Chosen: 3,125 steps of warmup and decay 0.01, as in its
code; no dropout, as in its version 2.
"""
from jaxlm import config as base
from jaxlm.families import albert


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', albert.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(albert.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=512, batch_size=4096, steps=125_000)
  config.objective.name = 'sentence_order'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=albert.VOCAB_SIZE, packing='padded')
  config.optim.update(name='lamb', lr=1.76e-3, schedule='linear', final_fraction=0.0, warmup_steps=3_125,
                      weight_decay=0.01, decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)))
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
