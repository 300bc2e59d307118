"""What embeddings say of a task: documents that are found, texts that are alike, clusters."""
from typing import Any, Callable, Sequence

import numpy as np

from jaxlm.data.tasks import Example, Task
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM

Asker = Callable[[LM, Task, Sequence[Example], int, int], list[Any]]  # rows computed at once, seed


def _unit(lm: LM, texts: Sequence[str], batch_size: int) -> np.ndarray:
  """Embeddings of length 1."""
  found = lm.embed([_clipped(lm, text) for text in texts], batch_size=batch_size)
  return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def _both(lm: LM, examples: Sequence[Example], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  return tuple(_unit(lm, [getattr(example, text) for example in examples], batch_size) for text in ('input', 'second'))


def _retrieved(lm: LM, task: Task, examples: Sequence[Example], batch_size: int, seed: int) -> list[list[int]]:
  """Numbers of the documents of all examples, the nearest to each query first."""
  queries, documents = _both(lm, examples, batch_size)
  return np.argsort(-queries @ documents.T, axis=1, kind='stable').tolist()


def _alike(lm: LM, task: Task, examples: Sequence[Example], batch_size: int, seed: int) -> list[float]:
  """How near two texts are: their cosine."""
  return np.einsum('ED,ED->E', *_both(lm, examples, batch_size)).tolist()


def _clustered(lm: LM, task: Task, examples: Sequence[Example], batch_size: int, seed: int) -> list[int]:
  """Which cluster a text belongs to, of as many as there are labels, by k-means."""
  try:
    from sklearn.cluster import KMeans
  except ImportError as e:
    raise JaxlmError('Clustering needs scikit-learn: pip install "jaxlm[measure]".') from e
  found = KMeans(len(task.labels), n_init=10, random_state=seed)
  return found.fit_predict(_unit(lm, [example.input for example in examples], batch_size)).tolist()


def asker(task: Task) -> Asker | None:
  """How a task is answered by embeddings alone: documents found, texts compared or put together; None: it is not."""
  if task.kind == 'classify':
    return _clustered if task.metric == 'v_measure' else None
  return {'retrieve': _retrieved, 'regress': _alike if task.second else None}.get(task.kind)


def _clipped(lm: LM, text: str) -> list[int]:
  ids = [*lm.start, *lm.tokenizer.encode(text)]
  return [*ids[:lm.config.seq_len - len(lm.end) - len(lm.front)], *lm.end]
