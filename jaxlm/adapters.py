"""Adapters as the `peft` package keeps them: adapter_config.json beside adapter_model.safetensors, written and read.

Bijections of a family's table say how A and B are cut and turned. They never compute: what is read is written the same,
bit for bit. Of a prompt or prefix that an encoder makes, what it makes is written, as there. Nothing is unpickled.
"""
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, Iterable, Mapping

import numpy as np
import safetensors.numpy

from jaxlm import config as base
from jaxlm import sharding, targets, transfer, trees
from jaxlm.errors import JaxlmError
from jaxlm.families import table
from jaxlm.models import peft as methods
from jaxlm.models import virtual
from jaxlm.models.config import ModelConfig, PeftConfig
from jaxlm.models.layers import Dense
from jaxlm.models.stack import restack, unstack
from jaxlm.targets import CONFIG, FILE, PICKLED, Module
from jaxlm.types import Tree
from jaxlm.weights import listed, write_json

START, PROMPT = 'base_model.model.', 'prompt_embeddings'
A, B, MAGNITUDE, SCALE = 'lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector', 'ia3_l'
_PART = re.compile(rf'(.+)\.({re.escape(A)}|{re.escape(B)}|{MAGNITUDE}|{SCALE})')

Leaves = dict[str, np.ndarray]
Told = tuple[dict[str, Any], Leaves]  # (keys of adapter_config.json, tensors)


def _places(homes: Iterable[str]) -> str:
  return listed(home.rstrip('/') for home in homes)


def _task(model: ModelConfig) -> str | None:
  """What their class for such a model is for; None: there is none but the plain one."""
  if model.head.lm:
    return {'encoder_decoder': 'SEQ_2_SEQ_LM', 'decoder': 'CAUSAL_LM'}.get(model.structure)
  return 'FEATURE_EXTRACTION' if model.head.labels == 'none' else None


def _prompts_fit(model: ModelConfig) -> None:
  """Refuses models before whose text `peft` puts a prompt in another way, or not at all."""
  if _task(model) is None:
    raise JaxlmError(f'The peft package puts a prompt before the text of decoders, encoder-decoders and bodies; before '
                     f'that of this {model.structure} and its head it puts none, or pools it with the text.')
  if model.embedding_scale != 1.0:
    raise JaxlmError(f'config.model.embedding_scale={model.embedding_scale} multiplies prompts here, but not in all '
                     'models there; such a prompt is not exchanged.')


def _prefix_dims(model: ModelConfig) -> tuple[int, int, int, int]:
  """(P, L, K, H) of the keys and values of a prefix."""
  attention = model.attention
  if _task(model) != 'CAUSAL_LM' or model.mixer != 'attention' or model.share_layers or attention.latent.kv_rank:
    raise JaxlmError('The peft package gives a prefix to decoders that score a vocabulary and keep keys and values of '
                     f'every layer; this {model.structure} of family {model.family} is another. A prompt may do.')
  return model.peft.tokens, model.num_layers, attention.num_kv_heads, attention.head_dim


# ---- out -----------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike, model: ModelConfig, params: Tree, base_model: str = '') -> None:
  """Writes an adapter that `peft.PeftModel.from_pretrained` reads over the model's Hugging Face form.

  Args:
    path: a new folder, or one that holds no adapter.
    model: with its method, model.peft; the family named there says what modules are called.
    params: the delta and what model.peft.also names, stacked or not; others beside them are left out.
    base_model: name or folder of the base, for adapter_config.json.
  Raises:
    JaxlmError: there is an adapter, or `peft` cannot express this one.
  """
  path, family, peft = Path(path), table.by_name(model.family), model.peft
  if any((path / name).exists() for name in (CONFIG, FILE, PICKLED)):
    raise JaxlmError(f'{path} holds an adapter already; name a new folder.')
  if peft.method not in _WRITERS:
    raise JaxlmError(f'The peft package has no form of method {peft.method!r}; {", ".join(_WRITERS)} have one.')
  delta = unstack(trees.partition(params, lambda path: methods.is_trained(peft, path))[0], model)
  leaves = {path: np.asarray(x) for path, x in trees.flatten(delta).items()}
  if missing := {path for path in transfer.param_shapes(model) if methods.is_delta(path)} - set(leaves):
    raise JaxlmError(f'The parameters lack {listed(missing)}, which config.model.peft calls for.')
  rows = transfer.rows(family, targets.plain(model), prefix=model.head.lm or model.head.labels != 'none')
  told, tensors = _WRITERS[peft.method](model, rows, leaves)
  tensors, modules = _whole(model, rows, leaves, tensors)
  # Updates need no class of theirs; that for classifiers would ask for a head, trained or not.
  task = _task(model) if model.head.lm or peft.method in virtual.METHODS else None
  told |= dict(task_type=task, base_model_name_or_path=base_model or None, inference_mode=True, modules_to_save=modules)
  path.mkdir(parents=True, exist_ok=True)
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, path / f'{FILE}.tmp', metadata={'format': 'pt'})
  (path / f'{FILE}.tmp').replace(path / FILE)
  write_json(path / CONFIG, told)


