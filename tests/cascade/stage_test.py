"""Building a stage from a config's `stage` section."""

import dataclasses
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.cascade import objective, sampling, settings, stage
from imagen_jax.errors import UsageError
from imagen_jax.nets.network import Network
from tests import tiny_model


def build(name='base', **changes):
  config = tiny_model.config(name).stage.to_dict()
  for key, value in changes.items():
    section = config
    *path, last = key.split('__')
    for part in path:
      section = section[part]
    section[last] = value
  return stage.from_config(config, text_dim=16, text_len=12)


@pytest.mark.parametrize(
  'changes',
  [
    {'net__kind': 'dit'},
    {'net__chanels': 8},
    {'sampling__step': 3},
    {'sampling__steps': 0},
    {'sampling__steps': 10**20},
    {'sampling__guidance_interval': [3.0, -2.0]},
    {'schedule__kind': 'quadratic'},
    {'schedule__shift_from': 8},
    {'resolutoin': 8},
    {'prediction': 'epsilon'},
    {'weighting': 'snr'},
    {'min_snr_gamma': 3.0},
    {'weighting': 'min_snr', 'min_snr_gamma': 0.0},
    {'weighting': 'min_snr', 'sigmoid_bias': -1.0},
    {'max_level': 1.5},
    {'contrast_floor': 0.1},
    {'schedule__logsnr_min': 5.0, 'schedule__logsnr_max': -5.0},
    {'schedule__logsnr_min': 15.0},
    {'low_resolution': 16},
    {'low_resolution': 8},
    {'low_resolution': 3},
    {'crop': 9},
    {'low_resolution': 2, 'crop': 6},
    {'net': tiny_model.UNET | {'channels': -5}, 'init': True},
    {'net': tiny_model.UNET | {'remat': 'maybe'}, 'init': True},
  ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(changes):
  init = changes.pop('init', False)
  with pytest.raises(UsageError):
    made = build(**changes)
    if init:
      stage.init_params(made, jax.random.key(0))


@pytest.mark.parametrize('guidance', [float('nan'), float('inf'), -3.0])
def test_guidance_without_sense_is_refused(guidance):
  made = build()
  with pytest.raises(UsageError) as error:
    settings.choose([made], {'guidance': guidance})
  assert error.value.key == 'guidance'


def test_sizes_are_multiples_of_all_downsampling():
  for levels in (2, 4):
    net = tiny_model.UNET | {'channel_mults': (1,) * levels}
    assert build(net=net).net.multiple == 2 ** (levels - 1)
  assert build('sr1').net.multiple == 4


def test_the_spec_holds_what_is_compiled_and_the_scalars_the_rest():
  config = build('sr1', sampling__guidance=3.0).sampling
  names = {field.name for field in dataclasses.fields(config)}
  assert vars(config.spec).keys() | config.scalars.keys() == names
  assert hash(config.spec) == hash(dataclasses.replace(config.spec))
  assert config.scalars == {'guidance': 3.0, 'aug_level': np.float32(0.1)}
  assert build('sr1').sampling.scalars['guidance'] is None


@pytest.mark.parametrize(
  'weighting, key, values',
  [
    ('min_snr', 'min_snr_gamma', (5.0, 0.5)),
    ('sigmoid', 'sigmoid_bias', (0, -3)),
  ],
)
def test_options_of_a_weighting_reach_the_loss(weighting, key, values):
  losses = []
  for value in values:
    made = build(weighting=weighting, **{key: value})
    loss, _ = objective.loss(
      made,
      tiny_model.random_params(made),
      jax.random.key(0),
      np.full((4, 8, 8, 3), 90, np.uint8),
      jnp.zeros((4, 12, 16)),
      jnp.ones((4, 12), bool),
    )
    losses.append(np.asarray(loss))
  assert (losses[0] > losses[1]).any()


class Constant(Network):
  """A user's own network: one learned colour for all pixels."""

  scale: float = 1.0

  @nn.compact
  def __call__(
    self, z, logsnr, text, mask, low_res=None, aug_level=None, train=False
  ):
    colour = self.param('colour', nn.initializers.ones, (3,))
    return jnp.broadcast_to(self.scale * colour, z.shape)


def test_a_network_of_ones_own_is_named_by_its_module(monkeypatch):
  module = types.ModuleType('my_module')
  module.Constant = Constant
  monkeypatch.setitem(sys.modules, 'my_module', module)
  net = {'kind': 'my_module:Constant', 'scale': 0.5}
  made = build(net=net, prediction='x', sampling__guidance=1.0)
  params = stage.init_params(made, jax.random.key(0))
  images = sampling.sample(
    made,
    params,
    made.sampling.spec,
    sampling.SampleInputs(
      keys=jax.random.split(jax.random.key(0), 2),
      text=jnp.zeros((2, 12, 16)),
      mask=jnp.ones((2, 12), bool),
    ),
  )
  np.testing.assert_array_equal(images, np.full((2, 8, 8, 3), 0.5))
