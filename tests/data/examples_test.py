"""Examples of tasks as tokens: what counts, what fits, how rows are packed."""
import json

import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import objectives
from jaxlm.data import encoders, examples, tasks, tokenizers
from jaxlm.data.tasks import Example
from jaxlm.errors import JaxlmError

BYTES = tokenizers.bytes_tokenizer()
BOS, EOS = BYTES.vocab.first, BYTES.vocab.last


def form(length=32, **settings):
  return encoders.Form(BYTES, length, template=encoders.template_of('chatml'), **settings)


def rows(kind, example, **settings):
  return list(encoders.ENCODERS[kind](form(**settings), example))


def text(ids):
  return bytes(i for i in ids if i < 256).decode()


def counted(part):
  """The text whose tokens count, and whether the end token does."""
  return text([i for i, mark in zip(part.ids, part.marks) if mark == 1]), part.marks[-1] == 1 and part.ids[-1] == EOS


def test_only_the_answer_and_its_end_count():
  (row,) = rows('text', Example('x', 'ask:', target=' say'))
  assert text(row.parts[0].ids) == 'ask: say' and counted(row.parts[0]) == (' say', True)
  assert row.parts[0].ids[0] == BOS and row.parts[0].ids[-1] == EOS


def test_a_long_question_loses_its_beginning_and_never_the_answer():
  (row,) = rows('text', Example('x', '0123456789' * 5, target='answer'), length=16)
  assert len(row.parts[0].ids) == 16 and text(row.parts[0].ids) == '23456789' + 'answer' [:6] and counted(
      row.parts[0])[0] == 'answer'


def test_an_answer_that_does_not_fit_is_told():
  told = r'f.jsonl:7: the target has 41 tokens, the window has room for 15; make config.seq_len'
  with pytest.raises(JaxlmError, match=told):
    rows('text', Example('f.jsonl:7', 'a', target='x' * 40), length=16)
  with pytest.raises(JaxlmError, match='make config.objective.answer.target_length longer'):
    rows('text', Example('f.jsonl:7', 'a', target='x' * 40), length=16, target=8)


def test_two_texts_are_cut_where_the_longer_one_ends():
  (row,) = rows('classify', Example('x', 'a' * 30, 'b' * 5, target=3), length=16)
  part = row.parts[0]
  assert text(part.ids) == 'a' * 8 + 'b' * 5 and part.types == [0] * 10 + [1] * 6 and row.labels == 3


def test_words_have_their_tag_at_the_first_piece():
  (row,) = rows('tag', Example('x', words=('ab', 'c', 'def'), target=(2, 0, 1)))
  part = row.parts[0]
  assert text(part.ids) == 'ab c def'
  assert part.marks == [-1, 2, -1, 0, -1, 1, -1, -1, -1, -1]
  (short,) = rows('tag', Example('x', words=('ab', 'c', 'def'), target=(2, 0, 1)), length=6)
  assert [m for m in short.parts[0].marks if m >= 0] == [2, 0]


@pytest.mark.parametrize('length', [24, 40, 200])
def test_every_window_of_a_context_says_where_the_answer_is_and_some_window_has_it(length):
  context = ' '.join(f'w{i}' for i in range(20))
  start = context.index('w13')
  example = Example('x', 'q?', context, target=(start, start + 3), answers=('w13',))
  found = rows('span', example, length=length, stride=6)
  answers = []
  covered = set()
  for row in found:
    ids, (column, first) = row.parts[0].ids, row.place
    inside = ids[column:-1]
    assert text(inside) == context[first:first + len(inside)] and len(ids) <= length
    covered |= set(range(first, first + len(inside)))
    a, b = row.labels
    answers.append(text(ids[a:b + 1]) if a else None)
  assert 'w13' in answers and set(answers) <= {'w13', None} and covered == set(range(len(context)))
  (whole,) = rows('span', Example('x', 'q?', 'none', target=(-1, -1)))
  assert whole.labels.tolist() == [0, 0]


def test_of_a_conversation_the_assistants_turns_count_and_the_last_are_left_out_until_it_fits():
  turns = [dict(role=role, content=content) for role, content in (
      ('user', 'hi'), ('assistant', 'yo'), ('user', 'and?'), ('assistant', 'so'))]
  (row,) = rows('chat', Example('x', messages=tuple(turns)), length=400)
  assert counted(row.parts[0])[0] == 'yo<|im_end|>so<|im_end|>'
  (row,) = rows('chat', Example('x', messages=tuple(turns)), length=len(row.parts[0].ids) - 1)
  assert counted(row.parts[0])[0] == 'yo<|im_end|>'
  with pytest.raises(JaxlmError, match='f:3: not even the first answer fits into 10 tokens'):
    rows('chat', Example('f:3', messages=tuple(turns)), length=10)
  with pytest.raises(JaxlmError, match=r'f:3: '):
    rows('chat', Example('f:3', messages=tuple(turns[1:])), length=400)


