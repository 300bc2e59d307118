"""The families there are: what config.model.family names, and what a Hugging Face folder's model_type names.

A family is a module of data. Always SIZES, {name: overrides of config.model}. With a form at Hugging Face also:

  MODEL_TYPE      of its config.json
  ARCHITECTURES   {class named there: overrides of config.model that it stands for}: {} has an output layer,
                  dict(head=dict(lm=False)) is a body, with labels='sequence' a classifier. The first is taken where
                  config.json names none. Put over what from_hf says; num_labels comes from config.json (num_labels,
                  id2label) unless it stands here.
  PREFIX          of names, which a body's (neither lm nor labels) leave out
  TEMPLATES       (ours, theirs, bijection[, when]): a path, or several, of the unstacked parameter tree; their
                  tensor's name, as a model with heads has it; how one becomes the other (bijections.py).
                  {layer} stands for every layer. {expert} for every expert: ours have a first dim of experts then,
                  which the bijection does not name: ('stack/layer_{layer}/mlp/experts/gate/kernel',
                  'model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight', 'f d -> d f').
                  A row whose paths a model lacks is left out, and so is one whose `when`, a function of the
                  ModelConfig, says no; every parameter has one row.
  TIED            {name: name of the same tensor}: a file may hold it under any of these; where the first name is no
                  row of this very model, both must be equal
  BUFFERS         pattern of names that are not read: masks, tables, heads that a class does not have
  from_hf         config.json -> overrides of config.model; refuses what it does not understand (keys.py)
  to_hf           ModelConfig -> config.json

and, where there is need:

  RENAMED         ((pattern, replacement), …): older names of tensors
  UNUSED          {name: ModelConfig -> shape}: tensors that the class has and no output depends on; carried from
                  folder to folder, else written as zeros
  constants       ModelConfig -> {name: array}: tensors that the class has and that follow from config.json; written,
                  and not read (BUFFERS), but perhaps looked at by `settled`
  settled         (config.json, weights) -> config.json, where weights know better (T5's tie_word_embeddings)
  OBJECTIVE       what config.objective.name becomes, where it is not that of the structure (hf.OBJECTIVE)
  GGUF            general.architecture of its GGUF files, with GGUF_TEMPLATES, rows as above under their names, and
                  from_gguf, (metadata, weights) -> config.json
"""
import importlib
import os
import pkgutil
from types import ModuleType

from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest


def _found() -> dict[str, ModuleType]:
  """Every module beside this one that has SIZES: a new family is a new file."""
  names = sorted(module.name for module in pkgutil.iter_modules([os.path.dirname(__file__)]))
  modules = {name: importlib.import_module(f'jaxlm.families.{name}') for name in names if name != 'table'}
  return {name: module for name, module in modules.items() if hasattr(module, 'SIZES')}


FAMILIES = _found()


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
