"""What a model costs: parameters by part and FLOPs by formula."""
import collections

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


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
  """Floating-point operations of the model for one token, a multiply-add counted as two.

  Matrix products only, attention counted as the mask requires, the backward pass as twice the forward; what remat
  computes again does not count, so MFU measures useful work. Embedding rows that only round the vocabulary up do not
  count either.

  Args:
    seq_len: tokens a row, one document.
    training: forward and backward; False: forward alone.
  Source: Chowdhery et al. 2022, PaLM, appendix B, but for the mask.
  """
  attention, mlp, width = config.attention, config.mlp, config.width
  projections = width * attention.head_dim * (2 * attention.num_heads + 2 * attention.num_kv_heads)
  projections += width * mlp.width * (3 if mlp.gated else 2)
  scores = sum(2 * attention.num_heads * attention.head_dim * attended(seq_len, config.window(i), config.visibility)
               for i in range(config.num_layers))
  forward = 2 * (config.num_layers * projections + scores + width * config.vocab_size)
  return (3 if training else 1) * forward
