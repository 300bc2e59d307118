"""Audits give the shares that known probabilities have, find what was planted, and name records that do not fit."""
import dataclasses
import json
import math
import random
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from lm_test import make_config, make_model
from planted import LEAKED, PLANTED, UNIQUE, plant, words, written

import jaxlm
from jaxlm import audits, recall, sharding, stereotypes, train
from jaxlm import config as base
from jaxlm.data import store, suffixes, tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM

ATOL = 1e-4  # float32 sums of up to 40 log-probabilities, rows padded otherwise; measured max 2e-5


class Fake:
  """A causal model whose sentences are as likely as it is told, by their words, and which says what it is told."""

  def __init__(self, nats=None, says=()):
    self.nats, self.says, self.asked = nats or {}, says, []
    self.model = SimpleNamespace(config=SimpleNamespace(head=SimpleNamespace(lm=True), visibility='causal'))

  def score(self, contexts, continuations, batch_size):
    del batch_size
    self.asked += zip(contexts, continuations)
    return [(self.nats[text.strip()], len(text.split()), False) for text in continuations]

  def generate(self, prompts, max_new_tokens, **how):
    self.how = how | dict(max_new_tokens=max_new_tokens)
    return [self.says[i % len(self.says)] for i in range(len(prompts))]

  def room(self, prompts):
    return 9


def audited(name, lm, values, run=''):
  audit, settings = audits.make(name, values, run)
  result = audit(lm, settings)
  assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(json.dumps(result)) and result['examples']
  for measure, value in result['metrics'].items():
    low, high = result['intervals'][measure]
    assert low - 1e-12 <= value <= high + 1e-12
  return result


# ---- stereotypes -------------------------------------------------------------------------------------------------

PAIRS = [('a b', 'a c', 'age'), ('d', 'e', 'age'), ('f', 'g', 'gender'), ('h', 'i', 'gender'), ('j', 'k', 'gender')]
NATS = {'a b': -1., 'a c': -2., 'd': -5., 'e': -4., 'f': -1., 'g': -3., 'h': -1., 'i': -1., 'j': -2., 'k': -7.}


def test_the_share_of_pairs_is_that_of_their_likelihoods_by_type(tmp_path):
  path = written(tmp_path / 'a.jsonl', [dict(sent_more=a, sent_less=b, bias_type=c) for a, b, c in PAIRS])
  lm = Fake(NATS)
  result = audited('stereotypes', lm, dict(files=path))
  assert result['metrics'] == {'stereotyping': 3 / 5} and result['ties'] == 1  # equal ones do not count
  groups = result['groups']
  assert {name: own['metrics']['stereotyping'] for name, own in groups.items()} == {'age': 1 / 2, 'gender': 2 / 3}
  assert {name: own['examples'] for name, own in groups.items()} == {'age': 2, 'gender': 3}
  assert result['items'][1] == dict(id=f'{path}:2', bias_type='age', sent_more='d', sent_less='e', nats=[-5., -4.],
                                    stereotyping=False)
  assert set(lm.asked) == {('', text) for pair in PAIRS for text in pair[:2]}


def test_columns_of_a_table_are_read_as_they_are_published(tmp_path):
  (tmp_path / 'a.csv').write_text(',sent_more,sent_less,stereo_antistereo,bias_type\n0,"a, b",a c,stereo,age\n')
  (tmp_path / 'b.csv').write_text(',bias_type,sentence,mask1,mask2\n0,age,a [MASK],b,c\n')
  own, = audited('stereotypes', Fake(NATS | {'a, b': -1.}), dict(files=str(tmp_path / 'a.csv')))['items']
  assert (own['sent_more'], own['sent_less']) == ('a, b', 'a c')
  own, = audited('stereotypes', Fake(NATS), dict(files=str(tmp_path / 'b.csv')))['items']
  assert (own['sent_more'], own['sent_less'], own['stereotyping']) == ('a b', 'a c', True)


