"""ESM-2, 8M to 15B, on masks in proteins: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/protein.py --config.data.paths=proteins.fasta.gz
  python -m jaxlm.main --config=experiments/protein.py:size=t33-650m --config.data.paths=uniref50/*.fasta.zst
  python -m jaxlm.main --config=experiments/protein.py:laptop  # 200 steps: 6.58 nats a predicted token
  python -m jaxlm.main --config=experiments/protein.py:smoke

Published (doi:10.1126/science.ade2574, supplement, A.2): 2 million tokens a batch in rows of 1,024, 500,000 steps
(270,000 and 3.2 million tokens at 15B), Adam at 4e-4 (1.6e-4) with b2 = 0.98, 2,000 steps of warmup, a linear decay to
a tenth over nine tenths of the steps, decay 0.01, masks of 15%, no dropout. Chosen: full rows without padding; letters
are bytes, of which the mask is number 258; --config.data.tokenizer takes ESM-2's own tokenizer.json, with
--config.model.embedding.zeroed=32. The laptop and smoke forms read the standard library instead of proteins.
"""
from jaxlm import config as base
from jaxlm.families import esm


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('t6-8m', esm.SIZES), laptop=False, smoke=False)
  large = arg.size == 't48-15b'
  config = base.default()
  config.model.update(esm.SIZES[arg.size])
  config.model.embedding.zeroed = 258
  config.model.remat = 'full'
  config.update(seq_len=1024, batch_size=3072 if large else 2048, steps=270_000 if large else 500_000)
  config.objective.name = 'masked'
  config.data.update(source='fasta', tokenizer='bytes', packing='best_fit')
  config.optim.update(lr=1.6e-4 if large else 4e-4, schedule='linear', final_fraction=0.1, warmup_steps=2_000,
                      total_steps=round(0.9 * config.steps), weight_decay=0.01,
                      decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)))
  config.optim.adamw.update(b1=0.9, b2=0.98, eps=1e-8)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
