"""Tasks: what is read of records, and what is told of those that do not fit."""
import ast
import dataclasses
import json

import pytest

from jaxlm.data import tasks
from jaxlm.data.sources import SPLITS
from jaxlm.data.tasks import Task
from jaxlm.errors import JaxlmError


def written(folder, records, name='train.jsonl'):
  path = folder / name
  path.write_text(''.join(r if isinstance(r, str) else json.dumps(r) + '\n' for r in records), encoding='utf-8')
  return str(path)


def of(folder, kind, records, split='train', **settings):
  task = Task(kind, files={split: written(folder, records)}, **settings)
  return list(tasks.examples(tasks.named_labels(task), split))


def test_a_class_is_a_name_or_its_number(tmp_path):
  found = of(tmp_path, 'classify', [dict(text='a', label='no'), dict(text='b', label=1)], labels=('no', 'yes'))
  assert [(e.input, e.target) for e in found] == [('a', 0), ('b', 1)]
  assert found[1].id == f'{tmp_path}/train.jsonl:2'


def test_labels_that_are_not_given_are_those_of_the_training_split(tmp_path):
  task = Task('classify', files={'train': written(tmp_path, [dict(text='a', label=x) for x in 'cab'])}, held_out=0)
  assert tasks.named_labels(task).labels == ('a', 'b', 'c')


def test_every_kind_reads_its_fields(tmp_path):
  one = lambda kind, record, **settings: of(tmp_path, kind, [record], **settings)[0]
  assert one('multi_label', dict(text='a', labels=['x', 'z']), labels=('x', 'y', 'z')).target == (1, 0, 1)
  assert one('regress', dict(text='a', label='2.5')).target == 2.5
  tagged = one('tag', dict(words=['a', 'b'], ner=['O', 'B-X']), labels=('O', 'B-X'), fields={'tags': 'ner'})
  assert tagged.target == (0, 1)
  span = one('span', dict(q='who?', c='it is Ann', answers=dict(text=['Ann'], answer_start=[6])), input='{{ q }}',
             second='{{ c }}')
  assert span.target == (6, 9) and span.answers == ('Ann',)
  none = one('span', dict(q='who?', c='it is Ann', answers=dict(text=[], answer_start=[])), input='{{ q }}',
             second='{{ c }}')
  assert none.target == (-1, -1)
  assert one('text', dict(text='a', label='b'), target=' {{ label }}').target == ' b'
  many = one('text', dict(text='a', label=['b', 'c']), target=' {{ label[0] }}', fields={'answers': 'label'})
  assert many.target == ' b' and many.answers == ('b', 'c')
  assert one('choice', dict(text='a', choices=['x', 'y'], label='y')).target == 1
  messages, tool = [dict(role='user', content='a'), dict(role='assistant', content='b')], dict(name='f')
  for given in ([tool], json.dumps([tool])):
    assert one('chat', dict(messages=messages, tools=given)).tools == (tool,)
  assert one('chat', dict(messages=messages, mine=[tool]), fields={'tools': 'mine'}).tools == (tool,)
  assert all(one('chat', dict(messages=messages, tools=x)).tools is None for x in (None, [], '[]'))
  assert one('retrieve', dict(text='a', doc='b', negatives=['c']), second='{{ doc }}').choices == ('c',)
  assert one('prefer', dict(text='a', good='b', rejected='c'), second='{{ good }}').choices == ('c',)
  turns = [dict(role='user', content='hi'), dict(role='assistant', content='yo')]
  assert one('chat', dict(messages=turns)).messages[1]['content'] == 'yo'


def test_what_is_no_text_is_an_expression_of_fields(tmp_path):
  one = lambda kind, record, **settings: of(tmp_path, kind, [record], **settings)[0]
  split = "{{ options | split('(?m)^[A-Z][.]') }}"
  record = dict(text='a', options='\nA. x. B. \nB. y\n  z\nC. w', answer='C. w?')
  lettered = one('choice', record, fields={'choices': split}, target="{{ 'ABC'.index(answer[0]) }}")
  assert lettered.choices == (' x. B.', ' y\n  z', ' w') and lettered.target == 2
  of_two = one('choice', dict(text='a', s='The [M].', m=['cat', 'dog']), target='1', fields={
      'choices': "{{ [s.replace('[M]', m[0]), s.replace('[M]', m[1])] }}"})
  assert of_two.choices == ('The cat.', 'The dog.') and of_two.target == 1
  assert one('prefer', dict(text='a', good='b', bad='c'), second=' {{ good }}', fields={
      'rejected': "{{ ' ' ~ bad }}"}).choices == (' c',)
  found = one('retrieve', dict(text='a', doc='b', bad='c'), second='{{ doc }}', fields={'negatives': '{{ [bad] }}'})
  assert found.choices == ('c',)
  span = one('span', dict(text='who?', c='it is Ann', a='Ann'), second='{{ c }}', fields={
      'answers': "{{ {'text': [a], 'answer_start': [c.find(a)]} }}"})
  assert span.target == (6, 9) and span.answers == ('Ann',)


