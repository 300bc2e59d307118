"""SmolLM2 is Llama's block; its folders are Llama's."""
import pytest

import parity

transformers = pytest.importorskip('transformers')


def test_tied_with_three_queries_a_key_it_is_theirs(tmp_path):
  config = transformers.LlamaConfig(
      vocab_size=97, hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=9,
      num_key_value_heads=3, tie_word_embeddings=True, rope_theta=100_000.0, max_position_embeddings=64)
  parity.check(tmp_path, transformers.LlamaForCausalLM(config))
