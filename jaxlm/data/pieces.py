"""SentencePiece models as a backend of `tokenizers`: the same ids, by one library, in one tokenizer.json."""
import re
from collections import defaultdict

import tokenizers as hf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxlm.errors import JaxlmError

SPACE = '▁'
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


def is_model(path: str) -> bool:
  """Whether a path names a SentencePiece model."""
  return path.endswith('.model')


def read(path: str) -> tuple[hf.Tokenizer, dict[str, str]]:
  """A backend that gives the ids that SentencePiece gives, and which pieces are bos, eos, pad, unk and so on.

  Raises:
    JaxlmError: not a SentencePiece model, or one of a kind that this cannot reproduce.
  """
  proto, processor = _parsed(path)
  _check_kind(proto, path)
  backend = hf.Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto))
  backend.normalizer = _normalizer(proto)
  splits = _splits(proto)
  if splits:
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
  backend.decoder = _decoder(proto)
  kinds = defaultdict(list)
  for piece in proto.pieces:
    kinds[piece.type].append(piece.piece)
  backend.add_special_tokens(kinds[UNKNOWN] + kinds[CONTROL])
  if proto.trainer_spec.model_type == BPE:
    backend.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in kinds[USER_DEFINED]])
  _compare(backend, processor, proto, path)
  return backend, _roles(proto, processor)


def _parsed(path: str):
  """(ModelProto, SentencePieceProcessor) of a file."""
  try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as e:
    raise JaxlmError(f'{path} needs the packages sentencepiece and protobuf: pip install sentencepiece protobuf, or '
                     f'jaxlm[sentencepiece] ({e}).') from e
  with open(path, 'rb') as f:
    data = f.read()
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(data)
    if not proto.pieces:
      raise ValueError('it holds no pieces')
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
  except Exception as e:  # protobuf's DecodeError, and RuntimeError
    raise JaxlmError(f'{path} is no SentencePiece model, or is damaged; restore it, or use another tokenizer.') from e
  return proto, processor


def _check_kind(proto, path: str) -> None:
  trainer, form = proto.trainer_spec, proto.normalizer_spec
  for is_so, what in (
      (trainer.model_type not in (UNIGRAM, BPE), 'of characters or words, neither unigram nor BPE'),
      (trainer.treat_whitespace_as_suffix, 'whose pieces end, rather than begin, with a space'),
      (not form.escape_whitespaces, 'that does not write spaces as ▁'),
      (proto.denormalizer_spec.precompiled_charsmap, 'that rewrites what it decodes'),
      (any(piece.type == UNUSED for piece in proto.pieces), 'with pieces marked unused')):
    if is_so:
      raise JaxlmError(f'{path} is a SentencePiece model {what}, which jaxlm cannot reproduce; use another tokenizer.')


# ---- models ------------------------------------------------------------------------------------------------------


def _unigram(proto) -> models.Unigram:
  """Pieces with their scores; a user-defined one counts its length times the best score, as in SentencePiece."""
  best = max((p.score for p in proto.pieces if p.type == NORMAL), default=0.0)
  score = lambda p: len(p.piece.encode()) * best - 0.1 if p.type == USER_DEFINED else p.score
  unknown = next(i for i, p in enumerate(proto.pieces) if p.type == UNKNOWN)
  # Six digits are what the library reads back from a file as it wrote it; SentencePiece's own sums are float32.
  vocab = [(p.piece, round(score(p), 6)) for p in proto.pieces]
  return models.Unigram(vocab, unknown, proto.trainer_spec.byte_fallback)


def _bpe(proto) -> models.BPE:
  """Merges: every way to put a piece together from two others, the best pieces first."""
  pieces = {p.piece: i for i, p in enumerate(proto.pieces)}
  scores = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
  merges = []
  for piece, score in scores.items():
    for cut in range(1, len(piece)):
      if piece[:cut] in scores and piece[cut:] in scores:
        merges.append((-score, pieces[piece], -cut, piece[:cut], piece[cut:]))
  unknown = next(p.piece for p in proto.pieces if p.type == UNKNOWN)
  return models.BPE(pieces, [(left, right) for *_, left, right in sorted(merges)], unk_token=unknown, fuse_unk=True,
                    byte_fallback=proto.trainer_spec.byte_fallback)


# ---- before and after the model ----------------------------------------------------------------------------------


BREAK = '\ufff0'  # belongs to no text
COMPOSING = ('nfkc', 'nmt_nfkc', 'nfkc_cf', 'nmt_nfkc_cf')  # SentencePiece's own rules


