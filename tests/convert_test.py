"""The program: runs become folders and folders runs, with the same weights, tokenizer and what goes along."""
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as backend

import jaxlm
from jaxlm import config as base
from jaxlm import adapters, convert, forms, hf, programs, rundir, settings, sharding, targets, transfer, trees, weights
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.families import gpt2, llama
from jaxlm.lm import LM
from jaxlm.models import peft
from jaxlm.models.config import PeftConfig, freeze
from jaxlm.models.stack import unstack
from jaxlm.models.transformer import Transformer

HF = dict(model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=258, hidden_size=48, intermediate_size=70,
          num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
          bos_token_id=256, eos_token_id=[256, 257])
TEMPLATE = '{% for message in messages %}{{ message.content }}{% endfor %}'


def make(folder, dtype=np.float32, **more):
  """A folder such as the hub has, with all that can stand in one."""
  given = HF | more
  model = freeze(hf.whole_model(llama.from_hf(given)), vocab_size=258, visibility='causal')
  rng = np.random.default_rng(0)
  params = trees.unflatten({path: rng.normal(size=shape).astype(dtype)
                            for path, shape in transfer.param_shapes(model).items()})
  hf.save_folder(folder, model, params, kept=given, tokenizer=tokenizers.bytes_tokenizer())
  said = json.loads((folder / 'tokenizer_config.json').read_text())
  (folder / 'tokenizer_config.json').write_text(json.dumps(said | dict(chat_template=TEMPLATE, model_max_length=64)))
  (folder / 'special_tokens_map.json').write_text(json.dumps(dict(eos_token='<|endoftext|>')))
  (folder / 'chat_template.jinja').write_text(TEMPLATE)
  (folder / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[256, 257, 7], temperature=0.6)))
  (folder / 'additional_chat_templates').mkdir()
  (folder / 'additional_chat_templates/rag.jinja').write_text(TEMPLATE)
  return folder


def run(*flags):
  """The exit code of the program."""
  return programs.outcome(convert.main, ['convert', *flags])


def same(a, b):
  a, b = weights.read_weights(a), weights.read_weights(b)
  return set(a) == set(b) and all(weights.same(a[name], b[name]) for name in a)


def read(file):
  return json.loads(file.read_text())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_folder_becomes_a_run_and_comes_back_bit_for_bit_with_all_that_stood_beside_it(dtype, tmp_path):
  a, there, back = make(tmp_path / 'a', transfer.jnp.dtype(dtype)), tmp_path / 'run', tmp_path / 'b'
  assert run(f'--from={a}', f'--to={there}') == 0
  assert run(f'--from={there}', f'--to={back}') == 0
  assert same(a, back)
  for name in ('generation_config.json', 'tokenizer.json', 'special_tokens_map.json'):
    assert read(back / name) == read(a / name), name
  assert (back / 'chat_template.jinja').read_text() == TEMPLATE
  assert (back / 'additional_chat_templates/rag.jinja').read_text() == TEMPLATE
  assert read(back / 'tokenizer_config.json') == read(a / 'tokenizer_config.json')
  assert jaxlm.load(str(there)).eos == jaxlm.load(str(a)).eos == (256, 257, 7)
  assert read(back / 'config.json') == read(a / 'config.json')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b', 'run']


def test_the_run_is_one_that_everything_reads(tmp_path):
  a, there = make(tmp_path / 'a'), tmp_path / 'run'
  assert run(f'--from={a}', f'--to={there}') == 0
  config, record = rundir.RunDirectory(str(there)).config, read(there / 'run.json')
  assert settings.faults(config) == [] and record['format'] == 1
  assert record['tokenizer_digest'] == tokenizers.load(there / 'tokenizer').digest
  assert config.data.tokenizer == str(there / 'tokenizer') and config.model.scan
  folder, ids = hf.load_folder(a), np.arange(20)[None]
  model = forms.model_of(config, 258, 'float32')
  with Checkpoints(there / 'checkpoints', read_only=True) as checkpoints:  # as checkpoint.init_from does
    step, params = checkpoints.restore_params(transfer.wanted(model))
  assert step == 0
  for path, x in trees.flatten(unstack(params, model.config)).items():
    np.testing.assert_array_equal(x, trees.flatten(folder.params)[path])
  want = model.apply({'params': params}, {'tokens': ids}).logits[..., :258]
  np.testing.assert_allclose(jaxlm.load(there).logits(ids), want, atol=1e-5)  # float32, unrolled


