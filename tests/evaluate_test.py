"""The program: it tells what the model was given and said, whatever the batch and however often it was stopped."""
import collections
import hashlib
import json
import math
import os

os.environ['HF_DATASETS_OFFLINE'] = '1'

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config as base
from jaxlm import evaluate, exam, programs, sharding
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tasks, tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM
from jaxlm.measure import intervals, scores
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer

WORDS = 'cat dog sun moon tree lake fire snow'.split()
LENGTH = 96


def program(*given) -> int:
  """The exit code of the program."""
  return programs.outcome(evaluate.main, ['evaluate', *map(str, given)])


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A folder with two runs, one and two, of a layer of random weights, and tasks."""
  folder, tokenizer = tmp_path_factory.mktemp('world'), tokenizers.bytes_tokenizer()
  config = base.smoke(base.default())
  config.model.update(family='gpt2', width=16, num_layers=1, vocab_pad_to=32, max_length=LENGTH)
  config.model.attention.update(num_heads=2, num_kv_heads=2, head_dim=8)
  config.model.mlp.width = 32
  model = Transformer(freeze(base.resolved(config)['model'], vocab_size=tokenizer.vocab.size, visibility='causal'),
                      sharding.single(config.sharding.rules))
  dummy = {'tokens': jnp.zeros((1, 4), jnp.int32)}
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), dummy)['params'])
  for seed, name in enumerate(('one', 'two')):
    rng = np.random.default_rng(seed)
    tokenizer.save(folder / name / 'tokenizer')
    (folder / name / 'config.json').write_text(base.dumps(config))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
    with Checkpoints(folder / name / 'checkpoints') as checkpoints:
      checkpoints.save(1, {'params': params}, {})
  rng = np.random.default_rng(7)
  word = lambda: ' '.join(rng.choice(WORDS, rng.integers(1, 4)))
  questions = [dict(q=word(), a=word(), choices=[f' {word()}' for _ in range(3)], label=int(rng.integers(3)))
               for _ in range(20)]
  questions[14]['q'] = 'long ' * 17  # 85 bytes: learned positions leave room for few tokens
  for name, records in dict(train=questions[:8], test=questions[8:]).items():
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  files = {split: str(folder / f'{name}.jsonl') for split, name in dict(
      train='train', validation='train', test='test').items()}
  for name, task in dict(
      say=dict(kind='text', input='{{ q }}:', target=' {{ a }}', metric='squad', max_new_tokens=12, stop=['e']),
      choose=dict(kind='choice', input='{{ q }}?', target='{{ label }}'),
      told=dict(kind='choice', input='{{ q }}?', target='{{ label }}', instruction='Go.', between='\n'),
      code=dict(kind='text', input='{{ q }}', target='{{ a }}', metric='pass@10', max_new_tokens=4,
                program='assert sum({{ said | tojson }}.encode()) % 5 == 0'),
      written=dict(kind='text', input='{{ q }}?', target=' {{ a }}', between='\n', max_new_tokens=3),
      better=dict(kind='prefer', input='{{ q }}?', second=' {{ a }}', fields=dict(rejected='q'), between='\n'),
      number=dict(kind='regress', input='{{ q }}'), read=dict(kind='document', input='{{ q }} {{ a }}')).items():
    (folder / f'{name}.json').write_text(json.dumps(dict(files=files, **task)))
  return folder


@pytest.fixture(scope='module')
def lm(world):
  return jaxlm.load(world / 'one')


def read(path):
  return json.loads(path.read_text())


def records(world, split='test'):
  return {f'{world}/{split}.jsonl:{i}': json.loads(line) for i, line in
          enumerate((world / f'{split}.jsonl').read_text().splitlines(), 1)}


def said_in(path, task):
  return {said['id']: said for said in read(path)['tasks'][str(task)]['said']}


# ---- what is asked and written -----------------------------------------------------------------------------------


def test_the_table_and_the_file_tell_what_was_given_and_said(world, lm, tmp_path, capsys):
  out, task = tmp_path / 'new' / 'out.json', world / 'say.json'
  assert program(f'--model={world}/one', f'--tasks={task},{world}/read.json', f'--output={out}') == 0
  head, *lines = capsys.readouterr().out.splitlines()
  assert head.split() == ['task', 'measure', 'value', '95%', 'interval', 'examples', 'difference', 'p']
  found = read(out)['tasks']
  for line in lines:
    name, measure, value, low, to, high, examples = line.split()
    metrics, interval = found[name]['metrics'], found[name]['intervals'][measure]
    assert (value, low, high) == tuple(f'{x:.4f}' for x in (metrics[measure], *interval))
    assert (to, examples) == ('to', '12')
  assert len(lines) == 5 and [p.name for p in out.parent.iterdir()] == ['out.json']
  said = said_in(out, task)
  assert list(said) == list(records(world))
  for id, record in records(world).items():
    room = min(12, LENGTH - 1 - len(f'{record["q"]}:'))
    assert said[id]['prompt'] == f'{record["q"]}:'
    assert said[id]['answer'] == lm.generate(said[id]['prompt'], max_new_tokens=room, stop='e')
  for id, one in said_in(out, world / 'read.json').items():
    text = '{q} {a}'.format(**records(world)[id])
    assert one['prompt'] == text and one['answer'][1:] == [len(text)] * 2
    score, = lm.score([''], [text[:LENGTH]])  # what fits into one window
    assert len(text) > LENGTH or one['answer'][0] == pytest.approx(-score[0], rel=1e-5)


def by_hand(world, id, seed, kind):
  """Two examples of the training split, drawn by the question's id, and the question."""
  key = int.from_bytes(hashlib.sha256(os.path.basename(id).encode()).digest()[:8], 'little')
  train = list(records(world, 'train').values())
  drawn = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64))).choice(8, 3, replace=False)[:2]
  answer = lambda r: r['choices'][r['label']] if kind == 'told' else f' {r["a"]}'
  shots = [f'{r["q"]}?{answer(r)}' for r in (train[i] for i in drawn)]
  return '\n'.join([*(['Go.'] if kind == 'told' else []), *shots, f'{records(world)[id]["q"]}?'])


