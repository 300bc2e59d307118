"""What a model costs: parameters by part and FLOPs by formula."""
import collections
from typing import Mapping

import numpy as np

from jaxlm import trees
from jaxlm.models.config import ModelConfig
from jaxlm.types import Tree


def parameters_by_part(params: Tree) -> dict[str, int]:
  """Parameters of the embedding, attention, MLP, norms, head; works on shapes.

  Args:
    params: the tree or its shapes, scanned or not.
  """
  parts = collections.Counter()
  for path, leaf in trees.flatten(params).items():
    names = path.split('/')
    part = next((n for n in ('attention', 'mlp') if n in names), 'norms' if 'norm' in path else names[0])
    parts[part] += trees.count(leaf)
  return dict(parts)


def attended(seq_len: int, window: int, visibility: str) -> float:
  """Keys an average query of a full row sees."""
  window = min(window or seq_len, seq_len)
  if visibility == 'full':
    return float(seq_len) if window == seq_len else sum(
        min(i + window, seq_len) - max(i - window + 1, 0) for i in range(seq_len)) / seq_len
  return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


GATES = {'rnn': 1, 'gru': 3, 'lstm': 4, 'mlstm': 5}  # matrices that meet the input, and again the state


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
  """Of a row that is one document of tokens alone, an output for each; as `flops_per_row`, by token."""
  return flops_per_row(config, {'tokens': seq_len}, training) / seq_len


def flops_per_row(config: ModelConfig, lengths: Mapping[str, int], training: bool = True,
                  trained: float = 1.0) -> float:
  """Floating-point operations of the model for one row of a batch, a multiply-add counted as two.

  Matrix products only, attention counted as the mask requires, the backward pass as twice the forward; what remat
  computes again does not count, so MFU measures useful work. Embedding rows that only round the vocabulary up do not
  count either, nor the forward pass over a memory.

  Args:
    lengths: columns of the batch's arrays by key, of which tokens, source_tokens, targets and query_positions count.
      Without targets, every token has an output.
    training: forward and backward; False: forward alone.
    trained: share of the weights that are trained; the others need no gradients.
  Source: Chowdhery et al. 2022, PaLM, appendix B, but for the mask.
  """
  weights, scores = _forward(config, lengths)
  return 2 * float((2 + trained) * weights + 3 * scores if training else weights + scores)


def scores_per_row(config: ModelConfig, lengths: Mapping[str, int]) -> float:
  """The part of a forward `flops_per_row` that is queries with keys and probabilities with values, by the mask."""
  return 2 * float(_forward(config, lengths)[1])


def _forward(config: ModelConfig, lengths: Mapping[str, int]) -> np.ndarray:
  """Multiply-adds of a row: [with weights, of scores]."""
  columns, source = lengths['tokens'], lengths.get('source_tokens', 0)
  queries = lengths.get('query_positions', 0) if config.structure == 'two_stream' else 0
  targets = lengths.get('targets', columns)
  forward = _stack(config, columns, queries, source)
  if config.structure == 'encoder_decoder' and source:
    forward += _stack(config.towers()['encoder/'], source, 0, 0)
  if config.head.lm:
    # A future head is a block more, and the output matrix once more.
    forward += config.future_heads * _stack(config, columns, 0, 0) / config.num_layers
    forward[0] += targets * (1 + config.future_heads) * _head(config)
  if config.generator.width:
    generator = config.towers()['generator/']
    forward += _stack(generator, columns, 0, 0)
    forward[0] += targets * _head(generator)
  scored = {'none': 0, 'sequence': 1}.get(config.head.labels, columns)
  forward[0] += scored * config.width * (config.num_labels + (config.width if config.head.pooler != 'none' else 0))
  return forward


def _head(config: ModelConfig) -> float:
  """Multiply-adds of one target's logits."""
  E = config.embedding.width
  return E * config.vocab_size + (config.width * E if config.head.transform != 'none' else 0)


def _stack(config: ModelConfig, columns: int, queries: int, source: int) -> np.ndarray:
  """Multiply-adds of a stack for a row, [with weights, of scores].

  Args:
    columns: that are keys and queries.
    queries: alone.
    source: columns of a source.
  """
  attention, latent, D = config.attention, config.attention.latent, config.width
  N, K, H, rows = attention.num_heads, attention.num_kv_heads, attention.head_dim, columns + queries
  total, scores = columns * config.embedding.width * D if config.embedding.width != D else 0, 0.0
  for layer, kind in enumerate(config.layer_kinds()):
    if config.mixer != 'attention':
      total += columns * 2 * D * D * GATES[config.mixer] * (2 if config.visibility == 'full' else 1)
    else:
      seen = attended(columns, config.window(layer), config.visibility)
      if latent.kv_rank:
        into, C, R, V = latent.q_rank or D, latent.kv_rank, latent.rope_dim, latent.value_dim
        total += rows * (into * N * (H + R) + (D * latent.q_rank if latent.q_rank else 0) + N * V * D)
        total += columns * (D * (C + R) + C * N * (H + V))
        scores += rows * N * (H + R + V) * seen
      else:
        total += rows * 2 * D * N * H + columns * 2 * D * K * H
        scores += rows * 2 * N * H * seen
      if config.positions.kind == 'relative':
        total += (2 * columns + 1) * (D * N * H + rows * N * H)
        total += rows * 2 * N * H if config.embedding.token_types else 0
    if config.structure == 'encoder_decoder':
      total += columns * 2 * D * N * H + source * 2 * D * K * H
      scores += columns * 2 * N * H * source
    matrices = 3 if config.mlp.gated else 2
    if kind.moe:
      moe = config.moe
      total += rows * D * (moe.num_experts + matrices * (moe.top_k * moe.width + moe.shared_width) + moe.shared_gate)
    else:
      total += rows * D * config.mlp.width * matrices
  return np.array([total, scores], float)
