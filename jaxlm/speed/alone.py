"""What is measured of this project alone, each pair alternating in one run, with the median of several rounds."""
import os
import statistics
import tempfile
import time
from typing import Any, Callable, Iterator, Sequence

from jaxlm import config as config_module
from jaxlm import objectives
from jaxlm.speed.machine import timed

Line = dict[str, Any]


def _spread(name: str, values: Sequence[float], digits: int) -> Line:
  """The median of a figure, its least and most."""
  told = {key: round(of(values), digits) for key, of in (('median', statistics.median), ('least', min), ('most', max))}
  return dict(measure=name, **told, rounds=len(values))


def _ratio(name: str, a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> Line:
  """Times a and b in turn; seconds of a over seconds of b."""
  pairs = [(timed(a), timed(b)) for _ in range(rounds)]
  ratios = [x / y for x, y in pairs]
  return dict(measure=name, ratio=round(statistics.median(ratios), 3), least=round(min(ratios), 3),
              most=round(max(ratios), 3), seconds=[round(statistics.median(s), 4) for s in zip(*pairs)], rounds=rounds)


def _small(**changes: Any) -> Any:
  config = config_module.smoke(config_module.default())
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def _parts(config: Any, workdir: str):
  from jaxlm import train
  from jaxlm.data import store
  return train.Run(config, workdir, store.prepare(config, objectives.roles(config)))


def compile_time(rounds: int) -> Iterator[Line]:
  """Lowering and compiling the train step, nothing cached."""
  import jax
  from jaxlm.journal import Position
  jax.config.update('jax_enable_compilation_cache', False)
  with tempfile.TemporaryDirectory() as folder:
    def compiling(layers):
      parts = _parts(_small(**{'model.num_layers': layers, 'mesh.data': 1}), f'{folder}/{layers}')
      batch = parts.place(parts.batches(0, Position())[1].at(0), parts.config.batch_size)
      def fresh():
        jax.clear_caches()
        parts.step_fn.lower(parts.shapes.state, parts.shapes.frozen, batch).compile()
      return fresh
    deep, shallow = compiling(96), compiling(4)
    shallow()
    yield _ratio('compile time of 96 layers over 4', deep, shallow, rounds)


def data(rounds: int) -> Iterator[Line]:
  """One thread; the standard library as pieces of a trained BPE, windows of 1,024."""
  import numpy as np
  from jaxlm.data import examples, mixtures, pipeline, plans, store
  for told, changes in (('', {}), (', masked', {'objective.name': 'masked'})):
    config = _small(**{'data.tokenizer': 'bpe', 'data.vocab_size': 4096, 'seq_len': 1024, 'batch_size': 32}, **changes)
    stores, tokenizer = store.prepare(config, objectives.roles(config))
    objective = objectives.make(config, tokenizer.vocab)
    stream = plans.Stream(config, stores, objective, tokenizer.vocab)
    stream.examples(np.arange(32))
    rates = []
    for _ in range(rounds):
      with pipeline.Batches(config, stream) as batches:
        batches.at(0)
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(1, 101):
          batches.at(step * 32)
        busy = max(time.process_time() - cpu, 1e-9)
        rates.append((100 * 32 * 1024 / busy, 100 * 32 * 1024 / (time.perf_counter() - wall)))
    by_cpu, by_wall = (round(statistics.median(rate)) for rate in zip(*rates))
    yield dict(measure=f'tokens/s from store to batch, windows of 1,024{told}', by_cpu_time=by_cpu, by_wall=by_wall,
               rounds=rounds)
  for task in ('docstring', 'assistant'):
    config = config_module.tune(_small(), task, 'answer')
    with config.unlocked():
      config.update(seq_len=1024)
      config.data.task_examples = 0
    prepared = examples.prepare(config)
    stream = examples.TaskStream(config, prepared.task, objectives.make(config, prepared.tokenizer.vocab))
    yield dict(measure=f'share of columns of 1,024 that hold text, task {task!r} packed', ratio=round(stream.filled, 4),
               examples=len(prepared.task.train), rows=len(stream.groups))
  found = [mixtures.planning_speed() for _ in range(rounds)]
  yield dict(measure='planning a mixture over 10⁹ windows', rounds=rounds,
             **{key: float(f'{statistics.median(f[key] for f in found):.3g}') for key in found[0]})


def prepare(rounds: int) -> Iterator[Line]:
  """Both encode the same documents with a tokenizer just loaded, its cache cold, and use all cores."""
  from jaxlm.data import sources, store, tokenizers
  config = _small(**{'data.tokenizer': 'bpe', 'data.vocab_size': 4096})
  tokenizer = store.prepare(config, objectives.roles(config)).tokenizer
  source = sources.make(config.data, 'stdlib', '')
  blocks = [[d.text for d in block] for block in store._blocks(source.documents())]

  def alone():
    backend = tokenizers.load(f'{folder}/tokenizer').backend
    for texts in blocks:
      backend.encode_batch_fast(sorted(texts, key=len, reverse=True), add_special_tokens=False)

  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(f'{folder}/tokenizer')
    numbers = iter(range(1000))
    def preparing():
      config.data.update(tokenizer=f'{folder}/tokenizer', store=f'{folder}/{next(numbers)}')
      store.prepare(config, objectives.roles(config))
    line = _ratio('tokenizers alone over preparing', alone, preparing, rounds)
  yield line | {'measure': 'rate of preparing over tokenizers alone'}


def loop(rounds: int) -> Iterator[Line]:
  """A quickstart-sized run of 60 steps that saves three times, timed step by step.

  Each step is waited for, so nothing overlaps with it and the share is an upper bound; the first two are left out.
  """
  import jax
  from jaxlm import train
  config = _small(**{'model.width': 192, 'model.mlp.width': 768, 'model.attention.num_heads': 6,
                     'model.attention.num_kv_heads': 6, 'model.attention.head_dim': 32, 'seq_len': 256,
                     'data.tokenizer': 'bpe', 'data.vocab_size': 2048, 'log_every': 10, 'eval.prompts': (),
                     'mesh.data': 1, 'data.holdout': 0.0, 'steps': 60, 'save_every': 20})
  shares, plain = [], train.make_step
  for _ in range(rounds):
    spans = []
    def watched(*arguments):
      step_fn = plain(*arguments)
      def step(*inputs):
        start = time.perf_counter()
        outputs = jax.block_until_ready(step_fn(*inputs))
        spans.append((start, time.perf_counter()))
        return outputs
      return step
    train.make_step = watched
    try:
      with tempfile.TemporaryDirectory() as folder:
        train.run(config, folder)
    finally:
      train.make_step = plain
    spans = spans[2:]
    shares.append(1 - sum(end - start for start, end in spans) / (spans[-1][1] - spans[0][0]))
  yield _spread('share of the loop outside the jitted step, saves included', shares, 4)


def memory(rounds: int) -> Iterator[Line]:
  """Read from compiled programs; exact, so once is enough."""
  del rounds
  import functools
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jaxlm.models.kernels import Visibility
  from jaxlm.models.ring import KERNELS
  for name, kernel in KERNELS.items():
    sizes = {}
    for length in (4096, 8192, 16384):
      def loss(q, k, v, order):
        see = Visibility(order, order, jnp.ones_like(order), jnp.ones_like(order), order, order)
        return kernel(q, k, v, see, scale=0.125).sum()
      x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
      order = jax.ShapeDtypeStruct((1, length), jnp.int32)
      compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, order).compile()
      sizes[length] = compiled.memory_analysis().temp_size_in_bytes
    yield dict(measure=f'temporary bytes of {name} attention, forward and backward, by length',
               **{str(length): size for length, size in sizes.items()})
  if len(jax.devices()) < 8:
    yield dict(measure='state a device under fsdp=8',
               left_out='needs XLA_FLAGS=--xla_force_host_platform_device_count=8')
    return
  with tempfile.TemporaryDirectory() as folder:
    parts = _parts(_small(**{'mesh.data': -1 if len(jax.devices()) > 8 else 1, 'mesh.fsdp': 8}), folder)
    size = lambda shape, x: int(np.prod(shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize
    held = lambda tree: sum(size(x.sharding.shard_shape(x.shape), x) for x in jax.tree.leaves(tree))
    total = lambda tree: sum(size(x.shape, x) for x in jax.tree.leaves(tree))
    state = (parts.shapes.state.params, parts.shapes.state.opt_state)
    yield dict(measure='parameters and optimizer state on a device over an eighth, fsdp=8',
               ratio=round(8 * functools.reduce(lambda a, b: a / b, (held(state), total(state))), 4))


def cached(rounds: int) -> Iterator[Line]:
  """GPT-2 124M's shape with random weights, batch 1, 16 tokens after 64."""
  import jax
  import numpy as np
  from jaxlm import decode, reading, sharding
  from jaxlm.families import gpt2
  from jaxlm.state import build_model
  config = config_module.default()
  config.model.update(gpt2.SIZES['124m'])
  model = build_model(config, 50257, 'causal', sharding.single(config.sharding.rules))
  import flax.linen as nn
  params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), {'tokens': np.zeros((1, 8), np.int32)})['params'])
  model, params = reading.unrolled(model, params)
  prompt = np.random.default_rng(0).integers(0, 50257, 64)
  forward = jax.jit(lambda params, tokens: model.apply({'params': params}, {'tokens': tokens}).logits[0, -1])
  def naive():
    row = np.zeros((1, 80), np.int32)
    row[0, :64] = prompt
    for _ in range(16):
      forward(params, row).argmax().block_until_ready()
  cached = lambda: decode.generate(model, params, [prompt.tolist()], 16)
  naive(), cached()
  line = _ratio('tokens/s of cached decoding over a forward pass a token, 124M, batch 1', naive, cached, rounds)
  yield line | {'tokens_per_s': round(16 / line['seconds'][1], 1)}


