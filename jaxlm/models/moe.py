"""Mixture of experts, in the MLP's place: who computes a token is chosen token by token."""
import dataclasses
import math
from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup
from jaxlm.models import peft, quantised
from jaxlm.models.config import ModelConfig, MoeConfig
from jaxlm.models.layers import ACTIVATIONS, Dense, Mlp
from jaxlm.sharding import Layout, differ
from jaxlm.types import Array

SCOPE = '_dropless'  # in names of a compiled program's instructions: where tokens go to their experts

# Beside the legend of types.py: K is top_k, the choices of a token; X numbers tokens of a device, Y their choices.

Weights = dict[str, tuple[Array, Array | None]]  # kernel [E, in, out] and bias [E, out] of gate, up and down


# ---- who is chosen -----------------------------------------------------------------------------------------------


class Router(nn.Module):
  """Scores of experts, in float32: bfloat16 cannot tell close ones apart."""
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array) -> tuple[Array, Array | None]:
    """(logits [B, T, E]; the bias [E] that helps to choose, or None)."""
    init, E = self.config.init, self.config.moe.num_experts
    param = lambda name, init, axes, shape: self.param(name, nn.with_logical_partitioning(init, axes), shape,
                                                       jnp.float32)
    axes = ('embed', None)
    w_DE = param('kernel', nn.initializers.normal(init.std), axes, (x_BTD.shape[-1], E))
    bias_E = param('bias', nn.initializers.zeros, (None,), (E,)) if self.config.moe.router_bias else None
    return jnp.einsum('BTD,DE->BTE', x_BTD.astype(jnp.float32), self.layout.gathered(w_DE, *axes),
                      precision=jax.lax.Precision.HIGHEST), bias_E


def choose(moe: MoeConfig, logits_BTE: Array, bias_E: Array | None) -> tuple[Array, Array, Array]:
  """Which experts a token goes to.

  Args:
    logits_BTE: the router's.
    bias_E: added to scores to choose by, not to weigh by; no gradient reaches it.
  Returns:
    experts int32 [B, T, K]; what each one's answer counts, float32 [B, T, K]; probabilities [B, T, E].
  Source: Shazeer et al. 2017; with sigmoids, bias and groups: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
  """
  softmax = moe.router == 'softmax'
  score_BTE = jax.nn.softmax(logits_BTE) if softmax else jax.nn.sigmoid(logits_BTE)
  by_BTE = jax.lax.stop_gradient(score_BTE if bias_E is None else score_BTE + bias_E)
  if moe.top_groups < moe.num_groups:
    B, T, E = by_BTE.shape
    grouped_BTGE = by_BTE.reshape(B, T, moe.num_groups, -1)
    two_BTGX = largest(grouped_BTGE, min(2, grouped_BTGE.shape[-1]))
    best_BTG = jnp.take_along_axis(grouped_BTGE, two_BTGX, axis=-1).sum(-1)
    top_BTX = largest(best_BTG, moe.top_groups)
    open_BTG = (jnp.arange(moe.num_groups) == top_BTX[..., None]).any(-2)
    by_BTE = jnp.where(open_BTG[..., None], grouped_BTGE, -jnp.inf).reshape(B, T, E)
  experts_BTK = largest(by_BTE, moe.top_k)
  weights_BTK = jnp.take_along_axis(score_BTE, experts_BTK, axis=-1)
  if moe.normalise:
    weights_BTK /= weights_BTK.sum(-1, keepdims=True) + 1e-20  # sigmoids may all be 0
  probs_BTE = score_BTE if softmax else score_BTE / (score_BTE.sum(-1, keepdims=True) + 1e-20)
  return experts_BTK, weights_BTK * moe.scale, probs_BTE


def losses(logits_BTE: Array, probs_BTE: Array, experts_BTK: Array, segments_BT: Array) -> dict[str, Array]:
  """Balance and z losses, float32 [B], of the real tokens of each row.

  Balance is E · Σ_e f_e · P_e, of the choices of e a token, f_e, and its mean probability, P_e: top_k where all is
  even. It is defined by row, so that it does not depend on which rows share a batch.

  Source: Fedus et al. 2021, Switch, arXiv:2101.03961, eq. 4; Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5.
  """
  E, real_BT = logits_BTE.shape[-1], (segments_BT > 0).astype(jnp.float32)
  count_B = jnp.maximum(real_BT.sum(1), 1)
  mean = lambda x_BTE: jnp.einsum('BTE,BT->BE', x_BTE, real_BT) / count_B[:, None]
  f_BE = mean(jax.nn.one_hot(experts_BTK, E, dtype=jnp.float32).sum(2))
  log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
  return {'balance': E * (f_BE * mean(probs_BTE)).sum(-1),
          'router_z': (jnp.square(log_z_BT) * real_BT).sum(1) / count_B}


