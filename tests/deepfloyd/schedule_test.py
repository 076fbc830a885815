"""IF's schedules: steps, respacings, and published constants of the samplers.

The constants are those of diffusers' own scheduler tests, whose sample is a
ramp and whose model is x · t / (t + 1).
"""

import functools
import hashlib
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.deepfloyd import sampling, schedule
from imagen_jax.diffusion import process
from imagen_jax.errors import ModelError, UsageError

IF = schedule.Schedule(
  beta_schedule='squaredcos_cap_v2',
  variance_type='learned_range',
  thresholding=True,
  dynamic_thresholding_ratio=0.95,
  sample_max_value=1.5,
)
LINEAR = schedule.Schedule(clip_sample=False)


def test_fast27_is_ifs_list():
  assert schedule.respaced('fast27').tolist() == [
    *(999, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266),
    *(244, 222, 200, 199, 177, 155, 133, 111, 88, 66, 44, 22, 0),
  ]


# sha256 of the comma-separated numbers of diffusers' lists, first 16 digits.
DIGESTS = {
  'fast27': '036782d83e790f6e',
  'smart27': 'e6fe59f611be8a8d',
  'smart50': 'b19c5b1a07c0429a',
  'smart100': '4f6492e6644fd8fa',
  'smart185': '4a2cef7e71b249b2',
  'super27': 'a08094a54b66d462',
  'super40': '0ae7966bc738a053',
  'super100': 'b21e746348a2d781',
}


@pytest.mark.parametrize('name', schedule.RESPACINGS)
def test_respacings_are_ifs_lists(name):
  steps = schedule.respaced(name)
  text = ','.join(map(str, steps))
  assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]
  assert schedule.timesteps(IF, name).tolist() == steps.tolist()


def test_a_section_of_none_starts_later():
  steps = schedule.respaced('20,20,20,20,10,0,0,0,0,0')
  assert len(steps) == 90 and steps[0] == 499 and steps[-1] == 0


def test_steps_are_spaced_as_the_config_says():
  spaced = lambda kind: schedule.timesteps(
    schedule.Schedule(timestep_spacing=kind), 4
  ).tolist()
  assert spaced('leading') == [750, 500, 250, 0]
  assert spaced('trailing') == [999, 749, 499, 249]
  assert spaced('linspace') == [999, 666, 333, 0]
  assert schedule.timesteps(IF, 100)[0] == 990
  for kind in ('leading', 'trailing', 'linspace'):
    made = schedule.Schedule(timestep_spacing=kind)
    for n in range(1, 1001):
      steps = schedule.timesteps(made, n)
      assert len(steps) == n and steps.min() >= 0 and steps.max() <= 999
  assert schedule.timesteps(IF, 25, 'dpmpp')[0] == 995


@pytest.mark.parametrize(
  'spec', ['fast28', '1,x', '2000', '501,1', '0,0', 0, 1001]
)
def test_impossible_steps_are_refused(spec):
  with pytest.raises(UsageError) as caught:
    schedule.timesteps(IF, spec)
  assert caught.value.key == 'steps'


def test_the_linear_schedule_has_diffusers_variances():
  plan = schedule.plan(LINEAR, np.arange(1000)[::-1])
  small = np.exp(plan.log_low[::-1].astype(np.float64))
  assert small[0] == pytest.approx(0, abs=1e-5)
  assert small[487] == pytest.approx(0.00979, abs=1e-5)
  assert small[999] == pytest.approx(0.02, abs=1e-5)


@pytest.mark.parametrize(
  't, log_variance', [(1, -10.171365), (487, -5.7998054), (999, -0.0010011)]
)
def test_learned_variance_lies_between_the_two(t, log_variance):
  plan = schedule.plan(IF, np.arange(1000)[::-1])
  row = 999 - t
  low, high = plan.log_low[row], plan.log_high[row]
  fraction = (0.5 + 1) / 2  # of a network that outputs 0.5
  assert low + fraction * (high - low) == pytest.approx(log_variance, abs=2e-6)


@pytest.mark.parametrize('t, std', [(487, 0.0549625), (999, 0.9994987)])
def test_ifs_schedule_has_diffusers_small_variance(t, std):
  plan = schedule.plan(IF, np.arange(1000)[::-1])
  assert math.exp(plan.log_low[999 - t] / 2) == pytest.approx(std, abs=1e-6)


