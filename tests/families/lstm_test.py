"""Recurrent families: sizes, torch's own layers as the reference, and decoding that equals a forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import counting
from jaxlm import config as base
from jaxlm import decode, hf, sharding, transfer, trees
from jaxlm.families import lstm, lstm_attention
from jaxlm.models.config import freeze
from jaxlm.models.transformer import Transformer
from jaxlm.types import Prompt

V = 23


def test_mlstm_has_the_published_parameters_but_for_embeddings_of_its_width():
  width, bytes_, narrow = 4096, 256, 64
  published = (bytes_ * narrow + 5 * narrow * width + 5 * width * width + 4 * width  # embedding, maps, bias
               + bytes_ * width + bytes_)  # output; without gains of weight normalisation
  wider = (width - narrow) * (bytes_ + 5 * width)
  assert counting.parameters(lstm.SIZES['mlstm-4096'], bytes_) == published + wider


def tiny(overrides, **more):
  """(an unrolled model of width 8, its parameters far from zero)."""
  model = hf.merged(overrides, dict(width=8, num_layers=2, encoder_layers=2, vocab_pad_to=1, scan=False) | more)
  model = Transformer(freeze(hf.whole_model(model), vocab_size=V, visibility='causal'),
                      sharding.single(base.default().sharding.rules))
  rng = np.random.default_rng(0)
  shapes = transfer.param_shapes(model.config)
  return model, trees.unflatten({path: (0.4 * rng.standard_normal(shape)).astype(np.float32)
                                 for path, shape in shapes.items()})


@pytest.mark.parametrize('size, name', [('lstm-medium', 'LSTM'), ('gru-medium', 'GRU'), ('rnn-medium', 'RNN')])
def test_the_model_is_layers_of_torch_on_each_other(size, name):
  torch = pytest.importorskip('torch')
  model, params = tiny(lstm.SIZES[size])
  twin, leaves = getattr(torch.nn, name)(8, 8, num_layers=2, batch_first=True), trees.flatten(params)
  with torch.no_grad():
    for layer in range(2):
      for theirs, ours in dict(ih='input', hh='recurrent').items():
        at = f'stack/layer_{layer}/attention/{ours}'
        kernel_DX = torch.tensor(leaves[f'{at}/kernel']).reshape(8, -1)
        getattr(twin, f'weight_{theirs}_l{layer}').copy_(kernel_DX.T)
        getattr(twin, f'bias_{theirs}_l{layer}').copy_(torch.tensor(leaves[f'{at}/bias']).reshape(-1))
    tokens_BT = np.random.default_rng(1).integers(0, V, (2, 9))
    hidden_BTD, _ = twin(torch.tensor(leaves['embed/embedding'])[torch.tensor(tokens_BT)])
    want_BTV = hidden_BTD @ torch.tensor(leaves['head']).T + torch.tensor(leaves['head_bias'])
  got_BTV = jax.jit(lambda x: model.apply({'params': params}, {'tokens': x}).logits)(jnp.asarray(tokens_BT, jnp.int32))
  np.testing.assert_allclose(got_BTV, want_BTV.numpy(), atol=1e-5)


@pytest.mark.parametrize('overrides', [lstm.SIZES['mlstm-4096'], lstm_attention.SIZES['luong'],
                                       lstm_attention.SIZES['bahdanau']])
def test_greedy_decoding_is_the_forward_pass(overrides):
  both = overrides['structure'] == 'encoder_decoder'
  attention = overrides['attention'] | (dict(num_heads=1, num_kv_heads=1, head_dim=8) if both else {})
  model, params = tiny(overrides, attention=attention)
  source, start = [3, 1, 4, 1, 5] if both else [], [2] if both else [2, 7, 1]
  new = decode.generate(model, params, [Prompt(start, source)], max_new_tokens=10)[0]
  batch = {'tokens': jnp.asarray([start + new[:-1]], jnp.int32)}
  if both:
    batch |= {'source_tokens': jnp.asarray([source], jnp.int32)}
  logits_TV = jax.jit(lambda x: model.apply({'params': params}, x).logits)(batch)[0, len(start) - 1:, :V]
  assert new == np.argmax(logits_TV, -1).tolist() and len(new) == 10


def test_attention_of_a_recurrent_decoder_reads_the_source_of_its_own_document():
  model, params = tiny(lstm_attention.SIZES['luong'],
                       attention=dict(num_heads=1, num_kv_heads=1, head_dim=8, bias=True, out_bias=True))
  run = jax.jit(lambda batch: model.apply({'params': params}, batch).logits)
  batch = {'tokens': [[1, 2, 3, 4, 5]], 'segment_ids': [[1, 1, 2, 2, 2]], 'positions': [[0, 1, 0, 1, 2]],
           'source_tokens': [[6, 7, 8, 9]], 'source_segment_ids': [[1, 1, 2, 2]], 'source_positions': [[0, 1, 0, 1]]}
  batch = {key: jnp.asarray(value, jnp.int32) for key, value in batch.items()}
  before, after = run(batch), run(batch | {'source_tokens': batch['source_tokens'].at[0, 3].set(10)})
  assert (before[0, :2] == after[0, :2]).all() and not np.isclose(before[0, 2:], after[0, 2:]).all(-1).any()
