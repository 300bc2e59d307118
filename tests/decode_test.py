"""Cached decoding equals the full forward; draws follow the exact probabilities; beams find the best."""
import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import beams, decode, reading, sharding, trees
from jaxlm.errors import JaxlmError
from jaxlm.models import layers
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer
from jaxlm.sampling import Sampling, bucket, choose, sampling_numbers, specialised
from jaxlm.types import Prompt

VOCAB = 11  # padded to 16
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]


def make(kind='rope', windows=(0,), scan=False, vocab_size=VOCAB, sizes=None, **model):
  """(model, params) of a layer a window with grouped queries; weights large enough that tokens differ."""
  config = base.default()
  config.model.update(width=16, num_layers=len(windows), vocab_pad_to=8, max_length=32, scan=scan, **model)
  config.model.attention.update(num_heads=4, num_kv_heads=2, head_dim=4, windows=windows)
  config.model.positions.kind = kind
  layout = sharding.single(config.sharding.rules)
  if sizes:
    layout = sharding.Layout(sharding.make_mesh(sizes), tuple(config.sharding.rules))
  model = Transformer(freeze(base.resolved(config)['model'], vocab_size=vocab_size, visibility='causal'), layout)
  return model, random_params(model)


def random_params(model):
  """Parameters drawn with NumPy: initialising them would compile a program for each model."""
  rng = np.random.default_rng(1)
  tokens_BT = jnp.zeros((model.layout.batch_parts, 8), jnp.int32)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), {'tokens': tokens_BT})['params'])
  return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.5).astype(x.dtype), shapes)


@pytest.fixture(scope='module')
def tiny():
  return make()


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens_BT):
  return model.apply({'params': params}, {'tokens': tokens_BT}).logits


def full_logits(model, params, length=32):
  """ids -> float32 [T, V] of a forward without a cache."""
  def of(ids):
    tokens_BT = np.zeros((1, length), np.int32)
    tokens_BT[0, :len(ids)] = ids
    return np.asarray(forward(model, params, tokens_BT))[0, :len(ids), :model.config.vocab_size]
  return of


def naive_greedy(logits_of, prompt, count, penalty=1.0, eos=()):
  ids = list(prompt)
  for _ in range(count):
    logits_V = logits_of(ids)[-1].copy()
    for seen in set(ids) if penalty != 1 else ():
      logits_V[seen] *= penalty if logits_V[seen] < 0 else 1 / penalty
    ids.append(int(logits_V.argmax()))
    if ids[-1] in eos:
      break
  return ids[len(prompt):]


# ---- decode = forward --------------------------------------------------------------------------------------------

CASES = [('learned', (0,)), ('rope', (0,)), ('alibi', (0,)), ('sinusoidal', (3, 0)), ('rope', (4, 0)), ('none', (5,))]


@pytest.mark.parametrize('kind, windows', CASES)
def test_cached_decoding_equals_the_full_forward(kind, windows):
  model, params = make(kind, windows)
  text = np.random.default_rng(0).integers(0, VOCAB, 24).tolist()
  cuts = (5, 9)  # of two rows with unequal prompts, the rest read one by one, further than any window's ring
  inputs = reading.pad(model, [Prompt(text[:cut]) for cut in cuts])
  program = specialised(VOCAB, Sampling(), ())
  rest_BT = np.asarray([text[cut:cut + 15] for cut in cuts], np.int32)

  @jax.jit
  def cached(params, inputs, rest_BT):
    logits_BV, cache, _ = reading.prefill(model, params, program, inputs, 32)
    def step(carry, ids_B):
      cache, position_B = carry
      logits_BV, cache, _ = reading.advance(model, params, program, cache, None, inputs, ids_B, position_B,
                                                  jnp.ones(2, bool))
      return (cache, position_B + 1), logits_BV
    (cache, _), after_TBV = jax.lax.scan(step, (cache, inputs.lengths_B), rest_BT.T)
    return jnp.concatenate([logits_BV[None], after_TBV])

  found_TBV = np.asarray(cached(params, inputs, rest_BT))
  full_TV = full_logits(model, params)(text)
  for row, cut in enumerate(cuts):
    # float32: other shapes sum in another order; logits reach 3, measured max 1.1e-6.
    np.testing.assert_allclose(found_TBV[:, row, :VOCAB], full_TV[cut - 1:cut + 15], rtol=0, atol=1e-5)
  assert np.isneginf(found_TBV[:, :, VOCAB:]).all()


