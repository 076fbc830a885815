"""The planner: FLOPs and memory against XLA's, and its errors."""

import dataclasses
import functools
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from imagen_jax import sharding
from imagen_jax.cli import plan as cli
from imagen_jax.cli.configs import load_config
from imagen_jax.errors import UsageError
from imagen_jax.planning import analytic, compile, job
from imagen_jax.planning.memory import peak_and_traffic
from imagen_jax.training import chips
from imagen_jax.training.flops import count_flops
from imagen_jax.training.stage_experiment import StageExperiment
from tests import tiny_encoders, tiny_model


def tiny_config(name='base', *, unet=False, **train):
  config = tiny_model.config(name, **train)
  config.mesh.data = -1
  config.text.path = 't5-small'
  if unet:
    # One level: of the time, most is tracing.
    config.stage.net = tiny_model.UNET | {
      'channel_mults': (2,), 'attention_resolutions': (8,)
    }  # fmt: skip
  return config


@functools.cache
def tiny_job(name='base', *, batch_size=8, text='cached', **options):
  config = tiny_config(name, **options)
  return job.make_job(config, text=text, batch_size=batch_size)


def write_config(folder, **options):
  config = tiny_config(**options).to_dict()
  path = folder / 'tiny.py'
  path.write_text(
    'from ml_collections import ConfigDict\n'
    f'def get_config():\n  return ConfigDict({config!r})\n'
  )
  return path


@pytest.mark.parametrize(
  'name, parameters',
  [('bert-large', 334_092_288), ('clip-l', 123_060_480)],
)
def test_other_encoders_than_t5_are_planned_by_name(name, parameters):
  made = tiny_job(text=name)
  leaves = jax.tree.leaves(made.text_params)
  assert sum(leaf.size for leaf in leaves) == parameters
  assert name in made.text_name


def test_an_encoder_in_a_folder_is_planned_as_the_kind_that_it_is(tmp_path):
  tiny_encoders.write(tmp_path / 'text', 'bert')
  config = tiny_config()
  config.text.path = str(tmp_path / 'text')
  made = job.make_job(config)
  assert made.text_name.startswith('bert')
  assert made.stage.text_dim == tiny_encoders.SIZES['hidden_size']


def test_more_tokens_than_an_encoder_takes_are_not_planned():
  config = tiny_config()
  config.text.max_len = 78
  with pytest.raises(UsageError) as error:
    job.make_job(config, text='clip-b')
  assert error.value.key == 'config.text.max_len'


def xla_flops(fn, *args):
  return jax.jit(fn).lower(*args).cost_analysis()['flops']


@pytest.mark.parametrize('strides,side', [((1, 1), 8), ((2, 2), 9)])
def test_a_convolution_counts_the_taps_that_exist(strides, side):
  def fn(x, w):
    y = jax.lax.conv_general_dilated(
      x, w, strides, 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return jnp.sum(y**2)

  x = jax.ShapeDtypeStruct((2, side, side, 16), jnp.float32)
  w = jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)
  grad = jax.grad(fn, argnums=(0, 1))
  mine = count_flops(jax.make_jaxpr(grad)(x, w))
  assert mine == pytest.approx(xla_flops(grad, x, w), rel=0.02)


def test_a_loop_counts_its_length_and_a_matrix_product_two_per_term():
  def fn(x, w):
    return jax.lax.scan(lambda h, _: (h @ w, None), x, length=7)[0]

  x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))
  assert count_flops(jax.make_jaxpr(fn)(x, w)) == 7 * 2 * 4 * 8 * 8


@pytest.mark.parametrize('name', ['base', 'sr1'])
def test_flops_of_a_training_step_are_xlas(name):
  # Those of the other tests, which are traced already.
  options = {'unet': True, 'batch_size': 64} if name == 'base' else {}
  work = tiny_job(name, **options)
  if name == 'sr1':  # XLA counts a loop's body once, so loops are unrolled
    text = work.experiment.text
    on_cpu = StageExperiment(work.config, text=text, cached_text=True)
    unrolled = dataclasses.replace(work, experiment=on_cpu)
  else:
    unrolled = work
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  theirs = job.lower_train(unrolled, mesh).cost_analysis()['flops']
  mine = count_flops(work.trace('train', work.batch_size))
  assert mine == pytest.approx(theirs, rel=0.05)


