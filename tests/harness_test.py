"""Tasks of lm-eval on local files: in process the scores of its own `hf` model on the exported weights."""
import dataclasses
import json
import os
import socket
import subprocess
import sys
import types

os.environ['HF_DATASETS_OFFLINE'] = '1'

import numpy as np
import pytest
import tokenizers as backend
import yaml

import jaxlm
from jaxlm import convert, harness, programs
from jaxlm.data import templates, tokenizers
from jaxlm.errors import JaxlmError

pytest.importorskip('lm_eval')
torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')

GPT2 = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], n_positions=96, n_embd=32, n_layer=1, n_head=4,
            initializer_range=0.3)
LLAMA = dict(model_type='llama', architectures=['LlamaForCausalLM'], hidden_size=32, intermediate_size=48,
             num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
             rope_theta=1000.0, max_position_embeddings=80)
T5 = dict(model_type='t5', architectures=['T5ForConditionalGeneration'], d_model=32, d_kv=8, d_ff=48, num_layers=1,
          num_heads=4, decoder_start_token_id=1)
# GPT-2's tokenizer adds nothing, Llama's begins a text, T5's ends one.
CASES = {'gpt2': (GPT2, '<|endoftext|>', ''), 'llama': (LLAMA, '<s>', '<s>'), 't5': (T5, None, '</s>')}
WORDS = 'the a cat dog sat ran on under mat tree while slowly two birds sang and then what why because'.split()
NATS = 1e-3  # float32, other kernels, sums of up to 80 tokens; measured max 1.2e-4


def sentence(rng, words):
  return ' '.join(rng.choice(WORDS, words)) + '.'


def save_tokenizer(folder, bos, frame):
  """Pieces of byte pairs, among them the names of a chat."""
  rng = np.random.default_rng(0)
  texts = [f'Question: {sentence(rng, 9)}\nAnswer: {sentence(rng, 5)}\n\n' for _ in range(200)]
  tokenizer = tokenizers.train('bpe', texts, 340)
  ends = '<|endoftext|>' if bos == '<|endoftext|>' else '</s>'
  tokenizer.backend.add_special_tokens([t for t in (bos, ends, '<|im_start|>', '<|im_end|>') if t])
  if frame:
    parts = f'{frame} $A' if frame == bos else f'$A {frame}'
    tokenizer.backend.post_processor = backend.processors.TemplateProcessing(
        single=parts, pair=f'{parts} $B', special_tokens=[(frame, tokenizer.backend.token_to_id(frame))])
  roles = dict(eos=ends, pad='<|pad|>') | (dict(bos=bos) if bos else {})
  tokenizers.Tokenizer(tokenizer.backend, roles, 'made').save(folder)
  (folder / 'chat_template.jinja').write_text(templates.TEMPLATES['chatml'].source)
  return tokenizers.load(folder)


def make(folder, name):
  """(lm-eval's `hf` model of a folder, the folder loaded here)."""
  from lm_eval.models.huggingface import HFLM
  case, bos, frame = CASES[name]
  tokenizer = save_tokenizer(folder, bos, frame)
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(
      **case, vocab_size=tokenizer.vocab.size, bos_token_id=tokenizer.vocab.bos, eos_token_id=tokenizer.vocab.eos,
      pad_token_id=tokenizer.vocab.pad)
  model = getattr(transformers, case['architectures'][0])(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():  # far from the initial symmetry
      parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
  model.save_pretrained(folder)
  given = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(folder / 'tokenizer.json'), bos_token=bos, eos_token=tokenizer.backend.id_to_token(
          tokenizer.vocab.eos), pad_token='<|pad|>', chat_template=(folder / 'chat_template.jinja').read_text())
  if name == 'llama':  # a run of ours, and the weights that it exports
    run, exported = folder.with_name(f'{folder.name}-run'), folder.with_name(f'{folder.name}-exported')
    for source, target in ((folder, run), (run, exported)):
      assert programs.outcome(convert.main, ['jaxlm.convert', f'--from={source}', f'--to={target}']) == 0
    return HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(exported), tokenizer=given,
                batch_size=3), jaxlm.load(run)
  return HFLM(pretrained=model, tokenizer=given, batch_size=3), jaxlm.load(folder)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  made = {}
  def model(name):
    if name not in made:
      folder = tmp_path_factory.mktemp(name)
      made[name] = (*make(folder, name), folder)
    return made[name]
  return model


