"""Statements of Python, translated into a Lisp: BLEU 75.3 (72.6 to 77.6) of the decoder on held-out files, where the
statement itself has 28.6 (27.3 to 29.9); 300 steps, 10 minutes beside other work. The encoder-decoder: BLEU 40.0 (38.5 to 41.3), as long.

  python -m jaxlm.main --config=experiments/translate.py:start=runs/t5
  python -m jaxlm.main --config=experiments/translate.py:start=runs/decoder,structure=decoder
  python -m jaxlm.main --config=experiments/translate.py:start=runs/t5,task=german.json
"""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, start='', task='lisp', smoke=False,
                       structure=base.one_of('encoder_decoder', ('decoder', 'encoder_decoder')))
  config = base.tune(base.default(), arg.task, 'answer', arg.start)
  config.model.update(structure=arg.structure)
  config.objective.answer.target_length = 128
  return base.smoke(config, seq_len=128) if arg.smoke else config
