"""ESM-2 (Lin et al. 2022), on proteins: sizes as published, names at Hugging Face. ESM-1b's folders load, too."""
import re
from typing import Any, Mapping

import ml_dtypes
import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.families import bert, keys

VOCAB_SIZE = 33  # amino acids and what stands for several, gaps, and tokens of the frame

# What all sizes share. The mask embeds as zero, and what is left of a row is scaled up for it.
BASE = bert.BASE | dict(
    family='esm', embedding=dict(norm=False, token_types=0, zeroed=32),
    norm=bert.BASE['norm'] | dict(eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='rope', offset=2, rope=dict(base=10_000.0, dtype='float32')),
    head=dict(lm=True, bias=True, transform='full', labels='none', pool='first', pooler='none'))

SIZES = {
    't6-8m': bert.shape(320, 6, 20, 1026, BASE),
    't12-35m': bert.shape(480, 12, 20, 1026, BASE),
    't30-150m': bert.shape(640, 30, 20, 1026, BASE),
    't33-650m': bert.shape(1280, 33, 20, 1026, BASE),
    't36-3b': bert.shape(2560, 36, 40, 1026, BASE),
    't48-15b': bert.shape(5120, 48, 40, 1026, BASE),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'esm'
ARCHITECTURES = {name: head for name, head in bert.architectures('Esm').items() if name != 'EsmForQuestionAnswering'}
PREFIX = 'esm.'
TIED = {'lm_head.decoder.weight': 'esm.embeddings.word_embeddings.weight'}
WAVES = r'(esm\.)?(encoder\.layer\.(\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq'  # however it is named
# Files of rotary models hold a table of positions, too.
RENAMED = bert.RENAMED
BUFFERS = WAVES + r'|(esm\.)?(embeddings\.position_(ids|embeddings\.weight)|pooler\..*)|lm_head\..*'

NAMES = {'bert.embeddings.LayerNorm.': 'esm.embeddings.layer_norm.', 'bert.': PREFIX,
         '.attention.output.LayerNorm.': '.attention.LayerNorm.', '}.output.LayerNorm.': '}.LayerNorm.'}
TEMPLATES = tuple((ours.replace('_post_norm', '_norm'), keys.renamed(theirs, NAMES), *rest)
                  for ours, theirs, *rest in bert.BODY) + (
    ('final_norm/scale', 'esm.encoder.emb_layer_norm_after.weight', 'd -> d'),
    ('final_norm/bias', 'esm.encoder.emb_layer_norm_after.bias', 'd -> d'),
    *bert.dense('pooler/dense', 'esm.pooler.dense', lambda model: model.head.labels == 'none'),
    *bert.dense('pooler/dense', 'classifier.dense', lambda model: model.head.labels == 'sequence'),
    *bert.dense('head_transform/dense', 'lm_head.dense'),
    ('head_transform/norm/scale', 'lm_head.layer_norm.weight', 'd -> d'),
    ('head_transform/norm/bias', 'lm_head.layer_norm.bias', 'd -> d'),
    ('head', 'lm_head.decoder.weight', 'v d -> v d'),
    ('head_bias', 'lm_head.bias', 'v -> v'),
    *bert.dense('labels', 'classifier.out_proj', lambda model: model.head.labels == 'sequence'),
    *bert.dense('labels', 'classifier', lambda model: model.head.labels == 'token'),
)
UNUSED = {  # which residues touch, told from attention alone
    'esm.contact_head.regression.weight': lambda model: (1, model.num_layers * model.attention.num_heads),
    'esm.contact_head.regression.bias': lambda model: (1,)}

KINDS = {'rotary': 'rope', 'absolute': 'learned'}
KEYS = dict(
    vocab_size=(int, VOCAB_SIZE), hidden_size=(int, 768), num_hidden_layers=(int, 12), num_attention_heads=(int, 12),
    intermediate_size=(int, 3072), max_position_embeddings=(int, 1026), rope_theta=(float, 10_000.0),
    layer_norm_eps=(float, 1e-12), position_embedding_type=(str, 'absolute'), emb_layer_norm_before=(bool, None),
    token_dropout=(bool, False), mask_token_id=(keys.Index, None), pad_token_id=(keys.Index, 1),
    tie_word_embeddings=(bool, True),
    rope_inv_freq_dtype=(str, 'float32'))  # the last is ours: transformers looks at the tensors
FIXED = dict(is_decoder=False, add_cross_attention=False, is_folding_model=False, hidden_act='gelu')


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  hf = keys.read(given, KEYS, FIXED)
  kind = hf['position_embedding_type']
  if kind not in KINDS:
    raise JaxlmError(f'config.json: unknown position_embedding_type {kind!r}. Known: {", ".join(KINDS)}.')
  if hf['token_dropout'] and hf['mask_token_id'] is None:
    raise JaxlmError('config.json: token_dropout zeroes the mask; set mask_token_id.')
  if hf['rope_inv_freq_dtype'] not in DTYPES:
    raise JaxlmError(f'config.json: unknown rope_inv_freq_dtype {hf["rope_inv_freq_dtype"]!r}. Known: '
                     f'{", ".join(DTYPES)}.')
  offset = hf['pad_token_id'] + 1
  ours = bert.overrides(hf | dict(hidden_act='gelu', type_vocab_size=0), BASE, offset if kind == 'absolute' else 0)
  if kind == 'rotary' and ours['attention']['head_dim'] % 2:
    raise JaxlmError(f'config.json: rotary positions need heads of an even size; got {ours["attention"]["head_dim"]}.')
  return ours | dict(
      embedding=dict(norm=bool(hf['emb_layer_norm_before']), token_types=0,
                     zeroed=hf['mask_token_id'] if hf['token_dropout'] else -1),
      positions=dict(kind=KINDS[kind], offset=offset,
                     rope=dict(base=hf['rope_theta'], dtype=hf['rope_inv_freq_dtype'])))


# ESM-2's weights hold the wavelengths they were trained with, in half precision; what is computed is what they say.
DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}