@pytest.fixture(scope='module')
def trained(corpus, tmp_path_factory):
  """A GPT-2 of two layers that was trained for two steps, with a moving average."""
  config = base.smoke(base.default())
  config.update(steps=2, batch_size=8, seq_len=32, tensorboard=False)
  config.model.update(gpt2.shape(32, 2, 4, max_length=32))
  config.model.embedding.width = 32
  config.data.update(source='text', paths=corpus, holdout=0.1, store=str(tmp_path_factory.mktemp('store')))
  config.eval.update(batch_size=8, max_tokens=2048, prompts=())
  folder = tmp_path_factory.mktemp('runs') / 'gpt2'
  jaxlm.run(config, str(folder))
  return folder


def test_a_trained_run_becomes_a_folder_that_says_how_texts_begin(trained, tmp_path):
  out = tmp_path / 'hf'
  assert run(f'--from={trained}', f'--to={out}') == 0
  folder = hf.load_folder(out)
  vocab = tokenizers.load(out).vocab
  assert (vocab.bos, folder.frame) == (256, ([256], []))  # data.bos: the run's texts begin with it
  assert backend.Tokenizer.from_file(str(out / 'tokenizer.json')).encode('ab').ids == [256, 97, 98]
  assert read(out / 'generation_config.json') == dict(_from_model_config=True, bos_token_id=256, eos_token_id=256,
                                                      pad_token_id=257)
  config = rundir.RunDirectory(str(trained)).config
  model = forms.model_of(config, vocab.size, 'float32')
  with Checkpoints(trained / 'checkpoints', read_only=True) as checkpoints:
    params = unstack(checkpoints.restore_params(transfer.wanted(model))[1], model.config)
  for path, x in trees.flatten(folder.params).items():
    rows = slice(vocab.size) if path == 'embed/embedding' else ...
    np.testing.assert_array_equal(x[rows], trees.flatten(params)[path][rows])
  transformers = pytest.importorskip('transformers')
  _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
  assert not any(info.values()), info
  assert transformers.AutoTokenizer.from_pretrained(out)('ab').input_ids == [256, 97, 98]


def test_dtype_and_shards_are_chosen_and_what_is_kept_is_kept_bit_for_bit(tmp_path):
  a = make(tmp_path / 'a')
  assert run(f'--from={a}', f'--to={tmp_path / "b"}', '--form=hf', '--shard_bytes=30000') == 0
  assert len(list((tmp_path / 'b').glob('model-*-of-*.safetensors'))) > 2 and same(a, tmp_path / 'b')
  assert (tmp_path / 'b/chat_template.jinja').exists()
  for dtype, name in (('bfloat16', 'BF16'), ('float16', 'F16')):
    out = tmp_path / dtype
    assert run(f'--from={a}', f'--to={out}', '--form=hf', f'--save_dtype={dtype}') == 0
    found = weights.read_weights(out)
    assert set(found.dtypes.values()) == {name} and read(out / 'config.json')['torch_dtype'] == dtype
    for tensor, x in weights.read_weights(a).items():
      assert found[tensor].tobytes() == x.astype(transfer.jnp.dtype(dtype)).tobytes()


def spoil(folder):
  (folder / 'model.safetensors').write_bytes(b'')


