"""Block and Stack: the layers of every family, scanned or one by one; their caches; parameters, stacked or not."""
import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import trees
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup
from jaxlm.models import attention as attention_module
from jaxlm.models import peft, recurrent, stages, virtual
from jaxlm.models.attention import Attention, Context, LayerCache, Tokens, no_tokens
from jaxlm.models.config import LayerKind, ModelConfig, Segments, segments
from jaxlm.models.kernels import NO_WINDOW
from jaxlm.models.layers import Mlp, Norm, dropout, fold
from jaxlm.models.moe import Moe
from jaxlm.sharding import Layout
from jaxlm.types import Array, Tree

# Dropout of each branch's output; attention.py has sites 0 and 1.
BRANCH_SITES = {'attention': 2, 'cross': 3, 'mlp': 4}

# What the backward pass may keep; the rest is computed again.
REMAT = {
    'none': None,
    'full': lambda names: jax.checkpoint_policies.nothing_saveable,
    'dots': lambda names: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names('attention_out', 'attention_lse')),
    'names': lambda names: jax.checkpoint_policies.save_only_these_names(*names),
    'offload': lambda names: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), offload_src='device',
        offload_dst='pinned_host'),
}
REMAT_NAMES = ('attention_out', 'attention_lse', 'mlp_hidden')  # what `names` may keep; the second is blockwise's

Aux = dict[str, Array]  # float32 [B] by name


@flax.struct.dataclass
class BlockCache:
  """What one block keeps of the tokens it has seen.

  Attributes:
    mixer: keys and values, or a recurrent layer's state.
    cross: keys and values of the source, written where the source is read; None without cross-attention.
  """
  mixer: Any
  cross: LayerCache | None = None


@flax.struct.dataclass
class Cache:
  """What a model keeps of the tokens it has seen.

  Attributes:
    layers: of each layer.
    tokens: by number of slots, what is known of the tokens in all layers' caches of so many.
    source: of the tokens whose keys and values are in `cross`; None without cross-attention.
  """
  layers: list[BlockCache]
  tokens: dict[int, Tokens]
  source: Tokens | None = None


# How tokens of a layer meet: (the module, its empty cache for (config, batch, slots)).
MIXERS = {'attention': (Attention, attention_module.init_cache)} | {
    name: (recurrent.Recurrent, recurrent.init_cache) for name in recurrent.CELLS}


def init_cache(config: ModelConfig, batch: int, length: int, source_length: int = 0,
               spare: int = 0) -> Cache:
  """An empty cache: in each layer `length` slots, fewer where the layer's window is shorter.

  Args:
    batch: rows.
    length: tokens a row may reach, prompt and continuation.
    source_length: columns of an encoder-decoder's source.
    spare: slots that a window's layer has more than the window.
  """
  _, empty = lookup(MIXERS, config.mixer, 'mixer')
  crosses = config.structure == 'encoder_decoder'
  cross = lambda: attention_module.init_cache(config, batch, source_length) if crosses else None
  slots = lambda layer: min(length, config.window(layer) + spare if config.window(layer) else length)
  layers = [BlockCache(empty(config, batch, slots(layer)), cross()) for layer in range(config.num_layers)]
  sizes = sorted({layer.mixer.slots for layer in layers if isinstance(layer.mixer, LayerCache)})
  return Cache(layers, {size: no_tokens(batch, size) for size in sizes},
               no_tokens(batch, source_length) if crosses else None)


