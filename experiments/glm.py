"""GLM, 110M to 10B, and GLM-130B, by their papers: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/glm.py:laptop  # 200 steps: 5.65 nats a predicted token
  python -m jaxlm.main --config=experiments/glm.py:size=130b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/glm.py:smoke

Published, GLM-130B (arXiv:2210.02414, sections 2 and 3): 4,224 rows of 2,048 tokens, 400 billion tokens, the rate 8e-5,
warmup over 0.5% and the cosine down to a tenth, Adam, decay 0.1, clipping at 1, long blanks in 70% of rows; batches
that grow from 192 rows over 2.5%, dropout 0.1. GLM (arXiv:2103.10360, appendix): 1,024 rows of 512 tokens, 120 and 200
thousand steps. Chosen: batches are whole from the start (config.batch_ramp); the 10B's recipe is the 335M's at half the
rate; GLM-130B's 5% of instructions, and the shrinking of the embedding's gradient, are left out.
"""
from jaxlm import config as base
from jaxlm.families import glm


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('130b', glm.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(glm.SIZES[arg.size])
  config.model.remat = 'full'
  lr, rows, steps, warmup_steps, b2, eps = glm.TRAINING[arg.size]
  config.update(seq_len=config.model.max_length, batch_size=rows, steps=steps)
  config.model.dropout = 0.1
  config.objective.name = 'infilling'
  config.objective.infilling.long = 0.7 if arg.size == '130b' else 0.5
  config.data.update(source='jsonl', tokenizer='unigram' if arg.size == '130b' else 'wordpiece',
                     vocab_size=glm.VOCAB_SIZES[arg.size])
  config.optim.update(lr=lr, warmup_steps=warmup_steps, weight_decay=0.1, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=b2, eps=eps)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  config = base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
  if arg.size == '130b':
    config.model.residual.alpha = (2 * config.model.num_layers) ** 0.5
  return config