def _whole(model: ModelConfig, rows: list[transfer.Row], leaves: Leaves, tensors: Leaves) -> tuple[Leaves, Any]:
  """(the tensors, and weights that are saved whole; the modules these are of, or None)."""
  of, rest = lambda row: row.theirs[0].rpartition('.')[0], {path for path in leaves if not methods.is_delta(path)}
  written = [row for row in rows if not row.experts and rest.issuperset(row.ours)]
  join = lambda row: row.bijection.inverse([leaves[path] for path in row.ours], model.vocab_size)
  whole = {row.theirs[0]: join(row) for row in written}
  modules, named = {of(row) for row in written}, {path for row in written for path in row.ours}
  if left := {row.theirs[0] for row in rows if of(row) in modules} - set(whole) | rest - named:
    raise JaxlmError(f'The peft package saves whole modules; what config.model.peft.also names is not {listed(left)}.')
  if whole and PROMPT in tensors:
    raise JaxlmError(f'There is no {listed(whole)} beside a prompt or prefix there; empty config.model.peft.also.')
  return tensors | {START + name: x for name, x in whole.items()}, sorted(modules) or None


def _sited(folder: str, leaves: Leaves, rows: list[transfer.Row], model: ModelConfig) -> dict[str, Module]:
  """The modules there are, which must hold all that is adapted."""
  found = targets.modules(rows, targets.plain(model))
  homes = {path.rpartition(f'{folder}/')[0] for path in leaves if f'/{folder}/' in path}
  if not homes:
    raise JaxlmError('Nothing is adapted; let config.model.peft.sites match places of this model.')
  if left := homes - {home for module in found.values() for home in module.homes}:
    raise JaxlmError(f'The peft package has no module for {_places(left)} of family {model.family}; leave such places '
                     'out of config.model.peft.sites.')
  return found


