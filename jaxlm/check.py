"""Faults between keys: what each alone allows and together cannot work. Looks at no device."""
import os
import re
from typing import Any, Iterator

from ml_collections import ConfigDict

from jaxlm import fits, objectives, optim, rollouts, settings
from jaxlm.data import plans, sources, store, tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.families import table
from jaxlm.lookup import lookup
from jaxlm.models import layers, positions, ring, stack
from jaxlm.sharding import MESH_AXES

# key -> (the table its value is looked up in, what the table holds)
NAMED = {
    'objective.name': (objectives.OBJECTIVES, 'objective'),
    'optim.name': (optim.OPTIMIZERS, 'optimizer'),
    'optim.schedule': (optim.SCHEDULES, 'schedule'),
    'model.attention.kernel': ({ring.AUTO: None, **ring.KERNELS}, 'attention kernel'),
    'model.mlp.activation': (layers.ACTIVATIONS, 'activation'),
    'model.positions.kind': (positions.POSITIONS, 'kind of positions'),
    'model.positions.rope.scaling': (positions.ROPE_SCALINGS, 'rope scaling'),
    'model.mixer': (stack.MIXERS, 'mixer'),
    'model.family': ({'custom': None, **table.FAMILIES}, 'family'),
    'model.remat': (stack.REMAT, 'remat policy'),
    'data.packing': (plans.PLANNERS, 'packing'),
    'data.source': (sources.SOURCES, 'source'),
}


def faults(config: ConfigDict) -> list[str]:
  """Everything wrong with a config, one line each; [] if it can be run."""
  found = settings.faults(config)
  return found or list(_names(config)) + list(_model(config)) + list(_training(config)) + list(_data(config)) + list(
      _task(config)) + list(_rollouts(config))


def validate(config: ConfigDict) -> None:
  """Raises JaxlmError with all faults, a line each, before any device is touched."""
  found = faults(config)
  if found:
    raise JaxlmError('\n'.join(found))


def _at(config: ConfigDict, path: str) -> Any:
  for part in path.split('.'):
    config = config[part]
  return config


def _names(config: ConfigDict) -> Iterator[str]:
  for path, (known, kind) in NAMED.items():
    try:
      lookup(known, _at(config, path), kind)
    except JaxlmError as e:
      yield f'config.{path}: {e}'
  try:
    tokenizers.resolve(config.data.tokenizer)
  except JaxlmError as e:
    yield f'config.data.tokenizer: {e}'


