"""Reading a Hugging Face config.json: every key is understood, known to be harmless, or refused by name."""
import math
import re
from typing import Any, Mapping

from jaxlm.lookup import nearest
from jaxlm.types import JaxlmError

# Keys that change nothing that is computed: names, training, generation, what a call returns.
HARMLESS = re.compile(
    r'_.*|architectures|model_type|(torch_)?dtype|.*transformers_version|name_or_path|use_cache|use_return_dict|'
    r'output_.*|return_dict.*|.*_token_ids?|tokenizer_class|prefix|initializer_range|gradient_checkpointing|'
    r'.*_p?dropout|.*_pdrop|num_labels|id2label|label2id|problem_type|finetuning_task|task_specific_params|torchscript|'
    r'tf_legacy_loss|use_bfloat16|pretraining_tp|cross_attention_hidden_size|is_decoder|is_encoder_decoder|'
    r'chunk_size_feed_forward|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|'
    r'diversity_penalty|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|'
    r'encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|exponential_decay_length_penalty|'
    r'suppress_tokens|begin_suppress_tokens|remove_invalid_values|unsloth_.*')

# Their activations as ours; the first that gives one of ours is what export writes.
ACTIVATIONS = {
    'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh', 'gelu': 'gelu', 'gelu_python': 'gelu', 'relu': 'relu', 'relu2': 'relu2',
    'silu': 'silu', 'swish': 'silu'}

KINDS = {int: 'a whole number from 1 to 2147483647', float: 'a number', bool: 'true or false', str: 'text',
         dict: 'an object'}


def _is(value: Any, kind: type) -> bool:
  if kind is int:
    return type(value) is int and 0 < value < 2 ** 31  # sizes; jax counts dims in int32
  if kind is float:
    return type(value) in (int, float) and abs(value) < 3e38  # and so no nan
  return isinstance(value, kind)


def check(key: str, value: Any, kind: type) -> Any:
  """The value, which must be of that kind."""
  if not _is(value, kind):
    raise JaxlmError(f'config.json: {key} must be {KINDS[kind]}; got {value!r}.')
  return value


def read(given: Mapping[str, Any], known: Mapping[str, tuple[type, Any]], fixed: Mapping[str, Any],
         harmless: str = '') -> dict[str, Any]:
  """Values of the known keys, with what `transformers` takes where one is left out.

  Args:
    given: a config.json.
    known: {key: (kind, default)}; None is allowed where it is the default.
    fixed: {key: the only value that the family's block computes}.
    harmless: pattern of further keys of this family that change nothing computed.
  Raises:
    JaxlmError: a value of another kind, a fixed key with another value, or a key that is in none of these and says
      anything: not null, false, 0 or empty.
  """
  values = {}
  for key, (kind, default) in known.items():
    value = given.get(key, default)
    values[key] = value if value is None and default is None else check(key, value, kind)
  for key, value in given.items():
    if key in fixed and value != fixed[key]:
      raise JaxlmError(f'config.json: {key}={value!r} changes what is computed, and this family is built with '
                       f'{fixed[key]!r} only; its weights cannot be used here.')
    understood = key in known or key in fixed or HARMLESS.fullmatch(key) or re.fullmatch(harmless, key)
    if value and not understood:
      raise JaxlmError(f'config.json: {key}={value!r} is not understood and may change what is computed. If it does '
                       'not, remove it from the file.' + nearest(key, known))
  return values


def activation(key: str, name: str) -> str:
  """Our name of their activation."""
  if name not in ACTIVATIONS:
    raise JaxlmError(f'config.json: unknown {key} {name!r}. Known: {", ".join(ACTIVATIONS)}.'
                     + nearest(name, ACTIVATIONS))
  return ACTIVATIONS[name]


def their_activation(name: str) -> str:
  """Their name of our activation."""
  for theirs, ours in ACTIVATIONS.items():
    if ours == name:
      return theirs
  raise JaxlmError(f'Activation {name!r} has no name there; {", ".join(sorted(set(ACTIVATIONS.values())))} have.')


def heads(width_key: str, width: int, heads_key: str, num_heads: int) -> int:
  """The size of a head where heads divide the width."""
  if width % num_heads:
    raise JaxlmError(f'config.json: {width_key}={width} does not divide by {heads_key}={num_heads}.')
  return width // num_heads


# ---- rotary positions --------------------------------------------------------------------------------------------

MOVING = ('dynamic', 'longrope')  # rope_types that rotate by the length of the whole text

# Keys of a config.json that `rope` reads.
ROPE = r'rope_(parameters|scaling|theta)|partial_rotary_factor|original_max_position_embeddings'

