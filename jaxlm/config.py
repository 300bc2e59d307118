"""A config: made by `default()`, changed by an experiment, checked once before any device is touched.

The keys themselves, with units, reasons and ranges, stand in schema.py; settings.py reads and judges them.
"""
import dataclasses
import importlib.util
import json
import os
from typing import Any, Mapping

from ml_collections import ConfigDict

from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest
from jaxlm.ranges import Key
from jaxlm.schema import SCHEMA
from jaxlm.settings import KEYS, as_plain, leaves


def default() -> ConfigDict:
  """A config with every key at its default; derived ones follow what they derive from."""
  values = lambda tree: {k: v.value if isinstance(v, Key) else values(v) for k, v in tree.items()}
  config = ConfigDict(values(SCHEMA))
  follow(config, *(path for path, key in KEYS.items() if key.derive))
  return config.lock()


def follow(config: ConfigDict, *paths: str) -> None:
  """Makes derived keys follow again what they derive from, whatever they were set to."""
  for path in paths:
    *folders, last = path.split('.')
    parent = config
    for folder in folders:
      parent = parent[folder]
    parent[last] = KEYS[path].derive(config)


def smoke(config: ConfigDict, seq_len: int = 64) -> ConfigDict:
  """Shrinks any experiment to seconds on a CPU: bytes of the standard library, 4 layers of width 64.

  Args:
    seq_len: more than 64 where a task's answers need it.
  """
  config.data.tokenizer = 'bytes'
  config.update(steps=4, batch_size=16, seq_len=seq_len, log_every=1, eval_every=0, save_every=0)
  config.eval.update(max_tokens=4096, sample_tokens=8)
  config.data.task_examples = 64
  config.model.vocab_pad_to = 512
  return _shrunk(config, width=64, num_heads=8, num_layers=4)


def laptop(config: ConfigDict) -> ConfigDict:
  """Shrinks any experiment to minutes on two cores: 2,048 pieces of the standard library, 4 layers of width 128."""
  config.data.update(tokenizer='bpe', vocab_size=2048, holdout=0.05)
  config.update(steps=200, batch_size=16, seq_len=128, log_every=50, eval_every=0, save_every=0)
  config.eval.update(max_tokens=1 << 15, sample_tokens=32)
  config.optim.update(lr=2e-3, warmup_steps=20)
  config.model.vocab_pad_to = 128
  return _shrunk(config, width=128, num_heads=4, num_layers=4)