@pytest.mark.parametrize('kind, windows', [('learned', (0,)), ('rope', (4, 0))])
def test_greedy_is_the_argmax_of_full_forwards(kind, windows):
  model, params = make(kind, windows)
  logits_of = full_logits(model, params)
  outputs = decode.generate(model, params, PROMPTS, 20)
  assert outputs == [naive_greedy(logits_of, prompt, 20) for prompt in PROMPTS]


def test_a_scanned_model_on_a_mesh_says_what_one_device_says():
  model, params = make(kind='learned', windows=(4, 0), scan=True, sizes=dict(data=2, fsdp=2, tensor=2))
  tokens_BT = jnp.zeros((4, 8), jnp.int32)
  axes = sharding.logical_axes(jax.eval_shape(model.init, jax.random.key(0), {'tokens': tokens_BT})['params'])
  params = jax.device_put(params, sharding.param_shardings(params, axes, model.layout))
  one, _ = make(kind='learned', windows=(4, 0), scan=True)
  alone = decode.generate(one, jax.tree.map(np.asarray, params), PROMPTS, 8)
  assert decode.generate(model, params, PROMPTS, 8) == alone


def test_repetition_penalty_counts_prompt_and_continuation(tiny):
  expected = [naive_greedy(full_logits(*tiny), prompt, 12, penalty=1.7) for prompt in PROMPTS]
  assert decode.generate(*tiny, PROMPTS, 12, Sampling(repetition_penalty=1.7)) == expected
  assert expected != decode.generate(*tiny, PROMPTS, 12)


def test_small_kernels_are_outputs_first_for_one_row_and_large_ones_as_they_were(tiny, monkeypatch):
  model, params = tiny
  one, _ = reading.for_one_row(model, params)
  monkeypatch.setattr(layers, 'SMALL', 16 * 16)  # keys and values have half of it
  before, after = trees.flatten(params), trees.flatten(reading._outputs_first.__wrapped__(one, params))
  for path, x in before.items():
    if path.endswith(('key/kernel', 'value/kernel')):
      assert path not in after
      path, x = path.replace('kernel', 'outputs_first'), x.reshape(16, 8).T
    np.testing.assert_array_equal(after[path], x, path)
  lora = dataclasses.replace(model.config, peft=dataclasses.replace(model.config.peft, method='lora'))
  assert reading.for_one_row(Transformer(lora, model.layout), params) is None


# ---- rows --------------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_batch_around_them(tiny):
  sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
  together = decode.generate(*tiny, PROMPTS, 40, sampling)
  assert together == decode.generate(*tiny, PROMPTS, 40, sampling, batch_size=1)


def test_a_seed_gives_one_continuation_and_another_seed_another(tiny):
  run = lambda seed: decode.generate(*tiny, PROMPTS, 40, Sampling(temperature=1.0, top_p=0.9, seed=seed))
  assert run(3) == run(3)
  assert run(3) != run(4)


def test_an_end_token_ends_its_row_alone(tiny):
  free = decode.generate(*tiny, PROMPTS, 40)
  end = free[0][6]
  outputs = decode.generate(*tiny, PROMPTS, 40, eos=[end])
  assert outputs == [ids[:ids.index(end) + 1] if end in ids else ids for ids in free]


def test_the_host_may_stop_a_row_between_blocks(tiny):
  free = decode.generate(*tiny, PROMPTS, 50)
  outputs = decode.generate(*tiny, PROMPTS, 50, stopped=lambda ids: ids[1:2] == free[0][1:2])
  assert outputs == [ids[:1 + decode.BLOCK] if ids[1] == free[0][1] else ids for ids in free]


def test_max_new_tokens_is_exact_across_blocks(tiny):
  longest = decode.generate(*tiny, PROMPTS, 50)
  for count in (0, 1, 2, decode.BLOCK, decode.BLOCK + 1, decode.BLOCK + 2):
    assert decode.generate(*tiny, PROMPTS, count) == [ids[:count] for ids in longest]
  assert decode.generate(*tiny, [], 5) == []


def test_ids_beyond_the_vocabulary_are_never_chosen(tiny):
  model, params = tiny
  embedding_VD = params['embed']['embedding'].copy()
  embedding_VD[VOCAB:] *= 1e3  # rows of padding, as likely as can be
  params = params | {'embed': {'embedding': embedding_VD}}
  for sampling in (Sampling(), Sampling(temperature=5.0, seed=1), Sampling(num_beams=3)):
    assert max(itertools.chain(*decode.generate(model, params, PROMPTS, 20, sampling))) < VOCAB


