"""Tasks answered by embeddings, and measures of groups of examples, against what is counted by hand."""
import json
import types

import numpy as np
import pytest

from jaxlm import evaluate, exam
from jaxlm.data import tasks, tokenizers


def model(vectors):
  """What an exam asks of a model: embeddings of texts that are letters, first ids first."""
  config = types.SimpleNamespace(seq_len=8)
  made = lambda texts, batch_size: np.array([vectors[chr(ids[0])] for ids in texts], np.float32)
  head = types.SimpleNamespace(labels='none')
  return types.SimpleNamespace(start=[], end=[], front=[], tokenizer=tokenizers.bytes_tokenizer(), config=config, embed=made,
                               model=types.SimpleNamespace(config=types.SimpleNamespace(head=head)))


def task(folder, kind, records, **settings):
  file = folder / 'records.jsonl'
  file.write_text('\n'.join(map(json.dumps, records)), encoding='utf-8')
  (folder / 'task.json').write_text(json.dumps(dict(kind=kind, files=dict(train=str(file), test=str(file)), **settings)),
                                    encoding='utf-8')
  return tasks.make(str(folder / 'task.json'))


def test_texts_are_as_alike_as_their_cosine(tmp_path):
  vectors = {'a': [1, 0], 'b': [2, 0], 'c': [1, 1], 'd': [0, 3], 'e': [-1, 0]}
  records = [dict(text='a', other=other, label=str(label)) for other, label in zip('bcde', (5, 4, 2, 0))]
  found = exam.hold(model(vectors), task(tmp_path, 'regress', records, second='{{ other }}', metric='spearman'))
  assert [said['answer'] for said in found['said']] == pytest.approx([1, 0.5 ** 0.5, 0, -1], abs=1e-6)
  assert found['metrics']['spearman'] == pytest.approx(1)


def test_clusters_are_as_many_as_labels(tmp_path):
  pytest.importorskip('sklearn')
  vectors = {letter: [1, 0.01 * i] if letter < 'e' else [0.01 * i, 1] for i, letter in enumerate('abcdefgh')}
  records = [dict(text=letter, label='left' if letter < 'e' else 'right') for letter in 'abcdefgh']
  found = exam.hold(model(vectors), task(tmp_path, 'classify', records, metric='v_measure'))
  assert found['metrics']['v_measure'] == pytest.approx(1)
  turned = [record | dict(label='left' if record['text'] in 'aceg' else 'right') for record in records]
  found = exam.hold(model(vectors), task(tmp_path, 'classify', turned, metric='v_measure'))
  assert found['metrics']['v_measure'] == pytest.approx(0, abs=1e-6)  # each class is half of each cluster


def test_groups_are_told_of_by_themselves(tmp_path):
  letters = 'abcd'
  vectors = {letter: row for letter, row in zip(letters, np.eye(4).tolist())}
  records = [dict(text=letter, doc=doc, subject=subject) for letter, doc, subject in zip(letters, 'abdc', 'mmpp')]
  asked = task(tmp_path, 'retrieve', records, second='{{ doc }}', group='{{ subject }}')
  found = exam.hold(model(vectors), asked)
  assert {name: (group['metrics']['recall@10'], group['examples']) for name, group in found['groups'].items()} == {
      'm': (1, 2), 'p': (1, 2)}
  assert found['groups']['m']['metrics']['mrr'] == pytest.approx(1)
  rows = [line.split() for line in evaluate.table({'task': found}).splitlines()]
  assert ['task:', 'm', 'mrr', '1.0000', '2'] in rows