def _model(config: ConfigDict) -> Iterator[str]:
  model, attention = config.model, config.model.attention
  if fault := fits.mismatch(config):
    yield f'config.objective.name: {fault}'
  if attention.num_heads % attention.num_kv_heads:
    yield (f'config.model.attention: num_heads={attention.num_heads} does not divide by '
           f'num_kv_heads={attention.num_kv_heads}; each key head serves a whole group of query heads.')
  attends = model.mixer == 'attention' or model.structure == 'encoder_decoder'
  if attends and attention.head_dim == model.width // attention.num_heads and model.width % attention.num_heads:
    yield (f'config.model.width={model.width} does not divide by attention.num_heads={attention.num_heads}; '
           'change one, or set attention.head_dim.')
  yield from _positions(config)
  if model.positions.kind == 'learned' and config.seq_len > model.max_length:
    yield (f'config.seq_len={config.seq_len} is longer than config.model.max_length={model.max_length}, '
           'the learned positions there are; raise that.')
  if model.positions.kind == 'relative' and attention.kernel == 'blockwise':
    yield ("config.model.positions.kind='relative': the blockwise kernel cannot add scores that depend on the query; "
           "set attention.kernel='dense'.")
  if model.structure == 'two_stream' and model.positions.kind not in ('relative', 'rope', 'buckets', 'alibi'):
    yield (f"config.model.positions.kind={model.positions.kind!r} says nothing to a query stream, whose rows have no "
           "position in their embedding; use relative, rope, buckets or alibi.")
  if model.structure == 'two_stream' and model.mixer != 'attention':
    yield f"config.model.mixer={model.mixer!r} cannot run two streams; set it to 'attention'."
  if model.share_layers and model.moe.num_experts and (model.moe.every > 1 or model.moe.first):
    yield 'config.model.share_layers: all layers are one, so moe.every must be 1 and moe.first 0.'
  if model.share_layers and not model.residual.first_norm:
    yield 'config.model.share_layers: all layers are one, so residual.first_norm must be True.'
  moe = model.moe
  if moe.num_experts and (moe.top_k > moe.num_experts or moe.num_experts % moe.num_groups
                          or moe.top_groups > moe.num_groups):
    yield (f'config.model.moe: of num_experts={moe.num_experts} in num_groups={moe.num_groups} equal groups, '
           f'top_k={moe.top_k} and top_groups={moe.top_groups} cannot be chosen; lower them.')
  if moe.num_experts and moe.mode == 'capacity' and objectives.visibility(config) == 'order':
    yield ("config.model.moe.mode='capacity': earlier columns get places first, and here later ones may be read "
           "before them, so what is predicted would show; set it to 'dropless'.")
  for part, on in (('moe', moe.num_experts), ('generator', model.generator.width)):
    key = 'width' if part == 'moe' else 'mlp_width'
    if on and model[part][key] < 1:
      yield f'config.model.{part}.{key} must be at least 1 where there is one; got {model[part][key]}.'
  if model.structure == 'encoder_decoder' and model.generator.width:
    yield 'config.model.generator: only an encoder has one; set its width to 0.'
  if attention.dropout and attention.kernel == 'blockwise':
    yield ('config.model.attention.dropout: the blockwise kernel cannot drop attention probabilities; '
           "set it to 0, or attention.kernel='dense'.")
  rope = model.positions.rope
  if rope.scaling == 'llama3' and rope.low_freq_factor >= rope.high_freq_factor:
    yield (f'config.model.positions.rope: low_freq_factor={rope.low_freq_factor} must be below '
           f'high_freq_factor={rope.high_freq_factor}.')
  unknown = set(model.remat_names) - set(stack.REMAT_NAMES)
  if unknown:
    yield (f'config.model.remat_names: unknown {", ".join(sorted(map(repr, unknown)))}. '
           f'Known: {", ".join(stack.REMAT_NAMES)}.')


def _positions(config: ConfigDict) -> Iterator[str]:
  model, attention, latent = config.model, config.model.attention, config.model.attention.latent
  positions = model.positions
  if positions.kind == 'rope':
    dims = latent.rope_dim if latent.kv_rank else int(attention.head_dim * positions.rope.fraction)
    if dims % (4 if positions.two_dims else 2) or not dims:
      where = 'attention.latent.rope_dim' if latent.kv_rank else 'attention.head_dim times positions.rope.fraction'
      yield (f'config.model.{where} is {dims}; rope rotates pairs, '
             f'{"of two positions each, so make it a multiple of 4." if positions.two_dims else "so make it even."}')
  if positions.kind == 'buckets' and not 4 <= positions.num_buckets < 2 * positions.max_distance:
    yield (f'config.model.positions: num_buckets={positions.num_buckets} must be at least 4, and half of them below '
           f'max_distance={positions.max_distance}, for they hold the nearest distances one by one.')
  if positions.two_dims and positions.kind not in ('learned', 'rope'):
    yield (f'config.model.positions.two_dims: kind={positions.kind!r} has one dim; use learned or rope, or set it to '
           'False.')


def _training(config: ConfigDict) -> Iterator[str]:
  for size in [config.batch_size, *(size for _, size in config.batch_ramp)]:
    if size % config.accumulation:
      yield (f'config.batch_size={size} does not divide by config.accumulation={config.accumulation}; '
             'every microbatch has the same number of examples.')
  steps = [until for until, _ in config.batch_ramp]
  if steps != sorted(set(steps)):
    yield f'config.batch_ramp: steps must rise; got {tuple(steps)}.'
  if config.optim.warmup_steps > config.optim.total_steps:
    yield (f'config.optim.warmup_steps={config.optim.warmup_steps} is more than total_steps='
           f'{config.optim.total_steps}; the rate would never reach its peak.')
  for path in ('decay_rules', 'lr_rules', 'freeze'):
    for rule in config.optim[path]:
      pattern = rule if isinstance(rule, str) else rule[0]
      try:
        re.compile(pattern)
      except re.error as e:
        yield f'config.optim.{path}: {pattern!r} is not a regular expression: {e}.'
  if sum(1 for size in config.mesh.values() if size == -1) > 1:
    yield 'config.mesh: only one axis may be -1; got ' + ', '.join(a for a in MESH_AXES if config.mesh[a] == -1) + '.'
  yield from _parallel(config)
  for key in ('resume', 'init_from'):
    path = config.checkpoint[key]
    if path and not os.path.isdir(path):
      yield f'config.checkpoint.{key}: no folder {path!r}; give the run directory to start from.'
  yield from _teacher(config)
  if config.checkpoint.resume and config.checkpoint.init_from:
    yield ('config.checkpoint: resume and init_from are both set; resume continues a run, init_from only takes its '
           'weights.')


