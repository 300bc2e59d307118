"""Parquet, saved datasets and ArrayRecord, written by their own libraries: the same documents as JSON Lines."""
import json

import numpy as np
import pytest
from corpora import corpus, restarts_anywhere, tokens_of

from jaxlm import config as configs
from jaxlm.data import sources, store, tables
from jaxlm.errors import JaxlmError

pyarrow = pytest.importorskip('pyarrow')
import pyarrow.ipc
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(store, 'SHARD_BYTES', 2000)
  monkeypatch.setattr(tables, 'ROWS', 4)


def write_parquet(folder, column, name='text'):
  """Two files, of several row groups."""
  half = len(column) // 2
  for n, part in enumerate((column[:half], column[half:])):
    pyarrow.parquet.write_table(pyarrow.table({'id': pyarrow.array(range(len(part))), name: part}),
                                folder / f'{n}.parquet', row_group_size=7)
  return str(folder / '*.parquet')


def write_dataset(folder, column, name='text'):
  """As `datasets.Dataset.save_to_disk(folder, num_shards=2)` does (5.2.0)."""
  half, files = len(column) // 2, []
  folder.mkdir(exist_ok=True)
  for n, part in enumerate((column[:half], column[half:])):
    files.append(f'data-{n:05d}-of-00002.arrow')
    table = pyarrow.table({'id': pyarrow.array(range(len(part))), name: part})
    with pyarrow.ipc.new_stream(folder / files[-1], table.schema) as stream:
      stream.write_table(table, 9)
  (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': f} for f in files], '_split': None}))
  (folder / 'dataset_info.json').write_text('{}')
  return str(folder)


def write_records(folder, column, name='text'):
  writer = ArrayRecordWriter(str(folder / 'a.arrayrecord'), 'group_size:1')
  for value in column.to_pylist():
    writer.write(json.dumps({name: value}).encode())
  writer.close()
  return str(folder / '*.arrayrecord')


WRITE = {'parquet': write_parquet, 'hf_dataset': write_dataset, 'arrayrecord': write_records}


def _made(tmp_path, source, column, **changes):
  """A config that reads the column from such files, without any held-out documents."""
  (tmp_path / 'files').mkdir(exist_ok=True)
  config = configs.default()
  config.data.update(source=source, paths=WRITE[source](tmp_path / 'files', column, **changes),
                     store=str(tmp_path / 'stores'))
  return config


@pytest.mark.parametrize('kind', ['string', 'large_string', 'binary'])
@pytest.mark.parametrize('source', WRITE)
def test_the_tokens_are_those_of_the_same_documents_as_json_lines(source, kind, tmp_path):
  if source == 'arrayrecord' and kind != 'string':
    return
  config, texts = corpus(tmp_path)
  column = pyarrow.array([t.encode() if kind == 'binary' else t for t in texts], getattr(pyarrow, kind)())
  made = _made(tmp_path, source, column)
  made.data.holdout = config.data.holdout
  assert tokens_of(made) == tokens_of(config)
  (ours,), (lines,) = store.prepare(made).stores, store.prepare(config).stores
  np.testing.assert_array_equal(ours.heldout, lines.heldout)
  assert ours.text(int(ours.heldout[0])) == lines.text(int(lines.heldout[0]))
  assert ours.manifest['shards'] > 3 and ours.manifest['unit'] in ('row', 'record')


@pytest.mark.parametrize('source', WRITE)
def test_places_are_exact_and_reading_restarts_anywhere(source, tmp_path):
  texts = [f'text {i} ' * (i % 5) for i in range(41)]  # some are empty
  column = pyarrow.array(texts if source == 'arrayrecord' else [t or None for t in texts], pyarrow.string())
  config = _made(tmp_path, source, column)
  made = sources.make(config.data, source, config.data.paths)
  documents = list(made.documents())
  assert [d.text for d in documents] == [t for t in texts if t]
  half = 20 if len(made.paths) == 2 else 0
  assert [d.offset + d.file * half for d in documents] == [i for i, t in enumerate(texts) if t]
  assert all(d.size == len(d.text.encode()) for d in documents)
  assert restarts_anywhere(made)


@pytest.mark.parametrize('source', WRITE)
def test_lists_of_ids_are_tokens_that_nobody_makes_again(source, tmp_path, monkeypatch):
  ids = [np.random.default_rng(i).integers(0, 256, i % 30 + 1).tolist() for i in range(50)]
  ids[3], ids[4] = [256, 1, 2, 256], [5, 256, 256]  # ends are added by the config, inner ones stay
  config = _made(tmp_path, source, pyarrow.array(ids, pyarrow.list_(pyarrow.int32())), name='input_ids')
  config.data.update(text_field='input_ids', holdout=0.2)
  monkeypatch.setattr('jaxlm.data.tokenizers.Tokenizer.encode_batch', None)
  ids[3], ids[4] = [1, 2], [5, 256]
  assert tokens_of(config) == [[256, *i, 256] for i in ids]
  assert restarts_anywhere(sources.make(config.data, source, config.data.paths), bos=256, eos=256)
  (s,), tokenizer = store.prepare(config)
  assert len(s.heldout) and s.text(int(s.heldout[0])) == tokenizer.decode(ids[s.heldout[0]], skip_special=False)
  assert s.manifest['heldout_bytes'] == s.manifest['text_bytes'] > 0


def test_splits_of_a_saved_dict_are_chosen_by_name(tmp_path):
  for split, texts in (('train', ['one', 'two']), ('test', ['three', 'four'])):
    (tmp_path / 'd').mkdir(exist_ok=True)
    write_dataset(tmp_path / 'd' / split, pyarrow.array(texts))
  (tmp_path / 'd' / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  data = configs.default().data
  read = lambda: [d.text for d in sources.make(data, 'hf_dataset', str(tmp_path / 'd')).documents()]
  assert read() == ['one', 'two']
  data.split = 'test'
  assert read() == ['three', 'four']
  data.split = 'tset'
  with pytest.raises(JaxlmError, match="d has no split 'tset'; it has 'train', 'test'. Set config.data.split. Did you "
                                       "mean 'test'"):
    read()


def test_records_may_be_text_themselves(tmp_path):
  writer = ArrayRecordWriter(str(tmp_path / 'a'), 'group_size:1')
  for text in ('{"text": 1}', 'zwölf'):
    writer.write(text.encode())
  writer.close()
  data = configs.default().data
  data.text_field = ''
  source = sources.make(data, 'arrayrecord', str(tmp_path / 'a'))
  assert [d.text for d in source.documents()] == ['{"text": 1}', 'zwölf'] and restarts_anywhere(source)
  (tmp_path / 'b').mkdir()
  writer = ArrayRecordWriter(str(tmp_path / 'b' / 'c'), 'group_size:1')
  writer.write('zwölf'.encode())
  writer.close()
  data.text_field = 'text'
  with pytest.raises(JaxlmError, match="c: record 0: wanted a JSON object with the field 'text'; if records are text"):
    sources.make(data, 'arrayrecord', str(tmp_path / 'b' / '*'))


@pytest.mark.parametrize('source', WRITE)
def test_a_wrong_column_is_named_with_the_nearest(source, tmp_path):
  config = _made(tmp_path, source, pyarrow.array(['a', 'b']), name='content')
  config.data.text_field = 'contents'
  with pytest.raises(JaxlmError, match="'contents'; it has .*'content'. Set config.data.text_field. Did you mean "
                                       "'content'"):
    sources.make(config.data, source, config.data.paths)


@pytest.mark.parametrize('source', WRITE)
def test_a_column_of_another_type_is_refused(source, tmp_path):
  config = _made(tmp_path, source, pyarrow.array([1.5, 2.5]))
  with pytest.raises(JaxlmError, match="'text'.* wants text"):
    sources.make(config.data, source, config.data.paths)


@pytest.mark.parametrize('source, harm', [*((s, h) for s in WRITE for h in ('cut', 'other', 'empty')),
                                          ('arrayrecord', 'flip')])  # the others have no checksums of their own
def test_damaged_files_are_one_clear_line(source, harm, tmp_path):
  config = _made(tmp_path, source, pyarrow.array([f'some text {i} ' * 20 for i in range(60)]))
  path = sorted(p for p in (tmp_path / 'files').iterdir() if p.suffix != '.json')[-1]
  data = bytearray(path.read_bytes())
  if harm == 'flip':
    data[500] ^= 128
  path.write_bytes(dict(cut=data[:-300], other=b'something else ' * 99, empty=b'', flip=data)[harm])
  with pytest.raises(JaxlmError, match=f'{path.name}.*(is no|damaged)'):
    list(sources.make(config.data, source, config.data.paths).documents())


def test_a_folder_that_is_no_saved_dataset_is_refused(tmp_path):
  data = configs.default().data
  with pytest.raises(JaxlmError, match='is no saved dataset: it has neither state.json nor'):
    sources.make(data, 'hf_dataset', str(tmp_path))
  write_dataset(tmp_path / 'd', pyarrow.array(['a', 'b']))
  (tmp_path / 'd' / 'data-00001-of-00002.arrow').unlink()
  with pytest.raises(JaxlmError, match='state.json lists data-00001-of-00002.arrow, which is not there'):
    sources.make(data, 'hf_dataset', str(tmp_path / 'd'))


def test_a_row_group_is_never_in_memory_whole(tmp_path):
  rng = np.random.default_rng(0)
  texts = [rng.integers(32, 126, 4000, np.uint8).tobytes().decode() for _ in range(10_000)]
  pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), tmp_path / 'a.parquet', row_group_size=10_000)
  before, most = pyarrow.total_allocated_bytes(), 0
  for number, _ in enumerate(sources.make(configs.default().data, 'parquet', str(tmp_path / '*')).documents()):
    if number % 100 == 0:
      most = max(most, pyarrow.total_allocated_bytes() - before)
  assert most < 2e7  # of 40 MB; measured 9.3, of which most are the writer's first pages


def test_text_and_tokens_are_not_mixed_in_one_source(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table(dict(text=['a'])), tmp_path / '0.parquet')
  pyarrow.parquet.write_table(pyarrow.table(dict(text=[[1, 2]])), tmp_path / '1.parquet')
  with pytest.raises(JaxlmError, match="1.parquet: 'text' holds tokens, but text in the first file"):
    list(sources.make(configs.default().data, 'parquet', str(tmp_path / '*')).documents())


def test_a_row_that_is_no_utf8_is_named(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table(dict(text=pyarrow.array([b'fine', b'caf\xe9']))), tmp_path / '0.parquet')
  with pytest.raises(JaxlmError, match='0.parquet: not UTF-8 in row 1'):
    list(sources.make(configs.default().data, 'parquet', str(tmp_path / '*')).documents())
