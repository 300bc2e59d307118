"""Tasks of the standard library: exact labels, no leaks, the same in every run; and doctests that tell bodies apart."""
import ast
import collections
import hashlib
import itertools
import json
import re
import subprocess
import sys
import textwrap

import pytest

from jaxlm.data import library, stdlib_tasks, wordkinds
from jaxlm.errors import JaxlmError
from jaxlm.measure import sandbox

TEXT = '''\
"""A module."""
import os
from math import (pi,
                  e)

def first(a, b=1, *, c='é', d="x") -> int:
  """Adds two numbers together. It is simple.

  >>> first(2)
  3
  """
  # comment
  return a + b

class Outer:
  class Inner:
    @staticmethod
    def second(x=(1, 2),
               y = {'k': [None]}):
      "Gives a text of lines."
      def nested(z=0): return z
      return """
left
      kept"""

  def short(self): "All on one line."; return 1
if pi:
  async def third(): pass
'''


@pytest.fixture(scope='module')
def tasks():
  """The records of every task, the words' of a few files."""
  some = [m for m in library.modules() if m.path in ('textwrap.py', 'json/decoder.py', 'dis.py')]
  make = {**stdlib_tasks.RECORDS, 'token_kinds': lambda: stdlib_tasks.token_kinds(some)}
  return {name: [*records()] for name, records in make.items()}


@pytest.fixture(scope='module')
def lines():
  return {module.path: module.lines for module in library.modules()}


def test_functions_are_cut_where_they_should_be():
  module = library.parse('a/b.py', TEXT)
  assert module.name == 'a.b' and module.imports == {2, 3, 4}
  first, second, short, third = module.functions
  assert [f.qualname for f in module.functions] == ['first', 'Outer.Inner.second', 'Outer.short', 'third']
  assert [f.id for f in module.functions] == ['a/b.py:6', 'a/b.py:18', 'a/b.py:26', 'a/b.py:28']
  assert first.code == 'def first(a, b=1, *, c=\'é\', d="x") -> int:\n  # comment\n  return a + b\n'
  assert first.doc.startswith('Adds two') and first.head + first.doc_lines + first.body == '\n'.join(
      TEXT.split('\n')[5:13]) + '\n'
  assert second.head.startswith('@staticmethod\ndef second(') and second.doc == 'Gives a text of lines.'
  assert second.body.endswith('return """\nleft\n  kept"""\n') and second.body_lines == (21, 24)
  assert (short.doc, short.body, third.doc) == ('', '', '')
  for function, expected in ((first, dict(b='1', c="'é'", d='"x"')), (second, dict(x='(1, 2)', y="{'k': [None]}"))):
    assert {name: text for name, text, _ in function.defaults} == expected
    assert all(function.code[start:start + len(text)] == text for _, text, start in function.defaults)


@pytest.mark.parametrize('path, name', [('a/__init__.py', 'a'), ('a.py', 'a'), ('config-3/x.py', '')])
def test_a_module_has_the_name_it_is_imported_by(path, name):
  assert library.parse(path, '').name == name


@pytest.mark.parametrize('doc, sentence', [
    ('\n  Does a thing\n  here.  Then more.\n\n  Second.', 'Does a thing here.'),
    ('Reads e.g. the file, i.e. all of it', 'Reads e.g. the file, i.e. all of it'),
    ('What is it? An answer.', 'What is it?')])
def test_a_summary_is_the_first_sentence(doc, sentence):
  assert stdlib_tasks._sentence(doc) == sentence


def test_records_are_many_plain_and_have_an_id_that_names_their_line(tasks, lines):
  for name, records in tasks.items():
    assert len(records) > 300, name
    assert len({r['id'] for r in records}) == len(records)
    assert json.loads(json.dumps(records[:50])) == records[:50]
  for record in tasks['body']:
    path, _, number = record['id'].partition(':')
    assert re.search(rf'def {record["entry"].rpartition(".")[2]}\b', lines[path][int(number) - 1])


def test_code_has_no_docstring_and_parses(tasks):
  for record in tasks['summary']:
    code = record['code']
    if '"""' not in code and "'''" not in code:
      assert ast.get_docstring(ast.parse(code).body[0]) is None
    assert len(record['summary'].split()) >= stdlib_tasks.MIN_WORDS