# (type, bias_type, target, scores by token of stereotype, anti-stereotype, unrelated)
TRIPLES = [('intersentence', 'race', 'x', -1, -2, -3), ('intrasentence', 'race', 'x', -2, -1, -3),
           ('intersentence', 'race', 'y', -1, -2, -1.5), ('intrasentence', 'gender', 'x', -2, -3, -1)]


def stereoset(kind, bias, target, number):
  context = f'c{number}' if kind == 'intersentence' else f'{number} BLANK w'
  return dict(type=kind, target=target, bias_type=bias, context=context) | {
      name: f'{number} {name} w' for name in stereotypes.SENTENCES}


def test_stereoset_scores_are_means_over_terms_of_known_likelihoods(tmp_path):
  records = [stereoset(*triple[:3], i) for i, triple in enumerate(TRIPLES)]
  nats = {record[name]: 3. * score for record, triple in zip(records, TRIPLES)  # three words each
          for name, score in zip(stereotypes.SENTENCES, triple[3:])}
  lm = Fake(nats)
  result = audited('stereotypes', lm, dict(files=written(tmp_path / 'a.jsonl', records)))
  # terms: race x: lms 1, ss 1/2; race y: lms 1/2, ss 1; gender x: lms 0, ss 1
  lms, ss = (1 + 1 / 2 + 0) / 3, (1 / 2 + 1 + 1) / 3
  assert result['metrics'] == pytest.approx(dict(lms=lms, ss=ss, icat=lms * min(ss, 1 - ss) / 0.5))
  assert result['groups']['race']['metrics'] == pytest.approx(dict(lms=3 / 4, ss=3 / 4, icat=3 / 4 / 2))
  assert result['groups']['intrasentence']['metrics'] == dict(lms=1 / 2, ss=1 / 2, icat=1 / 2)
  assert result['examples'] == 4 and result['groups']['gender']['examples'] == 1
  assert ('c0', ' 0 stereotype w') in lm.asked and ('', '1 stereotype w') in lm.asked
  published = [{key: record[key] for key in ('target', 'bias_type', 'context')} | dict(sentences=[
      dict(sentence=record[name], gold_label=name) for name in reversed(stereotypes.SENTENCES)]) for record in records]
  again = audited('stereotypes', Fake(nats), dict(files=written(tmp_path / 'b.jsonl', published)))
  assert again['metrics'] == result['metrics'] and again['groups'] == result['groups']


@pytest.fixture(scope='module')
def encoder():
  config = make_config(structure='encoder')
  config.objective.name = 'masked'
  config.data.update(bos=False, eos=True)
  tokenizer = tokenizers.bytes_tokenizer().with_roles(['mask'])
  model, params = make_model(config, tokenizer)
  model = model.clone(config=dataclasses.replace(model.config, visibility='full'))
  return LM(config, model, params, tokenizer)


def behind_mask(lm, ids, column):
  """The log-probability of a token of one row, masked there alone."""
  hidden = [lm.tokenizer.vocab.mask if i == column else id for i, id in enumerate(ids)]
  logits_V = np.asarray(lm.logits([hidden])[0, column], np.float64)
  return logits_V[ids[column]] - math.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()


def test_a_masked_model_is_asked_for_each_shared_token_alone(encoder, tmp_path):
  pairs = [('my old cat ran', 'my cat ran'), ('she is bad', 'he is bad'), ('ab', 'ac')]
  path = written(tmp_path / 'a.jsonl', [dict(sent_more=a, sent_less=b, bias_type='age') for a, b in pairs])
  result = audited('stereotypes', encoder, dict(files=path))
  shared = [([0, 1, *range(6, 14)], range(10)), (range(1, 10), range(0, 9)), ([0], [0])]
  for (texts, columns, item) in zip(pairs, shared, result['items']):
    ids = [[*text.encode(), *encoder.end] for text in texts]
    assert [ids[0][i] for i in columns[0]] == [ids[1][i] for i in columns[1]]
    wanted = [sum(behind_mask(encoder, own, i) for i in chosen) for own, chosen in zip(ids, columns)]
    np.testing.assert_allclose(item['nats'], wanted, atol=ATOL)
    assert item['stereotyping'] == (wanted[0] > wanted[1])


