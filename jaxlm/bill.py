"""The bill before the job: what a step and a run cost on devices that are not there, read from the compiled program."""
import collections
import dataclasses
import math
import time
from typing import Any, Mapping, Sequence

import jax
import numpy as np

from jaxlm import hardware, lint, liveness, objectives, sharding, train, trees
from jaxlm.data import words
from jaxlm.data.pipeline import BatchSizes
from jaxlm.data.tokenizers import Vocab
from jaxlm.errors import JaxlmError
from jaxlm.hlo import Dot, Message, Program
from jaxlm.models import cost, moe, stages
from jaxlm.models.attention import SCOPE
from jaxlm.models.stack import init_cache
from jaxlm.state import Shapes

LIMIT = 2048  # devices that one process can simulate; the CPU backend fails beyond

# Mesh axes whose messages need not be waited for, beside those of rows, along which weights and gradients go: what a
# ring or a pipeline passes on.
OVERLAPPED = {'seq', 'pipe'}


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What no program tells.

  Attributes:
    efficiency: share of its peak at which a device multiplies matrices.
    sustained_tflops: model TFLOP/s a device, where they are known; step times then follow from them alone. 0: unknown.
    price_per_hour: of a device; 0: not known.
    pue: energy of the building over that of the devices.
    kg_per_kwh: CO2e.
    tokens: of the whole job; 0: what the config trains on.
  """
  efficiency: float = 0.7
  sustained_tflops: float = 0.0
  price_per_hour: float = 0.0
  pue: float = 1.1
  kg_per_kwh: float = 0.4
  tokens: float = 0.0


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step, and what it was compiled of."""
  config: Any
  parts: train.Parts
  program: Program
  measured: float
  seconds: float


def make(config: Any, hardware_name: str, devices: int, assumptions: Assumptions = Assumptions()) -> dict[str, Any]:
  """The bill of a config.

  Args:
    config: validated.
    hardware_name: a row of hardware.HARDWARE.
    devices: how many; 0: as many as config.mesh multiplies out to.
  Returns:
    What plan.json holds; `how` says of each part whether it was measured from the program, or by which formula.
  Raises:
    JaxlmError: a mesh that does not multiply out or divide, more devices than can be simulated, unknown hardware.
  """
  row = hardware.named(hardware_name)
  hardware.peak(row, hardware_name, config.precision.compute)  # says what is unknown, before any work
  sizes = mesh_of(config, devices)
  return read(compiled(config, sizes), config, hardware_name, sizes, assumptions)


