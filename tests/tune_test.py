"""Adapting a trained model: what is trained and saved, what stays, on any mesh, and what a loaded delta computes."""
import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

import jaxlm
from jaxlm import checkpoint, rundir, train, trees
from jaxlm import config as base
from jaxlm.errors import JaxlmError, Preempted, RunFailed
from jaxlm.metrics import read_jsonl
from jaxlm.models import peft

QUESTIONS = 'abcdefgh'


pytestmark = pytest.mark.usefixtures('few_devices')


def task(folder, name, records, kind_='', **settings):
  (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, records)), encoding='utf-8')
  files = {split: str(folder / f'{name}.jsonl') for split in ('train', 'validation', 'test')}
  (folder / f'{name}.json').write_text(json.dumps(dict(kind=kind_ or name, files=files, **settings)), encoding='utf-8')
  return str(folder / f'{name}.json')


@pytest.fixture(scope='module')
def world(tmp_path_factory, few_devices):
  """A folder with tasks that can be learned by heart, and runs of a decoder and an encoder to start from."""
  folder = tmp_path_factory.mktemp('world')
  letters = [(a, b) for a in QUESTIONS for b in QUESTIONS]
  tasks = {
      'text': task(folder, 'text', [dict(q=f'{a}{b}:', a=b + a) for a, b in letters], input='{{ q }}', target='{{ a }}'),
      'classify': task(folder, 'classify', [dict(text=a + b, label=f'is {a}') for a, b in letters]),
      'regress': task(folder, 'regress', [dict(text=a + b, label=str(ord(a) - 97)) for a, b in letters]),
      'multi_label': task(folder, 'multi_label', [dict(text=a + b, labels=sorted({a, b})) for a, b in letters]),
      'tag': task(folder, 'tag', [dict(words=[a, b], tags=['B-A' if x < 'd' else 'O' for x in (a, b)]) for a, b in letters]),
      'span': task(folder, 'span', [dict(text=a, context=f'{b}{b} {a}!', answer=f'{a}!', start=3) for a, b in letters],
                   second='{{ context }}'),
      'retrieve': task(folder, 'retrieve', [dict(text=a, doc=a + a) for a in QUESTIONS], second='{{ doc }}'),
      'liked': task(folder, 'liked', [dict(text=a, said=c, label=label) for a, b in letters
                                      for c, label in ((b, 'good'), ('z', 'bad'))], kind_='classify', second='{{ said }}',
                    labels=('bad', 'good')),
      'prefer': task(folder, 'prefer', [dict(text=a, good=b, rejected='z') for a, b in letters], second='{{ good }}'),
  }
  runs = {}
  for name, structure, objective in (('decoder', 'decoder', 'answer'), ('encoder', 'encoder', 'classify')):
    config = tuned(tasks, objective, 'text' if objective == 'answer' else 'classify', structure=structure)
    config.steps = 3
    runs[name] = str(folder / name)
    train.run(config, runs[name])
  return tasks, runs


def tuned(tasks, objective, name, structure='decoder', start=None, **changes):
  """A config that learns a task: two layers of width 32, one device."""
  config = base.smoke(base.default())
  config.update(steps=6, batch_size=8, seq_len=32, log_every=1, eval_every=3, save_every=3, tensorboard=False)
  config.model.update(num_layers=2, width=32, vocab_pad_to=64, structure=structure, max_length=48)
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=8)
  labels = {'classify': ('sequence', 8), 'regress': ('sequence', 1), 'multi_label': ('sequence', 8), 'tag': ('token', 2),
            'extract': ('span', 2)}.get(objective)  # of the others a test says it
  if labels:
    config.model.head.update(labels=labels[0], num_labels=labels[1], lm=False)
  config.data.update(task=tasks[name], packing='padded')
  config.eval.update(batch_size=8, prompts=())
  config.mesh.update(data=1)
  config.objective.name = objective
  config.optim.lr = 1e-2
  if start:
    base.adopt(config, start)
    config.model.head.update(labels=labels[0] if labels else 'none', num_labels=labels[1] if labels else 2)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def losses(workdir):
  return [line['train/loss'] for line in read_jsonl(f'{workdir}/metrics.jsonl') if 'train/loss' in line]


def evaluated(workdir):
  return [line['eval/validation/loss'] for line in read_jsonl(f'{workdir}/metrics.jsonl') if 'eval/validation/loss' in line]