def test_examples_in_a_prompt_are_those_that_are_scored(world, tmp_path, monkeypatch):
  given, score, write = [], LM.score, LM.generate
  monkeypatch.setattr(LM, 'score', lambda self, contexts, *rest, **kw: given.extend(contexts) or score(
      self, contexts, *rest, **kw))
  monkeypatch.setattr(LM, 'generate', lambda self, prompts, **kw: given.extend(prompts) or write(self, prompts, **kw))
  names = 'told', 'better', 'written'
  assert program(f'--model={world}/one', '--tasks=' + ','.join(f'{world}/{name}.json' for name in names), '--shots=2',
                 '--seed=11', '--limit=6', f'--output={tmp_path}/out.json') == 0
  for name in names:
    said = said_in(tmp_path / 'out.json', world / f'{name}.json')
    assert len(said) == 6 and set(said) < set(records(world))
    for id, one in said.items():
      assert one['prompt'] == by_hand(world, id, 11, name)
  # Three choices, two answers, one that is written: all after the same words, where there is no instruction.
  counts = collections.Counter(given)
  assert all(counts[one['prompt']] == 3 for name in names
             for one in said_in(tmp_path / 'out.json', world / f'{name}.json').values())
  assert len(given) == 6 * (3 + 2 + 1)


@pytest.mark.parametrize('norm', exam.NORMS)
def test_the_choice_is_the_likeliest_by_the_norm(norm, world, lm, tmp_path):
  out, right = tmp_path / 'out.json', []
  assert program(f'--model={world}/one', f'--tasks={world}/choose.json', f'--norm={norm}', f'--output={out}') == 0
  for id, one in said_in(out, world / 'choose.json').items():
    record, values = records(world)[id], []
    for choice in record['choices']:
      (nats, tokens, _), (alone, _, _) = lm.score([f'{record["q"]}?', ''], [choice, choice], batch_size=2)
      values.append({'sum': nats, 'token': nats / tokens, 'byte': nats / len(choice),
                     'unconditional': nats - alone}[norm])
    assert one['answer'] == np.argmax(values)
    right.append(one['answer'] == record['label'])
  assert read(out)['tasks'][f'{world}/choose.json']['metrics'] == {'accuracy': np.mean(right)}


# ---- batches, stops, pairs ---------------------------------------------------------------------------------------


def test_the_batch_size_changes_nothing(world, tmp_path):
  names = [str(world / f'{name}.json') for name in ('say', 'choose', 'read')]
  found = []
  for size in (1, 5):
    out = tmp_path / f'{size}.json'
    assert program(f'--model={world}/one', f'--tasks={",".join(names)}', f'--batch_size={size}', f'--output={out}') == 0
    found.append(read(out)['tasks'])
  for name in names:
    one, other = (results[name]['said'] for results in found)
    for a, b in zip(one, other, strict=True):
      wanted = pytest.approx(b['answer']) if 'read' in name else b['answer']  # nats, in another order
      assert a['prompt'] == b['prompt'] and a['answer'] == wanted


