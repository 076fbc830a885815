"""Fine-tuning of DeepFloyd IF: its loss, its adapters, and whole runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import export
from imagen_jax.cli.configs import load_config
from imagen_jax.deepfloyd import lora, loss, pipeline, schedule, weights
from imagen_jax.deepfloyd.blocks import AddedKVAttention
from imagen_jax.errors import UsageError
from imagen_jax.nets.dense import Dense
from imagen_jax.training import loop
from tests import tiny_if

IF = schedule.Schedule(
  beta_schedule='squaredcos_cap_v2', variance_type='learned_range'
)
PLAN = loss.training_plan(IF)


def images(batch=512):
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (batch, 4, 4, 3)) / 127.5 - 1
  return jnp.asarray(x, jnp.float32)


def knowing(x, *, miss=0.0, fraction=0.0):
  """An oracle: the true noise plus `miss`, and a given variance."""

  def predict(z, t):
    row = jax.tree.map(lambda c: jnp.asarray(c)[t][:, None, None, None], PLAN)
    eps = (z - row.alpha * x) / row.sigma + miss
    return jnp.concatenate([eps, jnp.full_like(eps, 2 * fraction - 1)], axis=-1)

  return predict


@functools.partial(jax.jit, static_argnames=('weight', 'channels'))
def losses(
  key, x, *, miss=0.0, fraction=0.0, weight=loss.WEIGHT, channels=None
):
  """The loss of `knowing`, of its first channels only if they are given."""
  oracle = knowing(x, miss=miss, fraction=fraction)
  predict = lambda z, t: oracle(z, t)[..., :channels]
  return loss.hybrid_loss(key, predict, x, PLAN, weight=weight)


def test_the_plan_goes_from_each_step_to_the_one_before():
  abar = schedule.alphas_cumprod(IF)
  assert PLAN.t.tolist() == list(range(1000))
  np.testing.assert_allclose(PLAN.alpha, np.sqrt(abar), rtol=1e-6)
  beta = 1 - abar[700] / abar[699]
  assert np.exp(PLAN.log_high[700]) == pytest.approx(beta, rel=1e-5)
  assert PLAN.log_low[0] == PLAN.log_low[1]


def test_knowing_the_image_and_the_lower_variance_costs_nothing():
  x = images()
  values, details = losses(jax.random.key(0), x)
  later = np.asarray(details['t'] > 0)
  # 1 / alpha magnifies rounding errors of eps at high noise levels.
  early = later & np.asarray(details['t'] < 0.9)
  np.testing.assert_allclose(details['bound'][early], 0, atol=0.05)
  np.testing.assert_allclose(details['mse'][early], 0, atol=1e-6)
  np.testing.assert_allclose(
    values, details['mse'] + 0.001 * details['bound'], rtol=1e-6
  )


def test_bound_is_the_divergence_of_two_gaussians():
  x, fraction, miss = images(64), 0.7, 0.2
  _, details = losses(jax.random.key(1), x, miss=miss, fraction=fraction)
  t = np.rint(np.asarray(details['t']) * 1000).astype(int)
  row = schedule.Plan(*(np.float64(c)[t] for c in PLAN))
  low, high = np.exp(row.log_low), np.exp(row.log_high)
  variance = low ** (1 - fraction) * high**fraction
  off = row.x * row.sigma / row.alpha * miss
  exact = 0.5 * (np.log(variance / low) + (low + off**2) / variance - 1)
  later = t > 0
  np.testing.assert_allclose(
    details['bound'][later], (1000 / np.log(2) * exact)[later], rtol=1e-2
  )
  np.testing.assert_allclose(details['mse'], miss**2, rtol=1e-2)


def test_bound_teaches_the_variance_and_not_the_noise():
  x = images(8)

  def bound(miss, fraction):
    key = jax.random.key(2)
    _, details = losses(key, x, miss=miss, fraction=fraction)
    return jnp.mean(details['bound'])

  of_miss, of_share = jax.jit(jax.grad(bound, (0, 1)))(0.2, 0.5)
  assert of_miss == 0 and abs(of_share) > 0


def test_without_a_variance_only_the_noise_counts():
  x = images(8)
  values, details = losses(jax.random.key(3), x, miss=0.3, channels=3)
  np.testing.assert_allclose(values, details['mse'])
  same, _ = losses(jax.random.key(3), x, miss=0.3, weight=0)
  np.testing.assert_allclose(values, same)


def test_grey_levels_share_all_the_mass():
  levels = jnp.arange(256) / 127.5 - 1
  for mean, log_variance in ((0.1, -3.0), (-0.98, -6.0), (1.2, -8.0)):
    mass = jnp.exp(loss.log_likelihood(levels, mean, log_variance))
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)


def test_adapters_start_as_nothing_and_touch_attentions_only():
  _, params = tiny_if.network('fast_1')
  adapters = lora.init(jax.random.key(0), params, 2)
  modules = {path.split('.')[-2] for path in adapters}
  assert modules == set(lora.TARGETS)
  jax.tree.map(
    np.testing.assert_array_equal, lora.merge(params, adapters), params
  )
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  merged = lora.merge(params, adapters, scale=3.0)
  name = 'mid_block.attentions_0.to_q.kernel'
  a, b = adapters[name]['a'], adapters[name]['b']
  old = params['mid_block']['attentions_0']['to_q']['kernel']
  new = merged['mid_block']['attentions_0']['to_q']['kernel']
  np.testing.assert_allclose(new, old + 1.5 * (a @ b), rtol=1e-5, atol=1e-6)
  changed = [
    '.'.join(path)
    for (path, old), (_, new) in zip(
      weights.leaves(params).items(), weights.leaves(merged).items()
    )
    if not np.array_equal(old, new)
  ]
  assert sorted(changed) == sorted(adapters)


def test_a_small_change_of_bfloat16_weights_reaches_the_output():
  """On average over inputs; merged into W, nearly nothing of it does.

  The rounding of a single output is larger than the change, but has no bias.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  w = (normal(64, 256) / 8).astype(jnp.bfloat16).astype(jnp.float32)
  base = {'kernel': w, 'bias': jnp.zeros(256)}
  adapters = {'kernel': {'a': normal(64, 16) / 8, 'b': 1e-4 * normal(16, 256)}}
  x = (1 + normal(2**16, 64)).astype(jnp.bfloat16).astype(jnp.float32)

  def change(params, dtype):
    y = jax.jit(Dense(256, dtype=dtype).apply)
    new, old = (y({'params': p}, x).astype('float32') for p in (params, base))
    return np.mean(new - old, axis=0)

  exact = change(lora.merge(base, adapters), jnp.float32)
  adapted = change(lora.insert(base, adapters), jnp.bfloat16)
  merged = change(lora.merge(base, adapters), jnp.bfloat16)
  assert np.corrcoef(exact, adapted)[0, 1] > 0.99
  assert np.corrcoef(exact, merged)[0, 1] < 0.5