def test_a_masked_model_fills_a_blank_from_left_to_right_and_reads_sentences_behind_their_context(encoder, tmp_path):
  records = [
      dict(bias_type='race', target='t', context='He was BLANK too.', stereotype='He was rude too.',
           unrelated='He was tin foil too.', **{'anti-stereotype': 'He was ok too.'}),
      dict(bias_type='race', target='t', context='He ran.', stereotype='So bad.', unrelated='Tin.',
           **{'anti-stereotype': 'So good.'})]
  result = audited('stereotypes', encoder, dict(files=written(tmp_path / 'a.jsonl', records)))
  fills = dict(zip(stereotypes.SENTENCES, (b'rude', b'ok', b'tin foil')))
  for name, fill in fills.items():
    rows = [[*b'He was ', *fill[:i + 1], *b' too.', *encoder.end] for i in range(len(fill))]
    wanted = np.mean([behind_mask(encoder, row, 7 + i) for i, row in enumerate(rows)])
    assert result['items'][0]['scores'][name] == pytest.approx(wanted, abs=ATOL)
    ids = [*b'He ran. ', *records[1][name].encode(), *encoder.end]
    wanted = np.mean([behind_mask(encoder, ids, i) for i in range(8, len(ids) - 1)])
    assert result['items'][1]['scores'][name] == pytest.approx(wanted, abs=ATOL)


def test_a_masked_models_results_do_not_depend_on_the_batch(encoder, tmp_path):
  rng = random.Random(0)
  text = lambda: ' '.join(rng.choices(['one', 'other', 'is', 'a'], k=rng.randint(2, 3)))
  path = written(tmp_path / 'a.jsonl', [dict(sent_more=text(), sent_less=text(), bias_type='age') for _ in range(4)])
  first, *others = (audited('stereotypes', encoder, dict(files=path, batch_size=size)) for size in (1, 7, 64))
  for other in others:
    assert other['metrics'] == first['metrics'] and other['intervals'] == first['intervals']
    np.testing.assert_allclose([item['nats'] for item in other['items']], [item['nats'] for item in first['items']],
                               atol=ATOL)


def test_a_masked_model_without_a_mask_is_refused(encoder, tmp_path):
  lm = LM(encoder.config, encoder.model, encoder.params, tokenizers.bytes_tokenizer())
  path = written(tmp_path / 'a.jsonl', [dict(sent_more='a b', sent_less='a c', bias_type='age')])
  with pytest.raises(JaxlmError, match='no mask to hide one'):
    audited('stereotypes', lm, dict(files=path))


# ---- toxicity ----------------------------------------------------------------------------------------------------


def test_the_worst_continuation_counts(tmp_path):
  path = written(tmp_path / 'a.jsonl', [
      dict(prompt=dict(text='One', toxicity=0.1)), dict(prompt='Two'), dict(text='Three')])
  lm = Fake(says=['You IDIOT!', 'foolish', 'fine', '', 'shut up.', 'stupid'])
  result = audited('toxicity', lm, dict(files=path, continuations=2, max_new_tokens=20, seed=3))
  assert result['metrics'] == pytest.approx(dict(expected_maximum=2 / 3, probability=2 / 3, toxic=1 / 2))
  assert [item['toxicity'] for item in result['items']] == [[1, 0], [0, 0], [1, 1]]
  assert result['items'][2] == dict(
      id=f'{path}:3', prompt='Three', continuations=['shut up.', 'stupid'], toxicity=[1, 1])
  assert (lm.how['max_new_tokens'], lm.how['seed'], lm.how['temperature'], lm.how['top_p']) == (9, 3, 1.0, 0.9)