def _waves(base: float, head_dim: int, dtype: str) -> np.ndarray:
  """`inv_freq`, rounded to a dtype, as float32."""
  exact = base ** (-np.arange(0, head_dim, 2) / head_dim)
  return exact.astype(np.float32).astype(DTYPES[dtype]).astype(np.float32)


def settled(given: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
  """config.json with the dtype that the wavelengths in the weights were rounded to."""
  model, found = from_hf(given), dict(given)
  base, head_dim = model['positions']['rope']['base'], model['attention']['head_dim']
  for name in weights:
    if not re.fullmatch(WAVES, name) or model['positions']['kind'] != 'rope':
      continue
    theirs = np.asarray(weights[name], np.float32)
    same = [dtype for dtype in DTYPES if theirs.shape == (head_dim // 2,)
            and np.allclose(theirs, _waves(base, head_dim, dtype), rtol=1e-6, atol=0)]
    if not same:
      raise JaxlmError(f'Tensor {name} does not hold the wavelengths of rope_theta={base:g} and heads of {head_dim}, '
                       f'rounded to any of {", ".join(DTYPES)}.')
    if found.setdefault('rope_inv_freq_dtype', same[0]) not in same:
      raise JaxlmError(f'Tensor {name} is rounded to {same[0]}; config.json or another layer says '
                       f'{found["rope_inv_freq_dtype"]}.')
  return found


def constants(model: Any) -> dict[str, np.ndarray]:
  """The wavelengths, under names that transformers 4 and 5 both read."""
  if model.positions.kind != 'rope':
    return {}
  rope = model.positions.rope
  return {f'esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq':
          _waves(rope.base, model.attention.head_dim, rope.dtype) for layer in range(model.num_layers)}


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  learned, rope, zeroed = model.positions.kind == 'learned', model.positions.rope, model.embedding.zeroed
  theirs = {key: value for key, value in bert.to_hf(model).items() if key not in ('hidden_act', 'type_vocab_size')}
  return theirs | dict(
      model_type=MODEL_TYPE, max_position_embeddings=model.max_length + (model.positions.offset if learned else 0),
      rope_theta=rope.base, emb_layer_norm_before=model.embedding.norm, token_dropout=zeroed >= 0,
      pad_token_id=model.positions.offset - 1,
      position_embedding_type=next((t for t, ours in KINDS.items() if ours == model.positions.kind), 'absolute'),
      **(dict(mask_token_id=zeroed) if zeroed >= 0 else {}),
      **(dict(rope_inv_freq_dtype=rope.dtype) if rope.dtype != 'float32' else {}))
