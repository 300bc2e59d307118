"""Every objective on every kind of model that can express it: nothing leaks, it learns, and the mesh does not matter.

  pytest tests/matrix_test.py -m slow -s      # trains each pair on real text; prints the matrix of BUILD_NOTES.md
"""
import ast
import functools
import json
import pathlib
import sysconfig

import jax
import numpy as np
import pytest

from jaxlm import check, fits, objectives, sharding, train
from jaxlm import config as base
from jaxlm.data import store, tokenizers
from jaxlm.data.plans import examples_of

LABELS = dict(head=dict(labels='sequence', pooler='tanh'), embedding=dict(token_types=2))
KINDS = {
    'decoder': dict(), 'recurrent': dict(mixer='lstm', positions=dict(kind='none')),
    'encoder': dict(structure='encoder', head=dict(transform='full', bias=True), embedding=dict(norm=True)),
    'encoder_decoder': dict(structure='encoder_decoder', positions=dict(kind='buckets')),
    'two_stream': dict(structure='two_stream', positions=dict(kind='relative')),
}
NEEDED = {  # what else an objective asks of the model, or of the data
    'multi_token': dict(future_heads=2), 'infilling': dict(positions=dict(two_dims=True)),
    'replaced': dict(generator=dict(width=16, num_layers=2, num_heads=2),
                     head=dict(labels='replaced', lm=False, pooler='activation')),
    'next_sentence': LABELS, 'sentence_order': LABELS,
}
TEXT = [name for name in fits.FITS if name not in fits.ANSWERS]  # what learns raw text, not a task
PAIRS = [(name, kind) for name in TEXT for kind in fits.FITS[name]]
pairs = pytest.mark.parametrize('name, kind', PAIRS)


def put(config, values):
  """Sets nested values."""
  for key, value in values.items():
    if isinstance(value, dict):
      put(config[key], value)
    else:
      config[key] = value


def config_of(name, kind):
  config = base.smoke(base.default())
  config.objective.name = name
  put(config.model, KINDS[kind])
  put(config.model, NEEDED.get(name, {}))
  return config


@functools.cache
def small(name, kind):
  """(objective, model of 2 layers, parameters) at 24 columns; `apply` gives features of a batch."""
  config = config_of(name, kind)
  config.update(seq_len=24, batch_size=2)
  config.model.update(num_layers=2, width=32, vocab_pad_to=8)
  config.model.mlp.width = 32
  config.model.attention.update(num_heads=2, num_kv_heads=2, head_dim=16)
  if 'num_sentinels' in config.objective[name]:
    config.objective[name].num_sentinels = 12
  if name == 'fim':
    config.objective.fim.every = 12
  assert check.faults(config) == []
  vocab = tokenizers.bytes_tokenizer().with_roles(objectives.roles(config)).vocab
  objective = objectives.make(config, vocab)
  model = train.build_model(config, vocab.size, objective.visibility, sharding.single(config.sharding.rules))
  params = train.init_state(model, config).fresh(0)[0].params
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(x.dtype), params)
  return objective, model, params


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, batch):
  """[B, M, E] of the places that are predicted; those of future heads follow, [B, T, E] each."""
  if model.config.generator.width:
    return (model.apply({'params': params}, batch, method='replacements'),)
  out = model.apply({'params': params}, batch, with_logits=False)
  return out.features, *out.future