def test_a_query_has_one_answer(tasks):
  for name, query, answer in (('summary', 'summary', 'code'), ('retrieve', 'query', 'positive')):
    assert len({r[query] for r in tasks[name]}) == len({r[answer] for r in tasks[name]}) == len(tasks[name])


def test_answers_stand_where_they_start(tasks):
  for record in tasks['default']:
    assert record['context'][record['start']:].startswith(record['answer'])
    ast.parse(record['answer'].strip(), mode='eval')


def test_tags_are_bio_and_words_are_the_code(tasks, lines):
  for record in tasks['token_kinds']:
    assert len(record['words']) == len(record['tags']) <= stdlib_tasks.MAX_SPAN_WORDS
    assert not any(re.search(r'\s', word) or not word for word in record['words'])
    for before, tag in zip(['O', *record['tags']], record['tags']):
      assert tag in wordkinds.TAGS and (tag[0] != 'I' or before[1:] == tag[1:])
    path, _, number = record['id'].partition(':')
    text = ''.join(lines[path][int(number) - 1:int(number) + 30])
    squeeze = lambda t: re.sub(r'[\s\\]', '', t)
    assert squeeze(text).startswith(squeeze(''.join(record['words'])))


def test_tags_are_what_the_code_says():
  text = textwrap.dedent('''\
      class C(f.g): pass
      async def f(self, a=1):  # two words
        return self.a.b(1.5, 'x y' 'z') is not rf"{a} b".c and a
      ''')
  records = [*stdlib_tasks.token_kinds((library.parse('a.py', text),))]
  assert [r['id'] for r in records] == ['a.py:1', 'a.py:3']
  pairs = [pair for r in records for pair in zip(r['words'], r['tags'])]
  kinds = collections.Counter(tag for _, tag in pairs)
  assert pairs[:7] == [('class', 'B-KEYWORD'), ('C', 'B-CLASS'), ('(', 'O'), ('f', 'B-NAME'), ('.', 'I-NAME'),
                       ('g', 'I-NAME'), (')', 'O')]
  assert pairs[9:12] == [('async', 'B-KEYWORD'), ('def', 'I-KEYWORD'), ('f', 'B-FUNCTION')]
  assert [w for w, t in pairs if t.endswith('CALL')] == ['self', '.', 'a', '.', 'b']
  assert [w for w, t in pairs if t.endswith('STRING')] == ["'x", "y'", "'z'", 'rf"{a}', 'b"']
  assert [t for _, t in pairs if t.endswith('STRING')] == ['B-STRING', *['I-STRING'] * 2, 'B-STRING', 'I-STRING']
  assert [w for w, t in pairs if t.endswith('COMMENT')] == ['#', 'two', 'words']
  assert kinds['B-NUMBER'] == 2 and kinds['I-KEYWORD'] == 2


def test_chunks_are_balanced_and_do_not_give_their_module_away(tasks):
  count = collections.Counter(r['label'] for r in tasks['module'])
  assert len(count) == stdlib_tasks.NUM_MODULES and len(set(count.values())) == 1
  for record in tasks['module']:
    assert record['id'].startswith(record['label']) and len(record['text'].split('\n')) == stdlib_tasks.CHUNK_LINES + 1
    assert not re.search(rf'\b{record["label"]}\b', record['text'])


def test_neighbours_stand_one_after_the_other(tasks, lines):
  squeeze = lambda text: ''.join(text.split())
  for record in tasks['neighbours'][::50]:
    path, _, number = record['id'].partition(':')
    said = [squeeze(line) for line in (record['query'] + record['positive']).splitlines()]
    left = iter(map(squeeze, lines[path][int(number) - 1:]))
    assert len(said) == stdlib_tasks.CHUNK_LINES and all(line in left for line in said)  # in their order


def test_a_comment_stands_over_its_lines(tasks, lines):
  for record in tasks['comments'][::50]:
    path, _, number = record['id'].partition(':')
    said, code = record['query'].split(), record['positive'].splitlines()
    text = lines[path][int(number) - 1:]
    above = [*itertools.takewhile(lambda line: line.lstrip().startswith('#'), text)]
    assert [word for line in above for word in re.sub(r'^ *#+', '', line).split() if re.search(r'\w', word)] == said
    assert [line.strip() for line in text[len(above):len(above) + len(code)]] == [line.strip() for line in code]
    assert 2 <= len(code) <= stdlib_tasks.CHUNK_LINES and all(code) and len(said) >= stdlib_tasks.MIN_WORDS


