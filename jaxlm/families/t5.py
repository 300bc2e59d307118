"""T5 1.0 (Raffel et al. 2019, arXiv:1910.10683) and 1.1 with Flan-T5: sizes as published, names at Hugging Face."""
import math
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys

VOCAB_SIZE = 32_128  # 32,000 pieces, 100 sentinels, padding, end, unknown; the rest rounds up to 128

# What all sizes share. Scores are not divided by sqrt(head_dim): the weights are initialised so small instead.
BASE = dict(
    family='t5', structure='encoder_decoder', embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=False, out_bias=False, qk_norm='none', softcap=0.0, scale=1.0, windows=(0,)),
    mlp=dict(activation='relu', gated=False, bias=False),
    norm=dict(kind='rmsnorm', bias=False, eps=1e-6),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='buckets', num_buckets=32, max_distance=128))


def shape(width: int, num_layers: int, num_heads: int, head_dim: int, mlp_width: int, activation: str = 'relu',
          gated: bool = False, tied: bool = True) -> dict:
  """Overrides of config.model for one size; as many layers in the encoder as in the decoder.

  T5 initialises queries with 1 / sqrt(width·head_dim) and the rest with 1 / sqrt(inputs); there is one number here,
  chosen so that scores begin with variance 1. Embeddings have 1, as published.
  """
  return BASE | dict(
      width=width, num_layers=num_layers, encoder_layers=num_layers, tie_embeddings=tied,
      logit_scale=width ** -0.5 if tied else 1.0,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim),
      mlp=BASE['mlp'] | dict(width=mlp_width, activation=activation, gated=gated),
      init=dict(std=width ** -0.5 * head_dim ** -0.25, embedding_std=1.0, scale_by_depth=False))


def gated(width: int, num_layers: int, num_heads: int, head_dim: int, mlp_width: int) -> dict:
  """T5 1.1: GeGLU, and an output layer of its own without a scale (Shazeer 2020, arXiv:2002.05202)."""
  return shape(width, num_layers, num_heads, head_dim, mlp_width, 'gelu_tanh', True, False)


