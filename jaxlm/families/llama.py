"""Llama 2 (Touvron et al. 2023) and 3 (Grattafiori et al. 2024): sizes as published, and weight names at Hugging Face."""

VOCAB_SIZES = {'2': 32_000, '3': 128_256, '3.1': 128_256}  # of each generation's tokenizer

# What all sizes share.
BASE = dict(
    family='llama', tie_embeddings=False, embedding_scale=1.0, logit_softcap=0.0,
    attention=dict(bias=False, out_bias=False, qk_norm='none', softcap=0.0, scale=0.0, windows=(0,)),
    mlp=dict(activation='silu', gated=True, bias=False),
    norm=dict(kind='rmsnorm', bias=False, eps=1e-5),
    residual=dict(in_norm=True, out_norm=False, post_norm=False, alpha=1.0, parallel=False, final_norm=True),
    positions=dict(kind='rope'))

# Rotary positions and length of each generation.
ROPES = {
    '2': dict(max_length=4096, rope=dict(base=10_000.0, scaling='none', factor=1.0, original_length=4096)),
    '3': dict(max_length=8192, rope=dict(base=500_000.0, scaling='none', factor=1.0, original_length=8192)),
    '3.1': dict(max_length=131_072, rope=dict(base=500_000.0, scaling='llama3', factor=8.0, original_length=8192,
                                              low_freq_factor=1.0, high_freq_factor=4.0)),
}


def _shape(generation: str, width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> dict:
  positions = ROPES[generation]
  return BASE | dict(
      width=width, num_layers=num_layers, max_length=positions['max_length'],
      attention=BASE['attention'] | dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=width // num_heads),
      mlp=BASE['mlp'] | dict(width=mlp_width), positions=dict(kind='rope', rope=positions['rope']),
      init=dict(std=0.02, embedding_std=0.02, scale_by_depth=True))


SIZES = {
    '2-7b': _shape('2', 4096, 32, 32, 32, 11_008),
    '2-13b': _shape('2', 5120, 40, 40, 40, 13_824),
    '2-70b': _shape('2', 8192, 80, 64, 8, 28_672),
    '3-8b': _shape('3', 4096, 32, 32, 8, 14_336),
    '3-70b': _shape('3', 8192, 80, 64, 8, 28_672),
    '3.1-8b': _shape('3.1', 4096, 32, 32, 8, 14_336),
    '3.1-70b': _shape('3.1', 8192, 80, 64, 8, 28_672),
}
