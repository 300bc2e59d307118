"""Sources: order, provenance, restarts, and records that are wrong."""
import gzip
import json
import os

import pytest
import zstandard

from jaxlm import config as configs
from jaxlm.data import files, sources
from jaxlm.errors import JaxlmError

TEXTS = ['first', 'sécond\nline', 'third \ud83d\ude42'.encode('utf-16', 'surrogatepass').decode('utf-16')]


def _data(**changes):
  data = configs.default().data
  data.update(changes)
  return data


def _jsonl(path, texts=TEXTS):
  content = ''.join(json.dumps(dict(text=t)) + '\n' for t in texts).encode()
  if path.suffix == '.gz':
    content = gzip.compress(content)
  if path.suffix == '.zst':  # two frames, as parallel compressors write
    half = len(content) // 2
    content = b''.join(zstandard.compress(part) for part in (content[:half], content[half:]))
  path.write_bytes(content)
  return path


@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz', 'jsonl.zst'])
def test_json_lines_are_read_and_restart_anywhere(tmp_path, ending):
  _jsonl(tmp_path / f'a.{ending}')
  source = sources.make(_data(), 'jsonl', str(tmp_path / '*'))
  documents = list(source.documents())
  assert [d.text for d in documents] == TEXTS
  for i, document in enumerate(documents):
    assert list(source.documents(document.file, document.offset)) == documents[i:]


@pytest.mark.parametrize('document, expected', [
    ('file', ['one\ntwo\r\n\n  \nthree\n', 'four']),
    ('line', ['one', 'two', 'three', 'four']),
    ('paragraph', ['one\ntwo', 'three', 'four'])])
def test_text_documents_are_files_lines_or_paragraphs(tmp_path, document, expected):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'a.txt').write_bytes(b'one\ntwo\r\n\n  \nthree\n')
  (tmp_path / 'b' / 'c.txt').write_bytes(b'four')
  (tmp_path / 'b' / 'empty.txt').write_bytes(b'')
  source = sources.make(_data(document=document), 'text', str(tmp_path / '**' / '*.txt'))
  documents = list(source.documents())
  assert [d.text for d in documents] == expected and source.names == ('a.txt', 'b/c.txt', 'b/empty.txt')
  for i, d in enumerate(documents):
    raw = open(source.paths[d.file], 'rb').read()[d.offset:d.end].decode()
    assert raw.rstrip('\r\n') == d.text.rstrip('\r\n')  # provenance is exact
    assert list(source.documents(d.file, d.offset)) == documents[i:]


def test_stdlib_is_this_python_without_tests():
  source = sources.make(_data(), 'stdlib', '')
  assert 'json/decoder.py' in source.names and len(source.names) > 300
  assert not any('test' in n.split('/')[:-1] or 'site-packages' in n for n in source.names)
  assert list(source.names) == sorted(source.names)
  assert next(source.documents()).text


def test_the_digest_follows_content_and_names_not_places(tmp_path):
  for folder in ('x', 'y'):
    (tmp_path / folder).mkdir()
    _jsonl(tmp_path / folder / 'a.jsonl')
  digest = lambda folder: sources.make(_data(), 'jsonl', str(tmp_path / folder / '*')).digest(tmp_path / 'hashes')
  first = digest('x')
  assert digest('y') == first == digest('x')
  os.rename(tmp_path / 'y' / 'a.jsonl', tmp_path / 'y' / 'b.jsonl')
  assert digest('y') != first
  _jsonl(tmp_path / 'x' / 'a.jsonl', ['changed'])
  assert digest('x') != first


def test_an_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
  source = sources.make(_data(), 'jsonl', str(_jsonl(tmp_path / 'a.jsonl')))
  digest = source.digest(tmp_path / 'hashes')
  with open(tmp_path / 'hashes', 'a') as f:
    f.write('["torn li')
  monkeypatch.setattr(files.hashlib, 'file_digest', None)
  assert source.digest(tmp_path / 'hashes') == digest


