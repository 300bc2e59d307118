"""The families there are: what config.model.family names, and what a Hugging Face folder's model_type names.

A family is a module of data. Always SIZES, {name: overrides of config.model}. With a form at Hugging Face also:

  MODEL_TYPE      of its config.json
  ARCHITECTURES   {class named there: whether the model has its output layer}; a body has none
  PREFIX          of names in a model with an output layer, which a body's names leave out
  TEMPLATES       (ours, theirs, bijection): a path, or several, of the unstacked parameter tree; their tensor's name,
                  as the model with an output layer has it; how one becomes the other (bijections.py). {layer} stands
                  for every layer. A row whose paths a model does not have is left out; every parameter has one row.
  TIED            {name: name of the same tensor}, for files that hold tied embeddings twice
  BUFFERS         pattern of names that are no parameters
  from_hf         config.json -> overrides of config.model; refuses what it does not understand (keys.py)
  to_hf           ModelConfig -> config.json
"""
from types import ModuleType

from jaxlm.families import gpt2, gpt3, llama
from jaxlm.lookup import nearest
from jaxlm.types import JaxlmError

FAMILIES: dict[str, ModuleType] = {'gpt2': gpt2, 'gpt3': gpt3, 'llama': llama}


def by_model_type(model_type: object) -> ModuleType:
  """The family of a config.json."""
  known = {family.MODEL_TYPE: family for family in FAMILIES.values() if hasattr(family, 'MODEL_TYPE')}
  if not isinstance(model_type, str) or model_type not in known:
    raise JaxlmError(f'config.json: unknown model_type {model_type!r}. Known: {", ".join(sorted(known))}.'
                     + nearest(model_type, known))
  return known[model_type]


def by_name(name: str) -> ModuleType:
  """The family that config.model.family names, which must have a form at Hugging Face."""
  known = {key: family for key, family in FAMILIES.items() if hasattr(family, 'MODEL_TYPE')}
  if name not in known:
    raise JaxlmError(f'Models of family {name!r} have no Hugging Face form; those of {", ".join(sorted(known))} have. '
                     'Set config.model.family to one whose block this model has.')
  return known[name]
