"""Windows of text for the tests of objectives: every token tells where it stood, and what becomes of a batch's rows."""
import numpy as np

from jaxlm import fits, config as configs
from jaxlm import objectives
from jaxlm.data import words
from jaxlm.data.tokenizers import Vocab

FIRST = 1000  # ids below are special tokens; the text's are FIRST, FIRST + 1, …
SIZE = FIRST + 4000
ROLES = ['bos', 'eos', 'pad', 'mask', 'cls', 'sep', 'gmask', 'smask', 'sop', 'eop', 'fim_prefix', 'fim_middle',
         'fim_suffix', 'mode_r', 'mode_s', 'mode_x', *(f'sentinel_{i}' for i in range(600))]
ID = {role: i + 1 for i, role in enumerate(ROLES)}


def _tables():
  """A word begins at every third id, a sentence ends at every eleventh."""
  ids = np.arange(SIZE)
  text = ids >= FIRST
  return words.Pieces(word_start=~text | (ids % 3 == 0), word_end=~text, stop=text & (ids % 11 == 0), spaced=text,
                      line_break=np.zeros(SIZE, bool), special=~text)


PIECES = _tables()
VOCAB = Vocab(SIZE, **{r: ID[r] for r in ('bos', 'eos', 'pad', 'mask', 'cls', 'sep')},
              others={r: i for r, i in ID.items() if i > ID['sep']}, pieces=lambda: PIECES)


def item_of(lengths, raw_length, starts=None):
  """Pieces of the given lengths, all tokens different, then padding; `second` continues the numbering."""
  n = sum(lengths)
  assert n <= raw_length
  column = lambda x: np.pad(np.asarray(x), (0, raw_length - n)).astype(np.int32)
  positions = column(np.concatenate([np.arange(0), *(np.arange(k) for k in lengths)]))
  segments = column(np.repeat(np.arange(1, len(lengths) + 1), lengths))
  tokens = np.full(raw_length, VOCAB.filler, np.int32)
  tokens[:n] = FIRST + np.arange(n)
  first = (positions == 0) & (segments > 0)
  second = np.full(raw_length, -1, np.int32)
  second[:raw_length // 2] = FIRST + 2000 + np.arange(raw_length // 2)
  return dict(tokens=tokens, segment_ids=segments, positions=positions, second=second,
              starts=first if starts is None else starts)


def config_of(name, kind, seq_len=64, mask_documents=True, **own):
  """A config of that objective and kind of model."""
  config = configs.default()
  config.update(seq_len=seq_len)
  config.objective.name = name
  config.data.mask_documents = mask_documents
  config.model.structure = 'decoder' if kind == 'recurrent' else kind
  config.model.mixer = 'lstm' if kind == 'recurrent' else 'attention'
  if name == 'multi_token':
    config.model.future_heads = 2
  if own:
    config.objective[name].update(own)
  return config


def make(name, kind, seq_len=64, mask_documents=True, **own):
  return objectives.make(config_of(name, kind, seq_len, mask_documents, **own), VOCAB)


TEXT = [name for name in fits.FITS if name not in fits.ANSWERS]  # what learns raw text, not a task
PAIRS = [(name, kind) for name in TEXT for kind in fits.FITS[name]]


def rng_of(number):
  return np.random.Generator(np.random.Philox(key=np.array([0, number], np.uint64)))


def is_text(ids):
  return np.asarray(ids) >= FIRST


def windows(raw_length, count=40, seed=0):
  """Windows of one document or several, whole or ending in padding, an empty one and ones of single tokens too."""
  rng = np.random.default_rng(seed)
  yield []
  yield [1]
  yield [1] * min(5, raw_length)
  yield [raw_length]
  for _ in range(count):
    n = raw_length if rng.random() < 0.6 else int(rng.integers(1, raw_length + 1))
    parts = int(rng.integers(1, min(n, 6) + 1))
    cuts = np.sort(rng.permutation(n - 1)[:parts - 1] + 1)
    yield np.diff(np.concatenate([[0], cuts, [n]])).tolist()
