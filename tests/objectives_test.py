"""Laws that every objective keeps, by brute force over what its batch says."""
import pickle

import numpy as np
import pytest
from windows import FIRST, PAIRS, TEXT, VOCAB, config_of, is_text, item_of, make, rng_of, windows

from jaxlm import check, fits, objectives
from jaxlm import config as configs
from jaxlm.errors import JaxlmError
from jaxlm.types import BATCH

BOTH = pytest.mark.parametrize('mask_documents', [True, False])
ALL = pytest.mark.parametrize('name, kind', PAIRS)
# Tokens that stay as they are, or become others, would be seen by what predicts them, as BERT means it.
HIDDEN = {name: dict(mask=1.0, random=0.0)
          for name in ('masked', 'replaced', 'translation', 'next_sentence', 'sentence_order')}


def examples_of(name, kind, mask_documents, seq_len=64, **own):
  """(item, example) of many windows."""
  objective = make(name, kind, seq_len, mask_documents, **own)
  for number, lengths in enumerate(windows(objective.raw_length(seq_len))):
    item = item_of(lengths, objective.raw_length(seq_len))
    yield item, objective.example(item, rng_of(number) if objective.random else None)


@BOTH
@ALL
def test_the_batch_is_as_the_schema_and_shapes_say(name, kind, mask_documents):
  objective = make(name, kind, 64, mask_documents)
  shapes = objectives.shapes(objective, 64)
  assert objective.visibility == objectives.visibility(config_of(name, kind)) == fits.FITS[name][kind]
  assert ('order' in shapes) == (objective.visibility == 'order')
  assert shapes['targets'][0] == shapes['loss_weights'][0] == (objective.target_length(64),)
  for _, example in examples_of(name, kind, mask_documents):
    assert set(example) == set(shapes) <= set(BATCH)
    for key, value in example.items():
      assert (np.shape(value), np.asarray(value).dtype) == shapes[key], key
      assert np.asarray(value).dtype == (np.float32 if 'weights' in key else np.int32), key
    assert example['tokens'].shape == ((64,) if 'source_tokens' not in example else example['targets'].shape)


# ---- who sees whom -----------------------------------------------------------------------------------------------


def predictors(example, visibility):
  """(target, tokens that what predicts it sees) of each target that counts."""
  read = example.get('masked_tokens', example['tokens'])
  segments, order = example['segment_ids'], example.get('order')
  for m in np.flatnonzero(example['loss_weights']):
    if 'query_order' in example:
      segment = example['query_segment_ids'][m]
      sees = (segments == segment) & (order < max(example['query_order'][m], 1))
    else:
      q = example['target_index'][m] if 'target_index' in example else m
      segment = segments[q]
      sees = segments == segment
      if visibility == 'causal':
        sees &= np.arange(len(segments)) <= q
      elif visibility == 'order':
        sees &= order <= order[q]
    assert segment > 0
    seen = read[sees]
    for other in ('source', 'memory'):
      if f'{other}_tokens' in example:
        seen = np.append(seen, example[f'{other}_tokens'][example[f'{other}_segment_ids'] == segment])
    yield int(example['targets'][m]), seen


@BOTH
@ALL
def test_no_token_is_seen_by_what_predicts_it(name, kind, mask_documents):
  visibility, counted = fits.FITS[name][kind], 0
  for item, example in examples_of(name, kind, mask_documents, **HIDDEN.get(name, {})):
    document = dict(zip(item['tokens'].tolist(), item['segment_ids'].tolist()))
    known = {}  # of an encoder-decoder or prefix: what the corrupted text gives away
    if name == 'denoising':
      source = example.get('source_tokens', example['tokens'][example['order'] == 0] if 'order' in example else None)
      known = set(source.tolist())
    for target, seen in predictors(example, visibility):
      if not is_text(target):
        continue
      counted += 1
      assert target in known or target not in seen, (target, seen)
      if mask_documents and document.get(target):
        mine = {document[t] for t in seen.tolist() if is_text(t) and t in document}
        assert mine <= {document[target]}
  assert counted > 100


