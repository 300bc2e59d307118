"""GPT-NeoX-20B and Pythia, 70M to 12B: eval loss not measured at these sizes.

  python -m jaxlm.main --config=experiments/gpt_neox.py:laptop  # 200 steps: 2.347 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gpt_neox.py:size=1.4b --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gpt_neox.py:smoke

Published: rates, batches, steps, warmup over 1%, the cosine down to a tenth, Adam, decay, clipping, initial scales
(Biderman et al. 2023, arXiv:2304.01373, appendix B; Black et al. 2022, arXiv:2204.06745, table 2). Chosen: what adds to
the residual stream starts at std / sqrt(2 L), where they take 2 / (L sqrt(D)): 1.8 times that at 6 layers, 0.7 at 44.
"""
from jaxlm import config as base
from jaxlm.families import gpt_neox

LR = {'70m': 1e-3, '160m': 6e-4, '410m': 3e-4, '1b': 3e-4, '1.4b': 2e-4, '2.8b': 1.6e-4, '6.9b': 1.2e-4, '12b': 1.2e-4,
      '20b': 0.97e-4}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('160m', gpt_neox.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gpt_neox.SIZES[arg.size])
  config.model.remat = 'full'
  batch_size, steps = (1538, 150_000) if arg.size == '20b' else (1024, 143_000)
  config.update(seq_len=2048, batch_size=batch_size, steps=steps)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gpt_neox.VOCAB_SIZES[arg.size],
                     mask_documents=False)
  config.optim.update(lr=LR[arg.size], warmup_steps=steps // 100, weight_decay=0.01, clip_norm=1.0)
  config.optim.adamw.update(b1=0.9, b2=0.95, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