def attention(rounds: int) -> Iterator[Line]:
  """Forward and backward, 8 heads of 64, causal: time over dense's; and temporaries, which are exact."""
  import jax
  import numpy as np
  from jaxlm import sharding
  from jaxlm.models.kernels import Visibility
  from jaxlm.models.ring import KERNELS
  options = sharding.compiler_options(jax.devices()[0].platform)

  def made(name: str, length: int):
    columns = np.arange(length, dtype=np.int32)[None]
    see = Visibility(columns + 1, columns + 1, columns * 0 + 1, columns * 0 + 1, columns, columns, in_order=True)
    x = np.random.default_rng(0).standard_normal((3, 1, length, 8, 64), np.float32)
    loss = lambda q, k, v: KERNELS[name](q, k, v, see, scale=0.125).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=options).lower(*x).compile()
    return lambda: jax.block_until_ready(compiled(*x)), compiled.memory_analysis().temp_size_in_bytes

  for length in (256, 1024, 4096):
    (blockwise, small), (dense, large) = made('blockwise', length), made('dense', length)
    blockwise(), dense()
    yield _ratio(f'attention, {length} tokens: dense over blockwise, time', dense, blockwise, rounds) | dict(
        temporaries=[large, small])
  yield dict(measure='attention, 8,192 tokens: temporaries of blockwise over dense',
             ratio=round(made('blockwise', 8192)[1] / made('dense', 8192)[1], 4))


