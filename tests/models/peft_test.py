"""Methods of adaptation: what they change at the start, what merging keeps, where virtual tokens stand."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.models import peft, virtual
from jaxlm.models.config import PeftConfig
from jaxlm.models.stack import init_cache, unstack

V, T, P = 29, 6, 3
EVERYWHERE = (('.*(query|key|value|out|up|down|gate)', True),)
STRUCTURES = {
    'decoder': {},
    'rotary': dict(positions=dict(kind='rope')),
    'encoder': dict(structure='encoder', visibility='full'),
    'encoder_decoder': dict(structure='encoder_decoder', encoder_layers=2, positions=dict(kind='buckets')),
    'experts': dict(moe=dict(num_experts=4)),
    'alternating': dict(moe=dict(num_experts=4, every=2), num_layers=3),
    'one_layer': dict(share_layers=True),
    'unrolled': dict(scan=False),
}
METHODS = {
    'lora': dict(method='lora'), 'everywhere': dict(method='lora', sites=EVERYWHERE, rank=4, stabilised=True),
    'dora': dict(method='lora', sites=EVERYWHERE, dora=True), 'ia3': dict(method='ia3'),
    'bottleneck': dict(method='bottleneck', width=4), 'parallel': dict(method='bottleneck', width=4, parallel=True,
                                                                      strength=4.0),
    'bitfit': dict(method='bitfit'), 'prompt': dict(method='prompt', tokens=P),
    'p_tuning': dict(method='prompt', tokens=P, encoder='lstm', width=5),
    'p_tuning_mlp': dict(method='prompt', tokens=P, encoder='mlp', width=5),
    'prefix': dict(method='prefix', tokens=P), 'prefix_mlp': dict(method='prefix', tokens=P, encoder='mlp', width=5)}
VIRTUAL = tuple(name for name, given in METHODS.items() if given['method'] in virtual.METHODS)


def batch_of(model, seed=0, front=0, rows=2):
  """Ids of rows, with `front` virtual tokens before them: on the encoder's side where there is one."""
  ids_BT = np.random.default_rng(seed).integers(0, V, (rows, T)).astype(np.int32)
  ahead = np.concatenate([np.broadcast_to(V + np.arange(front, dtype=np.int32), (rows, front)), ids_BT], axis=1)
  if model.config.structure == 'encoder_decoder':
    return {'tokens': ids_BT, 'source_tokens': ahead}
  return {'tokens': ahead}


@functools.partial(jax.jit, static_argnums=0)
def output(model, params, batch):
  return model.apply({'params': params}, batch)


def logits(model, params, batch):
  return output(model, params, batch).logits[..., :V]


def fresh(model, base, seed=1):
  """A delta as training begins with it, beside the weights of `base`."""
  initial = nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed), batch_of(model)))['params']
  delta = trees.partition(initial, peft.is_delta)[0]
  return peft.settled(trees.combine(base, delta))


def moved(params, seed=0):
  """The same with every delta drawn anew, far from its start."""
  rng = np.random.default_rng(seed)
  draw = lambda path, x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype) if peft.is_delta(path) else x
  return trees.map_paths(draw, params)


@pytest.fixture(scope='session')
def adapted(model_of, params_of):
  """(structure, method) -> (the plain model, its parameters, the adapted one, its parameters at the start)."""
  def make(structure, method):
    given = dict(STRUCTURES[structure])
    plain = model_of(**given)
    base = params_of(plain)
    model = plain.clone(config=dataclasses.replace(plain.config, peft=PeftConfig(**METHODS[method])))
    return plain, base, model, fresh(model, base)
  return make


@pytest.mark.parametrize('structure, method', [
    *(('decoder', name) for name in METHODS if name not in VIRTUAL),
    *((name, method) for name in STRUCTURES for method in ('dora', 'ia3', 'bottleneck') if name != 'decoder')])
def test_an_adapted_model_begins_as_its_base_and_then_differs(structure, method, adapted):
  plain, base, model, params = adapted(structure, method)
  batch = batch_of(model)
  want = logits(plain, base, batch)
  np.testing.assert_allclose(logits(model, params, batch), want, atol=2e-5)  # DoRA divides and multiplies by a length
  if method != 'bitfit':
    assert np.abs(logits(model, moved(params), batch) - want).max() > 1e-2
    assert any(map(peft.is_delta, trees.flatten(params)))


@pytest.mark.parametrize('structure, method', [
    ('decoder', 'lora'), ('decoder', 'everywhere'),
    *((name, method) for name in STRUCTURES for method in ('dora', 'ia3'))])