SIZES = {
    't5-small': shape(512, 6, 8, 64, 2048),
    't5-base': shape(768, 12, 12, 64, 3072),
    't5-large': shape(1024, 24, 16, 64, 4096),
    't5-3b': shape(1024, 24, 32, 128, 16_384),
    't5-11b': shape(1024, 24, 128, 128, 65_536),
    'v1_1-small': gated(512, 8, 6, 64, 1024),
    'v1_1-base': gated(768, 12, 12, 64, 2048),
    'v1_1-large': gated(1024, 24, 16, 64, 2816),
    'v1_1-xl': gated(2048, 24, 32, 64, 5120),
    'v1_1-xxl': gated(4096, 24, 64, 64, 10_240),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 't5'
ENCODER = dict(structure='encoder')  # alone, of a class that has no decoder
ARCHITECTURES = {
    'T5ForConditionalGeneration': {},
    'T5Model': dict(head=dict(lm=False)),
    'T5EncoderModel': ENCODER | dict(head=dict(lm=False)),
    'T5ForTokenClassification': ENCODER | dict(head=dict(lm=False, labels='token')),
    'T5ForSequenceClassification': dict(head=dict(lm=False, labels='sequence', pool='last', pooler='tanh')),
    'T5ForQuestionAnswering': dict(head=dict(lm=False, labels='span')),
}
PREFIX = ''  # bodies have the names of models with heads; but classifiers begin with 'transformer.'
_CLASSIFIER = 'transformer.'
_TWINS = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
TIED = ({'lm_head.weight': 'shared.weight'} | {name: 'shared.weight' for name in _TWINS}
        | {_CLASSIFIER + name: _CLASSIFIER + 'shared.weight' for name in _TWINS})
BUFFERS = r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'  # in old files, not read


def _tower(ours: str, theirs: str, cross: bool) -> list[tuple]:
  """Rows of a stack with all of its own: paths that start with `ours`, names that start with `theirs`."""
  def attention(name: str, number: int, module: str) -> list[tuple]:
    ours_at, theirs_at = f'{ours}stack/layer_{{layer}}/{name}', f'{theirs}.block.{{layer}}.layer.{number}'
    into = [(f'{ours_at}/{part}/kernel', f'{theirs_at}.{module}.{part[0]}.weight', '(n h) d -> d n h')
            for part in ('query', 'key', 'value')]
    return [(f'{ours_at}_norm/scale', f'{theirs_at}.layer_norm.weight', 'd -> d'), *into,
            (f'{ours_at}/out/kernel', f'{theirs_at}.{module}.o.weight', 'd (n h) -> n h d')]

  mlp, their_mlp = f'{ours}stack/layer_{{layer}}/mlp', f'{theirs}.block.{{layer}}.layer.{2 if cross else 1}'
  dense = f'{their_mlp}.DenseReluDense'
  return [
      (f'{ours}relative_bias/embedding', f'{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
       'b n -> b n'),
      *attention('attention', 0, 'SelfAttention'),
      *(attention('cross', 1, 'EncDecAttention') if cross else []),
      (f'{mlp}_norm/scale', f'{their_mlp}.layer_norm.weight', 'd -> d'),
      (f'{mlp}/up/kernel', f'{dense}.wi.weight', 'f d -> d f', lambda model: not model.mlp.gated),
      (f'{mlp}/gate/kernel', f'{dense}.wi_0.weight', 'f d -> d f', lambda model: model.mlp.gated),
      (f'{mlp}/up/kernel', f'{dense}.wi_1.weight', 'f d -> d f', lambda model: model.mlp.gated),
      (f'{mlp}/down/kernel', f'{dense}.wo.weight', 'd f -> f d'),
      (f'{ours}final_norm/scale', f'{theirs}.final_layer_norm.weight', 'd -> d')]


def _only(structure: str, start: str, rows: list[tuple]) -> list[tuple]:
  """Rows of models of one structure, classifiers or others, whose names have this start."""
  def row(ours, theirs, bijection, when=lambda model: True):
    return ours, start + theirs, bijection, lambda model: (
        model.structure == structure and (model.head.labels in ('sequence', 'token')) == bool(start) and when(model))
  return [row(*given) for given in rows]


_EMBEDDING = [('embed/embedding', 'shared.weight', 'v d -> v d')]
_BOTH = _EMBEDDING + _tower('encoder/', 'encoder', False) + _tower('', 'decoder', True)
_ALONE = _EMBEDDING + _tower('', 'encoder', False)
TEMPLATES = (
    *_only('encoder_decoder', '', _BOTH), *_only('encoder_decoder', _CLASSIFIER, _BOTH),
    *_only('encoder', '', _ALONE), *_only('encoder', _CLASSIFIER, _ALONE),
    ('head', 'lm_head.weight', 'v d -> v d'),
    ('pooler/dense/kernel', 'classification_head.dense.weight', 'e d -> d e'),
    ('pooler/dense/bias', 'classification_head.dense.bias', 'e -> e'),
    *((f'labels/{ours}', f'{module}.{theirs}', bijection, lambda model, labels=labels: model.head.labels == labels)
      for labels, module in dict(sequence='classification_head.out_proj', token='classifier', span='qa_outputs').items()
      for ours, theirs, bijection in (('kernel', 'weight', 'c d -> d c'), ('bias', 'bias', 'c -> c'))),
)

KEYS = dict(
    vocab_size=(int, 32_128), d_model=(int, 512), d_kv=(int, 64), d_ff=(int, 2048), num_layers=(int, 6),
    num_decoder_layers=(int, None), num_heads=(int, 8), relative_attention_num_buckets=(int, 32),
    relative_attention_max_distance=(int, 128), layer_norm_epsilon=(float, 1e-6), feed_forward_proj=(str, 'relu'),
    tie_word_embeddings=(bool, True), scale_decoder_outputs=(bool, None))
HARMLESS = r'n_positions|dropout_rate|initializer_factor|tokenizer_class'


def _projection(text: str) -> tuple[bool, str]:
  """(gated, their activation) of feed_forward_proj."""
  *gate, name = text.split('-')
  if gate not in ([], ['gated']):
    raise JaxlmError(f'config.json: feed_forward_proj must be an activation, or one after "gated-"; got {text!r}.')
  return bool(gate), 'gelu_new' if text == 'gated-gelu' else name


def from_hf(given: Mapping[str, Any], known: Mapping[str, tuple] = KEYS, scaled: bool = True) -> dict[str, Any]:
  """Overrides of config.model for a config.json.

  Args:
    given: config.json.
    known: what is read, with what stands for keys left out.
    scaled: whether logits may be scaled: as scale_decoder_outputs says; without it, if embeddings are tied (T5 1.0).
  """
  is_gated, name = _projection(given.get('feed_forward_proj') or known['feed_forward_proj'][1])
  hf = keys.read(given, known, dict(is_gated_act=is_gated, dense_act_fn=name), HARMLESS)
  width, num_heads, encoder_layers = hf['d_model'], hf['num_heads'], hf['num_layers']
  alone = any(str(named).endswith(('EncoderModel', 'ForTokenClassification'))
              for named in given.get('architectures') or ())
  said, tied = hf.get('scale_decoder_outputs'), hf['tie_word_embeddings']
  return BASE | dict(
      width=width, vocab_size=hf['vocab_size'], encoder_layers=encoder_layers, tie_embeddings=tied,
      num_layers=encoder_layers if alone else hf['num_decoder_layers'] or encoder_layers,
      logit_scale=width ** -0.5 if scaled and (tied if said is None else said) else 1.0,
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=hf['d_kv']),
      mlp=BASE['mlp'] | dict(width=hf['d_ff'], gated=is_gated, activation=keys.activation('feed_forward_proj', name)),
      norm=BASE['norm'] | dict(eps=hf['layer_norm_epsilon']),
      positions=dict(kind='buckets', num_buckets=hf['relative_attention_num_buckets'],
                     max_distance=hf['relative_attention_max_distance']))


