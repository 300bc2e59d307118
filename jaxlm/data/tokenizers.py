"""Text to token ids and back: plain bytes, pieces trained on the corpus, any tokenizer.json or SentencePiece model."""
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import string
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxlm.data import words
from jaxlm.data.words import byte_letters
from jaxlm.data import pieces
from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest

END, PAD, UNKNOWN = '<|endoftext|>', '<|pad|>', '[UNK]'

# Where a byte-level piece may not reach across. GPT-4's split (cl100k), but a line break takes the next line's
# indentation along, after punctuation too, so that "):\n        " can be one piece. Python's standard library, 4,096
# pieces, bytes a token on held-out files: GPT-2's split 3.42, GPT-4's 3.41, this 3.61.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"
         r"|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+")

ROLES = ('bos', 'eos', 'pad', 'unk', 'mask', 'cls', 'sep', 'start')

# Names that say their role themselves, for a tokenizer.json that comes without its tokenizer_config.json. The first is
# what `with_roles` adds where a role is asked for and none is there.
KNOWN = dict(bos=('<|begin_of_text|>', '<|startoftext|>', '<s>', '<bos>', END),
             eos=(END, '<|end_of_text|>', '</s>', '<eos>'),
             pad=(PAD, '<pad>', '[PAD]'), unk=(UNKNOWN, '<unk>'), mask=('[MASK]', '<mask>'), cls=('[CLS]',),
             sep=('[SEP]',), start=())

# Roles of single objectives, which no tokenizer_config.json has: always by name.
OTHERS = dict(gmask=('[gMASK]',), smask=('[sMASK]',), sop=('<sop>', 'sop', '<|startofpiece|>'),
              eop=('<eop>', 'eop', '<|endofpiece|>'),
              fim_prefix=('<fim_prefix>', '<|fim_prefix|>', '<PRE>', '▁<PRE>'),
              fim_middle=('<fim_middle>', '<|fim_middle|>', '<MID>', '▁<MID>'),
              fim_suffix=('<fim_suffix>', '<|fim_suffix|>', '<SUF>', '▁<SUF>'),
              mode_r=('[NLU]',), mode_s=('[S2S]',), mode_x=('[NLG]',))
SENTINEL = 'sentinel_'  # and its number, from 0


def names_of(role: str) -> tuple[str, ...]:
  """Names by which a role's token is known, the one that would be added first."""
  if role.startswith(SENTINEL):
    return (f'<extra_id_{role.removeprefix(SENTINEL)}>',)
  return KNOWN.get(role) or OTHERS.get(role, ())


@dataclasses.dataclass(frozen=True)
class Vocab:
  """How many ids there are, and which have a role; None where the tokenizer has no such token.

  Attributes:
    start: what a decoder reads first, where the tokenizer's files say so.
    others: roles that one objective needs: 'sentinel_0', 'gmask', 'fim_prefix'.
    pieces: () -> `words.Pieces`, tables over the vocabulary, made when first asked for.
  """
  size: int
  bos: int | None = None
  eos: int | None = None
  pad: int | None = None
  unk: int | None = None
  mask: int | None = None
  cls: int | None = None
  sep: int | None = None
  start: int | None = None
  others: Mapping[str, int] = dataclasses.field(default_factory=dict)
  pieces: Callable[[], words.Pieces] | None = dataclasses.field(default=None, compare=False, repr=False)

  @property
  def filler(self) -> int:
    """A valid id for places that hold no text; no loss and no attention ever counts it."""
    return next((i for i in (self.pad, self.eos) if i is not None), 0)

  @property
  def first(self) -> int | None:
    """What a document begins with."""
    return self.cls if self.bos is None else self.bos

  @property
  def last(self) -> int | None:
    """What a document ends with."""
    return self.sep if self.eos is None else self.eos

  @property
  def decoder_start(self) -> int:
    """What a decoder reads before the first token of its text."""
    return next((i for i in (self.start, self.pad, self.bos, self.eos) if i is not None), 0)

  def get(self, role: str) -> int | None:
    return getattr(self, role) if role in ROLES else self.others.get(role)

  def id(self, role: str) -> int:
    """The id of a role.

    Raises:
      JaxlmError: the tokenizer has no such token.
    """
    found = self.get(role)
    if found is None:
      raise JaxlmError(f'The tokenizer has no {role} token, which config.objective.name asks for; prepare the data for '
                       f'that objective, or name {next(iter(names_of(role)), role)} in its files.')
    return found


