"""Tokenizers: round trips, special tokens that stay text, files of other projects."""
import json

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, trainers

from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError

CORPUS = ['def f(x):\n    if x:\n        return "naïve"\n\n\nclass A:\n    pass\n',
          'The quick brown fox, 123456 times.\r\n',
          'tabs\tand  spaces   \n\n\n  漢字 and 🙂 emoji', "it's they'll I'd <|endoftext|> <|pad|> [UNK]"] * 5
NASTY = [*CORPUS, '', ' ', '\n', '\0', '<|endoftext|>', 'a<|pad|>b', '\u2028\u0085 \u00a0x', '𐍈' * 3, 'e\u0301']


@pytest.fixture(scope='module', params=['bytes', 'bpe', 'unigram', 'wordpiece'])
def tokenizer(request):
  return tokenizers.resolve(request.param) or tokenizers.train(request.param, CORPUS, 400)


def test_text_comes_back_whole(tokenizer):
  if tokenizer.name == 'wordpiece':
    assert tokenizer.decode(tokenizer.encode('The quick fox')) == 'The quick fox'
    return
  for text in NASTY:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
  for text, ids in zip(NASTY, tokenizer.encode_batch(NASTY)):
    assert ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text)


def test_special_tokens_in_a_document_are_text(tokenizer):
  special = {i for i in (tokenizer.vocab.bos, tokenizer.vocab.eos, tokenizer.vocab.pad) if i is not None}
  for text in NASTY:
    assert not special & set(tokenizer.encode(text)), text


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert (loaded.digest, loaded.vocab) == (tokenizer.digest, tokenizer.vocab)
  assert tokenizers.load(tmp_path / 'tokenizer.json').digest == tokenizer.digest
  assert all(loaded.encode(text) == tokenizer.encode(text) for text in NASTY)


@pytest.mark.parametrize('name', ['bpe', 'unigram', 'wordpiece'])
def test_training_twice_gives_the_same_tokenizer(name):
  assert tokenizers.train(name, iter(CORPUS), 350).digest == tokenizers.train(name, CORPUS, 350).digest


def test_bytes_are_bytes():
  tokenizer = tokenizers.bytes_tokenizer()
  assert tokenizer.encode('é\n') == list('é\n'.encode())
  assert tokenizer.vocab == tokenizers.Vocab(size=258, bos=256, eos=256, pad=257)
  assert tokenizer.backend.encode('é<|endoftext|>').ids == list('é<|endoftext|>'.encode())  # the file says the same
  assert tokenizer.decode([104, 105, 256]) == 'hi'
  assert tokenizer.decode([104, 105, 256], skip_special=False) == 'hi<|endoftext|>'


def test_indentation_joins_the_line_break_before_it():
  tokenizer = tokenizers.train('bpe', ['if x:\n        return y\n' * 50], 300)
  assert len(tokenizer.encode(':\n        ')) == 1


def _llama(folder):
  """A tokenizer.json built as Llama 2's is, with a template, truncation and padding that must not matter."""
  backend = hf.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(' ', 1, 0)])
  bytes_ = [f'<0x{b:02X}>' for b in range(256)]
  backend.train_from_iterator(['hello world, this is text'] * 9, trainers.BpeTrainer(
      vocab_size=300, special_tokens=['<unk>', '<s>', '</s>', *bytes_], show_progress=False))
  definition = json.loads(backend.to_str())  # byte pieces are no special tokens
  definition['added_tokens'] = definition['added_tokens'][:3]
  backend = hf.Tokenizer.from_str(json.dumps(definition))
  backend.post_processor = hf.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  backend.enable_truncation(3)
  backend.enable_padding()
  folder.mkdir()
  backend.save(str(folder / 'tokenizer.json'))


def test_llama_files_are_read_without_their_template(tmp_path):
  _llama(tmp_path / 'llama')
  (tmp_path / 'llama' / 'tokenizer_config.json').write_text(json.dumps(
      dict(bos_token={'content': '<s>', '__type': 'AddedToken'}, eos_token='</s>', unk_token='<unk>', pad_token=None)))
  tokenizer = tokenizers.load(tmp_path / 'llama')
  assert (tokenizer.vocab.bos, tokenizer.vocab.eos, tokenizer.vocab.unk, tokenizer.vocab.pad) == (1, 2, 0, None)
  ids = tokenizer.encode('hello world, é </s>')
  assert len(ids) > 3 and not {1, 2} & set(ids)
  assert tokenizer.decode(ids) == 'hello world, é </s>'
  assert [i.tolist() for i in tokenizer.encode_batch(['hello', 'hello world'])] == [tokenizer.encode('hello'),
                                                                                 tokenizer.encode('hello world')]


