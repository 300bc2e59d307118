"""Speculative decoding: the model's own tokens, whoever guesses; draws from its own distribution."""
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode_test import CASES, PROMPTS, full_logits, make, random_params
from jaxlm import decode, speculation
from jaxlm.errors import JaxlmError
from jaxlm.sampling import Sampling
from jaxlm.speculation import Guesses


def noisy(params, scale, seed=5):
  """Parameters that are nearly the same, so that guesses are sometimes right."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(x.dtype), params)


GUESSERS = {'lookup': lambda model, params: Guesses(3, lookup=2),
            'near': lambda model, params: Guesses(4, draft=model, params=noisy(params, 0.05)),
            'itself': lambda model, params: Guesses(2, draft=model, params=params),
            'one at a time': lambda model, params: Guesses(1, draft=model, params=noisy(params, 0.5))}


@pytest.mark.parametrize('kind, windows', CASES)
@pytest.mark.parametrize('guesser', GUESSERS)
def test_greedy_tokens_are_those_of_plain_decoding(kind, windows, guesser):
  model, params = make(kind, windows)
  plain = decode.generate(model, params, PROMPTS, 20)
  assert decode.generate(model, params, PROMPTS, 20, guesses=GUESSERS[guesser](model, params)) == plain


@pytest.mark.parametrize('guesser', ['lookup', 'near'])
def test_penalties_ends_stops_and_lengths_are_those_of_plain_decoding(guesser):
  model, params = make()
  guesses = GUESSERS[guesser](model, params)
  run = lambda count=20, sampling=Sampling(), **given: (
      decode.generate(model, params, PROMPTS, count, sampling, **given),
      decode.generate(model, params, PROMPTS, count, sampling, guesses=guesses, **given))
  for count in (0, 1, 2, 3, 5):
    plain, guessed = run(count)
    assert plain == guessed and all(len(ids) == count for ids in guessed)
  plain, guessed = run(sampling=Sampling(repetition_penalty=1.7))
  assert plain == guessed
  free, _ = run()
  for end in {free[0][6], free[1][3]}:
    plain, guessed = run(eos=[end])
    assert plain == guessed and any(ids[-1] == end for ids in guessed)
  stopped = lambda ids: len(ids) >= 6
  found = decode.generate(model, params, PROMPTS, 20, guesses=guesses, stopped=stopped, every=3)
  assert all(ids == whole[:len(ids)] and 6 <= len(ids) < 20 for ids, whole in zip(found, free))


def test_several_devices_say_what_one_says():
  model, params = make(windows=(4, 0), scan=True, sizes=dict(data=2, tensor=2, fsdp=2))
  one, _ = make(windows=(4, 0), scan=True)
  assert (decode.generate(model, params, PROMPTS, 8, guesses=Guesses(3, lookup=2)) ==
          decode.generate(one, params, PROMPTS, 8))


def test_learned_positions_are_not_overrun():
  model, params = make('learned')
  prompt = PROMPTS[0] * 5
  guesses = Guesses(6, draft=model, params=params)
  assert decode.generate(model, params, [prompt], 7, guesses=guesses) == decode.generate(model, params, [prompt], 7)


# ---- draws -------------------------------------------------------------------------------------------------------

VOCAB, NEW, COUNT = 4, 4, 16_384


def exact(model, params, sampling):
  """{continuation: probability} by going through all of them; top_k and temperature as sampling says."""
  logits_of, found = full_logits(model, params), {}
  for ids in itertools.product(range(VOCAB), repeat=NEW):
    logits_TV = logits_of([0, *ids])[:-1].astype(np.float64) / sampling.temperature
    total = 1.0
    for logits_V, id in zip(logits_TV, ids):
      if sampling.top_k:
        logits_V = np.where(logits_V >= np.sort(logits_V)[-sampling.top_k], logits_V, -np.inf)
      probs_V = np.exp(logits_V - logits_V.max())
      total *= probs_V[id] / probs_V.sum()
    found[ids] = total
  return found


@pytest.mark.parametrize('guesser', ['lookup', 'near', 'itself'])
@pytest.mark.parametrize('sampling', [Sampling(temperature=1.5), Sampling(temperature=1.0, top_k=3)])
def test_draws_have_the_models_own_distribution(guesser, sampling):
  model, params = make(vocab_size=VOCAB)
  wanted = exact(model, params, sampling)
  assert sum(wanted.values()) == pytest.approx(1.0)
  drawn = decode.generate(model, params, [[0]] * COUNT, NEW, sampling, batch_size=COUNT,
                          guesses=GUESSERS[guesser](model, params))
  found = dict.fromkeys(wanted, 0.0)
  for ids in drawn:
    found[tuple(ids)] += 1 / COUNT
  # Exact draws of this number have this total variation in the mean; it hardly varies, being a sum over 256 texts.
  expected = sum(np.sqrt(2 * p * (1 - p) / (np.pi * COUNT)) for p in wanted.values()) / 2
  assert sum(abs(found[ids] - wanted[ids]) for ids in wanted) / 2 < 1.25 * expected < 0.07


def test_guesses_that_were_always_kept_would_be_noticed(monkeypatch):
  monkeypatch.setattr(jax.random, 'uniform', lambda key: jnp.float32(0))
  jax.clear_caches()
  with pytest.raises(AssertionError):
    test_draws_have_the_models_own_distribution('near', Sampling(temperature=1.5))
  jax.clear_caches()


# ---- guesses from the text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('text, longest, guessed', [
    ([1, 2, 3, 4, 1, 2, 5, 6, 1, 2], 2, [5, 6, 1]),   # the last of two places
    ([1, 2, 3, 4, 9, 2, 5, 6, 1, 2], 2, [3, 4, 9]),   # the one that agrees further
    ([1, 2, 3, 4, 9, 2, 5, 6, 1, 2], 1, [5, 6, 1]),
    ([7, 8, 7, 8, 7, 8], 3, [7, 8, 7]),               # it goes on as it did
    ([1, 2, 3], 3, [3, 3, 3]),                        # never seen before
])
def test_what_followed_the_last_tokens_before_is_guessed(text, longest, guessed):
  state = types.SimpleNamespace(guesser=jnp.asarray([text + [0] * 3]), columns_B=jnp.asarray([len(text) - 1]))
  ids_BY, probs, _ = speculation._looked_up(longest, None, None, state, jnp.zeros((1, 4)), None)
  assert ids_BY.tolist() == [guessed] and probs is None


@pytest.mark.parametrize('given, told', [
    (dict(), 'Guesses come from a draft model or from lookup; give one of the two.'),
    (dict(tokens=0, lookup=2), 'guesses: tokens must be an integer, at least 1; got 0.'),
    (dict(lookup=-1), 'guesses: lookup must be an integer, at least 0; got -1.'),
])
def test_bad_guesses_are_told_in_a_line(given, told):
  with pytest.raises(JaxlmError, match=told):
    Guesses(**given)


def test_models_that_do_not_go_together_are_told_in_a_line():
  model, params = make()
  other, theirs = make(vocab_size=9)
  with pytest.raises(JaxlmError, match="The draft model's vocab_size must be the model's, 11; got 9."):
    decode.generate(model, params, PROMPTS, 4, guesses=Guesses(draft=other, params=theirs))
  with pytest.raises(JaxlmError, match='num_beams=2 searches'):
    decode.generate(model, params, PROMPTS, 4, Sampling(num_beams=2), guesses=Guesses(lookup=2))
  lstm, _ = make('none', mixer='lstm')
  with pytest.raises(JaxlmError, match='This model cannot take back tokens'):
    decode.generate(lstm, random_params(lstm), PROMPTS, 4, guesses=Guesses(lookup=2))
