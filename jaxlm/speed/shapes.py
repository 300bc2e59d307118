"""Models that are measured beside a peer's: small enough for two cores, of the shapes that researchers train."""
from typing import Any, Callable, Iterator

import numpy as np

from jaxlm import bill, objectives, sharding, train
from jaxlm import config as config_module
from jaxlm.data.plans import examples_of
from jaxlm.families import bert, gpt2, llama, t5


def _config(model: dict[str, Any], objective: str, vocab_size: int, seq_len: int, batch_size: int) -> Any:
  config = config_module.default()
  config.model.update(model)
  # As many rows as words, and one optimizer for all: what both sides can be.
  config.model.update(vocab_size=vocab_size, vocab_pad_to=1, dropout=0.0, remat='dots')
  config.update(seq_len=seq_len, batch_size=batch_size, steps=1000)
  config.objective.name = objective
  config.data.update(tokenizer='bytes', bos=False)
  config.optim.update(name='adamw', lr=3e-4, schedule='constant', weight_decay=0.1, decay_rules=(('.*', 1.0),),
                      clip_norm=1.0)
  config.mesh.update(data=1)
  return config


def _llama(layers: int, width: int, hidden: int, heads: int, kv_heads: int) -> dict[str, Any]:
  shape = llama.SIZES['3-8b']
  return shape | dict(width=width, num_layers=layers, max_length=512, mlp=shape['mlp'] | dict(width=hidden),
                      attention=shape['attention'] | dict(num_heads=heads, num_kv_heads=kv_heads,
                                                          head_dim=width // heads))


def _bert() -> dict[str, Any]:
  shape = bert.SIZES['base']
  return shape | dict(num_layers=4, head=shape['head'] | dict(labels='none', pooler='none'))


# Name -> its config: (model, objective, vocabulary, columns, rows).
SHAPES: dict[str, Callable[[], Any]] = {
    'gpt2-6x384': lambda: _config(gpt2.SIZES['nano'], 'causal', 512, 256, 12),
    'gpt2-6x384-50304': lambda: _config(gpt2.SIZES['nano'], 'causal', 50_304, 256, 12),
    'gpt2-124m': lambda: _config(gpt2.SIZES['124m'] | dict(max_length=256), 'causal', 50_304, 256, 4),
    'bert-base-4': lambda: _config(_bert(), 'masked', 30_522, 256, 8),
    't5-small': lambda: _config(t5.SIZES['t5-small'], 'span', 32_128, 256, 8),
    'llama-6-gqa': lambda: _config(_llama(6, 512, 1408, 8, 2), 'causal', 32_000, 256, 8),
}


def _large(model: dict[str, Any], batch_size: int) -> Any:
  config = _config(model | dict(max_length=2048, attention=model['attention'] | dict(kernel='auto')), 'causal', 32_000,
                   2048, batch_size)
  config.precision.compute = 'bfloat16'
  return config


# For one accelerator: bfloat16 products of float32 weights, rows of 2,048.
LARGE: dict[str, Callable[[], Any]] = {
    'gpt2-124m-2048': lambda: _large(gpt2.SIZES['124m'], 16),
    'llama-1.3b-2048': lambda: _large(_llama(24, 2048, 5504, 16, 16), 8),
    'llama-7b-4-2048': lambda: _large(_llama(4, 4096, 11_008, 32, 32), 8),
}


def _long(kernel: str, length: int) -> Any:
  shape = _llama(2, 512, 1408, 8, 2)
  return _config(shape | dict(max_length=length, attention=shape['attention'] | dict(kernel=kernel)),
                 'causal', 512, length, 1)


# Texts far longer than wide, a row a step: what attention and the loss keep is what counts.
LONG: dict[str, Callable[[], Any]] = {
    '8,192 tokens, dense': lambda: _long('dense', 8192),
    '8,192 tokens, blockwise': lambda: _long('blockwise', 8192),
    '32,768 tokens, blockwise': lambda: _long('blockwise', 32_768),
}


ALL = SHAPES | LARGE | LONG
DECODED = {'cpu': ['gpt2-6x384', 'gpt2-124m'], 'gpu': ['gpt2-124m-2048', 'llama-1.3b-2048']}  # beside a peer


def trained(platform: str) -> list[str]:
  """Names of the models that are trained beside a peer's on a platform."""
  return list(SHAPES if platform == 'cpu' else LARGE)


def decoded(platform: str) -> list[str]:
  """Names of those that continue texts."""
  return DECODED['cpu' if platform == 'cpu' else 'gpu']


def assembled(config: Any) -> train.Parts:
  """The parts of a step of one device."""
  return train.assemble(config, sharding.single(config.sharding.rules), bill.stand_in(config))


def batches(config: Any, count: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of random tokens, the same for all who ask."""
  vocab = bill.stand_in(config)
  objective, rng = objectives.make(config, vocab), np.random.default_rng(config.seed)
  B, R = config.batch_size, objective.raw_length(config.seq_len)
  for i in range(count):
    items = dict(tokens=rng.integers(len(objective.ids) + 8, vocab.size // 2, (B, R)).astype(np.int32),
                 segment_ids=np.ones((B, R), np.int32), positions=np.tile(np.arange(R, dtype=np.int32), (B, 1)),
                 starts=np.zeros((B, R), bool))
    numbers = np.arange(i * B, (i + 1) * B)
    yield examples_of(objective, items, config.seed, numbers) | {'example_ids': numbers.astype(np.int32)}