def _lora_out(model: ModelConfig, rows: list[transfer.Row], leaves: Leaves) -> Told:
  peft, tensors, ranks, alphas = model.peft, {}, {}, {}
  found = _sited(methods.LORA, leaves, rows, model)
  for name, module in found.items():
    of = lambda leaf: [leaves.get(f'{home}{methods.LORA}/{leaf}') for home in module.homes]
    updates = list(zip(module.homes, of('a'), of('b')))
    # Without DoRA an update whose A and B are 0 is none, of a layer that is not adapted.
    present = [(home, a, b) for home, a, b in updates if a is not None and (peft.dora or a.any() or b.any())]
    if not present:
      continue
    if len({len(b) for _, _, b in present}) > 1:
      raise JaxlmError(f'{name} holds {_places(module.homes)}, with several ranks; give them one in '
                       'config.model.peft.sites.')
    if peft.dora and len(present) < len(updates):
      raise JaxlmError(f'{name} holds {_places(module.homes)}: with DoRA all of them or none, or it would need lengths '
                       'of the others; change config.model.peft.sites.')
    # One A serves the kernels that share it; several are stacked, and each kernel's B is 0 but for its own block.
    rank, blocks, block_of = len(present[0][2]), [], {}
    for home, a, _ in present:
      block_of[home] = next((i for i, other in enumerate(blocks) if np.array_equal(a, other)), len(blocks))
      blocks += [a] if block_of[home] == len(blocks) else []
    joined = [np.zeros((rank * len(blocks), *outputs), blocks[0].dtype) for outputs in module.outputs]
    for (home, _, b), whole in zip(updates, joined):
      if home in block_of:
        whole[block_of[home] * rank:][:rank] = b
    tensors[f'{START}{name}.{A}'] = module.a.inverse([np.concatenate(blocks, -1)], model.vocab_size)
    tensors[f'{START}{name}.{B}'] = module.b.inverse(joined, model.vocab_size)
    if peft.dora:
      tensors[f'{START}{name}.{MAGNITUDE}'] = module.vector('out')[0].inverse(of('magnitude'), model.vocab_size)
    ranks[name] = rank * len(blocks)
    if len(blocks) > 1:  # as strong as before
      alphas[name] = peft.alpha * (math.sqrt(len(blocks)) if peft.stabilised else len(blocks))
  by = lambda values: {end: value for value in sorted(set(values.values()))
                       for end in targets.shortest((name for name in values if values[name] == value), found)}
  return dict(peft_type='LORA', r=peft.rank, lora_alpha=peft.alpha, lora_dropout=0.0, bias='none',
              use_rslora=peft.stabilised, use_dora=peft.dora, target_modules=targets.shortest(ranks, found),
              rank_pattern=by({name: rank for name, rank in ranks.items() if rank != peft.rank}),
              alpha_pattern=by(alphas), fan_in_fan_out=all(found[name].turned for name in ranks)), tensors


def _ia3_out(model: ModelConfig, rows: list[transfer.Row], leaves: Leaves) -> Told:
  found, tensors, sides = _sited(methods.SCALE, leaves, rows, model), {}, {}
  for name, module in found.items():
    scales = {home: leaves[path] for home in module.homes if (path := f'{home}{methods.SCALE}/scale') in leaves}
    if not scales:
      continue
    side, *others = {methods.at(model.peft, 'ia3', home.strip('/').split('/')) for home in scales}
    first, *rest = scales.values()
    alike = len(scales) == len(module.homes) and all(np.array_equal(first, x) for x in rest)
    if others or side == 'in' and not alike:
      raise JaxlmError(f'{name} holds {_places(module.homes)}, whose inputs are the same and have one scale there; let '
                       "config.model.peft.sites say 'out' of them.")
    bijection, shapes = module.vector(side)
    parts = [scales.get(home, np.ones(shape, first.dtype)) for home, shape in zip(module.homes, shapes)]
    scale = bijection.inverse(parts, model.vocab_size)
    tensors[f'{START}{name}.{SCALE}'] = scale[None] if side == 'in' else scale[:, None]
    sides[name] = side
  inward = {name for name in sides if sides[name] == 'in'}
  told = dict(peft_type='IA3', target_modules=targets.shortest(sides, found),
              feedforward_modules=targets.shortest(inward, found),
              fan_in_fan_out=all(found[name].turned for name in sides))
  among = set(told['feedforward_modules']) <= set(told['target_modules'])
  if not among or {name for name in sides if targets.is_forward(told, name)} != inward:
    told |= dict(target_modules=sorted(sides), feedforward_modules=sorted(inward))
  return told, tensors


def _virtual(model: ModelConfig, leaves: Leaves, width: int) -> np.ndarray:
  """What an encoder makes of its table; the table itself where there is none."""
  start = f'{methods.VIRTUAL}/'
  given = trees.unflatten({path.removeprefix(start): x for path, x in leaves.items() if path.startswith(start)})
  module = virtual.Virtual(*_exact(model), width)
  return given['embedding'] if model.peft.encoder == 'none' else np.asarray(module.apply({'params': given}))


def _exact(model: ModelConfig) -> tuple[ModelConfig, sharding.Layout]:
  """(the model in float32, a device alone)."""
  return dataclasses.replace(model, compute_dtype='float32'), sharding.single(base.default().sharding.rules)


