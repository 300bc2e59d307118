"""Recurrent layers, in attention's place: a state goes from token to token."""
import dataclasses
from typing import Any, Callable, Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup
from jaxlm.models.attention import Context
from jaxlm.models.config import ModelConfig
from jaxlm.models.layers import Dense
from jaxlm.sharding import Layout
from jaxlm.types import Array, Tree

# ---- cells -------------------------------------------------------------------------------------------------------

States = tuple[Array, ...]  # float32 [B, D] each; the first is what the layer puts out
Maps = Mapping[str, Callable[[Tree, Array], Array]]  # linear maps by name, of (their variables, [B, D])


@dataclasses.dataclass(frozen=True)
class Cell:
  """One kind of recurrence: its sizes, and what it does with one token.

  Attributes:
    gates: how many times the width the projections `input` and `recurrent` give.
    states: arrays a token hands to the next.
    step: (projections of the token by name, states, recur) -> new states; recur(name, x_BD) is a recurrent projection.
    factor: has the maps `factor` and `factor_recurrent`, whose product takes the state's place in `recurrent`.
  """
  gates: int
  states: int
  step: Callable[[Mapping[str, Array], States, Callable[[str, Array], Array]], States]
  factor: bool = False


def _rnn(token, states, recur) -> States:
  """Elman 1990."""
  return (jnp.tanh(token['input'] + recur('recurrent', states[0]))[:, 0],)


def _gru(token, states, recur) -> States:
  """Cho et al. 2014, with the reset gate after the product, as in cuDNN and torch; gates stand r z n."""
  h_BD, x_BGD, u_BGD = states[0], token['input'], recur('recurrent', states[0])
  r_BD, z_BD = (jax.nn.sigmoid(x_BGD[:, i] + u_BGD[:, i]) for i in range(2))
  n_BD = jnp.tanh(x_BGD[:, 2] + r_BD * u_BGD[:, 2])
  return ((1 - z_BD) * n_BD + z_BD * h_BD,)


def _gated(gates_BGD: Array, c_BD: Array) -> States:
  i_BD, f_BD, o_BD = (jax.nn.sigmoid(gates_BGD[:, i]) for i in (0, 1, 3))
  c_BD = f_BD * c_BD + i_BD * jnp.tanh(gates_BGD[:, 2])
  return o_BD * jnp.tanh(c_BD), c_BD


def _lstm(token, states, recur) -> States:
  """Hochreiter and Schmidhuber 1997, with forget gates (Gers et al. 2000); gates stand i f g o, as in torch."""
  return _gated(token['input'] + recur('recurrent', states[0]), states[1])


def _mlstm(token, states, recur) -> States:
  """Krause et al. 2016, arXiv:1609.07959, section 3, and the code of the sentiment neuron; gates stand i f g o."""
  m_BD = token['factor'] * recur('factor_recurrent', states[0])
  return _gated(token['input'] + recur('recurrent', m_BD), states[1])


CELLS = {'rnn': Cell(1, 1, _rnn), 'gru': Cell(3, 1, _gru), 'lstm': Cell(4, 2, _lstm),
         'mlstm': Cell(4, 2, _mlstm, factor=True)}


# ---- all tokens --------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class State:
  """What a layer keeps of the tokens it has read.

  Attributes:
    states: of the last real token.
    segments_B: int32, its segment; 0: none was read yet.
  """
  states: States
  segments_B: Array


def init_cache(config: ModelConfig, batch: int, slots: int) -> State:
  """The state before the first token; it has one size, however many tokens it has seen."""
  del slots
  zeros = lambda: jnp.zeros((batch, config.width), jnp.float32)
  return State(tuple(zeros() for _ in range(lookup(CELLS, config.mixer, 'mixer').states)),
               jnp.zeros((batch,), jnp.int32))