def test_words_come_from_a_file(tmp_path):
  path = written(tmp_path / 'a.jsonl', [dict(prompt='One')])
  (tmp_path / 'words').write_text('# mine\nfine  # a comment\nüble Sache\n', encoding='utf-8')
  lm = Fake(says=['You idiot', 'all fine', 'Üble Sache', 'finest'])
  item, = audited('toxicity', lm, dict(files=path, continuations=4, words=str(tmp_path / 'words')))['items']
  assert item['toxicity'] == [0, 1, 1, 0]
  (tmp_path / 'empty').write_text('# none\n')
  for file, told in (('empty', 'has no word'), ('missing', 'cannot be read')):
    with pytest.raises(JaxlmError, match=told):
      audited('toxicity', lm, dict(files=path, words=str(tmp_path / file)))
  with pytest.raises(JaxlmError, match='two judges'):
    audited('toxicity', lm, dict(files=path, words='a', classifier='b'))


def tiny_run(folder, config, name, seq_len=32, width=32):
  config.update(batch_size=8, seq_len=seq_len, eval_every=config.steps, save_every=config.steps, tensorboard=False)
  config.model.update(num_layers=1, width=width, vocab_pad_to=64, max_length=max(96, seq_len))
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=width // 4)
  config.eval.update(batch_size=8, max_tokens=512, prompts=())
  config.mesh.update(data=1)
  train.run(config, str(folder / name))
  return str(folder / name)


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """A mesh of one takes the first of the eight devices."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda sizes, devices=None: make(sizes, devices or jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  """A run that learned to tell texts with a z from others."""
  folder, rng = tmp_path_factory.mktemp('judge'), random.Random(0)
  texts = [''.join(rng.choices('abcz' if i % 2 else 'abc', k=6)) + 'az'[i % 2] for i in range(64)]
  path = written(folder / 'a.jsonl', [dict(text=text, label='nasty' if 'z' in text else 'good') for text in texts])
  (folder / 'task.json').write_text(json.dumps(dict(kind='classify', files=dict.fromkeys(
      ('train', 'validation', 'test'), path))))
  config = base.smoke(base.default())
  config.steps, config.optim.lr, config.objective.name = 30, 1e-2, 'classify'
  config.model.structure = 'encoder'
  config.model.head.update(labels='sequence', num_labels=2, lm=False)
  config.data.update(task=str(folder / 'task.json'), packing='padded')
  return tiny_run(folder, config, 'run')


def test_a_fine_tuned_run_judges(judge, tmp_path):
  path = written(tmp_path / 'a.jsonl', [dict(prompt='One'), dict(prompt='Two')])
  says = ['abzcaaz', 'abcabca', 'ccz', '', 'a' * 90, 'b']
  named = audited('toxicity', Fake(says=says), dict(files=path, continuations=3, classifier=judge, toxic='nasty'))
  found = [x for item in named['items'] for x in item['toxicity']]
  lm = jaxlm.load(judge)
  room = 32 - len(lm.start) - len(lm.end)
  for text, value in zip(says, found):
    logits = np.asarray(lm.scores([[*lm.start, *text.encode()[:room], *lm.end]]))[0]
    wanted = 1 / (1 + math.exp(logits[0] - logits[1]))
    assert value == pytest.approx(wanted if text else 0, abs=ATOL)
  assert found[0] > 0.5 > found[1] and found[3] == 0
  for values in (dict(toxic='1'), dict(toxic='nasty', batch_size=1)):
    again = audited('toxicity', Fake(says=says), dict(files=path, continuations=3, classifier=judge) | values)
    np.testing.assert_allclose([x for item in again['items'] for x in item['toxicity']], found, atol=ATOL)
  with pytest.raises(JaxlmError, match="unknown label 'nsty'"):
    audited('toxicity', Fake(says=says), dict(files=path, classifier=judge, toxic='nsty'))


# ---- truthfulness ------------------------------------------------------------------------------------------------

ANSWERS = [  # question, best, other true ones, false ones
    ('q1', 't1', ['t2'], ['f1', 'f2']),  # best first
    ('q2', 't1', ['t3'], ['f1']),        # another true one first, best behind
    ('q3', 't4', [], ['f1', 'f3'])]      # a false one first
TRUTH = {'t1': -2., 't2': -4., 't3': -1., 't4': -3., 'f1': -3., 'f2': -5., 'f3': -1.}


def forms(question, best, true, false):
  one, many = {best: 1} | dict.fromkeys(false, 0), dict.fromkeys([best, *true], 1) | dict.fromkeys(false, 0)
  listed = lambda targets: dict(choices=list(targets), labels=list(targets.values()))
  return [dict(question=question, mc1_targets=one, mc2_targets=many),
          dict(question=question, mc1_targets=listed(one), mc2_targets=listed(many)),
          dict(question=question, best_answer=best, correct_answers=[best, *true], incorrect_answers=false)]


def test_true_and_false_answers_are_ranked_by_known_likelihoods(tmp_path):
  mass = lambda answers: sum(math.exp(TRUTH[answer]) for answer in answers)
  mc2 = np.mean([mass([best, *true]) / mass([best, *true, *false]) for _, best, true, false in ANSWERS])
  results = []
  for number, records in enumerate(zip(*(forms(*answers) for answers in ANSWERS))):
    lm = Fake(TRUTH)
    results.append(audited('truthfulness', lm, dict(files=written(tmp_path / f'{number}.jsonl', records))))
    assert results[-1]['metrics'] == pytest.approx(dict(mc1=2 / 3, mc2=mc2, true=2 / 3))
    assert ('Q: q1\nA:', ' t1') in lm.asked
  (tmp_path / 'a.csv').write_text('Type,Question,Best Answer,Correct Answers,Incorrect Answers\n' + '\n'.join(
      f'x,{q},{best},{"; ".join([best, *true])},{"; ".join(false)}' for q, best, true, false in ANSWERS))
  results.append(audited('truthfulness', Fake(TRUTH), dict(files=str(tmp_path / 'a.csv'), prompt='{question}?')))
  numbers = [[(item['mc1'], item['mc2'], item['likeliest_is_true']) for item in result['items']] for result in results]
  assert all(own == numbers[0] for own in numbers)
  assert [own[0] for own in numbers[0]] == [1, 1, 0] and [own[2] for own in numbers[0]] == [1, 1, 0]


def test_an_answer_as_likely_as_the_best_is_no_win_for_it(tmp_path):
  path = written(tmp_path / 'a.jsonl', [forms('q', 't4', [], ['f1'])[0]])
  assert audited('truthfulness', Fake(TRUTH), dict(files=path))['metrics'] == dict(mc1=0, mc2=0.5, true=0)


# ---- what it has of its training text ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(folder, run, model): of text with one document 50 times, one once, and one with a test example in it."""
  folder = tmp_path_factory.mktemp('audits')
  config = base.smoke(base.default())
  config.steps = 2
  plant(folder, config)
  run = tiny_run(folder, config, 'run')
  return folder, run, jaxlm.load(run)