def checkpoint(rounds: int) -> Iterator[Line]:
  """1 GB that cannot be compressed: the time a save blocks over a copy in memory; rates over those of dd."""
  import subprocess
  import jax
  import numpy as np
  from jaxlm.checkpoint import Checkpoints
  draw = np.random.default_rng(0)
  arrays = {f'w{i}': draw.integers(0, 1 << 32, 1 << 26, np.uint32).view(np.float32) for i in range(4)}
  size, state = sum(x.nbytes for x in arrays.values()), {'params': jax.tree.map(jax.numpy.asarray, arrays)}
  found = {name: [] for name in ('blocked', 'save', 'restore', 'digest')}  # both rates without the time of a digest
  with tempfile.TemporaryDirectory() as folder:
    written = os.path.join(folder, 'dd')
    with Checkpoints(os.path.join(folder, 'checkpoints')) as checkpoints:
      for round in range(rounds + 1):
        copy = timed(lambda: {name: x.copy() for name, x in arrays.items()})
        start = time.perf_counter()
        checkpoints.save(round, state, {})
        blocked = time.perf_counter() - start
        checkpoints.wait()
        save = time.perf_counter() - start
        dd = lambda *operands: subprocess.run(['dd', *operands, 'bs=16M'], check=True, capture_output=True)
        write = timed(lambda: dd('if=/dev/zero', f'of={written}', f'count={size >> 24}', 'conv=fsync'))
        digest = timed(checkpoints.latest_valid)
        _forget(folder)
        restore = timed(lambda: jax.block_until_ready(checkpoints.restore(state)[1]))
        _forget(folder)
        read = timed(lambda: dd(f'if={written}', 'of=/dev/null'))
        if round:  # the first pays for what is made once
          for name, value in (('blocked', blocked / copy), ('save', write / (save - digest)),
                              ('restore', read / (restore - digest)),
                              ('digest', digest)):
            found[name].append(value)
  told = {'blocked': 'time a save of 1 GB blocks, over a copy in memory', 'save': 'rate of saving over dd conv=fsync, '
          'digests apart', 'restore': 'rate of restoring over dd with caches dropped, digests apart',
          'digest': 'seconds of reading and digesting 1 GB'}
  for name, values in found.items():
    yield _spread(told[name], values, 3)


