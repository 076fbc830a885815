"""A student's step ends where its teacher's steps end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.diffusion import schedule
from imagen_jax.diffusion.distillation import (
  distillation_loss,
  moment_loss,
  teacher_target,
)
from imagen_jax.diffusion.loss import LossSpec
from imagen_jax.diffusion.process import eps_from_x, target
from imagen_jax.diffusion.reverse import (
  Reverse,
  logsnr_grid,
  sample,
  trajectory,
)
from imagen_jax.diffusion.samplers import SamplerSpec, Step, ddim_step
from imagen_jax.diffusion.schedule import alpha_sigma

MEAN, STD = 0.3, 0.5  # of the data, N(MEAN, STD²) in every pixel
COSINE = schedule.cosine_logsnr


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


# Operations that run one by one would be compiled one by one.
targets = jax.jit(teacher_target, static_argnames=('denoise', 'parts'))
ddim = jax.jit(ddim_step)


@jax.jit
def exact(z, logsnr):
  """E[x | z] of Gaussian data."""
  alpha, sigma = alpha_sigma(jnp.reshape(logsnr, (-1, 1, 1, 1)))
  gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
  return MEAN + gain * (z - alpha * MEAN)


def grid(steps, kind='time'):
  spec = SamplerSpec(sampler='ddim', steps=steps, grid=kind)
  return logsnr_grid(COSINE, spec, dtype=jnp.float64)


def noise(batch, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(batch, 2, 2, 1)))


@pytest.mark.parametrize(
  'parts, kind', [(1, 'time'), (2, 'logsnr'), (5, 'time')]
)
def test_a_step_to_the_target_is_the_teachers_steps(parts, kind):
  steps = 4
  fine, coarse = grid(steps * parts, kind), grid(steps, kind)
  np.testing.assert_allclose(fine[::parts], coarse, rtol=1e-12)
  z, index = noise(steps), jnp.arange(steps)
  aim = targets(z, index, exact, grid=fine, parts=parts)
  z, aim, fine, coarse = map(np.asarray, (z, aim, fine, coarse))
  for i in range(steps):
    row = z[i : i + 1]
    for here, there in zip(fine[i * parts :], fine[i * parts + 1 :][:parts]):
      x = exact(row, here)
      row = ddim(row, x, np.zeros_like(row), Step(here, there))
    at = Step(coarse[i], coarse[i + 1])
    one = ddim(z[i : i + 1], aim[i : i + 1], np.zeros_like(row), at)
    if i == steps - 1:  # the last step returns the prediction itself
      one, row = aim[i], x[0]
    np.testing.assert_allclose(one, row, rtol=1e-9)


def test_the_exact_student_samples_what_its_teacher_samples():
  """4 evaluations of a student give what 32 of the teacher give."""
  steps, parts = 4, 8
  fine, coarse = grid(steps * parts), grid(steps)

  def student(z, logsnr, memory):
    index = jnp.searchsorted(coarse, logsnr[0] - 1e-9)
    index = jnp.full(len(z), index)
    return teacher_target(z, index, exact, grid=fine, parts=parts), memory

  teacher = lambda z, logsnr, memory: (exact(z, logsnr), memory)
  spec = SamplerSpec(sampler='ddim', steps=steps)
  keys = jax.random.split(jax.random.key(0), 6)

  @functools.partial(jax.jit, static_argnums=1)
  def images(logsnr, denoise):
    return sample(Reverse(keys, noise(6), logsnr, denoise, spec))

  many, ours, few = (
    images(*pair)
    for pair in ((fine, teacher), (coarse, student), (coarse, teacher))
  )
  np.testing.assert_allclose(many, ours, rtol=1e-6)
  assert np.abs(few - many).max() > 0.01  # what there was to learn


def test_the_student_of_gaussian_data_keeps_their_standard_deviation():
  steps, parts = 2, 60
  fine = grid(steps * parts)
  z, index = noise(4), jnp.zeros(4, int)
  aim = targets(z, index, exact, grid=fine, parts=parts)
  at = Step(fine[0], fine[parts])
  middle = ddim(z, aim, jnp.zeros_like(z), at)
  index = index + 1
  x = targets(middle, index, exact, grid=fine, parts=parts)
  # The exact ODE maps noise to MEAN + STD · noise.
  np.testing.assert_allclose(x, MEAN + STD * z, atol=3e-2)
  few = targets(z, 0 * index, exact, grid=grid(1), parts=1)
  assert np.abs(few - (MEAN + STD * z)).max() > 0.3


@pytest.mark.parametrize('prediction', ['v', 'x', 'eps'])
def test_the_loss_of_the_exact_student_is_zero(prediction):
  steps, parts = 4, 3
  fine, coarse = grid(steps * parts), grid(steps)
  spec = LossSpec(prediction=prediction, stratified=True)

  def student(z, logsnr, shift):
    index = jnp.searchsorted(coarse, logsnr - 1e-9)
    x = targets(z, index, exact, grid=fine, parts=parts) + shift
    return target(prediction, x, eps_from_x(z, x, logsnr), logsnr)

  @functools.partial(jax.jit, static_argnums=2)
  def losses(key, x, shift):
    predict = functools.partial(student, shift=shift)
    return distillation_loss(
      key, x, predict, exact, grid=fine, parts=parts, spec=spec
    )

  loss, details = losses(jax.random.key(1), noise(8), 0.0)
  np.testing.assert_allclose(loss, 0, atol=1e-12)
  # Every step is met, at the time where it begins.
  np.testing.assert_array_equal(
    np.sort(details['t']), np.repeat([0.25, 0.5, 0.75, 1], 2)
  )
  np.testing.assert_allclose(
    details['logsnr'], COSINE(np.float64(details['t'])), atol=1e-9
  )
  # The unweighted error of x and of v: 1 and 1 + snr times that of x.
  loss, details = losses(jax.random.key(1), noise(8), 0.1)
  snr = np.exp(details['logsnr'])
  factor = {'x': 1, 'v': 1 + snr, 'eps': snr}[prediction]
  np.testing.assert_allclose(loss, 0.01 * factor, rtol=1e-6)


def test_the_target_has_no_gradient():
  fine = grid(4)

  @jax.value_and_grad
  def loss(scale):
    return distillation_loss(
      jax.random.key(0),
      noise(4),
      lambda z, logsnr: jnp.zeros_like(z),
      lambda z, logsnr: scale * exact(z, logsnr),
      grid=fine,
      parts=2,
      spec=LossSpec(prediction='x'),
    )[0].sum()

  value, gradient = jax.jit(loss)(1.0)
  assert value > 0 and gradient == 0


def test_the_trajectory_of_the_sampler_is_that_of_the_targets():
  """The teacher's steps are those of the sampler, to the bit."""
  steps = 4
  fine = grid(steps)
  spec = SamplerSpec(sampler='ddim', steps=steps)
  keys = jax.random.split(jax.random.key(0), 3)
  teacher = lambda z, logsnr, memory: (exact(z, logsnr), memory)
  run = jax.jit(
    lambda keys, z: trajectory(Reverse(keys, z, fine, teacher, spec))
  )
  path = run(keys, noise(3))
  for i in range(steps):
    index = jnp.full(3, i)
    aim = targets(path.z[i], index, exact, grid=fine, parts=1)
    np.testing.assert_allclose(aim, path.x[i], rtol=1e-12)


