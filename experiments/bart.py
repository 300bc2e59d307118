"""BART, base and large, on disturbed text: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/bart.py:laptop  # 400 steps: 5.98 nats a predicted token
  python -m jaxlm.main --config=experiments/bart.py:size=base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/bart.py:smoke

Published (arXiv:1910.13461, sections 2.2 and 5.1): 30% of tokens in spans of Poisson(3) behind one mask each, sentences
shuffled, 500,000 steps of 8,000 rows, dropout. Chosen, where the paper says nothing: RoBERTa's 512 tokens, rates,
warmup, straight decay and Adam; dropout 0.1 to the end, where the paper ends it after nine tenths.
"""
from jaxlm import config as base
from jaxlm.families import bart


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('base', bart.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(bart.SIZES[arg.size])
  config.model.update(remat='full', dropout=0.1)
  config.model.attention.dropout = 0.1
  config.update(seq_len=512, batch_size=8000, steps=500_000)
  config.objective.name = 'denoising'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=bart.VOCAB_SIZE)
  lr, warmup_steps = {'base': (6e-4, 24_000), 'large': (4e-4, 30_000)}[arg.size]
  config.optim.update(lr=lr, schedule='linear', final_fraction=0.0, warmup_steps=warmup_steps, weight_decay=0.01,
                      clip_norm=0.0)
  config.optim.adamw.update(b1=0.9, b2=0.98, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  if arg.laptop or arg.smoke:
    config = base.laptop(config) if arg.laptop else base.smoke(config)
    config.model.init.std = config.model.width ** -0.5
  if arg.laptop:  # post-norm bears no higher rate
    config.update(steps=400)
    config.optim.update(lr=1e-3, warmup_steps=40)
  return config
