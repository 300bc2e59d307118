"""What adapters of the `peft` package sit at: matrices of theirs, kernels of ours, and what a config says of both."""
import dataclasses
import re
from pathlib import Path
from typing import Any, Iterable, Mapping

from jaxlm import transfer
from jaxlm.errors import JaxlmError
from jaxlm.families.bijections import Bijection, Dim, Names
from jaxlm.lookup import nearest
from jaxlm.models import peft as methods
from jaxlm.models.config import ModelConfig, PeftConfig
from jaxlm.weights import DTYPES, Weights, listed, open_files, read_json

CONFIG, FILE, PICKLED = 'adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin'
RANK = 'rank'  # of dims, beside the names of a family's bijections

Shape = tuple[int, ...]


# ---- matrices of theirs and kernels of ours ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Module:
  """A matrix of theirs that an adapter can sit at, and the kernels of ours that it holds.

  Attributes:
    name: as their model has it.
    homes: of our kernels, 'stack/layer_0/attention/query/'.
    into: their dim of inputs, and the dims that our kernels have in its place, all the same.
    out: their dim of outputs, perhaps divided among our kernels, and the dims of each in its place.
    inputs, outputs: sizes of our dims, of each kernel.
    turned: whether theirs has its inputs first, as GPT-2's does.
  """
  name: str
  homes: tuple[str, ...]
  into: tuple[Dim, tuple[Names, ...]]
  out: tuple[Dim, tuple[tuple[Names, ...], ...]]
  inputs: Shape
  outputs: tuple[Shape, ...]
  turned: bool

  @property
  def a(self) -> Bijection:
    """Of their A [R, in]: ours is [*inputs, R]."""
    return Bijection((Dim((RANK,)), self.into[0]), ((*self.into[1], (RANK,)),))

  @property
  def b(self) -> Bijection:
    """Of their B [out, R]: ours are [R, *outputs], one of each kernel."""
    return Bijection((self.out[0], Dim((RANK,))), tuple(((RANK,), *names) for names in self.out[1]))

  def vector(self, side: str) -> tuple[Bijection, tuple[Shape, ...]]:
    """(of a number for each of their inputs, or outputs; the shapes of ours)."""
    if side == 'in':
      return Bijection(self.into[:1], self.into[1:]), (self.inputs,)
    return Bijection(self.out[:1], self.out[1]), self.outputs


def plain(model: ModelConfig) -> ModelConfig:
  """The model without a method."""
  return dataclasses.replace(model, peft=PeftConfig())


def modules(rows: Iterable[transfer.Row], model: ModelConfig) -> dict[str, Module]:
  """{name: module} of what a family's table has for a model: every matrix that is a module of its own there."""
  # Where inputs end and outputs begin is what an update everywhere shows.
  everywhere = PeftConfig(method='lora', sites=(('.*', True),), rank=1)
  shapes, found = transfer.param_shapes(dataclasses.replace(model, peft=everywhere)), {}
  for row in rows:
    homes, theirs = tuple(path.removesuffix('kernel') for path in row.ours), row.bijection.theirs
    updates = [shapes.get(f'{home}{methods.LORA}/a') for home in homes]
    if row.experts or not all(updates) or not row.theirs[0].endswith('.weight') or len(theirs) != 2:
      continue
    num = len(updates[0]) - 1
    into, out = ([names[part] for names in row.bijection.ours] for part in (slice(num), slice(num, None)))
    names = sorted(name for dim in into[0] for name in dim)
    is_input = [sorted(dim.shared) == names and len(dim.parts) == 1 for dim in theirs]
    if any(dims != into[0] for dims in into) or sum(is_input) != 1:
      continue
    name, at = row.theirs[0].removesuffix('.weight'), is_input.index(True)
    found[name] = Module(name, homes, (theirs[at], into[0]), (theirs[1 - at], tuple(out)), row.shapes[0][:num],
                         tuple(shape[num:] for shape in row.shapes), turned=at == 0)
  return found


def site(home: str) -> str:
  """The name that config.model.peft.sites has for the place of a kernel."""
  return methods.site(home.strip('/').split('/'))


