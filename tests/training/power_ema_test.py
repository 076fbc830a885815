"""Power-function EMAs against their closed forms, and their reconstruction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax import sharding
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.training import power_ema
from imagen_jax.training.state import init_state

LENGTHS = (0.05, 0.1)
STEPS, EVERY = 128, 8


def exact(length, step):
  """The weight of each step's parameters, ∫ from τ − 1 to τ of the profile."""
  edges = np.arange(STEPS + 1) / step
  return np.diff(np.minimum(edges, 1) ** (power_ema.power(length) + 1))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(emas, checkpoint_dir) of a run with impulses: θ(τ) = the τ-th unit vector.

  So an average is the vector of its weights.
  """
  directory = tmp_path_factory.mktemp('run')
  params = {'net': {'w': jnp.ones(STEPS)}}  # no weight: forgotten at step 1
  emas, update = power_ema.start(params, LENGTHS), jax.jit(power_ema.update)
  with Checkpoints(directory / power_ema.FOLDER, keep_every=1) as snapshots:
    for step in range(1, STEPS + 1):
      params = {'net': {'w': jax.nn.one_hot(step - 1, STEPS)}}
      emas = update(emas, params, jnp.asarray(step))
      if step % EVERY == 0:
        snapshots.save(step, {'emas': emas})
  return emas, directory


def made(run, length, step=None):
  params, at = power_ema.reconstruct(run[1], LENGTHS, length, step)
  assert params['net']['w'].dtype == np.float32
  return params['net']['w'], at


@pytest.mark.parametrize('length', [0.01, 0.05, 0.1, 0.28])
def test_a_length_is_the_spread_of_the_profile(length):
  gamma = power_ema.power(length)
  tau = (np.arange(10**6) + 0.5) / 10**6
  weights = tau**gamma / np.sum(tau**gamma)
  mean = weights @ tau
  spread = np.sqrt(weights @ (tau - mean) ** 2)
  np.testing.assert_allclose(spread, length, rtol=1e-4)


@pytest.mark.parametrize('length', LENGTHS)
def test_tracked_averages_have_the_weights_of_the_profile(run, length):
  found = run[0][str(length)]['net']['w']
  np.testing.assert_allclose(found, exact(length, STEPS), atol=1e-6)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)


def test_the_average_of_a_line_is_the_profiles_mean():
  # ∫ τ p(τ) dτ = t (γ + 1)/(γ + 2); a step counts as its end, half a step late.
  emas = power_ema.start({'w': jnp.zeros(())}, [0.1])
  for t in range(1, 101):
    emas = power_ema.update(emas, {'w': jnp.float32(t)}, jnp.asarray(t))
  gamma = power_ema.power(0.1)
  mean = 100 * (gamma + 1) / (gamma + 2) + 0.5
  np.testing.assert_allclose(emas['0.1']['w'], mean, rtol=1e-3)


@pytest.mark.parametrize('step', [None, 72])
@pytest.mark.parametrize('length', LENGTHS)
def test_a_tracked_average_comes_back_exactly(run, length, step):
  found, at = made(run, length, step)
  if step is None:
    np.testing.assert_array_equal(found, run[0][str(length)]['net']['w'])
  np.testing.assert_allclose(found, exact(length, at), atol=1e-6)
  assert at == (step or STEPS)


@pytest.mark.parametrize('length', [0.04, 0.06, 0.08, 0.15, 0.2])
def test_an_average_that_was_not_tracked_is_fitted(run, length):
  (found, at), wanted = made(run, length), exact(length, STEPS)
  error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
  steps = range(EVERY, STEPS + 1, EVERY)
  _, claimed = power_ema.fit(steps, LENGTHS, STEPS, length)
  assert at == STEPS and error < 0.025
  # The profile's own error, but for its steps.
  np.testing.assert_allclose(error, claimed, rtol=0.3)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)
  early, at = made(run, length, 72)
  assert at == 72 and early[:72].all() and not early[72:].any()


def test_what_cannot_be_made_is_refused_by_name(run, tmp_path):
  for directory, lengths in [(run[1], None), (tmp_path, LENGTHS)]:
    with pytest.raises(ModelError, match=r'train\.ema_lengths'):
      power_ema.reconstruct(directory, lengths, 0.08)
  for length in (0.0, -0.1, 0.3, float('nan'), float('inf')):
    with pytest.raises(UsageError) as error:
      made(run, length)
    assert error.value.key == 'ema'
  with pytest.raises(UsageError) as error:
    made(run, 0.08, step=9)
  assert error.value.key == 'step'
  with pytest.raises(UsageError) as error:  # narrower than what was stored
    made(run, 0.005)
  assert error.value.key == 'ema'


def test_averages_are_sharded_as_their_parameters():
  mesh = sharding.make_mesh(1, 8)
  state = jax.eval_shape(
    lambda: init_state({'w': jnp.ones((64, 512))}, optax.sgd(1.0), LENGTHS)
  )
  shardings = sharding.state_shardings(state, mesh)
  assert set(shardings.emas) == {'0.05', '0.1'}
  for ema in shardings.emas.values():
    assert ema == shardings.params and 'fsdp' in ema['w'].spec
