"""StarCoder2, 3B to 15B, on code: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/starcoder2.py:laptop  # 200 steps: 5.97 nats a predicted token
  python -m jaxlm.main --config=experiments/starcoder2.py:size=3b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/starcoder2.py:smoke

Published (arXiv:2402.19173, section 6): fill-in-the-middle on half of the text, rows of 4,096 tokens, about 3, 3.5 and
4.1 trillion of them, Adam with b2 = 0.95, decay 0.1, a cosine after 1,000 steps of warmup. Chosen: 4 million tokens a
batch, and the rate of 15B, 3e-4, for all; the last stage on rows of 16,384 tokens is left out.
"""
from jaxlm import config as base
from jaxlm.families import starcoder2

TOKENS = {'3b': 3.0e12, '7b': 3.5e12, '15b': 4.1e12}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('3b', starcoder2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(starcoder2.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=4096, batch_size=1024, steps=round(TOKENS[arg.size] / (1024 * 4096)))
  config.objective.name = 'fim'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=starcoder2.VOCAB_SIZE)
  config.optim.update(lr=3e-4, warmup_steps=1_000, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
