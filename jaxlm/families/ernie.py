"""ERNIE (Sun et al. 2019, 2020, 2021): BERT with a table of tasks; sizes as published, names at Hugging Face."""
from typing import Any, Mapping

from jaxlm.families import bert, keys

# What all sizes of a version share.
BASE = bert.BASE | dict(family='ernie')
BASES = {
    '1.0': BASE | dict(mlp=BASE['mlp'] | dict(activation='relu'), norm=BASE['norm'] | dict(eps=1e-5)),
    '2.0': BASE | dict(embedding=dict(norm=True, token_types=4), norm=BASE['norm'] | dict(eps=1e-5)),
    '3.0': BASE | dict(embedding=dict(norm=True, token_types=4, task_types=3), norm=BASE['norm'] | dict(eps=1e-5)),
}

SIZES = {
    '1.0-base': bert.shape(768, 12, 12, max_length=513, base=BASES['1.0']),
    '2.0-base': bert.shape(768, 12, 12, base=BASES['2.0']),
    '2.0-large': bert.shape(1024, 24, 16, base=BASES['2.0']),
    '3.0-nano': bert.shape(312, 4, 12, max_length=2048, base=BASES['3.0']),
    '3.0-micro': bert.shape(384, 4, 12, max_length=2048, base=BASES['3.0']),
    '3.0-mini': bert.shape(384, 6, 12, max_length=2048, base=BASES['3.0']),
    '3.0-medium': bert.shape(768, 6, 12, max_length=2048, base=BASES['3.0']),
    '3.0-base': bert.shape(768, 12, 12, max_length=2048, base=BASES['3.0']),
    '3.0-xbase': bert.shape(1024, 20, 16, max_length=2048, base=BASES['3.0']),
}
# Of each version's tokenizer; 2.0 is English.
VOCAB_SIZES = {size: {'1.0': 18_000, '2.0': 30_522, '3.0': 40_000}[size.partition('-')[0]] for size in SIZES}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'ernie'
ARCHITECTURES = bert.architectures('Ernie', ForPreTraining=dict(lm=True, labels='sequence', num_labels=2,
                                                                pooler='tanh'))
PREFIX = 'ernie.'
NAMES = {'bert.': PREFIX}
TIED = {keys.renamed(twin, NAMES): keys.renamed(name, NAMES) for twin, name in bert.TIED.items()}
BUFFERS = r'(ernie\.)?(embeddings\.position_ids|pooler\..*)|cls\..*'
RENAMED = bert.RENAMED
TEMPLATES = tuple((ours, keys.renamed(theirs, NAMES), *rest) for ours, theirs, *rest in bert.TEMPLATES) + (
    ('task_embed/embedding', 'ernie.embeddings.task_type_embeddings.weight', 't d -> t d'),)
UNUSED = bert.UNUSED

KEYS = bert.KEYS | dict(use_task_id=(bool, False), task_type_vocab_size=(int, 3))
FIXED = bert.FIXED | dict(pool_act='tanh')


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, FIXED, bert.HARMLESS)
  ours = bert.overrides(hf, BASE)
  return ours | dict(embedding=ours['embedding'] | dict(
      task_types=hf['task_type_vocab_size'] if hf['use_task_id'] else 0))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  tasks = model.embedding.task_types
  return bert.to_hf(model) | dict(model_type=MODEL_TYPE, use_task_id=tasks > 0, task_type_vocab_size=tasks or 3)
