"""Which objective fits which model, task and row; in names and numbers, before anything is made."""
import functools
from typing import Any, Callable

from jaxlm import middles, orders, spans

# objective -> the kinds of model that can express it, and who sees whom there. A recurrent net sees what came before.
_LEFT_TO_RIGHT = dict(decoder='causal', recurrent='causal')
_TEXT_TO_TEXT = dict(encoder_decoder='causal', decoder='order')
FITS: dict[str, dict[str, str]] = {
    'causal': _LEFT_TO_RIGHT, 'multi_token': _LEFT_TO_RIGHT, 'fim': _LEFT_TO_RIGHT,
    'prefix': _TEXT_TO_TEXT, 'span': _TEXT_TO_TEXT, 'ul2': _TEXT_TO_TEXT, 'denoising': _TEXT_TO_TEXT,
    'infilling': dict(decoder='order'), 'permutation': dict(two_stream='order'),
    'masked': dict(encoder='full'), 'replaced': dict(encoder='full'), 'translation': dict(encoder='full'),
    'next_sentence': dict(encoder='full'), 'sentence_order': dict(encoder='full'),
    **{name: dict(encoder='full', **_LEFT_TO_RIGHT) for name in ('classify', 'multi_label', 'regress', 'tag', 'extract',
                                                                 'contrast')},
    'reward': dict(encoder='full', **_LEFT_TO_RIGHT),
    'answer': dict(encoder_decoder='causal', **_LEFT_TO_RIGHT), 'prefer': _LEFT_TO_RIGHT, 'grpo': _LEFT_TO_RIGHT,
    'ppo': _LEFT_TO_RIGHT, 'kto': _LEFT_TO_RIGHT,
}

# objective -> the kinds of task (`data.task`) whose answers it learns
ANSWERS: dict[str, tuple[str, ...]] = {
    'classify': ('classify',), 'multi_label': ('multi_label',), 'regress': ('regress',), 'tag': ('tag',),
    'extract': ('span',), 'contrast': ('retrieve',), 'answer': ('text', 'chat', 'choice'), 'prefer': ('prefer',),
    'reward': ('prefer',), 'grpo': ('text',), 'ppo': ('text',),
    'kto': ('prefer', 'classify'),
}

_TWO_LABELS = ('head.num_labels', lambda n: n >= 2, 'at least 2')
_TWO_TEXTS = ('embedding.token_types', lambda n: n != 1, '0, or at least 2')  # RoBERTa's table has one row

# objective -> what else of the model it needs: key, whether its value will do, what will
NEEDS: dict[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    'multi_token': (('future_heads', lambda n: n >= 1, 'at least 1'),),
    'replaced': (('generator.width', lambda n: n >= 1, 'at least 1'),
                 ('head.labels', lambda name: name == 'replaced', "'replaced'")),
    'next_sentence': (('head.labels', lambda name: name == 'sequence', "'sequence'"), _TWO_LABELS, _TWO_TEXTS),
    'sentence_order': (('head.labels', lambda name: name == 'sequence', "'sequence'"), _TWO_LABELS, _TWO_TEXTS),
    'translation': (_TWO_TEXTS,),
    **{name: (('head.labels', lambda head, wanted=wanted: head == wanted, repr(wanted)),) for name, wanted in (
        ('classify', 'sequence'), ('multi_label', 'sequence'), ('regress', 'sequence'), ('tag', 'token'),
        ('extract', 'span'))},
    **{name: (('head.labels', lambda head, wanted=wanted: head == wanted, repr(wanted)),
              ('head.num_labels', lambda n: n == 1, '1')) for name, wanted in (('reward', 'sequence'), ('ppo', 'token'))},
}

WITHOUT_WORDS = ('classify', 'multi_label', 'regress', 'tag', 'extract', 'contrast', 'reward')  # predict no tokens
WITHOUT_TEACHER = ('replaced', 'multi_label', 'regress', 'extract', 'contrast', 'prefer', 'reward', 'kto', 'grpo', 'ppo')
WRITTEN = ('grpo', 'ppo')  # by the policy: what is learned from


def kind(config) -> str:
  """encoder, decoder, encoder_decoder or two_stream; 'recurrent' is a decoder without attention."""
  structure, recurrent = config.model.structure, config.model.mixer != 'attention'
  if structure == 'decoder':
    return 'recurrent' if recurrent else 'decoder'
  return structure if not recurrent or structure == 'encoder_decoder' else f'recurrent {structure}'


