"""Requests, keys and batches: an image does not depend on its batch."""

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import sharding
from imagen_jax.cascade import batching, given_images
from imagen_jax.errors import NumericError, UsageError


def test_image_keys_differ_by_seed_prompt_and_number():
  arguments = [(0, 'a', 0), (1, 'a', 0), (0, 'b', 0), (0, 'a', 1), (0, 'é', 0)]
  data = {
    tuple(np.asarray(jax.random.key_data(batching.image_key(*a))))
    for a in arguments
  }
  assert len(data) == len(arguments)


def test_image_keys_are_threefry_whatever_the_default():
  """A golden key: if it changed, every seed would give other images."""
  with jax.default_prng_impl('rbg'):
    key = batching.image_key(7, 'a red circle', 3)
  assert jax.random.key_impl(key) == 'threefry2x32'
  assert jax.random.key_data(key).tolist() == [3303254978, 343842836]


@pytest.mark.parametrize('seed', [0, 2**31, 2**32 - 1])
def test_every_32_bit_seed_is_a_seed(seed):
  key = batching.image_key(seed, 'a', 0)
  with jax.enable_x64(True):
    wide = batching.image_key(seed, 'a', 0)
  assert (jax.random.key_data(key) == jax.random.key_data(wide)).all()


def test_every_row_has_its_own_inputs_and_the_last_batch_is_padded():
  calls, batches, shown = [], [], []
  request = batching.Request(
    ['a', 'b'],
    indices=(0, 2, 5),
    batch_size=4,
    callback=lambda *a: calls.append(a),
    finished=lambda i, images: shown.append((i, images[:, 0, 0, 0].tolist())),
  )
  assert request.rows == [(p, i) for p in (0, 1) for i in (0, 2, 5)]
  mesh = sharding.make_mesh(devices=jax.devices()[:2])

  def inputs(rows):
    batches.append(rows.tolist())
    return {'x': np.asarray(rows, np.float32)[:, None, None, None] / 5}

  def sample(arrays):
    for step in 1, 2:  # the images are those after the last step
      yield step, 2, arrays['x'], step * arrays['x'] - 1

  out = batching.generate(
    request, 'base', mesh, inputs, sample, jax.numpy.isfinite
  )
  np.testing.assert_allclose(out[:, 0, 0, 0], np.linspace(-1, 1, 6), atol=1e-6)
  assert shown == [(0, [0, 51, 102, 153]), (4, [204, 255])]
  assert batches == [[0, 1, 2, 3], [4, 5, 5, 5]]
  assert calls == [('base', 4, 6), ('base', 6, 6)]


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_images_that_are_no_numbers_are_an_error_and_are_not_kept(value):
  shown = []
  request = batching.Request(
    ['a', 'b', 'c'], batch_size=1, finished=lambda i, images: shown.append(i)
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  good = np.array([0, 0, value], np.float32)[:, None, None, None]
  with pytest.raises(NumericError, match='sr1.* 3 of 4'):
    batching.generate(
      request,
      'sr1',
      mesh,
      lambda rows: good[rows],
      lambda x: [(1, 1, x, x)],
      lambda x: jax.numpy.array([True, True, False, False]),
    )
  assert shown == [0, 1]


def test_keys_differ_between_rows_and_stages():
  request = batching.Request(['a', 'b'], indices=(0, 1))
  rows = np.arange(4)
  both = [request.key_data(rows, side) for side in (64, 256)]
  assert len({tuple(key) for key in np.concatenate(both)}) == 8


@pytest.mark.parametrize(
  'key, choices',
  [
    ('seed', {'seed': -1}),
    ('seed', {'seed': 2**32}),
    ('num_images', {'indices': ()}),
    ('num_images', {'indices': range(10**6), 'prompts': ('a', 'b')}),
    ('batch_size', {'batch_size': 0}),
    ('batch_size', {'batch_size': 10**9}),
    (None, {'prompts': ()}),
    ('prompt', {'prompts': ('a', 'b\udcff')}),
  ],
)
def test_impossible_requests_are_refused(key, choices):
  with pytest.raises(UsageError) as caught:
    batching.Request(**{'prompts': ('a',)} | choices)
  assert caught.value.key == key


def test_choices_are_one_value_or_a_list_with_one_per_stage():
  chosen = batching.per_stage(
    {'steps': [8, None], 'guidance': 2.0, 'guidance_interval': (-1.0, 3.0)},
    ['base', 'sr1'],
  )
  shared = {'guidance': 2.0, 'guidance_interval': (-1.0, 3.0)}
  assert chosen == [{'steps': 8, **shared}, shared]
  with pytest.raises(UsageError) as caught:
    batching.per_stage({'steps': [8]}, ['base', 'sr1'])
  assert caught.value.key == 'steps'


@pytest.mark.parametrize(
  'key, upsamples, images',
  [
    ('low_res', True, {}),
    ('low_res', False, {'low_res': 'small.png'}),
    ('mask', False, {'mask': (8, 8)}),
    ('mask', False, {'image': (8, 8), 'mask': (8, 4)}),
    ('mask', False, {'image': (8, 8), 'mask': (8, 8)}),  # all black
    ('strength', False, {'strength': 0.5}),
  ],
)
def test_images_that_a_stage_cannot_start_from_are_refused(
  key, upsamples, images
):
  opened = {
    name: Image.new('L', size) if isinstance(size, tuple) else size
    for name, size in images.items()
  }
  with pytest.raises(UsageError) as caught:
    given_images.check_images('base', upsamples, **opened)
  assert caught.value.key == key