def shortest(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
  """Names for target_modules that mean these modules: what follows the layer's number, where no others end so."""
  chosen = set(chosen)
  ends = {re.sub(r'.*\.\d+\.', '', name) for name in chosen}
  return sorted(ends if {name for name in known if named(list(ends), name)} == chosen else chosen)


# ---- an adapter's folder ---------------------------------------------------------------------------------------------

UPDATES = ('LORA', 'IA3')  # of modules; the others put virtual tokens before a text

# Keys that change nothing that is computed of the tensors: names, dropout, how training began.
_HARMLESS = re.compile(
    r'peft_type|peft_version|task_type|auto_mapping|base_model_name_or_path|revision|inference_mode|lora_dropout|'
    r'fan_in_fan_out|init_ia3_weights|eva_config|megatron_core|qalora_group_size|runtime_config|prompt_tuning_init.*|'
    r'tokenizer_.*|encoder_.*|prefix_projection|init_weights')
_PLACES = dict(target_modules=(list, str), exclude_modules=(list, str), modules_to_save=(list,))
_VIRTUAL = dict.fromkeys(('num_virtual_tokens', 'num_transformer_submodules', 'token_dim', 'num_attention_heads',
                          'num_layers'), (int,))
_KNOWN = {
    'LORA': _PLACES | dict(r=(int,), lora_alpha=(int, float), use_rslora=(bool,), use_dora=(bool,), bias=(str,),
                           rank_pattern=(dict,), alpha_pattern=(dict,), layers_to_transform=(int, list),
                           layers_pattern=(str, list), init_lora_weights=(bool, str)),
    'IA3': _PLACES | dict(feedforward_modules=(list, str)),
    'PROMPT_TUNING': _VIRTUAL, 'P_TUNING': _VIRTUAL, 'PREFIX_TUNING': _VIRTUAL}
_NEEDED = {'LORA': ('r', 'lora_alpha', 'target_modules'), 'IA3': ('target_modules', 'feedforward_modules')}
_STARTS = (None, True, False, 'gaussian', 'eva', 'orthogonal')  # that leave the base's weights as they are


def read(folder: Path) -> dict[str, Any]:
  """An adapter_config.json of which every key is understood.

  Raises:
    JaxlmError: a peft_type that is not known, or a key or value that may change what is computed.
  """
  given = read_json(folder / CONFIG)
  kind = given.get('peft_type')
  if kind not in _KNOWN:
    raise JaxlmError(f'{CONFIG}: peft_type={kind!r} has no form here; {", ".join(_KNOWN)} have.')
  known = _KNOWN[kind]
  for key, value in given.items():
    if key in known and value is not None and type(value) not in known[key]:
      raise JaxlmError(f'{CONFIG}: {key} must be {" or ".join(k.__name__ for k in known[key])}; got {value!r}.')
    if value and key not in known and not _HARMLESS.fullmatch(key):
      raise JaxlmError(f'{CONFIG}: {key}={value!r} is not understood and may change what is computed. If it does not, '
                       'remove it from the file.' + nearest(key, known))
  if lacking := [key for key in _NEEDED.get(kind, ('num_virtual_tokens',)) if given.get(key) is None]:
    raise JaxlmError(f'{CONFIG}: {listed(lacking)} is missing, without which the adapter is not known.')
  for key in ('r', 'lora_alpha', 'num_virtual_tokens'):
    if key in known and not 0 < given[key] < 2 ** 31:
      raise JaxlmError(f'{CONFIG}: {key} must be above 0; got {given[key]!r}.')
  if given.get('bias', 'none') not in (None, 'none'):
    raise JaxlmError(f'{CONFIG}: bias={given["bias"]!r} changes biases of the base, too; only "none" is read.')
  if given.get('init_lora_weights') not in _STARTS:
    raise JaxlmError(f'{CONFIG}: init_lora_weights={given["init_lora_weights"]!r} changes weights of the base; let '
                     'peft convert it (save_pretrained with path_initial_model_for_weight_conversion).')
  return given


def tensors(folder: Path) -> Weights:
  """The tensors of an adapter.

  Raises:
    JaxlmError: the file is missing, damaged or pickled, or holds other than floats.
  """
  if not (folder / FILE).is_file():
    remedy = f' {PICKLED} can run code and is not read; save it as safetensors.' if (folder / PICKLED).exists() else ''
    raise JaxlmError(f'{folder} has no {FILE}.{remedy}')
  weights = open_files({FILE: folder / FILE})
  for name, dtype in weights.dtypes.items():
    if dtype not in DTYPES:
      raise JaxlmError(f'Tensor {name} is {dtype}; {", ".join(DTYPES)} are read.')
  return weights


def fits(pattern: str, name: str) -> re.Match | None:
  """What a pattern of theirs finds in a name, all of which it must match."""
  try:
    return re.fullmatch(pattern, name)
  except re.error as e:
    raise JaxlmError(f'{CONFIG}: {pattern!r} is no pattern: {e}.') from None


def named(places: list[str] | str | None, name: str) -> bool:
  """Whether a list of ends of names, or a pattern, means a module."""
  if isinstance(places, str):
    return bool(fits(places, name))
  return any(name == place or name.endswith(f'.{place}') for place in places or ())


def pattern_value(patterns: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
  """What rank_pattern or alpha_pattern says of a module."""
  found = next((value for key, value in (patterns or {}).items() if fits(rf'(.*\.)?({key})', name)), usual)
  if type(found) not in (int, float) or not found > 0:
    raise JaxlmError(f'{CONFIG}: rank_pattern and alpha_pattern must give numbers above 0; got {found!r} for {name}.')
  return found


def targeted(given: Mapping[str, Any], name: str) -> bool:
  """Whether an adapter is put at a module: target_modules, exclude_modules, layers_to_transform."""
  target, layers, patterns = given['target_modules'], given.get('layers_to_transform'), given.get('layers_pattern')
  if named(given.get('exclude_modules'), name) or target != 'all-linear' and not named(target, name):
    return False
  if layers in (None, []) or isinstance(target, str):
    return True
  patterns = [patterns] if isinstance(patterns, str) else patterns or ['[^.]*']
  numbers = (fits(rf'(?:.*?\.)?{pattern}\.(?P<layer>\d+)\..*', name) for pattern in patterns)
  layers = layers if isinstance(layers, list) else [layers]
  return any(number and int(number['layer']) in layers for number in numbers)


def is_forward(given: Mapping[str, Any], name: str) -> bool:
  """Whether (IA)³ scales the inputs of a module. A list means what ends so, wherever a part of a name begins."""
  forward = given['feedforward_modules']
  return bool(fits(forward, name)) if isinstance(forward, str) else any(name.endswith(end) for end in forward)
