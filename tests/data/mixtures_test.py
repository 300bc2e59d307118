"""Weights of a mixture by temperature; the rest of mixtures.py is tested where it is used, in plans_test.py."""
import numpy as np
import pytest
from corpora import corpus

from jaxlm import objectives
from jaxlm.data import mixtures, plans, store, tokenizers
from jaxlm.errors import JaxlmError


@pytest.mark.parametrize('temperature', [0.5, 1.0, 1 / 0.3, 100.0])
def test_shares_are_the_powers_of_the_sizes_to_a_millionth(temperature):
  sizes = [10 ** 12, 3 * 10 ** 9, 12_345, 7]
  got = mixtures.tempered([1, 1, 2, 1], sizes, temperature)
  parts = np.array([1, 1, 2, 1]) * np.array(sizes, float) ** (1 / temperature)
  expected = parts / parts.sum() * mixtures.SHARES
  assert all(type(w) is int and w >= 1 for w in got)
  # a share below a millionth is raised to one, and the sum with it
  np.testing.assert_allclose(got, np.maximum(expected, 1), atol=1)
  assert mixtures.SHARES <= sum(got) <= mixtures.SHARES + len(sizes)


def test_equal_sizes_have_equal_weights_and_high_temperatures_nearly_so():
  assert len(set(mixtures.tempered([1] * 4, [500] * 4, 3.0))) == 1
  few, many = mixtures.tempered([1, 1], [10, 10 ** 9], 1e4)
  assert 0 < many - few < 0.01 * mixtures.SHARES


def _languages(tmp_path, **changes):
  """A config of two sources, one ten times the other."""
  config, _ = corpus(tmp_path / 'x', 300)
  corpus(tmp_path / 'y', 30, seed=1)
  config.data.mixture = (('ex', 'jsonl', str(tmp_path / 'x' / '*.jsonl'), 1),
                         ('why', 'jsonl', str(tmp_path / 'y' / '*.jsonl'), 1))
  config.data.update(changes)
  config.update(seq_len=32)
  return config


def test_the_stream_gives_each_source_its_tempered_share(tmp_path):
  config = _languages(tmp_path, temperature=1 / 0.3)
  stores, tokenizer = store.prepare(config)
  stream = plans.Stream(config, stores, objectives.make(config, tokenizer.vocab), tokenizer.vocab)
  sizes = np.array([s.num_train_tokens for s in stores], float)
  share = sizes[1] ** 0.3 / (sizes ** 0.3).sum()
  assert share > 3 * sizes[1] / sizes.sum()
  assert abs(stream.schedule.counts(10_000)[1] - 10_000 * share) < 1.1


def test_a_tokenizer_is_trained_on_text_in_tempered_shares(tmp_path, monkeypatch):
  seen, train = [], tokenizers.train
  monkeypatch.setattr(tokenizers, 'train', lambda name, texts, size: train(name, seen.extend(texts) or seen, size))
  shares = []
  for temperature in (1.0, 100.0):
    seen.clear()
    config = _languages(tmp_path, temperature=temperature, tokenizer='bpe', vocab_size=300, tokenizer_bytes=3000)
    store.prepare(config)
    rare = set(corpus(tmp_path / 'y', 30, seed=1)[1])
    shares.append(sum(len(t) for t in seen if t in rare) / sum(map(len, seen)))
  assert shares[0] < 0.2 and 0.4 < shares[1] < 0.6


def test_phases_beside_a_temperature_are_refused(tmp_path):
  config = _languages(tmp_path, temperature=2.0, phases=((100, (1, 2)),))
  with pytest.raises(JaxlmError, match='config.data.temperature=2.0 weighs sources by their sizes, for the whole run; '
                                       'leave config.data.phases empty'):
    store.prepare(config)
