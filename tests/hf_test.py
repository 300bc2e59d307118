"""Hugging Face folders: logits, continuations, caches as the reference's; export undoes import; bad ones refused."""
import dataclasses as d
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm import config as base
from jaxlm import hf, settings, sharding, transfer, trees, weights
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.families import gpt2, llama
from jaxlm.models.config import freeze
from jaxlm.models.stack import init_cache
from jaxlm.models.transformer import Transformer

GPT2 = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=131, n_positions=64, n_embd=48, n_layer=3,
            n_head=4, initializer_range=0.3)
LLAMA = dict(model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=131, hidden_size=48,
             intermediate_size=70, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             initializer_range=0.3, rope_theta=1000.0, max_position_embeddings=64)

# Odd on purpose: a vocabulary that 8 does not divide, heads × head_dim (32) other than the width (48), groups.
CASES = {
    'gpt2': GPT2,
    'gpt2_inner': GPT2 | dict(n_inner=100, activation_function='gelu', layer_norm_epsilon=1e-3),
    'gpt2_untied': GPT2 | dict(tie_word_embeddings=False, scale_attn_weights=False, vocab_size=200),
    'llama': LLAMA,
    'llama_tied': LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=1, head_dim=None),
    'llama_biases': LLAMA | dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4, rms_norm_eps=1e-3),
    'llama_linear': LLAMA | dict(rope_scaling=dict(type='linear', factor=3.0)),
    'llama_yarn': LLAMA | dict(rope_scaling=dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16)),
    'llama_yarn_mscale': LLAMA | dict(rope_scaling=dict(
        rope_type='yarn', factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.0,
        beta_fast=8)),
    'llama_llama3': LLAMA | dict(rope_scaling=dict(
        rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
}


def reference(case):
  """A randomly initialised model of `transformers`."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  torch.set_num_threads(1)  # tests run side by side
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**case)
  model = getattr(transformers, case['architectures'][0])(config).eval()
  for name, x in model.named_parameters():  # biases and norms, too: at their initial 0 and 1 they would hide a swap
    if x.ndim == 1:
      torch.nn.init.normal_(x, 1.0 if name.endswith('norm.weight') or '.ln_' in name else 0.0, 0.3)
  return model


@pytest.fixture(scope='module', params=CASES)
def pair(request, tmp_path_factory):
  """(the reference's model, its folder, that folder as we read it)."""
  model, folder = reference(CASES[request.param]), tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  return model, folder, hf.load_folder(folder)


def network(folder):
  return Transformer(folder.model, sharding.single(base.default().sharding.rules))


def logits_of(folder, tokens_BT):
  out = jax.jit(network(folder).apply)({'params': folder.params}, {'tokens': jnp.asarray(tokens_BT, jnp.int32)})
  return np.asarray(out.logits)[..., :folder.model.vocab_size]


def their_logits(model, tokens_BT):
  import torch
  with torch.no_grad():
    return model(torch.tensor(tokens_BT)).logits.numpy()


def tokens(folder, rows, length):
  return np.random.default_rng(1).integers(0, folder.model.vocab_size, (rows, length))


def test_logits_equal_the_reference(pair):
  model, _, ours = pair
  tokens_BT = tokens(ours, 2, 60)
  want = their_logits(model, tokens_BT)
  assert want.std() > 1  # or there would be nothing to agree on
  # float32, another order of sums; measured max 4.7e-5, at logits up to 11.7.
  np.testing.assert_allclose(logits_of(ours, tokens_BT), want, atol=1e-4)


@pytest.mark.parametrize('pair', ['gpt2', 'gpt2_untied', 'llama', 'llama_yarn', 'llama_llama3'], indirect=True)
def test_greedy_continuation_of_32_tokens_is_identical_and_cached_decoding_is_the_full_forward(pair):
  model, _, ours = pair
  import torch
  prompt_BT = tokens(ours, 2, 7)
  want = model.generate(torch.tensor(prompt_BT), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
  text_BT = want.numpy()
  full_BTV = logits_of(ours, text_BT)
  np.testing.assert_array_equal(full_BTV[:, 6:-1].argmax(-1), text_BT[:, 7:])

  apply = jax.jit(network(ours).apply)
  step = lambda batch, cache: apply({'params': ours.params}, batch, cache)
  at = lambda start, stop: dict(tokens=jnp.asarray(text_BT[:, start:stop], jnp.int32),
                                positions=jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start)))
  out = step(at(0, 7), init_cache(ours.model, 2, 64))
  cached = [out.logits]
  for i in range(7, text_BT.shape[1]):
    out = step(at(i, i + 1), out.cache)
    cached.append(out.logits)
  cached_BTV = np.concatenate(cached, 1)[..., :ours.model.vocab_size]
  np.testing.assert_allclose(cached_BTV, full_BTV, atol=1e-4)  # float32, sums of other lengths; measured max 4.9e-5


def test_export_of_an_import_is_the_identity_and_loads_in_the_reference(pair, tmp_path):
  model, folder, ours = pair
  hf.save_folder(tmp_path / 'out', ours.model, ours.params, kept=ours.hf)
  before, after = weights.read_weights(folder), weights.read_weights(tmp_path / 'out')
  assert set(before) == set(after) and before.dtypes == after.dtypes
  assert all(before[name].tobytes() == after[name].tobytes() and before.shapes[name] == after.shapes[name]
             for name in before)
  again, info = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(info.values()), info
  tokens_BT = tokens(ours, 1, 20)
  np.testing.assert_array_equal(their_logits(again.eval(), tokens_BT), their_logits(model, tokens_BT))
  twice = hf.load_folder(tmp_path / 'out')
  assert twice.model == ours.model
  for path, x in trees.flatten(ours.params).items():
    np.testing.assert_array_equal(trees.flatten(twice.params)[path], x)


@pytest.mark.parametrize('case, body', [(GPT2, 'GPT2Model'), (LLAMA, 'LlamaModel')])
def test_architectures_decide_whether_a_body_or_a_headed_model_loads(case, body, tmp_path):
  model, torch = reference(case | dict(architectures=[body])), pytest.importorskip('torch')
  model.save_pretrained(tmp_path / 'in')
  ours = hf.load_folder(tmp_path / 'in')
  assert not ours.headed and 'head' not in ours.params
  tokens_BT = tokens(ours, 2, 20)
  out = network(ours).apply({'params': ours.params}, {'tokens': jnp.asarray(tokens_BT, jnp.int32)})
  with torch.no_grad():
    want = model(torch.tensor(tokens_BT)).last_hidden_state.numpy()
  assert out.logits is None
  np.testing.assert_allclose(out.hidden, want, atol=1e-4)  # float32, another order of sums
  hf.save_folder(tmp_path / 'out', ours.model, ours.params, kept=ours.hf)
  _, info = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(info.values()), info
  config = json.loads((tmp_path / 'in/config.json').read_text())
  (tmp_path / 'in/config.json').write_text(json.dumps(config | dict(architectures=case['architectures'],
                                                                    tie_word_embeddings=False)))
  with pytest.raises(JaxlmError, match='lack lm_head.weight'):
    hf.load_folder(tmp_path / 'in')


@pytest.mark.parametrize('case, name', [
    (GPT2, 'GPT2ForSequenceClassification'), (GPT2, 'GPT2ForTokenClassification'),
    (LLAMA, 'LlamaForSequenceClassification'), (LLAMA, 'LlamaForTokenClassification')])
def test_classifiers_give_the_scores_of_the_reference_with_as_many_labels_and_come_back(case, name, tmp_path):
  pytest.importorskip('torch')
  names = {0: 'no', 1: 'perhaps', 2: 'yes'}
  model = reference(case | dict(architectures=[name], id2label=names, label2id={v: k for k, v in names.items()},
                                pad_token_id=130))
  model.save_pretrained(tmp_path / 'in')
  ours = hf.load_folder(tmp_path / 'in')
  assert ours.model.num_labels == 3 and ours.architecture == name and not ours.headed
  tokens_BT = np.minimum(tokens(ours, 2, 20), 129)
  out = network(ours).apply({'params': ours.params}, {'tokens': jnp.asarray(tokens_BT, jnp.int32)})
  np.testing.assert_allclose(out.scores, their_logits(model, tokens_BT), atol=1e-4)  # float32, other order of sums
  hf.save_folder(tmp_path / 'out', ours.model, ours.params, kept=ours.hf)
  again, info = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(info.values()), info
  assert again.config.id2label == names
  np.testing.assert_array_equal(their_logits(again.eval(), tokens_BT), their_logits(model, tokens_BT))
  hf.save_folder(tmp_path / 'bare', ours.model, ours.params)  # with nothing kept the class follows from the heads
  bare = json.loads((tmp_path / 'bare/config.json').read_text())
  assert bare['architectures'] == [name] and len(bare['id2label']) == 3


# ---- folders of our own making: no torch needed -------------------------------------------------------------------


def make(folder, case=LLAMA, dtype=np.float32, config=(), change=lambda tensors: None, **save):
  """A folder with random weights, some of it spoilt; everything is what the family's table says it is."""
  family = {'gpt2': gpt2, 'llama': llama}[case['model_type']]
  model = freeze(hf.whole_model(family.from_hf(case)), vocab_size=case['vocab_size'], visibility='causal')
  rng = np.random.default_rng(0)
  params = trees.unflatten({path: rng.normal(size=shape).astype(dtype)
                            for path, shape in transfer.param_shapes(model).items()})
  hf.save_folder(folder, model, params, **save)
  if config:
    (folder / 'config.json').write_text(json.dumps(json.loads((folder / 'config.json').read_text()) | dict(config)))
  if (folder / weights.SINGLE).exists():
    tensors = safetensors.numpy.load_file(folder / weights.SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / weights.SINGLE)
  return model, params


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_kept_bit_for_bit(dtype, tmp_path):
  make(tmp_path / 'a', dtype=dtype)
  ours = hf.load_folder(tmp_path / 'a')
  assert {x.dtype for x in jax.tree.leaves(ours.params)} == {np.dtype(dtype)}
  assert ours.config.precision.params == ('bfloat16' if dtype is ml_dtypes.bfloat16 else 'float32')
  assert json.loads((tmp_path / 'a/config.json').read_text())['torch_dtype'] == np.dtype(dtype).name
  hf.save_folder(tmp_path / 'b', ours.model, ours.params)
  assert (tmp_path / 'a' / weights.SINGLE).stat().st_size > 0
  a, b = weights.read_weights(tmp_path / 'a'), weights.read_weights(tmp_path / 'b')
  assert all(a[name].tobytes() == b[name].tobytes() for name in a) and set(a) == set(b)


def test_shards_hold_what_one_file_holds(tmp_path):
  make(tmp_path / 'one')
  make(tmp_path / 'many', shard_bytes=30_000)
  one, many = weights.read_weights(tmp_path / 'one'), weights.read_weights(tmp_path / 'many')
  files = sorted(p.name for p in (tmp_path / 'many').glob('*.safetensors'))
  assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  assert set(one) == set(many) and all(one[name].tobytes() == many[name].tobytes() for name in one)
  a, b = hf.load_folder(tmp_path / 'one').params, hf.load_folder(tmp_path / 'many').params
  assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_config_of_a_folder_is_valid_and_says_what_the_model_is(tmp_path):
  make(tmp_path / 'a', LLAMA | dict(rope_scaling=dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,
                                                      high_freq_factor=4.0, original_max_position_embeddings=16)))
  ours = hf.load_folder(tmp_path / 'a')
  assert settings.faults(ours.config) == [] and base.loads(base.dumps(ours.config)).model.family == 'llama'
  rope = ours.config.model.positions.rope
  assert (rope.original_length, ours.config.model.max_length, rope.factor) == (16, 64, 8.0)
  assert ours.model.attention.num_kv_heads == 2 and ours.tokenizer is None