def test_fused_values_take_no_memory_and_keep_what_they_are_made_of():
  def fn(x, w):
    h = x @ w  # stored: 4 kB
    a = jnp.tanh(h) * 2  # fused
    b = (a @ w).sum()  # stored beside h: 8 kB
    return b + (a @ w.T).sum()

  x = jnp.zeros((32, 32))
  peak = peak_and_traffic(jax.make_jaxpr(fn)(x, x))[0]
  assert peak == pytest.approx(2 * 4096, abs=16)


def test_a_conditional_takes_what_its_largest_branch_takes():
  def large(x):
    return jnp.sin(x @ x).sum() + (jnp.cos(x) @ x).sum()

  def either(x):
    return jax.lax.cond(x[0, 0] > 0, large, lambda x: x[0, 0], x)

  x = jnp.zeros((64, 64))
  one, two = (jax.make_jaxpr(fn)(x) for fn in (large, either))
  assert peak_and_traffic(two)[0] >= peak_and_traffic(one)[0] > 4 * 64**2


def test_rematerialization_needs_less_memory_and_more_flops():
  work = tiny_job(unet=True, batch_size=64)
  again = work.changed({'stage.net.remat': 'nothing_saveable'})
  plain, less = work.trace('train', 64), again.trace('train', 64)
  assert peak_and_traffic(less)[0] < peak_and_traffic(plain)[0]
  assert count_flops(less) > 1.03 * count_flops(plain)


def test_a_saved_value_that_a_product_reads_is_stored_once():
  """`jax.checkpoint` marks it by a reduce_precision, which XLA removes."""

  def mark(x):
    return jax.lax.reduce_precision(x, 8, 23)

  def fn(x, w, mark=lambda x: x):
    return (mark(x @ w) @ w).sum()

  x = jnp.zeros((64, 64))
  plain, marked = (
    peak_and_traffic(jax.make_jaxpr(functools.partial(fn, mark=m))(x, x))
    for m in (lambda x: x, mark)
  )
  assert marked == plain


@pytest.mark.parametrize('policy', ['convs_saveable', 'nothing_saveable'])
def test_of_the_policies_that_fit_the_one_that_repeats_least_is_advised(policy):
  def plan(name):
    other = work.changed({'stage.net.remat': name})
    return analytic.make_plan(other, chip, data=1, fsdp=1).total

  chip, config = chips.CHIPS['v5e'], tiny_config(unet=True)
  config.stage.resolution = 64
  # One image is no batch to accumulate.
  work = job.make_job(config, text='cached', batch_size=1)
  before = {'convs_saveable': None, 'nothing_saveable': 'convs_saveable'}
  room = (plan(policy) + plan(before[policy])) / 2
  small = dataclasses.replace(chip, memory=room / (1 - chips.RESERVED))
  change = f'--config.stage.net.remat={policy} --fsdp 1'
  assert analytic.cheapest_change(work, small, 1) == change


def test_a_step_is_planned_as_an_accelerator_computes_it():
  """A CPU multiplies the heads of a large attention one by one."""
  config = tiny_config(unet=True)
  config.stage.resolution = 16
  config.stage.net.attention_resolutions = (16,)
  work = job.make_job(config, text='cached', batch_size=8)
  assert 'scan[' not in str(work.trace('train', 8))


def test_parameters_are_split_by_the_rule_that_training_uses():
  work = tiny_job('sr1', batch_size=8)
  state = work.state
  mesh = sharding.make_mesh(2, 4)
  shardings = sharding.state_shardings(state, mesh)
  real = sum(
    jnp.dtype(x.dtype).itemsize
    * int(jnp.prod(jnp.asarray(s.shard_shape(x.shape))))
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings))
  )
  mine = analytic.tree_bytes(state, analytic.abstract_mesh(2, 4))
  assert mine == pytest.approx(real)


def test_accumulating_keeps_the_flops_and_lowers_the_memory():
  whole, parts = (
    tiny_job(unet=True, batch_size=64, accumulate=n) for n in (1, 2)
  )
  a, b = whole.trace('train', 64), parts.trace('train', 64)
  assert count_flops(b) == pytest.approx(count_flops(a), rel=0.05)
  assert peak_and_traffic(b)[0] < peak_and_traffic(a)[0]