@BOTH
@ALL
def test_padding_is_seen_by_nothing_and_predicts_nothing(name, kind, mask_documents):
  for item, example in examples_of(name, kind, mask_documents):
    for key in ('', 'source_', 'memory_'):
      if f'{key}tokens' in example:
        text = is_text(example[f'{key}tokens'])
        assert (example[f'{key}segment_ids'][text] > 0).all()
    if not item['segment_ids'].any():
      assert not example['loss_weights'].any() and (name in ('next_sentence', 'sentence_order')
                                                    or not example['segment_ids'].any())


@BOTH
@pytest.mark.parametrize('name, kind', [p for p in PAIRS if p[0] != 'translation'])  # its own are in pairs_test
def test_positions_count_within_segments(name, kind, mask_documents):
  for _, example in examples_of(name, kind, mask_documents):
    for key in ('', 'source_'):
      if f'{key}positions' not in example:
        continue
      segments, positions = example[f'{key}segment_ids'], example[f'{key}positions']
      for segment in np.unique(segments[segments > 0]):
        here = (segments == segment) & (example.get('block_positions', np.zeros_like(segments)) == 0)
        found = positions[here]
        if len(found):
          np.testing.assert_array_equal(found, found[0] + np.arange(len(found)))
          assert found[0] == 0


# ---- no token lost or repeated -----------------------------------------------------------------------------------


def _text(*arrays):
  ids = np.concatenate(arrays)
  return np.sort(ids[is_text(ids)])


@BOTH
@pytest.mark.parametrize('name, kind', [p for p in PAIRS if p[0] not in ('next_sentence', 'sentence_order')])
def test_no_token_is_lost_or_repeated(name, kind, mask_documents):
  for item, e in examples_of(name, kind, mask_documents):
    text = item['tokens'][item['segment_ids'] > 0]
    if name in ('masked', 'replaced', 'translation'):
      back = e['tokens'].copy()
      used = e['loss_weights'] > 0
      back[e['target_index'][used]] = e['targets'][used]
      found = back[:len(text)]
      assert len(np.unique(e['target_index'][used])) == used.sum()
      if name == 'replaced':
        np.testing.assert_array_equal(e['tokens'], item['tokens'])
        assert (e['masked_tokens'] != e['tokens']).sum() <= used.sum()
    elif name == 'permutation':
      found = np.concatenate([e.get('memory_tokens', text[:0]), e['tokens']])
    elif name in ('span', 'ul2', 'prefix') and kind == 'encoder_decoder':
      found = np.concatenate([e['source_tokens'], e['targets']])
    elif name == 'denoising':
      later = e['loss_weights'] > 0
      found = e['targets'][later]
      if kind == 'decoder':  # the first token of a target whose source is empty has no predictor
        found = np.concatenate([found, [t for t in text if t not in found and t in e['tokens']]])
    elif name == 'infilling':
      part_a = (e['segment_ids'] > 0) & (e['block_positions'] == 0)
      found = np.concatenate([e['tokens'][part_a], e['tokens'][e['block_positions'] > 0]])
      np.testing.assert_array_equal(_text(e['targets']), _text(e['tokens'][e['block_positions'] > 0]))
    else:  # all of a row of next tokens: what is read, and the last that is predicted
      n = np.count_nonzero(e['segment_ids'])
      found = np.append(e['tokens'][:n], e['targets'][n - 1:n])
    np.testing.assert_array_equal(_text(found), np.sort(text))


@pytest.mark.parametrize('name', ['causal', 'multi_token'])
def test_objectives_that_cover_predict_every_token_after_the_first(name):
  assert make(name, 'decoder').covers
  for item, example in examples_of(name, 'decoder', False):
    np.testing.assert_array_equal(example['targets'][example['loss_weights'] > 0],
                                  item['tokens'][item['segment_ids'] > 0][1:])
  assert not any(make(name, kind).covers for name, kind in PAIRS if name not in ('causal', 'multi_token'))