def _prompt_out(model: ModelConfig, _: list[transfer.Row], leaves: Leaves) -> Told:
  _prompts_fit(model)
  width, encoder = model.embedding.width, model.peft.encoder
  kind = dict(peft_type='PROMPT_TUNING') if encoder == 'none' else dict(
      peft_type='P_TUNING', encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=model.peft.width)
  return kind | dict(num_virtual_tokens=model.peft.tokens, num_transformer_submodules=1, token_dim=width,
                     num_attention_heads=model.attention.num_heads, num_layers=model.num_layers), {
      PROMPT: _virtual(model, leaves, width)}


def _prefix_out(model: ModelConfig, _: list[transfer.Row], leaves: Leaves) -> Told:
  P, L, K, H = _prefix_dims(model)
  places = [f'stack/layer_{layer}/attention/{methods.PREFIX}/key_value' for layer in range(L)]
  if model.peft.encoder != 'none':
    hidden_PX, dense = _virtual(model, leaves, model.width), Dense(*_exact(model), (2, K, H), (None,) * 4)
    leaves = {place: np.asarray(dense.apply({'params': {
        leaf: leaves[f'{place}/{leaf}'] for leaf in ('kernel', 'bias')}}, hidden_PX)) for place in places}
  return dict(peft_type='PREFIX_TUNING', num_virtual_tokens=P, num_transformer_submodules=1, token_dim=K * H,
              num_attention_heads=K, num_layers=L), {
      PROMPT: np.stack([leaves[place] for place in places], 1).reshape(P, L * 2 * K * H)}


_WRITERS = {'lora': _lora_out, 'ia3': _ia3_out, 'prompt': _prompt_out, 'prefix': _prefix_out}


# ---- in ------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike, model: ModelConfig) -> tuple[PeftConfig, Tree]:
  """Reads an adapter that the `peft` package wrote for the model's Hugging Face form.

  Args:
    path: its folder.
    model: the base's; scan says whether the delta comes stacked.
  Returns:
    model.peft of the adapted model; and its delta as NumPy arrays, with the weights that the folder holds whole, which
    `also` names. A layer without an update that others have gets one that changes nothing.
  Raises:
    JaxlmError: anything missing, damaged, not understood, or that models here do not compute; one line.
  """
  path, family, model = Path(path), table.by_name(model.family), targets.plain(model)
  given = targets.read(path)
  parts: dict[str, Leaves] = {}
  whole: Leaves = {}
  for name, x in targets.tensors(path).items():
    name = name.removeprefix(START)
    part = _PART.fullmatch(name)
    (parts.setdefault(part[1], {}) if part else whole)[part[2] if part else name] = x
  rows = transfer.rows(family, model, prefix=any(name.startswith(family.PREFIX) for name in (*parts, *whole)))
  if given['peft_type'] in targets.UPDATES:
    peft, leaves = _updates_in(model, rows, given, parts)
  elif parts or PROMPT not in whole:
    raise JaxlmError(f'{path / FILE} holds {listed(parts or whole)}; {given["peft_type"]} calls for {PROMPT}.')
  else:
    peft, leaves = _virtual_in(model, given, whole.pop(PROMPT))
  also: Leaves = {}
  for row in rows:
    if row.theirs[0] in whole and not row.experts and '/layer_' not in row.ours[0]:
      x = whole.pop(row.theirs[0])
      _shaped(row.theirs[0], x, row.bijection.their_shape(row.shapes, model.vocab_size))
      also |= zip(row.ours, row.bijection.forward(x, row.shapes, model.vocab_size))
  if whole:
    raise JaxlmError(f'{path / FILE} holds {listed(whole)}: no update that is known, and no weight outside the layers.')
  tree = trees.unflatten({path: np.array(x) for path, x in (leaves | also).items()})
  return dataclasses.replace(peft, also='|'.join(also)), restack(tree, model) if model.scan else tree


def _shaped(name: str, x: np.ndarray, wanted: tuple[int, ...]) -> None:
  if x.shape != wanted:
    raise JaxlmError(f'Tensor {name} has shape {x.shape}; this model and {CONFIG} call for {wanted}.')