def write(folder, name, docs, metrics, **task):
  """A task, and the file that it is about."""
  file = folder / f'{name}.jsonl'
  file.write_text(''.join(json.dumps(doc) + '\n' for doc in docs))
  metrics = [dict(metric=metric, aggregation='mean', higher_is_better=True) if metric == 'exact_match' else
             dict(metric=metric) for metric in metrics]
  (folder / f'{name}.yaml').write_text(yaml.safe_dump(dict(
      task=name, dataset_path='json', test_split='test', num_fewshot=0, metadata=dict(version=1), metric_list=metrics,
      dataset_kwargs=dict(data_files=dict(test=str(file), train=str(file)), cache_dir=str(folder / 'cache'))) | task))


ASKED = dict(doc_to_text='Question: {{question}}\nAnswer:', doc_to_choice='choices', doc_to_target='label')
SAYING = dict(output_type='generate_until', doc_to_text='Question: {{question}}\nAnswer:', doc_to_target='answer',
              generation_kwargs=dict(until=['e', '\n'], max_gen_toks=8, do_sample=False))


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A folder of tasks on files."""
  rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp('tasks')
  questions = [dict(question=sentence(rng, 5), choices=[sentence(rng, n) for n in rng.integers(1, 5, 3)],
                    label=int(rng.integers(3))) for _ in range(10)]
  write(folder, 'choice', questions, ['acc', 'acc_norm'], output_type='multiple_choice', **ASKED)
  write(folder, 'fewshot', questions, ['acc'], output_type='multiple_choice', fewshot_split='train', **ASKED,
        num_fewshot=7)  # longer than the windows
  write(folder, 'prefilled', questions, ['acc'], output_type='multiple_choice', fewshot_split='train', **ASKED,
        num_fewshot=1, gen_prefix='I say')
  write(folder, 'texts', [dict(text=' '.join(sentence(rng, 8) for _ in range(n))) for n in (1, 9, 20, 2)],
        ['word_perplexity', 'byte_perplexity', 'bits_per_byte'], output_type='loglikelihood_rolling', doc_to_text='',
        doc_to_target='text')
  write(folder, 'saying', [dict(question=sentence(rng, n), answer='') for n in (5, 80, 5, 6, 4, 100)],
        ['exact_match'], **SAYING)
  return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def connect(self, address):
    raise AssertionError(f'the network was asked for: {address}')
  monkeypatch.setattr(socket.socket, 'connect', connect)
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: connect(None, args))


def theirs(model, tasks, names, **options):
  """What lm-eval says of its own model."""
  import lm_eval
  from lm_eval.tasks import TaskManager
  manager = TaskManager(include_path=str(tasks), include_defaults=False)
  return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def ours(lm, tasks, names, **options):
  return harness.run(lm, names, include_path=str(tasks), bootstrap_iters=0, **options)


def assert_same(found, wanted, names):
  """Scores, prompts and each answer."""
  for name in names:
    scores, theirs = found['results'][name], wanted['results'][name]
    assert set(scores) == set(theirs)
    for key, value in theirs.items():
      assert scores[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (name, key)
    for a, b in zip(found['samples'][name], wanted['samples'][name], strict=True):
      assert a['arguments'] == b['arguments'] and a['doc'] == b['doc']
      for x, y in zip(a['resps'], b['resps'], strict=True):
        assert_same_answer(x[0], y[0])


def assert_same_answer(a, b):
  if isinstance(b, (tuple, list)):
    assert a[0] == pytest.approx(b[0], abs=NATS) and bool(a[1]) == b[1]
  else:
    assert a == (b if isinstance(b, str) else pytest.approx(b, abs=NATS))


# ---- beside lm-eval's own model ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_scores_are_those_of_hf_on_the_exported_weights(models, tasks, tmp_path, name):
  hf, lm, _ = models(name)
  names = ['choice', 'fewshot', 'texts', 'saying']
  found, wanted = ours(lm, tasks, names, batch_size=4), theirs(hf, tasks, names)
  assert_same(found, wanted, names)
  assert found['results']['texts']['bits_per_byte,none'] > 1
  said = [sample['resps'][0][0] for sample in wanted['samples']['saying']]
  assert len(set(said)) > 3
  docs = [dict(sample['doc'], answer=text if i % 2 else text + 'no') for i, (sample, text) in enumerate(
      zip(wanted['samples']['saying'], said))]
  write(tmp_path, 'half', docs, ['exact_match'], **SAYING)
  for scores in (ours(lm, tmp_path, None, batch_size=3), theirs(hf, tmp_path, ['half'])):
    assert scores['results']['half']['exact_match,none'] == 0.5


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_scores_of_conversations_are_those_of_hf(models, tasks, name):
  hf, lm, folder = models(name)
  names, options = ['choice', 'saying', 'prefilled'], dict(system_instruction='Say no more than you know.')
  found = ours(lm, tasks, names, chat_template=folder, **options)
  assert_same(found, theirs(hf, tasks, names, apply_chat_template=True, **options), names)
  prompt, _ = found['samples']['prefilled'][0]['arguments'][0]
  assert prompt.startswith('<|im_start|>system\nSay no') and prompt.endswith('<|im_start|>assistant\nI say')
  assert prompt.count('<|im_start|>assistant') == 2


def test_scores_of_an_encoder_decoder_are_those_of_hf(models, tasks):
  hf, lm, _ = models('t5')
  names = ['choice', 'fewshot', 'texts']
  assert_same(ours(lm, tasks, names), theirs(hf, tasks, names), names)
  # `hf` says as many more tokens as the longest source of its batch has.
  found, wanted = (run['samples']['saying'] for run in (ours(lm, tasks, 'saying'), theirs(hf, tasks, ['saying'])))
  for a, b in zip(found, wanted, strict=True):
    assert a['resps'][0][0] and b['resps'][0][0].startswith(a['resps'][0][0])


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_a_chosen_window_is_that_of_hf(models, tasks, name):
  from lm_eval.models.huggingface import HFLM
  hf, lm, _ = models(name)
  hf = HFLM(pretrained=hf.model, tokenizer=hf.tokenizer, batch_size=2, max_length=21)
  names = ['choice', 'texts']
  assert_same(ours(lm, tasks, names, max_length=21), theirs(hf, tasks, names), names)


def instance(*args):
  return types.SimpleNamespace(args=args, task_name=None)


@pytest.mark.parametrize('name', CASES)
def test_text_becomes_the_ids_that_hf_reads(models, name):
  hf, lm, _ = models(name)
  model = harness.harness_model(lm, batch_size=2)
  start = hf.tokenizer.decode(hf.prefix_token_id)
  assert (model.prefix_token_id, model.eot_token_id) == (hf.prefix_token_id, hf.eot_token_id)
  for text in ('', 'the cat', ' sat ', f'{start}the cat', 'a<|im_end|>\nb', f'the {start} end', 'é\n\n'):
    for special in (None, True, False):
      assert model.tok_encode(text, special) == hf.tok_encode(text, special)
  pairs = [('the cat', ' sat'), ('the cat ', 'sat on.'), ('the cat\n', '\nsat'), ('', 'the cat'), ('', f'{start}cat'),
           ('<|im_start|>user\n', 'the dog'), (' ', 'dog')]
  if name == 'llama':  # of others nothing is left of the context before the space, and `hf` fails
    pairs += [(start, 'the dog')]
  else:
    pairs.pop()
  wanted = hf.loglikelihood([instance(*pair) for pair in pairs])
  for a, b in zip(model.loglikelihood([instance(*pair) for pair in pairs]), wanted, strict=True):
    assert_same_answer(a, b)


# ---- alone ---------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_size_of_a_batch(models, tasks):
  _, lm, folder = models('llama')
  names = ['choice', 'texts', 'saying']
  drawn = dict(gen_kwargs=dict(do_sample=True, temperature=1.0, top_p=0.9, until=[], max_gen_toks=6))
  for given in ({}, drawn):
    one, many = (ours(lm, tasks, names, batch_size=size, limit=4, **given) for size in (1, 4))
    assert_same(many, one, names)


def test_what_is_drawn_again_is_drawn_anew(models):
  model = harness.harness_model(models('llama')[1], batch_size=2)
  drawn = dict(do_sample=True, temperature=1.0, max_gen_toks=8)
  assert len(set(model.generate_until([instance('the cat', drawn)] * 5))) > 2
  assert len(set(model.generate_until([instance('the cat', drawn | dict(do_sample=False))] * 5))) == 1


def test_answers_come_in_the_order_of_requests_whatever_each_asks(models):
  _, lm, _ = models('gpt2')
  model = harness.harness_model(lm, batch_size=2)
  manners = [dict(max_gen_toks=n, until=[]) for n in (3, 5)]
  texts = ['the', 'a cat sat on the mat', 'two birds', 'why']
  wanted = [model.generate_until([instance(text, manner)])[0] for text in texts for manner in manners]
  assert model.generate_until([instance(text, manner) for text in texts for manner in manners]) == wanted
  assert len(set(wanted)) > 4


def test_a_piece_across_the_border_is_scored_whole(models):
  _, lm, _ = models('gpt2')
  model = harness.harness_model(lm)
  assert len(lm.tokenizer.encode(' cat')) == 1
  ((nats, _),) = model.loglikelihood([instance('the ca', 't')])
  assert nats == pytest.approx(lm.score(['the'], [' cat'])[0][0], abs=1e-4)


def test_texts_end_at_stops_and_at_the_names_of_special_tokens(models, monkeypatch):
  _, lm, _ = models('gpt2')
  model, (end,) = harness.harness_model(lm), lm.tokenizer.encode('<|im_end|>', special=True)
  asked = []
  def generate(self, prompts, **given):
    asked.append((self.eos, given))
    return [lm.tokenizer.encode('the cat sat') + [end]] * len(prompts)
  monkeypatch.setattr(type(lm), 'generate', generate)
  assert model.generate_until([instance('a', dict(until=['<|im_end|>'], max_gen_toks=5))]) == ['the cat sat']
  assert model.generate_until([instance('a', dict(until='at', max_new_tokens=5, temperature=0.5))]) == ['the c']
  (first, _), (second, given) = asked
  assert set(first) == {*lm.eos, end} and second == lm.eos
  assert given == dict(max_new_tokens=5, temperature=0.5, stop=['at', '<|endoftext|>'], batch_size=32)


def test_requests_that_are_cached_are_not_computed_again(models, tasks, tmp_path, monkeypatch):
  _, lm, _ = models('gpt2')
  names = ['choice', 'texts', 'saying']
  first = ours(lm, tasks, names, use_cache=str(tmp_path / 'cache'))
  for method in ('score', 'generate'):
    monkeypatch.setattr(type(lm), method, None)
  assert_same(ours(lm, tasks, names, use_cache=str(tmp_path / 'cache')), first, names)


def test_a_template_comes_from_a_folder_or_by_name_and_names_the_cache(models):
  _, lm, folder = models('gpt2')
  talk = [dict(role='system', content='Be brief.'), dict(role='user', content='why')]
  made = [harness.harness_model(lm, chat_template=given) for given in (folder, 'gemma', templates.TEMPLATES['mistral'])]
  assert made[0].chat_template(True) == templates.TEMPLATES['chatml'].source and not made[0].chat_template(False)
  assert made[0].apply_chat_template(talk) == templates.TEMPLATES['chatml'].render(talk, add_generation_prompt=True)
  assert len({model.tokenizer_name for model in made}) == 3 and all('/' not in m.tokenizer_name for m in made)
  answering = [*talk[1:], dict(role='assistant', content='I say ')]
  assert made[0].apply_chat_template(answering, add_generation_prompt=False).endswith('<|im_start|>assistant\nI say ')
  assert made[1].apply_chat_template(answering, add_generation_prompt=False).endswith('model\nI say')  # it trims


def test_a_template_without_a_system_is_rendered_without_it(models, caplog):
  source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
  model = harness.harness_model(models('gpt2')[1], chat_template=templates.Template(source, '', ''))
  talk = [dict(role='system', content='Be brief.'), dict(role='user', content='why')]
  assert model.apply_chat_template(talk) == 'why' == model.apply_chat_template(talk)
  assert caplog.text.count("The system's turns are left out.") == 1


ALONE = """
import importlib.machinery, socket, sys
import jaxlm.harness
assert not set(sys.modules) & {'lm_eval', 'torch', 'transformers', 'datasets'}
finder = importlib.machinery.PathFinder
find, hidden = finder.find_spec, ('torch', 'transformers', 'accelerate')
finder.find_spec = staticmethod(lambda name, *more: None if name.partition('.')[0] in hidden else find(name, *more))
def connect(*args):
  raise AssertionError('the network was asked for')
