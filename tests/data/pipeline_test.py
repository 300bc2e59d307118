"""Batches: one stream whatever the hosts, sizes, restarts and workers; held-out text; provenance."""
import json
import multiprocessing
import threading
import time

import numpy as np
import pytest
from corpora import corpus

from jaxlm import config as configs
from jaxlm import objectives
from jaxlm.data import pipeline, plans, store
from jaxlm.errors import JaxlmError
from jaxlm.types import BATCH


@pytest.fixture
def config(tmp_path):
  config, _ = corpus(tmp_path)
  config.update(seq_len=32, batch_size=8)
  return config


def stream_of(config):
  stores, tokenizer = store.prepare(config)
  return plans.Stream(config, stores, objectives.make(config, tokenizer.vocab), tokenizer.vocab)


def _rows(stream, indices):
  return stream.examples(np.array(indices))['tokens']


def test_a_batch_has_the_schema(config):
  with pipeline.Batches(config, stream_of(config)) as batches:
    batch = batches.at(0)
  assert set(batch) == {'tokens', 'targets', 'loss_weights', 'segment_ids', 'positions', 'example_ids'}
  for key, value in batch.items():
    assert value.shape == ((8, 32) if BATCH[key][0] == 'BT' else (8,)), key
    assert value.dtype == (np.float32 if key == 'loss_weights' else np.int32) and value.flags.c_contiguous


@pytest.mark.parametrize('hosts', [1, 2, 4, 8])
def test_any_number_of_hosts_reads_one_stream(config, hosts):
  stream = stream_of(config)
  parts = [pipeline.Batches(config, stream, pipeline.host_rows(h, hosts)) for h in range(hosts)]
  for examples in (0, 8, 16, 400):
    batches = [part.at(examples) for part in parts]
    np.testing.assert_array_equal(np.concatenate([b['tokens'] for b in batches]),
                                  _rows(stream, range(examples, examples + 8)))
    np.testing.assert_array_equal(np.concatenate([b['example_ids'] for b in batches]), np.arange(8))
  [part.close() for part in parts]


def test_a_change_of_batch_size_continues_without_gap_or_repeat(config):
  stream = stream_of(config)
  with pipeline.Batches(config, stream) as batches:
    examples, read = 0, []
    for size in (8, 8, 12, 12, 32, 8, 1, None):
      read.append(batches.at(examples, size)['tokens'])
      examples += len(read[-1])
  np.testing.assert_array_equal(np.concatenate(read), _rows(stream, range(examples)))


def test_where_one_was_before_does_not_matter(config):
  stream = stream_of(config)
  with pipeline.Batches(config, stream) as batches:
    for examples in (0, 8, 16, 8, 800, 808, 0, 3):
      np.testing.assert_array_equal(batches.at(examples)['tokens'], _rows(stream, range(examples, examples + 8)))


def test_a_batch_ramp_is_made_ahead_in_its_sizes(config):
  config.batch_ramp = ((2, 2), (4, 4))
  stream = stream_of(config)
  with pipeline.Batches(config, stream) as batches:
    begin = 0
    for size in (2, 2, 4, 4, 8, 8):
      iterator = batches._iterator
      np.testing.assert_array_equal(batches.at(begin)['tokens'], _rows(stream, range(begin, begin + size)))
      assert iterator in (None, batches._iterator)  # never started again
      begin += size


def test_sizes_by_step_and_by_examples_agree():
  config = configs.default()
  config.update(batch_size=8, batch_ramp=((2, 2), (5, 3)))
  for step, examples in ((0, None), (3, None), (3, 100), (9, None)):
    sizes = pipeline.BatchSizes.of(config, step, examples)
    consumed = sizes.consumed(step)
    assert consumed == (examples if examples is not None else sum([0, 2, 2, 3, 3, 3, 8, 8, 8, 8][:step + 1]))
    for later in range(step + 1, step + 12):
      assert sizes(consumed) == sizes.at_step(later)
      consumed += sizes(consumed)
      assert sizes.consumed(later) == consumed


def test_skipped_ranges_are_passed_over(config):
  stream = stream_of(config)
  skips = [(20, 28), (4, 6), (27, 30)]
  kept = [i for i in range(200) if not any(lo <= i < hi for lo, hi in skips)]
  with pipeline.Batches(config, stream) as batches:
    for examples in range(0, 64, 8):
      np.testing.assert_array_equal(batches.at(examples, skips=skips)['tokens'],
                                    _rows(stream, kept[examples:examples + 8]))
    np.testing.assert_array_equal(batches.at(64)['tokens'], _rows(stream, range(64, 72)))  # and counted again


def test_worker_processes_make_the_same_batches_and_end(config):
  stream = stream_of(config)
  config.data.update(workers=2, prefetch=2)
  with pipeline.Batches(config, stream, sizes=pipeline.BatchSizes.of(config)) as batches:
    for examples in range(0, 64, 8):
      np.testing.assert_array_equal(batches.at(examples)['tokens'], _rows(stream, range(examples, examples + 8)))
  assert not multiprocessing.active_children()