def test_adapted_layers_compute_what_merged_ones_do():
  """In float32, with the same gradients of A and B."""
  module, params = tiny_if.network('fast_1')
  layer = AddedKVAttention(module.config, 8, False, jnp.float32)
  params = params['mid_block']['attentions_0']
  adapters = lora.init(jax.random.key(0), params, 2)
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape), adapters
  )
  x = jnp.asarray(rng.normal(size=(2, 4, 4, 64)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)

  def gradient(join):
    def loss(adapters):
      joined = join(params, adapters, scale=3.0)
      out = layer.apply({'params': joined}, x, text)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))(adapters)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    gradient(lora.insert),
    gradient(lora.merge),
  )


def settings(folder, stage, data, **changes):
  config = load_config('if_finetune')
  with config.unlocked(), config.ignore_type():
    config.model = str(folder / stage)
    config.text.path = str(folder / 'IF-I-S-v1.0')
    config.text.dtype = config.dtype = 'float32'
    config.data.path = str(data)
    config.rank = 2
    config.train.update(num_steps=4, batch_size=8, log_every=2, eval_every=4)
    config.train.update(checkpoint_every=2, sample_every=4)
    config.train.optimizer.update(warmup=1, learning_rate=1e-3)
    config.update(changes)
  return config


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  rng = np.random.default_rng(0)
  for i in range(8):
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'a {"red" if i % 2 else "blue"} star')
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_if.write(tmp_path_factory.mktemp('IF'))


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_exported(
  folder, data, tmp_path, capsys
):
  config = settings(folder, 'IF-I-S-v1.0', data)
  stopped = loop.train(
    config, tmp_path / 'a', should_stop=lambda step: step == 2
  )
  assert stopped == 2 and not (tmp_path / 'a' / 'export').exists()
  assert loop.train(config, tmp_path / 'a') == 4
  assert loop.train(config, tmp_path / 'b') == 4
  file = f'export/IF-I-S-v1.0/unet/{weights.STEM}.safetensors'
  a, b = ((tmp_path / x / file).read_bytes() for x in 'ab')
  assert a == b
  argv = ['--workdir', str(tmp_path / 'a'), '--out', str(tmp_path / 'mine')]
  assert export.main(argv) == 0
  mine = tmp_path / 'mine' / 'unet' / f'{weights.STEM}.safetensors'
  assert mine.read_bytes() == (tmp_path / 'a' / file).read_bytes()
  assert export.main(argv) == 2 and 'exists' in capsys.readouterr().err
  assert (tmp_path / 'a' / 'samples' / 'step_0000004.png').exists()
  _, before = weights.load(folder / 'IF-I-S-v1.0' / 'unet')
  _, after = weights.load(tmp_path / 'a' / 'export' / 'IF-I-S-v1.0' / 'unet')
  moved = {
    path[-2]
    for (path, old), (_, new) in zip(
      weights.leaves(before).items(), weights.leaves(after).items()
    )
    if not np.array_equal(old, new)
  }
  assert moved == set(lora.TARGETS)
  lines = (tmp_path / 'a' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [2, 4]


@pytest.mark.slow
def test_a_second_stage_is_trained_whole_without_its_variance(
  folder, data, tmp_path
):
  config = settings(
    folder, 'IF-II-S-v1.0', data, method='full', variance='drop'
  )
  config.train.update(num_steps=2, batch_size=16, accumulate=2)
  assert loop.train(config, tmp_path / 'a') == 2
  model = pipeline.load(
    tmp_path / 'a' / 'export' / 'IF-II-S-v1.0', dtype='float32'
  )
  assert model.stages[0].config.out_channels == 3
  assert model.stages[0].schedule.variance_type == 'fixed_small'


@pytest.mark.parametrize('key', ['method', 'variance'])
def test_a_choice_that_is_unknown_is_refused(folder, data, tmp_path, key):
  config = settings(folder, 'IF-I-S-v1.0', data, **{key: 'dora'})
  with pytest.raises(UsageError) as caught:
    loop.train(config, tmp_path)
  assert caught.value.key == f'config.{key}'


def test_the_model_must_be_given(folder, data, tmp_path):
  config = settings(folder, 'IF-I-S-v1.0', data)
  config.model = ''
  with pytest.raises(UsageError) as caught:
    loop.train(config, tmp_path)
  assert caught.value.key == 'config.model'


def test_a_run_of_our_own_is_no_start(folder, data, model, tmp_path):
  config = settings(folder, 'IF-I-S-v1.0', data)
  with pytest.raises(UsageError) as caught:
    loop.train(config, tmp_path, init_from=model / 'base')
  assert caught.value.key == 'init_from'


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
  folder, data, tmp_path, capsys
):
  config = settings(folder, 'IF-I-S-v1.0', data)
  assert loop.train(config, tmp_path / 'w', dry_run=True) == 0
  said = capsys.readouterr().out
  assert 'IF-I-S-v1.0' in said and 'frozen weights' in said
  assert not (tmp_path / 'w').exists()
