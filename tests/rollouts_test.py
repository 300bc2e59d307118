"""Learning from a verifier: the reward rises, and what does not matter changes nothing."""
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import check, decode, losses, rollouts, task_losses, train, trees
from jaxlm import config as base
from jaxlm.data.tasks import Example, Task
from jaxlm.errors import JaxlmError, Preempted
from jaxlm.metrics import read_jsonl
from devices import xla_flags

LETTERS = 'abcdefgh'
BASE = 60


pytestmark = pytest.mark.usefixtures('few_devices')


@pytest.fixture(scope='module')
def world(tmp_path_factory, few_devices):
  """(a task: say the first of two letters; a run that has learned to say the first, the second or a third one)."""
  folder = tmp_path_factory.mktemp('world')
  records = [dict(q=f'{a}{b}:', first=a, any=c) for a in LETTERS for b in LETTERS for c in (a, b, 'z')]
  (folder / 'letters.jsonl').write_text('\n'.join(map(json.dumps, records)), encoding='utf-8')
  files = {split: str(folder / 'letters.jsonl') for split in ('train', 'validation', 'test')}
  made = {}
  for name, target in (('any', '{{ any }}'), ('first', '{{ first }}')):
    made[name] = str(folder / f'{name}.json')
    described = dict(kind='text', files=files, input='{{ q }}', target=target)
    (folder / f'{name}.json').write_text(json.dumps(described), encoding='utf-8')
  config = tuned(made['any'], 'answer')
  config.update(steps=BASE)
  train.run(config, str(folder / 'base'))
  return made['first'], str(folder / 'base')


def tuned(task, objective, start=None, **changes):
  """A config that learns a task: two layers of width 32, one device."""
  config = base.smoke(base.default())
  config.update(steps=6, batch_size=32, seq_len=16, log_every=1, eval_every=0, save_every=0, tensorboard=False)
  config.model.update(num_layers=2, width=32, vocab_pad_to=64, structure='decoder', max_length=24)
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=8)
  config.data.update(task=task, packing='padded', task_examples=0)
  config.eval.update(batch_size=32, prompts=())
  config.mesh.update(data=1)
  config.optim.update(lr=1e-2, schedule='constant')
  config.objective.name = objective
  config.objective.grpo.update(group=8, max_new_tokens=4)
  config.objective.ppo.max_new_tokens = 4
  if start:
    base.adopt(config, start)
  if objective == 'ppo':
    config.model.head.update(labels='token', num_labels=1)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def lines(workdir):
  return [line for line in read_jsonl(f'{workdir}/metrics.jsonl') if 'train/loss' in line]


def told(workdir, *names):
  return np.array([[line[f'train/{name}'] for name in names] for line in lines(workdir)])


def parts_of(config, workdir):
  return train.Run(config, workdir, train.prepare(config))


def params_of(workdir):
  return trees.flatten(jaxlm.load(workdir).params)


def nothing(example, text):
  """A verifier that likes everything as much."""
  del example, text
  return 0.5


def wrong(example, text):
  """A verifier that is none."""
  del example
  return text


# ---- learning ----------------------------------------------------------------------------------------------------


def test_the_reward_rises_and_the_reference_stays(world, tmp_path):
  task, start = world
  config = tuned(task, 'grpo', start, steps=60, **{'optim.lr': 3e-3})
  last = train.run(config, f'{tmp_path}/run')
  rewards = told(f'{tmp_path}/run', 'reward')[:, 0]
  assert rewards[:10].mean() < 0.6 and rewards[-10:].mean() > 0.85 and last['eval/validation/reward'] > 0.9
  first, end = lines(f'{tmp_path}/run')[0], lines(f'{tmp_path}/run')[-1]
  assert {f'train/{name}' for name in ('reward', 'reward_std', 'answer_length', 'kl', 'clip_fraction', 'entropy')} <= set(end)
  assert first['train/kl'] == 0 < end['train/kl'] and end['train/entropy'] < first['train/entropy']
  assert first['train/answer_length'] == 2 and first['tokens'] == 64  # a letter and the end
  (_, fresh, _, _), (_, state, frozen, _) = (parts_of(config, f'{tmp_path}/{name}').start() for name in ('fresh', 'run'))
  for path, x in trees.flatten(fresh.params).items():
    np.testing.assert_array_equal(x, trees.flatten(frozen['reference'])[path])
  assert not all((x == y).all() for x, y in zip(jax.tree.leaves(fresh.params), jax.tree.leaves(state.params)))


