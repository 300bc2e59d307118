"""A loaded model: what it gives equals the bare model's forward; folders that cannot be loaded are named."""
import copy
import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config as base
from jaxlm import hf, lm as lm_module, sharding, types
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM
from jaxlm.models.config import freeze
from jaxlm.models.stack import unstack
from jaxlm.models.transformer import Transformer

END = 256


def make_config(**model):
  config = base.smoke(base.default())
  config.model.update(family='gpt2', width=16, num_layers=1, vocab_pad_to=32, max_length=48, **model)
  config.model.attention.update(num_heads=2, num_kv_heads=2, head_dim=8)
  config.model.mlp.width = 32
  return config


def make_model(config, tokenizer):
  """(model, params), parameters drawn with NumPy."""
  model = Transformer(freeze(base.resolved(config)['model'], vocab_size=tokenizer.vocab.size, visibility='causal'),
                      sharding.single(config.sharding.rules))
  dummy = {'tokens': jnp.zeros((1, 4), jnp.int32)}
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), dummy)['params'])
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


def save(folder, config, steps):
  """A run directory with a checkpoint of each {step: (params, ema)}."""
  folder.mkdir()
  tokenizer = tokenizers.bytes_tokenizer()
  tokenizer.save(folder / 'tokenizer')
  (folder / 'config.json').write_text(base.dumps(config))
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    for step, (params, ema) in steps.items():
      checkpoints.save(step, types.TrainState(jnp.int32(step), params, (), ema, jnp.zeros(2, jnp.uint32)), {})


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(folder, config, model, params) of a run."""
  config, folder = make_config(), tmp_path_factory.mktemp('runs') / 'tiny'
  model, params = make_model(config, tokenizers.bytes_tokenizer())
  save(folder, config, {3: (params, None)})
  return folder, config, model, params


@pytest.fixture(scope='module')
def lm(run):
  return jaxlm.load(run[0])


@pytest.fixture(scope='module')
def logits_of(run):
  """ids -> float32 [T, V] of the bare model."""
  _, _, model, params = run
  forward = jax.jit(lambda tokens: model.apply({'params': params}, {'tokens': tokens}).logits[0])
  def of(ids):
    tokens_BT = np.zeros((1, 48), np.int32)
    tokens_BT[0, :len(ids)] = ids
    return np.asarray(forward(tokens_BT))[:len(ids), :258]
  return of


# ---- arrays ------------------------------------------------------------------------------------------------------


def test_logits_are_the_models_over_the_real_vocabulary(lm, logits_of):
  logits_BTV = lm.logits([[1, 2, 3], [250, 257, 0]])
  assert logits_BTV.shape == (2, 3, 258) and logits_BTV.dtype == jnp.float32
  for ids, logits_TV in zip([[1, 2, 3], [250, 257, 0]], logits_BTV):
    np.testing.assert_allclose(logits_TV, logits_of(ids), atol=1e-5)  # float32, other shapes; logits reach 5


def test_padding_is_unseen_wherever_it_stands(lm, logits_of):
  tokens_BT = [[9, 9, 1, 2, 3], [1, 2, 3, 9, 9], [9, 1, 9, 2, 3]]
  mask_BT = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
  logits_BTV = np.asarray(lm.logits(tokens_BT, mask_BT))
  for row in range(3):
    np.testing.assert_allclose(logits_BTV[row][mask_BT[row] == 1], logits_of([1, 2, 3]), atol=1e-5)
  assert np.isfinite(logits_BTV).all()


def test_hidden_times_the_output_matrix_is_logits(lm):
  hidden_BTD = lm.hidden([[1, 2, 3]])
  assert hidden_BTD.shape == (1, 3, 16)
  logits_BTV = hidden_BTD @ lm.params['embed']['embedding'].T
  np.testing.assert_allclose(logits_BTV[..., :258], lm.logits([[1, 2, 3]]), atol=1e-5)


@pytest.mark.parametrize('tokens, mask, words', [
    ([1, 2], None, 'rows of one length'), ([[1, 2], [3]], None, 'rows of one length'), ('text', None, "got 'text'"),
    ([[]], None, 'not empty'), ([[258]], None, 'token id 258 is outside the vocabulary, 0 to 257'),
    ([[-1]], None, 'token id -1 is outside'), ([[0.5]], None, 'wanted token ids, got float64'),
    ([[1, 2]], [[1]], 'mask must have the shape'), ([[1] * 49], None, 'needs 49 positions; the model learned 48')])
def test_tokens_that_are_none_are_refused(lm, tokens, mask, words):
  for method in (lm.logits, lm.hidden):
    with pytest.raises(JaxlmError, match=words):
      method(tokens, mask)


# ---- text --------------------------------------------------------------------------------------------------------


def greedy(logits_of, ids, count):
  ids = list(ids)
  for _ in range(count):
    ids.append(int(logits_of(ids)[-1].argmax()))
  return ids[-count:]


def test_generate_gives_what_it_was_given(lm, logits_of):
  first, second = greedy(logits_of, [END, *b'def '], 6), greedy(logits_of, [7, 8], 6)
  text = lm.generate('def ', 6)
  assert text == bytes(i for i in first if i < 256).decode(errors='replace')
  assert lm.generate(['def ', 'x'], 6)[0] == text
  assert lm.generate([[7, 8], [END, *b'def ']], 6) == [second, first]
  assert lm.generate([7, 8], 6) == second
  assert lm.generate(np.asarray([[7, 8]]), 6) == [second]
  assert lm.generate([], 6) == []
  assert lm.generate([''], 6) == [lm.tokenizer.decode(greedy(logits_of, [END], 6))]


@pytest.fixture(scope='module')
def alphabet():
  """An LM that continues with the alphabet: logits of a token's successor are highest."""
  config = make_config(tie_embeddings=False)
  config.model.update(width=258, num_layers=1)
  config.model.positions.kind = 'none'
  config.model.residual.final_norm = False
  tokenizer = tokenizers.bytes_tokenizer()
  model, params = make_model(config, tokenizer)
  params = jax.tree.map(lambda x: x * 0, params)
  rows = np.zeros((model.config.padded_vocab, 258), np.float32)
  rows[np.arange(258), np.arange(258)] = 1.0
  head = np.roll(rows[:258], 1, axis=0)
  head[END], head[ord('z') + 1], head[ord('a')] = rows[ord('z')], 0, rows[END]  # z ends a text, a begins it
  params['embed']['embedding'] = jnp.asarray(rows)
  params['head'] = jnp.asarray(np.concatenate([head, rows[258:]]))
  return lm_module.LM(config, model, params, tokenizer)