# ---- experts -----------------------------------------------------------------------------------------------------


class Kernel(nn.Module):
  """A projection of every expert: its kernel [E, in, out] and bias [E, out], which Moe multiplies in its own way."""
  config: ModelConfig
  shape: tuple[int, int]
  axes: tuple[str, str]
  residual: bool = False

  @nn.compact
  def __call__(self) -> tuple[Array, Array | None]:
    config, E = self.config, self.config.moe.num_experts
    std = config.init.std / (math.sqrt(2 * config.num_layers) if self.residual and config.init.scale_by_depth else 1)
    dtype = jnp.dtype(config.param_dtype)
    normal = quantised.initialiser(config.peft, self.path, nn.initializers.normal(std), ('expert', *self.axes), front=1)
    kernel = self.param('kernel', normal, (E, *self.shape), dtype)
    rank, side = peft.rank_at(config.peft, self.path), peft.at(config.peft, 'ia3', self.path)
    if quantised.is_parts(kernel):
      kernel = quantised.whole(kernel, dtype if rank or side else config.dtype)
    if rank or side:
      kernel = peft.ExpertDelta(config, self.axes, rank, side or '', name=peft.LORA if rank else peft.SCALE)(kernel)
    if not config.mlp.bias:
      return kernel, None
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('expert', self.axes[1]))
    return kernel, self.param('bias', zeros, (E, self.shape[1]), dtype)


class Experts(nn.Module):
  """The weights of all experts."""
  config: ModelConfig

  @nn.compact
  def __call__(self) -> Weights:
    D, F = self.config.width, self.config.moe.width
    names = ('gate', 'up') if self.config.mlp.gated else ('up',)
    into = {name: Kernel(self.config, (D, F), ('embed', 'mlp'), name=name)() for name in names}
    return into | {'down': Kernel(self.config, (F, D), ('mlp', 'embed'), residual=True, name='down')()}


def _hidden(config: ModelConfig, project: Callable[[str], Array]) -> Array:
  act = lookup(ACTIVATIONS, config.mlp.activation, 'activation')
  h = act(project('gate')) * project('up') if config.mlp.gated else act(project('up'))
  return checkpoint_name(h, 'mlp_hidden')


def largest(x: Array, count: int) -> Array:
  """Where in the last dim its `count` largest stand, the largest first, of equals the first."""
  # Not top_k, which XLA gathers over a pipeline's stages, nor a sort, which takes ten times as long on a CPU.
  found = []
  for _ in range(count):
    found.append(x.argmax(-1))
    x = jnp.where(jnp.arange(x.shape[-1]) == found[-1][..., None], -jnp.inf, x)
  return jnp.stack(found, axis=-1)


def _sorted(keys_Y: Array) -> tuple[Array, Array]:
  """(the keys in order, where each stood)."""
  # Not argsort: inside shard_map JAX 0.10 and 0.12 take its result to be the same on devices whose keys differ, and
  # sum gradients too early. Columns that depend on the keys are known to differ as they do.
  return jax.lax.sort_key_val(keys_Y, jnp.arange(keys_Y.shape[0], dtype=jnp.int32) + 0 * keys_Y)


def _ragged(contract_rows: bool) -> Callable[..., Array]:
  """Products of stretches of rows, as many as sizes_E says. Any number of dims may stand in front of all.

  x_YI with each one's matrix of [E, I, O] is [Y, O]; where rows are contracted, x_YI with y_YO is [E, I, O], float32.
  """
  # JAX 0.10 vmaps ragged_dot once at most; a pipeline's stages and rows are two.
  @jax.custom_batching.custom_vmap
  def product(x: Array, y: Array, sizes_E: Array) -> Array:
    lead = sizes_E.shape[:-1]
    n = int(len(lead) > 0)  # one dim in front
    flat = lambda a: a.reshape(-1, *a.shape[len(lead):]) if n else a
    batch = (0,) if n else ()
    if contract_rows:
      numbers = jax.lax.RaggedDotDimensionNumbers((((n,), (n,)), (batch, batch)), [n], [])
      out = jax.lax.ragged_dot_general(flat(x), flat(y), flat(sizes_E), numbers, preferred_element_type=jnp.float32)
      out = jnp.swapaxes(out, 0, 1) if n else out
    else:
      numbers = jax.lax.RaggedDotDimensionNumbers((((n + 1,), (n + 1,)), (batch, batch)), [n], [n])
      out = jax.lax.ragged_dot_general(flat(x), flat(y), flat(sizes_E), numbers)
    return out.reshape(*lead, *out.shape[n:])

  @product.def_vmap
  def _(size, batched, *args):
    front = (a if is_batched else jnp.broadcast_to(a, (size, *a.shape)) for a, is_batched in zip(args, batched))
    return product(*front), True

  return product