def test_closing_ends_the_thread(config):
  before = threading.active_count()
  batches = pipeline.Batches(config, stream_of(config))
  batches.at(0)
  assert threading.active_count() > before
  batches.close()
  for _ in range(100):  # Grain does not wait for it
    if threading.active_count() <= before:
      break
    time.sleep(0.05)
  assert threading.active_count() <= before
  assert batches.at(8)['tokens'].shape == (8, 32)  # and it can go on
  batches.close()


def test_a_damaged_store_says_so_through_the_thread(config):
  stream = stream_of(config)
  file = stream.stores[0].folder / 'shard-00000.bin'
  data = bytearray(file.read_bytes())
  data[100] ^= 1
  file.write_bytes(data)
  with pipeline.Batches(config, stream_of(config)) as batches, pytest.raises(JaxlmError, match='block 0 .* is damaged'):
    batches.at(0)


def test_hosts_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(JaxlmError, match='A batch of 8 rows does not divide by 3 hosts; set config.batch_size'):
    pipeline.host_rows(1, 3)(8)


# ---- held-out text -----------------------------------------------------------------------------------------------


def _heldout(config, rows=None):
  (s,), tokenizer = store.prepare(config)
  return pipeline.HeldoutBatches(s, objectives.make(config, tokenizer.vocab), config, tokenizer.vocab, rows), s


def test_held_out_tokens_are_targets_exactly_once(config):
  config.eval.batch_size = 5
  batches, s = _heldout(config)
  read = list(batches)
  assert len(read) == len(batches) and all(b['tokens'].shape == (5, 32) for b in read)
  targets = np.concatenate([b['targets'][b['loss_weights'] > 0] for b in read])
  np.testing.assert_array_equal(targets, np.concatenate([s.read(d)[1:] for d in s.heldout]))
  assert batches.text_bytes == sum(len(s.text(d).encode()) for d in s.heldout)
  again = list(batches)
  assert all(np.array_equal(a[k], b[k]) for a, b in zip(read, again) for k in a)


def test_hosts_share_held_out_batches(config):
  config.eval.batch_size = 64  # more rows than there are windows, so a host has none
  whole, _ = _heldout(config)
  halves = [_heldout(config, pipeline.host_rows(h, 2))[0] for h in (0, 1)]
  for a, *parts in zip(whole, *halves):
    for key in a:
      np.testing.assert_array_equal(a[key], np.concatenate([p[key] for p in parts]))


def test_max_tokens_limits_what_is_measured_to_whole_documents(config):
  config.eval.max_tokens = 300
  batches, s = _heldout(config)
  assert batches.documents < len(s.heldout)
  targets = sum(b['loss_weights'].sum() for b in batches)
  assert targets == s.lengths[s.heldout[:batches.documents]].sum() - batches.documents


def test_nothing_held_out_is_no_batch(config):
  config.data.holdout = 0.0
  batches, _ = _heldout(config)
  assert (len(batches), list(batches), batches.text_bytes, batches.documents) == (0, [], 0, 0)


# ---- provenance --------------------------------------------------------------------------------------------------


def _matches(found, config, indices):
  stream = stream_of(config)
  assert [f['example'] for f in found] == [i for i in indices for _ in stream.documents(i)]
  for row, i in enumerate(indices):
    mine = [{k: v for k, v in f.items() if k not in ('row', 'example')} for f in found if f['row'] == row]
    assert mine == stream.documents(i)


def test_the_documents_of_a_step_follow_from_a_config(config):
  config.batch_ramp = ((2, 2), (4, 4))
  for step, indices in ((1, range(2)), (3, range(4, 8)), (6, range(20, 28))):
    found = pipeline.documents_at(config, step, objectives.make)
    _matches(found, config, list(indices))
  assert found[0]['file'] == 'a.jsonl' and found[0]['source'] == 'jsonl'


def _run(config, tmp_path, records):
  (tmp_path / 'run').mkdir(exist_ok=True)
  (tmp_path / 'run' / 'config.json').write_text(configs.dumps(config))
  lines = [json.dumps(record) for record in records]
  (tmp_path / 'run' / 'metrics.jsonl').write_text('\n'.join([*lines, '{"step": 99, "exa']))
  return tmp_path / 'run'


def test_the_documents_of_a_step_follow_from_a_runs_records(config, tmp_path):
  """A run of 4 rows a batch to step 10, resumed with 8; one step after a rewind counts as recorded last."""
  run = _run(config, tmp_path, [dict(step=5, examples=20), dict(step=10, examples=39), dict(step=10, examples=40),
                                dict(step=20, examples=120), dict(step=15, skips=[[82, 90]])])
  for step, indices in ((1, range(4)), (5, range(16, 20)), (7, range(24, 28)), (11, range(40, 48)),
                        (16, [80, 81, *range(90, 96)]), (25, range(160, 168))):
    _matches(pipeline.documents_at(run, step, objectives.make), config, list(indices))


def test_records_that_do_not_tell_are_refused(config, tmp_path):
  run = _run(config, tmp_path, [dict(step=3, examples=13)])
  with pytest.raises(JaxlmError, match='between steps 0 and 3 the batch size changed'):
    pipeline.documents_at(run, 2, objectives.make)
  with pytest.raises(JaxlmError, match='is no run directory'):
    pipeline.documents_at(tmp_path, 2, objectives.make)
  with pytest.raises(JaxlmError, match='counted from 1'):
    pipeline.documents_at(config, 0, objectives.make)
