"""Reading config.json: understood, harmless, or refused by name."""
import pytest

from jaxlm import hf
from jaxlm.errors import JaxlmError
from jaxlm.families import gpt2, keys, llama, table
from jaxlm.models.config import freeze

PARTS = dict(head_dim=8, max_length=64)


@pytest.mark.parametrize('key, value, told', [
    ('scale_attn_by_inverse_layer_idx', True, 'scale_attn_by_inverse_layer_idx=True changes what is computed'),
    ('add_cross_attention', True, 'add_cross_attention=True changes'),
    ('activation_function', 'quick_gelu', "unknown activation_function 'quick_gelu'"),
    ('activation_function', 'gelu_newt', "Did you mean 'gelu_new'"),
    ('n_layers', 3, "n_layers=3 is not understood .* Did you mean 'n_layer'"),
    ('quantization_config', {'bits': 4}, 'quantization_config=.* is not understood'),
    ('n_embd', 770, 'n_embd=770 does not divide by n_head=12'),
    ('n_embd', 0, 'n_embd must be a whole number from 1'),
    ('n_embd', 2 ** 31, 'n_embd must be a whole number'),
    ('n_embd', True, 'n_embd must be a whole number'),
    ('n_embd', None, 'n_embd must be a whole number'),
    ('layer_norm_epsilon', 'small', "layer_norm_epsilon must be a number; got 'small'"),
    ('layer_norm_epsilon', float('nan'), 'layer_norm_epsilon must be a number'),
    ('tie_word_embeddings', 'no', 'tie_word_embeddings must be true or false'),
])
def test_gpt2_refuses_by_name_what_it_does_not_understand(key, value, told):
  with pytest.raises(JaxlmError, match=told) as error:
    gpt2.from_hf({key: value})
  assert '\n' not in str(error.value)


def test_keys_of_training_generation_and_bookkeeping_are_passed_over():
  plain = gpt2.from_hf({})
  assert gpt2.from_hf(dict(resid_pdrop=0.3, summary_type='last', n_ctx=1024, task_specific_params={'a': 1}, top_k=50,
                           _name_or_path='gpt2', transformers_version='4.1', bos_token_id=5, torch_dtype='float16',
                           some_new_switch=False, another=None)) == plain


def test_defaults_are_those_of_the_reference():
  transformers = pytest.importorskip('transformers')
  for family, config in ((gpt2, transformers.GPT2Config()), (llama, transformers.LlamaConfig())):
    assert family.from_hf({}) == family.from_hf(config.to_dict())


OLD = dict(rope_theta=500.0, rope_scaling=dict(type='linear', factor=2.0))
NEW = dict(rope_parameters=dict(rope_type='linear', rope_theta=500.0, factor=2.0))


def test_both_forms_of_rotary_scaling_read_alike():
  assert keys.rope(OLD, **PARTS) == keys.rope(NEW, **PARTS)
  assert keys.rope(NEW, **PARTS) == dict(base=500.0, scaling='linear', factor=2.0, original_length=64)


def test_yarn_derives_what_is_left_out_as_the_reference_does():
  yarn = lambda **more: keys.rope(dict(rope_scaling=dict(rope_type='yarn', **more)), **PARTS)
  assert yarn(factor=4.0)['attention_factor'] == 0.0  # derived in positions.py
  assert yarn(original_max_position_embeddings=16)['factor'] == 4.0
  assert yarn(factor=4.0, mscale=1.0, mscale_all_dim=1.0)['attention_factor'] == 1.0


@pytest.mark.parametrize('rope, told', [
    (dict(rope_type='dynamic', factor=2.0), "unknown rope_type 'dynamic'.*change with the length"),
    (dict(rope_type='su'), "unknown rope_type 'su'"),
    (dict(rope_type=['yarn']), 'rope_type must be text'),
    (dict(rope_type='linear'), 'rope_parameters.factor must be a number; got None'),
    (dict(rope_type='linear', factor=2.0, offset=1), 'offset=1 is not understood'),
    (dict(rope_type='yarn', factor=2.0, truncate=False), 'truncate=False is not understood'),
    (dict(rope_type='yarn', factor='2', mscale=1, mscale_all_dim=1), 'factor must be a number'),
    (dict(rope_type='llama3', factor=2.0, low_freq_factor=4, high_freq_factor=4), 'low_freq_factor=4.0 must be below'),
    (dict(rope_type='default', partial_rotary_factor=0.5), 'partial_rotary_factor must be 1'),
    (dict(full_attention=dict(rope_type='default')), 'full_attention=.* is not understood'),
    (dict(rope_theta='big'), 'rope_theta must be a number'),
    ('linear', 'rope_parameters must be an object'),
])
def test_rotary_scalings_that_are_not_understood_are_refused(rope, told):
  with pytest.raises(JaxlmError, match=told):
    keys.rope(dict(rope_parameters=rope), **PARTS)


@pytest.mark.parametrize('given, want', [
    (dict(), 0.5), (dict(partial_rotary_factor=0.25), 0.25),
    (dict(rope_parameters=dict(partial_rotary_factor=1.0)), 1.0)])