def reciting(lm, monkeypatch, *texts):
  """The model, which knows some texts by heart, and else says one thing; told in ids or in text."""
  def generate(prompts, max_new_tokens, batch_size):
    said = []
    for prompt in prompts:
      given = prompt.encode() if isinstance(prompt, str) else bytes(prompt)
      text = next((text.encode() for text in texts if given in text.encode()), None)
      new = b'x' * max_new_tokens if text is None else text[text.index(given) + len(given):][:max_new_tokens]
      said.append(new.decode() if isinstance(prompt, str) else list(new))
    return said
  monkeypatch.setattr(lm, 'generate', generate)
  return lm


ALL = dict(prefix=30, length=30, samples=400, draws=10 ** 6)


def test_a_document_planted_often_is_found_and_named_and_one_seen_once_is_not_flagged(world, monkeypatch):
  _, run, lm = world
  result = audited('memorisation', reciting(lm, monkeypatch, PLANTED), ALL, run)
  own, = result['stores'].values()
  assert result['metrics']['memorised 11-100'] == 1 and result['metrics']['memorised 1'] == 0
  assert result['metrics']['memorised 0'] == 0
  assert {(text['file'], text['repeats']) for text in own['found']} == {('planted.jsonl', 50)}
  result = audited('memorisation', reciting(lm, monkeypatch, UNIQUE), ALL | dict(samples=10 ** 6), run)
  own, = result['stores'].values()
  assert {text['file'] for text in own['found']} == {'unique.jsonl'}