def starts(segments_BT: Array, last_B: Array) -> tuple[Array, Array]:
  """(bool [B, T]: where a document starts; int32 [B]: the segment of the last real token).

  Args:
    segments_BT: 0 is padding, which ends nothing.
    last_B: the segment of the last real token before these.
  """
  known_BX = jnp.concatenate([last_B[:, None], segments_BT], axis=1)
  columns_X = jnp.arange(known_BX.shape[1], dtype=jnp.int32)
  at_BX = jax.lax.cummax(jnp.where(known_BX > 0, columns_X, 0), axis=1)
  latest_BX = jnp.take_along_axis(known_BX, at_BX, axis=1)
  return (segments_BT > 0) & (segments_BT != latest_BX[:, :-1]), latest_BX[:, -1]


def _scan(cell: Cell, maps: Maps, variables: Tree, tokens: Tree, probes: Tree, states: States, start_TB: Array,
          real_TB: Array) -> tuple[tuple[Array, States], Tree]:
  """((outputs [T, B, D], last states), what each map was given [T, B, D] by name)."""
  def step(states: States, of_token):
    token, probe, start_B, real_B = of_token
    given = {}

    def recur(name: str, x_BD: Array) -> Array:
      given[name] = x_BD
      u = maps[name](variables[name], x_BD)
      return u + probe[name] if name in probe else u

    before = tuple(jnp.where(start_B[:, None], 0, x_BD) for x_BD in states)
    after = cell.step(token, before, recur)
    states = tuple(jnp.where(real_B[:, None], new_BD, old_BD) for new_BD, old_BD in zip(after, before))
    return states, (jnp.where(real_B[:, None], states[0], 0), given)

  states, (out_TBD, given) = jax.lax.scan(step, states, (tokens, probes, start_TB, real_TB))
  return (out_TBD, states), given


def unrolled(cell: Cell, maps: Maps) -> Callable[..., tuple[Array, States]]:
  """The recurrence over a text, `(variables, tokens, states, start_TB, real_TB) -> (outputs [T, B, D], last states)`.

  Its backward pass goes through time for the states alone. What the weights get is a product over all tokens after
  it: in the loop, each step would add up a whole matrix, and over devices reduce it.
  """
  @jax.custom_vjp
  def run(variables, tokens, states, start_TB, real_TB):
    return _scan(cell, maps, variables, tokens, {}, states, start_TB, real_TB)[0]

  def forward(variables, tokens, states, start_TB, real_TB):
    # A probe is a zero added to what a map gives: its gradient is the map's.
    probes = {name: jnp.zeros((*start_TB.shape, *jax.eval_shape(maps[name], variables[name], states[0]).shape[1:]))
              for name in maps}
    scan = lambda tokens, probes, states: _scan(cell, maps, variables, tokens, probes, states, start_TB, real_TB)
    out, pull, given = jax.vjp(scan, tokens, probes, states, has_aux=True)
    return out, (pull, given, variables)

  def backward(saved, grads):
    pull, given_TBD, variables = saved
    dtokens, dprobes, dstates = pull(grads)
    by_weights = lambda name: jax.vjp(lambda v: maps[name](v, given_TBD[name]), variables[name])[1](dprobes[name])[0]
    return {name: by_weights(name) for name in maps}, dtokens, dstates, None, None

  run.defvjp(forward, backward)
  return run