def saved(workdir, step):
  folder = checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True)
  return folder.shapes(step)


METHODS = {
    'lora': {'method': 'lora'}, 'dora': {'method': 'lora', 'dora': True, 'stabilised': True}, 'ia3': {'method': 'ia3'},
    'bottleneck': {'method': 'bottleneck', 'width': 8}, 'bitfit': {'method': 'bitfit'},
    'prompt': {'method': 'prompt', 'tokens': 3}, 'p_tuning': {'method': 'prompt', 'tokens': 3, 'encoder': 'lstm', 'width': 8},
    'prefix': {'method': 'prefix', 'tokens': 3, 'encoder': 'mlp', 'width': 8}}


def of_method(name):
  return {f'model.peft.{key}': value for key, value in METHODS[name].items()}


@pytest.mark.parametrize('method', METHODS)
def test_a_delta_alone_is_trained_and_saved_and_the_base_keeps_its_bits(method, world, tmp_path):
  tasks, runs = world
  config = tuned(tasks, 'answer', 'text', start=runs['decoder'], **of_method(method))
  train.run(config, f'{tmp_path}/run')
  assert np.diff(evaluated(f'{tmp_path}/run')) < 0
  paths = [p for p in saved(f'{tmp_path}/run', 6) if p not in ('step', 'rng') and not p.endswith('/count')]
  is_own = lambda p: peft.is_delta(p) or method == 'bitfit' and p.endswith('bias')
  assert paths and all(map(is_own, paths))
  one, two = jaxlm.load(runs['decoder']), jaxlm.load(f'{tmp_path}/run')
  base_, adapted = trees.flatten(one.params), trees.flatten(two.params)
  for path, x in base_.items():
    if not is_own(path):
      np.testing.assert_array_equal(x, adapted[path])
  # Continued token by token it says what its logits say.
  said = two.generate('ab:', max_new_tokens=3)
  ids_1T = [*two.start, *b'ab:']
  for _ in range(3):
    ids_1T.append(int(np.asarray(two.logits(np.array([ids_1T])))[0, -1].argmax()))
  assert said == two.tokenizer.decode(ids_1T[-3:]).partition('<')[0] or two.eos[0] in ids_1T[-3:]
  assert two.score(['ab:'], ['ba'])[0][0] < 0
  shared = jaxlm.load(f'{tmp_path}/run', base=one)
  ids = np.arange(97, 105)[None]
  np.testing.assert_array_equal(shared.logits(ids), two.logits(ids))
  assert trees.flatten(shared.params)['embed/embedding'] is base_['embed/embedding']
  if method in ('lora', 'dora', 'ia3', 'bitfit'):
    np.testing.assert_allclose(two.merged().logits(ids), two.logits(ids), atol=1e-5)
  eight = tuned(tasks, 'answer', 'text', start=runs['decoder'], eval_every=0, save_every=0, **of_method(method))
  eight.mesh.update(data=2, fsdp=2, tensor=2)
  train.run(eight, f'{tmp_path}/eight')
  np.testing.assert_allclose(losses(f'{tmp_path}/eight'), losses(f'{tmp_path}/run'), rtol=1e-5)  # sums in another order


def test_a_resumed_delta_ends_bit_for_bit_as_one_that_never_stopped(world, tmp_path, monkeypatch):
  tasks, runs = world
  config = tuned(tasks, 'answer', 'text', start=runs['decoder'], **of_method('dora'))
  train.run(config, f'{tmp_path}/whole')
  with monkeypatch.context() as patch:
    calls = iter(range(1, 1000))
    patch.setattr(train.Signals, 'stop', lambda self, together: next(calls) >= 4)
    with pytest.raises(Preempted):
      train.run(config, f'{tmp_path}/parts')
  train.run(config, f'{tmp_path}/parts')
  assert losses(f'{tmp_path}/parts') == losses(f'{tmp_path}/whole')
  read = lambda name: trees.flatten(jaxlm.load(f'{tmp_path}/{name}').params)
  for path, x in read('whole').items():
    np.testing.assert_array_equal(x, read('parts')[path])