def test_a_line_is_all_that_its_function_does(tasks, lines):
  for record in tasks['line']:
    path, number = record['id'].rsplit(':', 1)
    text, squeeze = ''.join(lines[path]), lambda text: ''.join(text.split())
    assert len(record['before']) <= stdlib_tasks.MAX_BEFORE
    assert squeeze(record['before'] + record['prompt'] + record['line']) in squeeze(text)  # as they stand there
    assert len(record['before']) > 300 or int(number) < 40 or record['before'] == '', record['id']
    [node] = ast.parse(record['prompt'] + record['line']).body
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    assert [ast.unparse(s) for s in statements] == [ast.unparse(ast.parse(record['line'].strip()))], record['id']


@pytest.mark.parametrize('task', ['summary', 'body', 'retrieve', 'default', 'module', 'neighbours', 'comments', 'line'])
def test_splits_are_disjoint_and_hold_out_whole_files_or_chunks(tasks, task):
  split = {name: [*stdlib_tasks.records(task, name)] for name in ('train', 'validation', 'test')}
  found, every = sorted(r['id'] for part in split.values() for r in part), tasks[task]
  if task == 'body':
    assert all(r['doctests'] for r in split['test']) and len(split['test']) > 10
    every = [r for r in every if r['doctests'] or r['id'] in found]
    assert len(every) > 0.85 * len(tasks[task])
  else:
    assert min(map(len, split.values())) > 0.05 * len(tasks[task])
  assert found == sorted(r['id'] for r in every) and 0.7 < len(split['train']) / len(tasks[task]) < 0.9
  files = [{r['id'].partition(':')[0] for r in part} for part in split.values()]
  together = files[0] & files[1] or files[0] & files[2] or files[1] & files[2]
  assert bool(together) == (task == 'module')
  if task == 'module':
    assert all(len({r['label'] for r in part}) == stdlib_tasks.NUM_MODULES for part in split.values())


def test_unknown_tasks_and_splits_are_named():
  with pytest.raises(JaxlmError, match="Unknown task 'poems'"):
    stdlib_tasks.records('poems', 'train')
  with pytest.raises(JaxlmError, match="Unknown split 'dev'"):
    stdlib_tasks.records('body', 'dev')


def test_another_process_gives_the_same_records(tasks):
  code = ('import hashlib, json; from jaxlm.data import stdlib_tasks as t; '
          'print(hashlib.sha256(json.dumps([[*t.RECORDS[n]()] for n in ("summary", "body", "module", "default")])'
          '.encode()).hexdigest())')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=True)
  mine = json.dumps([tasks[name] for name in ('summary', 'body', 'module', 'default')])
  assert done.stdout.strip() == hashlib.sha256(mine.encode()).hexdigest()


SCORED = ['fractions.py', 'heapq.py', 'textwrap.py', 'json/encoder.py', 'http/cookiejar.py', 'collections/__init__.py']


def test_doctests_pass_with_the_original_body_and_fail_with_another(tasks):
  """Functions, methods, and a helper of a package among them."""
  chosen = [r for r in tasks['body'] if r['doctests'] and r['id'].partition(':')[0] in SCORED][::3]
  results = [*sandbox.run_all((p for r in chosen for p in stdlib_tasks.proofs(r)), timeout_s=20)]
  assert len(chosen) > 4 and any('.' in r['entry'] for r in chosen)
  assert all(r.passed for r in results[::2]), [r.why for r in results[::2]]
  assert not any(r.passed for r in results[1::2])


@pytest.mark.parametrize('body, why', [
    ('    return []\n', 'AssertionError: 2 of'),
    ('    import sys\n    sys.exit(0)\n', 'AssertionError: '),
    ('    import os\n    os._exit(0)\n', 'left with exit code 0 before its end'),
    ('    raise (\n', 'SyntaxError'),
    ('    while True: pass\n', 'took longer than')])
def test_wrong_bodies_fail(tasks, body, why):
  record = next(r for r in tasks['body'] if r['entry'] == 'merge' and r['module'] == 'heapq')
  result = sandbox.run(stdlib_tasks.program(record, body), timeout_s=3)
  assert not result.passed and result.why.startswith(why), result