@pytest.mark.parametrize('name', ['say', 'choose'])
def test_what_was_stopped_goes_on_where_it_was_and_ends_the_same(name, world, tmp_path, monkeypatch):
  command = ['--model', world / 'one', '--tasks', world / f'{name}.json']
  assert program(*command, '--output', tmp_path / 'whole.json') == 0
  out, kept, asked, left = tmp_path / 'out.json', tmp_path / 'out.json.said', [], []
  ask = exam.ASKERS['text' if name == 'say' else 'choice']

  def stopped(lm, task, examples, *rest):
    if not left.pop():
      raise KeyboardInterrupt
    asked.extend(example.id for example in examples)
    return ask(lm, task, examples, *rest)
  monkeypatch.setattr(exam, 'CHUNK', 3)
  monkeypatch.setattr(exam, 'ASKERS', dict.fromkeys(exam.ASKERS, stopped))
  left[:] = [0, 1, 1]  # from the end: two chunks are asked
  assert program(*command, '--output', out) == 1 and len(asked) == 6
  assert kept.exists() and not out.exists()
  kept.write_text(kept.read_text() + '{"key": "torn')
  left[:] = [0]
  assert program('--model', world / 'two', *command[2:], '--output', out) == 1  # another model takes no answers of this
  left[:] = [0, 1]
  assert program(*command, '--output', out) == 1
  left[:] = [1]  # what came behind the torn line is taken
  assert program(*command, '--output', out) == 0
  assert sorted(asked) == sorted(records(world)) and not kept.exists() and read(out) == read(tmp_path / 'whole.json')


def test_samples_of_programs_are_a_questions_own(world, tmp_path, monkeypatch):
  command, found = [f'--model={world}/one', f'--tasks={world}/code.json', '--limit=3', '--samples=12'], []
  for name, chunk in (('a', 1), ('b', 64)):
    monkeypatch.setattr(exam, 'CHUNK', chunk)
    assert program(*command, '--temperature=1.5', f'--batch_size={chunk}', f'--output={tmp_path}/{name}.json') == 0
    found.append(said_in(tmp_path / f'{name}.json', world / 'code.json'))
  assert found[0] == found[1] and len(found[0]) == 3
  for said in found[0].values():
    failed = sum(sum(text.encode()) % 5 > 0 for text in said['answer'])
    assert len(said['answer']) == 12 and len(set(said['answer'])) > 1
    assert said['row'] == [1 - math.comb(failed, 10) / math.comb(12, 10), 1]


def test_two_models_are_compared_example_by_example(world, tmp_path, capsys):
  there, here, task = tmp_path / 'there.json', tmp_path / 'here.json', str(world / 'say.json')
  assert program(f'--model={world}/two', f'--tasks={task}', f'--output={there}') == 0
  capsys.readouterr()
  assert program(f'--model={world}/one', f'--tasks={task}', f'--output={here}', f'--against={there}', '--seed=3') == 0
  a, b = (np.array([said['row'] for said in said_in(path, task).values()]) for path in (here, there))
  wanted = intervals.paired(scores.METRICS['squad'], a, b, 3)
  found = read(here)['tasks'][task]['paired']
  assert found == {name: pair._asdict() for name, pair in wanted.items()} and set(found) == {'exact_match', 'f1'}
  last = capsys.readouterr().out.splitlines()[-1].split()
  assert last[1] == 'f1' and last[-2:] == [f'{wanted["f1"].difference:+.4f}', f'{wanted["f1"].p_randomization:.4f}']
  capsys.readouterr()
  assert program(f'--model={world}/one', f'--tasks={world}/choose.json', f'--against={there}') == 2
  assert 'and none of --tasks' in capsys.readouterr().err
  assert program(f'--model={world}/one', f'--tasks={task}', f'--against={there}', '--limit=3') == 2
  assert 'there with limit=0, here it would be with 3, so of other examples; give --limit=0.' in capsys.readouterr().err


# ---- tasks of lm-eval --------------------------------------------------------------------------------------------