_RAGGED, _RAGGED_ROWS = _ragged(False), _ragged(True)


@jax.custom_vjp
def by_group(x_YI: Array, kernel_EIO: Array, sizes_E: Array) -> Array:
  """[Y, O]: stretches of rows, as many as sizes_E says, each times its own matrix, in x's dtype."""
  return _RAGGED(x_YI, kernel_EIO.astype(x_YI.dtype), sizes_E)


def _by_group_forward(x_YI, kernel_EIO, sizes_E):
  return by_group(x_YI, kernel_EIO, sizes_E), (x_YI, kernel_EIO, sizes_E)


def _by_group_backward(saved, dy_YO):
  x_YI, kernel_EIO, sizes_E = saved
  dx_YI = _RAGGED(dy_YO, jnp.swapaxes(kernel_EIO, 1, 2).astype(dy_YO.dtype), sizes_E)
  dkernel_EIO = _RAGGED_ROWS(x_YI, dy_YO, sizes_E)
  return dx_YI, dkernel_EIO.astype(kernel_EIO.dtype), np.zeros(sizes_E.shape, jax.dtypes.float0)


by_group.defvjp(_by_group_forward, _by_group_backward)


def by_sorting(config: ModelConfig, weights: Weights, x_XD: Array, experts_XK: Array, share_XK: Array,
               first: Array | int, down_bias: Array | float) -> Array:
  """Weighted answers, float32 [X, D], of the experts whose weights are here to X tokens.

  Choices are sorted by expert, so that each expert's tokens are a stretch of rows, which `ragged_dot` multiplies.

  Args:
    experts_XK: chosen experts; those not here count nothing.
    share_XK: what each answer counts.
    first: number of the first expert here.
    down_bias: times the last bias: 0 on all devices but one of those that share an expert's width.
  """
  K, E = experts_XK.shape[1], weights['down'][0].shape[0]
  number_Y = experts_XK.reshape(-1) - first
  number_Y = jnp.where((number_Y >= 0) & (number_Y < E), number_Y, E)
  number_Y, order_Y = _sorted(number_Y)
  sizes_E = jnp.bincount(number_Y, length=E + 1)[:E].astype(jnp.int32)
  here_Y1 = (number_Y < E)[:, None]
  # What ragged_dot says of rows after the last group is nobody's promise, nor what it hands back to them.
  known = lambda y: jnp.where(here_Y1, y, 0)

  def multiply(rows, name, bias_scale=1.0):
    kernel, bias = weights[name]
    y = by_group(rows, kernel, sizes_E)
    if bias is not None:
      y = y + (bias_scale * bias[jnp.minimum(number_Y, E - 1)]).astype(y.dtype)
    return known(y)

  rows_YD = known(x_XD[order_Y // K].astype(config.dtype))
  answers_YD = multiply(_hidden(config, lambda name: multiply(rows_YD, name)), 'down', down_bias)
  answers_XKD = answers_YD[_sorted(order_Y)[1]].reshape(*experts_XK.shape, -1)
  return jnp.einsum('XKD,XK->XD', answers_XKD.astype(jnp.float32), share_XK)


def capacity(moe: MoeConfig, length: int) -> int:
  """Tokens of a row that an expert takes."""
  return min(length, math.ceil(moe.capacity_factor * length * moe.top_k / moe.num_experts))


def places(experts_BTK: Array, share_BTK: Array, E: int, C: int) -> tuple[Array, Array]:
  """(what each place's answer counts for a token, float32 [B, T, E, C]; bool [B, T, K]: choices that found a place).

  Earlier tokens go first, whichever of their choices it is, so that no token's fate depends on later ones.
  """
  B, T, K = experts_BTK.shape
  wants_BYE = jax.nn.one_hot(experts_BTK, E, dtype=jnp.int32).reshape(B, T * K, E) * (
      share_BTK != 0).reshape(B, T * K, 1)
  before_BTK = ((jnp.cumsum(wants_BYE, axis=1) - wants_BYE) * wants_BYE).sum(-1).reshape(B, T, K)
  wants_BTKE = wants_BYE.reshape(B, T, K, E)
  # one_hot is 0 where there is no such place.
  share_BTEC = jnp.einsum('BTKE,BTKC,BTK->BTEC', wants_BTKE.astype(jnp.float32),
                          jax.nn.one_hot(before_BTK, C, dtype=jnp.float32), share_BTK)
  return share_BTEC, (before_BTK < C) & (wants_BTKE.sum(-1) > 0)


class Moe(nn.Module):
  """Every token goes to `top_k` of E experts, and to a shared one where there is such.

  'dropless' computes every choice; 'capacity' as many of a row's as fit, so that shapes are even: a choice without a
  place counts nothing there, and the token passes by the residual. Padding goes to nobody.

  Parameters: router/{kernel,bias}, experts/{gate,up,down}/{kernel,bias}, shared/{gate,up,down}/…, shared_gate/kernel.
  The router's bias has no gradient; DeepSeek-V3 moves it by what experts were given, which is not done here.
  """
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, segments_BT: Array) -> tuple[Array, dict[str, Array]]:
    """(answers [B, T, D]; float32 [B] by name: 'balance', 'router_z')."""
    config, moe = self.config, self.config.moe
    self._check()
    logits_BTE, bias_E = Router(config, self.layout, name='router')(x_BTD)
    # On each device for its own tokens: XLA would gather all logits for top_k.
    rows = self._rows(x_BTD)
    experts_BTK, share_BTK, probs_BTE = self.layout.by_device(
        lambda logits_BTE, bias_E: choose(moe, logits_BTE, bias_E), (rows, PartitionSpec()), (rows,) * 3)(
            logits_BTE, bias_E)
    share_BTK = jnp.where(segments_BT[..., None] > 0, share_BTK, 0)
    mode = {'dropless': self._dropless, 'capacity': self._capacity}[moe.mode]
    y_BTD = mode(Experts(config, name='experts')(), x_BTD, experts_BTK, share_BTK).astype(config.dtype)
    if moe.shared_width:
      alike = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, width=moe.shared_width))
      shared_BTD = Mlp(alike, self.layout, name='shared')(x_BTD)
      if moe.shared_gate:
        gate = Dense(config, self.layout, (1,), ('embed', None), bias=False, name='shared_gate')
        shared_BTD *= jax.nn.sigmoid(gate(x_BTD))
      y_BTD += shared_BTD
    return y_BTD, losses(logits_BTE, probs_BTE, experts_BTK, segments_BT)

  def _check(self):
    """Raises JaxlmError for numbers that do not fit together."""
    moe = self.config.moe
    E, G = moe.num_experts, moe.num_groups
    if E % G or moe.top_groups > G:
      raise JaxlmError(f'config.model.moe: num_experts={E} in num_groups={G}, of which top_groups={moe.top_groups}; '
                       'set groups that divide the experts, and no more top_groups than those.')
    if moe.top_k > E // G * moe.top_groups:
      raise JaxlmError(f'config.model.moe.top_k={moe.top_k} is more than the {E // G * moe.top_groups} experts there '
                       'are to choose from; set it lower.')

  def _axes(self, weights: Weights) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes over which experts, and each expert's width, are spread."""
    spec = self.layout.spec(('expert', 'embed', 'mlp'), weights['up'][0].shape, 'mlp/experts/up/kernel')
    return _flat(spec[0]), _flat(spec[2])

  def _rows(self, x_BTX: Array) -> PartitionSpec:
    """How tokens are spread."""
    return self.layout.spec(('act_batch', 'act_length', None), x_BTX.shape, 'activation')

  def _dropless(self, weights: Weights, x_BTD: Array, experts_BTK: Array, share_BTK: Array) -> Array:
    """`by_sorting` on each device for its own tokens; where experts are spread, for those of all that share them.

    The tokens of devices that hold different experts are gathered, each device answers with the experts it has, and
    answers are summed where they belong. XLA may not do it: it would sort all tokens of all devices together.
    """
    config, rows = self.config, self._rows(x_BTD)
    of_dim = [_flat(part) for part in rows]
    over_experts, over_width = self._axes(weights)
    # A width that is spread over the devices of different tokens (fsdp) is gathered.
    over_width = tuple(a for a in over_width if a not in of_dim[0] + of_dim[1])
    gathered = [(axis, dim) for dim in (0, 1) for axis in of_dim[dim] if axis in over_experts]
    shared = over_width + tuple(a for a in over_experts if a not in of_dim[0] + of_dim[1])
    of_tokens = tuple(a for a in of_dim[0] + of_dim[1] if a not in over_experts)
    kernel = {'up': PartitionSpec(over_experts or None, None, over_width or None),
              'down': PartitionSpec(over_experts or None, over_width or None, None)}
    kernel['gate'] = kernel['up']
    bias = {name: PartitionSpec(spec[0], spec[2]) for name, spec in kernel.items()}
    specs = {name: (kernel[name], None if pair[1] is None else bias[name]) for name, pair in weights.items()}

    def local(weights, x_BTD, experts_BTK, share_BTK):
      # Declared to differ while still float32, for so their gradients are summed over devices: bfloat16 rounds, and XLA
      # on a CPU aborts on it where an axis is not manual.
      weights = jax.tree.map(lambda w: differ(w, of_tokens), weights)
      x_BTD = differ(x_BTD, shared)
      for axis, dim in reversed(gathered):
        x_BTD, experts_BTK, share_BTK = (jax.lax.all_gather(y, axis, axis=dim, tiled=True)
                                         for y in (x_BTD, experts_BTK, share_BTK))
      first = jax.lax.axis_index(over_experts) * weights['down'][0].shape[0] if over_experts else 0
      once = (jax.lax.axis_index(over_width) == 0).astype(jnp.float32) if over_width else 1.0
      flat = lambda y: y.reshape(-1, y.shape[-1])
      y_BTD = by_sorting(config, weights, flat(x_BTD), flat(experts_BTK), flat(share_BTK), first,
                         once).reshape(x_BTD.shape)
      y_BTD = jax.lax.psum(y_BTD, shared) if shared else y_BTD
      for axis, dim in gathered:
        y_BTD = jax.lax.psum_scatter(y_BTD, axis, scatter_dimension=dim, tiled=True)
      return y_BTD

    return self.layout.by_device(local, (specs, rows, rows, rows), rows)(
        weights, x_BTD.astype(jnp.float32), experts_BTK, share_BTK)

  def _capacity(self, weights: Weights, x_BTD: Array, experts_BTK: Array, share_BTK: Array) -> Array:
    """Tokens are copied to the places of experts, [E, B, C, D], and answers back, by products with who sits where."""
    config, moe, layout = self.config, self.config.moe, self.layout
    C = capacity(moe, x_BTD.shape[1])
    share_BTEC, found_BTK = places(experts_BTK, share_BTK, moe.num_experts, C)
    if self.is_mutable_collection('moe'):  # somebody asked
      self.sow('moe', 'dropped', (share_BTK != 0) & ~found_BTK)
    over_experts, _ = self._axes(weights)
    batch = _flat(layout.spec(('act_batch',), x_BTD.shape[:1], 'activation')[0])

    def pin(y_EBCX, by_expert, last=None):
      """First by rows, as the tokens are, then by experts: a change of layout that is one all-to-all."""
      of_rows = tuple(a for a in batch if not (by_expert and a in over_experts)) or None
      spec = PartitionSpec(over_experts if by_expert and over_experts else None, of_rows, None, last)
      return jax.lax.with_sharding_constraint(y_EBCX, NamedSharding(layout.mesh, spec))

    def multiply(y_EBCX, name):
      kernel, bias = weights[name]
      y = jnp.einsum('EBCX,EXY->EBCY', y_EBCX, kernel.astype(config.dtype))
      return y if bias is None else y + bias[:, None, None].astype(y.dtype)

    seats_BTEC = (share_BTEC != 0).astype(config.dtype)
    rows_EBCD = pin(pin(jnp.einsum('BTEC,BTD->EBCD', seats_BTEC, x_BTD.astype(config.dtype)), False), True)
    h_EBCF = _hidden(config, lambda name: multiply(rows_EBCD, name))
    answers_EBCD = pin(pin(multiply(h_EBCF, 'down'), True), False)
    # float32, as the dropless sum: answers of one token may nearly cancel.
    return jnp.einsum('BTEC,EBCD->BTD', share_BTEC, answers_EBCD.astype(jnp.float32))


def _flat(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of one part of a PartitionSpec."""
  return (part,) if isinstance(part, str) else tuple(part or ())