@pytest.mark.parametrize('line, message', [
    (b'{"text": "x"', r'a.jsonl:3: not a line of JSON'),
    (b'\xff\xfe', r'a.jsonl:3: not a line of JSON'),
    (b'["text"]', r'a.jsonl:3: wanted a JSON object, got list'),
    (b'{"body": "x"}', r"a.jsonl:3: no field 'text'; it has 'body'. Set config.data.text_field"),
    (b'{"text": 7}', r"a.jsonl:3: field 'text' wants text, got int")])
def test_a_bad_record_is_named_with_file_and_line(tmp_path, line, message):
  path = _jsonl(tmp_path / 'a.jsonl', ['x'])
  path.write_bytes(path.read_bytes() + b'\n' + line + b'\n')  # the second line is blank
  source = sources.make(_data(), 'jsonl', str(path))
  with pytest.raises(JaxlmError, match=message):
    list(source.documents())


@pytest.mark.parametrize('ending', ['gz', 'zst'])
@pytest.mark.parametrize('harm', ['truncated', 'garbled'])
def test_damaged_compressed_files_are_named(tmp_path, ending, harm):
  path = _jsonl(tmp_path / f'a.jsonl.{ending}', ['some text ' * 50 + str(i) for i in range(500)])
  data = path.read_bytes()
  path.write_bytes(data[:-9] if harm == 'truncated' else b'garbage' + data[7:])
  with pytest.raises(JaxlmError, match='is damaged'):
    list(sources.make(_data(), 'jsonl', str(path)).documents())


def test_lone_surrogates_become_replacement_characters(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude42"}\n')
  assert next(sources.make(_data(), 'jsonl', str(tmp_path / 'a.jsonl')).documents()).text == 'a\ufffdb 🙂'


def test_text_that_is_no_utf8_is_named_with_its_line(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'fine\nna\xefve\n')
  with pytest.raises(JaxlmError, match='a.txt:2: not UTF-8 at byte 7'):
    list(sources.make(_data(), 'text', str(tmp_path / 'a.txt')).documents())


@pytest.mark.parametrize('source, paths, message', [
    ('text', 'no/such/*.txt', "'no/such/\\*.txt' matches no file"),
    ('text', '', 'config.data.paths is empty'),
    ('txet', 'x', "Unknown source 'txet'. Known: arrayrecord, fasta, .*Did you mean 'text'")])
def test_missing_files_are_one_clear_line(source, paths, message):
  with pytest.raises(JaxlmError, match=message):
    sources.make(_data(), source, paths)


FASTA = b'; comment\n>sp|P1|ONE first\nMKV\nLA A\n\n>two\n>three\nMMM\r\nKKK'


@pytest.mark.parametrize('ending', ['fasta', 'fasta.gz'])
def test_a_document_is_a_fasta_record_without_its_header(tmp_path, ending):
  path = tmp_path / f'a.{ending}'
  path.write_bytes(gzip.compress(FASTA) if ending.endswith('.gz') else FASTA)
  source = sources.make(_data(), 'fasta', str(path))
  documents = list(source.documents())
  assert [d.text for d in documents] == ['MKVLAA', 'MMMKKK']  # the second has a header alone
  assert [FASTA[d.offset:d.end] for d in documents] == [b'>sp|P1|ONE first\nMKV\nLA A\n\n', b'>three\nMMM\r\nKKK']
  for i, d in enumerate(documents):
    assert list(source.documents(d.file, d.offset)) == documents[i:]


def test_a_sequence_without_a_header_is_named(tmp_path):
  (tmp_path / 'a.fa').write_bytes(b'\nMKV\n>one\nM\n')
  with pytest.raises(JaxlmError, match='a.fa:2: a sequence without a header'):
    list(sources.make(_data(), 'fasta', str(tmp_path / 'a.fa')).documents())
