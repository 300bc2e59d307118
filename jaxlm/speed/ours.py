"""This project's side of a comparison."""
import os
from typing import Any

import jax
import numpy as np

from jaxlm import decode, hf, reading
from jaxlm.speed.shapes import assembled, batches


class Trainer:
  """Steps of a config's training on one device, from its own first parameters."""

  def __init__(self, config: Any, folder: str):
    self.parts = assembled(config)
    self.layout = self.parts.model.layout
    self.state, self.frozen = self.parts.shapes.fresh(config.seed)
    self.batches = [self.layout.place(batch, config.batch_size, 0) for batch in batches(config, 20)]
    self.done = 0
    if not os.path.exists(os.path.join(folder, 'config.json')):
      hf.save_folder(folder, self.parts.model.config, jax.device_get(self.state.params))

  def run(self, steps: int) -> list[float]:
    """Losses of so many steps."""
    losses = []
    for _ in range(steps):
      batch = self.batches[self.done % len(self.batches)]
      self.state, metrics = self.parts.step_fn(self.state, self.frozen, batch)
      losses.append(metrics['train/loss'])
      self.done += 1
    return [float(loss) for loss in jax.block_until_ready(losses)]


  def step_bytes(self) -> int:
    """What a step holds at most, its state included, as compiled."""
    found = self.parts.step_fn.lower(self.state, self.frozen, self.batches[0]).compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


class Generator:
  """Greedy continuations by a config's first parameters."""

  def __init__(self, config: Any, folder: str):
    parts = assembled(config)
    params = parts.shapes.fresh(config.seed)[0].params
    if not os.path.exists(os.path.join(folder, 'config.json')):
      hf.save_folder(folder, parts.model.config, jax.device_get(params))
    params = jax.tree.map(lambda x: x.astype(config.precision.compute), params)  # as a model is served
    self.model, self.params = reading.unrolled(parts.model, params)

  def run(self, prompts: np.ndarray, steps: int) -> list[list[int]]:
    """`steps` ids after each of the prompts [B, P]."""
    return decode.generate(self.model, self.params, prompts.tolist(), steps)

  def weight_bytes(self) -> int:
    """Of the parameters as they are stored."""
    return sum(x.nbytes for x in jax.tree.leaves(self.params))