def read(step: Step, config: Any, hardware_name: str, sizes: Mapping[str, int],
         assumptions: Assumptions = Assumptions()) -> dict[str, Any]:
  """As `make`, of a step that is compiled.

  Args:
    step: of `config`.
    sizes: the whole mesh, of which the step's may be a part.
  """
  row, dtype, devices = hardware.named(hardware_name), config.precision.compute, math.prod(sizes.values())
  peak = hardware.peak(row, hardware_name, dtype)
  program, parts, small = step.program, step.parts, step.program.mesh
  model, shapes = parts.model, parts.shapes
  model_flops = cost.flops_per_row(model.config, parts.lengths, trained=shapes.trained) * config.batch_size

  # The mask's part of attention, apart from what a kernel does beside it. Recomputed: forward once more.
  again = 0 if model.config.remat in ('none', 'dots') else 1
  masked = cost.scores_per_row(model.config, parts.lengths) * config.batch_size * (3 + again)
  dots = program.dots()
  of_kernel = [dot for dot in dots if f'/{SCOPE}/' in dot.source or not dot.counted]
  uncounted = any(not dot.counted for dot in dots)
  # Loops of a kernel visit what the mask lets them, as data decides; a backward pass makes the scores again.
  kernel = masked * (3.5 + again) / (3 + again) if uncounted else devices * _flops(of_kernel)
  others = devices * (_flops(dots) - _flops(of_kernel))
  per_device = (others + kernel) / devices
  memory = _memory(shapes, step, dtype, sizes)
  messages = [_rescaled(message, small, sizes) for message in program.messages()]
  links = _links(messages, sizes, row, dtype, {*shapes.layout.axes('act_batch')})
  local_s = per_device / (peak * assumptions.efficiency) + _traffic(program, dtype) / row.bandwidth
  waited = sum(link['seconds'] for link in links if not link['overlapped'])
  beside = sum(link['seconds'] for link in links if link['overlapped'])
  step_s = max(local_s, beside) + waited
  if assumptions.sustained_tflops:
    step_s = model_flops / (devices * assumptions.sustained_tflops * 1e12)
  tokens_per_step = config.batch_size * config.seq_len
  tokens = assumptions.tokens or float(BatchSizes.of(config).consumed(config.steps) * config.seq_len)
  S, R, M = stages.sizes(shapes.layout)
  # A pipeline's bubbles are among its products, and the compiler leaves no source on those that vmap made.
  apart = {} if S > 1 or not masked else dict(masked_over_model=(others + masked) / model_flops,
                                              kernel_over_mask=kernel / masked)
  schedule = dict(stages=S, microbatches=M, repeats=R, bubble=(S - 1) / (R * M + S - 1))
  if S > 1:
    stacks = {path.partition('stack/period')[0]: shapes.layers(path) for path in trees.flatten(shapes.state.params)
              if shapes.layers(path)}
    schedule['missing_layers'] = sum(int((stages.order(n, shapes.layout) < 0).sum()) for n in stacks.values())
  hours = tokens / tokens_per_step * step_s / 3600
  kwh = hours * devices * row.watts / 1000 * assumptions.pue
  plain, experts = shapes.saved.params, model.config.moe
  return dict(
      params_total=trees.count(plain), devices=devices, bytes_per_device=memory['total'], flops_per_step=model_flops,
      step_s=step_s, hardware=hardware_name, fits=memory['total'] <= row.memory,
      mesh={axis: n for axis, n in sizes.items() if n > 1}, compiled_devices=math.prod(small.values()),
      compile_s=step.seconds, parameters=cost.parameters_by_part(plain), memory=memory,
      flops=dict(model_per_token=model_flops / tokens_per_step, model_per_step=model_flops,
                 program_per_step=per_device * devices, program_over_model=per_device * devices / model_flops,
                 loops_by_formula=uncounted) | apart,
      messages=links, lint=lint.faults(program, parts, step.config), pipeline=schedule,
      time=dict(arithmetic_s=per_device / (peak * assumptions.efficiency),
                memory_s=_traffic(program, dtype) / row.bandwidth, messages_beside_s=beside, messages_waited_s=waited,
                step_s=step_s, tokens_per_s=tokens_per_step / step_s,
                mfu=model_flops / step_s / (devices * peak), tflops_per_device=model_flops / step_s / devices / 1e12),
      job=dict(tokens=tokens, flops=model_flops / tokens_per_step * tokens, days=hours / 24,
               device_hours=hours * devices, money=hours * devices * assumptions.price_per_hour,
               kwh=kwh, co2e_kg=kwh * assumptions.kg_per_kwh),
      inference=_inference(model.config, plain, row, peak, config), assumptions=dataclasses.asdict(assumptions),
      how=_how(config, sizes, small, uncounted, experts.num_experts > 0 and experts.mode == 'dropless', assumptions))


# ---- the mesh ----------------------------------------------------------------------------------------------------


def mesh_of(config: Any, devices: int = 0) -> dict[str, int]:
  """{axis: size} of so many devices; 0: as many as config.mesh multiplies out to."""
  if not devices:
    fixed = [n for n in config.mesh.values() if n != -1]
    if len(fixed) < len(config.mesh):
      raise JaxlmError('--devices is missing; config.mesh leaves one axis open (-1), so it does not tell how many '
                       'there are.')
    devices = math.prod(fixed)
  return sharding.mesh_sizes(config.mesh, devices)


def shrunk(sizes: Mapping[str, int]) -> dict[str, int]:
  """The mesh that is compiled in the place of one too large to simulate: only `data` and `replica` are smaller.

  Raises:
    JaxlmError: it is too large even so.
  """
  found = dict(sizes)
  for axis in ('data', 'replica'):
    others = math.prod(found.values()) // found[axis]
    if others * found[axis] > LIMIT:
      fit = [n for n in range(1, found[axis] + 1) if found[axis] % n == 0 and n * others <= LIMIT]
      found[axis] = max(fit, default=1)
  if math.prod(found.values()) > LIMIT:
    told = ' × '.join(f'{axis}={n}' for axis, n in sizes.items() if n > 1)
    raise JaxlmError(f'{told} are more devices than the {LIMIT} that can be simulated, and only data and replica can '
                     'be compiled smaller; plan with fewer on the other axes.')
  return found


