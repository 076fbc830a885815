"""The layout of training on a CPU: when it is measured, chosen and kept."""

import copy

import flax.linen as nn
import jax
import numpy as np
import pytest

from imagen_jax import compiler, sharding
from imagen_jax.errors import UsageError
from imagen_jax.training import cpu_layout
from imagen_jax.training.cpu_layout import CORES, LAYOUTS, settle
from imagen_jax.training.flops import count_flops
from tests import tiny_model
from tests.tiny_net import TinyNet


@pytest.fixture
def config(monkeypatch):
  for name in ('JAX_NUM_CPU_DEVICES', 'XLA_FLAGS'):
    monkeypatch.delenv(name, raising=False)
  made = tiny_model.config('base')
  made.mesh.update(data=-1, cpu='auto')
  made.train.update(num_steps=cpu_layout.LEAST_STEPS, batch_size=8)
  return made


@pytest.fixture
def seconds(monkeypatch):
  """{layout: seconds}, which are measured instead of the real ones."""
  found = dict.fromkeys(LAYOUTS, 1.0)

  def time(shape, layout, mesh):
    assert mesh.size == (1 if layout.devices == 1 else len(jax.devices()))
    name = next(name for name, one in LAYOUTS.items() if one is layout)
    if found[name] is None:
      raise jax.errors.JaxRuntimeError('No such compile option')
    return found[name]

  monkeypatch.setattr(cpu_layout, '_time', time)
  return found


@pytest.mark.parametrize('fastest', LAYOUTS)
def test_the_fastest_is_chosen_and_said(config, seconds, fastest):
  seconds.update(dict.fromkeys(LAYOUTS, 2.0) | {fastest: 1.0})
  said = settle(config, None)
  assert config.mesh.cpu == fastest
  assert config.mesh.data == LAYOUTS[fastest].devices
  assert f'--config.mesh.cpu={fastest}' in said
  assert LAYOUTS[fastest].words in said


class Odd(TinyNet):
  """Also with a depthwise convolution and one of sequences."""

  @nn.compact
  def __call__(self, z, logsnr, text, *args, **kwargs):
    h = nn.Conv(3, (3, 3), feature_group_count=3)(z)
    h = h + nn.Conv(3, (3,))(text).mean((1, 2))[:, None, None, None]
    return TinyNet()(h, logsnr, text, *args, **kwargs)


def test_convolutions_of_other_kinds_are_not_measured(config):
  def heaviest(kind):
    config.stage.net = {'kind': kind}
    return cpu_layout._heaviest(config)

  plain = heaviest('tests.tiny_net:TinyNet')
  assert len(plain) == 2
  assert heaviest(f'{__name__}:Odd') == plain


def test_a_resumed_run_does_without_an_option_that_jax_does_not_know(
  config, monkeypatch, capsys
):
  monkeypatch.setattr(compiler, '_knows', lambda device, options: not options)
  compiler._known.cache_clear()
  config.mesh.cpu = 'cores_eigen'
  mesh = sharding.make_mesh(devices=jax.devices())
  assert cpu_layout.compiler_options(config, mesh) == {}
  compiler._known.cache_clear()
  assert 'options it does not know: xla_cpu' in capsys.readouterr().out


def test_a_small_gain_is_chance(config, seconds):
  seconds['one'] = 0.97
  assert settle(config, None) and config.mesh.cpu == CORES


def test_an_option_that_this_jax_does_not_know(config, seconds):
  seconds.update({name: None for name in LAYOUTS if LAYOUTS[name].options})
  seconds['one'] = 0.5
  assert settle(config, None) and config.mesh.cpu == 'one'


