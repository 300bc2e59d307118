"""Reading a Hugging Face config.json: every key is understood, known to be harmless, or refused by name."""
import math
import re
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest

# Keys that change nothing that is computed: names, training, generation, what a call returns.
HARMLESS = re.compile(
    r'_.*|architectures|model_type|(torch_)?dtype|.*transformers_version|name_or_path|use_cache|use_return_dict|'
    r'output_.*|return_dict.*|.*_token_ids?|tokenizer_class|prefix|initializer_range|gradient_checkpointing|'
    r'.*_p?dropout|.*_pdrop|num_labels|id2label|label2id|problem_type|finetuning_task|task_specific_params|torchscript|'
    r'tf_legacy_loss|use_bfloat16|pretraining_tp|cross_attention_hidden_size|is_decoder|is_encoder_decoder|'
    r'chunk_size_feed_forward|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|'
    r'diversity_penalty|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|'
    r'encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|exponential_decay_length_penalty|'
    r'suppress_tokens|begin_suppress_tokens|remove_invalid_values|unsloth_.*|.*_dropout_prob|save_step|'
    r'is_llama_config|max_sequence_length|transformers\.js_config|sentence_transformers|'
    r'sbert_ce_default_activation_function')

# Of those, what a folder said of how it was trained, which stays as it was.
CHOICES = r'initializer_range|.*_p?dropout|.*_pdrop|.*_dropout_prob'

# Their activations as ours; the first that gives one of ours is what export writes.
ACTIVATIONS = {
    'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh', 'gelu': 'gelu', 'gelu_python': 'gelu', 'relu': 'relu', 'relu2': 'relu2',
    'silu': 'silu', 'swish': 'silu'}


class Index(int):
  """A kind of value: a whole number that may be 0, as ids and counts of layers may."""


KINDS = {int: 'a whole number from 1 to 2147483647', Index: 'a whole number from 0 to 2147483647', float: 'a number',
         bool: 'true or false', str: 'text', dict: 'an object', list: 'a list'}


def _is(value: Any, kind: type) -> bool:
  if kind in (int, Index):  # jax counts dims in int32
    return type(value) is int and (0 if kind is Index else 1) <= value < 2 ** 31
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


