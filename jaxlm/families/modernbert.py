"""ModernBERT (Warner et al. 2024): sizes as published, names at Hugging Face."""
from typing import Any, Mapping

from jaxlm.errors import JaxlmError
from jaxlm.families import bert, keys

VOCAB_SIZE = 50_368  # of its tokenizer

# What all sizes share.
BASE = dict(
    family='modernbert', structure='encoder', tie_embeddings=True, embedding_scale=1.0, logit_softcap=0.0,
    embedding=dict(norm=True),
    attention=dict(bias=False, out_bias=False, qk_norm='none', softcap=0.0, scale=0.0, windows=(0, 65, 65)),
    mlp=dict(activation='gelu', gated=True, bias=False),
    norm=dict(kind='layernorm', bias=False, eps=1e-5),
    residual=dict(in_norm=True, first_norm=False, out_norm=False, post_norm=False, alpha=1.0, parallel=False,
                  final_norm=True),
    positions=dict(kind='rope', rope=dict(base=160_000.0, local_base=10_000.0, scaling='none', factor=1.0,
                                          original_length=8192)),
    head=dict(lm=True, bias=True, transform='full', transform_bias=False, labels='none', pool='first', pooler='none'),
    init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))

SIZES = {
    'base': bert.shape(768, 22, 12, 8192, BASE, 1152),
    'large': bert.shape(1024, 28, 16, 8192, BASE, 2624),
}

# ---- Hugging Face ------------------------------------------------------------------------------------------------

MODEL_TYPE = 'modernbert'
ARCHITECTURES = bert.architectures('ModernBert', Model=dict(lm=False, labels='none', pooler='none'),
                                   **{name: dict(lm=False, labels=labels, pooler='full') for name, labels in (
                                       ('ForSequenceClassification', 'sequence'), ('ForTokenClassification', 'token'),
                                       ('ForQuestionAnswering', 'span'))})
PREFIX = 'model.'
TIED = {'decoder.weight': 'model.embeddings.tok_embeddings.weight'}
BUFFERS = r'(model\.)?rotary_emb\..*|(head|decoder)\..*'

LAYER, OURS = 'model.layers.{layer}.', 'stack/layer_{layer}/'
TEMPLATES = (
    ('embed/embedding', 'model.embeddings.tok_embeddings.weight', 'v d -> v d'),
    ('embed_norm/scale', 'model.embeddings.norm.weight', 'd -> d'),
    ('embed_norm/bias', 'model.embeddings.norm.bias', 'd -> d'),
    (OURS + 'attention_norm/scale', LAYER + 'attn_norm.weight', 'd -> d'),
    (OURS + 'attention_norm/bias', LAYER + 'attn_norm.bias', 'd -> d'),
    (tuple(OURS + f'attention/{name}/kernel' for name in ('query', 'key', 'value')), LAYER + 'attn.Wqkv.weight',
     '(n h | n h | n h) d -> d n h, d n h, d n h'),
    (tuple(OURS + f'attention/{name}/bias' for name in ('query', 'key', 'value')), LAYER + 'attn.Wqkv.bias',
     '(n h | n h | n h) -> n h, n h, n h'),
    (OURS + 'attention/out/kernel', LAYER + 'attn.Wo.weight', 'd (n h) -> n h d'),
    (OURS + 'attention/out/bias', LAYER + 'attn.Wo.bias', 'd -> d'),
    (OURS + 'mlp_norm/scale', LAYER + 'mlp_norm.weight', 'd -> d'),
    (OURS + 'mlp_norm/bias', LAYER + 'mlp_norm.bias', 'd -> d'),
    ((OURS + 'mlp/gate/kernel', OURS + 'mlp/up/kernel'), LAYER + 'mlp.Wi.weight', '(f | f) d -> d f, d f'),
    ((OURS + 'mlp/gate/bias', OURS + 'mlp/up/bias'), LAYER + 'mlp.Wi.bias', '(f | f) -> f, f'),
    (OURS + 'mlp/down/kernel', LAYER + 'mlp.Wo.weight', 'd f -> f d'),
    (OURS + 'mlp/down/bias', LAYER + 'mlp.Wo.bias', 'd -> d'),
    ('final_norm/scale', 'model.final_norm.weight', 'd -> d'),
    ('final_norm/bias', 'model.final_norm.bias', 'd -> d'),
    *(row for ours in ('head_transform', 'pooler') for row in (
        *bert.dense(f'{ours}/dense', 'head.dense'),
        (f'{ours}/norm/scale', 'head.norm.weight', 'd -> d'), (f'{ours}/norm/bias', 'head.norm.bias', 'd -> d'))),
    ('head', 'decoder.weight', 'v d -> v d'),
    ('head_bias', 'decoder.bias', 'v -> v'),
    *bert.dense('labels', 'classifier'),
)

