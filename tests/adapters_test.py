"""Adapters of the `peft` package: logits as its own, both ways; what is read is written the same; the rest refused."""
import dataclasses
import functools
import json
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm import adapters, hf, sharding, targets, transfer, trees
from jaxlm import config as base
from jaxlm.errors import JaxlmError
from jaxlm.families import albert, bert, falcon, gemma, gpt2, gpt_neox, llama, mixtral, phi3, t5
from jaxlm.models import peft as methods
from jaxlm.models.config import PeftConfig, freeze
from jaxlm.models.stack import restack, unstack
from jaxlm.models.transformer import Transformer

V, T, P = 61, 7, 3
FAMILIES = {
    # Odd on purpose: heads × head_dim (24) other than the width (20), groups, a vocabulary that is padded.
    'llama': (llama, dict(model_type='llama', vocab_size=V, hidden_size=20, intermediate_size=28, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=32)),
    'gpt2': (gpt2, dict(model_type='gpt2', vocab_size=V, n_positions=32, n_embd=24, n_layer=2, n_head=4)),
    't5': (t5, dict(model_type='t5', vocab_size=V, d_model=20, d_kv=6, d_ff=28, num_layers=2, num_heads=4,
                    feed_forward_proj='gated-gelu', tie_word_embeddings=False)),
    'bert': (bert, dict(model_type='bert', vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=28, max_position_embeddings=32)),
    'gpt_neox': (gpt_neox, dict(model_type='gpt_neox', vocab_size=V, hidden_size=24, num_hidden_layers=2,
                                num_attention_heads=4, intermediate_size=28, max_position_embeddings=32,
                                rotary_pct=1.0)),
    'falcon': (falcon, dict(model_type='falcon', vocab_size=V, hidden_size=24, num_hidden_layers=2, num_kv_heads=2,
                            num_attention_heads=4, new_decoder_architecture=True)),
    'phi3': (phi3, dict(model_type='phi3', vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, intermediate_size=28, max_position_embeddings=32)),
    'mixtral': (mixtral, dict(model_type='mixtral', vocab_size=V, hidden_size=24, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, intermediate_size=28, num_local_experts=2)),
    'gemma': (gemma, dict(model_type='gemma', vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=1, head_dim=6, intermediate_size=28)),
    'albert': (albert, dict(model_type='albert', vocab_size=V, embedding_size=12, hidden_size=24, num_hidden_layers=2,
                            num_attention_heads=4, intermediate_size=28, max_position_embeddings=32)),
}
CLASSES = dict(llama='LlamaForCausalLM', gpt2='GPT2LMHeadModel', t5='T5ForConditionalGeneration',
               bert='BertForMaskedLM', gpt_neox='GPTNeoXForCausalLM')
ALL = (('.*attention/(query|key|value|out)', True), ('.*mlp/(up|gate|down)', 4), ('cross/(query|value)', 2))
METHODS = {
    'lora': dict(method='lora'), 'rslora': dict(method='lora', rank=3, alpha=5.0, sites=ALL, stabilised=True),
    'dora': dict(method='lora', rank=3, sites=ALL, dora=True), 'ia3': dict(method='ia3'),
    'prompt': dict(method='prompt', tokens=P),
    'p_tuning': dict(method='prompt', tokens=P, encoder='lstm', width=5),
    'p_tuning_mlp': dict(method='prompt', tokens=P, encoder='mlp', width=5),
    'prefix': dict(method='prefix', tokens=P), 'prefix_mlp': dict(method='prefix', tokens=P, encoder='mlp', width=5)}
FOUR, DECODERS = ('llama', 'gpt2', 't5', 'bert'), ('llama', 'gpt2')
PAIRS = [*((family, method) for family in FOUR for method in ('lora', 'rslora', 'dora', 'ia3')),
         *((family, method) for family in DECODERS for method in ('prompt', 'prefix', 'prefix_mlp')),
         ('llama', 'p_tuning'), ('llama', 'p_tuning_mlp'), ('t5', 'p_tuning_mlp')]