def test_a_delta_learns_beside_its_base_from_rollouts_of_several_updates(world, tmp_path):
  task, start = world
  changes = {'model.peft.method': 'lora', 'objective.grpo.updates': 2, 'optim.lr': 2e-2}
  train.run(tuned(task, 'grpo', start, steps=60, **changes), f'{tmp_path}/run')
  rewards, kl_old = told(f'{tmp_path}/run', 'reward', 'kl_old').T
  assert rewards[:10].mean() < 0.6 and rewards[-10:].mean() > 0.7  # measured: 0.31, 0.77
  assert kl_old[::2].max() < 1e-9 < kl_old[1::2].max()  # the first update is on-policy
  adapted = params_of(f'{tmp_path}/run')
  for path, x in params_of(start).items():
    np.testing.assert_array_equal(x, adapted[path])


def test_the_reward_rises_by_what_the_policy_expected_and_that_becomes_right(world, tmp_path):
  task, start = world
  config = tuned(task, 'ppo', start, steps=60, **{'objective.ppo.updates': 2, 'objective.ppo.value_weight': 0.5, 'optim.lr': 3e-3})
  last = train.run(config, f'{tmp_path}/run')
  rewards, errors, ratios = told(f'{tmp_path}/run', 'reward', 'value_loss', 'kl_old').T
  assert rewards[:10].mean() < 0.6 and rewards[-10:].mean() > 0.8 and last['eval/validation/reward'] > 0.85
  assert errors[-10:].mean() < errors[:10].mean() and ratios[::2].max() < 1e-9 < ratios[1::2].max()
  assert {'train/kl', 'train/score', 'train/entropy', 'train/clip_fraction', 'train/return'} <= set(lines(f'{tmp_path}/run')[-1])


def test_advantages_are_what_the_score_brought_beyond_what_was_expected(world, tmp_path):
  """Against NumPy: at the end of an answer, cut off or not, nothing comes after its score."""
  task, start = world
  parts = parts_of(tuned(task, 'ppo', start, **{'objective.ppo.kl_weight': 0.0, 'objective.ppo.decay': 0.9}),
                   f'{tmp_path}/run')
  params = parts.start()[1].params
  B, T, first, end = 2, 16, 3, 6  # tokens 3 to 5 of a row of 6 are the answer
  ids = np.arange(B * (T + 1), dtype=np.int32).reshape(B, T + 1) % 8 + 97
  segments = np.broadcast_to(np.arange(T) < end, (B, T)).astype(np.int32)
  weights = np.broadcast_to((np.arange(T) >= first - 1) & (np.arange(T) < end - 1), (B, T)).astype(np.float32)
  batch = dict(tokens=ids[:, :-1], targets=ids[:, 1:], segment_ids=segments, loss_weights=weights,
               positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)))
  worth, _ = task_losses.worth(parts.model, parts.config, params, batch, np.array([1.0, 0.5]))
  values = np.asarray(parts.model.apply({'params': params}, batch).scores[..., 0], float)
  for row, score in enumerate([1.0, 0.5]):
    after = advantage = 0.0
    for column in range(end - 2, first - 2, -1):
      error = (score if column == end - 2 else 0) + after - values[row, column]
      advantage = error + 0.9 * advantage
      after = values[row, column]
      np.testing.assert_allclose(worth['advantages'][row, column], advantage, atol=1e-5)
      np.testing.assert_allclose(worth['returns'][row, column], advantage + values[row, column], atol=1e-5)
  assert not np.asarray(worth['advantages'])[weights == 0].any()


