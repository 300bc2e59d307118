"""XLNet beside `transformers`: its two streams, memory, types, gradients, bodies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import hf, reading, trees
from jaxlm.errors import JaxlmError
from jaxlm.families import xlnet
from jaxlm.types import Prompt
from tests.families.parity import check, randomised

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def config(**given):
  return transformers.XLNetConfig(**dict(vocab_size=97, d_model=30, n_layer=2, n_head=3, d_inner=24,
                                         mem_len=None) | given)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """(their model with an output layer, ours)."""
  folder = tmp_path_factory.mktemp('xlnet')
  model = randomised(transformers.XLNetLMHeadModel(config()))
  model.save_pretrained(folder)
  return model, jaxlm.load(str(folder))


B, T, M, S = 3, 9, 4, 5  # rows, their tokens, those predicted, tokens of memory


def permuted(seed, memory=0, types=False):
  """(our batch, their arguments): M of each row's tokens are produced in a random order, the others are context."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(3, 97, (B, T))
  order, chosen = np.zeros((B, T), int), np.zeros((B, M), int)
  for row in range(B):
    chosen[row] = rng.permutation(T)[:M]
    order[row, chosen[row]] = 1 + rng.permutation(M)
  hidden = (order[:, None, :] > 0) & (order[:, None, :] >= order[:, :, None])  # row i does not see column j
  at = memory + np.broadcast_to(np.arange(T), (B, T))
  pick = lambda x: np.take_along_axis(x, chosen, axis=1)
  ours = dict(tokens=ids, order=order, segment_ids=np.ones((B, T)), positions=at, query_positions=pick(at),
              query_order=pick(order), query_segment_ids=np.ones((B, M)))
  theirs = dict(input_ids=torch.tensor(ids), perm_mask=torch.tensor(hidden).float(),
                target_mapping=torch.nn.functional.one_hot(torch.tensor(chosen), T).float())
  if memory:
    before = rng.integers(3, 97, (B, memory))
    ours |= dict(memory_tokens=before, memory_segment_ids=np.ones((B, memory)),
                 memory_positions=np.broadcast_to(np.arange(memory), (B, memory)))
  if types:
    kinds = rng.integers(0, 2, (B, T))
    ours |= dict(token_types=kinds, query_types=pick(kinds))
    theirs |= dict(token_type_ids=torch.tensor(kinds))
  return {key: jnp.asarray(value, jnp.int32) for key, value in ours.items()}, theirs


@pytest.mark.parametrize('memory, types', [(0, False), (0, True), (S, False), (S, True)])
def test_two_streams_are_theirs(both, memory, types):
  model, lm = both
  run = jax.jit(lambda batch: lm.model.apply({'params': lm.params}, batch))
  for seed in range(3):
    ours, theirs = permuted(seed, memory, types)
    with torch.no_grad():
      if memory:
        theirs['mems'] = model(torch.tensor(np.asarray(ours['memory_tokens'])).long(), use_mems=True).mems
      want = model(**theirs, output_hidden_states=True)
    got = run(ours)
    np.testing.assert_allclose(got.logits[..., :97], want.logits, atol=1e-4)
    content, query = want.hidden_states[-2:]
    np.testing.assert_allclose(got.hidden, content, atol=1e-4)
    np.testing.assert_allclose(got.features, query, atol=1e-4)


def test_gradients_are_theirs(both, tmp_path):
  model, lm = both
  ours, theirs = permuted(0, types=True)
  targets = np.random.default_rng(1).integers(0, 97, (B, M))
  logits = model(**theirs).logits
  torch.nn.functional.cross_entropy(logits.reshape(-1, 97), torch.tensor(targets).reshape(-1)).backward()
  there = transformers.XLNetLMHeadModel(config())
  with torch.no_grad():
    for mine, their in zip(there.parameters(), model.parameters(), strict=True):
      mine.copy_(their.grad)
  model.zero_grad()
  there.save_pretrained(tmp_path)
  want = trees.flatten(hf.load_folder(tmp_path).params)

  def loss(params):
    logits = lm.model.apply({'params': params}, ours).logits[..., :97]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1).mean()
  got = trees.flatten(jax.jit(jax.grad(loss))(lm.params))
  for path, x in want.items():
    np.testing.assert_allclose(np.asarray(got[path])[tuple(map(slice, x.shape))], x, atol=1e-4, err_msg=path)


def test_the_first_greedy_token_is_theirs_and_the_others_those_of_a_forward_pass(both):
  # Later ones differ: they show the whole text to itself anew for each token, where a cache keeps what was produced.
  model, lm = both
  lm.eos = ()
  run = jax.jit(lambda batch: lm.model.apply({'params': lm.params}, batch).logits)
  for seed in range(3):
    ids = np.random.default_rng(seed).integers(3, 97, 7)
    with torch.no_grad():
      first = model.generate(torch.tensor(ids[None]), max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]
    new = lm.generate([ids.tolist()], max_new_tokens=8)[0]
    assert new[0] == int(first)
    inputs = reading.pad(lm.model, [Prompt([*ids.tolist(), *new[:-1]], context=len(ids))])
    real = np.arange(inputs.tokens_BT.shape[1]) < inputs.lengths_B[:, None]
    batch = reading.batch_of(lm.model.config, jnp.asarray(inputs.tokens_BT), jnp.asarray(real), inputs)
    logits_TV = run(batch)[0, len(ids) - 1:int(inputs.lengths_B[0]), :97]
    assert new == np.argmax(logits_TV, -1).tolist()


def test_the_whole_class_goes_back_and_packs_tied_or_not(tmp_path):
  check(tmp_path / 'tied', transformers.XLNetLMHeadModel(config()), greedy=False)
  check(tmp_path / 'untied', transformers.XLNetLMHeadModel(config(tie_word_embeddings=False, n_layer=1)), greedy=False,
        packed=False)


@pytest.mark.parametrize('name', ['XLNetModel', 'XLNetForTokenClassification', 'XLNetForQuestionAnsweringSimple'])
def test_the_content_stream_alone_is_theirs(tmp_path, name):
  lm = check(tmp_path, getattr(transformers, name)(config(n_layer=1)), packed=name == 'XLNetModel')
  assert lm.model.config.structure == 'encoder'


def test_classifier_reads_the_last_token(tmp_path):
  model = randomised(transformers.XLNetForSequenceClassification(config(num_labels=3)))
  model.save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(3, 97, (3, 9))
  mask = np.arange(9) >= np.array([[0], [5], [2]])  # it pads before a text
  with torch.no_grad():
    want = model(torch.tensor(ids), attention_mask=torch.tensor(mask).float()).logits.numpy()
  np.testing.assert_allclose(jaxlm.load(str(tmp_path)).scores(ids, mask), want, atol=1e-4)


@pytest.mark.parametrize('given', [dict(attn_type='uni'), dict(clamp_len=20), dict(bi_data=True), dict(untie_r=False),
                                   dict(summary_type='first')])
def test_what_changes_the_computation_is_refused_by_name(given):
  with pytest.raises(JaxlmError, match=next(iter(given))):
    xlnet.from_hf(config().to_dict() | given)
