"""Command R, Command R+ and Aya 23: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/cohere.py:laptop  # 200 steps: 2.583 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/cohere.py:size=aya-23-8b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/cohere.py:smoke

Published with the weights: sizes and 8,192 tokens a row; no recipe. Chosen: Llama 3's rates, 4 million tokens a batch,
warmup, decay and clipping, for 5 trillion tokens.
"""
from jaxlm import config as base
from jaxlm.families import cohere

LR = {'aya-23-8b': 3e-4, 'command-r': 2e-4, 'command-r-plus': 1.5e-4}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('aya-23-8b', cohere.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(cohere.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=8192, batch_size=512, steps=round(5e12 / 4_194_304))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=cohere.VOCAB_SIZE)
  config.optim.update(lr=LR[arg.size], warmup_steps=8_000, weight_decay=0.1, clip_norm=1.0)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