def test_values_become_a_reward_that_is_always_the_same(world, tmp_path):
  """Answers are cut off here: one that is not allowed to end is worth no more than its reward."""
  task, start = world
  config = tuned(task, 'ppo', start, steps=60, **{'objective.ppo.verifier': 'rollouts_test:nothing', 'optim.lr': 3e-3,
                                                 'objective.ppo.value_weight': 1.0, 'objective.ppo.max_new_tokens': 1})
  train.run(config, f'{tmp_path}/run')
  assert told(f'{tmp_path}/run', 'value')[-5:] == pytest.approx(0.5, abs=0.1)


VARIANTS = {'grpo': {}, 'dr_grpo': dict(by_std=False, normalisation='longest'), 'dapo': dict(clip_high=0.28, normalisation='token')}


@pytest.mark.parametrize('variant', VARIANTS)
def test_groups_that_are_rewarded_alike_teach_nothing(variant, world, tmp_path):
  task, start = world
  config = tuned(task, 'grpo', start, steps=1)
  config.objective.grpo.update(verifier='rollouts_test:nothing', kl_weight=0.0, **VARIANTS[variant])
  last = train.run(config, f'{tmp_path}/run')
  assert last['train/grad_norm'] == 0 and last['train/reward'] == 0.5 and last['train/reward_std'] == 0
  assert 'train/kl' not in last


# ---- what does not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('objective, changes', [
    ('grpo', {'objective.grpo.normalisation': 'sequence'}), ('grpo', {'objective.grpo.normalisation': 'token'}), ('ppo', {})])
def test_devices_and_microbatches_change_nothing_given_the_same_rollouts(objective, changes, world, tmp_path, monkeypatch):
  task, start = world
  written, generate = [], decode.generate
  def remembered(*args, **kwargs):
    written.append(generate(*args, **kwargs))
    return written[-1]
  with monkeypatch.context() as patch:
    changes = changes | {f'objective.{objective}.updates': 2, 'optim.lr': 3e-3, 'steps': 4}
    patch.setattr(decode, 'generate', remembered)
    train.run(tuned(task, objective, start, **changes), f'{tmp_path}/one')
    kept = iter(list(written))
    patch.setattr(decode, 'generate', lambda *args, **kwargs: next(kept))
    many = tuned(task, objective, start, accumulation=2, **changes)
    many.mesh.update(data=2, fsdp=2, tensor=2)
    train.run(many, f'{tmp_path}/many')
  names = ('loss', 'grad_norm', 'kl', 'kl_old', 'entropy', 'reward', 'clip_fraction')
  np.testing.assert_allclose(told(f'{tmp_path}/many', *names), told(f'{tmp_path}/one', *names), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(world, tmp_path, monkeypatch):
  task, start = world
  config = tuned(task, 'grpo', start, steps=8, **{'objective.grpo.updates': 2, 'optim.ema_decay': 0.9})
  train.run(config, f'{tmp_path}/whole')
  with monkeypatch.context() as patch:
    calls = iter(range(1, 1000))
    patch.setattr(train.Signals, 'stop', lambda self, together: next(calls) >= 2)
    with pytest.raises(Preempted, match='at step 4'):  # where a rollout ends
      train.run(config, f'{tmp_path}/parts')
  train.run(config, f'{tmp_path}/parts')
  names = ('loss', 'reward', 'kl', 'grad_norm')
  np.testing.assert_array_equal(told(f'{tmp_path}/parts', *names), told(f'{tmp_path}/whole', *names))
  whole = params_of(f'{tmp_path}/whole')
  for path, x in params_of(f'{tmp_path}/parts').items():
    np.testing.assert_array_equal(x, whole[path])


def test_rollouts_are_a_function_of_the_state_and_the_step(world, tmp_path):
  task, start = world
  parts = parts_of(tuned(task, 'grpo', start), f'{tmp_path}/run')
  step, state, frozen, position = parts.start()
  def batch(step, examples):
    _, batches = parts.batches(step, position)
    with batches:
      return parts.rollouts.batch(batches, step, state, frozen, examples, ())[0]
  first, again, other = batch(0, 0), batch(0, 0), batch(1, 0)
  for key, x in first.items():
    np.testing.assert_array_equal(x, again[key])
  tokens, counts = np.asarray(first['tokens']), np.asarray(first['loss_weights'])
  assert (tokens != np.asarray(other['tokens'])).any()  # another step's draws
  questions = np.where(np.cumsum(counts, 1) == 0, tokens, 0).reshape(4, 8, -1)[:, :, :3]
  assert (questions == questions[:, :1]).all() and len(np.unique(questions[:, 0], axis=0)) == 4
  following = batch(0, 32)  # the next questions
  assert not (np.asarray(following['tokens'])[:, 1:3] == tokens[:, 1:3]).all()
  advantages = np.asarray(first['advantages']).reshape(4, 8)
  np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-5)  # float32 sums of 8