def test_the_end_token_ends_a_text_and_is_no_part_of_it(alphabet):
  assert alphabet.generate('uv', 20) == 'wxyz'
  assert alphabet.generate([ord('w')], 20) == [*b'xyz', END]
  assert alphabet.generate('', 40) == 'abcdefghijklmnopqrstuvwxyz'


def test_stops_are_cut_from_text_and_end_ids(alphabet):
  assert alphabet.generate(['a', 'f'], 20, stop='gh') == ['bcdef', '']
  assert alphabet.generate('a', 40, stop=['x', 'de', 'q']) == 'bc'
  assert alphabet.generate([ord('a')], 40, stop=['de']) == [*b'bcde']
  assert alphabet.generate('a', 5, stop=['zz']) == 'bcdef'
  assert alphabet.generate('a', 40, stop=['de'], num_beams=2) == 'bc'
  for stop in ('', ['a', ''], [3]):
    with pytest.raises(JaxlmError, match='stop must be texts'):
      alphabet.generate('a', 5, stop=stop)


def test_what_is_added_to_texts_is_heard_while_it_is_produced(alphabet):
  for given in (dict(), dict(stop=['qr']), dict(lookup=2), dict(draft=alphabet, stop='zz')):
    heard = {0: [], 1: []}
    told = alphabet.generate(['a', 'f'], 20, heard=lambda row, text: heard[row].append(text), **given)
    assert told == [''.join(heard[row]) for row in (0, 1)] == alphabet.generate(['a', 'f'], 20, **given)
    assert all(len(pieces) > 1 and all(pieces) for pieces in heard.values())
  ids = []
  assert alphabet.generate([ord('a')], 9, heard=lambda row, new: ids.extend(new)) == ids == [*b'bcdefghij']


def test_a_character_that_is_not_whole_is_not_heard(alphabet, monkeypatch):
  in_two = {ord('d'): 0xc3, ord('e'): 0xa9}
  monkeypatch.setattr(type(alphabet.tokenizer), 'decode', lambda self, ids: bytes(
      in_two.get(id, id) for id in ids if id < 256).decode(errors='replace'))
  monkeypatch.setattr('jaxlm.lm.HEARD', 1)
  heard = []
  alphabet.generate('a', 5, heard=lambda row, text: heard.append(text))
  assert heard == ['b', 'c', 'é', 'f']


def test_a_draft_model_reads_the_same_ids(alphabet, lm):
  other = copy.copy(alphabet)
  other.tokenizer = dataclasses.make_dataclass('Other', ['digest'])('another')
  with pytest.raises(JaxlmError, match='The draft model has another tokenizer'):
    alphabet.generate('a', 4, draft=other)