def moments(student, auxiliary, *, steps=2, parts=4, key=0, batch=8, **options):
  """The loss of networks that predict x, on data of one pixel."""
  data = jax.random.normal(jax.random.key(key + 1), (batch, 1, 1, 1))
  return moment_loss(
    jax.random.key(key), MEAN + STD * data, student, auxiliary, exact,
    grid=grid(steps * parts), parts=parts,
    spec=LossSpec(prediction='x', stratified=True), **options,
  )  # fmt: skip


def test_moments_that_agree_move_only_the_auxiliary_network():
  student = lambda shift: lambda z, logsnr: exact(z, logsnr) + shift

  def loss(student_shift, auxiliary_shift):
    return moments(student(student_shift), student(auxiliary_shift))[0].sum()

  ours, its = jax.grad(loss, (0, 1))(0.0, 0.0)
  assert ours == 0 and its != 0
  # Where the auxiliary network sees too bright images, they become darker.
  assert jax.grad(loss)(0.0, 0.1) > 0 > jax.grad(loss)(0.0, -0.1)


def test_moments_are_compared_inside_the_step_and_valued_by_their_difference():
  loss, details = moments(exact, lambda z, logsnr: exact(z, logsnr) + 0.3)
  np.testing.assert_allclose(details['mse'], 0.09)
  fine, step = grid(8), np.asarray(details['t']) * 2  # 2: the first, 1
  low = np.where(step == 2, fine[0], fine[4])
  high = np.where(step == 2, fine[4], fine[8])
  here = np.asarray(details['logsnr'])
  assert (low < here).all() and (here <= high).all() and set(step) == {1, 2}
  np.testing.assert_allclose(
    details['weight'], np.minimum(1 + np.exp(here), 20)
  )
  # What the sampler does to a prediction precedes z_s and the mean.
  zero = lambda z, *_: 0 * z
  loss, details = moments(exact, zero, finish=zero)
  np.testing.assert_allclose(
    loss, details['mse'] * (1 + details['weight'] / 2), rtol=1e-9
  )