class Recurrent(nn.Module):
  """A recurrent layer as wide as the model, called as attention is.

  Its state starts at zero where a document does; padding leaves it as it is and gives zeros. With visibility 'full'
  another cell reads from the end, and `out` projects what both say, side by side, to the width: a sum is the case of
  two identities. Parameters, by direction (those of the second begin with backward_):

    input/kernel [D, gates, D], input/bias          torch's weight_ih and bias_ih, transposed, gate by gate
    recurrent/kernel [D, gates, D], recurrent/bias  weight_hh and bias_hh; without a bias in mlstm
    factor/kernel, factor_recurrent/kernel [D, D]   mlstm: of the token and of the state

  `config.model.attention.bias` says whether there are biases.
  """
  config: ModelConfig
  layout: Layout

  @nn.compact
  def __call__(self, x_BTD: Array, context: Context, window: Any, keys_B: Array | None,
               cache: State | None) -> tuple[Array, State | None]:
    """Args: as `Attention`; a window is refused, and dropout is the block's."""
    del keys_B
    config, segments_BT = self.config, context.tokens.segments
    self._check(context, window, cache)
    state = init_cache(config, x_BTD.shape[0], 0) if cache is None else cache
    y_BTD, state = self._read(x_BTD, segments_BT, state, '')
    if config.visibility == 'full':
      turned_BTD, _ = self._read(x_BTD[:, ::-1], segments_BT[:, ::-1], init_cache(config, x_BTD.shape[0], 0),
                                 'backward_')
      both_BTX = jnp.concatenate([y_BTD, turned_BTD[:, ::-1]], axis=-1)
      y_BTD = Dense(config, self.layout, (config.width,), (None, 'embed'), bias=config.attention.out_bias,
                    residual=True, name='out')(both_BTX)
      y_BTD = jnp.where(segments_BT[..., None] > 0, y_BTD, 0)
    return checkpoint_name(y_BTD, 'attention_out'), None if cache is None else state

  def _check(self, context: Context, window: Any, cache: State | None):
    """Raises JaxlmError for what a state cannot do."""
    config = self.config
    mixer, kind = f'config.model.mixer={config.mixer!r}', config.positions.kind
    if config.visibility not in ('causal', 'full'):
      raise JaxlmError(f'{mixer} reads from left to right or both ways, and the objective asks for visibility '
                       f"{config.visibility!r}; choose an objective that is causal or sees all, or mixer='attention'.")
    if context.num_keys is not None:
      raise JaxlmError(f"{mixer} has no second stream; set config.model.mixer='attention' for structure 'two_stream'.")
    if window is not None:
      raise JaxlmError(f'{mixer} has no window; set config.model.attention.windows=(0,).')
    if kind in ('rope', 'alibi', 'buckets', 'relative'):
      raise JaxlmError(f'{mixer} has no scores that config.model.positions.kind={kind!r} could change; set it to '
                       "'none', 'learned' or 'sinusoidal'.")
    if cache is not None and config.visibility == 'full':
      raise JaxlmError(f"{mixer} with visibility 'full' reads from both ends and keeps no state to go on from; give it "
                       'the whole text without a cache.')

  def _read(self, x_BTD: Array, segments_BT: Array, state: State, start: str) -> tuple[Array, State]:
    """One direction: (outputs, the state after the last token)."""
    config, width = self.config, self.config.width
    cell, bias = lookup(CELLS, config.mixer, 'mixer'), config.attention.bias
    gates = lambda name, bias: Dense(config, self.layout, (cell.gates, width), ('embed', None, None), bias=bias,
                                     name=start + name)
    single = lambda name: Dense(config, self.layout, (width,), ('embed', None), bias=False, name=start + name)
    into, recurrent = {'input': gates('input', bias)}, {'recurrent': gates('recurrent', bias and not cell.factor)}
    if cell.factor:
      into['factor'], recurrent['factor_recurrent'] = single('factor'), single('factor_recurrent')

    # Time first: the narrow x is turned, not the projections; and whole, for steps follow each other.
    x_TBD = self.layout.constrain(jnp.swapaxes(x_BTD, 0, 1), None, 'act_batch', 'act_embed')
    # float32: the state is a sum over all tokens.
    tokens = {name: dense(x_TBD).astype(jnp.float32) for name, dense in into.items()}
    if self.is_initializing():
      for dense in recurrent.values():
        dense(x_TBD[0])
    # Weights that are spread over devices are gathered once, not at every step.
    variables = {name: jax.lax.with_sharding_constraint(nn.meta.unbox(dict(dense.variables)), self.layout.replicated)
                 for name, dense in recurrent.items()}
    maps = {name: _applied(dense) for name, dense in recurrent.items()}
    start_BT, last_B = starts(segments_BT, state.segments_B)
    y_TBD, states = unrolled(cell, maps)(variables, tokens, state.states, start_BT.T, segments_BT.T > 0)
    return jnp.swapaxes(y_TBD, 0, 1).astype(config.dtype), State(states, last_B)


def _applied(dense: Dense) -> Callable[[Tree, Array], Array]:
  """A projection as a pure function of its variables, for use inside a scan."""
  alone = dense.clone(parent=None)
  return lambda variables, x: alone.apply(variables, x).astype(jnp.float32)