socket.socket.connect = socket.getaddrinfo = connect
import jaxlm
found = jaxlm.harness.run(jaxlm.load(sys.argv[1]), 'choice', sys.argv[2], limit=2)
assert found['results']['choice']['sample_len'] == 2, found['results']
"""


def test_tasks_run_without_torch_and_without_a_network(models, tasks):
  _, _, folder = models('gpt2')
  done = subprocess.run([sys.executable, '-c', ALONE, folder, tasks], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr[-2000:]


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(models, monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  with pytest.raises(JaxlmError, match=r'pip install "jaxlm\[harness\]"'):
    harness.harness_model(models('gpt2')[1])


@pytest.mark.parametrize('given, words', [
    (dict(batch_size=0), 'batch_size must be at least 1; got 0'),
    (dict(max_length=-1), 'max_length must be at least 1; got -1'),
    (dict(max_length=97), 'more than the 96 positions'), (dict(chat_template='chatmk'), "Did you mean 'chatml'"),
    (dict(tasks='choise'), "Unknown task 'choise' .* Did you mean 'choice'"),
    (dict(tasks='choice', include_path='/nowhere'), 'include_path must be a folder'),
    (dict(tasks=[]), 'No task to measure'),
    (dict(tasks='saying', max_length=8), 'max_gen_toks=8 leaves no room'),
    (dict(tasks='saying', gen_kwargs=dict(top_w=1)), "top_w=1, which is not known .* Did you mean 'top_"),
    (dict(tasks='choice', max_length=2), 'A continuation has . tokens, and max_length=2'),
    (dict(tasks='choice', apply_chat_template=True), 'chat_template must be one of .* none was given')])
def test_what_cannot_be_is_refused(models, tasks, given, words, monkeypatch):
  from lm_eval.tasks import TaskManager
  own = TaskManager.__init__
  monkeypatch.setattr(TaskManager, '__init__', lambda self, include_path=None, include_defaults=True: own(
      self, include_path=include_path, include_defaults=False))  # its own tasks take seconds to list
  with pytest.raises(JaxlmError, match=words):
    harness.run(models('gpt2')[1], **dict(include_path=tasks) | given)


def test_data_that_is_not_there_is_told_in_one_line(models, tmp_path):
  write(tmp_path, 'gone', [], ['acc'], output_type='multiple_choice', **ASKED)
  (tmp_path / 'gone.jsonl').unlink()
  with pytest.raises(JaxlmError, match='Data of gone cannot be read: .*Download it first'):
    harness.run(models('gpt2')[1], None, tmp_path)


def test_models_that_continue_no_text_are_refused(models):
  lm = types.SimpleNamespace(**vars(models('gpt2')[1]))
  lm.tokenizer = None
  with pytest.raises(JaxlmError, match='without a tokenizer'):
    harness.harness_model(lm)
  lm = types.SimpleNamespace(**vars(models('gpt2')[1]))
  lm.model = types.SimpleNamespace(config=dataclasses.replace(lm.model.config, visibility='full'))
  with pytest.raises(JaxlmError, match='sees both sides'):
    harness.harness_model(lm)
