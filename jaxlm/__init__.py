"""jaxlm: pretrain, adapt, measure and use transformer language models in JAX."""


def __getattr__(name: str):
  """Offers `load` and `run`; imported on first use, so that `import jaxlm` stays instant."""
  if name == 'load':
    from jaxlm.loading import load
    return load
  if name == 'run':
    from jaxlm.train import run
    return run
  raise AttributeError(f'module jaxlm has no attribute {name!r}; it offers load and run.')
