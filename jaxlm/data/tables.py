"""Documents in records: Parquet, saved Hugging Face datasets, ArrayRecord; text, or lists of token ids."""
import contextlib
import functools
import json
import os
from typing import Any, Iterator

import numpy as np

from jaxlm.data.files import CHUNK, Source, json_field, matching, named
from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest

ROWS = 256  # rows of a table decoded at once
REMEDY = 'restore it, or leave it out of config.data.paths.'

Rows = Iterator[tuple[str | np.ndarray, int, int]]


# ---- columns -----------------------------------------------------------------------------------------------------


def _arrow(what: str):
  """pyarrow, with the parts that are used."""
  try:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError as e:
    raise JaxlmError(f'{what} needs the package pyarrow: pip install pyarrow, or jaxlm[tables].') from e
  return pyarrow


@contextlib.contextmanager
def _named_faults(path: str, kind: str) -> Iterator[None]:
  """What pyarrow says of a file that is damaged, in a line."""
  pyarrow = _arrow(path)
  try:
    yield
  except (pyarrow.ArrowException, OSError) as e:
    if isinstance(e, OSError) and e.errno is not None:
      raise
    told = ' '.join(str(e).split()).partition('. ')[0][:200].rstrip('.')
    raise JaxlmError(f'{path} is no {kind}, or is damaged: {told}; {REMEDY}') from e


def _kind_of(schema, field: str, path: str) -> str:
  """'text' or 'tokens', by the type of a column.

  Raises:
    JaxlmError: no such column, or neither.
  """
  if schema.names.count(field) != 1:
    what = 'no column' if field not in schema.names else 'more than one column'
    raise JaxlmError(f'{path}: {what} {field!r}; it has {", ".join(map(repr, schema.names[:12])) or "none"}. Set '
                     f'config.data.text_field.{nearest(field, schema.names)}')
  types, kind = _arrow(path).types, schema.field(field).type
  kind = kind.value_type if types.is_dictionary(kind) else kind
  for is_text in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                  types.is_large_binary):
    if is_text(kind):
      return 'text'
  if (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)) and types.is_integer(
      kind.value_type):
    return 'tokens'
  raise JaxlmError(f'{path}: column {field!r} wants text, or lists of token ids, got {kind}. Set '
                   'config.data.text_field.')


def _text_rows(column, path: str, row: int) -> Iterator[str]:
  """The texts of a column; '' where there is none."""
  try:
    for value in column.to_pylist():
      yield value.decode('utf-8') if isinstance(value, bytes) else value or ''
      row += 1
  except UnicodeDecodeError as e:
    raise JaxlmError(f'{path}: not UTF-8 in row {row} or soon after ({e.reason}); mend it, or leave the file out of '
                     'config.data.paths.') from e


def _token_rows(column, path: str, row: int) -> Iterator[np.ndarray]:
  """The ids of each row."""
  import pyarrow.compute
  lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
  flat = column.flatten()
  if flat.null_count:
    raise JaxlmError(f'{path}: rows {row} to {row + len(column) - 1} hold a token id that is null; mend or remove it.')
  yield from np.split(flat.to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1]) if len(column) else ()


ROWS_OF = {'text': _text_rows, 'tokens': _token_rows}


def _rows(batches: Iterator[Any], path: str, row: int, offset: int, kind: str) -> Rows:
  """Rows from `offset` on of one column's batches; `row` is the first one's number."""
  for column in batches:
    left_out = min(max(offset - row, 0), len(column))
    row, column = row + left_out, column.slice(left_out)
    for value in ROWS_OF[kind](column, path, row):
      yield value, row, row + 1
      row += 1


# ---- Parquet -----------------------------------------------------------------------------------------------------


def _open_parquet(path: str):
  pyarrow = _arrow(path)
  with _named_faults(path, 'Parquet file'):
    # Buffered ahead, a row group of 400 MB is in memory whole; without, 14 MB are.
    return pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True)


