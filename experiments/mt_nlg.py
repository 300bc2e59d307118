"""Megatron-Turing NLG by its paper, 530B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/mt_nlg.py:laptop  # 200 steps: 2.552 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/mt_nlg.py:size=530b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/mt_nlg.py:smoke

Published (arXiv:2201.11990, section 2.3): 1,920 rows of 2,048 tokens, 270 billion tokens, the rate 5e-5, warmup over
one billion, the cosine down to a tenth over 340 billion, Adam, decay, clipping; batches that grow from 32 rows by 32
over the first 12 billion, here in eight steps of that length.
"""
from jaxlm import config as base
from jaxlm.families import mt_nlg


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('530b', mt_nlg.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(mt_nlg.SIZES[arg.size])
  config.model.remat = 'full'
  # 240, 480, … rows, each for an eighth of the 12 billion tokens.
  ends, rows = 0, 1920
  ramp = []
  for size in range(240, rows, 240):
    ends += round(12e9 / 8 / (size * 2048))
    ramp.append((ends, size))
  steps = lambda tokens: round(tokens / (rows * 2048))
  config.update(seq_len=2048, batch_size=rows, batch_ramp=tuple(ramp), steps=ends + steps(270e9 - 12e9 * 7 / 8))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=mt_nlg.VOCAB_SIZE)
  config.optim.update(lr=5e-5, warmup_steps=round(1e9 / (240 * 2048)), total_steps=ends + steps(340e9 - 12e9 * 7 / 8),
                      weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