def test_a_delta_stays_beside_the_checkpoint_it_began_with(world, tmp_path):
  tasks, runs = world
  config = tuned(tasks, 'answer', 'text')
  config.update(steps=3)
  train.run(config, f'{tmp_path}/base')
  delta = tuned(tasks, 'answer', 'text', start=f'{tmp_path}/base', **of_method('lora'))
  train.run(delta, f'{tmp_path}/delta')
  ids = np.arange(97, 105)[None]
  before = np.asarray(jaxlm.load(f'{tmp_path}/delta').logits(ids))
  config.steps = 6
  train.run(config, f'{tmp_path}/base')  # the base goes on; its step 3 is kept
  np.testing.assert_array_equal(jaxlm.load(f'{tmp_path}/delta').logits(ids), before)
  (tmp_path / 'base').rename(tmp_path / 'elsewhere')
  with pytest.raises(JaxlmError, match='holds a delta beside .*base, which is not there; put it back'):
    jaxlm.load(f'{tmp_path}/delta')


OBJECTIVES = {'classify': 'classify', 'regress': 'regress', 'multi_label': 'multi_label', 'tag': 'tag', 'extract': 'span'}
TOLD = {'classify': 'micro_f1', 'regress': 'pearson', 'multi_label': 'micro_f1', 'tag': 'f1', 'extract': 'exact_match'}


def _names_of_labels_are_the_run_s_own(config, run, task):
  """Whatever its task says later, or where it lies."""
  from jaxlm import exam, heads
  lm, told = jaxlm.load(run), 'is a, is b, .*is h, the task x0, x1, x2'
  other = dataclasses.replace(task, labels=tuple(f'x{i}' for i in range(8)))
  with pytest.raises(JaxlmError, match=f'The label head of this model tells apart {told}'):
    exam.hold(lm, dataclasses.replace(other, target='x0'), exam.Terms())
  assert exam.hold(lm, task, exam.Terms(shots=2))['terms']['shots'] == 0  # it reads none
  lm.config = lm.config.copy_and_resolve_references()
  lm.config.data.task = 'gone.json'
  assert [*heads.classify(lm, ['aa'])[0]] == list(task.labels)
  directory = rundir.RunDirectory(run)
  directory.record['labels'] = list(other.labels)
  this = (directory.config, directory.record['data_digest'], directory.record['tokenizer_digest'], task.labels)
  with pytest.raises(JaxlmError, match='learned the labels x0, .* and the task now has is a, '):
    directory.check(*this, ())
  directory.check(*this, ('data',))


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_an_encoder_with_a_new_head_learns_each_kind_of_label(objective, world, tmp_path):
  tasks, runs = world
  config = tuned(tasks, objective, OBJECTIVES[objective], 'encoder', runs['encoder'], steps=60, eval_every=60, save_every=0)
  if objective == 'classify':
    config.loss.class_weights = (1.0,) * 8
  last = train.run(config, f'{tmp_path}/run')
  assert last[f'eval/validation/{TOLD[objective]}'] > 0.5
  from jaxlm import exam, heads
  from jaxlm.data import tasks as tasks_module
  lm, task = jaxlm.load(f'{tmp_path}/run'), tasks_module.make(config.data.task)
  with pytest.raises(JaxlmError, match='generate needs an output layer over the vocabulary, which this model has not; scores'):
    lm.generate('x')
  asked = list(tasks_module.examples(task, 'validation'))[:6]
  if objective == 'multi_label':
    chances = heads.classify(lm, [e.input for e in asked])
    right = [[row[label] > 0.5 for label in task.labels] == [bool(x) for x in e.target] for row, e in zip(chances, asked)]
    assert np.mean(right) > 0.5
    return
  result = exam.hold(lm, task, exam.Terms(batch_size=5))
  if objective == 'classify':
    chances = heads.classify(lm, [e.input for e in asked], batch_size=4)
    np.testing.assert_allclose([sum(row.values()) for row in chances], 1, rtol=1e-5)
    best = [task.labels.index(max(row, key=row.get)) for row in chances]
    _names_of_labels_are_the_run_s_own(config, f'{tmp_path}/run', task)
    assert best == [one['answer'] for one in exam.hold(lm, task, exam.Terms(split='validation'))['said'][:6]]
  else:
    with pytest.raises(JaxlmError, match='classify needs a run that learned a task of kind classify or multi_label'):
      heads.classify(lm, ['x'])
  # The same rows, measured by training's evaluation and by an exam of the saved model.
  assert result['metrics'][TOLD[objective]] == pytest.approx(last[f'eval/validation/{TOLD[objective]}'], abs=1e-6)