def _updates_in(model: ModelConfig, rows: list[transfer.Row], given: Mapping[str, Any],
                parts: Mapping[str, Leaves]) -> tuple[PeftConfig, Leaves]:
  found, is_lora = targets.modules(rows, model), given['peft_type'] == 'LORA'
  targeted = {name for name in found if targets.targeted(given, name)}
  if strange := set(parts) - set(found):
    raise JaxlmError(f'The adapter changes {listed(strange)}; this {model.family} model has no such matrix.')
  if ignored := set(parts) - targeted:
    raise JaxlmError(f'{FILE} holds updates of {listed(ignored)}, which target_modules in {CONFIG} does not mean.')
  if (missing := targeted - set(parts)) and given['target_modules'] != 'all-linear' or not parts:
    raise JaxlmError(f'{FILE} lacks updates of {listed(missing)}, which target_modules in {CONFIG} means.')
  wanted = {SCALE} if not is_lora else {A, B, MAGNITUDE} if given.get('use_dora') else {A, B}
  for name, tensors in parts.items():
    if set(tensors) != wanted:
      raise JaxlmError(f'{name} has {listed(tensors)}; {CONFIG} calls for {listed(wanted)}.')
  peft, leaves = (_lora_in if is_lora else _ia3_in)({name: (found[name], parts[name]) for name in parts}, given)
  if not leaves:
    raise JaxlmError(f'{FILE} holds updates that are 0, and nothing else; there is nothing to read.')
  shapes = transfer.param_shapes(dataclasses.replace(model, peft=peft))
  spare, dtype = {path for path in shapes if methods.is_delta(path)} - set(leaves), next(iter(leaves.values())).dtype
  if spare and peft.dora:
    raise JaxlmError(f'The adapter has DoRA in some layers, and none for {listed(spare)}; here it is in all. Merge it '
                     'into the base.')
  return peft, leaves | {path: np.full(shapes[path], not is_lora, dtype) for path in spare}


def _lora_in(parts: Mapping[str, tuple[Module, Leaves]], given: Mapping[str, Any]) -> tuple[PeftConfig, Leaves]:
  alphas = {name: float(targets.pattern_value(given.get('alpha_pattern'), name, given['lora_alpha'])) for name in parts}
  peft = PeftConfig(method='lora', rank=given['r'], stabilised=bool(given.get('use_rslora')),
                    dora=bool(given.get('use_dora')))
  updates: dict[str, tuple[float, Leaves]] = {}  # home: (strength, arrays)
  for name, (module, tensors) in parts.items():
    rank = int(targets.pattern_value(given.get('rank_pattern'), name, given['r']))
    read = {A: (module.a, [(*module.inputs, rank)]), B: (module.b, [(rank, *outputs) for outputs in module.outputs]),
            MAGNITUDE: module.vector('out')}
    ours = {}
    for part, x in tensors.items():
      bijection, shapes = read[part]
      _shaped(f'{name}.{part}', x, bijection.their_shape(shapes, 0))
      ours[part] = bijection.forward(x, shapes, 0)
    strength = methods.strength(dataclasses.replace(peft, alpha=alphas[name]), rank)
    for i, home in enumerate(module.homes):
      arrays = dict(a=ours[A][0], b=ours[B][i]) | (dict(magnitude=ours[MAGNITUDE][i]) if peft.dora else {})
      updates[home] = strength, arrays
  for alpha in (float(given['lora_alpha']), *sorted(set(alphas.values()))):
    peft = dataclasses.replace(peft, alpha=alpha)
    kept = {home: _kept(arrays['b'], strength, peft) for home, (strength, arrays) in updates.items()}
    if None not in kept.values():
      break
  else:
    raise JaxlmError(f'{CONFIG}: alpha_pattern={given["alpha_pattern"]!r} gives modules several alphas; here is one.')
  changed = {home for home, (_, arrays) in updates.items() if peft.dora or arrays['b'].any()}
  without, ranks, leaves = _idle(parts, changed), {}, {}
  for home, (_, arrays) in updates.items():
    place, rank = targets.site(home), len(arrays['b'][kept[home]])
    if not rank or place in without:
      continue
    if ranks.setdefault(place, rank) != rank:
      raise JaxlmError(f'{CONFIG}: rank_pattern gives {place} ranks {ranks[place]} and {rank}; here a place has one '
                       'in all layers.')
    arrays = arrays | dict(a=arrays['a'][..., kept[home]], b=arrays['b'][kept[home]])
    leaves |= {f'{home}{methods.LORA}/{leaf}': x for leaf, x in arrays.items()}
  return dataclasses.replace(peft, sites=tuple((place, rank == peft.rank or rank) for place, rank in sorted(
      ranks.items()))), leaves