@functools.cache
def base_of(name, architecture=None):
  """(the model, its parameters stacked) of a tiny model whose norms and biases are drawn, too."""
  family, case = FAMILIES[name]
  architecture = architecture or CLASSES.get(name) or next(iter(family.ARCHITECTURES))
  model = freeze(hf.whole_model(hf._overrides(family, case, architecture)) | dict(scan=True), vocab_size=V,
                 visibility=hf.VISIBILITY[family.BASE.get('structure', 'decoder')])
  rng = np.random.default_rng(0)
  # T5 leaves q·k as it is and begins with smaller queries; scores as large as others' weights make them amplify rounding.
  small = lambda path: model.attention.head_dim ** -0.5 if name == 't5' and path.endswith('query/kernel') else 1.0
  draw = lambda path, shape: (rng.normal(size=shape) * (0.3 if len(shape) > 1 else 0.1) * small(path)
                              + path.endswith('norm/scale')).astype(np.float32)
  params = {path: draw(path, shape) for path, shape in transfer.param_shapes(model).items()}
  for path in ('embed/embedding', 'head', 'head_bias'):
    if path in params:
      params[path][V:] = 0
  return model, restack(trees.unflatten(params), model)


def adapted(name, given, seed=1, architecture=None):
  """(a model with a method, its parameters with a delta far from its start)."""
  model, params = base_of(name, architecture)
  model = dataclasses.replace(model, peft=PeftConfig(**given))
  rng = np.random.default_rng(seed)
  delta = {path: (0.3 * rng.normal(size=shape) + path.endswith('scale')).astype(np.float32)
           for path, shape in transfer.param_shapes(model).items() if methods.is_delta(path)}
  params = methods.settled(trees.combine(params, restack(trees.unflatten(delta), model)))
  longer = lambda path, x: np.asarray(x) * (1 + 0.1 * np.arange(np.size(x)).reshape(np.shape(x)) / np.size(x))
  return model, trees.map_paths(lambda path, x: longer(path, x).astype(np.float32) if path.endswith('magnitude') else x,
                                params)


def delta_of(params):
  return trees.partition(params, methods.is_delta)[0]


def text():
  return np.random.default_rng(5).integers(0, V, (2, T)).astype(np.int32)


def logits(model, params):
  """Of the text alone, whatever stands before it."""
  front = model.peft.tokens if model.peft.method in ('prompt', 'prefix') else 0
  ids_BT = np.concatenate([np.broadcast_to(V + np.arange(front, dtype=np.int32), (2, front)), text()], 1)
  batch = {'tokens': ids_BT}
  if model.structure == 'encoder_decoder':
    batch = {'tokens': text()[:, ::-1], 'source_tokens': ids_BT}
  net = Transformer(model, sharding.single(base.default().sharding.rules))
  out = jax.jit(net.apply)({'params': params}, batch)
  found = out.scores if model.head.labels != 'none' else out.logits[..., :V] if model.head.lm else out.hidden
  return np.asarray(found)[:, -T:]


@functools.cache
def plain_logits(name):
  return logits(*base_of(name))