def _shrunk(config: ConfigDict, width: int, num_heads: int, num_layers: int) -> ConfigDict:
  """The same architecture, small, without dropout, in float32 on whatever devices there are."""
  config.data.update(source='stdlib', paths='', mixture=(), phases=(), workers=0)
  config.update(batch_ramp=(), accumulation=1)
  model, head_dim = config.model, width // num_heads
  factorised = model.embedding.width != model.width
  ratio = (model.width / width) ** 0.5  # sums of fewer terms keep their variance, up to 1; embeddings of 1 stay
  for key in ('std', 'embedding_std'):
    if model.init[key] < 1:
      model.init[key] = min(model.init[key] * ratio, width ** -0.5)
  if model.embedding_scale > 1:
    model.embedding_scale /= ratio
  if model.logit_scale < 1:
    model.logit_scale = min(model.logit_scale * ratio, 1.0)
  model.update(width=width, num_layers=num_layers, vocab_size=0, dropout=0.0, remat='none')
  follow(config, 'model.encoder_layers', 'model.embedding.width')
  model.embedding.zeroed = -1
  if factorised:
    model.embedding.width = width // 2
  few = model.attention.num_kv_heads < model.attention.num_heads
  model.attention.update(num_heads=num_heads, head_dim=head_dim, dropout=0.0,
                         num_kv_heads=num_heads // 2 if few else num_heads,
                         scale=1.0 if model.attention.scale == 1 else 0.0,  # T5 has none; others follow the head
                         windows=tuple(min(w, config.seq_len // 4) for w in model.attention.windows))
  latent = model.attention.latent
  latent.update(kv_rank=min(latent.kv_rank, width // 4), q_rank=min(latent.q_rank, width // 2), rope_dim=8,
                value_dim=head_dim)
  model.mlp.width = min(model.mlp.width, 4 * width)
  moe = model.moe
  moe.update(num_experts=min(moe.num_experts, 4), top_k=min(moe.top_k, 2), width=2 * width, num_groups=1, top_groups=1,
             first=min(moe.first, 1), shared_width=min(moe.shared_width, width))
  if model.generator.width:
    model.generator.update(width=width // 4, num_layers=num_layers, num_heads=2, mlp_width=width)
  config.precision.update(compute='float32', params='float32')
  config.optim.update(warmup_steps=min(config.optim.warmup_steps, config.steps // 2))
  follow(config, 'optim.total_steps', 'model.max_length', 'model.positions.rope.original_length', 'eval.batch_size')
  return config


def lay(config: ConfigDict, optimizer: tuple[tuple[str, Any], ...] | None = None, **rules: Any) -> ConfigDict:
  """Changes where logical axes go: `lay(config, act_stream=('seq', 'tensor'))` is Megatron's sequence parallelism.

  Args:
    optimizer: sharding.optimizer_rules.
    **rules: logical axis -> mesh axis, tuple of them, or None, in the place of its first rule.
  Raises:
    JaxlmError: no such logical axis.
  """
  known = [axis for axis, _ in config.sharding.rules]
  for axis in rules:
    if axis not in known:
      raise JaxlmError(f'Unknown logical axis {axis!r}. Known: {", ".join(dict.fromkeys(known))}.'
                       f'{nearest(axis, known)}')
  changed = [(axis, rules[axis] if axis in rules and axis not in known[:i] else to)
             for i, (axis, to) in enumerate(config.sharding.rules)]
  config.sharding.rules = tuple(changed)
  if optimizer is not None:
    config.sharding.optimizer_rules = optimizer
  return config


def experiment(file: str, arg: str | None = None) -> ConfigDict:
  """The config of another experiment's file, for one that says only what differs from it."""
  spec = importlib.util.spec_from_file_location('recipe', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


def tune(config: ConfigDict, task: str, objective: str, start: str = '') -> ConfigDict:
  """What adapting a model to a task has in common; without a start, a small new model learns the task alone.

  Args:
    task: data.task.
    objective: that learns it.
    start: a run directory whose weights it begins with.
  """
  config.update(steps=300, batch_size=16, seq_len=256, eval_every=100, save_every=100, log_every=20)
  config.data.update(task=task, packing='best_fit' if objective == 'answer' else 'padded', tokenizer='bpe', vocab_size=4096,
                     too_long='leave')
  config.objective.name = objective
  config.optim.update(lr=5e-4, schedule='linear', warmup_steps=30, final_fraction=0.0, weight_decay=0.01)
  config.checkpoint.update(best_metric='eval/validation/loss', keep_best=1)
  config.eval.update(prompts=(), max_tokens=1 << 16)
  config.model.update(width=192, num_layers=3, max_length=512)
  config.model.attention.num_heads = 3
  return adopt(config, start) if start else config


def adopt(config: ConfigDict, path: str) -> ConfigDict:
  """The config with the model, tokenizer and precision of weights of a run, whose weights it starts with.

  Args:
    path: a run directory. (A Hugging Face folder becomes one by `python -m jaxlm.convert`.)
  Raises:
    JaxlmError: there is none.
  """
  try:
    with open(os.path.join(path, 'config.json'), encoding='utf-8') as f:
      base = json.load(f)
    found = {key: base[key] for key in ('model', 'precision', 'data')}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise JaxlmError(f'{path} is no run directory to start from ({type(e).__name__}: {e}); train one, or make one of a '
                     'Hugging Face folder with python -m jaxlm.convert.') from e
  with config.unlocked():
    config.model.update(from_plain(found['model']))
    config.precision.params = found['precision']['params']
    config.data.update(bos=found['data']['bos'], eos=found['data']['eos'], tokenizer=os.path.join(path, 'tokenizer'))
    config.checkpoint.init_from = path
  return config


def lengthen(config: ConfigDict, seq_len: int, scaling: str = 'yarn') -> ConfigDict:
  """The config with longer rows than its model, with rotary positions, was trained at.

  Args:
    seq_len: of the new rows.
    scaling: model.positions.rope.scaling.
  Raises:
    JaxlmError: positions of another kind, or rows that are not longer.
  Source: Peng et al. 2023, YaRN, arXiv:2309.00071; Chen et al. 2023, arXiv:2306.15595, for 'linear'.
  """
  positions = config.model.positions
  known, reach = positions.rope.original_length, round(positions.rope.original_length * positions.rope.factor)
  if positions.kind != 'rope' or seq_len <= reach:
    raise JaxlmError(f'A model of positions {positions.kind!r} that reads {reach} tokens cannot be lengthened to {seq_len}; '
                     'it takes rotary positions, and more tokens than those.')
  if positions.rope.scaling not in ('none', scaling):
    raise JaxlmError(f'Rotary positions that are scaled by {positions.rope.scaling!r} cannot go on by {scaling!r}; give '
                     'scaling the first.')
  config.update(seq_len=seq_len)
  positions.rope.update(scaling=scaling, factor=seq_len / known, original_length=known)
  config.model.max_length = max(config.model.max_length, seq_len)
  return config


# ---- an experiment's argument ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OneOf:
  """An argument of an experiment that takes one of the known values."""
  value: str
  known: tuple[str, ...]


def one_of(value: str, known) -> OneOf:
  """An argument with a default and the values it may take."""
  return OneOf(value, tuple(known))


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """Reads what follows the colon in --config=experiments/x.py:size=nano,smoke.

  Args:
    arg: 'name=value,flag', or None. A bare name sets a flag.
    **defaults: each argument's default: a bool, an int, a float, a str, or `one_of(default, known)`.
  Raises:
    JaxlmError: an unknown argument, or a value it cannot take.
  """
  values = {k: d.value if isinstance(d, OneOf) else d for k, d in defaults.items()}
  for item in filter(None, (arg or '').split(',')):
    key, equals, given = item.partition('=')
    if key not in defaults:
      meant = [f' Did you mean {name}={key}?' for name, default in defaults.items()
               if isinstance(default, OneOf) and key in default.known]
      raise JaxlmError(f'Unknown argument {key!r} of the experiment. Known: {", ".join(defaults) or "none"}.'
                       + (meant[0] if meant else nearest(key, defaults)))
    kind = defaults[key]
    if isinstance(kind, OneOf):
      if given not in kind.known:
        raise JaxlmError(f'Unknown {key} {given!r}. Known: {", ".join(kind.known)}.' + nearest(given, kind.known))
      values[key] = given
    elif isinstance(kind, bool):
      if given not in ('', 'true', 'True', 'false', 'False'):
        raise JaxlmError(f'Argument {key} is a flag, got {given!r}; say {key} or {key}=false.')
      values[key] = given not in ('false', 'False')
    else:
      try:
        values[key] = type(kind)(given) if equals else kind
      except ValueError:
        raise JaxlmError(f'Argument {key} wants {type(kind).__name__}, got {given!r}.') from None
  return ConfigDict(values)


# ---- as plain values ---------------------------------------------------------------------------------------------


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as a plain nested dict, every reference replaced by its value."""
  return config.copy_and_resolve_references().to_dict()


def dumps(config: ConfigDict) -> str:
  """The resolved config as JSON, the content of config.json."""
  return json.dumps(resolved(config), indent=2)


def from_plain(values: Mapping[str, Any]) -> ConfigDict:
  """A config from a nested dict as JSON has it: lists become tuples."""
  tree = lambda v: {k: tree(x) for k, x in v.items()} if isinstance(v, Mapping) else as_plain(v)
  return ConfigDict(tree(values)).lock()


def loads(text: str) -> ConfigDict:
  """A config from config.json."""
  return from_plain(json.loads(text))


def differences(config: ConfigDict, other: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """Dotted key -> (value in config, value in other), where they differ; None where there is none."""
  mine, theirs = dict(leaves(resolved(config))), dict(leaves(resolved(other)))
  return {k: (mine.get(k), theirs.get(k)) for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)}