def under(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  """The same config.json with older names of keys replaced.

  Raises:
    JaxlmError: a key stands there under both names, with different values.
  """
  found = {key: value for key, value in given.items() if key not in names}
  for old, name in names.items():
    if given.get(old) is not None and found.setdefault(name, given[old]) != given[old]:
      raise JaxlmError(f'config.json: {name}={found[name]!r} and {old}={given[old]!r} are names of one size.')
  return found


def read_gguf(meta: Mapping[str, Any], needed: Mapping[str, str], known: Mapping[str, str | None]) -> dict[str, Any]:
  """Values of a GGUF file's metadata under the names that config.json has for them.

  Args:
    meta: without the architecture's name before each key.
    needed: {their key: the one of config.json} that every file has.
    known: likewise of those that a file may lack; None where the family looks at it itself.
  Raises:
    JaxlmError: a key that is missing, or in none of these and says anything, or is no number.
  """
  for key in needed:
    if key not in meta:
      raise JaxlmError(f'GGUF: {key} is missing, without which the model is not known.')
  known = {**needed, **known}
  for key, value in meta.items():
    if key not in known and value:
      raise JaxlmError(f'GGUF: {key}={value!r} is not understood and may change what is computed.'
                       + nearest(key, known))
  found = {name: meta[key] for key, name in known.items() if name and key in meta}
  for name, value in found.items():
    if type(value) not in (int, float):
      raise JaxlmError(f'GGUF: {name} must be a number; got {value!r}.')
  return found


def renamed(name: str, names: Mapping[str, str]) -> str:
  """A tensor's name with parts of it replaced."""
  for part, other in names.items():
    name = name.replace(part, other)
  return name


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


# ---- layers that see a window -------------------------------------------------------------------------------------

FULL, SLIDING = 'full_attention', 'sliding_attention'  # what layer_types says of each layer


def windows(layer_types: Any, window: int | None, num_layers: int) -> tuple[int, ...]:
  """config.model.attention.windows, the shortest period of them.

  Args:
    layer_types: a list with a type for each layer; None: all slide, if there is a window.
    window: tokens that sliding layers see, as config.model.attention.windows counts them; None: all are seen.
    num_layers: as many as the list must have.
  Raises:
    JaxlmError: a list of another length, or with a type that is neither.
  """
  kinds = [SLIDING] * num_layers if layer_types is None else check('layer_types', layer_types, list)
  if len(kinds) != num_layers:
    raise JaxlmError(f'config.json: layer_types has {len(kinds)} entries for {num_layers} layers.')
  for kind in kinds:
    if kind not in (FULL, SLIDING):
      raise JaxlmError(f'config.json: unknown layer type {kind!r}. Known: {FULL}, {SLIDING}.')
  seen = [window if kind == SLIDING and window else 0 for kind in kinds]
  period = next(n for n in range(1, num_layers + 1) if all(seen[i] == seen[i % n] for i in range(num_layers)))
  return tuple(seen[:period])


def their_layer_types(model: Any) -> list[str]:
  """`layer_types` of a ModelConfig."""
  return [SLIDING if model.window(layer) else FULL for layer in range(model.num_layers)]


def their_window(model: Any) -> int | None:
  """The one window that layers of a ModelConfig have; None where all see everything.

  Raises:
    JaxlmError: they have several.
  """
  found = sorted({model.window(layer) for layer in range(model.num_layers)} - {0})
  if len(found) > 1:
    raise JaxlmError(f'layers have windows of {found} tokens; there is room for one.')
  return found[0] if found else None


# ---- rotary positions --------------------------------------------------------------------------------------------

MOVING = ('dynamic', 'longrope')  # rope_types that rotate by the length of the whole text

# Keys of a config.json that `rope` reads.
ROPE = r'rope_(parameters|scaling|theta|local_base_freq)|partial_rotary_factor|original_max_position_embeddings'

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


def rope(given: Mapping[str, Any], head_dim: int, max_length: int, base: float = 10_000.0,
         fraction: float | None = None) -> dict[str, Any]:
  """config.model.positions.rope from `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.

  Args:
    given: a config.json; or, in its place, one that says under these names what it says under others.
    head_dim: of a head.
    max_length: max_position_embeddings.
    base: what the family takes where rope_theta is not given.
    fraction: likewise of partial_rotary_factor; None: a family whose heads rotate whole.
  Raises:
    JaxlmError: a rope_type, or a key of it, that is not understood. 'dynamic' and 'longrope' are refused: their
      rotations change with the length of the whole text, so keys already in a cache would have to change, too.
  """
  found = given.get('rope_scaling') or given.get('rope_parameters') or {}
  theirs = dict(check('rope_parameters', found, dict))
  kind = check('rope_type', theirs.pop('rope_type', None) or theirs.get('type') or 'default', str)
  base = check('rope_theta', theirs.pop('rope_theta', None) or given.get('rope_theta') or base, float)
  theirs.pop('type', None)
  if kind not in SCALINGS:
    raise JaxlmError(f'config.json: unknown rope_type {kind!r}. Known: {", ".join(SCALINGS)}.'
                     + (' Its rotations change with the length of the text.' if kind in MOVING else ''))
  if kind in ('llama3', 'yarn'):
    trained = given.get('original_max_position_embeddings') or theirs.get('original_max_position_embeddings')
    theirs['original_max_position_embeddings'] = check('original_max_position_embeddings', trained or max_length, int)
  if kind == 'yarn':
    _finish_yarn(theirs, max_length)
  rotated = [part for part in (theirs.pop('partial_rotary_factor', None), given.get('partial_rotary_factor'))
             if part is not None]
  if fraction is None and any(part != 1 for part in rotated):
    raise JaxlmError('config.json: partial_rotary_factor must be 1 here; this family rotates whole heads.')
  ours = dict(base=float(base), scaling='none' if kind == 'default' else kind, factor=1.0, original_length=max_length)
  if fraction is not None:
    ours['fraction'] = float(check('partial_rotary_factor', rotated[0] if rotated else fraction, float))
    if not 0 < ours['fraction'] <= 1:
      raise JaxlmError(f'config.json: partial_rotary_factor={ours["fraction"]} must be above 0 and at most 1.')
  dims = int(head_dim * ours.get('fraction', 1.0))
  if dims % 2 or not dims:
    what = f'head_dim={head_dim}' + (f' of which {dims} rotate' if dims != head_dim else '')
    raise JaxlmError(f'config.json: rotary positions need heads of an even size; got {what}.')
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


def rotated(key: str, dims: int, head_dim: int) -> float:
  """config.model.positions.rope.fraction where so many dims of a head rotate."""
  if dims % 2 or dims > head_dim:
    raise JaxlmError(f'config.json: {key}={dims} must be even and at most the size of a head, {head_dim}.')
  fraction = dims / head_dim
  return fraction if int(head_dim * fraction) == dims else math.nextafter(fraction, 1)  # 30 of 44 would become 29


def rope_by_layer(given: Mapping[str, Any], head_dim: int, max_length: int, base: float,
                  local_base: float) -> dict[str, Any]:
  """config.model.positions.rope where layers with a window rotate by a base of their own, unscaled (Gemma 3).

  Args:
    given, head_dim, max_length: as in `rope`; rope_parameters hold an object for each layer type, or are those of the
      layers that see everything, with `rope_local_base_freq` beside them.
    base, local_base: what the family takes where they are not given.
  """
  found = given.get('rope_parameters') or {}
  local = given.get('rope_local_base_freq') or local_base
  if isinstance(found, dict) and set(found) <= {FULL, SLIDING} and found:
    sliding = rope({'rope_parameters': found.get(SLIDING) or {}}, head_dim, max_length, local)
    if sliding['scaling'] != 'none':
      raise JaxlmError(f'config.json: rope_parameters scale layers of type {SLIDING}; only {FULL} ones can be.')
    given = {key: value for key, value in given.items() if key != 'rope_scaling'}
    given, local = given | {'rope_parameters': found.get(FULL) or {}}, sliding['base']
  ours = rope(given, head_dim, max_length, base)
  return ours | dict(local_base=float(check('rope_local_base_freq', local, float)))


def their_rope(ours: Any) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling`, the form that transformers 4 and 5 both read, of a RopeConfig.

  The part of a head that rotates is left to the family, whose key for it has many names.
  """
  return dict(rope_theta=ours.base, rope_scaling=_their_scaling(ours))


def their_rope_by_layer(ours: Any) -> dict[str, Any]:
  """`rope_parameters` by layer type, as transformers 5 has them, of a RopeConfig with a local_base."""
  full = _their_scaling(ours) or dict(rope_type='default')
  return dict(rope_parameters={FULL: full | dict(rope_theta=ours.base),
                               SLIDING: dict(rope_type='default', rope_theta=ours.local_base or ours.base)})


def _their_scaling(ours: Any) -> dict[str, Any] | None:
  if ours.scaling not in SCALINGS:
    return None
  keys = SCALINGS[ours.scaling]
  values = {key: getattr(ours, RENAMED.get(key, key)) for key in keys}
  values = {key: value for key, value in values.items() if (key, value) != ('attention_factor', 0.0)}  # 0: derived
  return dict(rope_type=ours.scaling, **values)