BAD = [
    ([], '--from is missing'), (['--from=a'], '--to is missing'),
    (['--from=nope', '--to=b'], '--from=nope is not there'),
    (['--from=.', '--to=b'], 'has no config.json; give a run directory'),
    (['--from=a', '--to=a'], 'a is there already and is never written over'),
    (['--from=a', '--to=file'], 'file is there already'),
    (['--from=a', '--to=b', '--step=1'], '--step chooses a checkpoint'),
    (['--from=a', '--to=b', '--save_dtype=float16'], 'a run directory keeps float32 or bfloat16'),
    (['--from=a', '--to=b', '--save_dtype=int8'], '--save_dtype'),
    (['--from=a', '--to=b', '--shard_bytes=0'], '--shard_bytes'),
    (['--from=run', '--to=b', '--form=run'], 'is a run directory already'),
    (['--from=run', '--to=b', '--step=7'], 'There is no checkpoint 7'),
    (['--from=damaged', '--to=b'], 'is no whole safetensors file'),
    (['--from=bare', '--to=b'], 'has no tokenizer.json, which a run directory needs'),
    (['--from=custom', '--to=b'], "family 'custom' have no Hugging Face form"),
    (['--from=a', '--to=b', '--merge'], '--merge puts a delta into its base, and a holds none'),
    (['--from=a', '--to=b', '--base=a'], 'a has no adapter_config.json; leave it out'),
    (['--from=lora', '--to=b'], 'lora is an adapter; say what it stands beside: --base'),
    (['--from=lora', '--to=b', '--base=nope'], '--base=nope is no folder'),
    (['--from=lora', '--to=b', '--base=file'], '--base=file is no folder'),
    (['--from=lora', '--to=b', '--base=lora'], 'lora has no config.json'),
    (['--from=lora', '--to=b', '--base=bare'], 'bare has no tokenizer.json'),
    (['--from=lora', '--to=b', '--base=a', '--form=hf'], 'lora is an adapter of the peft package already; --merge'),
    (['--from=lora', '--to=b', '--base=a', '--step=1'], '--step chooses a checkpoint'),
    (['--from=lora', '--to=b', '--base=a', '--save_dtype=float16'], 'a run directory keeps float32 or bfloat16'),
    (['--from=lora', '--to=b', '--base=run', '--step=7'], 'run has no checkpoint 7 that a delta can stay beside'),
    (['--from=lora', '--to=b', '--base=averaged'], '--base=averaged keeps a moving average'),
    (['--from=lora', '--to=b', '--base=beside'], '--base=beside holds a delta itself'),
    (['--from=lora', '--to=b', '--base=narrow'], 'has shape'),
    (['--from=lora', '--to=file', '--base=a'], 'file is there already'),
    (['--from=beside', '--to=a'], 'a is there already'),
    (['--from=beside', '--to=b', '--form=run'], 'is a run directory already'),
    (['--from=beside', '--to=b', '--step=7'], 'There is no checkpoint 7'),
    (['--from=beside', '--to=b', '--base=a'], 'beside has no adapter_config.json'),
    (['--from=prompt', '--to=b', '--base=a', '--merge'], "peft method 'prompt' cannot be merged"),
    (['--from=lost', '--to=b', '--merge'], 'holds a delta beside gone, which is not there'),
    (['--from=drawn', '--to=b'], 'The base of drawn is drawn by its seed, and no folder holds it; add --merge'),
    (['--from=on_average', '--to=b'], 'averaged keeps a moving average, which its Hugging Face folder has, while this'),
    (['--from=grown', '--to=b'], 'The vocabulary of grown has 300 entries, that of its base'),
    (['--from=headed', '--to=b'], 'headed/checkpoints does not fit: params/labels'),
    (['--frm=a'], 'Unknown flag --frm'),
]


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  folder = tmp_path_factory.mktemp('places')
  for name in ('a', 'damaged', 'bare'):
    make(folder / name)
  spoil(folder / 'damaged')
  (folder / 'bare/tokenizer.json').unlink()
  (folder / 'file').write_text('')
  assert run(f'--from={folder / "a"}', f'--to={folder / "run"}') == 0
  assert run(f'--from={folder / "a"}', f'--to={folder / "custom"}') == 0
  config = read(folder / 'custom/config.json')
  config['model']['family'] = 'custom'
  (folder / 'custom/config.json').write_text(json.dumps(config))
  make(folder / 'narrow', hidden_size=32)
  adapter(folder / 'lora', folder / 'a', method='lora')
  adapter(folder / 'prompt', folder / 'a', method='prompt', tokens=3)
  copy(folder / 'run', folder / 'averaged', {'optim.ema_decay': 0.9})
  assert run(f'--from={folder / "lora"}', f'--base={folder / "a"}', f'--to={folder / "beside"}') == 0
  for name, changes in dict(
      lost={'checkpoint.init_from': 'gone'},
      drawn={'checkpoint.init_from': ''}, on_average={'checkpoint.init_from': str(folder / 'averaged')},
      grown={'model.vocab_size': 300}, headed={'model.head.labels': 'sequence'}).items():
    copy(folder / 'beside', folder / name, changes)
  return folder