@pytest.mark.parametrize(
  'change', ['short', 'mesh', 'devices', 'flags', 'dry_run', 'kind']
)
def test_when_nothing_is_measured(config, seconds, monkeypatch, change):
  seconds['one'] = 0.1
  if change == 'short':
    config.train.num_steps -= 1
  if change == 'mesh':
    config.mesh.data = 2
  if change == 'devices':
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '2')
  if change == 'flags':
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=false')
  if change == 'kind':
    config.kind = 'text'
  mesh = config.mesh.data
  assert settle(config, None, measure=change != 'dry_run') is None
  assert (config.mesh.cpu, config.mesh.data) == (CORES, mesh)


def test_a_resumed_run_keeps_its_layout(config, seconds):
  seconds['one_eigen'] = 0.1
  stored = copy.deepcopy(config).to_dict()
  for before in ('one', CORES):
    resumed = copy.deepcopy(config)
    stored['mesh']['cpu'] = before
    assert settle(resumed, stored) is None
    assert resumed.mesh.cpu == before
    assert resumed.mesh.data == LAYOUTS[before].devices
  del stored['mesh']['cpu']  # of a run from before there were layouts
  assert settle(config, stored) is None
  assert config.mesh.cpu == CORES


def test_several_processes_use_all_devices(config, seconds, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  resumed = copy.deepcopy(config)
  assert settle(config, None) is None and config.mesh.cpu == CORES
  assert settle(resumed, {'mesh': {'cpu': 'one'}}) is None
  assert resumed.mesh.data == -1


def test_a_given_layout_is_taken(config, seconds):
  config.mesh.cpu = 'one'
  assert settle(config, None) is None
  assert (config.mesh.cpu, config.mesh.data) == ('one', 1)
  config.mesh.cpu = 'two'
  with pytest.raises(UsageError, match='one_eigen'):
    settle(config, None)


@pytest.mark.parametrize('sizes', [(2, 1), (1, 2), (-1, 2)])
def test_one_device_and_a_larger_mesh(config, seconds, sizes):
  config.mesh.update(data=sizes[0], fsdp=sizes[1], cpu='one_eigen')
  resumed = copy.deepcopy(config)
  with pytest.raises(UsageError, match='one_eigen is one device'):
    settle(config, None)
  resumed.mesh.cpu = 'auto'  # the run began on one device
  settle(resumed, {'mesh': {'cpu': 'one_eigen'}})
  assert resumed.mesh.cpu == 'cores_eigen'
  assert (resumed.mesh.data, resumed.mesh.fsdp) == sizes


def flops(shape):
  """FLOPs of a convolution without padding on as many outputs."""
  image, kernel, strides, dtype = shape
  sides = [
    (side // step - 1) * step + taps
    for side, step, taps in zip(image[1:3], strides, kernel[:2])
  ]
  traced = jax.make_jaxpr(
    lambda x, w: jax.lax.conv_general_dilated(
      x, w, strides, 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
  )(np.zeros((image[0], *sides, image[3]), dtype), np.zeros(kernel, dtype))
  return count_flops(traced.jaxpr)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('channels', [4, 12])
def test_the_flops_of_a_convolution(stride, channels):
  shape = (8, 16, 16, channels), (3, 3, channels, 6), (stride, stride), 'f4'
  assert cpu_layout._flops(shape) == flops(shape)


def test_measuring(config):
  """The heaviest convolutions of the real network, with the real compiler."""
  shapes = cpu_layout._heaviest(config)
  work = [n * flops(shape) for shape, n in shapes]
  assert work == sorted(work, reverse=True) and len(work) > 1
  assert all(image[0] == 8 and len(image) == 4 for (image, *_), _ in shapes)
  said = settle(config, None)
  assert config.mesh.cpu in LAYOUTS and 'measured' in said


def test_few_rows_of_a_heavy_convolution(monkeypatch):
  monkeypatch.setattr(cpu_layout, 'MOST_FLOPS', 1.0)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:2]).reshape(2, 1), ('data', 'fsdp')
  )
  shape = ((4096, 8, 8, 4), (3, 3, 4, 4), (1, 1), np.dtype('float32'))
  assert 0 < cpu_layout._time(shape, LAYOUTS[CORES], mesh) < 60