def test_what_training_itself_got_by_heart_is_found_at_the_default_thresholds(tmp_path):
  config = base.smoke(base.default())
  config.steps = 240
  config.model.positions.kind = 'rope'
  config.optim.update(lr=1e-2, warmup_steps=20)
  plant(tmp_path, config)
  run = tiny_run(tmp_path, config, 'run', seq_len=128, width=64)
  result = audited('memorisation', jaxlm.load(run), {}, run)
  own, = result['stores'].values()
  assert result['metrics']['memorised 11-100'] > 0.9 and result['metrics']['memorised 1'] == 0
  assert {(text['file'], text['repeats']) for text in own['found']} == {('planted.jsonl', 50)}
  path = written(tmp_path / 'a.jsonl.txt', [dict(prompt=PLANTED[:50])])
  named, = audited('provenance', jaxlm.load(run), dict(files=path, max_new_tokens=50), run)['stores'].values()
  assert named[0]['rows'][0]['sources'][0]['file'] == 'planted.jsonl' and named[0]['covered'] > 0.9


def test_a_model_that_learned_nothing_recites_nothing_in_any_batch(world):
  _, run, lm = world
  few = ALL | dict(samples=20, draws=200)
  first, second = (audited('memorisation', lm, few | dict(batch_size=size), run) for size in (8, 32))
  assert set(first['metrics'].values()) == {0} and first['metrics'] == second['metrics']
  assert first['stores'] == second['stores']
  with pytest.raises(JaxlmError, match='prefix [+] length = 100 tokens, but the model learned 96'):
    learned = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(
        positions=SimpleNamespace(kind='learned'), max_length=96)), front=[])
    audited('memorisation', learned, {}, run)


def test_sampled_continuations_depend_on_the_seed_and_not_on_the_batch(world, tmp_path):
  path = written(tmp_path / 'a.jsonl', [dict(prompt='the idea'), dict(prompt='some longer words')])
  said = lambda **more: [item['continuations'] for item in audited('toxicity', world[2], dict(
      files=path, continuations=3, max_new_tokens=6) | more)['items']]
  first = said()
  assert first == said(batch_size=2) and first != said(seed=1) and len(set(first[0])) == 3


def test_passages_of_texts_and_of_continuations_are_named(world, tmp_path, monkeypatch):
  _, run, lm = world
  text = f'ZQ! {UNIQUE[20:60]} ZQ! {PLANTED[:100]}'
  path = written(tmp_path / 'a.jsonl', [dict(text=text), dict(prompt=LEAKED[:20]), dict(text='ZQ!? ' * 9)])
  values = dict(files=path, shortest=20, max_new_tokens=50)
  result = audited('provenance', reciting(lm, monkeypatch, LEAKED), values, run)
  own, = result['stores'].values()
  assert [{row['sources'][0]['file'] for row in each['rows']} for each in own] == [
      {'unique.jsonl', 'planted.jsonl'}, {'leaked.jsonl'}, set()]
  assert own[1]['text'] == LEAKED[20:70] and own[1]['covered'] == 1 and own[0]['id'] == f'{path}:1'
  covered = sum(row['end'] - row['start'] for row in own[0]['rows'])
  assert result['metrics']['covered'] == pytest.approx((covered + 50) / (len(text) + 50 + 45))


def test_a_leaked_test_set_is_found_in_texts_and_in_tasks(world, tmp_path):
  _, run, lm = world
  clean, terms = [words(f'test {i}') for i in range(9)], dict(n=40, least=20)
  path = written(tmp_path / 'a.jsonl', [dict(text=text) for text in [*clean, LEAKED, 'too short']])
  result = audited('contamination', lm, dict(files=path) | terms, run)
  own, = result['stores'].values()
  assert result['metrics'] == {'flagged': 0.1} and (own['flagged'], own['undecided']) == (1, 1)
  row = next(row for row in own['rows'] if row['verdict'] == 'flagged')
  assert row['id'] == f'{path}:10' and row['text'] == LEAKED and row['sources'][0]['file'] == 'leaked.jsonl'
  records = [dict(q=text[:50], a=text[50:]) for text in (*clean, LEAKED)]
  (tmp_path / 'task.json').write_text(json.dumps(dict(
      kind='text', files=dict(test=written(tmp_path / 'b.jsonl', records)), input='{{ q }}', target='{{ a }}')))
  result = audited('contamination', lm, dict(tasks=str(tmp_path / 'task.json')) | terms, run)
  assert result['metrics'] == {'flagged': 0.1}


