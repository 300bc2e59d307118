"""GPT-3 by its paper, 125M to 175B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gpt3.py:laptop  # 200 steps: 2.536 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gpt3.py:size=1.3b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gpt3.py:smoke

Published (Brown et al. 2020, table 2.1 and appendix B): rate, batch, 300 billion tokens, warmup over 375 million, the
cosine down to a tenth over 260 billion, Adam, decay, clipping. The batch is rounded to a multiple of 256 rows, and is
whole from the start; the paper grows it from 32 thousand tokens over the first 4 to 12 billion (config.batch_ramp).
"""
from jaxlm import config as base
from jaxlm.families import gpt3


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('125m', gpt3.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gpt3.SIZES[arg.size])
  config.model.remat = 'full'
  lr, batch_tokens = gpt3.TRAINING[arg.size]
  rows = 256 * round(batch_tokens / 2048 / 256)
  steps = lambda tokens: round(tokens / (rows * 2048))
  config.update(seq_len=2048, batch_size=rows, steps=steps(300e9))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gpt3.VOCAB_SIZE, mask_documents=False)
  config.optim.update(lr=lr, warmup_steps=steps(375e6), total_steps=steps(260e9), weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
