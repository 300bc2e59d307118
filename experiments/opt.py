"""OPT, 125M to 175B: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/opt.py:laptop  # 200 steps: 2.650 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/opt.py:size=1.3b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/opt.py:smoke

Published (Zhang et al. 2022, table 1 and section 2.2): rates, batches, 300 billion tokens, warmup over 2,000 steps at
175B and 375 million tokens below it, a straight line to a tenth, Adam, decay, dropout 0.1, clipping at 1, weights from
N(0, 0.006). Chosen: embeddings are dropped out, too, where the paper leaves them alone.
"""
from jaxlm import config as base
from jaxlm.families import opt

# (peak learning rate, tokens a batch)
TRAINING = {
    '125m': (6e-4, 1 << 19), '350m': (3e-4, 1 << 19), '1.3b': (2e-4, 1 << 20), '2.7b': (1.6e-4, 1 << 20),
    '6.7b': (1.2e-4, 1 << 21), '13b': (1e-4, 1 << 22), '30b': (1e-4, 1 << 22), '66b': (0.8e-4, 1 << 21),
    '175b': (1.2e-4, 1 << 21)}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('125m', opt.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(opt.SIZES[arg.size])
  config.model.update(remat='full', dropout=0.1)
  lr, batch_tokens = TRAINING[arg.size]
  config.update(seq_len=2048, batch_size=batch_tokens // 2048, steps=round(300e9 / batch_tokens))
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=opt.VOCAB_SIZE)
  config.optim.update(lr=lr, schedule='linear', weight_decay=0.1, clip_norm=1.0,
                      warmup_steps=2_000 if arg.size == '175b' else round(375e6 / batch_tokens))
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