# ---- causal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('lengths', [[9], [4, 5], [1, 1, 3], [2], [3, 5]])
def test_causal_counts_every_token_that_follows_one_of_its_own_document(lengths):
  objective = objectives.make(configs.default(), None)
  item = item_of(lengths, objective.raw_length(8))
  example = objective.example(item, None)
  for t in range(8):
    assert example['tokens'][t] == item['tokens'][t] and example['targets'][t] == item['tokens'][t + 1]
    same = item['segment_ids'][t] == item['segment_ids'][t + 1] > 0
    assert example['loss_weights'][t] == float(same)
  assert example['loss_weights'].sum() == sum(lengths) - len(lengths)


def test_unmasked_documents_are_one_text_with_running_positions():
  example = make('causal', 'decoder', mask_documents=False).example(item_of([3, 4], 9), None)
  np.testing.assert_array_equal(example['segment_ids'], [1] * 7 + [0])
  np.testing.assert_array_equal(example['positions'], np.arange(8))
  np.testing.assert_array_equal(example['loss_weights'], [1] * 6 + [0] * 2)


@pytest.mark.parametrize('name', ['causal', 'multi_token'])
def test_a_block_of_rows_is_its_rows(name):
  objective = make(name, 'decoder')
  rows = [item_of(lengths, 9) for lengths in ([9], [2, 3], [1, 8])]
  block = objective.example({k: np.stack([r[k] for r in rows]) for k in rows[0]}, None)
  for i, row in enumerate(rows):
    for key, value in objective.example(row, None).items():
      np.testing.assert_array_equal(block[key][i], value)


def test_future_targets_are_the_tokens_after_the_next_of_the_same_document():
  for item, example in examples_of('multi_token', 'decoder', True):
    tokens, segments = item['tokens'], item['segment_ids']
    for t in range(64):
      for p in range(2):
        inside = t + 2 + p < len(tokens) and segments[t] == segments[t + 2 + p] > 0
        assert example['future_weights'][t, p] == float(inside)
        if inside:
          assert example['future_targets'][t, p] == tokens[t + 2 + p]


# ---- the table ---------------------------------------------------------------------------------------------------


def test_what_fits_is_said_by_name():
  config = config_of('masked', 'decoder')
  assert fits.mismatch(config) == (
      "objective 'masked' needs a model of kind encoder; config.model.structure is 'decoder', which fits: causal, "
      'multi_token, fim, prefix, span, ul2, denoising, infilling, classify, multi_label, regress, tag, extract, contrast, '
      'reward, answer, prefer, grpo, ppo, kto.')
  config = config_of('prefix', 'recurrent')
  assert fits.mismatch(config).endswith("is 'decoder' of 'lstm', which fits: causal, multi_token, fim, "
                                        'classify, multi_label, regress, tag, extract, contrast, reward, answer, '
                                        'prefer, grpo, ppo, kto.')
  config.model.structure = 'encoder'
  assert 'no objective; set config.model.mixer to attention' in fits.mismatch(config)
  config.objective.name = 'my_lab.ideas:objective'
  assert fits.mismatch(config) is None


@pytest.mark.parametrize('structure', ['encoder', 'decoder', 'encoder_decoder', 'two_stream'])
@pytest.mark.parametrize('name', TEXT)
def test_a_pair_is_refused_unless_it_is_in_the_table(name, structure):
  config = config_of(name, structure)
  config.model.positions.two_dims = name == 'infilling'
  config.model.generator.width = 32
  config.model.head.labels = 'replaced' if name == 'replaced' else 'sequence'
  assert (fits.mismatch(config) is None) == (structure in fits.FITS[name])


@pytest.mark.parametrize('name, path, told', [
    ('replaced', 'generator.width', "config.model.generator.width to be at least 1; it is 0"),
    ('next_sentence', 'head.labels', "config.model.head.labels to be 'sequence'; it is 'none'")])
def test_what_else_the_model_needs_is_named(name, path, told):
  assert told in fits.mismatch(config_of(name, next(iter(fits.FITS[name]))))


