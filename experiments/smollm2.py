"""SmolLM2, 135M to 1.7B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/smollm2.py:laptop  # 200 steps: 2.248 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/smollm2.py:size=135m --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/smollm2.py:smoke

Published (arXiv:2502.02737, sections 4 and 6): rates, 2,000 steps of warmup, flat until they fall over the last tenth
(the smaller two: the last fifth), 2 million tokens a batch, 2,048 of context, Adam with b2 = 0.95; 2, 4 and 11 trillion
tokens. Chosen: weight decay 0.1, clipping at 1, and from the start the rotary base that its last stage, at 8,192
tokens, ended with.
"""
from jaxlm import config as base
from jaxlm.families import smollm2


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('135m', smollm2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(smollm2.SIZES[arg.size])
  config.model.remat = 'full'
  trillions, lr = smollm2.TRAINING[arg.size]
  config.update(seq_len=2048, batch_size=1024, steps=round(trillions * 1e12 / (1024 * 2048)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=smollm2.VOCAB_SIZE)
  config.optim.update(lr=lr, schedule='wsd', warmup_steps=2_000, final_fraction=0.0, weight_decay=0.1, clip_norm=1.0,
                      decay_fraction=0.1 if arg.size == '1.7b' else 0.2)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