def test_a_program_is_a_template_that_sees_what_was_said(tmp_path):
  path = written(tmp_path, [dict(text='def f():\n', answer='  return 1\n', name='f')])
  task = Task('text', files={'train': path}, target='{{ answer }}',
              program='{{ text }}{{ said }}\nassert {{ name }}() == 1')
  example, = tasks.examples(task, 'train')
  assert tasks.program_of(task, example, '  return 2\n') == 'def f():\n  return 2\n\nassert f() == 1'
  asked = Task('text', files={'train': path}, target='{{ answer }}', program='{{ [said, text] | tojson }}')
  assert ast.literal_eval(tasks.program_of(asked, example, "'<é\U0001f600>'")) == ["'<é\U0001f600>'", 'def f():\n']
  named = Task('text', files={'train': path}, program=f'{__name__}:program')
  assert tasks.program_of(named, example, 'x') == 'f x'
  with pytest.raises(JaxlmError, match=":1: template '{{ other }}': 'other' is undefined"):
    tasks.program_of(Task('text', program='{{ other }}'), example, 'x')


def program(record, said):
  return f'{record["name"]} {said}'


def test_columns_of_words_are_read_by_sentence(tmp_path):
  (tmp_path / 'x.conll').write_text('-DOCSTART- -X- O\n\nAnn NNP B-PER\nran VBD O\n\n\nParis NNP B-LOC',
                                    encoding='utf-8')
  task = Task('tag', 'conll', files={'train': str(tmp_path / 'x.conll')}, held_out=0)
  named = tasks.named_labels(task)
  assert named.labels == ('B-LOC', 'B-PER', 'O')
  assert [(e.id[-9:], e.words, e.target) for e in tasks.examples(named, 'train')] == [
      ('x.conll:3', ('Ann', 'ran'), (1, 2)), ('x.conll:7', ('Paris',), (0,))]
  assert tasks.named_labels(dataclasses.replace(task, fields={'tags': '{{ columns[1] }}'})).labels == ('NNP', 'VBD')
  (tmp_path / 'x.conll').write_text('\ufeffAnn NNP B-PER\n', encoding='utf-8')
  assert next(tasks.examples(named, 'train')).words == ('Ann',)
  (tmp_path / 'x.conll').write_text('Ann NNP B-PER\nran VBD\n', encoding='utf-8')
  with pytest.raises(JaxlmError, match='x.conll:2: wanted 3 columns, as line 1 has, got 2'):
    list(tasks.examples(named, 'train'))


def test_columns_under_a_header_may_be_long_and_have_names_of_their_own(tmp_path):
  (tmp_path / 'x.csv').write_text('text,label\n' + 'a' * 200_000 + ',b\n')
  task = Task('classify', 'csv', files={'train': str(tmp_path / 'x.csv')}, labels=('b',), held_out=0)
  example, = tasks.examples(task, 'train')
  assert len(example.input) == 200_000
  (tmp_path / 'x.csv').write_text('text,label,text\na,b,c\n')
  with pytest.raises(JaxlmError, match=r"x.csv:1: column 'text' stands there twice"):
    list(tasks.examples(task, 'train'))


def test_whole_numbers_are_names_before_they_are_numbers(tmp_path):
  path = written(tmp_path, [dict(text='a', labels=[1, 10]), dict(text='b', labels=[2, 3])])
  task = Task('multi_label', files={'train': path}, held_out=0)
  named = tasks.named_labels(task)
  assert named.labels == ('1', '10', '2', '3')
  assert [e.target for e in tasks.examples(named, 'train')] == [(1, 1, 0, 0), (0, 0, 1, 1)]
  one = lambda record: of(tmp_path, 'choice', [record])[0].target
  assert one(dict(text='a', choices=['7', '8'], label=1)) == 1
  assert one(dict(text='a', choices=['7', '8'], label='7')) == 0
  with pytest.raises(JaxlmError, match="target '1' is one of the choices, and the number of another"):
    one(dict(text='a', choices=['1', '2'], label=1))