def assembled(config: Any, sizes: Mapping[str, int]) -> tuple[Any, train.Parts]:
  """(the config of as many simulated devices as there can be, in float32; what the step of it is made of).

  Args:
    sizes: the whole mesh; where fewer devices are simulated, each has as many rows as it would.
  """
  small = shrunk(sizes)
  count = math.prod(small.values())
  ratio = math.prod(sizes.values()) // count
  local = config.copy_and_resolve_references()
  with local.unlocked():
    local.mesh.update(small)
    local.update(batch_size=config.batch_size // ratio, batch_ramp=())
    local.precision.compute = 'float32'
    local.sharding.offload_optimizer = False
  if config.batch_size % ratio:
    raise JaxlmError(f'config.batch_size={config.batch_size} does not divide by the {ratio} parts of the mesh that are '
                     'compiled as one; choose another batch size, or fewer devices.')
  _simulate(count)
  return local, train.assemble(local, sharding.layout_of(local, jax.devices()[:count]), stand_in(config))


def compiled(config: Any, sizes: Mapping[str, int]) -> Step:
  """The true step, compiled for simulated devices; arguments as of `assembled`."""
  local, parts = assembled(config, sizes)
  layout = parts.shapes.layout
  rows = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch(shape))
  batch = {key: rows((local.batch_size, *shape), dtype) for key, (shape, dtype) in parts.batch.items()}
  start = time.monotonic()
  done = parts.step_fn.lower(parts.shapes.state, parts.shapes.frozen, batch).compile()
  seconds = time.monotonic() - start
  measured = done.memory_analysis().temp_size_in_bytes
  return Step(local, parts, Program(done.as_text(), layout.mesh.shape), measured, seconds)


def _simulate(count: int) -> None:
  """Makes sure that there are so many devices; they must be asked for before the first is used."""
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    pass  # they are there already
  if len(jax.devices()) < count:
    raise JaxlmError(f'{count} devices are wanted and {len(jax.devices())} are there; plan in a new process, which can '
                     f'simulate up to {LIMIT}.')


def stand_in(config: Any) -> Vocab:
  """A vocabulary of the right size with every role that the objective needs, for shapes alone."""
  size = config.model.vocab_size or (258 if config.data.tokenizer == 'bytes' else config.data.vocab_size)
  own = {f.name for f in dataclasses.fields(Vocab)} - {'size', 'others', 'pieces'}
  roles = objectives.roles(config)
  given = {name: i for i, name in enumerate(['bos', 'eos', 'pad', *[r for r in roles if r in own]])}
  others = {role: len(given) + i for i, role in enumerate(r for r in roles if r not in own)}
  pieces = lambda: words.Pieces(*np.zeros((len(words.Pieces._fields), size), bool))
  return Vocab(size, **given, others=others, pieces=pieces)


# ---- memory ------------------------------------------------------------------------------------------------------


