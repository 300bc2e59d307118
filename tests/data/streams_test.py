"""Every objective, from the store to the batch: one stream, held-out text, second texts, translations."""
import json

import numpy as np
import pytest
from corpora import corpus

from jaxlm import fits, objectives
from jaxlm.data import pipeline, plans, store
from jaxlm.errors import JaxlmError

TEXT = [name for name in fits.FITS if name not in fits.ANSWERS]  # what learns raw text, not a task
PAIRS = [(name, kind) for name in TEXT for kind in fits.FITS[name]]
ALL = pytest.mark.parametrize('name, kind', PAIRS)


def prepared(tmp_path, name, kind, **data):
  config, _ = corpus(tmp_path)
  config.update(seq_len=64, batch_size=8)
  config.eval.batch_size = 4
  config.objective.name = name
  config.data.update(data)
  config.model.structure = 'decoder' if kind == 'recurrent' else kind
  config.model.mixer = 'lstm' if kind == 'recurrent' else 'attention'
  stores, tokenizer = store.prepare(config, objectives.roles(config))
  return config, stores, tokenizer.vocab, objectives.make(config, tokenizer.vocab)


@ALL
def test_any_number_of_hosts_reads_one_stream(tmp_path, name, kind):
  config, stores, vocab, objective = prepared(tmp_path, name, kind)
  stream = plans.Stream(config, stores, objective, vocab)
  whole = stream.examples(np.arange(3, 19))
  shapes = objectives.shapes(objective, 64)
  assert {k: (v.shape[1:], v.dtype) for k, v in whole.items()} == shapes
  parts = [stream.examples(np.arange(begin, begin + 4)) for begin in (3, 7, 11, 15)]
  for key, value in whole.items():
    np.testing.assert_array_equal(value, np.concatenate([part[key] for part in parts]))
    np.testing.assert_array_equal(value[5], stream.sample(8)[key])


@ALL
def test_held_out_text_is_the_same_every_time(tmp_path, name, kind):
  config, stores, vocab, objective = prepared(tmp_path, name, kind)
  batches = pipeline.HeldoutBatches(stores[0], objective, config, vocab)
  first, again = list(batches), list(batches)
  assert sum(batch['loss_weights'].sum() for batch in first) > 100
  assert all(np.array_equal(a[key], b[key]) for a, b in zip(first, again) for key in a)


def test_stores_are_shared_whatever_the_objective(tmp_path):
  found = [prepared(tmp_path, *pair)[1][0].key for pair in (('causal', 'decoder'), ('span', 'decoder'))]
  assert found[0] == found[1]


def test_a_model_too_small_for_the_special_tokens_is_refused(tmp_path):
  config, stores, vocab, objective = prepared(tmp_path, 'masked', 'encoder')
  config.model.vocab_size = 258
  with pytest.raises(JaxlmError, match='special tokens up to id 258, but the model has 258 ids'):
    plans.Stream(config, stores, objective, vocab)


def test_an_objective_without_its_tokens_says_so(tmp_path):
  config, _ = corpus(tmp_path)
  config.objective.name, config.model.structure = 'masked', 'encoder'
  with pytest.raises(JaxlmError, match='The tokenizer has no mask token'):
    objectives.make(config, store.prepare(config).tokenizer.vocab)


# ---- second texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('packing', ['padded', 'concatenated'])
def test_the_second_text_is_of_another_document(tmp_path, packing):
  config, stores, vocab, objective = prepared(tmp_path, 'next_sentence', 'encoder', packing=packing)
  stream = plans.Stream(config, stores, objective, vocab)
  items = stream.items(np.arange(64))
  texts = {d: stores[0].read(d).tobytes() for d in stores[0].train.tolist()}
  for row in range(64):
    second = items['second'][row]
    piece = second[second >= 0]
    assert len(piece) and (second[len(piece):] == -1).all()
    own = {d['document'] for d in stream.documents(row)}
    of = {d for d, text in texts.items() if piece.astype(stores[0].manifest['dtype']).tobytes() in text}
    assert of and not of <= own
  np.testing.assert_array_equal(stream.items(np.arange(9, 12))['second'], items['second'][9:12])


def test_one_document_cannot_be_paired(tmp_path):
  config, _ = corpus(tmp_path, documents=1)
  config.objective.name, config.model.structure, config.data.holdout = 'next_sentence', 'encoder', 0.0
  stores, tokenizer = store.prepare(config, objectives.roles(config))
  with pytest.raises(JaxlmError, match='pairs texts of two documents, but source .jsonl. has 1'):
    plans.Stream(config, stores, objectives.make(config, tokenizer.vocab), tokenizer.vocab)


# ---- translations ------------------------------------------------------------------------------------------------


def test_pairs_are_documents_with_their_end_between_them(tmp_path):
  pairs = [('a house', 'ein Haus'), ('the \x1e tree', 'der Baum'), ('no', 'nein')]
  (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(dict(en=a, de=b)) + '\n' for a, b in pairs))
  config, _ = corpus(tmp_path / 'other')
  config.data.update(paths=str(tmp_path / 'p.jsonl'), text_field='en', pair_field='de', holdout=0.0)
  stores, tokenizer = store.prepare(config)
  found = [tokenizer.decode(stores[0].read(d), skip_special=False) for d in range(3)]
  end = '<|endoftext|>'
  assert found == [f'{end}{a}{end}{b}{end}' for a, b in [pairs[0], ('the   tree', 'der Baum'), pairs[2]]]
  config.data.pair_field = 'fr'
  with pytest.raises(JaxlmError, match=r"p.jsonl:1: no field 'fr'; it has 'en', 'de'. Set config.data.pair_field"):
    store.prepare(config)
  config.data.update(source='stdlib', paths='')
  with pytest.raises(JaxlmError, match="source 'stdlib' has no translations; only jsonl does"):
    store.prepare(config)


def test_pairs_packed_whole_keep_their_types(tmp_path):
  (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(dict(text='x' * (i % 9 + 1), de='y' * (i % 7 + 1))) + '\n'
                                            for i in range(50)))
  config, stores, vocab, objective = prepared(tmp_path, 'translation', 'encoder', paths=str(tmp_path / 'p.jsonl'),
                                              pair_field='de', packing='best_fit', holdout=0.0)
  stream = plans.Stream(config, stores, objective, vocab)
  batch = stream.examples(np.arange(8))
  tokens = stream.items(np.arange(8))['tokens']
  assert (batch['token_types'][tokens == ord('x')] == 0).all() and (batch['token_types'][tokens == ord('y')] == 1).all()


def test_one_held_out_document_is_paired_with_others(tmp_path):
  config, stores, vocab, objective = prepared(tmp_path, 'next_sentence', 'encoder')
  stores[0].heldout = stores[0].heldout[:1]
  batches = list(pipeline.HeldoutBatches(stores[0], objective, config, vocab))
  assert sum(batch['label_weights'].sum() for batch in batches) >= 1
