"""Parameters and FLOPs by formula, against counts."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as base
from jaxlm import trees
from jaxlm.families import gpt2
from jaxlm.models import cost
from jaxlm.models.config import freeze


@pytest.mark.parametrize('visibility', ['causal', 'full'])
@pytest.mark.parametrize('window', [0, 1, 3, 8, 20])
def test_attended_keys_are_those_the_mask_shows(visibility, window):
  back = np.arange(8)[:, None] - np.arange(8)
  seen = (back >= 0) if visibility == 'causal' else np.ones((8, 8), bool)
  if window:
    seen &= (np.abs(back) if visibility == 'full' else back) < window
  assert cost.attended(8, window, visibility) == pytest.approx(seen.sum() / 8)


def _dot_flops(jaxpr) -> int:
  """FLOPs of every matrix product of a jaxpr, loops unrolled."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      lhs = eqn.invars[0].aval.shape
      total += 2 * int(np.prod(eqn.outvars[0].aval.shape)) * int(np.prod([lhs[i] for i in contracted]))
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(getattr(p, 'jaxpr', p), 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        total += _dot_flops(inner) * eqn.params.get('length', 1)
  return total


@pytest.mark.parametrize('changes', [
    dict(), dict(attention=dict(num_kv_heads=2, head_dim=6), mlp=dict(gated=True), tie_embeddings=False)])
def test_flops_are_those_of_the_products_that_run(changes, model_of, params_of):
  # Full visibility: dense attention multiplies everything. vocab_pad_to=1: no columns beyond the vocabulary.
  model = model_of('full', vocab_pad_to=1, **changes)
  run = lambda params: model.apply({'params': params}, {'tokens': jnp.zeros((3, 16), jnp.int32)}).logits
  counted = _dot_flops(jax.make_jaxpr(run)(params_of(model)).jaxpr)
  assert counted == 3 * 16 * cost.flops_per_token(model.config, 16, training=False)
  assert cost.flops_per_token(model.config, 16) == 3 * cost.flops_per_token(model.config, 16, training=False)


def test_gpt2_124m_has_its_published_parameters_and_about_six_flops_each(model_of):
  config = base.default()
  config.model.update(gpt2.SIZES['124m'] | {'vocab_pad_to': 1})
  frozen = freeze(base.resolved(config)['model'], vocab_size=gpt2.VOCAB_SIZE, visibility='causal')
  model = model_of().clone(config=frozen)
  shapes = jax.eval_shape(model.init, jax.random.key(0), {'tokens': jnp.zeros((1, 1), jnp.int32)})['params']
  parts = cost.parameters_by_part(shapes)
  assert parts == dict(embed=50257 * 768, position_embed=1024 * 768, attention=12 * (4 * 768 * 768 + 4 * 768),
                       mlp=12 * (8 * 768 * 768 + 5 * 768), norms=25 * 2 * 768)
  assert sum(parts.values()) == trees.count(shapes) == 124_439_808
  positions = parts['position_embed']  # a lookup multiplies nothing
  flops = 6 * (124_439_808 - positions) + 6 * 12 * 2 * 768 * (1024 + 1) / 2
  assert cost.flops_per_token(frozen, 1024) == pytest.approx(flops, rel=2e-3)  # but for biases and norms