def _teacher(config: ConfigDict) -> Iterator[str]:
  path, name = config.loss.teacher.path, config.objective.name
  if not path:
    return
  if not os.path.exists(path):
    yield f'config.loss.teacher.path: no {path!r}; give the run directory, or the Hugging Face folder, of the teacher.'
  if name in fits.WITHOUT_TEACHER:
    yield (f'config.loss.teacher.path={path!r}: objective {name!r} predicts neither tokens nor classes that a teacher '
           'could tell of; leave it empty, or take another objective.')
  if config.model.peft.method in ('prompt', 'prefix'):
    yield (f"config.loss.teacher.path={path!r}: a teacher cannot read the virtual tokens of config.model.peft.method="
           f"{config.model.peft.method!r}; take 'lora' or another method.")


def _parallel(config: ConfigDict) -> Iterator[str]:
  """What cannot be spread over an axis of the mesh; -1 may become any size."""
  model, mesh = config.model, config.mesh
  if mesh.expert != 1 and not model.moe.num_experts:
    yield (f'config.mesh.expert={mesh.expert}: the model has no experts to split over it; set it to 1, or '
           'config.model.moe.num_experts.')
  if mesh.seq != 1:
    if model.mixer != 'attention':
      yield f'config.mesh.seq={mesh.seq}: a {model.mixer} reads a token after the other; set it to 1.'
    if model.attention.dropout:
      yield (f'config.mesh.seq={mesh.seq}: attention probabilities cannot be dropped where lengths are split; set '
             'config.model.attention.dropout to 0.')
    if model.moe.num_experts and model.moe.mode == 'capacity':
      yield (f"config.mesh.seq={mesh.seq}: a mixture's capacity is counted over whole rows; set config.model.moe.mode "
             "to 'dropless', or the axis to 1.")
  if mesh.pipe != 1:
    if not model.scan:
      yield f'config.mesh.pipe={mesh.pipe}: stages are stacked layers; set config.model.scan to True.'
    if model.share_layers:
      yield (f'config.mesh.pipe={mesh.pipe}: config.model.share_layers leaves one layer, no stages; set one of them '
             'back.')
    if config.objective.name == 'permutation' and config.objective.permutation.memory:
      yield (f'config.mesh.pipe={mesh.pipe}: a pipeline keeps no memory; set config.objective.permutation.memory to 0.')