def _forget(folder: str) -> None:
  """Drops the files of a folder from the operating system's cache."""
  for parent, _, names in os.walk(folder):
    for name in names:
      descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(descriptor)


def compiled_programs(rounds: int) -> Iterator[Line]:
  """Read from compiled training steps; exact, so once is enough."""
  del rounds
  import jax
  from jaxlm import hlo
  from jaxlm.models import cost
  from jaxlm.speed.shapes import SHAPES, assembled
  for name, make in SHAPES.items():
    config = make()
    parts = assembled(config)
    model = parts.model.config
    batch = {key: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
             for key, (shape, dtype) in parts.batch.items()}
    compiled = parts.step_fn.lower(parts.shapes.state, parts.shapes.frozen, batch).compile()
    program = hlo.Program(compiled.as_text(), parts.model.layout.mesh.shape)
    flops = sum(dot.flops * dot.times for dot in program.dots())
    wanted = config.batch_size * cost.flops_per_row(model, parts.lengths)
    whole = config.batch_size * config.seq_len * model.width
    moves = {'forward': 0, 'backward': 0}
    for computation, x, times, _ in program.walk():
      if computation in program.fused or x.opcode not in ('copy', 'transpose', 'fusion') or x.elements < whole:
        continue
      inside = [y.opcode for called in program.called(x) for y in program.computations[called].values()]
      if times > 1 and (x.opcode != 'fusion' or 'transpose' in inside or 'copy' in inside):
        moves['backward' if 'transpose(jvp' in x.source or 'checkpoint' in x.source else 'forward'] += 1
    yield dict(measure=f'step of {name}', dot_flops_over_models=round(flops / wanted, 3),
               written_bytes=round(program.written()),
               temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
               copies_and_transposes_a_layer=moves)


def start(rounds: int) -> Iterator[Line]:
  """From the start of the program to the quickstart's first loss, with programs and data there already."""
  import subprocess
  import sys
  root = os.path.dirname(os.path.dirname(config_module.__file__))
  found = []
  with tempfile.TemporaryDirectory() as folder:
    for round in range(rounds + 1):
      begun = time.perf_counter()
      process = subprocess.Popen(
          [sys.executable, '-m', 'jaxlm.main', '--config=experiments/quickstart.py', f'--workdir={folder}/{round}'],
          cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for line in process.stdout:
        if 'train/loss' in line:
          break
      if round:  # the first fills the caches
        found.append(time.perf_counter() - begun)
      process.kill()
      process.wait()
  yield _spread("seconds to the quickstart's first loss, warm caches", found, 2)
