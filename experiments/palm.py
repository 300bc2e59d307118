"""PaLM by its paper, 8B to 540B: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/palm.py:laptop  # 200 steps: 2.387 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/palm.py:size=62b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/palm.py:smoke

Published (arXiv:2204.02311, section 5): Adafactor without factors, clipping at 1, the rate 1e-2 until step 10,000 and
then 1 / sqrt(step), weight decay by the square of the rate, log²Z of 1e-4, batches that grow, 2,048 tokens of context,
780 billion tokens. Chosen: PaLM's Adafactor multiplies by the size of what it changes, which ours does not, so that the
rate here is 1e-2 times the size that kernels are drawn with, and embeddings and norms, of size 1, get the whole; the
rate rises for 10,000 steps, weight decay falls with it, there is no momentum, and batches of 8B and 62B double after
50,000 steps.
"""
from jaxlm import config as base
from jaxlm.families import palm


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('8b', palm.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(palm.SIZES[arg.size])
  config.model.remat = 'full'
  ramp, rows = palm.BATCHES[arg.size]
  until, before = 0, 0
  for step, size in ramp:
    until, before = step, before + (step - until) * size
  config.update(seq_len=2048, batch_size=rows, batch_ramp=ramp, steps=until + round((780e9 / 2048 - before) / rows))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='unigram', vocab_size=palm.VOCAB_SIZE)
  config.optim.update(name='adafactor', lr=1e-2 * config.model.width ** -0.5, schedule='rsqrt', warmup_steps=10_000,
                      weight_decay=1e-2 * config.model.width ** 0.5, clip_norm=1.0)
  config.optim.adafactor.min_dim = 1 << 30
  config.loss.z_loss = 1e-4
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  config = base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
  width = config.model.width
  config.model.attention.num_kv_heads = 1
  config.optim.lr_rules = (('embed/embedding|.*/scale', width ** 0.5), ('.*', 1.0))
  return config