BROKEN = '{"text": "a", "label": '
FAULTS = {
    'a missing field': ('classify', [dict(label='no')], {}, r":1: template '{{ text }}': 'text' is undefined; the "
                        "record has 'label'. Mend the record, or the template."),
    'an unknown label': ('classify', [dict(text='a', label='nay')], {},
                         r":1: unknown label 'nay'; the task has 'no', 'yes'"),
    'a label number too high': ('classify', [dict(text='a', label=2)], {}, r":1: unknown label '2'"),
    'broken JSON': ('classify', [dict(text='a', label='no')] * 3416 + [BROKEN], {},
                    r':3417: not a line of JSON .*; mend or remove it'),
    'no object': ('classify', ['[1]\n'], {}, r':1: wanted a JSON object, got list'),
    'words without tags': ('tag', [dict(words=['a', 'b'], tags=['no'])], {}, r':1: 2 words and 1 tags'),
    'no number': ('regress', [dict(text='a', label='much')], {}, r":1: target wants a finite number, got 'much'"),
    'an answer that is not there': ('span', [dict(text='q', label='c', answer='Ann', start=0)],
                                    dict(second='it is Ann'), r":1: the context has 'it ' at 0, not the answer 'Ann'"),
    'a choice that is none': ('choice', [dict(text='a', choices=['x'], label='y')], {},
                              r":1: target 'y' is none of the 1 "),
    'an empty target': ('text', [dict(text='a', label=' ')], {}, ':1: the target is empty'),
    'choices that are no list': ('choice', [dict(text='a', choices='xy', label='x')], {},
                                 r":1: field 'choices' wants a list of texts, got 'xy'"),
    'a null': ('text', [dict(text=None, label='a')], {}, r":1: template .*: 'text' is undefined; the record has 'label' \(null: 'text'\)"),
    'a conversation without an answer': ('chat', [dict(messages=[dict(role='user', content='a')])], {},
                                         ':1: .*assistant'),
    'places that are no numbers': ('span', [dict(text='q', answers=dict(text=['a'], answer_start=['0']))],
                                   dict(second='a'), ":1: field 'answers' wants"),
    'a label that only looks like a number': ('classify', [dict(text='a', label='\u00b2')], {}, ":1: unknown label"),
    'an expression of what is not there': (
        'choice', [dict(text='a', label=0)], dict(fields={'choices': '{{ options }}'}),
        r":1: template '{{ options }}': 'options' is undefined; the record has 'text'"),
    'an expression that fails': ('choice', [dict(text='a', label=0)],
                                 dict(fields={'choices': "{{ [text.index('b')] }}"}),
                                 ':1: template .*: substring not found; the record has'),
    'no list of an expression': ('choice', [dict(text='a', label=0)], dict(fields={'choices': '{{ text }}'}),
                                 ":1: field '{{ text }}' wants a list of texts, got 'a'"),
    'an empty choice': ('choice', [dict(text='A. x\nB.\nC. y', label=0)], dict(fields={
        'choices': "{{ text | split('(?m)^[A-C][.]') }}"}), ':1: choice 1 is empty, and nothing is likelier'),
    'text beside an expression': ('choice', [dict(text='a', label=0)], dict(fields={'choices': 'x {{ text }}'}),
                                  "Template 'x {{ text }}': an expression stands in {{ }}, and nothing beside it"),
    'a pattern that is none': ('choice', [dict(text='a', label=0)], dict(fields={'choices': "{{ text | split('(') }}"}),
                               ':1: template .*: missing \\), unterminated subpattern'),
    'tools that are none': ('chat', [dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')],
                                          tools='f()')], {}, ":1: field 'tools' wants a list of tools, .* got 'f"),
    'no answer of several': ('text', [dict(text='a', label='b', answers=[])], dict(fields={'answers': 'answers'}),
                             ":1: field 'answers' wants a list of at least one text, got"),
    'a template that is none': ('classify', [dict(text='a', label='no')], dict(input='{{ text'), 'Template .*'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_record_that_does_not_fit_is_told_with_its_file_and_line(name, tmp_path):
  kind, records, settings, told = FAULTS[name]
  with pytest.raises(JaxlmError, match=told) as e:
    of(tmp_path, kind, records, **dict(labels=('no', 'yes'), **settings))
  assert '\n' not in str(e.value)
  if told.startswith(':'):
    assert str(e.value).startswith(f'{tmp_path}/train.jsonl:')


def test_an_empty_split_is_told(tmp_path):
  task = Task('text', files={'train': written(tmp_path, []), 'test': written(tmp_path, [], 'test.jsonl')})
  with pytest.raises(JaxlmError, match="Split 'test' of the task is empty: .*test.jsonl gives no record"):
    list(tasks.examples(task, 'test'))
  with pytest.raises(JaxlmError, match="no files of split 'test' and none of 'train'"):
    list(tasks.examples(Task('text'), 'test'))
  with pytest.raises(JaxlmError, match="splits train, validation, test; got 'dev'"):
    list(tasks.examples(task, 'dev'))


def test_splits_without_files_are_held_out_of_the_training_files_wherever_those_lie(tmp_path):
  records = [dict(text=str(i), label='x') for i in range(400)]
  found = []
  for folder in (tmp_path / 'a', tmp_path / 'b'):
    folder.mkdir()
    task = Task('classify', files={'train': written(folder, records)}, labels=('x',))
    found.append([{e.input for e in tasks.examples(task, split)} for split in SPLITS])
  train, validation, test = found[0]
  assert found[0] == found[1] and not train & validation and not train & test and not validation & test
  assert len(train | validation | test) == 400 and 20 < len(test) < 60 and 20 < len(validation) < 60
  own = Task('classify', files=dict.fromkeys(SPLITS, task.files['train']), labels=('x',))
  assert all(len(list(tasks.examples(own, split))) == 400 for split in SPLITS)


def test_tables_and_columns_are_read(tmp_path):
  (tmp_path / 'x.tsv').write_text('text\tlabel\na b\t1\n', encoding='utf-8')
  task = Task('classify', 'tsv', files={'train': str(tmp_path / 'x.tsv')}, labels=('no', 'yes'), held_out=0)
  found = [(e.input, e.target, e.id[-8:]) for e in tasks.examples(task, 'train')]
  assert found == [('a b', 1, '/x.tsv:2')]
  (tmp_path / 'x.tsv').write_text('text\tlabel\na b\n', encoding='utf-8')
  with pytest.raises(JaxlmError, match='x.tsv:2: wanted 2 columns'):
    list(tasks.examples(task, 'train'))


def test_parquet_and_saved_datasets_are_read(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  import pyarrow.parquet
  table = pyarrow.table(dict(text=['a', 'b'], label=[1, 0]))
  pyarrow.parquet.write_table(table, tmp_path / 'x.parquet')
  task = Task('classify', 'parquet', files={'train': str(tmp_path / '*.parquet')}, labels=('no', 'yes'), held_out=0)
  assert [(e.input, e.target) for e in tasks.examples(task, 'train')] == [('a', 1), ('b', 0)]


def test_a_task_is_described_by_a_file(tmp_path):
  path = tmp_path / 'mine.json'
  values = dict(kind='text', files={'train': 'x.jsonl'}, stop=['\n'], max_new_tokens=5)
  path.write_text(json.dumps(values), encoding='utf-8')
  assert tasks.make(str(path)) == Task('text', files={'train': 'x.jsonl'}, stop=('\n',), max_new_tokens=5)
  for change, told in ((dict(kind='guess'), "Unknown kind of task 'guess'"),
                       (dict(stopp=[]), "unknown key 'stopp'.*stop"),
                       (dict(stop='x'), "stop wants list, got 'x'"),
                       (dict(files={'train': ['x']}), 'files wants texts inside'),
                       (dict(files={'training': 'x'}), "files has a split 'training'; a task has train, validation, test"),
                       (dict(fields={'answer': 'a'}), "kind 'text' reads no field 'answer'; fields names answers. Did you"),
                       (dict(labels=['a', 'b', 'a']), 'labels has a name twice')):
    path.write_text(json.dumps(values | change), encoding='utf-8')
    with pytest.raises(JaxlmError, match=told):
      tasks.make(str(path))
  path.write_text(json.dumps(values | dict(files={'train': 'x.jsonl, y*.jsonl', 'test': 'x.jsonl'})), encoding='utf-8')
  (tmp_path / 'x.jsonl').write_text('')  # what lies beside the description is meant
  near = str(tmp_path / 'x.jsonl')
  assert tasks.make(str(path)).files == {'train': f'{near},y*.jsonl', 'test': near}
  with pytest.raises(JaxlmError, match=r"files of a task: 'y\*.jsonl' matches no file"):
    list(tasks.examples(tasks.make(str(path)), 'train'))
  with pytest.raises(JaxlmError, match='is no task that can be read'):
    tasks.make(str(tmp_path / 'other.json'))
  with pytest.raises(JaxlmError, match="Unknown task 'modules'.*Did you mean 'module'"):
    tasks.make('modules')


def test_templates_cannot_reach_beyond_their_record(tmp_path):
  with pytest.raises(JaxlmError, match='unsafe'):
    of(tmp_path, 'text', [dict(text='a', label='b')], input='{{ text.__class__.__mro__ }}')
