"""Jurassic-1 by its paper, 7.5B to 178B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/jurassic1.py:laptop  # 200 steps: 2.688 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/jurassic1.py:size=large-7.5b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/jurassic1.py:smoke

Published (Lieber et al. 2021, section 2): rates and batches of Large and Jumbo, 300 billion tokens, 2,048 of context,
pieces that span words. Chosen: warmup, decay, Adam and clipping are GPT-3's (arXiv:2005.14165, appendix B), whose
batches, too, grow from 32 thousand tokens (config.batch_ramp), here whole from the start; pieces end with words.
"""
from jaxlm import config as base
from jaxlm.families import jurassic1


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('large-7.5b', jurassic1.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(jurassic1.SIZES[arg.size])
  config.model.remat = 'full'
  lr, tokens = jurassic1.TRAINING[arg.size]
  rows = 8 * round(tokens / 2048 / 8)
  steps = lambda tokens: round(tokens / (rows * 2048))
  config.update(seq_len=2048, batch_size=rows, steps=steps(300e9))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=jurassic1.VOCAB_SIZE)
  config.optim.update(lr=lr, warmup_steps=steps(375e6), total_steps=steps(260e9), weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
