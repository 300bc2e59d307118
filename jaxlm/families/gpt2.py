"""GPT-2 (Radford et al. 2019): sizes as published, and the names of its weights at Hugging Face."""

VOCAB_SIZE = 50257  # of its tokenizer

# What all sizes share.
BASE = dict(
    family='gpt2', tie_embeddings=True, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=True, out_bias=True, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='gelu_tanh', gated=False, bias=True),
    norm=dict(kind='layernorm', bias=True, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='learned'))


def shape(width: int, num_layers: int, num_heads: int, max_length: int = 1024) -> dict:
  """Overrides of config.model for one size."""
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=max_length, mlp=BASE['mlp'] | dict(width=4 * width),
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=width // num_heads),
      init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    'nano': shape(384, 6, 6, max_length=256),  # chosen: trains on a laptop; nanoGPT's smallest
    '124m': shape(768, 12, 12),
    '355m': shape(1024, 24, 16),
    '774m': shape(1280, 36, 20),
    '1.5b': shape(1600, 48, 25),
}
