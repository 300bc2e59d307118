"""OLMo 2, 1B to 32B: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/olmo2.py:laptop  # 200 steps: 2.704 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/olmo2.py:size=7b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/olmo2.py:smoke

Published (OLMo et al. 2024, arXiv:2501.00656, section 2): rates, batches, tokens of the first stage, 2,000 steps of
warmup, the cosine towards a tenth, Adam, decay 0.1 but not of embeddings, clipping at 1, z-loss 1e-5, weights from
N(0, 0.02) at every depth. Chosen: the cosine ends with the tokens trained on; theirs runs towards a later end.
"""
from jaxlm import config as base
from jaxlm.families import olmo2

# (peak learning rate, rows a batch, tokens)
TRAINING = {'1b': (4e-4, 512, 4e12), '7b': (3e-4, 1024, 3.9e12), '13b': (9e-4, 2048, 5e12), '32b': (6e-4, 2048, 6e12)}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('1b', olmo2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(olmo2.SIZES[arg.size])
  config.model.remat = 'full'
  lr, batch_size, tokens = TRAINING[arg.size]
  config.update(seq_len=4096, batch_size=batch_size, steps=round(tokens / (batch_size * 4096)))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=olmo2.VOCAB_SIZE)
  config.loss.z_loss = 1e-5
  config.optim.update(lr=lr, warmup_steps=2_000, weight_decay=0.1, clip_norm=1.0,
                      decay_rules=(('embed/embedding|.*/(bias|scale)', 0.0), ('.*', 1.0)))
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