POOLS = {'cls': 'first', 'mean': 'mean'}
KEYS = dict(
    vocab_size=(int, 50_368), hidden_size=(int, 768), num_hidden_layers=(int, 22), num_attention_heads=(int, 12),
    intermediate_size=(int, 1152), hidden_activation=(str, 'gelu'), max_position_embeddings=(int, 8192),
    norm_eps=(float, 1e-5), norm_bias=(bool, False), attention_bias=(bool, False), mlp_bias=(bool, False),
    layer_types=(list, None), global_attn_every_n_layers=(int, 3), local_attention=(int, 128),
    decoder_bias=(bool, True), classifier_pooling=(str, 'cls'), classifier_bias=(bool, False),
    classifier_activation=(str, 'gelu'), tie_word_embeddings=(bool, True))
FIXED = dict(position_embedding_type='absolute')  # which old files say, and mean rotations
HARMLESS = (keys.ROPE + r'|(global|local)_rope_theta|initializer_cutoff_factor|deterministic_flash_attn|'
            r'reference_compile|repad_logits_with_grad|sparse_pred.*|layer_norm_eps')


def from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
  """Overrides of config.model for a config.json, with rotary positions in either form."""
  hf = keys.read(given, KEYS, FIXED, HARMLESS)
  if hf['classifier_activation'] != hf['hidden_activation']:
    raise JaxlmError(f'config.json: classifier_activation={hf["classifier_activation"]!r} must be '
                     f'hidden_activation={hf["hidden_activation"]!r}, which the heads here share.')
  if hf['classifier_pooling'] not in POOLS:
    raise JaxlmError(f'config.json: unknown classifier_pooling {hf["classifier_pooling"]!r}. Known: '
                     f'{", ".join(POOLS)}.')
  num_heads, num_layers = hf['num_attention_heads'], hf['num_hidden_layers']
  head_dim = keys.heads('hidden_size', hf['hidden_size'], 'num_attention_heads', num_heads)
  kinds = hf['layer_types'] or [keys.SLIDING if i % hf['global_attn_every_n_layers'] else keys.FULL
                                for i in range(num_layers)]
  max_length, bias = hf['max_position_embeddings'], hf['attention_bias']
  ropes = dict(rope_theta=given.get('global_rope_theta'), rope_local_base_freq=given.get('local_rope_theta')) | given
  return BASE | dict(
      width=hf['hidden_size'], num_layers=num_layers, vocab_size=hf['vocab_size'], max_length=max_length,
      tie_embeddings=hf['tie_word_embeddings'],
      # They see half of it on either side, and themselves.
      attention=BASE['attention'] | dict(
          num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, bias=bias, out_bias=bias,
          windows=keys.windows(kinds, hf['local_attention'] // 2 + 1, num_layers)),
      mlp=BASE['mlp'] | dict(width=hf['intermediate_size'], bias=hf['mlp_bias'],
                             activation=keys.activation('hidden_activation', hf['hidden_activation'])),
      norm=BASE['norm'] | dict(eps=hf['norm_eps'], bias=hf['norm_bias']),
      positions=dict(kind='rope', rope=keys.rope_by_layer(ropes, head_dim, max_length, 160_000.0, 10_000.0)),
      head=BASE['head'] | dict(bias=hf['decoder_bias'], transform_bias=hf['classifier_bias'],
                               pooler_bias=hf['classifier_bias'], pool=POOLS[hf['classifier_pooling']]))


def to_hf(model: Any) -> dict[str, Any]:
  """The config.json of a ModelConfig."""
  head, window = model.head, keys.their_window(model)
  activation = keys.their_activation(model.mlp.activation)
  return dict(
      model_type=MODEL_TYPE, vocab_size=model.vocab_size, hidden_size=model.width, num_hidden_layers=model.num_layers,
      num_attention_heads=model.attention.num_heads, intermediate_size=model.mlp.width, hidden_activation=activation,
      max_position_embeddings=model.max_length, norm_eps=model.norm.eps, norm_bias=model.norm.bias,
      attention_bias=model.attention.bias, mlp_bias=model.mlp.bias, layer_types=keys.their_layer_types(model),
      local_attention=2 * (window - 1) if window else 128, decoder_bias=head.bias,
      classifier_pooling=next((theirs for theirs, ours in POOLS.items() if ours == head.pool),
                              head.pool if head.labels == 'sequence' else 'cls'),  # which alone reads it
      classifier_bias=head.transform_bias if head.lm else head.pooler_bias, classifier_activation=activation,
      tie_word_embeddings=model.tie_embeddings, initializer_range=model.init.std,
      attention_dropout=model.attention.dropout, embedding_dropout=model.dropout, mlp_dropout=model.dropout,
      **keys.their_rope_by_layer(model.positions.rope))