def test_the_best_split_fits_and_is_the_fastest_that_does():
  work = tiny_job(batch_size=16)
  plans = analytic.splits(work, chips.CHIPS['v5e'], 4)
  assert [(p.data, p.fsdp) for p in plans] == [(4, 1), (2, 2), (1, 4)]
  chosen = analytic.best(plans, chips.CHIPS['v5e'])
  assert chosen.roofline <= 1.01 * min(p.roofline for p in plans)
  small = dataclasses.replace(chips.CHIPS['v5e'], memory=1000)
  assert analytic.best(plans, small) is None


def test_the_cheapest_change_that_makes_a_job_fit_is_accumulation():
  work, halves = (
    tiny_job(unet=True, batch_size=64, accumulate=n) for n in (1, 2)
  )
  whole, less = (
    analytic.make_plan(w, chips.CHIPS['v5e'], data=1, fsdp=1)
    for w in (work, halves)
  )
  middle = (whole.total + less.total) / 2 / (1 - chips.RESERVED)
  small = dataclasses.replace(chips.CHIPS['v5e'], memory=middle)
  analytic.require_fit(less, halves, small, 1)
  change = '--accumulate 2 --fsdp 1'
  assert analytic.cheapest_change(work, small, 1) == change
  with pytest.raises(UsageError):
    analytic.require_fit(whole, work, small, 1)


def test_a_smaller_batch_is_the_change_that_makes_sampling_fit():
  work, chip = tiny_job(batch_size=64), chips.CHIPS['v5e']
  need = analytic.make_plan(work, chip, data=1, fsdp=1, step='sample')
  small = dataclasses.replace(chip, memory=0.9 * need.total)
  change = analytic.cheapest_change(work, small, 1, step='sample')
  assert change == '--batch_size 32 --fsdp 1'


def test_collectives_count_their_results():
  text = """
  %a = bf16[4,8]{1,0} all-gather(bf16[2,8]{1,0} %p), dimensions={0}
  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(f32[2]{0} %q), dimensions={0}
  %c = f32[8]{0} all-gather-done((f32[2]{0}, f32[8]{0}) %b)
  %d = (f32[3]{0}, bf16[]) all-reduce(f32[3]{0} %r, bf16[] %s), to_apply=%sum
  """
  assert compile.collectives(text) == {
    'all-gather': (2, 64 + 32),
    'all-reduce': (1, 14),
  }


def test_the_plan_prints_memory_time_and_the_splits(tmp_path, capsys):
  args = ['--config', str(write_config(tmp_path)), '--chip', 'h100']
  assert cli.main([*args, '--devices', '4', '--text', 'xxl']) == 0
  out = capsys.readouterr().out
  for words in ('4,762,310,656', 'optimizer', '2 × 2', 'chip-hours'):
    assert words in out


def test_the_plan_prints_the_flops_without_rematerialization(tmp_path, capsys):
  config = str(write_config(tmp_path, unet=True))
  args = ['--config', config, '--devices', '1', '--text', 'cached']
  args += ['--batch_size', '64', '--config.stage.net.remat=nothing_saveable']
  assert cli.main(args) == 0
  lines = capsys.readouterr().out.splitlines()
  more, model = (float(x.split()[0]) for x in lines if 'FLOPs per step' in x)
  work = tiny_job(unet=True, batch_size=64)
  plain = count_flops(work.trace('train', 64))
  assert model == float(f'{plain:.4g}') and more > 1.03 * plain


def test_a_sampling_step_is_planned_too(tmp_path, capsys):
  args = ['--config', str(write_config(tmp_path)), '--step', 'sample']
  assert cli.main([*args, '--topology', 'v5e:2x2', '--text', 'cached']) == 0
  assert 'images/s' in capsys.readouterr().out