def _parquet_rows(path: str, offset: int, field: str, kind: str, eos: int | None = None) -> Rows:
  """The column's rows; row groups before the offset are not read, the others a part at a time."""
  del eos  # each row is a document already
  with _open_parquet(path) as file:
    found = _kind_of(file.schema_arrow, field, path)
    _same_kind(found, kind, field, path)
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    begins = np.cumsum([0, *sizes]).tolist()
    groups = [g for g in range(len(sizes)) if begins[g + 1] > offset]
    with _named_faults(path, 'Parquet file'):
      for group in groups:
        batches = file.iter_batches(ROWS, row_groups=[group], columns=[field])
        yield from _rows((batch.column(0) for batch in batches), path, begins[group], offset, kind)


def _same_kind(found: str, kind: str, field: str, path: str) -> None:
  if found != kind:
    raise JaxlmError(f'{path}: {field!r} holds {found}, but {kind} in the first file; give them as two sources of '
                     'config.data.mixture.')


def parquet(data, paths: str) -> Source:
  """Parquet files: a row a document, in the column `config.data.text_field`: text, or a list of token ids.

  Rows that are null are no documents.
  """
  names, files = named(matching(paths))
  with _open_parquet(files[0]) as first:
    kind = _kind_of(first.schema_arrow, data.text_field, files[0])
  read = functools.partial(_parquet_rows, field=data.text_field, kind=kind)
  return Source('parquet', names, files, read, 'row', kind == 'tokens')