def test_lengths_and_numbers_share_programs(tiny):
  def run(length, **numbers):
    decode.generate(*tiny, [list(range(length))], 7, Sampling(temperature=1.0, **numbers))
  run(1, top_k=5)
  programs = lambda: (decode._start._cache_size(), decode._block_of_one._cache_size())
  before = programs()
  for length in range(2, 11):
    run(length, top_k=5 + length % 2, seed=length)
  assert programs() == before
  assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 1025)] == [16, 16, 24, 24, 32, 48, 1536]


# ---- draws -------------------------------------------------------------------------------------------------------

LOGITS_V = np.log(np.asarray([0.02, 0.3, 0.05, 0.25, 0.1, 0.08, 0.2, 1e-9], np.float32))


def draws(sampling, count=20_000, logits_V=LOGITS_V):
  """Frequencies of `count` draws, each of another row."""
  program = specialised(len(logits_V), sampling, ())
  logits_BV = jnp.broadcast_to(logits_V, (count, len(logits_V)))
  rows_B = jnp.arange(count)
  ids_B = jax.jit(choose, static_argnums=0)(program, sampling_numbers(sampling, program), logits_BV, None, rows_B,
                                            jnp.full(count, 7))
  return np.bincount(ids_B, minlength=len(logits_V)) / count


@pytest.mark.parametrize('sampling, kept, power', [
    (Sampling(temperature=1.0), range(8), 1),
    (Sampling(temperature=0.5), range(8), 2),
    (Sampling(temperature=1.0, top_k=1), [1], 1),
    (Sampling(temperature=1.0, top_k=3), [1, 3, 6], 1),
    (Sampling(temperature=2.0, top_k=5), [1, 3, 6, 4, 5], 0.5),
    (Sampling(temperature=1.0, top_k=100), range(8), 1),
    (Sampling(temperature=1.0, top_p=0.29), [1], 1),
    (Sampling(temperature=1.0, top_p=0.54), [1, 3], 1),
    (Sampling(temperature=1.0, top_p=0.56), [1, 3, 6], 1),
    (Sampling(temperature=1.0, top_p=1e-9), [1], 1),
    (Sampling(temperature=1.0, min_p=0.6), [1, 3, 6], 1),
    (Sampling(temperature=1.0, min_p=1.0), [1], 1),
    (Sampling(temperature=1.0, top_p=0.54, min_p=0.1), [1, 3], 1),
    (Sampling(temperature=1.0, top_p=0.56, min_p=0.6), [1, 3, 6], 1),  # top_p first: of 1, 3, 6 alone it would keep two
    (Sampling(temperature=1.0, top_k=2, min_p=0.3), [1, 3], 1),
    (Sampling(temperature=1.0, top_k=3, top_p=0.7), [1, 3], 1),  # of 0.3, 0.25, 0.2, renormalised: 0.4, 0.33, 0.27
])
def test_draws_follow_the_exact_probabilities(sampling, kept, power):
  exact_V = np.zeros(8)
  exact_V[list(kept)] = np.exp(LOGITS_V[list(kept)]) ** power
  exact_V /= exact_V.sum()
  found_V = draws(sampling)
  assert not found_V[exact_V == 0].any()
  # Five standard deviations of a frequency.
  assert (np.abs(found_V - exact_V) <= 5 * np.sqrt(exact_V * (1 - exact_V) / 20_000) + 1e-6).all()


def test_ties_with_the_last_kept_token_are_kept():
  tied_V = np.log(np.asarray([0.4, 0.2, 0.2, 0.2], np.float32))
  assert (draws(Sampling(temperature=1.0, top_k=2), 500, tied_V) > 0).all()


# ---- beams -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def enumerable():
  return make(vocab_size=5)


def every_continuation(logits_of, prompt, length, end, penalty):
  """{ids: score} of all continuations that end, or are of full length."""
  scores = {}
  def extend(ids, total):
    if len(ids) == length or (ids and ids[-1] == end):
      scores[tuple(ids)] = total / len(ids) ** penalty
      return
    logits_V = logits_of(prompt + ids)[-1].astype(np.float64)
    logp_V = logits_V - np.logaddexp.reduce(logits_V)
    for token in range(5):
      extend(ids + [token], total + logp_V[token])
  extend([], 0.0)
  return scores