def test_draws_are_told_by_the_seed(lm):
  draw = lambda seed: lm.generate([[1], [2]], 12, temperature=1.0, top_k=40, seed=seed)
  assert draw(1) == draw(1) != draw(2)


def test_what_is_neither_text_nor_ids_is_refused(lm):
  for prompts in (['a', [1]], [[1], 'a'], [3.5], [None], [['a']]):
    with pytest.raises(JaxlmError):
      lm.generate(prompts, 4)


# ---- scores ------------------------------------------------------------------------------------------------------


def exact(logits_of, ids, count):
  logp_TV = np.asarray(jax.nn.log_softmax(logits_of(ids[:-1])))
  places = range(len(ids) - 1 - count, len(ids) - 1)
  return (sum(float(logp_TV[t, ids[t + 1]]) for t in places), count,
          all(logp_TV[t].argmax() == ids[t + 1] for t in places))


def test_scores_are_sums_of_log_softmax_of_the_full_forward(lm, logits_of):
  contexts, continuations = ['the ', '', 'a', 'long context, long'], ['cat', 'sat', '', ' continuation']
  wanted = [([END, *b'the cat'], 4), ([END, *b'sat'], 3), ([END, *b'a'], 0),
            ([END, *b'long context, long continuation'], 13)]  # a space before a word is the continuation's
  for found, pair in zip(lm.score(contexts, continuations), wanted, strict=True):
    nats, count, is_greedy = exact(logits_of, *pair)
    assert found == (pytest.approx(nats, rel=1e-5), count, is_greedy)


def test_a_greedy_continuation_scores_as_greedy(lm, logits_of):
  ids = greedy(logits_of, [5, 6, 7], 5)
  other = ids[:-1] + [(ids[-1] + 1) % 256]
  (first, count, is_greedy), (second, _, is_other_greedy) = lm.score([[5, 6, 7]] * 2, [ids, other], batch_size=1)
  assert is_greedy and not is_other_greedy and count == 5 and second < first < 0


def test_the_end_of_a_long_context_is_read(lm, logits_of):
  ids = [*range(60)]
  assert lm.score([ids[:57]], [ids[57:]])[0][0] == pytest.approx(exact(logits_of, ids[-49:], 3)[0], rel=1e-5)
  with pytest.raises(JaxlmError, match='Continuation 0 needs 50 positions'):
    lm.score([[1]], [[2] * 50])


def test_a_space_behind_what_an_encoder_reads_is_the_continuations():
  config, tokenizer = make_config(structure='encoder_decoder'), tokenizers.bytes_tokenizer()
  lm = LM(config, *make_model(config, tokenizer), tokenizer, prompting=lambda ids: types.Prompt([END], ids))
  one, two, three = lm.score(['ab \n', 'ab', 'ab'], ['cd', ' \ncd', 'cd'])
  logits_TV = lm.logits([[END, *b' \nc']], [[*lm.start, *b'ab', *lm.end]])[0]
  logp_TV = np.asarray(jax.nn.log_softmax(logits_TV))
  assert one == two and one[:2] == (pytest.approx(logp_TV[range(4), [*b' \ncd']].sum(), rel=1e-5), 4) and three[1] == 2


def test_pairs_that_do_not_match_are_refused(lm):
  for contexts, continuations in ((['a'], []), ('a', 'b'), (['a'], [[1]])):
    with pytest.raises(JaxlmError):
      lm.score(contexts, continuations)


def test_an_embedding_is_the_mean_of_hidden_states(lm):
  found = lm.embed(['ab', 'a longer text'])
  assert found.shape == (2, 16) and found.dtype == np.float32
  for text, mean_D in zip((b'ab', b'a longer text'), found):
    np.testing.assert_allclose(mean_D, np.asarray(lm.hidden([[END, *text]]))[0].mean(0), atol=1e-5)
  np.testing.assert_allclose(lm.embed('ab'), found[0], atol=1e-5)


# ---- loading -----------------------------------------------------------------------------------------------------