def _held(tree: Any, sizes: Mapping[str, int]) -> int:
  """Bytes on each device of the whole mesh, exactly, from the shardings."""
  def held(x):
    mesh = x.sharding.mesh.shape
    smaller = math.prod(sizes[axis] // mesh[axis] for axis in sharding.axes_of(x.sharding.spec))
    return math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize // smaller
  return sum(map(held, jax.tree.leaves(tree)))


def _memory(shapes: Shapes, step: Step, dtype: str, sizes: Mapping[str, int]) -> dict[str, Any]:
  state = shapes.state
  gradients = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params,
                           shapes.gradients)
  temporaries, buffers = liveness.fullest(step.program)
  like_weights = {tuple(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params)}
  like_weights |= {shape[1:] for shape in like_weights}
  padded = {x.sharding.shard_shape(x.shape)[0] for path, x in trees.flatten(state.params).items()
            if path in ('embed/embedding', 'head')}
  classes: collections.Counter = collections.Counter()
  scaled = 0.0
  for buffer in buffers:
    if tuple(buffer.dims) in like_weights:
      kind, share = 'weights and their gradients', 1.0
    elif buffer.dims and buffer.dims[-1] in padded:
      kind, share = 'logits', 1.0
    else:
      kind, share = 'activations', 0.5 if dtype != 'float32' and buffer.kind == 'f32' else 1.0
    classes[kind] += buffer.bytes
    scaled += share * buffer.bytes
  lying = dict(parameters=(state.params, shapes.frozen), optimizer=state.opt_state, average=state.ema,
               gradients=gradients)
  known = {name: _held(tree, sizes) for name, tree in lying.items()}
  total = known['parameters'] + known['optimizer'] + known['average'] + scaled
  return known | dict(temporaries=scaled, temporaries_float32=temporaries, temporaries_float32_measured=step.measured,
                      temporaries_by_class=dict(classes), total=total)


# ---- messages and time -------------------------------------------------------------------------------------------


def _rescaled(message: Message, small: Mapping[str, int], sizes: Mapping[str, int]) -> Message:
  grown = math.prod(sizes[axis] // small[axis] for axis in message.axes)
  return message if message.kind == 'collective-permute' else dataclasses.replace(message, size=message.size * grown)


def _links(messages: list[Message], sizes: Mapping[str, int], row: hardware.Hardware, dtype: str,
           rows: set[str]) -> list[dict[str, Any]]:
  """Messages by kind and axes: how many, how much, over which links, how long; `rows` are axes that rows go over."""
  order = list(sizes)
  stride = {axis: math.prod(sizes[a] for a in order[i + 1:]) for i, axis in enumerate(order)}
  found: dict[tuple, dict[str, Any]] = {}
  for message in messages:
    # Sums over rows are gradients', in float32; weights are gathered, and all else travels, as it is multiplied.
    # What tokens send to their experts, and experts back, is no weight's.
    weights = set(message.axes) <= rows and message.kind != 'all-to-all' and moe.SCOPE not in message.source
    itemsize = 1.0 if weights and message.kind in ('all-reduce', 'reduce-scatter') or dtype == 'float32' else 0.5
    near = all(row.near % (stride[axis] * sizes[axis]) == 0 for axis in message.axes)
    waits = not weights and not set(message.axes) <= (rows | OVERLAPPED) - {'expert'}
    entry = found.setdefault((message.kind, message.axes, message.emitted, waits), dict(
        kind=message.kind, axes=list(message.axes), emitted=message.emitted, devices=message.size, times=0, bytes=0.0,
        emitted_bytes=0.0, sent=0.0, links='near' if near else 'far',
        overlapped=not waits, seconds=0.0))
    entry['times'] += message.times
    entry['bytes'] += message.times * message.bytes * itemsize
    entry['emitted_bytes'] += message.times * message.emitted_bytes * itemsize
    entry['sent'] += message.times * message.sent * itemsize
    entry['seconds'] += message.times * message.sent * itemsize / (row.fast if near else row.slow)
  return sorted(found.values(), key=lambda entry: -entry['sent'])


def _flops(dots: Sequence[Dot]) -> float:
  return sum(dot.flops * dot.times for dot in dots)


def _traffic(program: Program, dtype: str) -> float:
  """Bytes that a step reads and writes beside its products' own: results of everything that is no product, twice."""
  return 2 * program.written() * (1.0 if dtype == 'float32' else 0.5)


# ---- answering ---------------------------------------------------------------------------------------------------


def _inference(config: Any, params: Any, row: hardware.Hardware, peak: float, given: Any) -> dict[str, Any]:
  """Of one replica on the fewest near devices that hold the weights and a row's cache, in the compute dtype."""
  if config.visibility == 'full' or not config.head.lm:
    return {}
  item = 4 if given.precision.compute == 'float32' else 2
  weights, length = trees.count(params) * item, given.seq_len
  cached = lambda n: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
      jax.eval_shape(lambda: init_cache(dataclasses.replace(config, compute_dtype=given.precision.compute), 1, n, n))))
  cache = cached(length)
  devices = max(1, math.ceil((weights + cache) / (0.9 * row.memory)))
  forward = cost.flops_per_row(config, {'tokens': length, 'source_tokens': length}
                               if config.structure == 'encoder_decoder' else {'tokens': length}, training=False)
  rate = row.bandwidth * devices
  return dict(devices=devices, weight_bytes=weights, cache_bytes_per_row=cache,
              cache_bytes_per_token=cache - cached(length - 1), prefill_s=forward / (peak * devices),
              decode_tokens_per_s={str(rows): rows * rate / (weights + rows * cache) for rows in (1, 8, 64)})


