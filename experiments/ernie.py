"""ERNIE 1.0 to 3.0, phrases masked whole: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/ernie.py:laptop  # 200 steps: 6.56 nats a predicted token, 66% of labels
  python -m jaxlm.main --config=experiments/ernie.py:size=1.0-base --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/ernie.py:smoke

Published (arXiv:1904.09223, section 3): BERT's block and rate of masks, which hide words, then phrases and names, with
all their pieces. Chosen: n-grams of up to three words stand for phrases and names, whose lists are not public;
everything else is BERT's (arXiv:1810.04805, appendix A.2), also at the later sizes (arXiv:1907.12412,
arXiv:2107.02137), whose further tasks are left out.
"""
from jaxlm import config as base
from jaxlm.families import ernie


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('1.0-base', ernie.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(ernie.SIZES[arg.size])
  config.model.update(dropout=0.1, remat='full')
  config.model.attention.dropout = 0.1
  config.update(seq_len=512, batch_size=256, steps=1_000_000)
  config.objective.name = 'next_sentence'
  config.objective.next_sentence.update(whole_words=True, max_ngram=3)
  config.data.update(source='jsonl', tokenizer='wordpiece', vocab_size=ernie.VOCAB_SIZES[arg.size],
                     packing='padded')
  config.optim.update(lr=1e-4, schedule='linear', final_fraction=0.0, warmup_steps=10_000, weight_decay=0.01,
                      decay_rules=(('.*(bias|scale)', 0.0), ('.*', 1.0)))
  config.optim.adamw.update(b1=0.9, b2=0.999, eps=1e-6)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