def test_moments_are_weighted_by_pixel():
  half = jnp.full((8, 1, 1, 1), 0.5)
  whole, part = (
    moments(exact, lambda z, _: 0 * z, pixel_weight=weight)
    for weight in (None, half)
  )
  np.testing.assert_allclose(part[0], whole[0] / 2, rtol=1e-9)
  np.testing.assert_allclose(part[1]['mse'], whole[1]['mse'] / 2, rtol=1e-9)


def test_two_random_steps_of_the_trained_student_keep_the_data():
  """The mean and standard deviation of Gaussian data, trained from nothing."""
  steps, parts = 2, 4
  levels = grid(steps * parts)

  def affine(table):
    def predict(z, logsnr):
      row = table[jnp.searchsorted(levels, logsnr - 1e-9)]
      return row[:, :1, None, None] + row[:, 1:, None, None] * z

    return predict

  tables = (jnp.zeros((len(levels), 2)),) * 2
  tx = optax.adam(optax.cosine_decay_schedule(0.03, 1500))

  @jax.jit
  def train(carry, key):
    tables, state = carry

    def loss(tables):
      return moments(*map(affine, tables), key=key, batch=512)[0].mean()

    updates, state = tx.update(jax.grad(loss)(tables), state)
    return (optax.apply_updates(tables, updates), state), None

  (tables, _), _ = jax.lax.scan(
    train, (tables, tx.init(tables)), jnp.arange(1500)
  )
  spec = SamplerSpec(sampler='ddim', eta=1.0, steps=steps)
  keys = jax.random.split(jax.random.key(0), 4000)
  noise = jax.random.normal(jax.random.key(1), (4000, 1, 1, 1))

  def sampled(predict):
    denoise = lambda z, logsnr, memory: (predict(z, logsnr), memory)
    return sample(Reverse(keys, noise, grid(steps), denoise, spec))

  x = sampled(affine(tables[0]))
  np.testing.assert_allclose(x.mean(), MEAN, atol=0.03)
  np.testing.assert_allclose(x.std(), STD, atol=0.03)
  assert sampled(exact).std() < 0.8 * STD  # the teacher in as many steps