class Tokenizer:
  """A `tokenizers.Tokenizer` that knows its special ids and never reads them out of a document's text.

  Documents are encoded as they are: no template adds tokens, nothing is truncated or padded, and text that looks like
  a special token is text. Whoever wants `vocab.bos` puts it there.

  Attributes:
    vocab: size and special ids.
    digest: sha256 of the whole definition; equal tokenizers have equal digests wherever they were saved.
    name: for messages: 'bytes', or where it was read from.
  """

  def __init__(self, backend: hf.Tokenizer, roles: Mapping[str, str | None], name: str):
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # special tokens in the text are encoded as text
    self.backend, self.name = backend, name
    ids = {role: backend.token_to_id(token) for role, token in roles.items() if token is not None}
    known = backend.get_vocab(with_added_tokens=True)
    size = max(known.values(), default=-1) + 1  # ids may have gaps; the highest counts
    self.vocab = Vocab(size=size, **ids, others=_others(known), pieces=functools.cache(
        functools.partial(words.pieces, backend, size)))
    definition = json.loads(backend.to_str())
    model = definition['model']
    self._is_bytes = (model.get('type') == 'BPE' and not model.get('merges') and model['vocab'] == byte_letters()
                      and definition['normalizer'] is None)
    if model.get('type') == 'Unigram':  # the library reads a number back with another last digit
      model['vocab'] = [[piece, f'{score:.6f}'] for piece, score in model['vocab']]
    of_text = dict(size=size, **{role: ids.get(role) for role in ROLES if role != 'start'})
    canonical = json.dumps([definition, of_text], sort_keys=True, separators=(',', ':'))
    self.digest = hashlib.sha256(canonical.encode()).hexdigest()

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Ids of a text, none added; with `special`, the names of special tokens in it are those."""
    if self._is_bytes and not special:
      return list(text.encode())
    self.backend.encode_special_tokens = not special
    try:
      return self.backend.encode(text, add_special_tokens=False).ids
    finally:
      self.backend.encode_special_tokens = True

  def encode_prompt(self, text: str, special: bool = False) -> tuple[list[int], np.ndarray | None]:
    """Ids of a text that is to be continued, and which ids may come first; None: any. `special` as in `encode`.

    Most pieces begin with the space before a word, so a text cut after a space ends in a piece that no training text
    has there. The space is left out, and the first new piece must begin with one.
    """
    if self._spaced.sum() < 2 or not text.endswith(' ') or not text[:-1].strip(' ') or text.endswith('  '):
      return self.encode(text, special), None
    return self.encode(text[:-1], special), self._spaced

  @functools.cached_property
  def _spaced(self) -> np.ndarray:
    """bool [size]: which pieces begin with a space, as byte-level BPE and SentencePiece write it."""
    pieces = (self.backend.id_to_token(i) or '' for i in range(self.vocab.size))
    return np.array([piece[:1] in ('Ġ', '▁') for piece in pieces])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of many texts, int32 each; long ones first, which keeps all cores busy to the end."""
    if self._is_bytes:
      return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    encoded = self.backend.encode_batch_fast([texts[i] for i in order], add_special_tokens=False)
    ids = [np.empty(0, np.int32)] * len(texts)
    for i, encoding in zip(order, encoded):
      ids[i] = np.array(encoding.ids, np.int32)
    return ids

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids; bytes that are no UTF-8 become U+FFFD."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def with_roles(self, roles: Sequence[str]) -> 'Tokenizer':
    """This tokenizer, with a special token added for each of the roles that it lacks; text is encoded as before."""
    missing = [role for role in roles if self.vocab.get(role) is None]
    if not missing:
      return self
    backend = hf.Tokenizer.from_str(self.backend.to_str())
    backend.add_special_tokens([names_of(role)[0] for role in missing])
    tokens = {role: self.backend.id_to_token(getattr(self.vocab, role)) for role in ROLES
              if getattr(self.vocab, role) is not None}
    tokens.update({role: names_of(role)[0] for role in missing if role in ROLES})
    found = Tokenizer(backend, tokens, self.name)
    taken = [role for role in missing if found.vocab.get(role) is None or found.vocab.id(role) < self.vocab.size
             and self.backend.id_to_token(found.vocab.id(role)) != names_of(role)[0]]
    if taken:  # the library numbers added tokens by the vocabulary's size, where ids may have gaps
      raise JaxlmError(f'Tokenizer {self.name!r} has gaps in its ids, so that no {taken[0]} token can be added to it; '
                       f'add {names_of(taken[0])[0]} to its tokenizer.json.')
    return found

  def save(self, folder: str | os.PathLike) -> None:
    """Writes tokenizer.json, and tokenizer_config.json with the special tokens, as `transformers` reads them too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    token = lambda role: self.backend.id_to_token(getattr(self.vocab, role))
    roles = {f'{role}_token': token(role) for role in ROLES if getattr(self.vocab, role) is not None}
    texts = {'tokenizer_config.json': json.dumps(dict(tokenizer_class='PreTrainedTokenizerFast', **roles), indent=2),
             'tokenizer.json': self.backend.to_str(pretty=True)}
    for name, text in texts.items():
      temporary = folder / f'{name}.{os.getpid()}.tmp'
      temporary.write_text(text, encoding='utf-8')
      temporary.replace(folder / name)


# ---- tokenizers from files ---------------------------------------------------------------------------------------


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.json, the folder that holds one, or a SentencePiece model, NAME.model.

  Which tokens are bos, eos and so on is read, in this order, from the folder's tokenizer_config.json,
  special_tokens_map.json and config.json, as `transformers` writes them; a bare tokenizer.json goes by well-known
  names.

  Raises:
    JaxlmError: no such file, or not a tokenizer.json.
  """
  path = Path(path)
  file = path / 'tokenizer.json' if path.is_dir() else path
  if not file.is_file():
    raise JaxlmError(f'Wanted a tokenizer.json, a folder that holds one, or a SentencePiece model; got {str(path)!r}, '
                     'no such file.')
  if pieces.is_model(str(file)):
    return Tokenizer(*pieces.read(str(file)), str(path))
  try:
    backend = hf.Tokenizer.from_str(file.read_text(encoding='utf-8'))
  except Exception as e:  # the library raises bare Exception
    raise JaxlmError(f'{file} is not a tokenizer.json that the tokenizers library can read: {e}.') from e
  return Tokenizer(backend, _roles(backend, file.parent), str(path))


