"""The other side of a comparison: `transformers` on torch, with the same weights, batches and optimizer."""
import os
from typing import Any

import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.speed.shapes import batches


def _model(folder: str, compiled: bool) -> tuple[Any, Any]:
  """(torch, the model in a folder); both are needed here alone."""
  try:
    import torch
    import transformers
  except ImportError as e:
    raise JaxlmError('--against=transformers needs both: pip install torch transformers') from e
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count() or 1)
  config = transformers.AutoConfig.from_pretrained(folder)
  for key in config.to_dict():
    if 'dropout' in key or key.endswith('_pdrop'):
      setattr(config, key, 0.0)
  model = getattr(transformers, config.architectures[0]).from_pretrained(folder, config=config, dtype=torch.float32)
  model = model.to(_device(torch))
  return torch, torch.compile(model) if compiled else model


def _device(torch: Any) -> str:
  return 'cuda' if torch.cuda.is_available() else 'cpu'


class Trainer:
  """As `ours.Trainer`, from the weights in a folder."""

  def __init__(self, config: Any, folder: str, compiled: bool = False):
    torch, model = _model(folder, compiled)
    self.torch, self.model, self.clip = torch, model.train(), config.optim.clip_norm
    self.device, self.half = _device(torch), config.precision.compute == 'bfloat16'
    adam = config.optim.adamw
    self.optimizer = torch.optim.AdamW(self.model.parameters(), config.optim.lr, (adam.b1, adam.b2), adam.eps,
                                       weight_decay=config.optim.weight_decay, fused=True)
    self.batches, self.done = [self._inputs(batch) for batch in batches(config, 20)], 0

  def _inputs(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], Any]:
    """(what the model reads, what it shall predict, -100 where nothing)."""
    tensor = lambda x, **given: self.torch.tensor(x, device=self.device, **given)
    ids = lambda key: tensor(batch[key], dtype=self.torch.long)
    labels = np.where(batch['loss_weights'] > 0, batch['targets'], -100)
    if 'source_tokens' in batch:
      return dict(input_ids=ids('source_tokens'), decoder_input_ids=ids('tokens'), attention_mask=tensor(
          batch['source_segment_ids'] > 0)), tensor(labels, dtype=self.torch.long)
    if 'target_index' in batch:
      whole = np.full_like(batch['tokens'], -100)
      rows, places = np.nonzero(labels != -100)
      whole[rows, batch['target_index'][rows, places]] = labels[rows, places]
      labels = whole
    return dict(input_ids=ids('tokens')), tensor(labels, dtype=self.torch.long)

  def run(self, steps: int) -> list[float]:
    """Losses of so many steps."""
    losses = []
    for _ in range(steps):
      inputs, labels = self.batches[self.done % len(self.batches)]
      self.optimizer.zero_grad(set_to_none=True)
      with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.half):
        logits = self.model(**inputs).logits
      loss = self.torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))
      loss.backward()
      self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
      self.optimizer.step()
      losses.append(loss.item())
      self.done += 1
    return losses


class Generator:
  """As `ours.Generator`, by `generate` with its cache."""

  def __init__(self, config: Any, folder: str, compiled: bool = False):
    self.torch, model = _model(folder, compiled)
    self.model = model.eval().to(getattr(self.torch, config.precision.compute))

  def run(self, prompts: np.ndarray, steps: int) -> list[list[int]]:
    """`steps` ids after each of the prompts [B, P]."""
    with self.torch.inference_mode():
      given = self.torch.tensor(prompts, device=_device(self.torch))
      ids = self.model.generate(given, attention_mask=self.torch.ones_like(given),
                                max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)
    return ids[:, prompts.shape[1]:].tolist()

  def weight_bytes(self) -> int:
    """Of the parameters as they are stored."""
    return sum(x.numel() * x.element_size() for x in self.model.parameters())