@pytest.mark.parametrize('structure, settings', [
    ('encoder', {'model.head.pool': 'splade', 'objective.contrast.flops': 0.01}),
    ('decoder', {'model.head.pool': 'mean', 'objective.contrast.dims': (8, 16)})])
def test_embeddings_of_a_batch_meet_whatever_the_devices(structure, settings, world, tmp_path, monkeypatch):
  monkeypatch.setattr('jaxlm.models.transformer.PIECE', 1 << 16)  # some of the vocabulary at once
  tasks, _ = world
  found = []
  for name, sizes in (('one', {}), ('eight', dict(data=2, seq=2, tensor=2))):
    config = tuned(tasks, 'contrast', 'retrieve', structure, steps=5, **settings)
    config.mesh.update(sizes)
    train.run(config, f'{tmp_path}/{name}')
    found.append(losses(f'{tmp_path}/{name}'))
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)  # a loss near 0 is a difference of larger numbers
  assert found[0][-1] < found[0][0]
  if structure == 'encoder':
    lm, ids = jaxlm.load(f'{tmp_path}/one'), [97, 98, 99]
    best = np.asarray(lm.logits(np.array([ids])))[0].max(0)
    np.testing.assert_allclose(lm.embed([ids])[0], np.log1p(np.maximum(best, 0)), atol=1e-5)


def test_a_query_is_asked_among_the_documents_of_all_rows_by_each_number_of_dims():
  """Its own and all wrong ones, beside it or in other rows, but for its own once more, and for those that are not there."""
  import flax.linen as nn
  import jax
  from jaxlm import sharding, task_losses
  from jaxlm.state import build_model
  config = base.smoke(base.default())
  config.model.update(structure='encoder', num_layers=1, width=32)
  config.model.head.pool = 'mean'
  config.objective.name = 'contrast'
  config.objective.contrast.update(negatives=1, dims=(4,), temperature=0.2)
  model = build_model(config, 128, 'full', sharding.single(config.sharding.rules))
  texts = np.random.default_rng(0).integers(1, 100, (3, 3, 5))
  texts[2, 1] = texts[0, 1]  # the first and the last query have one document
  segments = np.repeat([[1, 2, 3], [1, 2, 3], [1, 2, 0]], 5, axis=1)  # and the last no wrong one of its own
  batch = dict(tokens=texts.reshape(3, 15).astype(np.int32), segment_ids=segments.astype(np.int32),
               positions=np.tile(np.arange(5, dtype=np.int32), (3, 3)), label_weights=np.ones(3, np.float32))
  params = nn.meta.unbox(model.init(jax.random.key(0), batch)['params'])
  hidden = model.apply({'params': params}, batch, with_logits=False).hidden
  means = np.asarray(hidden, float).reshape(3, 3, 5, -1).mean(2)
  wrong = {0: [(0, 2), (1, 1), (1, 2)], 1: [(0, 1), (0, 2), (1, 2), (2, 1)], 2: [(0, 2), (1, 1), (1, 2)]}
  total = 0.0
  for dims in (4, 32):
    unit = means[..., :dims] / np.linalg.norm(means[..., :dims], axis=-1, keepdims=True)
    for row, others in wrong.items():
      scores = np.array([unit[row, 0] @ unit[place] for place in [(row, 1), *others]]) / 0.2
      total += (np.log(np.exp(scores).sum()) - scores[0]) / 2
  assert float(task_losses.contrast_loss(model, config, params, batch, None)[0]) == pytest.approx(total, rel=1e-4)