class Block(nn.Module):
  """Branches, each inside `x = post_norm(alpha·x + out_norm(f(in_norm(x))))`; side by side if parallel.

  The branches are what mixes tokens, cross-attention in a decoder that has a source, and the MLP.
  """
  config: ModelConfig
  layout: Layout
  kind: LayerKind = LayerKind()

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context, layer: Any, window: Any,
               cache: BlockCache | None = None) -> tuple[Array, BlockCache | None, Aux]:
    """Args:
      x_BTD: the residual stream.
      context: what all layers share.
      layer: this layer's number, int or int32 scalar; folded into dropout keys.
      window: tokens it sees back, likewise; None: all.
      cache: this layer's.
    """
    config, residual, kind = self.config, self.config.residual, self.kind
    keys_B, aux, caches = fold(context.keys_B, layer), {}, {}
    norm = lambda on, name: Norm(config, name=name) if on else lambda x: x
    pin = lambda y: self.layout.constrain(y, 'act_batch', 'act_stream', 'act_embed')
    mixer, _ = lookup(MIXERS, config.mixer, 'mixer')

    def mix(y_BTD):
      out_BTD, caches['mixer'] = mixer(config, self.layout, name='attention')(
          y_BTD, context, window, keys_B, cache and cache.mixer)
      return out_BTD

    def cross(y_BTD):
      out_BTD, caches['cross'] = Attention(config, self.layout, cross=True, name='cross')(
          y_BTD, context, None, keys_B, cache and cache.cross)
      return out_BTD

    def feed(y_BTD):
      if not kind.moe:
        return Mlp(config, self.layout, name='mlp')(y_BTD)
      out_BTD, told = Moe(config, self.layout, name='mlp')(y_BTD, context.tokens.segments)
      aux.update(told)
      return out_BTD

    branches = {'attention': mix}
    if config.structure == 'encoder_decoder':
      branches['cross'] = cross
    if config.mlp.width or kind.moe:
      branches['mlp'] = feed
    def adapted(name, y_BTD, branch):
      """A branch's output, with its bottleneck's where it has one."""
      out_BTD = branch(y_BTD)
      if not peft.at(config.peft, 'bottleneck', (*self.path, name)):
        return out_BTD
      bottleneck = virtual.Bottleneck(config, self.layout, name=f'{name}_{peft.BOTTLENECK}')
      return out_BTD + bottleneck(y_BTD if config.peft.parallel else out_BTD)

    branches = {name: functools.partial(adapted, name, branch=branch) for name, branch in branches.items()}
    enter = lambda name: norm(residual.in_norm and not (kind.bare and name == 'attention'), f'{name}_norm')
    leave = lambda y, name: dropout(norm(residual.out_norm, f'{name}_out_norm')(y), config.dropout, keys_B,
                                    BRANCH_SITES[name])
    if residual.parallel:
      y_BTD = enter('attention')(x_BTD)
      inputs = {name: enter(name)(x_BTD) if residual.parallel_norms and name != 'attention' else y_BTD
                for name in branches}
      x_BTD = residual.alpha * x_BTD + sum(leave(f(inputs[name]), name) for name, f in branches.items())
      x_BTD = pin(norm(residual.post_norm, 'post_norm')(x_BTD))
    else:
      for name, f in branches.items():
        x_BTD = residual.alpha * x_BTD + leave(f(enter(name)(x_BTD)), name)
        x_BTD = pin(norm(residual.post_norm, f'{name}_post_norm')(x_BTD))
    return x_BTD, None if cache is None else BlockCache(caches['mixer'], caches.get('cross')), aux


class Period(nn.Module):
  """The blocks of one repeat, scanned."""
  config: ModelConfig
  layout: Layout
  kinds: tuple[LayerKind, ...]

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context, layers: Array, windows: Array | None,
               caches: list[BlockCache | None]) -> tuple[Array, tuple[list[BlockCache | None], Aux]]:
    block, new, total = _block_class(self.config, scanned=True, cached=caches[0] is not None), [], {}
    for slot, kind in enumerate(self.kinds):
      window = None if windows is None else windows[slot]
      x_BTD, cache, aux = block(self.config, self.layout, kind, name=f'slot_{slot}')(
          x_BTD, context, layers[slot], window, caches[slot])
      new.append(cache)
      total = add(total, aux)
    return x_BTD, (new, total)


def add(total: Aux, aux: Aux) -> Aux:
  """Sums by name; a name may be in one alone."""
  return {name: total[name] + aux[name] if name in total and name in aux else total.get(name, aux.get(name))
          for name in total | aux}


