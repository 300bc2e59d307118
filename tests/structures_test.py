"""Decoding a token at a time is the full forward, whatever the structure and the objective that shaped the prompt."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import decode, lm, reading
from jaxlm.errors import JaxlmError
from jaxlm.sampling import Sampling
from tests.matrix_test import config_of, small

NEW = 6
# One of each way in which prompts are made and read; all other pairs share one of these.
CONTINUED = [('causal', 'recurrent'), ('prefix', 'decoder'), ('infilling', 'decoder'), ('span', 'encoder_decoder'),
             ('permutation', 'two_stream')]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, inputs):
  """Logits [B, T, V] of whole rows, without a cache."""
  real_BT = jnp.arange(inputs.tokens_BT.shape[1]) < inputs.lengths_B[:, None]
  batch = reading.batch_of(model.config, inputs.tokens_BT, real_BT, inputs) | reading.sources(inputs)
  return model.apply({'params': params}, batch).logits


@pytest.mark.parametrize('name, kind', CONTINUED)
def test_greedy_tokens_are_the_likeliest_of_the_full_forward(name, kind):
  objective, model, params = small(name, kind)
  rng = np.random.default_rng(0)
  prompts = [objective.prompt(rng.integers(97, 120, n).tolist()) for n in (7, 3)]
  model, params = reading.unrolled(model, params)
  got = decode.generate(model, params, prompts, NEW, Sampling())
  whole = [type(p)(list(p.ids) + new, p.source, p.context, p.blank) for p, new in zip(prompts, got)]
  logits_BTV = np.asarray(forward(model, params, reading.pad(model, whole)))[..., :model.config.vocab_size]
  for row, (prompt, new) in enumerate(zip(prompts, got)):
    for i, token in enumerate(new):
      logits_V = logits_BTV[row, len(prompt.ids) - 1 + i]
      assert logits_V[token] > logits_V.max() - 1e-4  # float32 sums in another order
  assert all(len(new) == NEW for new in got)
  # A row by itself has its small matrices outputs first.
  assert decode.generate(model, params, prompts, NEW, Sampling(), batch_size=1) == got


def test_attention_is_shown_of_every_structure_that_has_it_and_refused_of_others():
  def loaded(name, kind):
    _, model, params = small(name, kind)
    return lm.LM(config_of(name, kind), model, params, None)
  tokens, source = np.arange(97, 102)[None], np.arange(97, 104)[None]
  for (name, kind), given in {('masked', 'encoder'): (tokens,), ('span', 'encoder_decoder'): (tokens, source),
                              ('permutation', 'two_stream'): (tokens,)}.items():
    layers = loaded(name, kind).attention(*given)
    assert [probs_BNTT.shape for probs_BNTT in layers] == [(1, 2, 5, 5)] * 2, kind
    np.testing.assert_allclose(layers[0].sum(-1), 1, atol=1e-6)
  with pytest.raises(JaxlmError, match="meet by config.model.mixer='lstm'"):
    loaded('causal', 'recurrent').attention(tokens)
  with pytest.raises(JaxlmError, match='give its source, too'):
    loaded('span', 'encoder_decoder').attention(tokens)


def test_memory_and_row_of_packed_documents_are_those_of_each_alone():
  objective, model, params = small('permutation', 'two_stream')
  rng, M, T = np.random.default_rng(0), 8, 24
  segments = np.repeat([1, 2, 3], [5, 13, 14])  # of memory and row; document 2 begins in the memory
  positions = np.concatenate([np.arange(n) for n in (5, 13, 14)])
  order = rng.permutation(T) % 7
  row = dict(tokens=rng.integers(97, 120, T), segment_ids=segments[M:], positions=positions[M:], order=order,
             memory_tokens=rng.integers(97, 120, M), memory_segment_ids=segments[:M], memory_positions=positions[:M])
  alone = lambda n: row | {key: np.where(row[key] == n, n, 0) for key in ('segment_ids', 'memory_segment_ids')}
  batch = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), jnp.int32), row, *map(alone, (1, 2, 3)))
  found = np.asarray(model.apply({'params': params}, batch, with_logits=False).hidden)
  for n in (2, 3):
    np.testing.assert_allclose(found[0, segments[M:] == n], found[n, segments[M:] == n], atol=1e-5)
  moved = dict(row, memory_tokens=row['memory_tokens'] ^ (segments[:M] == 2))
  both = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), jnp.int32), row, moved)
  found = np.asarray(model.apply({'params': params}, both, with_logits=False).hidden)
  assert (((found[0] != found[1]).any(-1)) == (segments[M:] == 2)).all()  # each row of document 2 reads its memory