def _others(known: Mapping[str, int]) -> dict[str, int]:
  """The ids of roles that are told by their tokens' names."""
  roles = [*OTHERS, *itertools.takewhile(lambda role: names_of(role)[0] in known,
                                         (f'{SENTINEL}{i}' for i in itertools.count()))]
  found = {role: next((known[name] for name in names_of(role) if name in known), None) for role in roles}
  return {role: id for role, id in found.items() if id is not None}


def _json(file: Path) -> dict:
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except ValueError as e:
    raise JaxlmError(f'{file} is not valid JSON: {e}.') from e
  return value if isinstance(value, dict) else {}


def _roles(backend: hf.Tokenizer, folder: Path) -> dict[str, str | None]:
  """Role -> token, as far as the files beside the tokenizer, or the token's own name, tell."""
  roles: dict[str, str | None] = {}
  named = {**_json(folder / 'special_tokens_map.json'), **_json(folder / 'tokenizer_config.json')}
  numbered = _json(folder / 'config.json')
  numbered = {**(numbered.get('text_config') or {}), **numbered}
  for role in ROLES:
    token = named.get(f'{role}_token')
    token = token.get('content') if isinstance(token, dict) else token
    if token is None:
      number = numbered.get('decoder_start_token_id' if role == 'start' else f'{role}_token_id')
      number = number[0] if isinstance(number, list) and number else number  # Llama 3 has several ends
      token = backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
    if token is None and not named:
      token = next((t for t in KNOWN[role] if backend.token_to_id(t) is not None), None)
    if isinstance(token, str) and backend.token_to_id(token) is not None:
      roles[role] = token
  return roles


# ---- tokenizers made here ----------------------------------------------------------------------------------------