def _normalizer(proto) -> normalizers.Normalizer:
  """SentencePiece's steps in its order, and around its table of characters what the library's reading of it lacks.

  The library looks up a whole grapheme and takes the shortest entry that begins it, so decomposed letters with two
  marks, voiced halfwidth kana and "\\r\\n" lose a part. Composed and separated beforehand they do not.
  """
  form, steps, replace = proto.normalizer_spec, [], normalizers.Replace
  if form.precompiled_charsmap:
    composed = [normalizers.NFC()] if form.name in COMPOSING else []
    parted = [replace('\r\n', f'\r{BREAK}\n'), *(replace(mark, BREAK + mark) for mark in 'ﾞﾟ')]
    steps += [*composed, *parted, normalizers.Precompiled(form.precompiled_charsmap), replace(BREAK, ''), *composed]
  if form.remove_extra_whitespaces:
    steps += [replace(Regex(r'\A +'), ''), replace(Regex(' {2,}'), ' ')]
  steps.append(replace(' ', SPACE))
  own = [re.escape(p.piece) for p in proto.pieces if p.type == USER_DEFINED]
  if form.add_dummy_prefix and own and proto.trainer_spec.model_type == BPE:
    # The library normalizes added tokens, too, before it looks for them: those must stay as they are.
    steps.append(replace(Regex(rf'\A(?!(?:{"|".join(own)})\z)(?=[\s\S])'), SPACE))
  elif form.add_dummy_prefix:
    steps.append(normalizers.Prepend(SPACE))
  if form.remove_extra_whitespaces:
    steps.append(replace(Regex(rf'{SPACE}+\z'), ''))
  return normalizers.Sequence(steps)


def _splits(proto) -> list[pre_tokenizers.PreTokenizer]:
  """Where a model need not look across, which makes it fast; and where the library's must not.

  Text may spell a control piece, "</s>", which SentencePiece takes for letters. The library's unigram model does not
  know the difference, so such text is cut where no piece reaches across.
  """
  normal = [p.piece for p in proto.pieces if p.type in (NORMAL, USER_DEFINED)]
  found = []
  if SPACE in normal and not any(re.search(f'[^{SPACE}]{SPACE}', piece) for piece in normal):
    found.append(pre_tokenizers.Split(Regex(f'{SPACE}*[^{SPACE}]+|{SPACE}+'), 'isolated'))
  if proto.trainer_spec.model_type == UNIGRAM:
    joined = {piece[i:i + 2] for piece in normal for i in range(len(piece) - 1)}
    cuts = set()
    for piece in (p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL, BYTE) and len(p.piece) > 1):
      free = [i for i in range(1, len(piece)) if piece[i - 1:i + 1] not in joined] or [1]
      # Two unknown letters in a row are one unknown piece, so rather cut beside a known one.
      cut = next((i for i in free if {piece[i - 1], piece[i]} & set(normal)), free[0])
      cuts.add(f'(?<={re.escape(piece[:cut - 1])}){re.escape(piece[cut - 1])}(?={re.escape(piece[cut:])})')
    found.append(pre_tokenizers.Split(Regex('|'.join(sorted(cuts))), 'merged_with_previous'))
  return found


def _decoder(proto) -> decoders.Decoder:
  steps = [decoders.Replace(SPACE, ' ')]
  if proto.trainer_spec.byte_fallback:
    steps.append(decoders.ByteFallback())
  steps.append(decoders.Fuse())
  if proto.normalizer_spec.add_dummy_prefix:
    steps.append(decoders.Strip(' ', 1, 0))
  return decoders.Sequence(steps)


NAMES = dict(mask=('[MASK]', '<mask>'), cls=('[CLS]', '<cls>'), sep=('[SEP]', '<sep>'))


def _roles(proto, processor) -> dict[str, str]:
  """Role -> piece: by number where the model has one, by name otherwise."""
  numbers = dict(bos=processor.bos_id(), eos=processor.eos_id(), pad=processor.pad_id(), unk=processor.unk_id())
  roles = {role: proto.pieces[number].piece for role, number in numbers.items() if number >= 0}
  own = [p.piece for p in proto.pieces if p.type in (CONTROL, USER_DEFINED)]
  for role, names in NAMES.items():
    roles |= {role: name for name in names[::-1] if name in own}
  return roles


# ---- the proof ---------------------------------------------------------------------------------------------------

PROBES = ('The quick brown fox, 123 times; x_1 = 4.5e6.', '  two  spaces \t and a tab\nlines\r\n\n end ', ' ',
          'naïve façade, Ünïcödé: ｆｕｌｌ ½ ﬁ', 'Съешь же ещё этих мягких булок', '漢字かな交じり文、한국어도 🙂🙂',
          'עברית عربي हिन्दी ไทย', f'{SPACE}literal{SPACE}{SPACE} marks')


def _compare(backend: hf.Tokenizer, processor, proto, path: str) -> None:
  """Refuses a conversion that does not give SentencePiece's own ids; equally good ones of a unigram model will do."""
  backend.encode_special_tokens = True
  scores = [p.score for p in proto.pieces]
  own = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
  for text in (*PROBES, *(f'a{piece}b {piece} c' for piece in own)):
    wanted, got = processor.encode(text), backend.encode(text, add_special_tokens=False).ids
    tied = (proto.trainer_spec.model_type == UNIGRAM and len(wanted) == len(got)
            and abs(sum(scores[i] for i in wanted) - sum(scores[i] for i in got)) < 1e-3)
    if wanted != got and not tied:
      raise JaxlmError(f'{path}: this SentencePiece model cannot be reproduced: it makes {wanted} of {text!r}, the '
                       f'converted one {got}; use another tokenizer.')