@pytest.mark.parametrize('fields, wanted', [
    (dict(input='a', second='b', target='c'), 'a\nb\nc'), (dict(input='a', target=1, choices=('x', 'y')), 'a\ny'),
    (dict(input='a', target=1), 'a'), (dict(words=('a', 'b'), target=(0, 1)), 'a b'),
    (dict(messages=(dict(content='a'), dict(content='b'))), 'a\nb')])
def test_all_text_of_an_example_is_looked_for(fields, wanted):
  assert recall._whole(recall.tasks.Example('id', **fields)) == wanted


def test_sources_of_a_mixture_are_told_apart(world, tmp_path, monkeypatch):
  folder, run, lm = world
  config = base.default()
  config.data.update(store=str(folder / 'stores'), holdout=0.0, mixture=[
      (name, 'jsonl', str(folder / f'{name}.jsonl'), 1) for name in ('plain', 'leaked')])
  monkeypatch.setattr(recall, '_indexes', lambda lm, settings: list(map(suffixes.index, store.prepare(config).stores)))
  path = written(tmp_path / 'a.jsonl', [dict(text=LEAKED)])
  assert audited('contamination', lm, dict(files=path), run)['metrics'] == {'plain: flagged': 0, 'leaked: flagged': 1}


def test_text_that_changed_is_refused_and_text_that_moved_is_found(world, tmp_path):
  folder, run, lm = world
  path = written(tmp_path / 'a.jsonl', [dict(text=LEAKED)])
  moved = tmp_path / 'moved'
  moved.mkdir()
  for file in folder.glob('*.jsonl'):
    (moved / file.name).write_bytes(file.read_bytes())
  values = dict(files=path, paths=str(moved / '*.jsonl'))
  assert audited('contamination', lm, values, run)['metrics'] == {'flagged': 1}
  written(moved / 'unique.jsonl', [dict(text=UNIQUE + '!')])
  with pytest.raises(JaxlmError, match='is no longer what it learned') as e:
    audited('contamination', lm, values, run)
  assert '\n' not in str(e.value)


def test_a_run_that_does_not_tell_the_models_text_is_refused(world, judge, tmp_path, encoder):
  _, run, lm = world
  path = written(tmp_path / 'a.jsonl', [dict(text=LEAKED)])
  for given, model, told in ((str(tmp_path), lm, 'lacks config.json, or'), (judge, lm, 'learned task'),
                             (run, encoder, 'another tokenizer')):
    with pytest.raises(JaxlmError, match=told):
      audited('contamination', model, dict(files=path, run=given))


# ---- records and settings ----------------------------------------------------------------------------------------

GOOD = {'pair': dict(sent_more='a b', sent_less='a c', bias_type='age'), 'prompt': dict(prompt='One'),
        'triple': stereoset('intersentence', 'race', 'x', 0), 'question': forms(*ANSWERS[0])[0]}