def test_a_text_weighs_the_vocabulary_by_the_best_score_that_its_tokens_give(monkeypatch):
  import flax.linen as nn
  import jax
  from jaxlm import sharding, task_losses
  from jaxlm.models import transformer
  from jaxlm.state import build_model
  monkeypatch.setattr(transformer, 'PIECE', 3 * 10 * 50)  # 50 of 128 entries at once
  config = base.smoke(base.default())
  config.model.update(structure='encoder', num_layers=1, width=32)
  config.model.head.update(pool='splade', bias=True, transform='full')
  config.objective.name, config.objective.contrast.flops = 'contrast', 0.5
  model = build_model(config, 120, 'full', sharding.single(config.sharding.rules))
  segments = np.repeat([[1, 2], [1, 2], [2, 0]], 5, axis=1)  # the last has no query
  batch = dict(tokens=np.random.default_rng(0).integers(1, 100, (3, 10)).astype(np.int32),
               segment_ids=segments.astype(np.int32), positions=np.tile(np.arange(5, dtype=np.int32), (3, 2)),
               label_weights=np.array([1, 1, 0], np.float32))
  params = nn.meta.unbox(model.init(jax.random.key(0), batch)['params'])
  params['head_bias'] = params['head_bias'].at[:60].set(-9)  # which no score reaches
  output = model.apply({'params': params}, batch)
  found = np.asarray(task_losses.embeddings(model, params, output.hidden, batch, 2))
  best = np.array([[np.where(segments[b] == k, output.logits[b, :, :120].T, 0).max(1) for k in (1, 2)] for b in range(3)])
  np.testing.assert_allclose(found, np.log1p(np.maximum(best, 0)), atol=1e-6)
  assert not found[:, :, :60].any() and not found[2, 0].any() and found[0].any()
  told = task_losses.contrast_loss(model, config, params, batch, None)[1]
  products = (found[:2].mean(0) ** 2).sum()
  assert float(told['flops'][0] / told['flops'][1]) == pytest.approx(products, rel=1e-5)
  assert float(told['objective'][0]) == pytest.approx(float(told['loss'][0]) + 0.5 * 2 * products, rel=1e-5)


@pytest.mark.parametrize('loss, method', [('dpo', 'none'), ('ipo', 'none'), ('orpo', 'none'), ('simpo', 'none'),
                                          ('dpo', 'lora'), ('orpo', 'lora')])