def run(plan, made):
  """The run of diffusers' scheduler tests: (sum, mean) of absolute values."""
  count = 4 * 3 * 8 * 8
  z = jnp.arange(count, dtype=jnp.float32).reshape(3, 8, 8, 4) / count
  z = jnp.moveaxis(z, 3, 0)
  predict = lambda z, t: (z * t / (t + 1), None)
  z = jnp.moveaxis(z, 1, 3)
  out = sampling.sample(predict, plan, z, lambda i: jnp.zeros_like(z), made)
  return float(jnp.sum(jnp.abs(out))), float(jnp.mean(jnp.abs(out)))


@pytest.mark.parametrize(
  'beta_start, end, expected',
  [
    (0.0001, None, (172.0067, 0.223967)),
    (0.01, None, (149.8295, 0.1951)),
    (0.01, 0, (149.0784, 0.1941)),
  ],
)
def test_ddim_gives_diffusers_numbers(beta_start, end, expected):
  made = schedule.Schedule(beta_start=beta_start)
  end = 1 if end is None else schedule.alphas_cumprod(made)[end]
  steps = schedule.timesteps(made, 10)
  plan = schedule.plan(made, steps, 'ddim', end=end)
  total, mean = run(plan, made)
  assert total == pytest.approx(expected[0], abs=1e-2)
  assert mean == pytest.approx(expected[1], abs=1e-3)


@pytest.mark.parametrize(
  'fields, mean',
  [
    ({}, 0.3301),
    (
      {
        'thresholding': True,
        'dynamic_thresholding_ratio': 0.87,
        'sample_max_value': 0.5,
      },
      1.1364,
    ),
  ],
)
def test_dpmpp_gives_diffusers_numbers(fields, mean):
  made = schedule.Schedule(
    clip_sample=False, lambda_min_clipped=-math.inf, **fields
  )
  steps = schedule.timesteps(made, 10, 'dpmpp')
  plan = schedule.plan(
    made, steps, 'dpmpp', end=schedule.alphas_cumprod(made)[0]
  )
  assert run(plan, made)[1] == pytest.approx(mean, abs=1e-3)


def test_ddpm_is_the_posterior_with_a_learned_exponent():
  plan = schedule.plan(IF, [731, 412, 90])
  abar = schedule.alphas_cumprod(IF)
  logsnr = np.log(abar / (1 - abar))
  rng = np.random.default_rng(0)
  z, x = (rng.normal(size=(2, 4, 4, 3)).astype(np.float32) for _ in range(2))
  gamma = rng.uniform(size=z.shape).astype(np.float32)
  mean, variance = process.posterior(
    z,
    x,
    logsnr_t=np.float32(logsnr[731]),
    logsnr_s=np.float32(logsnr[412]),
    gamma=gamma,
  )
  np.testing.assert_allclose(plan.z[0] * z + plan.x[0] * x, mean, atol=2e-6)
  low, high = plan.log_low[0], plan.log_high[0]
  np.testing.assert_allclose(
    np.exp(low + gamma * (high - low)), variance, rtol=1e-5
  )


def test_dpmpp_ends_with_the_predicted_image():
  for sampler in schedule.SAMPLERS:
    plan = schedule.plan(IF, schedule.timesteps(IF, 5, sampler), sampler)
    assert (plan.z[-1], plan.x[-1], plan.slope[-1]) == (0, 1, 0)
    assert plan.noise[-1] == 0


def test_dynamic_threshold_is_a_quantile_with_a_cap():
  rng = np.random.default_rng(0)
  scale = np.array([0.3, 1.0, 5.0])[:, None, None, None]
  x = (rng.normal(size=(3, 8, 8, 3)) * scale).astype(np.float32)
  s = np.quantile(np.abs(x).reshape(3, -1), 0.95, axis=1)
  assert s[0] < 1 < s[1] < 2.5 < s[2]
  made = schedule.Schedule(
    thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=2.5
  )
  s = np.clip(s, 1, 2.5)[:, None, None, None]
  expected = np.clip(x, -s, s) / s
  np.testing.assert_allclose(
    sampling.threshold(jnp.asarray(x), made), expected, atol=1e-6
  )