# What each rope_type reads beside rope_theta: {their key: (kind, default)}; ours has the same names but for these.
RENAMED = {'original_max_position_embeddings': 'original_length'}
SCALINGS = {
    'default': {},
    'linear': dict(factor=(float, None)),
    'llama3': dict(factor=(float, None), low_freq_factor=(float, None), high_freq_factor=(float, None),
                   original_max_position_embeddings=(int, None)),
    'yarn': dict(factor=(float, None), original_max_position_embeddings=(int, None), beta_fast=(float, 32.0),
                 beta_slow=(float, 1.0), attention_factor=(float, 0.0)),
}


def rope(given: Mapping[str, Any], head_dim: int, max_length: int) -> dict[str, Any]:
  """config.model.positions.rope from `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.

  Raises:
    JaxlmError: a rope_type, or a key of it, that is not understood. 'dynamic' and 'longrope' are refused: their
      rotations change with the length of the whole text, so keys already in a cache would have to change, too.
  """
  found = given.get('rope_scaling') or given.get('rope_parameters') or {}
  theirs = dict(check('rope_parameters', found, dict))
  kind = check('rope_type', theirs.pop('rope_type', None) or theirs.get('type') or 'default', str)
  base = check('rope_theta', theirs.pop('rope_theta', None) or given.get('rope_theta') or 10_000.0, float)
  theirs.pop('type', None)
  if kind not in SCALINGS:
    raise JaxlmError(f'config.json: unknown rope_type {kind!r}. Known: {", ".join(SCALINGS)}.'
                     + (' Its rotations change with the length of the text.' if kind in MOVING else ''))
  if kind in ('llama3', 'yarn'):
    trained = given.get('original_max_position_embeddings') or theirs.get('original_max_position_embeddings')
    theirs['original_max_position_embeddings'] = check('original_max_position_embeddings', trained or max_length, int)
  if kind == 'yarn':
    _finish_yarn(theirs, max_length)
  rotated = theirs.pop('partial_rotary_factor', None), given.get('partial_rotary_factor')
  if any(part not in (1, None) for part in rotated):
    raise JaxlmError('config.json: partial_rotary_factor must be 1 here; this family rotates whole heads.')
  if head_dim % 2:
    raise JaxlmError(f'config.json: rotary positions need heads of an even size; got head_dim={head_dim}.')
  ours = dict(base=float(base), scaling='none' if kind == 'default' else kind, factor=1.0, original_length=max_length)
  for key, (sort, default) in SCALINGS[kind].items():
    value = theirs.pop(key, None)
    value = check(f'rope_parameters.{key}', default if value is None else value, sort)
    ours[RENAMED.get(key, key)] = float(value) if sort is float else value
  if kind == 'llama3' and not ours['low_freq_factor'] < ours['high_freq_factor']:
    raise JaxlmError(f'config.json: low_freq_factor={ours["low_freq_factor"]} must be below '
                     f'high_freq_factor={ours["high_freq_factor"]}.')
  if kind == 'default':  # which reads no numbers of a scaling, though a file may hold them
    theirs = {key: value for key, value in theirs.items() if type(value) not in (int, float, bool)}
  left = [key for key, value in theirs.items() if value is not None]
  if left:
    raise JaxlmError(f'config.json: rope_type {kind!r} with {left[0]}={theirs[left[0]]!r} is not understood.')
  return ours


def _finish_yarn(theirs: dict[str, Any], max_length: int) -> None:
  """Settles, in place, what YaRN derives from its other keys."""
  if theirs.get('factor') is None:
    theirs['factor'] = max_length / theirs['original_max_position_embeddings']
  mscale, mscale_all = theirs.pop('mscale', None), theirs.pop('mscale_all_dim', None)
  if mscale and mscale_all and not theirs.get('attention_factor'):
    factor = check('rope_parameters.factor', theirs['factor'], float)
    of = lambda m: 0.1 * check('mscale', m, float) * math.log(factor) + 1.0 if factor > 1 else 1.0
    theirs['attention_factor'] = of(mscale) / of(mscale_all)
  if theirs.get('truncate') is True:  # the only way it is computed here, and the default
    del theirs['truncate']


def their_rope(ours: Any) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling`, the form that transformers 4 and 5 both read, of a RopeConfig."""
  if ours.scaling not in SCALINGS:
    return dict(rope_theta=ours.base, rope_scaling=None)
  keys = SCALINGS[ours.scaling]
  values = {key: getattr(ours, RENAMED.get(key, key)) for key in keys}
  values = {key: value for key, value in values.items() if (key, value) != ('attention_factor', 0.0)}  # 0: derived
  return dict(rope_theta=ours.base, rope_scaling=dict(rope_type=ours.scaling, **values))
