"""GPT-J 6B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gptj.py:laptop  # 200 steps: 2.397 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gptj.py --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gptj.py:smoke

Published with the code and the model card (Wang and Komatsuzaki 2021): 402 billion tokens in 383,500 steps, 3,000 steps
of warmup, the rate from 1.2e-4 to 1.2e-5, decay 0.1, clipping at 1. Chosen: the cosine over the whole run, and Adam's
b2; documents are cut into rows of 2,048 tokens that see each other, as in the authors' own pipeline.
"""
from jaxlm import config as base
from jaxlm.families import gptj


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('6b', gptj.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gptj.SIZES[arg.size])
  config.model.remat = 'full'
  config.update(seq_len=2048, batch_size=512, steps=383_500)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gptj.VOCAB_SIZE, mask_documents=False)
  config.optim.update(lr=1.2e-4, warmup_steps=3_000, weight_decay=0.1, clip_norm=1.0)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
