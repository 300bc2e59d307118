"""Files of tensors: what is written is what is read, bit for bit; files that lie are refused in one line."""
import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm import weights
from jaxlm.errors import JaxlmError

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def random(shape, dtype, seed=0):
  """Any bits, so also nan and infinity, which arithmetic would not keep."""
  dtype = np.dtype(dtype)
  raw = np.random.default_rng(seed).bytes(int(np.prod(shape, dtype=int)) * dtype.itemsize)
  return np.frombuffer(raw, dtype).reshape(shape)


ARRAYS = {'a.weight': random((5, 3), np.float32), 'b.weight': random((7,), np.float16, 1),
          'c.0.bias': random((2, 3, 4), ml_dtypes.bfloat16, 2), 'd.one': random((), np.float32, 3),
          'e.none': random((0, 4), np.float16, 4)}


def write(folder, arrays=ARRAYS, shard_bytes=10**9):
  folder.mkdir(exist_ok=True)
  weights.write_weights(folder, [weights.Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()],
                        shard_bytes)
  return folder


@pytest.mark.parametrize('shard_bytes', [10**9, 40, 1])
def test_what_is_written_is_what_is_read_bit_for_bit(shard_bytes, tmp_path):
  found = weights.read_weights(write(tmp_path / 'a', shard_bytes=shard_bytes))
  assert found.shapes == {name: x.shape for name, x in ARRAYS.items()}
  for name, x in ARRAYS.items():
    assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes()
  files = list((tmp_path / 'a').glob('*.safetensors'))
  assert len(files) == {10**9: 1, 40: 4, 1: 5}[shard_bytes]  # a file holds at least one tensor
  assert not list((tmp_path / 'a').glob('*.tmp'))


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
  write(tmp_path / 'a')
  theirs = safetensors.numpy.load_file(tmp_path / 'a' / weights.SINGLE)
  assert {name: x.tobytes() for name, x in theirs.items()} == {name: x.tobytes() for name, x in ARRAYS.items()}
  (tmp_path / 'b').mkdir()
  safetensors.numpy.save_file(dict(ARRAYS), tmp_path / 'b' / weights.SINGLE)
  ours = weights.read_weights(tmp_path / 'b')
  assert all(weights.same(ours[name], x) for name, x in ARRAYS.items())


def test_a_tensor_is_made_when_its_turn_comes_and_none_is_kept(tmp_path):
  alive, most = set(), []

  class Counted(np.ndarray):
    def __del__(self):
      alive.discard(id(self))

  def make():
    array = np.zeros((4, 4), np.float32).view(Counted)
    alive.add(id(array))
    most.append(len(alive))
    return array
  tensors = [weights.Tensor(f'x.{i}', (4, 4), np.dtype(np.float32), make) for i in range(8)]
  weights.write_weights(tmp_path, tensors, 10**9)
  assert len(most) == 8 and max(most) == 1


def test_files_of_the_hub_cache_are_links_and_are_followed(tmp_path):
  write(tmp_path / 'blobs')
  (tmp_path / 'snapshot').mkdir()
  (tmp_path / 'snapshot' / weights.SINGLE).symlink_to(tmp_path / 'blobs' / weights.SINGLE)
  assert set(weights.read_weights(tmp_path / 'snapshot')) == set(ARRAYS)


@pytest.mark.parametrize('a, b, equal', [
    (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True), (np.array([0.0]), np.array([-0.0]), False),
    (np.zeros(3), np.zeros(4), False), (np.zeros(3), np.zeros(3, np.float32), False)])
def test_same_compares_bits(a, b, equal):
  assert weights.same(a, b) is equal


def test_numbers_too_large_for_float16_are_refused():
  with pytest.raises(JaxlmError, match='Tensor w holds numbers beyond those of float16'):
    weights.cast(np.array([1.0, 7e4], np.float32), np.dtype(np.float16), 'w')
  kept = weights.cast(np.array([np.inf, 6e4], np.float32), np.dtype(np.float16), 'w')
  assert np.isinf(kept[0]) and np.isfinite(kept[1])


# ---- headers that lie --------------------------------------------------------------------------------------------


