"""Measures jaxlm itself: ratios and shares, each pair alternating in one run, with the median of several rounds.

  python -m jaxlm.bench --suites=compile,data,prepare,loop,memory [--output=FILE]

compile   a 48-layer model's compile time over a 4-layer one's
data      tokens a second from the store to batches on one core, planning a sample, starting anywhere
prepare   the rate of preparing text over that of `tokenizers` alone on the same blocks
loop      the share of a training run's time outside its jitted step, saves included
memory    temporaries of the attention kernels by length; bytes of state a device under fsdp=8
decode    tokens a second of the cached loop over a forward pass a token

A JSON object a line; times are noisy on a shared machine, ratios less so.
"""
import json
import os
import platform
import statistics
import tempfile
import time
from typing import Any, Callable, Iterator

from absl import flags

from jaxlm import config as config_module
from jaxlm import objectives, programs
from jaxlm.lookup import lookup
from jaxlm.types import JaxlmError

SUITES = flags.DEFINE_list('suites', ['compile', 'data', 'prepare', 'loop', 'memory', 'decode'], 'What to measure.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Alternating rounds of each pair.', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'Also append the lines to this file.')

Line = dict[str, Any]


def _timed(fn: Callable[[], Any]) -> float:
  start = time.perf_counter()
  fn()
  return time.perf_counter() - start


def _ratio(name: str, a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> Line:
  """Times a and b in turn; seconds of a over seconds of b."""
  pairs = [(_timed(a), _timed(b)) for _ in range(rounds)]
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
    deep, shallow = compiling(48), compiling(4)
    shallow()
    yield _ratio('compile time of 48 layers over 4', deep, shallow, rounds)


def data(rounds: int) -> Iterator[Line]:
  """One thread; the standard library as pieces of a trained BPE, windows of 1,024."""
  import numpy as np
  from jaxlm.data import mixtures, pipeline, plans, store
  config = _small(**{'data.tokenizer': 'bpe', 'data.vocab_size': 4096, 'seq_len': 1024, 'batch_size': 32})
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
  yield dict(measure='tokens/s from store to batch, windows of 1,024', by_cpu_time=by_cpu, by_wall=by_wall,
             rounds=rounds)
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
    def timed(*arguments):
      step_fn = plain(*arguments)
      def step(*inputs):
        start = time.perf_counter()
        outputs = jax.block_until_ready(step_fn(*inputs))
        spans.append((start, time.perf_counter()))
        return outputs
      return step
    train.make_step = timed
    try:
      with tempfile.TemporaryDirectory() as folder:
        train.run(config, folder)
    finally:
      train.make_step = plain
    spans = spans[2:]
    shares.append(1 - sum(end - start for start, end in spans) / (spans[-1][1] - spans[0][0]))
  yield dict(measure='share of the loop outside the jitted step, saves included',
             median=round(statistics.median(shares), 4), least=round(min(shares), 4), most=round(max(shares), 4),
             rounds=rounds)


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


def decode(rounds: int) -> Iterator[Line]:
  """GPT-2 124M's shape with random weights, batch 1, 16 tokens after 64."""
  import jax
  import numpy as np
  from jaxlm import decode as decoding, sharding
  from jaxlm.families import gpt2
  from jaxlm.state import build_model
  config = config_module.default()
  config.model.update(gpt2.SIZES['124m'])
  model = build_model(config, 50257, 'causal', sharding.single(config.sharding.rules))
  import flax.linen as nn
  params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), {'tokens': np.zeros((1, 8), np.int32)})['params'])
  model, params = decoding.unrolled(model, params)
  prompt = np.random.default_rng(0).integers(0, 50257, 64)
  forward = jax.jit(lambda params, tokens: model.apply({'params': params}, {'tokens': tokens}).logits[0, -1])
  def naive():
    row = np.zeros((1, 80), np.int32)
    row[0, :64] = prompt
    for _ in range(16):
      forward(params, row).argmax().block_until_ready()
  cached = lambda: decoding.generate(model, params, [prompt.tolist()], 16)
  naive(), cached()
  line = _ratio('tokens/s of cached decoding over a forward pass a token, 124M, batch 1', naive, cached, rounds)
  yield line | {'tokens_per_s': round(16 / line['seconds'][1], 1)}


TABLE = {'compile': compile_time, 'data': data, 'prepare': prepare, 'loop': loop, 'memory': memory, 'decode': decode}


def main(argv: list[str]) -> None:
  """Prints a line a measure."""
  del argv
  suites = [lookup(TABLE, name, 'suite') for name in SUITES.value]
  if not suites:
    raise JaxlmError(f'--suites is empty; name some of {", ".join(TABLE)}.')
  import jax
  machine = dict(python=platform.python_version(), jax=jax.__version__, device=jax.devices()[0].device_kind,
                 devices=len(jax.devices()), cores=os.cpu_count())
  for suite in suites:
    for line in suite(ROUNDS.value):
      text = json.dumps(line | machine, ensure_ascii=False)
      print(text, flush=True)
      if OUTPUT.value:
        with open(OUTPUT.value, 'a', encoding='utf-8') as f:
          f.write(text + '\n')


if __name__ == '__main__':
  programs.run(main)