def settled(given: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
  """config.json with what the weights know better: transformers 5 writes tie_word_embeddings: true, tied or not."""
  twins = [weights[name] for name in ('shared.weight', 'lm_head.weight') if name in weights]
  if len(twins) < 2 or (twins[0].shape == twins[1].shape and (twins[0] == twins[1]).all()):
    return dict(given)
  scale = given.get('scale_decoder_outputs')
  return dict(given, tie_word_embeddings=False,
              scale_decoder_outputs=given.get('tie_word_embeddings', True) if scale is None else scale)


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  mlp, name = model.mlp, keys.their_activation(model.mlp.activation)
  projection = f'gated-{name}' if mlp.gated else name
  if mlp.gated and name in ('gelu', 'gelu_new'):  # "gated-gelu" stands for gelu_new
    name, projection = ('gelu_new', 'gated-gelu') if name == 'gelu_new' else ('gelu_python', 'gated-gelu_python')
  both = model.structure == 'encoder_decoder'
  return dict(
      model_type='t5', vocab_size=model.vocab_size, d_model=model.width, d_kv=model.attention.head_dim, d_ff=mlp.width,
      num_layers=model.encoder_layers if both else model.num_layers, num_decoder_layers=model.num_layers,
      num_heads=model.attention.num_heads, relative_attention_num_buckets=model.positions.num_buckets,
      relative_attention_max_distance=model.positions.max_distance, layer_norm_epsilon=model.norm.eps,
      feed_forward_proj=projection, is_gated_act=mlp.gated, dense_act_fn=name, is_encoder_decoder=both,
      tie_word_embeddings=model.tie_embeddings,
      scale_decoder_outputs=math.isclose(model.logit_scale, model.width ** -0.5))