def _kept(b: np.ndarray, strength: float, peft: PeftConfig) -> slice | None:
  """Which rows of B count with this strength: all, or the one block that is not 0 in a joined matrix; None: neither."""
  exact = (peft.alpha / strength) ** (2 if peft.stabilised else 1)
  rank = round(exact)
  if not math.isclose(rank, exact) or len(b) % max(rank, 1):
    return None
  some = np.flatnonzero(b.reshape(len(b), -1).any(1)) if rank < len(b) else [0]
  if not len(some):
    return slice(0)
  start = some[0] // rank * rank
  return slice(start, start + rank) if some[-1] < start + rank else None


def _idle(parts: Mapping[str, tuple[Module, Any]], changed: set[str]) -> set[str]:
  """Places that are changed in no layer, and only share matrices with others."""
  active = {targets.site(home) for home in changed}
  joined = ({targets.site(home) for home in module.homes} for module, _ in parts.values())
  return {place for places in joined if places & active for place in places - active}


def _ia3_in(parts: Mapping[str, tuple[Module, Leaves]], given: Mapping[str, Any]) -> tuple[PeftConfig, Leaves]:
  scales, sides = {}, {}
  for name, (module, tensors) in parts.items():
    side, x = 'in' if targets.is_forward(given, name) else 'out', tensors[SCALE]
    bijection, shapes = module.vector(side)
    size, = bijection.their_shape(shapes, 0)
    _shaped(f'{name}.{SCALE}', x, (1, size) if side == 'in' else (size, 1))
    arrays = bijection.forward(x.reshape(-1), shapes, 0)
    for home, scale in zip(module.homes, arrays * (len(module.homes) // len(arrays))):
      scales[home] = scale
      if sides.setdefault(targets.site(home), side) != side:
        raise JaxlmError(f'{CONFIG}: feedforward_modules means {name} in some layers only; here a place has one side.')
  without = _idle(parts, {home for home, scale in scales.items() if (scale != 1).any()})
  return PeftConfig(method='ia3', sites=tuple((place, side) for place, side in sorted(sides.items())
                                              if place not in without)), {
      f'{home}{methods.SCALE}/scale': scale for home, scale in scales.items() if targets.site(home) not in without}


def _virtual_in(model: ModelConfig, given: Mapping[str, Any], x: np.ndarray) -> tuple[PeftConfig, Leaves]:
  """A prompt or prefix, as its encoder made it where there was one."""
  P = given['num_virtual_tokens']
  if given['peft_type'] != 'PREFIX_TUNING':
    _prompts_fit(model)
    _shaped(PROMPT, x, (P * (given.get('num_transformer_submodules') or 1), model.embedding.width))
    # Encoder-decoders have rows for the decoder, too, which nothing there reads.
    return PeftConfig(method='prompt', tokens=P), {f'{methods.VIRTUAL}/embedding': x[:P]}
  peft = PeftConfig(method='prefix', tokens=P)
  _, L, K, H = _prefix_dims(dataclasses.replace(model, peft=peft))
  for key, wanted in dict(num_attention_heads=K, token_dim=K * H, num_layers=L).items():
    if given.get(key, wanted) != wanted:
      raise JaxlmError(f'{CONFIG}: {key}={given[key]}; keys and values of this model have {wanted}.')
  _shaped(PROMPT, x, (P, L * 2 * K * H))
  layers = np.moveaxis(x.reshape(P, L, 2, K, H), 1, 0)
  return peft, {f'stack/layer_{i}/attention/{methods.PREFIX}/key_value': layer for i, layer in enumerate(layers)}