@pytest.mark.parametrize('length_penalty', [0.0, 1.0, 3.0, -1.0])
def test_wide_beams_find_the_best_of_all_continuations(enumerable, length_penalty):
  prompts, end = [[1, 2, 3], [4]], 0
  outputs = decode.generate(*enumerable, prompts, 3, Sampling(num_beams=80, length_penalty=length_penalty), eos=[end])
  logits_of = full_logits(*enumerable)
  for prompt, found in zip(prompts, outputs):
    scores = every_continuation(logits_of, prompt, 3, end, length_penalty)
    assert tuple(found) == max(scores, key=scores.get)


def test_one_beam_is_greedy(tiny):
  model, params = tiny
  greedy = decode.generate(model, params, PROMPTS, 12, eos=[7])
  inputs = reading.pad(model, [Prompt(ids) for ids in PROMPTS])
  ids_BT = beams.search(model, params, inputs, 64, 12, Sampling(length_penalty=0.0), [7])
  assert [[i for i in ids if i != reading.NONE] for ids in ids_BT.tolist()] == greedy


def test_beams_of_windowed_caches_follow_their_rows():
  model, params = make(windows=(4, 0))
  found = decode.generate(model, params, PROMPTS, 16, Sampling(num_beams=3))
  logits_of = full_logits(model, params)
  def total(prompt, ids):
    logp_TV = jax.nn.log_softmax(logits_of(prompt + ids))
    return sum(float(logp_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
  for prompt, ids, greedy in zip(PROMPTS, found, decode.generate(model, params, PROMPTS, 16)):
    assert len(ids) == 16 and total(prompt, ids) >= total(prompt, greedy) - 1e-4


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('settings, line', [
    (dict(temperature=-1.0), 'temperature must be a number, at least 0; got -1.0.'),
    (dict(temperature=float('nan')), 'temperature must be a number, at least 0; got nan.'),
    (dict(temperature='warm'), "temperature must be a number, at least 0; got 'warm'."),
    (dict(top_k=-5), 'top_k must be an integer, at least 0 (0: all tokens); got -5.'),
    (dict(top_p=0.0), 'top_p must be above 0 and at most 1 (1: all tokens); got 0.0.'),
    (dict(repetition_penalty=0.0), 'repetition_penalty must be above 0 (1: none); got 0.0.'),
    (dict(seed=-1), 'seed must be an integer from 0 to 4294967295; got -1.'),
    (dict(num_beams=0), 'num_beams must be an integer, at least 1; got 0.'),
    (dict(num_beams=2, temperature=1.0), 'num_beams=2 searches and temperature=1.0 samples; set num_beams=1 or '
     'temperature=0.'),
])
def test_settings_out_of_range_are_refused(settings, line):
  with pytest.raises(JaxlmError) as e:
    Sampling(**settings)
  assert str(e.value) == line


@pytest.mark.parametrize('prompts, count, line', [
    ([[1], []], 4, 'Prompt 1 is empty; give it one token at least, the one that begins a document, say.'),
    ([[1, VOCAB]], 4, "Prompt 0: token id 11 is outside the vocabulary, 0 to 10; use this model's own tokenizer."),
    ([[1, -1]], 4, "Prompt 0: token id -1 is outside the vocabulary, 0 to 10; use this model's own tokenizer."),
    ([[1.5]], 4, 'Prompt 0: wanted token ids, got float64; encode text with the tokenizer first.'),
    ([[1]], -1, 'max_new_tokens must be an integer, at least 0; got -1.'),
    ([[1] * 30], 4, 'Prompt 0 (30 tokens) with max_new_tokens=4 needs 34 positions; the model learned 32. '
     'Lower max_new_tokens to 2 or shorten the prompt.'),
    ([[1] * 32], 4, 'Prompt 0 (32 tokens) with max_new_tokens=4 needs 36 positions; the model learned 32. '
     'Shorten the prompt.'),
])
def test_prompts_that_cannot_be_continued_are_refused(prompts, count, line):
  model, _ = make('learned')
  with pytest.raises(JaxlmError) as e:
    decode.generate(model, {}, prompts, count)  # before parameters are looked at
  assert str(e.value) == line


def test_learned_positions_can_be_used_to_the_last():
  model, params = make('learned')
  ids = decode.generate(model, params, [[1] * 28], 4)[0]
  assert ids == naive_greedy(full_logits(model, params), [1] * 28, 4)


def test_a_model_that_sees_both_sides_cannot_continue(tiny):
  model, params = tiny
  model = Transformer(dataclasses.replace(model.config, visibility='full'), model.layout)
  with pytest.raises(JaxlmError, match='sees both sides'):
    decode.generate(model, params, PROMPTS, 4)