# ---- words -------------------------------------------------------------------------------------------------------

def _how(config: Any, sizes: Mapping[str, int], small: Mapping[str, int], uncounted: bool, experts: bool,
         assumptions: Assumptions) -> dict[str, str]:
  """Where each part of the bill comes from, and what is in none."""
  dtype = config.precision.compute
  found = {
      'parameters, memory.parameters, optimizer, average, gradients': 'exact, from the shardings',
      'memory.temporaries_float32': "modelled: buffers of the compiled float32 program's schedule, from first writing "
                                    'to last reading; beside it what the compiler itself says',
      'memory.temporaries': 'the same, activations at half for a 16-bit compute dtype: formula' if dtype != 'float32'
                            else 'the same',
      'flops.model_per_step': 'formula: matrix products as the mask requires, backward twice the forward',
      'flops.program_per_step': 'measured from the program: its products times the rounds of their loops' + (
          '; attention by formula, for its loops depend on the data' if uncounted else ''),
      'messages': 'measured from the program: bytes and rounds; an all-reduce of which each device keeps its part '
                  'counts as a reduce-scatter, those whose results are only added up as one (`emitted`, '
                  '`emitted_bytes`: what the CPU compiler wrote); gradients in float32, the rest as computed',
      'time': 'modelled: max(products / (peak · efficiency) + traffic / bandwidth, messages that need not be waited '
              'for) + those that must be; links by data sheet, ring algorithms' if not assumptions.sustained_tflops else
              'formula: model FLOPs / (devices · sustained_tflops)',
      'inference': 'formula: one replica; prefill by arithmetic at peak, decoding by reading weights and cache once a '
                   'token',
  }
  if experts:
    found['experts'] = ('the CPU multiplies rows of a dropless mixture with every expert: program_per_step and the '
                        'times count those products, which other backends do not make')
  if config.sharding.offload_optimizer:
    found['memory.optimizer, offloaded'] = ("counted as a device's: a step fetches all of it from the host, when is "
                                            "the backend's choice; the fetch is in no time")
  if config.loss.teacher.path:
    found['teacher'] = 'its weights and its forward pass before each step are in no number'
  if config.objective.name in ('grpo', 'ppo'):
    found['rollouts'] = "the policy's writing and its old log-probs are in no number; a step is one of learning"
  if small != dict(sizes):
    told = ' × '.join(f'{axis}={n}' for axis, n in small.items() if n > 1)
    found['compiled_devices'] = (f'more than {LIMIT} devices cannot be simulated: compiled for {told} at the same rows '
                                 'a device, groups of devices rescaled')
  return found