def test_tasks_of_lm_eval_join_the_table_and_the_file(world, tmp_path, capsys):
  yaml = pytest.importorskip('yaml')
  pytest.importorskip('lm_eval')
  for name in ('choice', 'other'):
    (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(dict(
        task=f'my_{name}', dataset_path='json', test_split='test', fewshot_split='train', num_fewshot=1,
        output_type='multiple_choice', doc_to_text='{{q}}?', doc_to_choice='choices', doc_to_target='label',
        target_delimiter='', metric_list=[dict(metric='acc')], metadata=dict(version=1), dataset_kwargs=dict(
            data_files={split: f'{world}/{split}.jsonl' for split in ('test', 'train')},
            cache_dir=str(tmp_path / 'cache')))))
  command = [f'--model={world}/one', f'--harness_tasks={tmp_path}']
  assert program(*command, '--harness=my_cho*', f'--tasks={world}/choose.json', '--norm=sum', '--shots=0',
                 f'--output={tmp_path}/out.json') == 0
  found = read(tmp_path / 'out.json')
  value = found['harness']['results']['my_choice']['acc,none']
  assert value == found['tasks'][f'{world}/choose.json']['metrics']['accuracy']
  given = [sample['arguments'][0][0] for sample in found['harness']['samples']['my_choice']]
  assert given == [f'{record["q"]}?' for record in records(world).values()]
  *_, last = capsys.readouterr().out.splitlines()
  error = found['harness']['results']['my_choice']['acc_stderr,none']
  low, high = (f'{value + side * 1.96 * error:.4f}' for side in (-1, 1))
  assert last.split() == ['my_choice', 'acc', f'{value:.4f}', low, 'to', high, '12']
  assert program(*command, '--limit=4', '--max_length=60') == 0  # all of the folder, with the shots that they say
  lines = capsys.readouterr().out.splitlines()[1:]
  assert [line.split()[0] for line in lines] == ['my_choice', 'my_other'] and all(line.endswith(' 4') for line in lines)


# ---- faults ------------------------------------------------------------------------------------------------------

BAD = [
    ([], '--model is missing'), (['--model=one'], '--tasks is missing; give some of docstring'),
    (['--model=one', '--tasks=docstrings'], "Unknown task 'docstrings'"),
    (['--model=one', '--tasks=nope.json'], 'nope.json is no task that can be read'),
    (['--model=one', '--tasks=one/config.json'], "a task is an object with at least 'kind'"),
    (['--model=nope', '--tasks=say.json'], 'nope is not there'),
    (['--model=one', '--tasks=say.json', '--output=train.jsonl'], '--output=train.jsonl is there already'),
    (['--model=one', '--tasks=say.json', '--against=nope'], '--against=nope is no --output'),
    (['--model=one', '--tasks=say.json', '--against=say.json'], '--against=say.json is no --output'),
    (['--model=one', '--tasks=choose.json', '--shots=8'], 'shots=8: the training split has 8 examples'),
    (['--model=one', '--tasks=say.json', '--norm=none'], '--norm'),
    (['--model=one', '--tasks=say.json', '--limit=-1'], '--limit'),
    (['--model=one', '--tasks=say.json', '--max_length=9'], '--max_length is of tasks of lm-eval'),
    (['--model=one', '--tasks=say.json', '--chat_template=chatml'], '--chat_template is of tasks of lm-eval'),
    (['--model=one', '--tasks=code.json', '--samples=10'],
     'samples=10 are drawn for a task that has a `program`, at a temp'),
    (['--model=one', '--tasks=code.json'], 'pass@10, example 0: wanted at least 10 samples'),
    (['--model=one', '--tasks=say.json', '--samples=2', '--temperature=1'],
     'samples=2 are drawn for a task that has a'),
    (['--model=one', '--tasks=number.json'], "needs a model with a label head of kind 'sequence'"),
]


@pytest.mark.parametrize('given, told', BAD, ids=[told for _, told in BAD])
def test_faults_are_one_line_each(given, told, world, monkeypatch, capsys):
  monkeypatch.chdir(world)
  before = sorted(os.listdir())
  assert program(*given) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ') and told in lines[0]
  assert sorted(os.listdir()) == before


def test_help_tells_every_flag(capsys):
  assert program('--help') == 0
  text = capsys.readouterr().out
  names = 'harness', 'harness_tasks', 'max_length', 'chat_template', 'shots', 'against'
  assert all(f'--{name}' in text for name in names) and 'FILE.said' in text


def test_examples_of_one_id_are_compared_one_by_one():
  said = lambda *answers: dict(said=[dict(id='same.txt', row=row) for row in scores.METRICS['accuracy'].rows(
      answers, [1] * len(answers)).tolist()])
  task = tasks.Task('choice')
  assert exam.compared(task, said(1, 1, 0, 1), said(0, 1, 0, 0))['accuracy']['difference'] == 0.5
  with pytest.raises(JaxlmError, match='other examples'):
    exam.compared(task, said(1), said(1, 1))


def test_a_last_turn_that_says_nothing_is_named_before_anything_is_asked():
  called = dict(role='assistant', tool_calls=[dict(function=dict(name='f', arguments={}))])
  example = tasks.Example('x.jsonl:3', messages=(dict(role='user', content='a'), called))
  with pytest.raises(JaxlmError, match='x.jsonl:3: the last turn of the assistant calls a tool and says nothing'):
    exam.right(tasks.Task('chat'), [example])
