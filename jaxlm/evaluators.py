"""Evaluation during training: held-out text of every source, and what the model says."""
import collections
import math
from typing import Any, Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxlm import decode, losses, sharding
from jaxlm.data.pipeline import HeldoutBatches
from jaxlm.models.transformer import Transformer
from jaxlm.types import Array, Tree

HELDOUT = 'heldout'  # the name of all sources together


def measure_step(model: Transformer, vocabulary: losses.Vocabulary):
  """Returns a compiled (params, batch) -> (nll in nats, correct guesses, targets), sums over the batch."""
  def step(params: Tree, batch: dict[str, Array]) -> tuple[Array, Array, Array]:
    output = model.apply({'params': params}, batch, with_logits=False)
    w_VD = model.apply({'params': params}, method='unembedding')
    nll_BT, correct_BT = losses.token_losses(vocabulary, output.hidden, w_VD, batch['targets'])
    weights_BT = batch['loss_weights']
    total = lambda x_BT: jnp.where(weights_BT > 0, x_BT * weights_BT, 0).sum()
    return total(nll_BT), total(correct_BT), weights_BT.sum()
  return jax.jit(step, compiler_options=sharding.compiler_options(jax.devices()[0].platform))


class Evaluators:
  """Measures a model on the held-out documents of each source.

  Args:
    config: eval and loss are read.
    model: whose layout places batches.
    stores: of the sources.
    objective: as in training.
    tokenizer: for samples.
  """

  def __init__(self, config: Any, model: Transformer, stores: Sequence[Any], objective: Any, tokenizer: Any):
    self._config, self._model, self._tokenizer = config, model, tokenizer
    self._layout, self._size = model.layout, config.eval.batch_size
    shape = (self._size, config.seq_len)
    self._rows = self._layout.host_rows(shape)
    self._heldout = [HeldoutBatches(s, objective, config, tokenizer.vocab, lambda size: self._rows)
                     for s in stores if len(s.heldout)]
    self._step = measure_step(model, losses.vocabulary_of(model, config.loss))

  def measure(self, params: Tree) -> dict[str, float]:
    """eval/<name>/loss (nats a target), perplexity, accuracy, bits_per_byte, gzip_bits_per_byte.

    <name> is the source's, and 'heldout' for all of them together.
    """
    found: dict[str, float] = {}
    everything = collections.Counter()
    for heldout in self._heldout:
      sums = collections.Counter(bytes=heldout.text_bytes, gzip=heldout.gzip_bits_per_byte * heldout.text_bytes)
      for rows in heldout:
        parts = self._step(params, self._layout.place(rows, self._size, self._rows[0]))
        sums.update(dict(zip(('nll', 'correct', 'targets'), map(float, parts))))
      everything.update(sums)
      if len(self._heldout) > 1:
        found |= _told(heldout.name, sums)
    return found | _told(HELDOUT, everything) if everything['targets'] else found

  def samples(self, params: Tree, step: int) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) of each prompt in the config; a prompt starts as documents do."""
    settings, vocab = self._config.eval, self._tokenizer.vocab
    if not settings.prompts:
      return
    start = [vocab.bos] if self._config.data.bos and vocab.bos is not None else []
    encoded, first = zip(*map(self._tokenizer.encode_prompt, settings.prompts))
    prompts = [start + ids for ids in encoded]
    room = self._model.config.max_length if self._model.config.positions.kind == 'learned' else math.inf
    length = min(settings.sample_tokens, int(min(room - max(map(len, prompts)), 1 << 30)))
    if not all(prompts) or length < 1:
      return
    sampling = decode.Sampling(temperature=settings.temperature, seed=step)
    eos = [vocab.eos] if vocab.eos is not None else []
    found = decode.generate(self._model, params, prompts, length, sampling, eos, first=first)
    for prompt, allowed, ids in zip(settings.prompts, first, found):
      text = self._tokenizer.decode(ids)
      yield prompt, text if allowed is None else text[1:]  # the space is the prompt's


def _told(name: str, sums: dict[str, float]) -> dict[str, float]:
  loss = sums['nll'] / max(sums['targets'], 1)
  values = {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'accuracy': sums['correct'] / max(sums['targets'], 1),
            'bits_per_byte': sums['nll'] / math.log(2) / max(sums['bytes'], 1),
            'gzip_bits_per_byte': sums['gzip'] / max(sums['bytes'], 1)}
  return {f'eval/{name}/{key}': value for key, value in values.items()}
