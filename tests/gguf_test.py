"""GGUF files as llama.cpp makes them: the same weights as the folder they came from; quantised ones expanded."""
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import hf, sharding, transfer, trees, weights
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.families import gpt2, llama
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer

gguf = pytest.importorskip('gguf')

LLAMA = dict(model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=131, hidden_size=64,
             intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1000.0)
GPT2 = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=131, n_positions=64, n_embd=64, n_layer=2,
            n_head=4, tie_word_embeddings=True)
SCALING = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)
META = {
    'llama': dict(context_length='max_position_embeddings', embedding_length='hidden_size',
                  block_count='num_hidden_layers', feed_forward_length='intermediate_size',
                  head_count='num_attention_heads', head_count_kv='num_key_value_heads',
                  layer_norm_rms_eps='rms_norm_eps', rope_freq_base='rope_theta', rope_dimension_count='head_dim',
                  key_length='head_dim', value_length='head_dim', vocab_size='vocab_size'),
    'gpt2': dict(context_length='n_positions', embedding_length='n_embd', block_count='n_layer', head_count='n_head'),
}


def make(folder, case):
  """A folder of random weights."""
  family = {'gpt2': gpt2, 'llama': llama}[case['model_type']]
  model = freeze(hf.whole_model(family.from_hf(case)), vocab_size=131, visibility='causal')
  rng = np.random.default_rng(0)
  params = trees.unflatten({path: rng.normal(size=shape).astype(np.float32) * 0.2
                            for path, shape in transfer.param_shapes(model).items()})
  hf.save_folder(folder, model, params)
  return hf.load_folder(folder)


def as_llama_cpp_has_it(name, x, case):
  """A tensor as llama.cpp's convert_hf_to_gguf.py writes it: Llama's heads reordered, GPT-2's kernels turned."""
  if case['model_type'] == 'llama' and ('q_proj' in name or 'k_proj' in name):
    heads = case['num_attention_heads' if 'q_proj' in name else 'num_key_value_heads']
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
  if case['model_type'] == 'gpt2' and name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
    return np.ascontiguousarray(x.T)
  return x


def export(folder, file, case, kind=None, meta=lambda writer: None, tensors=lambda named: None):
  """Writes GGUF with the package's own writer and names."""
  theirs, writer = case['model_type'], gguf.GGUFWriter(file, case['model_type'])
  for key, name in META[theirs].items():
    getattr(writer, f'add_{key}')(case[name])
  if theirs == 'gpt2':
    writer.add_feed_forward_length(4 * case['n_embd'])
    writer.add_layer_norm_eps(1e-5)
  writer.add_name('tiny')
  writer.add_token_list(['a', 'b'])
  meta(writer)
  found = weights.read_weights(folder)
  names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, theirs.upper()), 2)
  named = {names.get_name(name, ('.weight', '.bias')): as_llama_cpp_has_it(name, np.array(found[name]), case)
           for name in found}
  tensors(named)
  for name, x in named.items():
    if kind and x.ndim == 2:
      sort = getattr(gguf.GGMLQuantizationType, kind)
      writer.add_tensor(name, gguf.quants.quantize(x, sort), raw_dtype=sort)
    else:
      writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return file


def logits(folder):
  net = Transformer(folder.model, sharding.single(base.default().sharding.rules))
  ids_BT = np.random.default_rng(1).integers(0, 131, (2, 40))
  params = trees.map_paths(lambda _, x: jnp.asarray(x, jnp.float32), folder.params)
  return np.asarray(net.apply({'params': params}, {'tokens': jnp.asarray(ids_BT, jnp.int32)}).logits)[..., :131]


CASES = {'llama': LLAMA, 'llama tied': LLAMA | dict(tie_word_embeddings=True), 'gpt2': GPT2,
         'llama biases': LLAMA | dict(attention_bias=True, mlp_bias=True), 'llama 3.1': LLAMA | dict(
             rope_theta=500_000.0, max_position_embeddings=131_072, rope_scaling=SCALING)}


def more_of(name):
  """(what the writer adds, what it changes) of a case."""
  def factors(named):
    turns = 8192 / (2 * np.pi * 500_000.0 ** (np.arange(4) / 4))
    smooth = np.clip((turns - 1) / 3, 0, 1)
    named['rope_freqs.weight'] = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
  twin = lambda named: named.update({'output.weight': named['token_embd.weight'].copy()})
  return {'llama 3.1': factors, 'gpt2': twin}.get(name, lambda named: None)


@pytest.mark.parametrize('name', CASES)
def test_weights_and_logits_are_those_of_the_folder(name, tmp_path):
  case = CASES[name]
  folder = make(tmp_path / 'a', case)
  file = export(tmp_path / 'a', tmp_path / 'x.gguf', case, tensors=more_of(name))
  ours = hf.load_folder(file)
  assert hf.recognises(file) and hf.recognises(tmp_path) and not hf.recognises(tmp_path / 'a/none.gguf')
  assert hf.computed(base.resolved(ours.config)['model']) == hf.computed(base.resolved(folder.config)['model'])
  assert (ours.config.objective.name, ours.headed, ours.tokenizer) == ('causal', True, None)
  for path, x in trees.flatten(folder.params).items():
    np.testing.assert_array_equal(trees.flatten(ours.params)[path], x, path)
  np.testing.assert_array_equal(logits(ours), logits(folder))


# Of normal numbers: bits of the type and its blocks of 32; measured 0.0004, 0.003, 0.004, 0.10 and 0.05 of the largest.
@pytest.mark.parametrize('kind, dtype, atol', [('F16', np.float16, 1e-3), ('BF16', 'bfloat16', 4e-3),
                                               ('Q8_0', np.float32, 1e-2), ('Q4_0', np.float32, 0.15),
                                               ('Q5_0', np.float32, 0.08)])