def _block_class(config: ModelConfig, scanned: bool, cached: bool):
  """Block, with what its backward pass computes again; with a cache there is none."""
  policy = None if cached else lookup(REMAT, config.remat, 'remat policy')
  # prevent_cse guards against a merge that cannot happen inside scan, and costs.
  return Block if policy is None else nn.remat(Block, policy=policy(config.remat_names), prevent_cse=not scanned)


class Stack(nn.Module):
  """All layers: scanned over repeats of a period in training, one by one in decoding.

  With `config.scan` parameters are `prefix_i`, `period/slot_i` stacked over repeats, `suffix_i`; without it they are
  `layer_i`. `unstack` and `restack` turn one into the other. Layers that share their parameters have one of each.
  """
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context,
               cache: list[BlockCache] | None = None) -> tuple[Array, list[BlockCache] | None, Aux]:
    config, kinds = self.config, self.config.layer_kinds()
    caches = [None] * config.num_layers if cache is None else list(cache)
    total, block = {}, _block_class(config, scanned=False, cached=cache is not None)

    def single(x_BTD, total, layer, module):
      x_BTD, caches[layer], aux = module(x_BTD, context, layer, config.window(layer) or None, caches[layer])
      return x_BTD, add(total, aux)

    if not config.scan:
      make = lambda i: block(config, self.layout, kinds[i], name=f'layer_{i}')
      shared = make(0) if config.share_layers else None
      for i in range(config.num_layers):
        x_BTD, total = single(x_BTD, total, i, shared or make(i))
      return x_BTD, None if cache is None else caches, total

    cut = segments(kinds)
    first, last = len(cut.prefix), config.num_layers - len(cut.suffix)
    for i in range(first):
      x_BTD, total = single(x_BTD, total, i, block(config, self.layout, kinds[i], name=f'prefix_{i}'))
    shape = (cut.repeats, len(cut.period))
    layers, windows = jnp.arange(first, last, dtype=jnp.int32).reshape(shape), None
    if any(config.attention.windows):
      windows = jnp.asarray([config.window(i) or NO_WINDOW for i in range(first, last)], jnp.int32).reshape(shape)
    of_slot = lambda slot: caches[first + slot:last:shape[1]]
    given = [None] * shape[1]
    if cache is not None:
      given = [jax.tree.map(lambda *x: jnp.stack(x), *of_slot(slot)) for slot in range(shape[1])]
    repeats = self._staged if self.layout.mesh.shape[stages.AXIS] > 1 and not self.is_initializing() else self._scanned
    x_BTD, new, aux = repeats(cut, x_BTD, context, layers, windows, given)
    total = add(total, aux)
    if cache is not None:
      for slot in range(shape[1]):
        caches[first + slot:last:shape[1]] = [jax.tree.map(lambda x: x[i], new[slot]) for i in range(cut.repeats)]
    for i in range(last, config.num_layers):
      x_BTD, total = single(x_BTD, total, i, block(config, self.layout, kinds[i], name=f'suffix_{i - last}'))
    return x_BTD, None if cache is None else caches, total

  def _scanned(self, cut: Segments, x_BTD: Array, context: Context, layers: Array, windows: Array | None,
               caches: list[BlockCache | None]) -> tuple[Array, list[BlockCache | None], Aux]:
    """The repeats of a period, one after the other."""
    shared = self.config.share_layers
    period = nn.scan(Period, length=cut.repeats,
                     variable_axes={} if shared else {'params': 0},
                     variable_broadcast='params' if shared else False,
                     split_rngs={'params': not shared},
                     in_axes=(nn.broadcast, 0, nn.broadcast if windows is None else 0,
                              nn.broadcast if caches[0] is None else 0),
                     metadata_params={nn.PARTITION_NAME: 'layers'})
    x_BTD, (new, aux) = period(self.config, self.layout, cut.period, name='period')(x_BTD, context, layers, windows,
                                                                                    caches)
    return x_BTD, new, {name: x.sum(0) for name, x in aux.items()}

  def _staged(self, cut: Segments, x_BTD: Array, context: Context, layers: Array, windows: Array | None,
              caches: list[BlockCache | None]) -> tuple[Array, list[None], Aux]:
    """The same, as stages of a pipeline."""
    config = self.config
    if caches[0] is not None:
      raise JaxlmError('A pipeline keeps no cache; set config.mesh.pipe to 1, or config.objective.permutation.memory '
                       'to 0.')
    # The pipeline's own remat goes around a repeat and the slice of its weights; blocks need none.
    one = Period(dataclasses.replace(config, remat='none'), stages.inside(self.layout), cut.period, parent=None)

    def apply(weights, numbers, x_BTD, context):
      x_BTD, (_, aux) = one.apply({'params': weights}, x_BTD, context, *numbers, caches)
      return x_BTD, aux

    policy = lookup(REMAT, config.remat, 'remat policy')
    policy = policy(config.remat_names) if policy else jax.checkpoint_policies.save_anything_except_these_names(
        stages.WEIGHTS)
    x_BTD, aux = stages.run(apply, self.variables['params']['period'], x_BTD, context, (layers, windows), cut.repeats,
                              self.layout, policy)
    return x_BTD, caches, aux


