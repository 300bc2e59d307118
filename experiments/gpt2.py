"""GPT-2 on a text corpus: eval loss not measured at this size.

  python -m jaxlm.main --config=experiments/gpt2.py:laptop  # 200 steps: 2.548 bits a byte (gzip -9: 2.218)
  python -m jaxlm.main --config=experiments/gpt2.py --config.data.paths=corpus/*.jsonl.zst
  python -m jaxlm.main --config=experiments/gpt2.py:size=nano,smoke

The paper gives sizes, length and 512 rows a batch. Chosen: GPT-3's rates at these sizes, warmup, and 19k steps, which
are 10 billion tokens. The tokenizer is trained on the corpus with as many pieces as GPT-2's;
--config.data.tokenizer takes GPT-2's own tokenizer.json.
"""
from jaxlm import config as base
from jaxlm.families import gpt2

LR = {'nano': 1e-3, '124m': 6e-4, '355m': 3e-4, '774m': 2.5e-4, '1.5b': 2e-4}


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('124m', gpt2.SIZES), laptop=False, smoke=False)
  config = base.default()
  config.model.update(gpt2.SIZES[arg.size])
  config.model.remat = 'dots' if arg.size == 'nano' else 'full'
  config.update(seq_len=config.model.max_length, steps=19_000, batch_size=512)
  config.objective.name = 'causal'
  config.data.update(source='jsonl', tokenizer='bpe', vocab_size=gpt2.VOCAB_SIZE)
  config.optim.update(lr=LR[arg.size], warmup_steps=700)
  config.precision.compute = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  if arg.size == 'nano':  # an hour on a laptop
    config.update(steps=5_000, batch_size=64)
    config.data.update(source='stdlib', vocab_size=4096)
    config.optim.warmup_steps = 100
    config.precision.compute = 'float32'
  return base.laptop(config) if arg.laptop else base.smoke(config) if arg.smoke else config