def copy(source, target, changes):
  """A run whose config says something else."""
  shutil.copytree(source, target)
  config = base.loads((target / 'config.json').read_text()).unlock()
  config.update_from_flattened_dict(changes)
  (target / 'config.json').write_text(base.dumps(config))


@pytest.mark.parametrize('flags, told', BAD, ids=[told for _, told in BAD])
def test_faults_end_with_2_and_one_line_and_leave_nothing_behind(flags, told, places, monkeypatch, capsys):
  monkeypatch.chdir(places)
  before = sorted(os.listdir())
  assert run(*flags) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ') and told in lines[0]
  assert sorted(os.listdir()) == before


def test_an_empty_folder_may_be_filled_and_one_that_failed_leaves_no_trace(tmp_path, monkeypatch):
  a = make(tmp_path / 'a')
  (tmp_path / 'b').mkdir()
  monkeypatch.setattr(forms, 'save_generation', lambda *_: 1 / 0)
  assert run(f'--from={a}', f'--to={tmp_path / "b"}', '--form=hf') == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b'] and not list((tmp_path / 'b').iterdir())
  monkeypatch.undo()
  assert run(f'--from={a}', f'--to={tmp_path / "b"}', '--form=hf') == 0
  assert same(a, tmp_path / 'b')


# ---- deltas ------------------------------------------------------------------------------------------------------

METHODS = {'dora': dict(method='lora', rank=3, dora=True, sites=(('attention/(query|out)', True), ('mlp/up', 2))),
           'ia3': dict(method='ia3'), 'prompt': dict(method='prompt', tokens=3)}
IDS = np.random.default_rng(3).integers(0, 256, (2, 9))
ATOL = 3e-4  # float32, logits to 39; measured max 8e-5


def adapter(folder, beside, **method):
  """Writes an adapter far from its start; gives the logits of the model that it makes."""
  given = hf.load_folder(beside)
  model = dataclasses.replace(given.model, peft=PeftConfig(**method))
  rng = np.random.default_rng(1)
  delta = trees.unflatten({path: (1 + rng.random(shape)).astype(np.float32) * 0.5
                           for path, shape in transfer.param_shapes(model).items() if peft.is_delta(path)})
  adapters.save(folder, model, delta)
  params = trees.combine(given.params, delta)
  whole = Transformer(model, sharding.single(given.config.sharding.rules))
  return lambda: LM(given.config, whole, params, tokenizers.load(beside)).logits(IDS)