def test_roles_come_from_config_json_where_nothing_else_tells(tmp_path):
  _llama(tmp_path / 'llama')
  (tmp_path / 'llama' / 'config.json').write_text(json.dumps(dict(bos_token_id=1, eos_token_id=[2, 1])))
  vocab = tokenizers.load(tmp_path / 'llama').vocab
  assert (vocab.bos, vocab.eos) == (1, 2)


def test_roles_of_a_bare_file_come_from_wellknown_names(tmp_path):
  _llama(tmp_path / 'llama')
  assert (tokenizers.load(tmp_path / 'llama' / 'tokenizer.json').vocab.eos) == 2


@pytest.mark.parametrize('name, message', [
    ('bep', "Unknown tokenizer 'bep'. Known: bytes, bpe, unigram, wordpiece; .* Did you mean 'bpe'"),
    ('no/such/tokenizer.json', 'Wanted a tokenizer.json, a folder that holds one, or a SentencePiece'),
])
def test_a_tokenizer_that_does_not_exist_is_one_clear_line(name, message):
  with pytest.raises(JaxlmError, match=message):
    tokenizers.resolve(name)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"model": 1}')
  with pytest.raises(JaxlmError, match='is not a tokenizer.json that the tokenizers library can read'):
    tokenizers.load(tmp_path)


def test_a_prompt_that_ends_in_a_space_leaves_it_to_the_first_new_piece():
  tokenizer = tokenizers.train('bpe', ['def f(x): return x\nclass A: pass\n' * 20], 300)
  ids, first = tokenizer.encode_prompt('def ')
  assert ids == tokenizer.encode('def') and all(tokenizer.decode([i]).startswith(' ') for i in np.flatnonzero(first))
  for text in ('def', 'def  ', ' ', ''):
    assert tokenizer.encode_prompt(text) == (tokenizer.encode(text), None)
  assert tokenizers.bytes_tokenizer().encode_prompt('def ') == (list(b'def '), None)


# ---- roles of objectives -----------------------------------------------------------------------------------------

ASKED = ['mask', 'cls', 'gmask', 'sop', 'fim_prefix', 'mode_x', 'sentinel_0', 'sentinel_1']


def test_roles_are_added_behind_the_vocabulary_and_text_is_encoded_as_before(tokenizer):
  more = tokenizer.with_roles(ASKED)
  assert [more.vocab.id(role) for role in ASKED] == list(range(tokenizer.vocab.size, tokenizer.vocab.size + len(ASKED)))
  assert more.vocab.size == tokenizer.vocab.size + len(ASKED) and more.with_roles(ASKED) is more
  assert (more.vocab.bos, more.vocab.eos, more.vocab.pad) == (tokenizer.vocab.bos, tokenizer.vocab.eos,
                                                              tokenizer.vocab.pad)
  assert all(more.encode(text) == tokenizer.encode(text) for text in [*NASTY, '<extra_id_0> [MASK] <sop>'])


def test_names_of_special_tokens_are_read_where_they_are_asked_for(tokenizer):
  more = tokenizer.with_roles(['mask'])
  mask = more.vocab.mask
  found = more.encode('def[MASK]return', special=True)
  assert found.count(mask) == 1 and more.decode(found[:found.index(mask)]).strip() == 'def'
  assert mask in more.encode_prompt('a [MASK] b ', special=True)[0]
  assert mask not in more.encode('def[MASK]return') and mask not in more.encode_prompt('a [MASK] b ')[0]


def test_added_roles_are_saved_and_found_again(tokenizer, tmp_path):
  more = tokenizer.with_roles(ASKED)
  more.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert (loaded.digest, loaded.vocab) == (more.digest, more.vocab)
  assert more.digest != tokenizer.digest and loaded.with_roles(ASKED) is loaded
  assert tokenizer.with_roles(['sentinel_0']).vocab.others == {'sentinel_0': tokenizer.vocab.size}


def test_a_role_nobody_has_is_told():
  with pytest.raises(JaxlmError, match="The tokenizer has no gmask token, which config.objective.name asks for"):
    tokenizers.bytes_tokenizer().vocab.id('gmask')


def test_what_a_decoder_reads_first_comes_from_config_json_or_is_padding(tmp_path):
  tokenizer = tokenizers.bytes_tokenizer()
  assert tokenizer.vocab.decoder_start == tokenizer.vocab.pad
  tokenizer.save(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(dict(decoder_start_token_id=256)))
  loaded = tokenizers.load(tmp_path)
  assert loaded.vocab.decoder_start == 256 and loaded.digest == tokenizer.digest
  loaded.save(tmp_path / 'again')
  assert tokenizers.load(tmp_path / 'again').vocab.decoder_start == 256


def test_documents_of_bert_begin_with_cls_and_end_with_sep():
  vocab = tokenizers.Vocab(10, cls=1, sep=2)
  assert (vocab.first, vocab.last) == (1, 2)
  vocab = tokenizers.Vocab(10, bos=3, eos=4, cls=1, sep=2)
  assert (vocab.first, vocab.last) == (3, 4)