@pytest.mark.parametrize('name, good, change, told', [
    ('stereotypes', 'pair', dict(sent_less=None), "field 'sent_less' wants text, got 'None'"),
    ('stereotypes', 'pair', dict(bias_type=' '), "field 'bias_type' wants text"),
    ('stereotypes', 'pair', {'sent_more': ..., 'sentence': 'no blank', 'mask1': 'a'}, r'wants one \[MASK\]'),
    ('stereotypes', 'pair', {'sent_less': ...}, "no field 'sent_less', it has 'sent_more', 'bias_type'"),
    ('stereotypes', 'triple', dict(type='other'), "type wants intersentence or intrasentence, got 'other'"),
    ('stereotypes', 'triple', dict(unrelated=3), "field 'unrelated' wants text, got '3'"),
    ('stereotypes', 'triple', dict(sentences=['a']), "wants objects with 'sentence' and 'gold_label'"),
    ('toxicity', 'prompt', dict(prompt=dict(texts='a')), "no field 'text', it has 'texts'"),
    ('toxicity', 'prompt', dict(prompt=''), "field 'prompt' wants text"),
    ('truthfulness', 'question', dict(mc2_targets={'a': 'yes'}), "field 'mc2_targets' wants {answer: 1 or 0}"),
    ('truthfulness', 'question', dict(mc1_targets=dict(choices=['a'], labels=[1, 0])), "field 'mc1_targets' wants"),
    ('truthfulness', 'question', dict(mc1_targets={'a': 1, 'b': 1}), 'wanted one best answer'),
    ('truthfulness', 'question',
     {'mc2_targets': ..., 'best_answer': 'a', 'correct_answers': ['a'], 'incorrect_answers': []},
     "field 'incorrect_answers' wants a list of answers"),
    ('truthfulness', 'question', {'question': ...}, "no field 'question'")])
def test_a_bad_record_is_named_with_its_file_and_line(name, good, change, told, tmp_path):
  bad = {key: value for key, value in (GOOD[good] | change).items() if value is not ...}
  path = written(tmp_path / 'a.jsonl', [GOOD[good], bad])
  with pytest.raises(JaxlmError, match=told) as e:
    audited(name, Fake(NATS | TRUTH, ['a']), dict(files=path))
  assert str(e.value).startswith(f'{path}:2: ') and '\n' not in str(e.value)


def test_files_that_hold_no_records_are_refused(tmp_path):
  (tmp_path / 'empty.jsonl').write_text('\n')
  (tmp_path / 'torn.jsonl').write_text('{"prompt": "a"}\n{"prompt"\n')
  for path, told in (('empty.jsonl', 'gives no record'), ('missing.jsonl', 'is no file'),
                     ('torn.jsonl', 'torn.jsonl:2: ')):
    with pytest.raises(JaxlmError, match=told):
      audited('toxicity', Fake(), dict(files=str(tmp_path / path)))


def test_a_limit_draws_records_by_the_seed(tmp_path):
  path = written(tmp_path / 'a[1].jsonl', [dict(prompt=f'p{i}') for i in range(20)])
  drawn = lambda seed: [item['prompt'] for item in audited('toxicity', Fake(says=['a']), dict(
      files=path, limit=5, seed=seed, continuations=1))['items']]
  assert len(drawn(0)) == 5 and drawn(0) == drawn(0) != drawn(1)
  assert drawn(0) == sorted(drawn(0), key=lambda prompt: int(prompt[1:]))


@pytest.mark.parametrize('name, values, told', [
    ('stereotype', {}, "Unknown audit 'stereotype'.*Did you mean 'stereotypes'"),
    ('toxicity', dict(continuation=3), "unknown setting 'continuation'.*Did you mean 'continuations'"),
    ('toxicity', dict(continuations='3'), "Toxicity: continuations wants int, at least 1; got '3'"),
    ('toxicity', dict(continuations=0), 'at least 1; got 0'), ('toxicity', dict(limit=-1), 'at least 0; got -1'),
    ('toxicity', dict(seed=True), 'seed wants int, at least 0; got True'),
    ('toxicity', dict(top_p=float('nan')), 'got nan'),
    ('toxicity', dict(files=['a']), r"files wants str; got \['a'\]")])
def test_settings_that_are_none_are_refused(name, values, told):
  with pytest.raises(JaxlmError, match=told):
    audits.make(name, values)


def test_a_run_is_taken_from_where_the_model_was_unless_it_is_said():
  assert audits.make('memorisation', {}, 'a')[1].run == 'a'
  assert audits.make('memorisation', dict(run='b'), 'a')[1].run == 'b'
  assert audits.make('stereotypes', {}, 'a') == (audits.stereotypes, audits.Settings())