def test_merged_weights_compute_what_the_adapted_model_does(structure, method, adapted):
  plain, base, model, params = adapted(structure, method)
  batch, params = batch_of(model), moved(params)
  single = plain.clone(config=dataclasses.replace(plain.config, scan=False))
  merged = peft.merge(unstack(params, model.config), model.config.peft)
  assert not any(map(peft.is_delta, trees.flatten(merged)))
  np.testing.assert_allclose(logits(single, merged, batch), logits(model, params, batch), atol=1e-5)


@pytest.mark.parametrize('method', ['bottleneck', 'prompt', 'prefix'])
def test_what_is_no_change_of_weights_is_not_merged(method):
  with pytest.raises(JaxlmError, match=f"peft method '{method}' cannot be merged: .* Keep it beside the base"):
    peft.merge({}, PeftConfig(method=method))


@pytest.mark.parametrize('structure, method', [
    *(('rotary', name) for name in VIRTUAL),
    *((name, method) for name in ('decoder', 'encoder', 'encoder_decoder') for method in ('prompt', 'prefix_mlp'))])
def test_virtual_tokens_stand_before_each_document_whatever_else_is_in_its_row(structure, method, adapted):
  _, _, model, params = adapted(structure, method)
  params = moved(params)
  alone = batch_of(model, front=P)
  found = logits(model, params, alone)
  start = 0 if structure == 'encoder_decoder' else P
  assert np.isfinite(found).all()
  columns = lambda x: np.concatenate([x[0], x[1]])[None]
  packed = {key: columns(ids) for key, ids in alone.items()}
  number = lambda length: np.repeat([1, 2], length)[None].astype(np.int32)
  count = lambda length: np.tile(np.arange(length), 2)[None].astype(np.int32)
  for key in alone:
    name, length = key.removesuffix('tokens'), alone[key].shape[1]
    packed |= {f'{name}segment_ids': number(length), f'{name}positions': count(length)}
  together = logits(model, params, packed)[0].reshape(found.shape)
  np.testing.assert_allclose(together[:, start:], found[:, start:], atol=2e-5)
  without = logits(model, params, batch_of(model))
  assert np.abs(without - found[:, start:]).max() > 1e-2


@pytest.mark.parametrize('method', ['prefix', 'prefix_mlp'])
def test_a_prefix_is_all_that_its_tokens_say(method, adapted):
  # Whatever id stands there and whatever is computed of it: only its number counts, and so the base's embedding of id 0
  # may change.
  _, _, model, params = adapted('decoder', method)
  params = moved(params)
  other = dict(params, embed={'embedding': jnp.asarray(params['embed']['embedding']).at[0].add(1.0)})
  batch = {'tokens': np.concatenate([V + np.arange(P), [5, 7, 11]])[None].astype(np.int32)}
  hidden = lambda params: output(model, params, batch).hidden[:, P:]
  np.testing.assert_array_equal(hidden(params), hidden(other))


@pytest.mark.parametrize('structure, method', [
    *(('rotary', name) for name in ('everywhere', 'dora', 'ia3', 'parallel', 'p_tuning', 'prefix_mlp')),
    ('decoder', 'prompt'), ('decoder', 'prefix')])
def test_decoding_token_by_token_computes_what_a_forward_pass_does(structure, method, adapted):
  _, _, model, params = adapted(structure, method)
  params = moved(params)
  front = virtual.count(model.config.peft)
  batch = batch_of(model, front=front)
  want = logits(model, params, batch)
  single = model.clone(config=dataclasses.replace(model.config, scan=False))
  params, cache = unstack(params, model.config), init_cache(model.config, 2, front + T)
  step = jax.jit(lambda cache, ids, at: single.apply({'params': params}, {
      'tokens': ids, 'positions': at, 'segment_ids': jnp.ones_like(ids)}, cache))
  for t in range(front + T):
    out = step(cache, batch['tokens'][:, t:t + 1], np.full((2, 1), t, np.int32))
    cache = out.cache
    np.testing.assert_allclose(out.logits[:, 0, :V], want[:, t], atol=2e-5)


def test_places_are_named_alike_in_every_layer():
  for layer in ('period/slot_0', 'layer_3', 'prefix_0'):
    assert peft.site(f'stack/{layer}/attention/query'.split('/')) == 'attention/query'
  assert peft.site('encoder/stack/suffix_1/mlp/up'.split('/')) == 'encoder/mlp/up'
  ranks = PeftConfig(method='lora', sites=(('attention/query', 2), ('attention/.*', True), ('.*', False)), rank=5)
  for place, rank in (('attention/query', 2), ('attention/out', 5), ('mlp/up', 0)):
    assert peft.rank_at(ranks, place.split('/')) == rank
  assert peft.rank_at(PeftConfig(), ['attention', 'query']) == 0