# ---- parameters of a stack, layer by layer -----------------------------------------------------------------------


def _places(config: ModelConfig, layout: Layout | None = None) -> dict[str, tuple[str, int | None]]:
  """{path of a layer with scan=False: (path with scan=True, index into the first dim)}, of all stacks of a model.

  Args:
    layout: where a pipeline's layers lie in memory; None: in their order.
  """
  places = {}
  for tower, its_config in config.towers().items():
    cut = segments(its_config.layer_kinds())
    at = stages.places(cut.repeats, layout) if layout else np.arange(cut.repeats)
    for layer in range(1 if its_config.share_layers else its_config.num_layers):
      place, index = cut.path(layer)
      index = None if index is None or its_config.share_layers else int(at[index])
      places[f'{tower}stack/layer_{layer}/'] = f'{tower}stack/{place}/', index
  return places


def depths(params: Tree, config: ModelConfig, layout: Layout | None = None) -> dict[str, np.ndarray | int]:
  """{path: how far above the input a parameter stands}: 0 embeddings, 1 the first layer, the last one more than layers.

  Of stacked layers an array, as they lie in memory.
  """
  leaves, found = trees.flatten(params), {}
  last = max(tower.num_layers for tower in config.towers().values()) + 1
  for path, leaf in leaves.items():
    found[path] = 0 if re.match(r'(.*/)?\w*embed\w*(/|$)', path) else last
  for single, (place, index) in _places(config, layout).items():
    depth = int(re.search(r'layer_(\d+)/$', single)[1]) + 1
    for path, leaf in leaves.items():
      if path.startswith(place):
        if index is None:
          found[path] = depth
        else:
          found[path] = np.zeros(leaf.shape[0], np.int32) if np.ndim(found[path]) == 0 else found[path]
          found[path][index] = depth
  return found


def unstack(params: Tree, config: ModelConfig, layout: Layout | None = None) -> Tree:
  """Parameters of a scanned model, as they lie in memory, as those of the same model with scan=False."""
  leaves, out, done = trees.flatten(params), {}, set()
  for single, (place, index) in _places(config, layout).items():
    for path, leaf in leaves.items():
      if path.startswith(place):
        out[single + path[len(place):]] = leaf if index is None else leaf[index]
        done.add(path)
  return trees.unflatten(out | {path: leaf for path, leaf in leaves.items() if path not in done})


def restack(params: Tree, config: ModelConfig) -> Tree:
  """The inverse of `unstack`."""
  out, stacked, places = {}, {}, _places(config)
  for path, leaf in trees.flatten(params).items():
    single = next((start for start in places if path.startswith(start)), None)
    if single is None:
      out[path] = leaf
      continue
    place, index = places[single]
    if index is None:
      out[place + path[len(single):]] = leaf
    else:
      stacked.setdefault(place + path[len(single):], {})[index] = leaf
  stack = lambda parts: (np if isinstance(parts[0], np.ndarray) else jnp).stack([parts[i] for i in range(len(parts))])
  return trees.unflatten(out | {path: stack(parts) for path, parts in stacked.items()})