@pytest.mark.parametrize('name', METHODS)
def test_an_adapter_becomes_a_run_beside_its_base_and_comes_back_bit_for_bit(name, tmp_path):
  a, there, back, merged = make(tmp_path / 'a'), tmp_path / 'run', tmp_path / 'back', tmp_path / 'merged'
  wanted = adapter(tmp_path / 'adapter', a, **METHODS[name])()
  assert run(f'--from={tmp_path / "adapter"}', f'--base={a}', f'--to={there}') == 0
  config = rundir.RunDirectory(str(there)).config
  assert (config.checkpoint.init_from, config.checkpoint.init_step) == (str(a), 0)
  with Checkpoints(there / 'checkpoints', read_only=True) as checkpoints:
    assert all(peft.is_delta(path) for path in checkpoints.shapes(0))
  lm = jaxlm.load(there)
  np.testing.assert_array_equal(lm.logits(IDS), wanted)
  assert np.abs(wanted - jaxlm.load(a).logits(IDS)).max() > 1 and lm.eos == (256, 257, 7)
  a.rename(tmp_path / 'moved')  # of the base, the adapter's folder has the name alone
  assert run(f'--from={there}', f'--to={back}') == 0
  assert weights_of(back) == weights_of(tmp_path / 'adapter')
  named = dict(base_model_name_or_path=str(a))
  assert read(back / targets.CONFIG) == read(tmp_path / 'adapter' / targets.CONFIG) | named
  (tmp_path / 'moved').rename(a)
  if name == 'prompt':
    return
  assert run(f'--from={there}', f'--to={merged}', '--merge') == 0
  close = lambda folder: np.testing.assert_allclose(jaxlm.load(folder).logits(IDS), wanted, atol=ATOL)
  close(merged)
  assert read(merged / 'config.json') == read(a / 'config.json')
  assert read(merged / 'generation_config.json') == read(a / 'generation_config.json')
  assert (merged / 'chat_template.jinja').read_text() == TEMPLATE
  if name == 'ia3':
    return
  assert run(f'--from={tmp_path / "adapter"}', f'--base={a}', f'--to={tmp_path / "again"}', '--merge', '--form=hf') == 0
  assert same(merged, tmp_path / 'again')
  assert run(f'--from={there}', f'--to={tmp_path / "whole"}', '--merge', '--form=run') == 0
  close(tmp_path / 'whole')
  assert rundir.RunDirectory(str(tmp_path / 'whole')).config.model.peft.method == 'none'
  assert run(f'--from={tmp_path / "whole"}', f'--to={tmp_path / "out"}') == 0
  assert same(merged, tmp_path / 'out')


def weights_of(folder):
  found = targets.tensors(folder)
  return {name: (x.dtype, x.tobytes()) for name, x in found.items()}


def test_a_delta_is_pinned_to_the_checkpoint_of_a_run_that_goes_on(tmp_path):
  a, there = make(tmp_path / 'a'), tmp_path / 'run'
  adapter(tmp_path / 'adapter', a, method='lora')
  assert run(f'--from={a}', f'--to={there}') == 0
  model = forms.model_of(rundir.RunDirectory(str(there)).config, 258, 'float32')
  with Checkpoints(there / 'checkpoints') as checkpoints:
    params = checkpoints.restore_params(transfer.wanted(model))[1]
    for step in (3, 5):
      checkpoints.save(step, {'params': trees.map_paths(lambda _, x: x * (1 + step / 100), params)}, {})
  for flags, step in (([], 5), (['--step=3'], 3)):
    out = tmp_path / f'delta{step}'
    assert run(f'--from={tmp_path / "adapter"}', f'--base={there}', f'--to={out}', *flags) == 0
    assert rundir.RunDirectory(str(out)).config.checkpoint.init_step == step
    assert run(f'--from={out}', f'--to={tmp_path / f"merged{step}"}', '--merge') == 0
  five, three = (weights.read_weights(tmp_path / f'merged{step}')['model.norm.weight'] for step in (5, 3))
  np.testing.assert_allclose(five / three, 1.05 / 1.03, rtol=1e-6)
  assert run(f'--from={tmp_path / "delta5"}', f'--to={tmp_path / "back"}') == 0
  assert weights_of(tmp_path / 'back') == weights_of(tmp_path / 'adapter')