def test_part_of_a_head_may_rotate_where_the_family_says_so(given, want):
  assert keys.rope(given, head_dim=16, max_length=64, fraction=0.5)['fraction'] == want


@pytest.mark.parametrize('part, told', [(0.0, 'must be above 0 and at most 1'), (1.5, 'must be above 0'),
                                        (0.2, 'head_dim=16 of which 3 rotate'), ('half', 'must be a number')])
def test_parts_of_a_head_that_cannot_rotate_are_refused(part, told):
  with pytest.raises(JaxlmError, match=told):
    keys.rope(dict(partial_rotary_factor=part), head_dim=16, max_length=64, fraction=1.0)


LINEAR = dict(rope_type='linear', factor=8.0)
BY_LAYER = (  # Gemma 3's forms, of transformers 5 and 4, and what is left out
    (dict(rope_parameters=dict(full_attention=dict(LINEAR, rope_theta=5e5),
                               sliding_attention=dict(rope_type='default', rope_theta=2e4))),
     (5e5, 'linear', 8.0, 2e4)),
    (dict(rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=LINEAR), (5e5, 'linear', 8.0, 2e4)),
    (dict(), (1e6, 'none', 1.0, 1e4)),
    (dict(rope_parameters=dict(full_attention=dict(rope_type='default'), sliding_attention=None)),
     (1e6, 'none', 1.0, 1e4)))


@pytest.mark.parametrize('given, want', BY_LAYER)
def test_layers_with_a_window_may_have_a_base_of_their_own(given, want):
  found = keys.rope_by_layer(given, base=1e6, local_base=1e4, **PARTS)
  assert (found['base'], found['scaling'], found['factor'], found['local_base']) == want
  whole = hf.whole_model(dict(positions=dict(kind='rope', rope=found)))
  theirs = keys.their_rope_by_layer(freeze(whole, vocab_size=1, visibility='causal').positions.rope)
  assert keys.rope_by_layer(theirs, base=1.0, local_base=1.0, **PARTS) == found


def test_a_scaling_of_layers_with_a_window_is_refused():
  given = dict(rope_parameters=dict(full_attention=dict(rope_type='default'), sliding_attention=LINEAR))
  with pytest.raises(JaxlmError, match='scale layers of type sliding_attention; only full_attention'):
    keys.rope_by_layer(given, base=1e6, local_base=1e4, **PARTS)


F, S = keys.FULL, keys.SLIDING


@pytest.mark.parametrize('kinds, window, want', [
    ([S, S, F] * 2, 8, (8, 8, 0)), ([S, S, F, S], 8, (8, 8, 0)), ([F] * 4, 8, (0,)), ([S] * 4, 8, (8,)),
    ([S, F], None, (0,)),
    (None, 8, (8,)), (None, None, (0,)), ([F, S, S, F, F], 8, (0, 8, 8, 0))])
def test_windows_are_the_shortest_period_of_the_layer_types_and_go_back(kinds, window, want):
  length = len(kinds or [S] * 3)
  assert keys.windows(kinds, window, length) == want
  whole = hf.whole_model(dict(num_layers=length, attention=dict(windows=want)))
  model = freeze(whole, vocab_size=1, visibility='causal')
  if window:
    assert keys.windows(keys.their_layer_types(model), keys.their_window(model), length) == want


def test_layer_types_that_are_none_are_refused():
  for kinds, told in ((['x', F], "unknown layer type 'x'"), ([F], '1 entries for 2 layers'), ('x', 'must be a list'),
                      ([[F], F], 'unknown layer type')):
    with pytest.raises(JaxlmError, match=told):
      keys.windows(kinds, 8, 2)
  model = freeze(hf.whole_model(dict(attention=dict(windows=(4, 8)))), vocab_size=1, visibility='causal')
  with pytest.raises(JaxlmError, match=r'windows of \[4, 8\] tokens; there is room for one'):
    keys.their_window(model)


def test_rotary_positions_refuse_odd_heads():
  with pytest.raises(JaxlmError, match='even size; got head_dim=7'):
    llama.from_hf(dict(head_dim=7))


@pytest.mark.parametrize('model_type', ['gpt5', None, ['gpt2'], ''])
def test_unknown_model_types_are_refused(model_type):
  with pytest.raises(JaxlmError, match='unknown model_type .* Known: .*gpt2.*llama'):
    table.by_model_type(model_type)


def test_a_family_without_hugging_face_form_says_so():
  with pytest.raises(JaxlmError, match="family 'gpt3' have no Hugging Face form; those of .*gpt2.*llama.* have"):
    table.by_name('gpt3')


@pytest.mark.parametrize('family', [gpt2, llama], ids=lambda f: f.MODEL_TYPE)
def test_no_value_of_any_key_ends_in_anything_but_one_line(family):
  odd = (None, True, 0, -1, 3, 2 ** 80, 0.5, float('inf'), '', 'x', [], [1], {}, {'a': 1}, {'rope_type': 3})
  for key in [*family.KEYS, *getattr(family, 'FIXED', {}), 'rope_scaling', 'rope_theta', 'unknown']:
    for value in odd:
      try:
        family.from_hf({key: value})
      except JaxlmError as e:
        assert '\n' not in str(e) and str(e).startswith('config.json: ')