def bytes_tokenizer() -> Tokenizer:
  """One id a byte of UTF-8, 0 to 255; then end of text (256), which also begins it, and padding (257)."""
  letters = byte_letters()
  backend = hf.Tokenizer(models.BPE(vocab=letters, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([END, PAD])
  return Tokenizer(backend, dict(bos=END, eos=END, pad=PAD), 'bytes')


def _byte_level(model) -> hf.Tokenizer:
  backend = hf.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(hf.Regex(SPLIT), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  backend.decoder = decoders.ByteLevel()
  return backend


def _bpe(texts: Iterable[str], vocab_size: int) -> hf.Tokenizer:
  """Byte pairs, lossless: every byte is a piece."""
  backend = _byte_level(models.BPE())
  backend.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return backend


def _unigram(texts: Iterable[str], vocab_size: int) -> hf.Tokenizer:
  """A unigram model over the same bytes as BPE, so lossless too; SentencePiece's is over characters.

  The library numbers and scores the letters that the text lacks in the order of a hash table, which differs every time:
  they all get the lowest score here, and pieces are ordered by score, then by name.
  """
  backend = _byte_level(models.Unigram())
  backend.train_from_iterator(texts, trainers.UnigramTrainer(
      vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  definition = json.loads(backend.to_str())
  special, pieces = definition['model']['vocab'][:2], definition['model']['vocab'][2:]
  lowest = min(score for _, score in pieces)
  unseen = lowest + 0.0001 * 257  # how far the library spreads them
  pieces = [(piece, round(lowest if len(piece) == 1 and score < unseen else score, 6)) for piece, score in pieces]
  definition['model']['vocab'] = special + sorted(pieces, key=lambda p: (-p[1], p[0]))
  return hf.Tokenizer.from_str(json.dumps(definition))


def _wordpiece(texts: Iterable[str], vocab_size: int) -> hf.Tokenizer:
  """BERT's, cased: words and "##" endings. It forgets white space, so it suits encoders, not text that must return.

  The letters are counted here and handed over in order; the library numbers them by a hash table that differs every
  time, and ties between pieces are broken by number.
  """
  texts, counts = list(texts), collections.Counter()
  for text in texts:
    counts.update(text)
  letters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:vocab_size // 4]
  endings = ['##' + c for c in letters if c not in string.punctuation]  # punctuation always stands alone
  special = [END, PAD, UNKNOWN]
  backend = hf.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
  backend.normalizer = normalizers.BertNormalizer(lowercase=False)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  backend.train_from_iterator(texts, trainers.WordPieceTrainer(
      vocab_size=vocab_size, special_tokens=special + endings, initial_alphabet=letters, limit_alphabet=len(letters),
      show_progress=False))
  definition = json.loads(backend.to_str())
  definition['added_tokens'] = [t for t in definition['added_tokens'] if t['content'] in special]
  return hf.Tokenizer.from_str(json.dumps(definition))


TRAINED = {'bpe': _bpe, 'unigram': _unigram, 'wordpiece': _wordpiece}


def train(name: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a tokenizer on texts; the same texts in the same order give the same one.

  Args:
    name: bpe, unigram or wordpiece.
    texts: documents.
    vocab_size: pieces wanted, special tokens included; a small corpus may yield fewer.
  """
  backend = TRAINED[name](texts, vocab_size)
  roles = dict(bos=END, eos=END, pad=PAD) | (dict(unk=UNKNOWN) if name == 'wordpiece' else {})
  return Tokenizer(backend, roles, name)


def resolve(name: str) -> Tokenizer | None:
  """The tokenizer that `config.data.tokenizer` names, or None if it is one to be trained.

  Raises:
    JaxlmError: neither a known name nor a file or folder.
  """
  if name in TRAINED:
    return None
  if name == 'bytes':
    return bytes_tokenizer()
  if os.path.exists(name) or os.sep in name or name.endswith('.json') or pieces.is_model(name):
    return load(name)
  known = ['bytes', *sorted(TRAINED)]
  raise JaxlmError(f'Unknown tokenizer {name!r}. Known: {", ".join(known)}; or give the path of a tokenizer.json or '
                   'of a SentencePiece model.'
                   + nearest(name, known))