@pytest.mark.parametrize(
  'argv, key',
  [
    (['--chip', 'v9'], 'v9'),
    (['--topology', 'v9:2x2'], 'v9'),
    (['--topology', 'v5p:16x16'], 'v5p:16x16'),
    (['--topology', 'v5e:4xfour'], 'v5e:4xfour'),
    (['--topology', 'v5e:2x2', '--chip', 'v5e'], '--topology'),
    (['--topology', 'v5e:2x2', '--devices', '4'], '--topology'),
    (['--chip', 'v5e', '--devices', '0'], '--devices'),
    (['--topology', 'v5e:2x2', '--fsdp', '3'], '--fsdp 3'),
    (['--topology', 'v5e:2x2', '--data', '2', '--fsdp', '4'], '--fsdp 4'),
    (['--topology', 'v5e:2x2', '--data', '8'], '--data 8'),
    (['--topology', 'v5e:2x2', '--batch_size', '6'], 'batch_size=6'),
    (['--topology', 'v5e:2x2', '--text', 'huge'], '--text'),
    (['--topology', 'v5e:2x2', '--accumulate', '0'], '--accumulate'),
    (['--compile'], '--compile'),
    (['--config.text.path=my/words'], '--text'),
    (
      ['--config.stage.net.kind=unet', '--config.stage.net.remat=maybe'],
      '--config.stage.net.remat',
    ),
    (['--config', 'shapes_text'], "'text'"),
  ],
)
def test_a_mistake_in_planning_is_one_sentence(tmp_path, capsys, argv, key):
  config = str(write_config(tmp_path))
  assert cli.main(['--config', config, *argv]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert key in error


def test_compiling_needs_the_tpu_compiler(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(UsageError) as error:
    compile.topology_devices('v5e:2x2')
  assert error.value.key == 'compile'


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="the TPU compiler is not installed (pip install -e '.[plan]')",
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('step', ['train', 'sample'])
@pytest.mark.parametrize('name', ['base', 'sr1'])
def test_the_tpu_compiler_takes_the_steps(name, step):
  done = compile.compile_step(
    tiny_job(name, unet=name == 'base'),
    'v5e:2x2',
    fsdp=2,
    step=step,
    effort='low',
  )
  assert 0 < done.total < chips.CHIPS['v5e'].memory
  assert done.flops > 0
  # Parameters are split over fsdp, gradients summed over data.
  assert 'all-reduce' in done.collectives or step == 'sample'


@pytest.mark.slow
@needs_libtpu
def test_between_slices_only_gradients_are_summed():
  devices = compile.topology_devices('v5e:2x2', slices=2)
  mesh = sharding.make_mesh(-1, 2, devices=devices)
  for row in mesh.devices:  # each holds a copy of the parameters
    assert len({device.slice_index for device in row}) == 1
  with compile._effort('low'):
    text = job.lower_train(tiny_job('base'), mesh).compile().as_text()
  between = re.findall('MegascaleRendezvousKeyName="([a-z-]+)', text)
  assert set(between) == {'all-reduce'}


# 64→256 and 256→1024 with 128 and 256 channels.
SMALL = [
  'stage.net.channels=(128,256)',
  'stage.net.num_res_blocks=(2,2)',
  'stage.net.strides=(2,2)',
  'stage.net.text_attention=(False,True)',
]
WHOLE = ['stage.resolution=64', 'stage.low_resolution=16']
WHOLE += ['stage.net.self_attention=(False,True)']
CROPS = ['stage.resolution=128', 'stage.low_resolution=32', 'stage.crop=64']
CROPS += ['stage.net.self_attention=(False,False)']


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
  'name, changes, topology, batch_size',
  [
    ('imagen_sr256', [*SMALL, *WHOLE], 'v5e:2x2', 64),
    ('imagen_sr1024', [*SMALL, *CROPS], 'v5e:2x2', 64),
    ('imagen_sr256', [], 'v5e:16x16', 2048),
  ],
)
def test_memory_is_the_compilers_within_a_fifth(
  name, changes, topology, batch_size
):
  work = job.make_job(
    load_config(name, changes), text='cached', batch_size=batch_size
  )
  done = compile.compile_step(work, topology, fsdp=2, effort='low')
  chip, devices = chips.parse_topology(topology)
  plan = analytic.make_plan(work, chip, data=devices // 2, fsdp=2)
  assert abs(plan.total / done.total - 1) < 0.2


@pytest.mark.slow
@needs_libtpu
def test_a_slice_that_is_none_is_refused():
  with pytest.raises(UsageError):
    compile.topology_devices('v5e:3x5')


def test_a_program_that_cannot_be_read_has_no_list_of_collectives():
  class Unreadable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure')

  assert compile._listed(Unreadable()) is None
