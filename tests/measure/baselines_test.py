"""What any model should beat."""
import numpy as np
import pytest

from jaxlm.data.tasks import Example, Task
from jaxlm.errors import JaxlmError
from jaxlm.measure import baselines


def test_the_commonest_answer_is_said():
  train = [Example('', 'a', target=1), Example('', 'b', target=1), Example('', 'c', target=0)]
  assert baselines.answers('majority', Task('classify', labels=('x', 'y')), train, train) == [1, 1, 1]
  spans = [Example('', answers=('None',)), Example('', answers=('1',)), Example('', answers=('None',))]
  assert baselines.answers('majority', Task('span'), spans, spans[:1]) == ['None']
  numbers = [Example('', target=1.0), Example('', target=2.0)]
  assert baselines.answers('majority', Task('regress'), numbers, train) == [1.5] * 3


def test_each_word_has_its_commonest_tag_and_a_new_one_that_of_all():
  task = Task('tag', labels=('O', 'B-X'))
  train = [Example('', words=('a', 'b', 'b'), target=(0, 1, 1)), Example('', words=('a', 'b', 'c'), target=(0, 1, 1))]
  assert baselines.answers('majority', task, train, [Example('', words=('b', 'a', 'new'))]) == [['B-X', 'O', 'B-X']]


def test_the_lead_is_the_first_line_and_a_copy_all():
  asked = [Example('', '\n one\ntwo')]
  assert baselines.answers('lead', Task('text'), [], asked) == ['one']
  assert baselines.answers('copy', Task('text'), [], asked) == ['\n one\ntwo']
  said = Example('', messages=tuple(dict(role=role, content=text) for role, text in
                                    (('user', 'first'), ('assistant', 'answer'), ('user', 'a\nb'), ('assistant', 'c'))))
  assert [baselines.answers(name, Task('chat'), [], [said]) for name in ('lead', 'copy')] == [['a'], ['a\nb']]


def test_words_tell_classes_and_documents():
  pytest.importorskip('sklearn')
  train = [Example('', f'{word} {i}', target=int(word == 'good')) for i in range(20) for word in ('good', 'bad')]
  task = Task('classify', labels=('no', 'yes'))
  assert baselines.answers('tfidf', task, train, [Example('', 'good 99'), Example('', 'so bad')]) == [1, 0]
  pairs = [Example('', 'red fish', 'a red fish swims'), Example('', 'blue bird', 'the blue bird sings')]
  assert [order[0] for order in baselines.answers('tfidf', Task('retrieve'), pairs, pairs)] == [0, 1]
  told = [Example('', 'red fish', target='swims'), Example('', 'blue bird', target='sings')]
  assert baselines.answers('tfidf', Task('text'), told, [Example('', 'a bird'), Example('', 'red')]) == ['sings', 'swims']
  assert baselines.answers('tfidf', task, train[:1], [Example('', 'bad')]) == [1]  # a single class
  sparse = pytest.importorskip('scipy.sparse')
  numbers = np.random.default_rng(0).random((600, 5))
  parts = list(baselines._cosines(sparse.csr_array(numbers), sparse.csr_array(numbers[:7])))
  assert len(parts) == 3 and np.allclose(np.concatenate(parts), numbers @ numbers[:7].T)


def test_a_baseline_that_does_not_fit_is_told():
  told = "The baseline 'lead' says nothing to a task of kind 'classify'; take majority or tfidf"
  with pytest.raises(JaxlmError, match=told):
    baselines.answers('lead', Task('classify'), [], [])
  with pytest.raises(JaxlmError, match="Unknown baseline 'best'"):
    baselines.answers('best', Task('classify'), [], [])
