"""What `bench` compares: both sides do the same work, and what is counted is what is done."""
import json

import numpy as np
import pytest

from jaxlm import bench, pictures
from jaxlm.models import cost
from jaxlm.speed import duel, machine, shapes


def tiny(shape: str):
  """A shape of the bench, small."""
  config = shapes.SHAPES[shape]()
  few = config.model.attention.num_kv_heads < config.model.attention.num_heads
  config.model.update(width=32, num_layers=2, vocab_size=320, max_length=32)
  if config.model.encoder_layers:
    config.model.encoder_layers = 2
  config.model.embedding.width = 32
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=2 if few else 4, head_dim=8)
  if config.model.logit_scale != 1:
    config.model.logit_scale = 32 ** -0.5
  config.update(seq_len=32, batch_size=2)
  config.optim.lr = 3e-3
  return config


@pytest.mark.parametrize('shape', [shape for shape in shapes.SHAPES if shape not in ('gpt2-6x384-50304', 'gpt2-124m')])
def test_both_sides_learn_the_same_from_the_same_weights_and_batches(shape, tmp_path):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from jaxlm.speed import ours, peers
  config = tiny(shape)
  folder = str(tmp_path / 'model')
  losses = [side.Trainer(config, folder).run(4) for side in (ours, peers)]
  np.testing.assert_allclose(*losses, rtol=0, atol=2e-5)
  assert len(set(losses[0])) == 4


def test_both_sides_continue_the_same(tmp_path):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from jaxlm.speed import ours, peers
  config, folder = tiny('gpt2-6x384'), str(tmp_path / 'model')
  sides = [side.Generator(config, folder) for side in (ours, peers)]
  prompts = np.random.default_rng(0).integers(8, 320, (3, 5))
  said = [side.run(prompts, 7) for side in sides]
  assert said[0] == said[1] and np.shape(said[0]) == (3, 7)
  assert sides[0].weight_bytes() == sides[1].weight_bytes()


@pytest.mark.parametrize('shape', ['gpt2-6x384', 'llama-6-gqa', 'bert-base-4'])
def test_the_products_that_are_timed_alone_are_those_of_the_model(shape):
  config = tiny(shape)
  parts = shapes.assembled(config)
  counted = sum(2 * m * k * n * times for (m, k, n), times in machine._products(config).items())
  row = cost.flops_per_row(parts.model.config, parts.lengths, training=False)
  assert counted == config.batch_size * (row - cost.scores_per_row(parts.model.config, parts.lengths))


def test_a_line_tells_speeds_ratios_and_their_spread():
  line = duel._line('training x', ['jaxlm', 'transformers'], 100.0, [[1.0, 2.0], [2.0, 3.0], [1.0, 1.0]])
  assert line == dict(measure='training x', sides=['jaxlm', 'transformers'], rounds=3, unit='tokens/s',
                      speed=[100.0, 50.0], ratio=[1.5], least=[1.0], most=[2.0])
  line |= dict(share_of_products=[0.5, 0.25], peak_bytes=[1e9, 2e9], loss_difference=[1e-6])
  first, second = bench.rows(line)
  assert 'jaxlm' in first and '50.0% of products' in first and '1.00 GB' in first
  assert 'jaxlm is 1.50 times as fast (1.00 to 2.00)' in second and 'losses within 1.0e-06' in second
  json.dumps(line)


def test_ratios_are_drawn_with_their_spread(tmp_path):
  pytest.importorskip('matplotlib')
  axes = pictures.ratios([('a', 1.5, (1.0, 2.0)), ('b', 0.5, (0.4, 0.6))])
  assert [bar.get_width() for bar in axes.patches] == [1.5, 0.5]
  axes.figure.savefig(tmp_path / 'x.png')