def test_a_tokenizer_goes_along_and_says_whether_text_starts_with_a_token(tmp_path):
  make(tmp_path / 'a', tokenizer=tokenizers.bytes_tokenizer())
  ours = hf.load_folder(tmp_path / 'a')
  assert ours.tokenizer == tmp_path / 'a/tokenizer.json' and not ours.config.data.bos
  assert tokenizers.load(ours.config.data.tokenizer).vocab.size == tokenizers.bytes_tokenizer().vocab.size
  added = json.loads(ours.tokenizer.read_text())
  added['post_processor'] = dict(type='TemplateProcessing', single=[
      dict(SpecialToken=dict(id='<s>', type_id=0)), dict(Sequence=dict(id='A', type_id=0))], pair=[
      dict(Sequence=dict(id='A', type_id=0)), dict(Sequence=dict(id='B', type_id=1))],
      special_tokens={'<s>': dict(id='<s>', ids=[5], tokens=['<s>'])})
  ours.tokenizer.write_text(json.dumps(added))
  assert hf.load_folder(tmp_path / 'a').config.data.bos


def test_old_files_with_buffers_without_prefix_or_with_tied_weights_twice_load(tmp_path):
  def as_published(tensors):  # the first GPT-2 files
    for name in list(tensors):
      tensors[name.removeprefix('transformer.')] = tensors.pop(name)
    tensors['h.0.attn.bias'] = np.tril(np.ones((1, 1, 4, 4), np.uint8))
  make(tmp_path / 'a', GPT2, change=as_published)
  make(tmp_path / 'b', GPT2, change=lambda t: t.update({'lm_head.weight': t['transformer.wte.weight']}))
  a, b = hf.load_folder(tmp_path / 'a').params, hf.load_folder(tmp_path / 'b').params
  assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


