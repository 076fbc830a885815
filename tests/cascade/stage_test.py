"""Building a stage from a config's `stage` section."""

import dataclasses
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import dtypes
from imagen_jax.cascade import (
  objective,
  sampling,
  settings,
  stage,
  stage_config,
)
from imagen_jax.errors import UsageError
from imagen_jax.nets.network import Network
from imagen_jax.nets.remat import POLICIES
from imagen_jax.training.flops import inner_jaxpr
from tests import tiny_model


def build(name='base', dtype='float32', **changes):
  config = tiny_model.config(name).stage.to_dict()
  for key, value in changes.items():
    section = config
    *path, last = key.split('__')
    for part in path:
      section = section[part]
    section[last] = value
  return stage_config.from_config(config, text_dim=16, text_len=12, dtype=dtype)


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
    {'schedule__shift_to': 8, 'schedule__resolution': 8},
    {
      'schedule__shift_to': 4,
      'schedule__shift_from': 8,
      'schedule__resolution': 8,
    },
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
    {'crop': 4},
    {'low_resolution': 2, 'crop': 6},
    {'net': tiny_model.UNET | {'channels': -5}, 'init': True},
    {'net': tiny_model.UNET | {'remat': 'maybe'}},
  ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(changes):
  init = changes.pop('init', False)
  with pytest.raises(UsageError):
    made = build(**changes)
    if init:
      stage.init_params(made, jax.random.key(0))


def test_an_unknown_remat_policy_is_refused_with_those_that_there_are():
  with pytest.raises(UsageError) as error:
    build(net=tiny_model.UNET | {'remat': 'save_only_these_names'})
  assert error.value.key == 'config.stage.net.remat'
  for policy in ('None', *POLICIES):
    assert policy in str(error.value)


@pytest.mark.parametrize('guidance', [float('nan'), float('inf'), -3.0])
def test_guidance_without_sense_is_refused(guidance):
  made = build()
  with pytest.raises(UsageError) as error:
    settings.choose([made], {'guidance': guidance})
  assert error.value.key == 'guidance'


@pytest.mark.parametrize(
  'interval, usable',
  [
    ((-9.0, 9.0), True),
    ((15.0, 15.0), False),  # the end of the last step, which no step reads
    ((-1.0, 1.0), True),  # two steps: at −15 and 0
    ((0.1, 14.9), False),  # between two steps
    ((-40.0, -14.9), True),
    ((-40.0, -15.1), False),
  ],
)
def test_an_interval_of_guidance_holds_a_step(interval, usable):
  choices = {'steps': 2, 'guidance': 3.0, 'guidance_interval': interval}
  if usable:
    settings.choose([build()], choices)
    return
  with pytest.raises(UsageError) as error:
    settings.choose([build()], choices)
  assert error.value.key == 'guidance_interval'


def test_an_interval_of_guidance_holds_a_step_of_those_from_an_image():
  """With strength 0.5 they begin in the middle, at a log-SNR of 0."""
  choices = {'steps': 2, 'guidance': 3.0, 'strength': 0.5}
  settings.choose([build()], choices | {'guidance_interval': (-0.1, 0.1)})
  with pytest.raises(UsageError, match='none of the 1 steps'):
    settings.choose([build()], choices | {'guidance_interval': (-16.0, -1.0)})


def test_sizes_are_multiples_of_all_downsampling():
  for levels in (2, 4):
    net = tiny_model.UNET | {'channel_mults': (1,) * levels}
    assert build(net=net).net.multiple == 2 ** (levels - 1)
  assert build('sr1').net.multiple == 4


def test_a_schedule_is_shifted_or_interpolated_by_the_config():
  t, shift = jnp.asarray([0.0, 1.0]), {'schedule__shift_from': 4}
  shift['schedule__resolution'] = 8
  plain = build().logsnr_fn(t)
  moved = build(**shift).logsnr_fn(t) - plain
  np.testing.assert_allclose(moved, [-2 * np.log(2)] * 2, rtol=1e-5)
  moved = build(**shift, schedule__shift_to=8).logsnr_fn(t) - plain
  np.testing.assert_allclose(moved, [0, -2 * np.log(2)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['base', 'sr1'])
def test_float32_is_multiplied_in_float32(name, dtype):
  """With bfloat16 activations only the first convolution is."""
  changes = {} if name == 'sr1' else {'net': dict(tiny_model.UNET)}
  made = build(name, dtype=dtype, **changes)
  shapes = stage.param_shapes(made)
  z, level = jnp.zeros((1, made.resolution, made.resolution, 3)), jnp.zeros(1)
  extra = () if name == 'base' else (z, level)
  text, mask = jnp.zeros((1, 12, 16)), jnp.ones((1, 12), bool)
  jaxpr = jax.make_jaxpr(
    lambda params: stage.apply(made.net, params, z, level, text, mask, *extra)
  )(shapes)
  products = list(_products(jaxpr.jaxpr))
  first = [eqn for eqn in products if eqn.invars[0].aval.shape[-1] in (3, 6)]
  if dtype == 'bfloat16':  # norms multiply exactly in any case
    products = [eqn for eqn in products if 'conv' in eqn.primitive.name]
  exact = [eqn for eqn in products if 'HIGHEST' in str(eqn.params['precision'])]
  assert len(products) > 5 and len(first) == 1
  assert first[0].invars[0].aval.dtype == jnp.float32
  wanted = products if dtype == 'float32' else first
  assert list(map(id, exact)) == list(map(id, wanted))


def _products(jaxpr):
  """The matrix products and convolutions of a program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
      yield eqn
    if (inner := inner_jaxpr(eqn)) is not None:
      yield from _products(inner)


def test_the_users_choice_of_precision_takes_precedence():
  with jax.default_matmul_precision('bfloat16'):
    with dtypes.matmul_precision(jnp.float32):
      assert jax.config.jax_default_matmul_precision == 'bfloat16'
  with dtypes.matmul_precision(jnp.float32):
    assert jax.config.jax_default_matmul_precision == 'highest'


def test_the_spec_holds_what_is_compiled_and_the_scalars_the_rest():
  config = build('sr1', sampling__guidance=3.0).sampling
  names = {field.name for field in dataclasses.fields(config)}
  assert vars(config.spec).keys() | config.scalars.keys() == names
  assert hash(config.spec) == hash(dataclasses.replace(config.spec))
  assert config.scalars == {
    'guidance': 3.0,
    'autoguidance': None,
    'aug_level': np.float32(0.1),
  }
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