def test_a_run_of_a_coarse_base_keeps_a_fine_delta_and_dtypes_are_chosen(tmp_path):
  a, out = make(tmp_path / 'a', transfer.jnp.bfloat16), tmp_path / 'run'
  adapter(tmp_path / 'adapter', a, method='lora')
  beside = [f'--from={tmp_path / "adapter"}', f'--base={a}']
  assert run(*beside, f'--to={out}') == 0
  assert run(f'--from={out}', f'--to={tmp_path / "back"}') == 0
  assert weights_of(tmp_path / 'back') == weights_of(tmp_path / 'adapter')
  assert run(f'--from={out}', f'--to={tmp_path / "half"}', '--save_dtype=float16') == 0
  assert {dtype for dtype, _ in weights_of(tmp_path / 'half').values()} == {np.dtype(np.float16)}
  assert run(*beside, f'--to={tmp_path / "merged"}', '--merge', '--form=hf') == 0
  assert set(weights.read_weights(tmp_path / 'merged').dtypes.values()) == {'BF16'}  # as the base has them


def test_a_run_whose_layers_are_not_stacked_becomes_a_folder_too(tmp_path):
  a = make(tmp_path / 'a')
  assert run(f'--from={a}', f'--to={tmp_path / "run"}') == 0
  copy(tmp_path / 'run', tmp_path / 'flat', {'model.scan': False})
  shutil.rmtree(tmp_path / 'flat/checkpoints')
  with Checkpoints(tmp_path / 'flat/checkpoints') as checkpoints:
    checkpoints.save(0, {'params': trees.map_paths(lambda _, x: transfer.jnp.asarray(x), hf.load_folder(a).params)}, {})
  assert run(f'--from={tmp_path / "flat"}', f'--to={tmp_path / "b"}') == 0
  assert same(a, tmp_path / 'b')


MEASURE = """
import resource, sys
from jaxlm import convert, programs
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert programs.outcome(convert.main, ['convert', *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@pytest.mark.slow
def test_memory_is_at_most_the_largest_tensor_and_a_gibibyte_beyond_the_weights(tmp_path):
  rng = np.random.default_rng(0)

  class Noise:
    dtype = np.dtype(np.float32)

    def __init__(self, shape):
      self.shape = shape

    def __array__(self, dtype=None, copy=None):
      return rng.random(self.shape, np.float32)
  given = HF | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=5, num_attention_heads=16, head_dim=128,
                    num_key_value_heads=16, vocab_size=64_000)
  model = freeze(hf.whole_model(llama.from_hf(given)), vocab_size=64_000, visibility='causal')
  shapes = transfer.param_shapes(model)
  hf.save_folder(tmp_path / 'a', model, trees.unflatten({path: Noise(shape) for path, shape in shapes.items()}),
                 tokenizer=tokenizers.bytes_tokenizer())
  size, largest = (4 * f([int(np.prod(s)) for s in shapes.values()]) for f in (sum, max))
  assert size > 2 << 30

  def peak(*flags):
    env = os.environ | dict(XLA_FLAGS='', PYTHONPATH=str(pathlib.Path(jaxlm.__file__).parents[1]))
    done = subprocess.run([sys.executable, '-c', MEASURE, *flags], capture_output=True, text=True, env=env, check=True)
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * int(done.stdout.splitlines()[-1])
  assert peak(f'--from={tmp_path / "a"}', f'--to={tmp_path / "run"}') < size + largest + (1 << 30)
  assert peak(f'--from={tmp_path / "run"}', f'--to={tmp_path / "b"}') < size + largest + (1 << 30)
  assert peak(f'--from={tmp_path / "a"}', f'--to={tmp_path / "c"}', '--form=hf') < largest + (1 << 30)
  assert same(tmp_path / 'a', tmp_path / 'b') and same(tmp_path / 'a', tmp_path / 'c')
