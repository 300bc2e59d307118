"""What a loaded model computes of rows of text: outputs, scores of continuations, embeddings."""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import losses, reading
from jaxlm.models import virtual
from jaxlm.models.transformer import Transformer
from jaxlm.types import Array, Tree

SCORED = 2048  # positions whose logits exist at once while scoring: 0.4 GB at 50,000 pieces


def batch(config: Any, rows: tuple[Array, Array], source: tuple[Array, Array] | None = None) -> dict[str, Array]:
  """What the model reads of rows, (ids, which are real), and of the source's."""
  read = reading.batch_of(config, *map(jnp.asarray, rows))
  if source is not None:
    read |= {'source_tokens': jnp.asarray(source[0]), 'source_segment_ids': jnp.asarray(source[1], jnp.int32)}
  return read


@functools.partial(jax.jit, static_argnames=('model', 'what'))
def outputs(model: Transformer, params: Tree, rows: tuple[Array, Array], source: tuple[Array, Array] | None = None,
            what: str = 'logits', types: Array | None = None) -> Array:
  """A field of `types.Output`; of logits, those of the vocabulary alone."""
  read = batch(model.config, rows, source) | ({} if types is None else {'token_types': jnp.asarray(types)})
  out = model.apply({'params': params}, read, with_logits=what == 'logits')
  return out.logits[..., :model.config.vocab_size] if what == 'logits' else getattr(out, what)


def _real(ids_BT: Array, lengths_B: Array) -> Array:
  return jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]


@functools.partial(jax.jit, static_argnames='model')
def scores(model: Transformer, params: Tree, inputs: reading.Inputs, targets_BT: Array,
           weights_BT: Array) -> tuple[Array, Array]:
  """(log-probability of the targets that count, summed; how many of them are the likeliest), [B] each."""
  read = reading.batch_of(model.config, inputs.tokens_BT, _real(inputs.tokens_BT, inputs.lengths_B), inputs)
  out = model.apply({'params': params}, read | reading.sources(inputs), with_logits=False)
  unembedding = model.apply({'params': params}, method='unembedding')
  vocabulary = losses.Vocabulary(model.config.vocab_size, model.config.logit_softcap, 0.0, 0.0,
                                 max(1, SCORED // targets_BT.shape[0]), model.layout)
  nll_BT, correct_BT = losses.token_losses(vocabulary, out.features, *unembedding, targets_BT)
  total = lambda x_BT: jnp.where(weights_BT > 0, x_BT, 0).sum(1)
  return jax.lax.with_sharding_constraint((-total(nll_BT), total(correct_BT)), model.layout.replicated)


@functools.partial(jax.jit, static_argnames=('model', 'how'))
def pooled(model: Transformer, params: Tree, inputs: reading.Inputs, how: str = 'mean') -> Array:
  """float32 [B, D or V], a row's own tokens as `Transformer.pooled` embeds them; of an encoder-decoder, the encoder's."""
  if inputs.source_BS is not None:
    hidden_BTD, tokens, _ = model.apply({'params': params}, reading.sources(inputs), method='encode')
    segments_BT = virtual.real(model.config, inputs.source_BS, tokens.segments)
  else:
    real_BT = _real(inputs.tokens_BT, inputs.lengths_B)
    hidden_BTD = outputs(model, params, (inputs.tokens_BT, real_BT), what='hidden')
    segments_BT = virtual.real(model.config, inputs.tokens_BT, real_BT)
  pooled_BKD = model.apply({'params': params}, hidden_BTD, jnp.where(segments_BT > 0, 1, 0), how=how, method='pooled')
  return jax.lax.with_sharding_constraint(pooled_BKD[:, 0], model.layout.replicated)