def parquet_records(paths: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(file:row, all columns of it) of each row of Parquet files."""
  del split
  for path in matching(paths, key='files of a task'):
    with _open_parquet(path) as file, _named_faults(path, 'Parquet file'):
      yield from _numbered(path, file.iter_batches(ROWS))


def _numbered(path: str, batches: Iterator[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  rows = (record for batch in batches for record in batch.to_pylist())
  return ((f'{path}:{number}', record) for number, record in enumerate(rows, 1))


# ---- saved Hugging Face datasets ---------------------------------------------------------------------------------

STREAM_END = b'\xff\xff\xff\xff\0\0\0\0'


def _read_json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding='utf-8') as f:
      content = json.load(f)
  except ValueError as e:
    raise JaxlmError(f'{path} is not JSON ({e}); save the dataset again.') from e
  return content if isinstance(content, dict) else {}


def _arrow_files(folder: str, split: str) -> list[str]:
  """The files of a folder that `datasets` saved; of a dict of datasets, those of the split."""
  if os.path.exists(os.path.join(folder, 'dataset_dict.json')):
    splits = _read_json(os.path.join(folder, 'dataset_dict.json')).get('splits', [])
    if split not in splits:
      raise JaxlmError(f'{folder} has no split {split!r}; it has {", ".join(map(repr, splits)) or "none"}. Set '
                       f'config.data.split.{nearest(split, splits)}')
    folder = os.path.join(folder, split)
  state = os.path.join(folder, 'state.json')
  if not os.path.exists(state):
    raise JaxlmError(f'{folder} is no saved dataset: it has neither state.json nor dataset_dict.json; write it with '
                     "the datasets package's save_to_disk, or set config.data.source to what its files are.")
  content = _read_json(state)
  if content.get('_indices_data_files') or content.get('_indices_files'):
    raise JaxlmError(f'{folder} keeps its rows in another order than its files do; save it again with '
                     'flatten_indices().')
  files = [os.path.join(folder, os.path.basename(str(f.get('filename')))) for f in content.get('_data_files') or []]
  for file in files:
    if not os.path.isfile(file):
      raise JaxlmError(f'{folder}: state.json lists {os.path.basename(file)}, which is not there; restore it.')
  if not files:
    raise JaxlmError(f'{folder}: state.json lists no files; save the dataset again.')
  return files


@contextlib.contextmanager
def _open_stream(path: str):
  """An Arrow stream, as `datasets` writes them. A file cut between two of its messages reads as a shorter one."""
  pyarrow = _arrow(path)
  with _named_faults(path, 'Arrow stream'):
    with pyarrow.memory_map(path) as file:
      file.seek(max(file.size() - len(STREAM_END), 0))
      if file.read() != STREAM_END:
        raise JaxlmError(f'{path} is no Arrow stream, or is damaged: it lacks the mark at its end; {REMEDY}')
      file.seek(0)
      with pyarrow.ipc.open_stream(file) as stream:
        yield stream


def _stream_rows(path: str, offset: int, field: str, kind: str, eos: int | None = None) -> Rows:
  del eos
  with _open_stream(path) as stream:
    _same_kind(_kind_of(stream.schema, field, path), kind, field, path)
    row = 0
    for batch in stream:
      if row + len(batch) > offset:
        column = batch.column(batch.schema.names.index(field))
        column.validate(full=True)
        yield from _rows((column.slice(i, ROWS) for i in range(0, len(column), ROWS)), path, row, offset, kind)
      row += len(batch)


def hf_dataset(data, paths: str) -> Source:
  """Folders that the datasets package's save_to_disk wrote; of a dict of splits, `config.data.split`.

  Rows are documents: the column `config.data.text_field`, text or a list of token ids. Null ones are none.
  """
  folders = matching(paths, os.path.isdir)
  names, files = named([file for folder in folders for file in _arrow_files(folder, data.split)])
  with _open_stream(files[0]) as first:
    kind = _kind_of(first.schema, data.text_field, files[0])
  read = functools.partial(_stream_rows, field=data.text_field, kind=kind)
  return Source('hf_dataset', names, files, read, 'row', kind == 'tokens')


def hf_records(paths: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(file:row, all columns of it) of each row of folders that save_to_disk wrote; of a dict of splits, of this one."""
  for folder in matching(paths, os.path.isdir, 'files of a task'):
    for path in _arrow_files(folder, split):
      with _open_stream(path) as stream:
        yield from _numbered(path, stream)


# ---- ArrayRecord -------------------------------------------------------------------------------------------------


def _records(path: str, offset: int) -> Iterator[bytes]:
  try:
    from array_record.python.array_record_module import ArrayRecordReader
  except ImportError as e:
    raise JaxlmError(f'{path} needs the package array_record: pip install array-record.') from e
  reader, number = ArrayRecordReader(path), offset
  try:
    count = reader.num_records()
    if reader.ok() and offset < count:
      reader.seek(offset)
      for number in range(offset, count):
        yield reader.read()
    reader.close()  # says what was wrong
  except (RuntimeError, ValueError, IndexError) as e:
    told = ' '.join(str(e).split())[:200].rstrip('.')
    raise JaxlmError(f'{path} is no ArrayRecord file, or is damaged after record {number}: {told}; {REMEDY}') from e


def _record_value(data: bytes, field: str, path: str, number: int) -> str | np.ndarray:
  """A record's document: its field, or all of it where `config.data.text_field` is ''."""
  fault = lambda what: JaxlmError(f'{path}: record {number}: {what}')
  if field:
    if not data.lstrip().startswith(b'{'):
      raise fault(f'wanted a JSON object with the field {field!r}; if records are text themselves, set '
                  "config.data.text_field=''.")
    return json_field(data, field, fault)
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise fault(f'not UTF-8 at byte {e.start}; mend it, or leave the file out of config.data.paths.') from e


def _kind(value: str | np.ndarray) -> str:
  return 'text' if isinstance(value, str) else 'tokens'


def _record_rows(path: str, offset: int, field: str, kind: str, eos: int | None = None) -> Rows:
  del eos
  for number, data in enumerate(_records(path, offset), offset):
    value = _record_value(data, field, path, number)
    _same_kind(_kind(value), kind, field, f'{path}: record {number}')
    yield value, number, number + 1


def arrayrecord(data, paths: str) -> Source:
  """ArrayRecord files: records that are JSON objects, or UTF-8 text where `config.data.text_field` is ''.

  The field holds text or a list of token ids.
  """
  names, files = named(matching(paths))
  records = ((value, file) for file in files for value in _records(file, 0))
  first, file = next(records, (None, ''))
  kind = 'text' if first is None else _kind(_record_value(first, data.text_field, file, 0))
  read = functools.partial(_record_rows, field=data.text_field, kind=kind)
  return Source('arrayrecord', names, files, read, 'record', kind == 'tokens')
