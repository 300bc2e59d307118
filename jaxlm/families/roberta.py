"""RoBERTa (Liu et al. 2019): BERT's block, trained on masks alone; sizes as published, names at Hugging Face."""
from typing import Any, Mapping

from jaxlm.families import bert, keys

VOCAB_SIZE = 50265  # of its tokenizer, GPT-2's with five more pieces and two that are padding

# What all sizes share. Positions begin at 2: fairseq counts from the id of padding, which is 1.
BASE = bert.BASE | dict(
    family='roberta', embedding=dict(norm=True, token_types=1), norm=bert.BASE['norm'] | dict(eps=1e-5),
    positions=dict(kind='learned', offset=2),
    head=dict(lm=True, bias=True, transform='full', labels='none', pool='first', pooler='none'))

SIZES = {
    'base': bert.shape(768, 12, 12, base=BASE),
    'large': bert.shape(1024, 24, 16, base=BASE),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'roberta'
ARCHITECTURES = bert.architectures('Roberta')
PREFIX = 'roberta.'
TIED = {'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight', 'lm_head.decoder.bias': 'lm_head.bias'}
BUFFERS = r'(roberta\.)?(embeddings\.position_ids|pooler\..*)|lm_head\..*'

TEMPLATES = tuple((ours, keys.renamed(theirs, {'bert.': 'roberta.'}), *rest) for ours, theirs, *rest in bert.BODY) + (
    *bert.dense('pooler/dense', 'roberta.pooler.dense', lambda model: model.head.labels == 'none'),
    *bert.dense('pooler/dense', 'classifier.dense', lambda model: model.head.labels == 'sequence'),
    *bert.dense('head_transform/dense', 'lm_head.dense'),
    ('head_transform/norm/scale', 'lm_head.layer_norm.weight', 'd -> d'),
    ('head_transform/norm/bias', 'lm_head.layer_norm.bias', 'd -> d'),
    ('head', 'lm_head.decoder.weight', 'v d -> v d'),
    ('head_bias', 'lm_head.bias', 'v -> v', lambda model: model.tie_embeddings),
    ('head_bias', 'lm_head.decoder.bias', 'v -> v', lambda model: not model.tie_embeddings),
    *bert.dense('labels', 'classifier.out_proj', lambda model: model.head.labels == 'sequence'),
    *bert.dense('labels', 'classifier', lambda model: model.head.labels == 'token'),
    *bert.dense('labels', 'qa_outputs', lambda model: model.head.labels == 'span'),
)
UNUSED = {'lm_head.bias': bert.spare}

KEYS = bert.KEYS | dict(vocab_size=(int, 50265), pad_token_id=(keys.Index, 1))
FIXED = bert.FIXED | dict(hidden_act='gelu')  # the output layer's activation is that, whatever the block's


def from_hf(given: Mapping[str, Any], base: Mapping[str, Any] = BASE,
            known: Mapping[str, tuple[type, Any]] = KEYS) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, known, FIXED)
  return bert.overrides(hf, base, offset=hf['pad_token_id'] + 1)


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig.

  They count positions of tokens that are not padding by its id, so that id, one less than the offset, must be no token
  of a text.
  """
  return bert.to_hf(model) | dict(model_type=MODEL_TYPE, pad_token_id=model.positions.offset - 1)