def _task(config: ConfigDict) -> Iterator[str]:
  for which in fits.WRITTEN:
    try:
      rollouts.grader_of(config.objective[which].verifier)
    except JaxlmError as e:
      yield f'config.objective.{which}.verifier: {e}'
  data, name, peft = config.data, config.objective.name, config.model.peft
  learns = name in fits.ANSWERS
  if data.task and not learns:
    yield (f'config.data.task={data.task!r}: objective {name!r} learns raw text; set config.objective.name to '
           f'{", ".join(fits.ANSWERS)}, whichever the task is.')
  if learns and not data.task:
    yield f'objective {name!r} learns a task; set config.data.task, or another objective.'
  if name in ('contrast', 'kto') and config.accumulation != 1:
    yield (f'config.accumulation={config.accumulation}: all texts of a batch meet in the loss of objective {name!r}; set it '
           'to 1, or config.batch_size lower.')
  if peft.method in ('prompt', 'prefix') and not data.task:
    yield (f'config.model.peft.method={peft.method!r}: virtual tokens stand before the texts of a task; set config.data.task '
           'and an objective that learns one.')
  if peft.method == 'prefix' and (config.model.mixer != 'attention' or config.model.attention.latent.kv_rank):
    yield ("config.model.peft.method='prefix' gives attention keys and values, which this model makes otherwise; take "
           "'prompt' or 'lora'.")
  if peft.method == 'prefix' and peft.encoder != 'none' and config.mesh.pipe != 1:
    yield (f"config.mesh.pipe={config.mesh.pipe}: stages share no encoder of a prefix; set config.model.peft.encoder='none', or "
           'the axis to 1.')
  if peft.method == 'prefix' and peft.encoder == 'lstm':
    yield "config.model.peft.encoder='lstm' makes embeddings; of a prefix take 'mlp' or 'none'."
  values = {'lora': (int, bool), 'ia3': (str, bool), 'bottleneck': (bool,)}.get(peft.method, ())
  for pattern, value in peft.sites:
    if type(value) not in values:
      yield (f'config.model.peft.sites: {pattern!r} has {value!r}, which method {peft.method!r} has no use for; lora takes '
             "ranks, ia3 'in' or 'out', bottleneck True, and all of them False.")
  if peft.method != 'none' and config.optim.freeze:
    yield (f'config.optim.freeze={config.optim.freeze!r}: a delta is all that is trained; leave it empty, or narrow '
           'config.model.peft.sites.')
  weights = config.loss.class_weights
  if weights and len(weights) != config.model.head.num_labels:
    yield (f'config.loss.class_weights: {len(weights)} of them for config.model.head.num_labels='
           f'{config.model.head.num_labels} classes; give each one.')
  if peft.base != 'same' and peft.method in ('none', 'bitfit'):
    yield (f'config.model.peft.base={peft.base!r} keeps weights that nobody trains; set config.model.peft.method, such as '
           "'lora'.")


def _rollouts(config: ConfigDict) -> Iterator[str]:
  name = config.objective.name
  if name not in fits.WRITTEN:
    return
  own, at = config.objective[name], f'config.objective.{name}'
  for size in [config.batch_size, *(size for _, size in config.batch_ramp)]:
    if size % own.group:
      yield (f'config.batch_size={size} does not divide by {at}.group={own.group}, the answers to a '
             'question; set one to suit the other.')
  if config.model.peft.method in ('prompt', 'prefix'):
    yield (f"config.model.peft.method={config.model.peft.method!r}: objective {name!r} writes its texts without virtual "
           "tokens; take 'lora' or another method.")
  if name == 'ppo' and config.mesh.seq != 1:
    yield (f'config.mesh.seq={config.mesh.seq}: what a token is worth is counted along its row; set the axis to 1, or take '
           "objective 'grpo'.")
  if own.max_new_tokens >= config.seq_len:
    yield (f'{at}.max_new_tokens={own.max_new_tokens} leaves no room for a question in config.seq_len='
           f'{config.seq_len} columns; lower it, or make rows longer.')
  for key in ('steps', 'save_every', *(['eval_every'] if config.checkpoint.patience else [])):
    if config[key] % own.updates:
      yield (f'config.{key}={config[key]} does not divide by {at}.updates={own.updates}: a run rests '
             'where a new rollout begins; make it a multiple.')


def _data(config: ConfigDict) -> Iterator[str]:
  data = config.data
  entries = store.mixture(data)
  names = [name for name, *_ in entries]
  if len(set(names)) != len(names):
    yield f'config.data.mixture: names must differ; got {", ".join(names)}.'
  for name in names:
    if not name.strip() or '/' in name or name == 'heldout':
      yield (f'config.data.mixture: {name!r} cannot name a source: metrics are eval/<name>/…, and "heldout" is all '
             'sources together; choose another.')
  for name, source, paths, _ in entries:
    if source == 'stdlib' and paths not in ('', *sources.SPLITS):
      yield (f'config.data.paths={paths!r}, but the source {name!r} is the standard library, which has no paths but train, '
             "validation and test, the splits of its tasks; set config.data.source to 'text', 'jsonl' or what the files are.")
  for name, source, _, _ in data.mixture:
    try:
      lookup(sources.SOURCES, source, 'source')
    except JaxlmError as e:
      yield f'config.data.mixture: {name}: {e}'
  for first, weights in data.phases:
    if len(weights) != len(entries):
      yield (f'config.data.phases: {len(weights)} weights from example {first}, but the mixture has {len(entries)} '
             'sources; give each one.')
  firsts = [first for first, _ in data.phases]
  if firsts != sorted(set(firsts)):
    yield f'config.data.phases: first examples must rise; got {tuple(firsts)}.'