def mismatch(config) -> str | None:
  """Why the config's model cannot be trained on its objective and what would fit, in a line; None if it can."""
  name, model = config.objective.name, config.model
  if name not in FITS:
    return None  # one of the user's own
  here, fits = kind(config), FITS[name]
  if here not in fits:
    others = [other for other in FITS if here in FITS[other]]
    says = f'config.model.structure is {model.structure!r}'
    if model.mixer != 'attention':
      says += f' of {model.mixer!r}'
    return (f'objective {name!r} needs a model of kind {" or ".join(fits)}; {says}, which fits: '
            f'{", ".join(others) or "no objective; set config.model.mixer to attention"}.')
  for path, holds, wanted in NEEDS.get(name, ()):
    value = functools.reduce(lambda node, part: node[part], path.split('.'), model)
    if not holds(value):
      return f'objective {name!r} needs config.model.{path} to be {wanted}; it is {value!r}.'
  if name != 'replaced' and not model.head.lm and name not in WITHOUT_WORDS:
    return f'objective {name!r} predicts tokens, so it needs config.model.head.lm to be True.'
  if name != 'multi_token' and model.future_heads:
    return f'objective {name!r} predicts one token at a place; set config.model.future_heads=0, or use multi_token.'
  return _settings_fault(config) or sentinels_missing(config)


def _settings_fault(config) -> str | None:
  """What is wrong between an objective's own settings, and with rows too short for it."""
  name, own = config.objective.name, config.objective[config.objective.name]
  at = f'config.objective.{name}'
  if 'mask' in own and 'random' in own and own.mask + own.random > 1:
    return f'{at}: mask={own.mask} and random={own.random} are shares of the same tokens; together at most 1.'
  head = config.model.head
  if head.pool == 'splade' and (head.labels == 'sequence' or head.pooler != 'none' or name == 'contrast' and not head.lm):
    return ("config.model.head.pool='splade' weighs entries of the vocabulary, so it needs config.model.head.lm, and no label "
            'head or pooler reads it; here take first, mean or last.')
  if name == 'contrast' and head.pool == 'splade' and own.dims:
    return f"{at}.dims={own.dims}: the first of config.model.head.pool='splade' mean no more than the others; set it to ()."
  if name == 'contrast' and head.pool != 'splade' and own.flops:
    return f"{at}.flops={own.flops} keeps weights of config.model.head.pool='splade' few; set that, or 0."
  if name == 'prefix' and own.min_rate > own.max_rate:
    return f'{at}: min_rate={own.min_rate} is above max_rate={own.max_rate}; set it lower.'
  if name == 'infilling' and own.long + own.sentences > 1:
    return f'{at}: long={own.long} and sentences={own.sentences} are shares of the same rows; together at most 1.'
  if name in RAW and RAW[name](config)(config.seq_len) < 4:
    return f'objective {name!r} has no room for text in config.seq_len={config.seq_len} columns; make rows longer.'
  return None


def sentinels_missing(config) -> str | None:
  name = config.objective.name
  if name not in ('span', 'ul2'):
    return None
  own, n = config.objective[name], RAW[name](config)(config.seq_len)
  laws = [(own.rate, own.mean)] if name == 'span' else [d[1:3] for d in own.denoisers]
  most = max(spans.counts(n, rate, mean)[1] for rate, mean in laws)
  if most > own.num_sentinels:
    return (f'objective {name!r} cuts {most} spans out of a row of {config.seq_len}; set '
            f'config.objective.{name}.num_sentinels to at least that, or make spans longer or fewer.')
  return None


# ---- lengths -----------------------------------------------------------------------------------------------------


def framed(seq_len: int) -> int:
  return seq_len - 3


# (config) -> raw_length, of the objectives whose lengths follow from their settings
RAW: dict[str, Callable[[Any], Callable[[int], int]]] = {
    'next_sentence': lambda c: framed, 'sentence_order': lambda c: framed,
    'fim': lambda c: functools.partial(middles.raw_length, every=c.objective.fim.every),
    'infilling': lambda c: functools.partial(orders.infilling_raw, rate=c.objective.infilling.rate,
                                             mean=c.objective.infilling.mean),
    'prefix': lambda c: functools.partial(spans.prefix_raw, min_rate=c.objective.prefix.min_rate,
                                          max_rate=c.objective.prefix.max_rate),
    'span': lambda c: functools.partial(spans.cut_raw, laws=((c.objective.span.rate, c.objective.span.mean),),
                                        together=kind(c) == 'decoder', lead=0),
    'ul2': lambda c: functools.partial(spans.cut_raw, laws=tuple(tuple(d[1:3]) for d in c.objective.ul2.denoisers),
                                       together=kind(c) == 'decoder', lead=1),
    'denoising': lambda c: functools.partial(spans.bart_raw, rate=c.objective.denoising.rate,
                                             mean=c.objective.denoising.mean, together=kind(c) == 'decoder'),
}
