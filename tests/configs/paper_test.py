"""The paper's three stages at full size, with abstract parameters."""

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.cascade import stage as stages
from imagen_jax.cascade import stage_config
from imagen_jax.cli.configs import load_config
from imagen_jax.errors import UsageError
from imagen_jax.nets.t5 import SIZES, T5Encoder
from imagen_jax.training.optimizer import learning_rate

COUNTS = {
  'imagen_base64': 2_263_427_075,
  'imagen_sr256': 591_985_667,
  'imagen_sr1024': 583_588_867,
}


def build(config, text_dim=4096):
  return stage_config.from_config(
    config.stage.to_dict(), text_dim=text_dim, text_len=config.text.max_len
  )


def count(stage):
  params = jax.eval_shape(
    lambda key: stages.init_params(stage, key), jax.random.key(0)
  )
  return stages.num_params(params)


@pytest.mark.parametrize('name', COUNTS)
def test_the_papers_stages_have_the_parameters_their_notes_say(name):
  assert count(build(load_config(name))) == COUNTS[name]


def test_t5_xxl_has_4_76_billion_parameters():
  module = T5Encoder(**SIZES['xxl'])
  params = jax.eval_shape(
    module.init,
    jax.random.key(0),
    jnp.zeros((1, 8), jnp.int32),
    jnp.ones((1, 8), bool),
  )
  assert stages.num_params(params) == 4_762_310_656


@pytest.mark.parametrize('name', COUNTS)
def test_training_is_as_the_paper_says(name):
  train = load_config(name).train
  assert (train.batch_size, train.num_steps) == (2048, 2_500_000)
  kind = 'adafactor' if name == 'imagen_base64' else 'adam'
  assert train.optimizer.kind == kind
  rate = learning_rate(
    peak=train.optimizer.learning_rate,
    warmup=train.optimizer.warmup,
    decay_steps=train.num_steps if train.optimizer.decay else None,
  )
  assert float(rate(10_000)) == pytest.approx(1e-4)
  assert float(rate(2_500_000)) == pytest.approx(0, abs=1e-12)


def test_stages_are_as_the_paper_says():
  made = {name: build(load_config(name)) for name in COUNTS}
  chain = [(s.low_resolution, s.resolution) for s in made.values()]
  assert chain == [(None, 64), (64, 256), (256, 1024)]
  assert {s.prediction for s in made.values()} == {'eps'}
  assert {s.cond_drop for s in made.values()} == {0.1}
  assert made['imagen_sr1024'].crop == 256
  assert not any(made['imagen_sr1024'].net.self_attention)
  # The end of the linear schedule: log(alpha²/sigma²) of 1000 betas to 0.02.
  logsnr = made['imagen_sr1024'].logsnr_fn(jnp.asarray(1.0))
  assert float(logsnr) == pytest.approx(-10.05, abs=0.1)


def test_the_demos_two_networks_for_sr1_have_as_many_parameters():
  efficient, ordinary = (
    count(build(load_config(name), text_dim=128))
    for name in ('shapes_sr1', 'shapes_sr1:unet')
  )
  assert ordinary != efficient
  assert ordinary == pytest.approx(efficient, rel=0.002)


def test_a_network_that_sr1_has_not_is_named():
  with pytest.raises(UsageError):
    load_config('shapes_sr1:vit')
