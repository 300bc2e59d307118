"""Llama 2 and 3, 7B to 70B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/llama.py:laptop  # 200 steps: 2.508 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/llama.py:size=3-8b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/llama.py:smoke

Published: rates, 4 million tokens a batch, 2 trillion tokens for Llama 2 with 2,000 steps of warmup, the cosine down to
a tenth, Adam with b2 = 0.95, decay 0.1, clipping at 1 (arXiv:2307.09288, section 2.1; arXiv:2407.21783, table 3).
Chosen: Llama 3's warmup is the 8,000 steps of its 405B, its batch stays at the first 4 million tokens, for 15
trillion; 3.1 trains at 8,192 tokens, with the rotary scaling of its long context.
"""
from jaxlm import config as base
from jaxlm.families import llama


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('3-8b', llama.SIZES), laptop=False, smoke=False)
  generation, _, parameters = arg.size.partition('-')
  config = base.default()
  config.model.update(llama.SIZES[arg.size])
  config.model.remat = 'full'
  seq_len, tokens, warmup_steps = (4096, 2e12, 2_000) if generation == '2' else (8192, 15e12, 8_000)
  config.update(seq_len=seq_len, batch_size=4_194_304 // seq_len, steps=round(tokens / 4_194_304))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=llama.VOCAB_SIZES[arg.size])
  config.optim.update(lr=1.5e-4 if parameters == '70b' else 3e-4, warmup_steps=warmup_steps, weight_decay=0.1,
                      clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-5 if generation == '2' else 1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