def test_virtual_tokens_stand_before_every_text_and_never_count():
  front = (300, 301)
  for kind, example in (('text', Example('x', 'a', target='b')), ('classify', Example('x', 'a', target=0)),
                        ('retrieve', Example('x', 'a', 'b')), ('prefer', Example('x', 'a', 'b', choices=('c',)))):
    (row,) = rows(kind, example, front=front)
    for part in row.parts:
      assert tuple(part.ids[:2]) == front and part.ids[2] == BOS and part.marks[:3] == [0, 0, 0]
  (row,) = rows('text', Example('x', 'a', target='b'), front=front, target=8)
  assert tuple(row.parts[0].ids[:2]) == front and row.parts[1].ids == [ord('b'), EOS]


# ---- streams -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
  given = base.smoke(base.default())
  given.objective.name = 'answer'
  given.data.update(packing='best_fit', task_examples=0, task=str(tmp_path / 'task.json'))
  rng = np.random.default_rng(0)
  letters = lambda n: ''.join(rng.choice(list('abcdef'), n))
  lines = [json.dumps(dict(q=letters(rng.integers(1, 20)), a=letters(rng.integers(1, 12)))) for _ in range(300)]
  (tmp_path / 'all.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  (tmp_path / 'task.json').write_text(json.dumps(dict(
      kind='text', input='{{ q }}', target='{{ a }}', files={'train': str(tmp_path / 'all.jsonl')})), encoding='utf-8')
  return given


def stream_of(config):
  data = examples.prepare(config)
  objective = objectives.make(config, data.tokenizer.vocab)
  return data.task, examples.TaskStream(config, data.task, objective)


def said(batch):
  """(question, answer) of every text of a batch, by what counts."""
  found = []
  for row in range(len(batch['tokens'])):
    for segment in range(1, batch['segment_ids'][row].max() + 1):
      here = batch['segment_ids'][row] == segment
      ids, counts = batch['tokens'][row][here], batch['loss_weights'][row][here] > 0
      assert (batch['positions'][row][here] == np.arange(here.sum())).all()
      found.append((text(ids[:counts.argmax() + 1]), text(batch['targets'][row][here][counts])))
  return found


def test_packed_rows_hold_every_example_once_an_epoch_and_are_nearly_full(config):
  data, stream = stream_of(config)
  want = sorted((e.input, e.target) for e in tasks.examples(tasks.make(config.data.task), 'train'))
  for epoch in range(2):
    numbers = epoch * len(stream.groups) + np.arange(len(stream.groups))
    assert sorted(said(stream.examples(numbers))) == want
  assert stream.filled > 0.97
  assert len(stream.groups) < len(data.train) / 2


def test_a_row_depends_on_its_number_alone(config):
  _, stream = stream_of(config)
  numbers = np.array([3, 1000, 7])
  together = stream.examples(numbers)
  for i, number in enumerate(numbers):
    for key, value in stream.examples(np.array([number])).items():
      np.testing.assert_array_equal(value[0], together[key][i])


def test_an_encoder_reads_questions_and_a_decoder_their_answers(config):
  config.model.structure = 'encoder_decoder'
  config.objective.answer.target_length = 24
  _, stream = stream_of(config)
  batch = stream.examples(np.arange(len(stream.groups)))
  found = []
  for row in range(len(batch['tokens'])):
    for segment in range(1, batch['segment_ids'][row].max() + 1):
      source = batch['source_tokens'][row][batch['source_segment_ids'][row] == segment]
      here = batch['segment_ids'][row] == segment
      targets = batch['targets'][row][here]
      assert batch['loss_weights'][row][here].all() and targets[-1] == EOS
      np.testing.assert_array_equal(batch['tokens'][row][here][1:], targets[:-1])
      assert batch['tokens'][row][here][0] == BYTES.vocab.decoder_start
      found.append((text(source), text(targets)))
  assert sorted(found) == sorted((e.input, e.target) for e in tasks.examples(tasks.make(config.data.task), 'train'))