def test_guidance_and_mixing_weigh_the_branches():
  class Net(nn.Module):
    def apply(self, variables, sample, t, text, level, pooled):
      value = text[:, :1, :1, None] * jnp.ones_like(sample)
      return jnp.concatenate([value, value], axis=-1)

  text = [jnp.full((2, 4, 1), value) for value in (3.0, 5.0, 1.0)]
  predict = sampling.predictor(
    Net(),
    {},
    sampling.Texts(
      text[0], uncond=text[2], guidance=7.0, mixed=text[1], mixer=0.25
    ),
  )
  eps, v = predict(jnp.zeros((2, 8, 8, 3)), jnp.asarray(5.0))
  np.testing.assert_allclose(eps, 1 + 7 * (3 * 0.75 + 5 * 0.25 - 1))
  np.testing.assert_allclose(v, 3.0)  # of the conditional half, unguided
  alone = sampling.predictor(Net(), {}, sampling.Texts(text[0]))
  np.testing.assert_allclose(
    alone(jnp.zeros((2, 8, 8, 3)), jnp.asarray(5.0))[0], 3.0
  )


def test_a_mask_keeps_pixels_to_the_bit():
  plan = schedule.plan(IF, schedule.timesteps(IF, 6))
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
  mask = jnp.zeros((2, 8, 8, 1)).at[:, 2:6, 3:].set(1)
  noise = lambda i: jax.random.normal(
    jax.random.fold_in(jax.random.key(0), i), image.shape
  )
  z = sampling.add_noise(image, noise(99), plan, mask)
  predict = lambda z, t: (0.5 * z, jnp.zeros_like(z))
  out = sampling.sample(predict, plan, z, noise, IF, mask=mask)
  kept = np.broadcast_to(mask == 0, image.shape)
  np.testing.assert_array_equal(out[kept], image[kept])
  assert np.abs(out - image)[~kept].min() > 1e-4


def test_the_last_step_adds_no_noise_however_large_the_variance():
  plan = schedule.plan(IF, schedule.timesteps(IF, 1))
  z = jnp.full((1, 8, 8, 3), 0.5)
  huge = jnp.full_like(z, 30.0)  # exp of its log variance overflows
  out = sampling.sample(
    lambda z, t: (jnp.zeros_like(z), huge), plan, z, lambda i: z, IF
  )
  np.testing.assert_allclose(out, z / plan.alpha[0], rtol=1e-6)


def test_strength_keeps_the_last_steps():
  steps = schedule.timesteps(IF, 10)
  assert schedule.later(steps, 0.7).tolist() == [
    600,
    500,
    400,
    300,
    200,
    100,
    0,
  ]
  assert schedule.later(steps, 1.0).tolist() == steps.tolist()
  for strength in (0.0, 0.05, 1.1):
    with pytest.raises(UsageError) as caught:
      schedule.later(steps, strength)
    assert caught.value.key == 'strength'


def test_config_files_are_read(tmp_path):
  (tmp_path / 'scheduler').mkdir()
  path = tmp_path / 'scheduler' / 'scheduler_config.json'
  raw = {
    '_class_name': 'DDPMScheduler',
    'beta_schedule': 'squaredcos_cap_v2',
    'variance_type': 'learned_range',
    'thresholding': True,
    'dynamic_thresholding_ratio': 0.95,
    'sample_max_value': 1.5,
    'trained_betas': None,
  }
  path.write_text(json.dumps(raw))
  assert schedule.read(tmp_path) == IF
  for key, value in [
    ('prediction_type', 'v_prediction'),
    ('beta_schedule', 'scaled_linear'),
    ('variance_type', 'learned'),
  ]:
    path.write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ModelError) as caught:
      schedule.read(tmp_path)
    assert key in str(caught.value) and value in str(caught.value)
  for key, value in [
    ('num_train_timesteps', '1000'),
    ('num_train_timesteps', 0),
    ('num_train_timesteps', 10.5),
    ('beta_start', None),
    ('thresholding', 1),
    ('beta_schedule', ['linear']),
    ('clip_sample_range', float('nan')),
  ]:
    path.write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ModelError, match=key):
      schedule.read(tmp_path)
  path.write_text(json.dumps(raw | {'sample_max_value': 1}))
  assert schedule.read(tmp_path).sample_max_value == 1


def test_a_prediction_of_infinity_is_no_colour_and_its_step_is_known():
  plan = schedule.plan(IF, np.array([900, 600, 300, 0]))
  z = jnp.zeros((1, 2, 2, 3))
  predict = lambda z, t: (jnp.where(t > 300, z, jnp.inf), None)
  run = functools.partial(
    sampling.sample, predict, plan, z, lambda i: jnp.zeros_like(z), IF
  )
  assert jnp.isnan(run()).all()
  assert run(finite=True).tolist() == [True, True, False, False]
