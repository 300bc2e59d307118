"""SentencePiece models give the ids that SentencePiece gives, on text of this Python's own library."""
import pathlib
import sys
import sysconfig
import unicodedata

import pytest
from corpora import corpus, tokens_of

from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError

spm = pytest.importorskip('sentencepiece')
pytest.importorskip('google.protobuf')

CODE = dict(normalization_rule_name='identity', remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
OWN = dict(user_defined_symbols=['<sep>', 'self', '<start_of_turn>'], control_symbols=['<ctl>', '[MASK]'])
MODELS = {
    'unigram': dict(model_type='unigram'),  # as XLM-R, T5, XLNet, ALBERT
    'unigram bytes': dict(model_type='unigram', byte_fallback=True, pad_id=3),
    'unigram code': dict(model_type='unigram', **CODE),
    'unigram own': dict(model_type='unigram', **OWN),
    'unigram across': dict(model_type='unigram', split_by_whitespace=False),
    'bpe': dict(model_type='bpe'),
    'bpe llama': dict(model_type='bpe', byte_fallback=True, split_digits=True, **CODE),
    'bpe gemma': dict(model_type='bpe', add_dummy_prefix=False, byte_fallback=True, **CODE,
                      user_defined_symbols=['<sep>', '<start_of_turn>', '\n', '\n\n', '▁▁', '▁▁▁▁']),
    'bpe own': dict(model_type='bpe', **OWN),
    'bpe cased': dict(model_type='bpe', normalization_rule_name='nmt_nfkc_cf'),
}
NASTY = ['', ' ', '  a  b ', '\t\n', 'a\r\nb\r\n', '▁', '▁a ▁ ▁ ', ' \u2028\u0085\u00a0x', 'a\0b\x01c',
         '<s> </s> <unk>', '</s>', 'x</s><s>y', '<0x41><0x0A>', '<ctl>[MASK]', 'x<sep>y', '<sep> a', 'a <sep> b  <sep>',
         'self.self selfish', '<start_of_turn>user\n\n', '漢字 and 🙂🙂 emoji 👩‍👩‍👧', '½ ﬁ Ⅳ ａｂｃ ｶﾞｷﾞﾊﾟ', 'İstanbul ẞ ǅ',
         unicodedata.normalize('NFD', 'Tiếng Việt rất đẹp, naïve café, 한국어, Ω')]


@pytest.fixture(scope='module')
def text():
  """(lines to train on, documents)."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  documents = [p.read_text(encoding='utf-8') for p in sorted(root.glob('[a-d]*.py'))]
  return [line for d in documents for line in d.splitlines() if line.strip()][:6000], documents


@pytest.fixture(scope='module', params=MODELS)
def model(request, text, tmp_path_factory):
  """(SentencePiece's processor, the tokenizer made of the same file)."""
  path = tmp_path_factory.mktemp('model') / 'own.model'
  with open(path, 'wb') as f:
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text[0]), model_writer=f, vocab_size=1000, num_threads=1,
                                   hard_vocab_limit=False, minloglevel=2, **MODELS[request.param])
  processor = spm.SentencePieceProcessor(model_file=str(path))
  processor.is_unigram = request.param.startswith('unigram')
  return processor, tokenizers.resolve(str(path))


def differences(model, texts):
  """Texts whose ids differ, but for segmentations that are equally good.

  SentencePiece adds scores up in float32 from the beginning of the text, so which of two equal ones it takes, "==" "="
  or "=" "==", follows its rounding; the tokenizers library adds in float64.
  """
  processor, tokenizer = model
  score = lambda ids: sum(processor.get_score(i) for i in ids)
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    wanted, ids = processor.encode(text), ids.tolist()
    assert tokenizer.encode(text) == ids
    if wanted != ids and not (processor.is_unigram and abs(score(wanted) - score(ids)) < 1e-5 * abs(score(ids))):
      yield text, [processor.id_to_piece(i) for i in wanted], [tokenizer.backend.id_to_token(i) for i in ids]


def test_lines_of_real_text_have_the_same_ids(model, text):
  assert not list(differences(model, sorted({line for d in text[1][::4] for line in d.splitlines()})))


def test_whole_documents_have_the_same_ids(model, text):
  assert not list(differences(model, [d for d in text[1] if len(d) < 20_000]))


def test_unusual_text_has_the_same_ids(model):
  assert not list(differences(model, NASTY))


def test_no_text_makes_a_control_piece(model):
  processor, tokenizer = model
  for text in NASTY:
    assert not any(processor.is_control(i) for i in tokenizer.encode(text)), text


def test_ids_become_the_same_text(model, text):
  processor, tokenizer = model
  for line in text[0][::20] + NASTY:
    ids = processor.encode(line)
    if processor.unk_id() not in ids:
      assert tokenizer.decode(ids) == processor.decode(ids)


def test_saving_as_tokenizer_json_keeps_everything(model, text, tmp_path):
  _, tokenizer = model
  tokenizer.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert (loaded.digest, loaded.vocab) == (tokenizer.digest, tokenizer.vocab)
  lines = text[0][::7] + NASTY
  assert [i.tolist() for i in loaded.encode_batch(lines)] == [i.tolist() for i in tokenizer.encode_batch(lines)]


def test_roles_are_the_models_own(model):
  processor, tokenizer = model
  vocab = tokenizer.vocab
  assert (vocab.size, vocab.bos, vocab.eos, vocab.unk) == (len(processor), 1, 2, 0)
  assert vocab.pad == (3 if processor.pad_id() == 3 else None)
  for role, piece in (('sep', '<sep>'), ('mask', '[MASK]')):
    found = processor.piece_to_id(piece)
    assert getattr(vocab, role) == (None if found == processor.unk_id() else found)


def test_a_store_is_made_with_it(text, tmp_path):
  config, texts = corpus(tmp_path, 20)
  with open(tmp_path / 'x.model', 'wb') as f:
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts * 20), model_writer=f, vocab_size=60, num_threads=1,
                                   hard_vocab_limit=False, minloglevel=2)
  processor = spm.SentencePieceProcessor(model_file=str(tmp_path / 'x.model'))
  config.data.tokenizer = str(tmp_path / 'x.model')
  assert tokens_of(config) == [[1, *processor.encode(t), 2] for t in texts]


def test_what_is_no_such_model_is_one_clear_line(text, tmp_path, monkeypatch):
  with pytest.raises(JaxlmError, match='Wanted a tokenizer.json.* got .*no.model'):
    tokenizers.resolve('no.model')
  for content in (b'', b'{"model": 1}' * 9, b'\x0a\x05abc'):
    (tmp_path / 'x.model').write_bytes(content)
    with pytest.raises(JaxlmError, match='x.model is no SentencePiece model, or is damaged; '):
      tokenizers.resolve(str(tmp_path / 'x.model'))
  with open(tmp_path / 'x.model', 'wb') as f:
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text[0][:500]), model_writer=f, vocab_size=90,
                                   hard_vocab_limit=False, minloglevel=2, model_type='char')
  with pytest.raises(JaxlmError, match='of characters or words, neither unigram nor BPE, which jaxlm cannot reproduce'):
    tokenizers.resolve(str(tmp_path / 'x.model'))
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  with pytest.raises(JaxlmError, match='needs the packages sentencepiece and protobuf: pip install'):
    tokenizers.resolve(str(tmp_path / 'x.model'))