def amount(x: float, unit: str = '') -> str:
  """1.75e11 as '175 G', with a unit 'B' as '175 GB'."""
  steps = ((1e24, 'Y'), (1e21, 'Z'), (1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
  for size, letter in steps:
    if abs(x) >= size:
      return f'{x / size:.3g} {letter}{unit}'
  return f'{x:.3g} {unit}'.strip()


def table(found: Mapping[str, Any]) -> str:
  """A bill as people read it; m: measured from the program, x: exact from shapes, f: by a formula."""
  memory, flops, time, job, pipeline = (found[key] for key in ('memory', 'flops', 'time', 'job', 'pipeline'))
  mesh = ' × '.join(f'{axis}={n}' for axis, n in found['mesh'].items()) or 'one device'
  lines = [('', 'devices', f'{found["devices"]:,} {found["hardware"]} ({mesh}), compiled for '
                           f'{found["compiled_devices"]:,} in {found["compile_s"]:.0f} s'),
           ('x', 'parameters', f'{found["params_total"]:,}: ' + ', '.join(
               f'{name} {amount(n)}' for name, n in sorted(found['parameters'].items(), key=lambda p: -p[1]))),
           ('f', 'model FLOPs',
            f'{amount(flops["model_per_token"])} a token, {amount(flops["model_per_step"])} a step'),
           ('f' if flops['loops_by_formula'] else 'm', 'program FLOPs',
            f'{amount(flops["program_per_step"])} a step, {flops["program_over_model"]:.2f} of the model\'s' + (
                f'; {flops["masked_over_model"]:.2f} were attention what the mask requires, of which its kernel does '
                f'{flops["kernel_over_mask"]:.2f}' if 'kernel_over_mask' in flops else ''))]
  for key in ('parameters', 'optimizer', 'average', 'gradients'):
    lines.append(('x', f'bytes a device: {key}', amount(memory[key], 'B')
                  + (' (among the temporaries)' if key == 'gradients' else '')))
  lines += [('f', 'bytes a device: temporaries', f'{amount(memory["temporaries"], "B")}; in float32 '
             f'{amount(memory["temporaries_float32"], "B")}, the compiler says '
             f'{amount(memory["temporaries_float32_measured"], "B")}; ' + ', '.join(
                 f'{name} {amount(n, "B")}' for name, n in memory['temporaries_by_class'].items())),
            ('f', 'bytes a device: together', f'{amount(memory["total"], "B")}, '
             + ('fits' if found['fits'] else 'DOES NOT FIT'))]
  for link in found['messages']:
    if link['sent'] > 1e-3 * max(m['sent'] for m in found['messages']):
      lines.append(('m', f'{link["kind"]} over {" × ".join(link["axes"])}',
                    f'{link["times"]:,} of {link["devices"]:,} devices, {amount(link["sent"], "B")} sent by each, '
                    f'{link["links"]} links, {link["seconds"]:.3g} s' + ('' if link['overlapped'] else ', waited for')))
  if pipeline['stages'] > 1:
    lines.append(('f', 'pipeline', f'{pipeline["stages"]} stages, {pipeline["microbatches"]} microbatches, '
                  f'{pipeline["repeats"]} rounds: bubble {pipeline["bubble"]:.1%}; {pipeline["missing_layers"]} '
                  'identities in the place of layers'))
  lines += [('f', 'step', f'{time["step_s"]:.3g} s: products {time["arithmetic_s"]:.3g}, traffic '
             f'{time["memory_s"]:.3g}, messages {time["messages_beside_s"]:.3g} beside them and '
             f'{time["messages_waited_s"]:.3g} waited for'),
            ('f', 'speed', f'{amount(time["tokens_per_s"])} tokens/s, {time["tflops_per_device"]:.3g} TFLOP/s a '
             f'device, MFU {time["mfu"]:.1%}'),
            ('f', 'job', f'{amount(job["tokens"])} tokens, {amount(job["flops"])}FLOP, {job["days"]:.3g} days, '
             f'{amount(job["device_hours"])} device-hours, '
             + (f'{job["money"]:,.0f} in money, ' if job['money'] else '')
             + f'{amount(job["kwh"])} kWh, {amount(job["co2e_kg"])} kg CO2e')]
  if answer := found['inference']:
    speeds = ', '.join(f'{speed:.3g} at batch {rows}' for rows, speed in answer['decode_tokens_per_s'].items())
    lines.append(('f', 'answering', f'on {answer["devices"]}: cache {amount(answer["cache_bytes_per_token"], "B")} a '
                  f'token, prefill {answer["prefill_s"]:.3g} s, decoding tokens/s {speeds}'))
  width = max(len(name) for _, name, _ in lines)
  told = [f'{how or " "}  {name.ljust(width)}  {text}' for how, name, text in lines]
  notes = [f'{key}: {text}' for key, text in found['how'].items()]
  notes += [f'lint: {line}' for line in found['lint']] or ['lint: weights, activations and messages go by the layout']
  given = ', '.join(f'{key} {value:g}' for key, value in found['assumptions'].items() if value)
  return '\n'.join(['m measured from the program, x exact from shapes, f by a formula', *told, '', *notes,
                    f'assumed: {given}'])
