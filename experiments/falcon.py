"""Falcon, 1B to 180B: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/falcon.py:laptop  # 200 steps: 2.401 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/falcon.py:size=7b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/falcon.py:smoke

Published: rates, batches, tokens, warmup over 4 billion (500 million for rw-1b), decay, the z-loss of the larger ones
(Almazrouei et al. 2023, arXiv:2311.16867, and the model cards). Batches are whole from the start; the paper grows them
over the first 4 to 100 billion tokens (config.batch_ramp). Chosen: Adam's b2 and clipping; the rate falls to a tenth
(theirs to a fiftieth at 7B); the 11B's batch, whose card says "variable", at one length where it had four.
"""
from jaxlm import config as base
from jaxlm.families import falcon

# (peak learning rate, rows a batch, tokens)
TRAINING = {'rw-1b': (2e-4, 512, 350e9), '7b': (6e-4, 2304, 1500e9), '11b': (3.7e-4, 1024, 5000e9),
            '40b': (1.85e-4, 1152, 1000e9), '180b': (1.25e-4, 2048, 3500e9)}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('7b', falcon.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(falcon.SIZES[arg.size])
  config.model.remat = 'full'
  lr, batch_size, tokens = TRAINING[arg.size]
  steps = lambda tokens: round(tokens / (batch_size * 2048))
  config.update(seq_len=2048, batch_size=batch_size, steps=steps(tokens))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=falcon.VOCAB_SIZES[arg.size])
  config.loss.z_loss = 0.0 if arg.size == 'rw-1b' else 1e-4
  config.optim.update(lr=lr, warmup_steps=steps(500e6 if arg.size == 'rw-1b' else 4e9), weight_decay=0.1, clip_norm=1.0)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