def their_logits(model, structure):
  import torch
  ids = torch.tensor(text().astype(np.int64))
  more = dict(decoder_input_ids=ids.flip(1)) if structure == 'encoder_decoder' else {}
  with torch.no_grad():
    out = model.eval()(input_ids=ids, **more)
  return (out.logits if 'logits' in out else out.last_hidden_state).numpy()[:, -T:]


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """name -> a fresh model of `transformers` with our base's weights."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  pytest.importorskip('peft')
  torch.set_num_threads(1)
  folders = {}
  def make(name, architecture=None):
    architecture = architecture or CLASSES[name]
    if architecture not in folders:
      folders[architecture] = tmp_path_factory.mktemp(architecture) / 'base'
      hf.save_folder(folders[architecture], *base_of(name, architecture))
    return getattr(transformers, architecture).from_pretrained(folders[architecture]).eval()
  return make


def close(found, want, plain):
  assert np.abs(want - plain).max() > 1e-2  # or there would be nothing to agree on
  np.testing.assert_allclose(found, want, atol=1e-4)  # float32, another order of sums; measured max 6.4e-5 (T5)


@pytest.mark.parametrize('name, method', [*PAIRS, ('gpt_neox', 'lora')])
def test_what_is_written_gives_the_same_logits_there(name, method, theirs, tmp_path):
  import peft
  model, params = adapted(name, METHODS[method])
  adapters.save(tmp_path / 'a', model, params)
  with warnings.catch_warnings():
    warnings.filterwarnings('error', category=UserWarning)  # of tensors that are missing, among others
    found = peft.PeftModel.from_pretrained(theirs(name), str(tmp_path / 'a'))
  close(their_logits(found, model.structure), logits(model, params), plain_logits(name))


JOINED = [('phi3', 'lora'), ('phi3', 'ia3'), ('falcon', 'rslora'), ('falcon', 'ia3'), ('gpt_neox', 'lora'),
          ('albert', 'dora')]


@pytest.mark.parametrize('name, method', [*(pair for pair in PAIRS if not METHODS[pair[1]].get('encoder')), *JOINED])
def test_what_is_written_comes_back_and_is_written_again_bit_for_bit(name, method, tmp_path):
  model, params = adapted(name, METHODS[method])
  adapters.save(tmp_path / 'a', model, params)
  found, delta = adapters.load(tmp_path / 'a', base_of(name)[0])
  same(delta, delta_of(params))
  other = dataclasses.replace(model, peft=found)
  adapters.save(tmp_path / 'b', other, unstack(delta, other))  # stacked or not
  assert tensors(tmp_path / 'a') == tensors(tmp_path / 'b')


def test_a_model_whose_layers_are_not_stacked_gets_a_delta_that_is_not(tmp_path):
  model, params = adapted('llama', METHODS['rslora'])
  adapters.save(tmp_path / 'a', model, params)
  same(adapters.load(tmp_path / 'a', dataclasses.replace(model, scan=False))[1], unstack(delta_of(params), model))


def same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert set(a) == set(b)
  for path, x in a.items():
    np.testing.assert_array_equal(x, b[path], err_msg=path)


def tensors(folder, rows=None):
  return {name: x[:rows].tobytes() for name, x in safetensors.numpy.load_file(folder / targets.FILE).items()}


LISTS = dict(llama=(['q_proj', 'v_proj', 'down_proj'], ['down_proj']), gpt2=(['c_attn', 'mlp.c_proj'], ['mlp.c_proj']),
             t5=(['q', 'v', 'wo'], ['wo']), bert=(['query', 'value', 'output.dense'], ['output.dense']))
RANKS = dict(llama={'q_proj': 5}, gpt2={'c_attn': 5}, t5={'v': 2}, bert={'query': 2})


def their_config(name, method):
  import peft
  target, forward = LISTS[name]
  task = dict(task_type=dict(t5='SEQ_2_SEQ_LM', bert=None).get(name, 'CAUSAL_LM'))
  lora = functools.partial(peft.LoraConfig, r=3, lora_alpha=7, target_modules=target, lora_dropout=0.1, **task)
  few = dict(num_virtual_tokens=P, **task)
  kv = dict(token_dim=12, num_attention_heads=2) if name == 'llama' else {}  # heads are not width / num_heads there
  return {
      'rslora': lambda: lora(use_rslora=True, rank_pattern=RANKS[name]), 'dora': lambda: lora(use_dora=True),
      'all': lambda: lora(target_modules='all-linear'),
      'pattern': lambda: lora(target_modules=r'.*\.1\..*(q_proj|c_attn|[kv]|value)'),
      'one_layer': lambda: lora(layers_to_transform=1),
      'ia3': lambda: peft.IA3Config(target_modules=target, feedforward_modules=forward, **task),
      'prompt': lambda: peft.PromptTuningConfig(**few),
      'p_tuning': lambda: peft.PromptEncoderConfig(encoder_hidden_size=5, **few),
      'prefix': lambda: peft.PrefixTuningConfig(**few, **kv),
      'prefix_mlp': lambda: peft.PrefixTuningConfig(**few, prefix_projection=True, encoder_hidden_size=5, **kv),
  }[method]()


def drawn(model):
  """An adapter of theirs, far from its start."""
  import torch
  torch.manual_seed(0)
  for key, x in model.named_parameters():
    if 'magnitude' in key or 'ia3_' in key:
      x.data = x.data * (1 + 0.2 * torch.rand_like(x))
    elif 'lora_' in key or 'prompt_encoder' in key or 'modules_to_save' in key:
      x.data = torch.randn_like(x) * 0.3
  return model


@pytest.mark.parametrize('name, method', [
    *((name, method) for name in FOUR for method in ('rslora', 'dora', 'all', 'ia3')), ('llama', 'prompt'),
    *((name, method) for name in DECODERS for method in ('pattern', 'p_tuning', 'prefix')), ('gpt2', 'prefix_mlp'),
    ('llama', 'one_layer'), ('t5', 'prompt')])
def test_what_peft_writes_gives_the_same_logits_here(name, method, theirs, tmp_path):
  import peft
  model = drawn(peft.get_peft_model(theirs(name), their_config(name, method)))
  model.save_pretrained(tmp_path / 'a')
  found, delta = adapters.load(tmp_path / 'a', base_of(name)[0])
  ours = dataclasses.replace(base_of(name)[0], peft=found)
  want = their_logits(model, ours.structure)
  close(logits(ours, trees.combine(base_of(name)[1], delta)), want, plain_logits(name))
  adapters.save(tmp_path / 'b', ours, delta)
  # Of a T5's prompt the decoder's rows are left out, which nothing reads.
  assert tensors(tmp_path / 'a', P if method == 'prompt' else None) == tensors(tmp_path / 'b')


def test_a_new_head_goes_along_both_ways(theirs, tmp_path):
  peft, name = pytest.importorskip('peft'), 'BertForSequenceClassification'
  model = drawn(peft.get_peft_model(theirs('bert', name), peft.LoraConfig(task_type='SEQ_CLS', r=3)))
  model.save_pretrained(tmp_path / 'a')
  plain, params = base_of('bert', name)
  found, delta = adapters.load(tmp_path / 'a', plain)
  assert found.also == 'labels/kernel|labels/bias'
  assert found.sites == (('attention/query', True), ('attention/value', True))
  ours, params = dataclasses.replace(plain, peft=found), trees.combine(params, delta)
  want = their_logits(model, 'encoder')
  np.testing.assert_allclose(logits(ours, params), want, atol=1e-4)
  adapters.save(tmp_path / 'b', ours, params)
  assert tensors(tmp_path / 'a') == tensors(tmp_path / 'b')
  again = peft.PeftModel.from_pretrained(theirs('bert', name), str(tmp_path / 'b'))
  np.testing.assert_allclose(their_logits(again, 'encoder'), want, atol=1e-6)


def test_a_prompt_stands_before_the_text_of_a_body(theirs, tmp_path):
  peft = pytest.importorskip('peft')
  model, params = adapted('bert', METHODS['prompt'], architecture='BertModel')
  adapters.save(tmp_path / 'a', model, params)
  found = peft.PeftModel.from_pretrained(theirs('bert', 'BertModel'), str(tmp_path / 'a'))
  net = Transformer(model, sharding.single(base.default().sharding.rules))
  ids_BT = np.concatenate([np.broadcast_to(V + np.arange(P, dtype=np.int32), (2, P)), text()], 1)
  want = jax.jit(net.apply)({'params': params}, {'tokens': ids_BT}).hidden[:, P:]
  np.testing.assert_allclose(their_logits(found, 'encoder'), want, atol=1e-4)


# ---- no torch needed -----------------------------------------------------------------------------------------------


def test_queries_and_values_of_a_joined_matrix_are_stacked_and_as_strong_as_before(tmp_path):
  model, params = adapted('gpt2', METHODS['lora'])
  adapters.save(tmp_path / 'a', model, params)
  config = json.loads((tmp_path / 'a' / targets.CONFIG).read_text())
  assert config['target_modules'] == ['attn.c_attn'] and config['fan_in_fan_out'] is True
  assert (config['r'], config['rank_pattern'], config['alpha_pattern']) == (8, {'attn.c_attn': 16}, {'attn.c_attn': 32})
  found, _ = adapters.load(tmp_path / 'a', base_of('gpt2')[0])
  assert (found.rank, found.alpha, found.sites) == (8, 16.0, (('attention/query', True), ('attention/value', True)))


def test_bfloat16_stays(tmp_path):
  model, params = adapted('llama', METHODS['rslora'])
  params = trees.map_paths(lambda _, x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
  adapters.save(tmp_path / 'a', model, params)
  found, delta = adapters.load(tmp_path / 'a', base_of('llama')[0])
  assert {x.dtype for x in jax.tree.leaves(delta)} == {np.dtype(ml_dtypes.bfloat16)}
  same(delta, delta_of(params))


NOT_WRITTEN = {
    'bottleneck': ('llama', dict(method='bottleneck', width=4), "no form of method 'bottleneck'"),
    'bitfit': ('gpt2', dict(method='bitfit'), "no form of method 'bitfit'"),
    'experts': ('mixtral', dict(method='lora', sites=(('mlp/experts/up', True),)),
                'no module for stack/layer_0/mlp/experts/up, stack/layer_1/mlp/experts/up of family mixtral'),
    'prefix of an encoder-decoder': ('t5', METHODS['prefix'], 'this encoder_decoder of family t5 is another'),
    'prompt of a masked model': ('bert', METHODS['prompt'], 'of this encoder.* it puts none'),
    'scaled prompt': ('gemma', METHODS['prompt'], 'embedding_scale=.* multiplies prompts here'),
    'part of a joined matrix, with lengths': ('gpt2', dict(method='lora', dora=True), 'with DoRA all of them or none'),
    'ranks in a joined matrix': ('gpt2', dict(method='lora', sites=(('.*/query', 2), ('.*/key', 3))), 'several ranks'),
    'inputs of a joined matrix': ('gpt2', dict(method='ia3', sites=(('.*/query', 'in'),)), "say 'out' of them"),
    'nowhere': ('llama', dict(method='lora', sites=(('nowhere', True),)), 'Nothing is adapted'),
}


@pytest.mark.parametrize('name', NOT_WRITTEN)
def test_what_peft_cannot_express_is_refused_in_one_line(name, tmp_path):
  family, method, told = NOT_WRITTEN[name]
  model, params = adapted(family, method)
  with pytest.raises(JaxlmError, match=told) as error:
    adapters.save(tmp_path / 'a', model, params)
  assert '\n' not in str(error.value) and not (tmp_path / 'a').exists()


def test_half_a_head_is_not_saved_and_an_adapter_is_never_written_over(tmp_path):
  model, params = adapted('bert', dict(method='lora', also='pooler/dense/kernel'),
                          architecture='BertForSequenceClassification')
  with pytest.raises(JaxlmError, match='whole modules; what config.model.peft.also names is not .*pooler.dense.bias'):
    adapters.save(tmp_path / 'a', model, params)
  model, params = adapted('gpt2', dict(method='lora', also='.*/query/bias'))
  with pytest.raises(JaxlmError, match='is not stack/layer_0/attention/query/bias'):
    adapters.save(tmp_path / 'a', model, params)
  model, params = adapted('llama', METHODS['lora'])
  with pytest.raises(JaxlmError, match='The parameters lack stack/layer_0/attention/query/lora/a'):
    adapters.save(tmp_path / 'a', model, base_of('llama')[1])
  adapters.save(tmp_path / 'a', model, params)
  with pytest.raises(JaxlmError, match='holds an adapter already'):
    adapters.save(tmp_path / 'a', model, params)


Q = 'base_model.model.model.layers.1.self_attn.q_proj.'
SPOILT = {
    'bias': (dict(bias='all'), 'bias=.all. changes biases of the base'),
    'another method': (dict(peft_type='ADALORA'), "peft_type='ADALORA' has no form here; LORA, IA3"),
    'a start that changes the base': (dict(init_lora_weights='pissa_niter_4'), 'changes weights of the base'),
    'bias of B': (dict(lora_bias=True), 'lora_bias=True is not understood'),
    'parameters': (dict(target_parameters=['mlp.experts']), 'target_parameters=.* is not understood'),
    'layers again': (dict(layer_replication=[[0, 2]]), 'layer_replication=.* is not understood'),
    'several alphas': (dict(alpha_pattern={'q_proj': 3}), 'alpha_pattern=.* several alphas'),
    'no alpha': (dict(alpha_pattern={'q_proj': 'x'}), "numbers above 0; got 'x'"),
    'a rank for a layer': (dict(rank_pattern={'layers.1.self_attn.q_proj': 4}), r'has shape \(8, 20\); .* \(4, 20\)'),
    'no pattern': (dict(target_modules='('), "'\\(' is no pattern"),
    'a list of text': (dict(target_modules=3), 'target_modules must be list or str; got 3'),
    'nowhere': (dict(target_modules=['v_proj']), 'updates of .*q_proj.*, which target_modules .* does not mean'),
    'more': (dict(target_modules=['q_proj', 'v_proj', 'k_proj']), 'lacks updates of .*k_proj'),
    'excluded': (dict(exclude_modules=['q_proj']), 'holds updates of .*q_proj'),
    'other layers': (dict(layers_to_transform=[0]), 'holds updates of model.layers.1'),
    'lengths': (dict(use_dora=True), 'calls for lora_A.weight, lora_B.weight, lora_magnitude_vector'),
    'no rank': (dict(r=None), 'r is missing'),
    'rank 0': (dict(r=0), 'r must be above 0'),
    'half': (lambda t: t.pop(Q + 'lora_A.weight'), 'has lora_B.weight; .* calls for lora_A.weight, lora_B.weight'),
    'strange': (lambda t: t.update({'base_model.model.x.lora_A.weight': t[Q + 'lora_A.weight']}), 'changes x; this'),
    'a layer whole': (lambda t: t.update({Q + 'weight': t[Q + 'lora_A.weight']}), 'no weight outside the layers'),
    'integers': (lambda t: t.update({Q + 'lora_A.weight': t[Q + 'lora_A.weight'].astype(np.int32)}), 'is I32'),
    'zeros': (lambda t: t.update({name: x * 0 for name, x in t.items()}), None),
}


@pytest.mark.parametrize('name', SPOILT)
def test_spoilt_folders_are_refused_in_one_line(name, tmp_path):
  spoil, told = SPOILT[name]
  adapters.save(tmp_path / 'a', *adapted('llama', METHODS['lora']))
  file, config = tmp_path / 'a' / targets.FILE, tmp_path / 'a' / targets.CONFIG
  if callable(spoil):
    found = safetensors.numpy.load_file(file)
    spoil(found)
    safetensors.numpy.save_file(found, file)
  else:
    config.write_text(json.dumps(json.loads(config.read_text()) | spoil))
  if told is None:
    assert adapters.load(tmp_path / 'a', base_of('llama')[0])[0].rank == 8
    return
  with pytest.raises(JaxlmError, match=told) as error:
    adapters.load(tmp_path / 'a', base_of('llama')[0])
  assert '\n' not in str(error.value)


def test_pickled_and_foreign_tensors_are_refused(tmp_path):
  adapters.save(tmp_path / 'a', *adapted('gpt2', METHODS['prefix']))
  with pytest.raises(JaxlmError, match='num_attention_heads=4; keys and values of this model have 2'):
    adapters.load(tmp_path / 'a', base_of('llama')[0])
  (tmp_path / 'a' / targets.FILE).rename(tmp_path / 'a' / targets.PICKLED)
  with pytest.raises(JaxlmError, match='adapter_model.bin can run code and is not read'):
    adapters.load(tmp_path / 'a', base_of('gpt2')[0])