def items(objective, rows=1, seed=0):
  """Rows of two documents of lower-case words, as an objective reads them."""
  rng, R = np.random.default_rng(seed), objective.raw_length(24)
  tokens = rng.choice(np.frombuffer(b'abcdefgh    .', np.uint8), (rows, R)).astype(np.int32)
  segments = np.broadcast_to(np.where(np.arange(R) < R // 2, 1, 2), (rows, R)).astype(np.int32)
  positions = np.broadcast_to(np.where(np.arange(R) < R // 2, np.arange(R), np.arange(R) - R // 2), (rows, R))
  found = dict(tokens=tokens, segment_ids=segments, positions=positions.astype(np.int32), starts=positions == 0)
  return found | ({'second': rng.choice(np.frombuffer(b'abcd .', np.uint8), (rows, R)).astype(np.int32)}
                  if objective.second else {})


def batch_of(objective, item, seed=0):
  rows = len(item['tokens'])
  batch = examples_of(objective, item, seed, np.zeros(rows, np.int64) + 7)  # one draw for all rows
  return batch | {'example_ids': np.arange(rows, dtype=np.int32)}


@pairs
def test_what_predicts_a_token_does_not_change_with_it(name, kind):
  objective, model, params = small(name, kind)
  tested = 0
  for seed in range(30):
    if tested >= 8:
      break
    item = items(objective, seed=seed)
    letters = [p for p in range(item['tokens'].shape[1]) if item['tokens'][0, p] in b'abcdefgh']
    many = {key: np.repeat(value, len(letters) + 1, axis=0) for key, value in item.items()}
    for row, p in enumerate(letters):
      many['tokens'][row, p] = ord('a') + (many['tokens'][row, p] - ord('a') + 3) % 8  # row by row one letter differs
    batch = batch_of(objective, many, seed)
    found = [np.asarray(x) for x in features(model, params, batch)]
    for row in range(len(letters)):
      differs = lambda key: batch[key][row] != batch[key][-1]
      read = 'masked_tokens' if objective.loss == 'replaced' else 'tokens'
      context = batch['order'][row] == 0 if objective.visibility == 'order' and 'order' in batch else (
          np.full(batch[read].shape[1], objective.visibility == 'full'))
      if (differs(read) & context).any() or 'source_tokens' in batch and differs('source_tokens').any():
        continue  # the token is shown: kept as it is, or to be copied
      goals = [(found[0], differs('targets') & (batch['loss_weights'][row] > 0))]
      for i, x in enumerate(found[1:]):
        goals.append((x, differs('future_targets')[:, i] & (batch['future_weights'][row, :, i] > 0)))
      for x, at in goals:
        np.testing.assert_array_equal(x[row][at], x[-1][at])
        tested += at.sum()
  assert tested >= 8


@pairs
def test_only_rows_that_may_see_a_token_move_with_it(name, kind):
  objective, model, params = small(name, kind)
  batch = batch_of(objective, items(objective, seed=1))
  read = 'masked_tokens' if objective.loss == 'replaced' else 'tokens'
  moved = lambda key: _moved(model, params, batch, key)
  segment, column = batch['segment_ids'][0], np.arange(batch[read].shape[1])
  if objective.visibility == 'full':
    order = 0 * column
  else:
    order = batch['order'][0] if objective.visibility == 'order' else column + 1
  real = (segment[:, None] == segment[None, :]) & (segment > 0)
  sees = real & (order[None, :] <= order[:, None])
  reach = lambda first: (first.astype(int) @ (sees | np.eye(len(column), dtype=bool)).astype(int)) > 0
  if 'query_order' in batch:
    strict = order[None, :] < np.maximum(batch['query_order'][0], 1)[:, None]
    direct = strict & (batch['query_segment_ids'][0][:, None] == segment[None, :]) & (segment > 0)
  else:
    direct = sees if 'target_index' not in batch else sees[batch['target_index'][0]]
  counts = batch['loss_weights'][0] > 0
  allowed = direct | reach(direct)
  got = moved(read)
  assert not (got & ~allowed)[counts].any()
  assert (got | ~direct)[counts].all()  # and what it may see, it does
  if 'source_tokens' in batch:
    same = segment[:, None] == batch['source_segment_ids'][0][None, :]
    np.testing.assert_array_equal(moved('source_tokens')[counts], (same & (batch['source_segment_ids'][0] > 0))[counts])


def _moved(model, params, batch, key):
  """bool [M, S]: which predictions change with the token in column s."""
  S = batch[key].shape[1]
  many = {k: np.repeat(v, S + 1, axis=0) for k, v in batch.items()}
  many[key][np.arange(S), np.arange(S)] ^= 1
  x = np.asarray(features(model, params, many)[0])
  return (x[:S] != x[S]).any(-1).T


@pytest.mark.parametrize('name', TEXT)
@pytest.mark.parametrize('kind', KINDS)
def test_every_other_pair_is_refused_by_name(name, kind):
  config = config_of(name, kind)
  found = [line for line in check.faults(config) if line.startswith('config.objective.name')]
  if kind in fits.FITS[name]:
    assert not found
  else:
    line, = found
    assert repr(name) in line and 'which fits: ' in line
    for other in fits.FITS:
      assert (f'{other},' in line or f'{other}.' in line) == (kind in fits.FITS[other])


# ---- on real text, minutes ---------------------------------------------------------------------------------------


def unigram_entropy(run):
  """Of held-out targets, in nats, by their own frequencies: what no model can reach that looks at no other token."""
  counts = np.zeros(run.model.config.vocab_size)
  for heldout in run.evaluators._heldout:
    for batch in heldout:
      np.add.at(counts, batch['targets'][batch['loss_weights'] > 0], 1)
  p = counts[counts > 0] / counts.sum()
  return -(p * np.log(p)).sum()


def translations(path):
  """Writes JSON Lines: short statements of the standard library, each beside what `ast.unparse` makes of it."""
  with open(path, 'w') as lines:
    for file in sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py')):
      rows = (text := file.read_bytes()).splitlines()
      for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Assign, ast.Expr, ast.Return)) and node.lineno == node.end_lineno:
          short = rows[node.lineno - 1][node.col_offset:node.end_col_offset]
          if 12 < len(short) < 28:
            lines.write(json.dumps(dict(text=short.decode(), translation=ast.unparse(node))) + '\n')


@pytest.mark.slow
@pairs
def test_every_pair_learns_more_than_frequencies_and_alike_on_8_devices(name, kind, tmp_path, monkeypatch):
  losses, make = {}, sharding.make_mesh
  total = 400 if name != 'masked' else 1_200  # bare masks teach little at first
  for devices, steps in ((8, 3), (1, total)):
    config = config_of(name, kind)
    config.update(steps=steps, tensorboard=False)
    config.optim.update(lr=4e-3, warmup_steps=20, total_steps=total)
    config.eval.update(max_tokens=1 << 14, prompts=())
    config.mesh.data = devices
    if name == 'translation':
      translations(tmp_path / 'pairs.jsonl')
      config.data.update(source='jsonl', paths=str(tmp_path / 'pairs.jsonl'), pair_field='translation')
    monkeypatch.setattr(sharding, 'make_mesh',
                        lambda sizes, given=None, n=devices: make(sizes, given or jax.devices()[:n]))
    workdir = tmp_path / str(devices)
    last = train.run(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses[devices] = [line['train/loss'] for line in lines if 'train/loss' in line][:3]
  np.testing.assert_allclose(losses[8], losses[1], rtol=2e-5)  # float32 sums in another order
  entropy = unigram_entropy(train.Run(config, str(workdir), store.prepare(config, objectives.roles(config))))
  print(f'| {name} | {kind} | {last["eval/heldout/loss"]:.3f} | {entropy:.3f} | '
        f'{max(abs(a - b) / b for a, b in zip(losses[8], losses[1])):.0e} |')
  assert last['eval/heldout/loss'] < entropy