def changed(change):
  """A damage: the header, after `change` had its way with it."""
  def damage(raw):
    size, = struct.unpack('<Q', raw[:8])
    header = json.loads(raw[8:8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + raw[8 + size:]
  return damage


def twice(raw):
  """A header in which one name stands twice, with different places."""
  size, = struct.unpack('<Q', raw[:8])
  text = raw[8:8 + size].rstrip()[:-1] + b',"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  return struct.pack('<Q', len(text)) + text + raw[8 + size:]


DAMAGE = {
    'cut': lambda raw: raw[:-10], 'cut in the header': lambda raw: raw[:5], 'empty': lambda raw: b'',
    'bytes left over': lambda raw: raw + b'1234', 'no JSON': lambda raw: raw[:8] + b'[' + raw[9:],
    'absurd length of the header': lambda raw: struct.pack('<Q', 1 << 60) + raw[8:],
    'header longer than the file': lambda raw: struct.pack('<Q', len(raw)) + raw[8:],
    'no header': lambda raw: struct.pack('<Q', 0) + raw[8:],
    'a shape twice as large': changed(lambda h: h['a.weight'].update(shape=[10, 3])),
    'a shape that overflows': changed(lambda h: h['a.weight'].update(shape=[2**62, 2**62])),
    'a negative shape': changed(lambda h: h['a.weight'].update(shape=[-5, -3])),
    'a dtype of another size': changed(lambda h: h['a.weight'].update(dtype='F16')),
    'an unknown dtype': changed(lambda h: h['a.weight'].update(dtype='F33')),
    'overlapping tensors': changed(lambda h: h['c.0.bias'].update(data_offsets=h['b.weight']['data_offsets'])),
    'offsets beyond the file': changed(lambda h: h['a.weight'].update(data_offsets=[10**6, 10**6 + 60])),
    'offsets that run backwards': changed(lambda h: h['a.weight'].update(data_offsets=[60, 0])),
    'a hole': changed(lambda h: h.pop('b.weight')),
    'a tensor without offsets': changed(lambda h: h['a.weight'].pop('data_offsets')),
    'a tensor that is a number': changed(lambda h: h.update({'a.weight': 3})),
    'one name twice': twice,
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_files_are_refused_in_one_line(name, tmp_path):
  file = write(tmp_path / 'a') / weights.SINGLE
  file.write_bytes(DAMAGE[name](file.read_bytes()))
  with pytest.raises(JaxlmError, match='is no whole safetensors file') as error:
    weights.read_weights(tmp_path / 'a')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['../../etc/x', '/etc/passwd', 'C:\\x', 'a/b', 'a..b', '.hidden', '', 'a b', '*',
                                  'a\nb'])
def test_names_that_look_like_paths_are_refused(name, tmp_path):
  write(tmp_path / 'a', {name: np.zeros(2, np.float32)})
  with pytest.raises(JaxlmError, match='which is no name of a parameter') as error:
    weights.read_weights(tmp_path / 'a')
  assert '\n' not in str(error.value)


def test_a_star_that_stands_for_all_layers_is_a_name(tmp_path):
  name = 'esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq'  # as transformers 5 writes it
  assert set(weights.read_weights(write(tmp_path / 'a', {name: np.zeros(2, np.float32)}))) == {name}


# ---- indices that lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('spoil, told', [
    (lambda m: m | {'a': '../other.safetensors'}, r"names the file '../other.safetensors'; only"),
    (lambda m: m | {'a': '/etc/passwd'}, "names the file '/etc/passwd'"),
    (lambda m: m | {'a': '/etc/x.safetensors'}, "names the file '/etc/x.safetensors'"),
    (lambda m: m | {'a': '..\\x.safetensors'}, 'names the file'),
    (lambda m: m | {'a': 'pytorch_model.bin'}, "names the file 'pytorch_model.bin'"),
    (lambda m: m | {'a': 'model-9.safetensors'}, 'model-9.safetensors is missing'),
    (lambda m: m | {'a': 3}, 'must hold weight_map'),
    (lambda m: [], 'must hold weight_map'),
    (lambda m: {}, 'must hold weight_map'),
    (lambda m: m | {'a': next(iter(m.values()))}, 'disagree about a$|disagree about a\\.'),
    (lambda m: {k: v for k, v in m.items() if k != 'a.weight'} | {'b': m['a.weight']}, 'disagree about a.weight, b'),
])
def test_indices_that_lie_are_refused(spoil, told, tmp_path):
  index = write(tmp_path / 'a', shard_bytes=40) / weights.INDEX
  index.write_text(json.dumps(dict(weight_map=spoil(json.loads(index.read_text())['weight_map']))))
  with pytest.raises(JaxlmError, match=told) as error:
    weights.read_weights(tmp_path / 'a')
  assert '\n' not in str(error.value)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  folder = write(tmp_path / 'a', shard_bytes=40)
  first, second = sorted(folder.glob('*.safetensors'))[:2]
  safetensors.numpy.save_file(dict(safetensors.numpy.load_file(second)) | {'a.weight': ARRAYS['a.weight']}, second)
  with pytest.raises(JaxlmError, match='Tensor a.weight stands in two files of the folder'):
    weights.read_weights(folder)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'weights.pth', 'tf_model.h5', 'flax_model.msgpack'])
def test_pickled_weights_are_named_and_not_read(name, tmp_path):
  (tmp_path / name).write_bytes(b'cos\nsystem\n')
  with pytest.raises(JaxlmError, match=f'{name} can run code and is not read; save it as safetensors'):
    weights.read_weights(tmp_path)