def test_a_run_that_kept_an_average_gives_it(tmp_path, run):
  _, config, _, params = run
  config = base.loads(base.dumps(config))
  config.optim.ema_decay = 0.9
  half = jax.tree.map(lambda x: x / 2, params)
  save(tmp_path / 'ema', config, {1: (half, params), 2: (params, half)})
  loaded = jaxlm.load(tmp_path / 'ema')
  np.testing.assert_array_equal(loaded.params['embed']['embedding'], half['embed']['embedding'])


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_alone(tmp_path, run):
  _, config, _, params = run
  save(tmp_path / 'r', config, {1: (params, None), 2: (jax.tree.map(lambda x: x * 2, params), None)})
  newest = tmp_path / 'r' / 'checkpoints' / '2'
  (newest / 'manifest.json').unlink()
  loaded = jaxlm.load(tmp_path / 'r')
  np.testing.assert_array_equal(loaded.params['embed']['embedding'], params['embed']['embedding'])
  assert newest.is_dir()


def test_a_mesh_computes_what_one_device_computes(run, lm):
  loaded = jaxlm.load(run[0], mesh=dict(data=2, fsdp=2, tensor=2))
  assert dict(loaded.mesh.shape)['tensor'] == 2
  assert len(loaded.params['stack']['layer_0']['mlp']['up']['kernel'].sharding.device_set) == 8
  np.testing.assert_allclose(loaded.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), atol=1e-5)


def test_dtype_is_of_parameters_and_computing(run, lm):
  loaded = jaxlm.load(run[0], dtype='bfloat16')
  assert loaded.params['embed']['embedding'].dtype == jnp.bfloat16 and loaded.model.config.dtype == jnp.bfloat16
  # bfloat16 keeps 8 bits: logits near 5 are off by some hundredths.
  np.testing.assert_allclose(loaded.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), atol=0.2)
  with pytest.raises(JaxlmError, match="dtype must be 'float32', 'bfloat16' or None; got 'int8'"):
    jaxlm.load(run[0], dtype='int8')


def test_a_hugging_face_folder_gives_the_same_model(tmp_path, run, lm):
  _, _, model, params = run
  hf.save_folder(tmp_path / 'hf', model.config, unstack(params, model.config), tokenizer=lm.tokenizer)
  loaded = jaxlm.load(tmp_path / 'hf')
  np.testing.assert_allclose(loaded.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), atol=1e-6)
  assert loaded.tokenizer.digest == lm.tokenizer.digest and loaded.eos == lm.eos
  assert loaded.start == []  # its tokenizer puts nothing before a text
  (tmp_path / 'hf' / 'generation_config.json').write_text(json.dumps({'eos_token_id': [3, 4]}))
  assert jaxlm.load(tmp_path / 'hf').eos == (3, 4)


def test_a_body_without_a_head_gives_hidden_states_alone(tmp_path, run):
  _, _, model, params = run
  body = dataclasses.replace(model.config, head=dataclasses.replace(model.config.head, lm=False), tie_embeddings=True)
  layers = {name: x for name, x in unstack(params, model.config).items() if name != 'head'}
  hf.save_folder(tmp_path / 'body', body, layers)
  loaded = jaxlm.load(tmp_path / 'body')
  assert loaded.hidden([[1, 2]]).shape == (1, 2, 16)
  for call in (lambda: loaded.logits([[1]]), lambda: loaded.generate([[1]]), lambda: loaded.score([[1]], [[2]])):
    with pytest.raises(JaxlmError, match='needs an output layer'):
      call()
  with pytest.raises(JaxlmError, match='needs a tokenizer'):
    loaded.embed('text')


def test_folders_that_hold_no_model_are_named(tmp_path, run):
  folder, config, _, _ = run
  told = 'nowhere is not there; give a run directory, a Hugging Face folder or a GGUF file.'
  with pytest.raises(JaxlmError, match=told):
    jaxlm.load(tmp_path / 'nowhere')
  with pytest.raises(JaxlmError, match='has no config.json'):
    jaxlm.load(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(JaxlmError, match='is not JSON'):
    jaxlm.load(tmp_path)
  (tmp_path / 'config.json').write_text('{"model": {}}')
  with pytest.raises(JaxlmError, match='config.seed is missing'):
    jaxlm.load(tmp_path)
  (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
  with pytest.raises(JaxlmError, match='tokenizer'):
    jaxlm.load(tmp_path)
  tokenizers.bytes_tokenizer().save(tmp_path / 'tokenizer')
  with pytest.raises(JaxlmError, match='no checkpoint'):
    jaxlm.load(tmp_path)
  assert not (tmp_path / 'checkpoints').exists()


def test_attention_of_a_row_sums_to_one_and_sees_no_future(lm):
  (probs_BNTT,) = lm.attention([[1, 2, 3, 4, 5]])
  assert probs_BNTT.shape == (1, 2, 5, 5)
  np.testing.assert_allclose(probs_BNTT.sum(-1), 1, atol=1e-6)  # float32
  assert not np.triu(probs_BNTT, 1).any()
