"""BART (Lewis et al. 2019, arXiv:1910.13461): sizes as published, names at Hugging Face."""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import keys

VOCAB_SIZE = 50_265  # GPT-2's pieces and its own special tokens

# What all sizes share: post-norm, positions and a norm of embeddings in each of encoder and decoder.
BASE = dict(
    family='bart', structure='encoder_decoder', tie_embeddings=True, embedding_scale=1.0, logit_scale=1.0,
    logit_softcap=0.0, embedding=dict(norm=True), head=dict(bias=True),
    attention=dict(bias=True, out_bias=True, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='gelu', gated=False, bias=True),
    norm=dict(kind='layernorm', bias=True, eps=1e-5),
    residual=dict(in_norm=False, out_norm=False, post_norm=True, alpha=1.0, parallel=False, final_norm=False),
    positions=dict(kind='learned', offset=2))


def shape(base: Mapping[str, Any], width: int, num_layers: int, num_heads: int, mlp_width: int,
          max_length: int) -> dict:
  """Overrides of config.model for one size; as many layers in the encoder as in the decoder."""
  return base | dict(
      width=width, num_layers=num_layers, encoder_layers=num_layers, max_length=max_length,
      attention=base['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=width // num_heads),
      mlp=base['mlp'] | dict(width=mlp_width), init=dict(std=0.02, embedding_std=0.02, scale_by_depth=False))


SIZES = {
    'base': shape(BASE, 768, 6, 12, 3072, 1024),
    'large': shape(BASE, 1024, 12, 16, 4096, 1024),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'bart'
BODY = dict(lm=False, bias=False)
ARCHITECTURES = {
    'BartForConditionalGeneration': {},
    'BartModel': dict(head=BODY),
    'BartForSequenceClassification': dict(head=BODY | dict(labels='sequence', pool='last', pooler='tanh')),
    'BartForQuestionAnswering': dict(head=BODY | dict(labels='span')),
}
PREFIX = 'model.'
TIED = {'lm_head.weight': 'model.shared.weight', 'model.encoder.embed_tokens.weight': 'model.shared.weight',
        'model.decoder.embed_tokens.weight': 'model.shared.weight'}
BUFFERS = r'(model\.)?(encoder|decoder)\.version'  # of fairseq's files


def tower(ours: str, theirs: str, cross: bool) -> list[tuple]:
  """Rows of a stack, with positions and the norm of embeddings where the model has them."""
  def linear(ours_at, theirs_at, kernel, bias):
    return [(f'{ours_at}/kernel', f'{theirs_at}.weight', kernel), (f'{ours_at}/bias', f'{theirs_at}.bias', bias)]

  def norm(ours_at, theirs_at):
    return [(f'{ours_at}/scale', f'{theirs_at}.weight', 'd -> d'), (f'{ours_at}/bias', f'{theirs_at}.bias', 'd -> d')]

  def attention(name, module):
    rows = []
    for part, their_part in dict(query='q_proj', key='k_proj', value='v_proj').items():
      rows += linear(f'{layer}/{name}/{part}', f'{their_layer}.{module}.{their_part}', '(n h) d -> d n h',
                     '(n h) -> n h')
    return [*rows, *linear(f'{layer}/{name}/out', f'{their_layer}.{module}.out_proj', 'd (n h) -> n h d', 'd -> d'),
            *norm(f'{layer}/{name}_post_norm', f'{their_layer}.{module}_layer_norm')]

  layer, their_layer = f'{ours}stack/layer_{{layer}}', f'{theirs}.layers.{{layer}}'
  return [
      (f'{ours}position_embed/embedding', f'{theirs}.embed_positions.weight', 'p d -> p d'),
      *norm(f'{ours}embed_norm', f'{theirs}.layernorm_embedding'),
      *attention('attention', 'self_attn'), *(attention('cross', 'encoder_attn') if cross else []),
      *linear(f'{layer}/mlp/up', f'{their_layer}.fc1', 'f d -> d f', 'f -> f'),
      *linear(f'{layer}/mlp/down', f'{their_layer}.fc2', 'd f -> f d', 'd -> d'),
      *norm(f'{layer}/mlp_post_norm', f'{their_layer}.final_layer_norm')]


TEMPLATES = (
    ('embed/embedding', 'model.shared.weight', 'v d -> v d'),
    *tower('encoder/', 'model.encoder', False), *tower('', 'model.decoder', True),
    ('head_bias', 'final_logits_bias', '1 v -> v'),
    ('pooler/dense/kernel', 'classification_head.dense.weight', 'e d -> d e'),
    ('pooler/dense/bias', 'classification_head.dense.bias', 'e -> e'),
    *((f'labels/{ours}', f'{module}.{theirs}', bijection, lambda model, labels=labels: model.head.labels == labels)
      for labels, module in dict(sequence='classification_head.out_proj', span='qa_outputs').items()
      for ours, theirs, bijection in (('kernel', 'weight', 'c d -> d c'), ('bias', 'bias', 'c -> c'))),
)

KEYS = dict(
    vocab_size=(int, 50_265), max_position_embeddings=(int, 1024), encoder_layers=(int, 12), decoder_layers=(int, 12),
    encoder_ffn_dim=(int, 4096), decoder_ffn_dim=(int, 4096), encoder_attention_heads=(int, 16),
    decoder_attention_heads=(int, 16), activation_function=(str, 'gelu'), d_model=(int, 1024),
    scale_embedding=(bool, False))
# The second line: of the fairseq models that the family began with, and never read.
FIXED = dict(
    tie_word_embeddings=True,
    normalize_before=False, add_final_layer_norm=False, add_bias_logits=False)
HARMLESS = (r'dropout|(encoder|decoder)_layerdrop|init_std|classif_dropout|force_bos_token_to_be_generated|'
            'extra_pos_embeddings')


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json."""
  fixed = FIXED | dict(static_position_embeddings=False, normalize_embedding=True)
  return read(given, BASE, KEYS, fixed) | dict(positions=BASE['positions'])


def read(given: Mapping[str, Any], base: Mapping[str, Any], known: Mapping[str, tuple],
         fixed: Mapping[str, Any]) -> dict[str, Any]:
  """What BART and Marian have in common: overrides of config.model but for positions."""
  layers = given.get('encoder_layers', known['encoder_layers'][1])
  hf = keys.read(given, known, {**fixed, 'num_hidden_layers': layers}, HARMLESS)
  for part in ('ffn_dim', 'attention_heads'):
    if hf[f'encoder_{part}'] != hf[f'decoder_{part}']:
      raise JaxlmError(f'config.json: encoder_{part}={hf[f"encoder_{part}"]} and decoder_{part}='
                       f'{hf[f"decoder_{part}"]} differ; here both sides have one size.')
  width, num_heads = hf['d_model'], hf['encoder_attention_heads']
  return base | dict(
      width=width, num_layers=hf['decoder_layers'], encoder_layers=hf['encoder_layers'], vocab_size=hf['vocab_size'],
      max_length=hf['max_position_embeddings'], embedding_scale=width ** 0.5 if hf['scale_embedding'] else 1.0,
      attention=base['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=keys.heads(
          'd_model', width, 'encoder_attention_heads', num_heads)),
      mlp=base['mlp'] | dict(width=hf['encoder_ffn_dim'], activation=keys.activation(
          'activation_function', hf['activation_function'])))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, max_position_embeddings=model.max_length,
      encoder_layers=model.encoder_layers, decoder_layers=model.num_layers, num_hidden_layers=model.encoder_layers,
      encoder_ffn_dim=model.mlp.width, decoder_ffn_dim=model.mlp.width,
      encoder_attention_heads=model.attention.num_heads, decoder_attention_heads=model.attention.num_heads,
      activation_function=keys.their_activation(model.mlp.activation), d_model=model.width,
      scale_embedding=model.embedding_scale != 1.0, tie_word_embeddings=model.tie_embeddings)
