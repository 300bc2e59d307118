"""Small models of code, which experiments of tasks start from; they never saw files that the tasks hold out.

4.2 million parameters, 3.3 million tokens, half an hour each beside other work on two cores. The decoder needs 1.271
bits a held-out byte (1.053 after 2,400 steps; 1.059 after 1,400 of 8 rows of 512, 36 minutes), where gzip -9 needs 2.098;
the encoder finds 37.8% of the tokens that are hidden, 30 of a hundred, at 3.54 nats; the encoder-decoder (8.4 million)
finds 22.5% of the tokens of hidden spans, at 4.47 nats, after 26 minutes.

  python -m jaxlm.main --config=experiments/small.py:structure=decoder --workdir=runs/decoder
  python -m jaxlm.main --config=experiments/small.py:structure=encoder --workdir=runs/encoder
  python -m jaxlm.main --config=experiments/small.py:structure=encoder_decoder --workdir=runs/t5
"""
from jaxlm import config as base

OBJECTIVES = dict(decoder='causal', encoder='masked', encoder_decoder='span')


def get_config(arg=None):
  arg = base.parse_arg(arg, structure=base.one_of('decoder', OBJECTIVES), smoke=False)
  config = base.default()
  config.update(steps=800, batch_size=16, seq_len=256, eval_every=250, save_every=250)
  config.objective.name = OBJECTIVES[arg.structure]
  config.objective.masked.rate = 0.3  # Wettig et al. 2023, arXiv:2202.08005
  config.objective.span.update(rate=0.3, mean=4.0)
  config.model.update(structure=arg.structure, width=256, num_layers=4)
  config.model.attention.update(num_heads=4, bias=False, out_bias=False, qk_norm='head')
  config.model.mlp.update(activation='relu2', bias=False)
  config.model.norm.kind = 'rmsnorm'
  config.model.positions.kind = 'rope'
  config.data.update(paths='train', tokenizer='bpe', vocab_size=4096, holdout=0.02, bos=arg.structure == 'decoder')
  config.optim.update(name='muon', lr=0.02, lr_rules=(('.*(embedding|scale|bias)', 0.15), ('.*', 1.0)),
                      schedule='linear', warmup_steps=50, final_fraction=0.0)
  config.eval.prompts = ()
  return base.smoke(config) if arg.smoke else config