@pytest.mark.parametrize('name, pool, own, told', [
    ('masked', 'splade', {}, None),  # which reads no pool, and goes on from a run that did
    ('classify', 'splade', {}, "head.pool='splade' weighs entries of the vocabulary, so it needs config.model.head.lm"),
    ('contrast', 'splade', dict(dims=(8,)), "dims=(8,): the first of config.model.head.pool='splade' mean no more"),
    ('contrast', 'mean', dict(flops=0.1), "flops=0.1 keeps weights of config.model.head.pool='splade' few"),
    ('contrast', 'splade', dict(flops=0.1), None)])
def test_weights_of_the_vocabulary_are_what_contrast_alone_learns(name, pool, own, told):
  config = config_of(name, 'encoder', **own)
  config.model.head.update(pool=pool, labels='sequence' if name == 'classify' else 'none')
  assert fits.mismatch(config) is None if told is None else told in fits.mismatch(config)


def test_too_few_sentinels_are_refused_with_the_number_needed():
  config = config_of('span', 'encoder_decoder', 4096)
  assert "cuts 227 spans out of a row of 4096; set config.objective.span.num_sentinels" in fits.mismatch(config)
  with pytest.raises(JaxlmError, match='cuts 227 spans'):
    objectives.make(config, VOCAB)
  config.objective.span.num_sentinels = 227
  assert fits.mismatch(config) is None


@ALL
def test_an_objective_pickles_for_worker_processes(name, kind):
  objective = make(name, kind)
  again = pickle.loads(pickle.dumps(objective))
  item = item_of([30, 10], objective.raw_length(64)) if name != 'denoising' else item_of([20], objective.raw_length(64))
  a, b = (o.example(item, rng_of(1) if o.random else None) for o in (objective, again))
  assert all(np.array_equal(a[key], b[key]) for key in a)
  assert (again.raw_length(64), again.visibility, again.prompt([FIRST])) == (
      objective.raw_length(64), objective.visibility, objective.prompt([FIRST]))


@ALL
def test_special_tokens_are_those_the_roles_promise(name, kind):
  config = config_of(name, kind)
  objective = objectives.make(config, VOCAB)
  promised = {VOCAB.id(role) for role in objectives.roles(config)}
  written = {VOCAB.filler, *objective.ids}
  assert set(objective.ids) <= promised | {VOCAB.decoder_start, VOCAB.mask}
  for _, example in examples_of(name, kind, True):
    for key in ('tokens', 'targets', 'source_tokens', 'masked_tokens'):
      if key in example:
        assert {t for t in example[key].tolist() if t < FIRST} <= written, key


def test_an_unknown_objective_names_the_known_ones():
  config = configs.default()
  config.objective.name = 'casual'
  with pytest.raises(JaxlmError, match="Unknown objective 'casual'. Known: answer, causal.*Did you mean 'causal'"):
    objectives.make(config, None)


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_a_prompt_asks_as_the_objective_taught():
  ids, s, v = [FIRST, FIRST + 1], VOCAB.id('sentinel_0'), VOCAB
  ask = lambda name, kind, ids=ids: make(name, kind).prompt(ids)
  assert (ask('causal', 'decoder').ids, ask('causal', 'decoder').context) == (ids, 0)
  assert (ask('prefix', 'decoder').ids, ask('prefix', 'decoder').context) == (ids, 2)
  assert (ask('prefix', 'encoder_decoder').ids, ask('prefix', 'encoder_decoder').source) == ([v.pad], ids)
  asked = ask('span', 'encoder_decoder')
  assert (asked.source, list(asked.ids)) == ([*ids, s, v.eos], [v.pad, s])
  assert ask('span', 'encoder_decoder', [*ids, s, v.eos]).ids == [v.pad]
  asked = ask('ul2', 'decoder')
  assert (asked.ids, asked.context) == ([v.id('mode_s'), *ids, s, v.eos, s], 5)
  asked = ask('denoising', 'encoder_decoder')
  assert (asked.source, asked.ids) == ([*ids, v.mask], [v.pad, *ids])
  asked = ask('infilling', 'decoder')
  assert (asked.ids, asked.context, asked.blank) == ([*ids, v.id('gmask'), v.id('sop')], 3, -1)  # positions run on
  config = config_of('infilling', 'decoder')
  config.model.positions.two_dims = True
  assert objectives.make(config, VOCAB).prompt(ids).blank == 2
  asked = ask('infilling', 'decoder', [FIRST, v.mask, FIRST + 1])
  assert (asked.ids, asked.context, asked.blank) == ([FIRST, v.mask, FIRST + 1, v.id('sop')], 3, 1)