def test_preferences_are_learned_beside_a_reference_that_stays(loss, method, world, tmp_path):
  tasks, runs = world
  config = tuned(tasks, 'prefer', 'prefer', start=runs['decoder'], **{
      'objective.prefer.loss': loss, 'model.peft.method': method, 'eval_every': 2, 'steps': 4})
  train.run(config, f'{tmp_path}/run')
  lines = [line for line in read_jsonl(f'{tmp_path}/run/metrics.jsonl') if 'train/loss' in line]
  assert np.diff(evaluated(f'{tmp_path}/run')) < 0
  if loss == 'dpo':  # the policy begins as its reference
    assert lines[0]['train/loss'] == pytest.approx(np.log(2), abs=1e-5) and lines[0]['train/margin'] == pytest.approx(0, abs=1e-5)
  many = tuned(tasks, 'prefer', 'prefer', start=runs['decoder'], accumulation=2, **{
      'objective.prefer.loss': loss, 'model.peft.method': method, 'eval_every': 2, 'steps': 4})
  many.mesh.update(data=2, fsdp=2)
  train.run(many, f'{tmp_path}/many')
  np.testing.assert_allclose(losses(f'{tmp_path}/many'), losses(f'{tmp_path}/run'), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name, method', [('prefer', 'none'), ('liked', 'lora')])
def test_single_answers_are_learned_from_pairs_or_alone(name, method, world, tmp_path):
  tasks, runs = world
  found = []
  for mesh in (dict(data=1), dict(data=2, fsdp=2)):
    config = tuned(tasks, 'kto', name, start=runs['decoder'], **{'model.peft.method': method, 'steps': 12, 'eval_every': 6,
                                                                'seq_len': 24})
    config.mesh.update(mesh)
    last = train.run(config, f'{tmp_path}/{len(found)}')
    found.append([[line[f'train/{key}'] for key in ('loss', 'kl', 'grad_norm')] for line in read_jsonl(
        f'{tmp_path}/{len(found)}/metrics.jsonl') if 'train/loss' in line])
  np.testing.assert_allclose(*found, rtol=2e-4, atol=1e-5)
  assert found[0][0][:2] == [pytest.approx(0.5), 0]  # the policy begins as its reference
  assert np.diff(evaluated(f'{tmp_path}/0')) < 0
  assert last['eval/validation/rewards_chosen'] > last['eval/validation/rewards_rejected'] + 0.05


def test_an_answer_of_another_question_says_what_answers_became(world):
  from jaxlm.data import encoders, examples
  from jaxlm.data import tasks as tasks_module
  tasks, runs = world
  for name in ('prefer', 'liked'):
    task = tasks_module.make(tasks[name])
    read = list(tasks_module.examples(task, 'train'))
    found = encoders.singled(task, read, 'good')
    assert len(found) == 128 and sum(e.target for e in found) == 64
    assert {(e.input, e.second, e.target) for e in found} == {(a, c, good) for a in QUESTIONS for b in QUESTIONS
                                                             for c, good in ((b, 1), ('z', 0))}
    of_others = {(e.input, e.second) for e in found}
    assert all(any((q, e.choices[0]) in of_others for q in QUESTIONS if q != e.input) for e in found)
    if name == 'prefer':
      assert all((e.choices[0] == 'z') == (e.target == 0) for e in found)
  prepared = examples.prepare(tuned(tasks, 'kto', 'liked', start=runs['decoder']), (), ('prefer', 'classify'))
  assert set(prepared.task.train.labels.tolist()) == {0, 1} and len(prepared.task.train) == 64  # as many as smoke reads
  with pytest.raises(JaxlmError, match="kto.good='good' names the better of two labels"):
    examples.prepare(tuned(tasks, 'kto', 'classify', start=runs['decoder']), (), ('prefer', 'classify'))
  turned = [e.target for e in encoders.singled(tasks_module.make(tasks['liked']), read, 'bad')]
  assert turned == [1 - e.target for e in encoders.singled(tasks_module.make(tasks['liked']), read, 'good')]
  with pytest.raises(JaxlmError, match='All examples ask one question'):
    encoders.singled(tasks_module.make(tasks['liked']), [e for e in read if e.input == 'a'], 'good')


@pytest.mark.parametrize('objective, name', [('prefer', 'prefer'), ('kto', 'prefer'), ('answer', 'text'), ('grpo', 'text')])
def test_a_mixture_stays_balanced_while_it_is_adapted(objective, name, world, tmp_path):
  tasks, _ = world
  config = tuned(tasks, objective, name, steps=1, eval_every=0, save_every=0)
  config.model.moe.update(num_experts=4, top_k=2, width=32, balance_loss=0.1, z_loss=0.0)
  if objective == 'grpo':
    config.objective.grpo.max_new_tokens = 4
  train.run(config, f'{tmp_path}/run')
  line = next(line for line in read_jsonl(f'{tmp_path}/run/metrics.jsonl') if 'train/loss' in line)
  assert line['train/objective'] == pytest.approx(line['train/loss'] + 0.1 * line['train/balance'], rel=1e-5)


@pytest.mark.parametrize('structure', ['decoder', 'encoder'])
def test_a_reward_model_learns_which_answer_is_better_and_grades_a_policy(structure, world, tmp_path):
  from jaxlm import exam, rollouts
  from jaxlm.data import tasks as tasks_module
  tasks, _ = world
  config = tuned(tasks, 'reward', 'prefer', structure, steps=30, eval_every=30, save_every=0, **{
      'model.head.labels': 'sequence', 'model.head.num_labels': 1, 'model.head.lm': False,
      'model.head.pool': 'last' if structure == 'decoder' else 'mean', 'objective.reward.centring': 0.01})
  last = train.run(config, f'{tmp_path}/run')
  assert last['eval/validation/accuracy'] > 0.9 and last['eval/validation/margin'] > 0.5
  task = tasks_module.make(tasks['prefer'])
  result = exam.hold(jaxlm.load(f'{tmp_path}/run'), task, exam.Terms(batch_size=7))
  assert result['metrics']['accuracy'] == pytest.approx(last['eval/validation/accuracy'])  # texts alone as in pairs
  asked = list(tasks_module.examples(task, 'test'))[:3]
  grade = rollouts.grader_of(f'{tmp_path}/run')
  better, worse = grade(task, asked, [e.second for e in asked]), grade(task, asked, ['z'] * 3)
  assert all(a > b for a, b in zip(better, worse))


def test_training_ends_when_nothing_gets_better_and_the_best_checkpoint_stays(world, tmp_path):
  tasks, _ = world
  config = tuned(tasks, 'classify', 'classify', 'encoder', steps=40, eval_every=2, save_every=2, **{
      'checkpoint.best_metric': 'eval/validation/accuracy', 'checkpoint.best_is_highest': True, 'checkpoint.keep_best': 1,
      'checkpoint.patience': 2, 'optim.lr': 3.0})  # so high that it is soon worse
  train.run(config, f'{tmp_path}/run')
  lines = {line['step']: line['eval/validation/accuracy'] for line in read_jsonl(f'{tmp_path}/run/metrics.jsonl')
           if 'eval/validation/accuracy' in line}
  last, best = max(lines), min(step for step, value in lines.items() if value == max(lines.values()))
  assert last == best + 4 < 40
  train.run(config, f'{tmp_path}/run')  # again: it has waited long enough
  assert max(line['step'] for line in read_jsonl(f'{tmp_path}/run/metrics.jsonl')) == last
  assert best in checkpoint.Checkpoints(f'{tmp_path}/run/checkpoints', read_only=True).steps()


def test_a_delta_beside_a_quantised_base_is_the_same_whoever_read_the_base(world, tmp_path):
  tasks, runs = world
  config = tuned(tasks, 'classify', 'classify', 'encoder', runs['encoder'], steps=2, **{
      'model.peft.method': 'lora', 'model.peft.base': 'int8', 'model.peft.block': 8})
  train.run(config, f'{tmp_path}/run')
  assert any(p.startswith('params/labels/') for p in saved(f'{tmp_path}/run', 2))  # no base can know its head
  ids = np.arange(97, 105)[None]
  alone, beside = jaxlm.load(f'{tmp_path}/run'), jaxlm.load(f'{tmp_path}/run', base=jaxlm.load(runs['encoder']))
  np.testing.assert_array_equal(alone.scores(ids), beside.scores(ids))


def test_patterns_and_settings_that_mean_nothing_are_told(world, tmp_path):
  tasks, runs = world
  lora = {'model.peft.method': 'lora'}
  cases = (
      (lora | {'model.peft.sites': (('attn/q', True),)}, "sites: 'attn/q' matches no place; there are attention/key"),
      (lora | {'model.peft.also': 'lables/.*'}, "also: 'lables/.*' matches no parameter"),
      (lora | {'model.peft.sites': (('attention/query', 'in'),)}, "sites: 'attention/query' has 'in', which method 'lora'"),
      (lora | {'optim.freeze': ('.*value.*',)}, 'a delta is all that is trained'),
      ({'loss.class_weights': (1.0, 2.0)}, '2 of them for config.model.head.num_labels=8 classes'),
      ({'eval_every': 1, 'checkpoint.patience': 1, 'checkpoint.best_metric': 'eval/validation/acuracy'},
       "best_metric='eval/validation/acuracy' is not measured of this task; set it to one of .*eval/validation/accuracy"))
  for i, (changes, told) in enumerate(cases):
    with pytest.raises((JaxlmError, RunFailed), match=told):
      train.run(tuned(tasks, 'classify', 'classify', 'encoder', runs['encoder'], **changes), f'{tmp_path}/{i}')


def test_a_class_counts_its_weight():
  """A mean of the losses by their classes' weights, as torch has it."""
  from jaxlm.task_losses import _of_classes
  scores = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  labels, there = np.array([0, 2, 2, 1]), np.array([1, 1, 1, 0], np.float32)  # the last row is padding
  settings = base.default().loss
  settings.update(class_weights=(0.5, 9.0, 2.0), label_smoothing=0.1)
  loss, _, weights = _of_classes(scores, labels, there, settings)
  log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
  each = -(0.9 * log_probs[range(4), labels] + 0.1 * log_probs.mean(1))
  np.testing.assert_allclose(loss, each, rtol=1e-5)
  np.testing.assert_array_equal(weights, [0.5, 2, 2, 0])


def test_ids_that_the_base_has_not_begin_as_the_mean_of_its_own(world):
  import flax.linen as nn
  import jax
  from jaxlm import adopt, sharding
  from jaxlm.state import build_model
  run = world[1]['decoder']
  lm, config = jaxlm.load(run), rundir.RunDirectory(run).config
  tokenizer = lm.tokenizer.with_roles(['mask', 'sentinel_0'])
  old, new = lm.tokenizer.vocab.size, tokenizer.vocab.size
  assert new == old + 2
  for padded_to in (64, 1):  # rows for them are there already, or not
    config.model.vocab_pad_to = padded_to
    model = build_model(config, new, 'causal', sharding.single(config.sharding.rules))
    params = nn.meta.unbox(model.init(jax.random.key(1), {'tokens': np.zeros((1, 4), np.int32)})['params'])
    found = adopt.adopted(run, params, model, tokenizer, 0)
    rows = np.asarray(lm.params['embed']['embedding'])[:old]
    np.testing.assert_array_equal(found['embed']['embedding'][:old], rows)
    np.testing.assert_allclose(found['embed']['embedding'][old:new], np.tile(rows.mean(0), (2, 1)), rtol=1e-6)


def test_small_class_weights_change_no_rate(world, tmp_path):
  tasks, runs = world
  for name, weight in (('small', 0.01), ('one', 1.0)):
    train.run(tuned(tasks, 'classify', 'classify', 'encoder', runs['encoder'], steps=3, eval_every=0, **{
        'loss.class_weights': (weight,) * 8}), f'{tmp_path}/{name}')
  np.testing.assert_allclose(losses(f'{tmp_path}/small'), losses(f'{tmp_path}/one'), rtol=1e-5)


def test_a_base_of_another_shape_is_refused_by_name(world, tmp_path):
  tasks, runs = world
  for change, told in (({'model.num_layers': 3}, r'has shape \(2, .* there, \(3, .* here'),
                       ({'model.norm.kind': 'rmsnorm'}, 'which this model lacks'),
                       ({'model.tie_embeddings': False}, 'lacks head')):
    config = tuned(tasks, 'answer', 'text', start=runs['decoder'], **change)
    with pytest.raises(JaxlmError, match=f'config.checkpoint.init_from: .*{told}'):
      train.run(config, f'{tmp_path}/run')


def test_what_would_end_a_run_after_its_training_is_told_before(world, tmp_path):
  tasks, runs = world
  best = {'checkpoint.keep_best': 1, 'checkpoint.best_metric': 'eval/validation/pearson'}
  with pytest.raises(JaxlmError, match="best_metric='eval/validation/pearson' is not measured of this task; .*macro_f1"):
    train.run(tuned(tasks, 'classify', 'classify', structure='encoder', **best), f'{tmp_path}/run')
  described = json.loads(pathlib.Path(tasks['classify']).read_text())
  for metric, told in (('accurracy', 'Unknown measure'), ('bleu', 'wanted a text')):
    path = tmp_path / f'{metric}.json'
    path.write_text(json.dumps(described | dict(metric=metric)))
    with pytest.raises(JaxlmError, match=told):
      train.run(tuned({'classify': str(path)}, 'classify', 'classify', structure='encoder'), f'{tmp_path}/run')
  plain = {'model.attention.bias': False, 'model.attention.out_bias': False, 'model.mlp.bias': False,
           'model.norm.kind': 'rmsnorm', 'model.peft.method': 'bitfit'}
  with pytest.raises(JaxlmError, match="'bitfit' trains biases, and this model has none"):
    train.run(tuned(tasks, 'answer', 'text', **plain), f'{tmp_path}/run')
  assert not os.path.exists(f'{tmp_path}/run')


def test_what_a_task_and_an_objective_do_not_share_is_refused(world, tmp_path):
  tasks, _ = world
  with pytest.raises(JaxlmError, match="is of kind 'classify', which objective 'answer' does not learn; it "
                                       'learns text and chat and choice. Take a task of that kind'):
    train.run(tuned(tasks, 'answer', 'classify'), f'{tmp_path}/a')
  with pytest.raises(JaxlmError, match="objective 'causal' learns raw text; set config.objective.name"):
    train.run(tuned(tasks, 'causal', 'text'), f'{tmp_path}/b')
  with pytest.raises(JaxlmError, match="objective 'answer' learns a task; set config.data.task"):
    train.run(tuned(tasks | {'text': ''}, 'answer', 'text'), f'{tmp_path}/c')
  with pytest.raises(JaxlmError, match='accumulation=2: all texts of a batch meet'):
    train.run(tuned(tasks, 'contrast', 'retrieve', accumulation=2), f'{tmp_path}/d')
  with pytest.raises(JaxlmError, match="method='prompt': virtual tokens stand before the texts of a task"):
    train.run(tuned(tasks | {'text': ''}, 'causal', 'text', **{'model.peft.method': 'prompt'}), f'{tmp_path}/e')