Q = 'model.layers.1.self_attn.q_proj.weight'
SPOILT = {
    'missing': (dict(change=lambda t: t.pop(Q)), f'lack {Q}, which config.json calls for'),
    'extra': (dict(change=lambda t: t.update(extra=t[Q])), 'hold extra, which config.json does not call for'),
    'a layer more': (dict(config=dict(num_hidden_layers=4)), 'lack model.layers.3.* and 6 more'),
    'a layer less': (dict(config=dict(num_hidden_layers=2)), 'hold model.layers.2.* and 6 more'),
    'absurd depth': (dict(config=dict(num_hidden_layers=10**9)),
                     'num_hidden_layers=1000000000; the weights hold 30 tensors'),
    'absurd width': (dict(config=dict(intermediate_size=2**31 - 1)), 'config.json calls for'),
    'misshapen': (dict(change=lambda t: t.update({Q: t[Q].T.copy()})),
                  r'shape \(48, 32\); config.json calls for \(32, 48\)'),
    'other vocabulary': (dict(config=dict(vocab_size=130)),
                         r'has shape \(131, 48\); config.json calls for \(130, 48\)'),
    'integers': (dict(change=lambda t: t.update({Q: t[Q].astype(np.int32)})), f'{Q} is I32; F32, F16, BF16 are read'),
    'a name like a path': (dict(change=lambda t: t.update({'../../etc/x': t[Q]})), "named '../../etc/x'"),
    'a name like a drive': (dict(change=lambda t: t.update({'C:\\x': t[Q]})), 'is no name of a parameter'),
    'tied but different': (dict(config=dict(tie_word_embeddings=True)), 'but lm_head.weight and .* differ'),
    'unknown architecture': (dict(config=dict(architectures=['LlamaForX'])),
                             'known for model_type .llama.: LlamaForCausalLM'),
    'odd architectures': (dict(config=dict(architectures=[['x']])), 'architectures is'),
    'unknown model type': (dict(config=dict(model_type='lama')), "Did you mean 'llama'"),
    'code of the folder': (dict(config=dict(auto_map={'AutoModel': 'x.X'})), 'auto_map asks for code .* never'),
    'remote code': (dict(config=dict(trust_remote_code=True)), 'trust_remote_code asks for code'),
    'no labels': (dict(config=dict(num_labels=0)), 'num_labels must be a whole number'),
    'another switch': (dict(config=dict(attention_sinks=4)), 'attention_sinks=4 is not understood'),
    'sees what follows': (dict(config=dict(is_causal=False)), 'is_causal=False changes who sees whom'),
    'a twin of another dtype': (dict(config=dict(tie_word_embeddings=True), change=lambda t: t.update(
        {'lm_head.weight': t['lm_head.weight'].astype(np.float64)})), 'lm_head.weight is F64; F32, F16, BF16 are read'),
    'negative epsilon': (dict(config=dict(rms_norm_eps=-1.0)), 'config.model.norm.eps must be a number, above 0'),
}