def test_validation_holds_every_row_once_and_padding_counts_nothing(config):
  config.eval.batch_size = 7
  data, _ = stream_of(config)
  batches = list(examples.TaskBatches(config, data, objectives.make(config, BYTES.vocab), lambda size: (0, size)))
  assert {len(b['tokens']) for b in batches} == {7}
  found = [pair for batch in batches for pair in said(batch)]
  assert found == [(e.input, e.target) for e in data.examples]
  assert sum(b['loss_weights'].sum() for b in batches) == sum(len(e.target) + 1 for e in data.examples)


def test_another_number_of_labels_is_told(config, tmp_path):
  records, task = tmp_path / 'a.jsonl', tmp_path / 'mine.json'
  records.write_text(''.join(json.dumps(dict(text=label, label=label)) + '\n' for label in ('no', 'yes')))
  task.write_text(json.dumps(dict(kind='classify', files={'train': str(records)}, held_out=0)))
  config.objective.name, config.data.task = 'classify', str(task)
  config.model.head.update(labels='sequence', num_labels=3)
  with pytest.raises(JaxlmError, match=r"head.num_labels=3, but task '.*mine.json' has 2 labels; set it to 2"):
    examples.prepare(config)


def test_what_does_not_fit_is_left_out_where_that_is_asked_for(config, capsys):
  config.seq_len = 15
  whole = [e for e in tasks.examples(tasks.make(config.data.task), 'train') if len(e.target) <= 13]
  config.data.too_long = 'refuse'
  config.seq_len = 8
  with pytest.raises(JaxlmError, match='all.jsonl:[0-9]+: the target has'):
    examples.prepare(config)
  config.data.too_long = 'leave'
  data = examples.prepare(config).task
  kept = [e for e in whole if len(e.target) + 1 <= 8]
  assert len(data.train) == len(kept) < len(whole)
  assert f'train: {len(whole) - len(kept)} of {len(whole)} examples do not fit into 9 tokens' in capsys.readouterr().err


def test_a_template_that_is_none_is_told(config):
  with pytest.raises(JaxlmError, match="config.data.template='nothing' is neither a built-in template"):
    encoders.template_of('nothing')


def test_the_first_examples_are_measured_whole():
  asked = [Example(str(i), 'q?', 'x' * 40 * i, target=(-1, -1)) for i in range(1, 5)]  # windows: 2, 4, 6 and so on
  whole = examples.encode(tasks.Task('span'), 'validation', form(), asked)
  for tokens in (1, 100, 250, 10 ** 6):
    part = examples.beginning(whole, tokens)
    kept = part.record[-1] + 1
    assert part.record.tolist() == [i for i in whole.record.tolist() if i < kept]
    assert len(part.ids) <= max(tokens, whole.lengths[whole.record == 0].sum())
    assert kept == 4 or part.lengths.sum() + whole.lengths[whole.record == kept].sum() > tokens
    np.testing.assert_array_equal(part.lengths, whole.lengths[:len(part)])
    np.testing.assert_array_equal(part.labels, whole.labels[:len(part)])


@pytest.mark.parametrize('packing', ['padded', 'best_fit'])
def test_an_end_that_is_also_padding_counts_where_it_ends_an_answer_and_nowhere_else(packing, config, tmp_path):
  backend = tokenizers.bytes_tokenizer().backend
  backend.add_special_tokens(['<s>', '</s>'])
  made = tokenizers.Tokenizer(backend, dict(bos='<s>', eos='</s>', pad='</s>'), 'made')
  made.save(tmp_path / 'pieces')
  turns = [dict(role=role, content=content) for role, content in (
      ('user', 'hi'), ('assistant', 'yo'), ('user', 'and?'), ('assistant', 'so'))]
  (tmp_path / 'all.jsonl').write_text('\n'.join([json.dumps(dict(messages=turns))] * 20), encoding='utf-8')
  (tmp_path / 'task.json').write_text(json.dumps(dict(kind='chat', files=dict.fromkeys(
      ('train', 'validation'), str(tmp_path / 'all.jsonl')))))
  config.data.update(packing=packing, tokenizer=str(tmp_path / 'pieces'), template='llama2')
  config.seq_len = 150
  batch = stream_of(config)[1].examples(np.arange(4))
  ends, there = batch['targets'] == made.vocab.eos, batch['segment_ids'] > 0
  assert (batch['tokens'][~there] == made.vocab.pad).all() and (~there).any() and not batch['loss_weights'][~there].any()
  for row, count in zip(batch['segment_ids'], batch['loss_weights'] * ends):
    assert count.sum() == 2 * row.max()  # each conversation has two answers