def test_quantised_tensors_expand_to_about_what_they_were(kind, dtype, atol, tmp_path):
  folder = make(tmp_path / 'a', LLAMA)
  ours = hf.load_folder(export(tmp_path / 'a', tmp_path / 'x.gguf', LLAMA, kind))
  q, norm = 'stack/layer_1/attention/query/kernel', 'stack/layer_1/attention_norm/scale'
  old, new = trees.flatten(folder.params), trees.flatten(ours.params)
  assert new[q].dtype == jnp.dtype(dtype) and new[norm].dtype == np.float32
  np.testing.assert_allclose(new[q].astype(np.float32), old[q], atol=atol * np.abs(old[q]).max())
  np.testing.assert_array_equal(new[norm], old[norm])


def test_blocks_of_256_are_expanded_as_the_package_does(tmp_path):
  folder = make(tmp_path / 'a', LLAMA | dict(hidden_size=256))
  kind, made = gguf.GGMLQuantizationType.Q4_K, {}

  def meta(writer):  # the package expands Q4_K but cannot make it: any bytes will do
    raw = np.random.default_rng(0).integers(0, 256, (256, 32 // 32 * 144), np.uint8)
    raw[:, :4] = np.frombuffer(np.array([0.01, 0.02], np.float16).tobytes(), np.uint8)
    made['raw'] = raw[:96]
    writer.add_tensor('blk.1.ffn_up.weight', made['raw'], raw_dtype=kind)
  file = export(tmp_path / 'a', tmp_path / 'x.gguf', LLAMA | dict(hidden_size=256), meta=meta,
                tensors=lambda named: named.pop('blk.1.ffn_up.weight'))
  ours = hf.load_folder(file).params['stack']['layer_1']['mlp']['up']['kernel']
  np.testing.assert_array_equal(ours, gguf.quants.dequantize(made['raw'], kind).T)
  assert folder.params['stack']['layer_1']['mlp']['up']['kernel'].shape == ours.shape == (256, 96)


def test_a_tokenizer_beside_the_file_is_taken(tmp_path):
  make(tmp_path / 'a', LLAMA | dict(vocab_size=131))
  export(tmp_path / 'a', tmp_path / 'x.gguf', LLAMA)
  tokenizers.bytes_tokenizer().save(tmp_path)
  for path in (tmp_path, tmp_path / 'x.gguf'):
    assert hf.load_folder(path).tokenizer == tmp_path / 'tokenizer.json'


Q = 'blk.1.attn_q.weight'
SPOILT = {
    'missing': (dict(tensors=lambda t: t.pop(Q)), f'lack {Q}'),
    'extra': (dict(tensors=lambda t: t.update(extra=t[Q])), 'hold extra'),
    'misshapen': (dict(tensors=lambda t: t.update({Q: t[Q][:8]})), r'shape \(8, 64\); config.json calls for'),
    'integers': (dict(tensors=lambda t: t.update({Q: t[Q].astype(np.int32)})), 'is I32, which the gguf package cannot'),
    'experts': (dict(meta=lambda w: w.add_expert_count(8)), 'expert_count=8 is not understood'),
    'parts': (dict(meta=lambda w: w.add_uint16('split.count', 3)), 'is one of 3 parts'),
    'half a head rotates': (dict(meta=lambda w: w.add_uint32('llama.rope.dimension_count', 4)), 'rotates whole heads'),
    'text for a number': (dict(meta=lambda w: w.add_string('llama.rope.freq_base', 'x')), 'rope_theta must be'),
    'unknown scaling': (dict(meta=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)), 'longrope'),
    'other factors': (dict(tensors=lambda t: t.update({'rope_freqs.weight': np.array([1, 2, 3, 8], np.float32)})),
                      'is not what Llama 3.1 scales'),
    'a name like a path': (dict(tensors=lambda t: t.update({'../x': t[Q]})), "named '../x'"),
}


@pytest.mark.parametrize('name', SPOILT)
def test_spoilt_files_are_refused_in_one_line(name, tmp_path):
  spoil, told = SPOILT[name]
  make(tmp_path / 'a', LLAMA)
  case = {key: value for key, value in LLAMA.items()}
  if name in ('half a head rotates', 'text for a number'):  # the writer refuses a key twice
    META_less = {k: v for k, v in META['llama'].items() if k not in ('rope_dimension_count', 'rope_freq_base')}
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(META, 'llama', META_less)
      file = export(tmp_path / 'a', tmp_path / 'x.gguf', case, **spoil)
  else:
    file = export(tmp_path / 'a', tmp_path / 'x.gguf', case, **spoil)
  with pytest.raises(JaxlmError, match=told) as error:
    hf.load_folder(file).params
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('damage', [lambda raw: raw[:-200], lambda raw: raw[:50], lambda raw: b'', lambda _: b'x' * 99],
                         ids=['cut', 'cut in the header', 'empty', 'no GGUF'])
def test_damaged_files_are_refused_in_one_line(damage, tmp_path):
  make(tmp_path / 'a', LLAMA)
  file = export(tmp_path / 'a', tmp_path / 'x.gguf', LLAMA)
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(JaxlmError, match='is no whole GGUF file') as error:
    hf.load_folder(file)
  assert '\n' not in str(error.value)


def test_an_unknown_architecture_is_refused_and_a_missing_package_named(tmp_path, monkeypatch):
  writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'mamba')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(JaxlmError, match="general.architecture is 'mamba'; of GGUF files those of .*llama.* are read"):
    hf.load_folder(tmp_path / 'x.gguf')
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(JaxlmError, match='which the gguf package reads; pip install "jaxlm\\[gguf\\]"'):
    hf.load_folder(tmp_path / 'x.gguf')