def test_positions_of_a_long_blank_run_on_where_the_model_reads_one_dim():
  config = config_of('infilling', 'decoder', long=1.0)
  item = dict(tokens=np.arange(FIRST, FIRST + 40), segment_ids=np.ones(40, int), positions=np.arange(40),
              starts=np.arange(40) == 0)
  for config.model.positions.two_dims in (False, True):
    batch = objectives.make(config, VOCAB).example(item, np.random.default_rng(0))
    part_b = batch['block_positions'] > 0
    mask = batch['positions'][~part_b & (batch['segment_ids'] > 0)].max()
    run = 0 if config.model.positions.two_dims else batch['block_positions'][part_b]
    np.testing.assert_array_equal(batch['positions'][part_b], mask + run)


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, kind, seq_len, own, told', [
    ('masked', 'encoder', 64, dict(mask=0.9, random=0.2), 'mask=0.9 and random=0.2 are shares of the same tokens'),
    ('prefix', 'decoder', 64, dict(min_rate=0.9), 'min_rate=0.9 is above max_rate=0.75'),
    ('infilling', 'decoder', 64, dict(sentences=0.7), 'long=0.5 and sentences=0.7 are shares of the same rows'),
    ('infilling', 'decoder', 4, {}, 'no room for text in config.seq_len=4 columns'),
    ('sentence_order', 'encoder', 6, {}, 'no room for text in config.seq_len=6 columns')])
def test_settings_that_cannot_work_together_are_refused(name, kind, seq_len, own, told):
  config = config_of(name, kind, seq_len, **own)
  config.model.positions.two_dims = True
  config.model.head.labels = 'sequence'
  assert told in fits.mismatch(config)


@pytest.mark.parametrize('name, kind, model, told', [
    ('causal', 'decoder', dict(future_heads=2), 'set config.model.future_heads=0, or use multi_token'),
    ('causal', 'decoder', dict(head=dict(lm=False)), 'needs config.model.head.lm to be True'),
    ('next_sentence', 'encoder', dict(head=dict(labels='sequence', num_labels=1)), 'num_labels to be at least 2'),
    ('prefix', 'decoder', dict(moe=dict(num_experts=4, top_k=2, width=8, mode='capacity')), "set it to 'dropless'"),
    ('span', 'encoder_decoder', dict(positions=dict(kind='buckets', num_buckets=2)), 'must be at least 4'),
    ('span', 'encoder_decoder', dict(positions=dict(kind='buckets', max_distance=16)), 'half of them below'),
    ('causal', 'decoder', dict(mixer='mamba'), "Unknown mixer 'mamba'"),
    ('causal', 'decoder', dict(family='gpt3x'), "Did you mean 'gpt3'")])
def test_models_that_an_objective_cannot_train_are_refused(name, kind, model, told):
  config = config_of(name, kind)
  config.model.update(model)
  assert any(told in fault for fault in check.faults(config))


@pytest.mark.parametrize('name, kind', [p for p in PAIRS if p[1] == 'encoder_decoder'])
@pytest.mark.parametrize('seq_len', [16, 100, 512])
def test_neither_source_nor_target_is_longer_than_a_row(name, kind, seq_len):
  other = {'span': dict(rate=0.7, num_sentinels=300), 'prefix': dict(min_rate=0.0, max_rate=0.5)}
  for own in ({}, other.get(name, {})):
    objective = make(name, kind, seq_len, **own)
    shapes = objectives.shapes(objective, seq_len)
    assert shapes['source_tokens'][0] == (seq_len,) and shapes['targets'][0][0] <= seq_len
    raw = objective.raw_length(seq_len)
    for i in range(300):
      objective.example(item_of([raw], raw), rng_of(i))