@pytest.mark.parametrize('softcap', [0.0, 2.0])
def test_log_probs_are_of_what_a_temperature_draws_from(softcap, world, tmp_path):
  task, start = world
  config = tuned(task, 'grpo', start, **{'model.logit_softcap': softcap})
  parts = parts_of(config, f'{tmp_path}/run')
  params, ids = parts.start()[1].params, np.arange(97, 105, dtype=np.int32)[None]
  batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:]}
  logits = parts.model.apply({'params': params}, batch).logits[..., :parts.model.config.vocab_size]
  wanted = jax.nn.log_softmax(logits / 0.7)[0, np.arange(7), ids[0, 1:]]
  vocabulary = losses.vocabulary_of(parts.model, config.loss)
  found = task_losses.token_log_probs(parts.model, vocabulary, params, batch, None, 0.7)
  np.testing.assert_allclose(found[0], wanted, atol=1e-5)  # float32


PROCESS = '''
import os, sys
import jax
process, port, task, start, workdir = int(sys.argv[1]), *sys.argv[2:]
if port != '0':
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=process)
import rollouts_test
from jaxlm import train
train.run(rollouts_test.tuned(task, 'grpo', start, **{'objective.grpo.updates': 2, 'mesh.data': 4}), workdir)
'''


@pytest.mark.slow
def test_two_processes_learn_what_one_does(world, tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  def begun(name, process, port, devices):
    environment = os.environ | {'XLA_FLAGS': xla_flags(devices), 'PYTHONPATH': os.pathsep.join(
        str(folder) for folder in (pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[1]))}
    command = [sys.executable, '-c', PROCESS, str(process), str(port), *world, f'{tmp_path}/{name}']
    return subprocess.Popen(command, env=environment)
  for process in [begun('one', 0, 0, 4), *(begun('two', i, port, 2) for i in range(2))]:
    assert process.wait(timeout=300) == 0
  names = ('loss', 'grad_norm', 'kl', 'reward')
  # float32 sums in another order, six updates long
  np.testing.assert_allclose(told(f'{tmp_path}/two', *names), told(f'{tmp_path}/one', *names), rtol=1e-4, atol=1e-6)


# ---- questions, answers, verifiers -------------------------------------------------------------------------------


def test_a_long_question_loses_its_beginning_and_a_stop_ends_an_answer(world, tmp_path, monkeypatch):
  task, start = world
  described = json.loads(open(task, encoding='utf-8').read()) | dict(stop=['yz', 'q'], input='{{ q * 20 }}')
  (tmp_path / 'long.json').write_text(json.dumps(described), encoding='utf-8')
  parts = parts_of(tuned(str(tmp_path / 'long.json'), 'grpo', start), f'{tmp_path}/run')
  writer = parts.rollouts.writer
  prompt = writer.prompt(writer.data.train, 0)
  begin = parts.tokenizer.vocab.first
  assert len(prompt) == 16 - 4 and prompt[0] == begin and parts.tokenizer.decode(prompt[1:]).endswith(':')
  encode = parts.tokenizer.encode
  said = iter([[encode('xyzab'), encode('aqb'), encode('abc')]])
  monkeypatch.setattr(decode, 'generate', lambda *args, **kwargs: next(said))
  answers = writer.write({}, [prompt] * 3, None)
  assert answers == [encode('xyz'), encode('aq'), encode('abc')]
  heard = []
  monkeypatch.setitem(rollouts.VERIFIERS, 'exact', lambda task, examples, texts: heard.extend(texts) or [0.0] * 3)
  writer.grade(parts.rollouts.writer.data.examples[:3], answers)
  assert heard == ['x', 'a', 'abc']


def test_verifiers_say_what_an_answer_is_worth():
  examples = [Example(f'{i}', target=' 42 ', record={}) for i in range(3)]
  texts = ['42\n', 'It is 42.', '43']
  program = Task('text', program='rollouts_test:program')
  assert rollouts.graded('exact', program, examples, texts).tolist() == [1, 0, 0]
  assert rollouts.graded('contains', program, examples, texts).tolist() == [1, 1, 0]
  assert rollouts.graded('program', program, examples, texts).tolist() == [1, 0, 0]
  assert rollouts.graded('rollouts_test:nothing', program, examples, texts).tolist() == [0.5] * 3
  with pytest.raises(JaxlmError, match="'rollouts_test:wrong' gave '42.n' for an answer to 0; it must give a finite number"):
    rollouts.graded('rollouts_test:wrong', program, examples, texts)
  with pytest.raises(JaxlmError, match="verifier='program' runs what the task makes of an answer"):
    rollouts.graded('program', Task('text'), examples, texts)


def program(record, answer):
  """That ends well where the answer is the number 42."""
  del record
  return f'assert int({answer!r}) == 42'


@pytest.mark.parametrize('changes, told', [
    ({'objective.grpo.group': 5}, 'batch_size=32 does not divide by config.objective.grpo.group=5'),
    ({'batch_ramp': ((2, 12),)}, 'batch_size=12 does not divide by config.objective.grpo.group=8'),
    ({'objective.grpo.max_new_tokens': 16}, 'max_new_tokens=16 leaves no room for a question in config.seq_len=16'),
    ({'objective.grpo.updates': 4}, 'config.steps=6 does not divide by config.objective.grpo.updates=4'),
    ({'objective.grpo.updates': 2, 'save_every': 3}, 'config.save_every=3 does not divide by'),
    ({'objective.grpo.verifier': 'exakt'}, "Unknown verifier 'exakt'. Known: contains, exact, f1, program; .*'exact'"),
    ({'objective.grpo.verifier': 'no_such:verifier'}, "Cannot import verifier 'no_such:verifier'"),
    ({'model.peft.method': 'prefix'}, "peft.method='prefix': objective 'grpo' writes its texts without virtual tokens"),
    ({'model.head.lm': False}, "objective 'grpo' predicts tokens, so it needs config.model.head.lm to be True"),
    ({'model.structure': 'encoder'}, "objective 'grpo' needs a model of kind decoder or recurrent"),
    ({'data.task': ''}, "objective 'grpo' learns a task; set config.data.task"),
    ({'objective.name': 'ppo', 'model.head.labels': 'token', 'model.head.num_labels': 1, 'mesh.seq': 2},
     'mesh.seq=2: what a token is worth is counted along its row'),
    ({'objective.name': 'ppo', 'model.head.labels': 'none'}, "objective 'ppo' needs config.model.head.labels to be 'token'"),
])
def test_a_bad_setting_is_told_in_a_line(changes, told, world):
  found = check.faults(tuned(world[0], 'grpo', **changes))
  assert len(found) == 1 and '\n' not in found[0] and re.search(told, found[0]), found