@pytest.mark.parametrize('name', SPOILT)
def test_spoilt_folders_are_refused_in_one_line(name, tmp_path):
  spoil, told = SPOILT[name]
  make(tmp_path / 'a', **spoil)
  with pytest.raises(JaxlmError, match=told) as error:
    hf.load_folder(tmp_path / 'a')
  assert '\n' not in str(error.value)


def test_missing_and_pickled_files_are_named(tmp_path):
  with pytest.raises(JaxlmError, match='config.json is missing'):
    hf.load_folder(tmp_path)
  with pytest.raises(JaxlmError, match='has no model.safetensors'):
    weights.read_weights(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(JaxlmError, match='pytorch_model.bin can run code and is not read'):
    weights.read_weights(tmp_path)
  for text, told in (('{', 'not valid JSON'), ('[]', 'must hold a JSON object'), ('[' * 100_000, 'not valid JSON')):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(JaxlmError, match=told):
      hf.load_folder(tmp_path)


def test_a_model_that_the_family_cannot_hold_is_not_exported(tmp_path):
  model, params = make(tmp_path / 'a')
  other = lambda **values: d.replace(model, attention=d.replace(model.attention, **values))
  for wrong, told in ((other(qk_norm='head'), "attention.qk_norm='head'; it would read back as 'none'"),
                      (other(softcap=3.0), 'attention.softcap=3.0'),
                      (other(windows=(0, 16)), 'attention.windows'), (other(scale=0.5), 'attention.scale=0.5'),
                      (d.replace(model, mlp=d.replace(model.mlp, gated=False)), 'mlp.gated=False'),
                      (d.replace(model, family='gpt3'), 'no Hugging Face form'),
                      (d.replace(model, positions=d.replace(model.positions, rope=d.replace(
                          model.positions.rope, scaling='ntk'))), 'positions.rope')):
    with pytest.raises(JaxlmError, match=told):
      hf.save_folder(tmp_path / 'b', wrong, params)
  assert not (tmp_path / 'b').exists()


def test_a_folder_that_holds_a_model_is_never_written_over(tmp_path):
  model, params = make(tmp_path / 'a')
  before = (tmp_path / 'a' / weights.SINGLE).read_bytes()
  with pytest.raises(JaxlmError, match='holds a model already'):
    hf.save_folder(tmp_path / 'a', model, params)
  assert (tmp_path / 'a' / weights.SINGLE).read_bytes() == before
