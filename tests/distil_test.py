"""A teacher: its part of the loss against float64, what students learn from it, and that no state holds it."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import check, checkpoint, losses, sharding, train
from jaxlm import config as base
from jaxlm.errors import JaxlmError
from jaxlm.losses import Vocabulary
from jaxlm.metrics import read_jsonl

B, T, D, V, PADDED = 2, 5, 8, 13, 16
LAYOUT = sharding.single(base.default().sharding.rules)
pytestmark = pytest.mark.usefixtures('few_devices')


def _logits(hidden, w, softcap):
  logits = hidden.astype(float) @ w[:V].astype(float).T
  return softcap * np.tanh(logits / softcap) if softcap else logits


def _log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('top_k', [0, 1, 4])
@pytest.mark.parametrize('temperature, softcap, chunk', [(1.0, 0.0, T), (2.0, 3.0, 2)])
def test_divergence_and_its_gradient_are_those_of_the_plain_formula(top_k, temperature, softcap, chunk):
  rng = np.random.default_rng(0)
  theirs, ours = rng.standard_normal((2, B, T, D)).astype(np.float32)
  w = rng.standard_normal((PADDED, D)).astype(np.float32)
  vocabulary = Vocabulary(V, softcap, 0.0, 0.0, chunk, LAYOUT, temperature=temperature)
  said = losses.opinion(vocabulary, theirs, w, None, top_k)
  kl = lambda ours: losses.divergence(vocabulary, ours, w, None, said['teacher_log_probs'], said.get('teacher_ids'))

  def plain(ours):
    p, q = (np.exp(_log_softmax(_logits(x, w, softcap) / temperature)) for x in (theirs, ours))
    if top_k:
      order = np.argsort(-p, axis=-1)
      p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
      p, q = (np.concatenate([x[..., :top_k], x[..., top_k:].sum(-1, keepdims=True)], -1) for x in (p, q))
    return (p * np.log(p / q)).sum(-1)
  np.testing.assert_allclose(kl(ours), plain(ours), atol=2e-6)
  gradient, step = jax.grad(lambda ours: kl(ours).sum())(ours), 1e-5
  for place in [(0, 0, 0), (1, 4, 7), (1, 2, 3)]:
    moved = np.zeros(ours.shape)
    moved[place] = step
    slope = (plain(ours + moved).sum() - plain(ours - moved).sum()) / (2 * step)
    np.testing.assert_allclose(gradient[place], slope, atol=2e-5)


@pytest.mark.parametrize('top_k', [0, 3])
def test_a_model_that_agrees_has_nothing_to_learn(top_k):
  hidden, w = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32), jnp.eye(PADDED, D)
  vocabulary = Vocabulary(V, 0.0, 0.0, 0.0, T, LAYOUT)
  said = losses.opinion(vocabulary, hidden, w, None, top_k)
  value, gradient = jax.value_and_grad(lambda x: losses.divergence(
      vocabulary, x, w, None, said['teacher_log_probs'], said.get('teacher_ids')).sum())(hidden)
  np.testing.assert_allclose(value, 0, atol=1e-5)
  np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize('gap', [5.0, 16.0, 30.0])
def test_a_student_that_is_too_sure_is_still_told_of_all_others(gap):
  """In float64: of two tokens that it holds for nearly certain the others have exp(-gap), and their gradient is whole."""
  theirs = np.zeros((1, 1, V))
  theirs[..., :2] = 1.0
  ours = theirs.copy()
  ours[..., :2] = gap
  w = np.eye(V, dtype=np.float32)
  vocabulary = Vocabulary(V, 0.0, 0.0, 0.0, T, LAYOUT)
  said = losses.opinion(vocabulary, theirs.astype(np.float32), w, None, 2)
  kl = lambda x: losses.divergence(vocabulary, x, w, None, said['teacher_log_probs'], said['teacher_ids']).sum()
  value, gradient = jax.value_and_grad(kl)(ours.astype(np.float32))
  parts = lambda x: np.concatenate([x[:2], [np.logaddexp.reduce(x[2:])]])
  p, q = (parts(_log_softmax(x[0, 0])) for x in (theirs, ours))
  assert float(value) == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-5)
  rest = -np.exp(p[2]) / (V - 2) + np.exp(_log_softmax(ours[0, 0]))[2:]  # by each other token's logit
  np.testing.assert_allclose(gradient[0, 0, 2:], rest, rtol=1e-4, atol=1e-7)


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def teacher(corpus, tmp_path_factory):
  """A run directory: a decoder of text, somewhat trained."""
  config, path = small(corpus), str(tmp_path_factory.mktemp('teacher') / 'run')
  config.update(steps=40, save_every=0)
  train.run(config, path)
  return path


def small(corpus, **changes):
  config = base.smoke(base.default())
  config.update(steps=6, batch_size=8, seq_len=32, tensorboard=False, log_every=1, save_every=3)
  config.model.update(num_layers=2, width=32, vocab_pad_to=64)
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=8)
  config.data.update(source='text', paths=corpus, holdout=0.1)
  config.eval.update(batch_size=8, max_tokens=2048, prompts=())
  config.mesh.update(data=1)
  config.optim.lr = 1e-2
  config.update_from_flattened_dict(changes)
  return config


def told(workdir, name):
  return [line[name] for line in read_jsonl(f'{workdir}/metrics.jsonl') if name in line]


def test_a_student_comes_nearer_to_its_teacher_and_no_checkpoint_holds_that(corpus, teacher, tmp_path):
  config = small(corpus, **{'steps': 30, 'loss.teacher.path': teacher, 'loss.teacher.weight': 1.0, 'model.num_layers': 1})
  train.run(config, f'{tmp_path}/run')
  apart = told(f'{tmp_path}/run', 'train/teacher_kl')
  assert apart[-1] < 0.3 * apart[0]
  train.run(small(corpus, **{'steps': 30, 'model.num_layers': 1}), f'{tmp_path}/alone')
  held = lambda name: checkpoint.Checkpoints(f'{tmp_path}/{name}/checkpoints', read_only=True).shapes(30)
  assert held('run').keys() == held('alone').keys()


def test_devices_accumulation_and_a_stop_change_nothing(corpus, teacher, tmp_path):
  settings = {'loss.teacher.path': teacher, 'loss.teacher.top_k': 5, 'loss.teacher.temperature': 2.0}
  runs = {'one': {}, 'eight': {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}, 'cut': {'accumulation': 2}}
  for name, changes in runs.items():
    train.run(small(corpus, **settings, **changes), f'{tmp_path}/{name}')
  for name in ('eight', 'cut'):
    for key in ('train/objective', 'train/teacher_kl'):
      np.testing.assert_allclose(told(f'{tmp_path}/{name}', key), told(f'{tmp_path}/one', key), rtol=2e-4)
  short = small(corpus, **settings)
  short.steps = 3
  short.optim.total_steps = 6
  train.run(short, f'{tmp_path}/resumed')
  train.run(small(corpus, **settings), f'{tmp_path}/resumed')
  assert told(f'{tmp_path}/resumed', 'train/objective')[-3:] == told(f'{tmp_path}/one', 'train/objective')[-3:]


def test_a_teacher_that_does_not_fit_is_told_of_in_a_line(corpus, teacher, tmp_path):
  for changes, says in [({'data.tokenizer': 'bpe', 'data.vocab_size': 300}, 'has another tokenizer'),
                        ({'objective.name': 'masked', 'model.structure': 'encoder'}, "of structure 'decoder'"),
                        ({'loss.teacher.top_k': 300}, 'set it lower, or to 0')]:
    with pytest.raises(JaxlmError, match=says):
      train.run(small(corpus, **{'loss.teacher.path': teacher}, **changes), f'{tmp_path}/run')
  nowhere = small(corpus, **{'loss.teacher.path': f'{tmp_path}/nowhere'})
  assert [line for line in check.faults(nowhere) if 'give the run directory' in line]
  wrong = small(corpus, **{'loss.teacher.path': teacher, 'objective.name': 'contrast'})
  assert any('predicts neither tokens nor classes' in line for line in check.faults(wrong))


def test_a_teacher_may_be_padded_otherwise(corpus, teacher, tmp_path):
  found = []
  for pad in (64, 512):
    config = small(corpus, **{'loss.teacher.path': teacher, 'loss.teacher.top_k': 0, 'steps': 1, 'model.vocab_pad_to': pad})
    train.run(config, f'{tmp_path}/{pad}')
    found += told(f'{tmp_path}/{pad}', 'train/teacher_kl')
  assert np.isfinite(found).all() and found[0] == pytest.approx(found[1], rel=0.3)  # other draws of the same size


def test_a_teacher_that_trains_on_is_the_one_it_was(corpus, teacher, tmp_path):
  teaching = f'{tmp_path}/teacher'
  shutil.copytree(teacher, teaching)
  settings = {'loss.teacher.path': teaching, 'steps': 4, 'save_every': 2}
  train.run(small(corpus, **settings), f'{tmp_path}/whole')
  train.run(small(corpus, **settings | {'steps': 2, 'optim.total_steps': 4}), f'{tmp_path}/parts')
  longer = small(corpus)
  longer.update(steps=44, save_every=0)
  longer.optim.total_steps = 40
  train.run(longer, teaching)
  train.run(small(corpus, **settings), f'{tmp_path}/parts')
  assert told(f'{tmp_path}/parts', 'train/teacher_kl')[-2:] == told(f'{tmp_path}/whole', 'train/teacher_kl')[-2:]


# ---- classes and tags --------------------------------------------------------------------------------------------


def task(folder, name, kind, labels, records):
  (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, records)), encoding='utf-8')
  files = {split: str(folder / f'{name}.jsonl') for split in ('train', 'validation')}
  (folder / f'{name}.json').write_text(json.dumps(dict(kind=kind, files=files, labels=labels)), encoding='utf-8')
  return str(folder / f'{name}.json')


def labelled(corpus, objective, told_by, head, **changes):
  config = small(corpus, **{'objective.name': objective, 'model.structure': 'encoder', 'model.head.lm': False, 'steps': 40,
                            'model.head.labels': head, 'model.head.num_labels': 2, 'data.task': told_by, 'save_every': 0,
                            'data.packing': 'padded'})
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize('kind, objective, head', [('classify', 'classify', 'sequence'), ('tag', 'tag', 'token')])
def test_a_student_learns_classes_from_its_teacher_alone(kind, objective, head, corpus, tmp_path):
  texts = [dict(text=a + b, words=[a, b], tags=['O' if c < 'e' else 'B-x' for c in (a, b)],
                label='O' if a < 'e' else 'B-x')
           for a in 'abcdefgh' for b in 'abcdefgh']
  true = task(tmp_path, 'true', kind, ['O', 'B-x'], texts)
  teaching = f'{tmp_path}/teacher'
  assert train.run(labelled(corpus, objective, true, head), teaching)['eval/validation/accuracy'] > 0.95
  wrong = [text | dict(label='O', tags=['O', 'O']) for text in texts]  # what it would learn by itself
  blind = task(tmp_path, 'blind', kind, ['O', 'B-x'], wrong)
  changes = {'loss.teacher.path': teaching, 'loss.teacher.weight': 1.0}
  train.run(labelled(corpus, objective, blind, head, **changes), f'{tmp_path}/student')
  kl = told(f'{tmp_path}/student', 'train/teacher_kl')
  assert kl[-1] < 0.2 * kl[0]
  assert told(f'{tmp_path}/student', 'train/loss')[-1] > 0.5  # of the targets, which it did not learn
  turned = task(tmp_path, 'turned', kind, ['B-x', 'O'], texts)
  with pytest.raises(JaxlmError, match='tells apart O, B-x, this task B-x, O; take a teacher of the same labels'):
    train.run(labelled(corpus, objective, turned, head, **changes), f'{tmp_path}/turned')


def test_divergence_of_classes_is_that_of_the_plain_formula():
  rng = np.random.default_rng(0)
  theirs, ours = rng.standard_normal((2, 4, 3)).astype(np.float32)
  p, q = (np.exp(_log_softmax(x.astype(float) / 2)) for x in (theirs, ours))
  np.testing.assert_allclose(losses.class_divergence(theirs, ours, 2.0), (p * np.log(p / q)).sum(-1), atol=1e-6)
