"""Previews while sampling, which change no image."""

import concurrent.futures
import threading

import numpy as np
import pytest
from PIL import Image

import imagen_jax
from imagen_jax.cascade import preview
from imagen_jax.errors import UsageError

IMAGES = np.zeros((1, 2, 2, 3), np.uint8)
MADE = [preview.Preview('base', 0, i, 5, IMAGES, IMAGES) for i in range(5)]
PROMPTS = ['a red circle', 'a blue square', 'a star']


@pytest.fixture(scope='module')
def cascade(model):
  return imagen_jax.load(model)


@pytest.fixture
def pool():
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    yield pool


@pytest.fixture(scope='module')
def image():
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  mask = np.zeros((8, 8), np.uint8)
  mask[2:6] = 255
  return {'image': Image.fromarray(pixels), 'mask': Image.fromarray(mask)}


def assert_equal(images, others):
  assert list(images) == list(others)
  for name, array in images.items():
    np.testing.assert_array_equal(array, others[name])


def test_a_stream_ends_with_the_images_of_sample_bit_for_bit(cascade):
  call = {'batch_size': 2, 'seed': 7}
  expected = cascade.sample(PROMPTS, **call)
  *seen, last = cascade.stream(PROMPTS, every=2, **call)
  assert_equal(expected, last.images)
  assert [(p.stage, p.first, p.step, p.steps, len(p.x)) for p in seen] == [
    *(('base', 0, step, 3, 2) for step in (2, 3)),
    *(('base', 2, step, 3, 1) for step in (2, 3)),
    ('sr1', 0, 2, 2, 2),
    ('sr1', 2, 2, 2, 1),
  ]
  assert {p.images for p in seen} == {None}
  for p in seen:
    part = expected[p.stage][p.first : p.first + len(p.x)]
    final = p.step == p.steps
    assert np.array_equal(p.x, part) == final == np.array_equal(p.z, p.x)


@pytest.mark.parametrize(
  'given, choices',
  [
    ((), {'sampler': 'ddpm', 'guidance_schedule': (0, 1)}),
    (('image', 'mask'), {'sampler': 'unipc', 'apg_momentum': -0.5}),
    (('image',), {'sampler': 'dpmpp_sde', 'strength': 0.5, 'steps': 6}),
  ],
)
def test_so_it_does_with_every_state_of_a_sampler(model, image, given, choices):
  cascade = imagen_jax.load(model, stages=['base'])
  call = choices | {name: image[name] for name in given}
  call |= {'batch_size': 2, 'guidance': 2.0, 'steps': choices.get('steps', 3)}
  expected = cascade.sample(PROMPTS[0], **call)
  *seen, last = cascade.stream(PROMPTS[0], every=1, **call)
  assert_equal(expected, last.images)
  assert [p.step for p in seen] == [1, 2, 3]


def test_closing_a_stream_ends_its_work(cascade):
  done, threads = [], threading.active_count()
  stream = cascade.stream(
    PROMPTS, every=1, batch_size=2, callback=lambda *at: done.append(at)
  )
  next(stream)
  stream.close()
  assert threading.active_count() == threads
  assert not done
  assert list(stream) == []
  cascade.sample(PROMPTS[0], batch_size=2)  # what it had loaded is free


def test_a_streams_errors_are_those_of_sample(cascade):
  for key, choices in ('every', {'every': 0}), ('steps', {'steps': 0}):
    with pytest.raises(UsageError) as caught:
      next(cascade.stream(PROMPTS, **choices))
    assert caught.value.key == key


def test_work_is_at_most_one_preview_ahead(pool):
  emitted, third = [], threading.Event()

  def work(emit):
    for made in MADE:
      emitted.append(made)
      if made is MADE[2]:
        third.set()
      emit(made)

  stream = preview.stream(work, pool)
  assert next(stream) is MADE[0]
  assert next(stream) is MADE[1]
  assert third.wait(60)
  assert emitted == MADE[:3]
  assert list(stream) == MADE[2:]


def test_what_fails_after_a_preview_is_raised_after_it(pool):
  def work(emit):
    emit(MADE[0])
    raise KeyError('later')

  stream = preview.stream(work, pool)
  assert next(stream) is MADE[0]
  with pytest.raises(KeyError):
    next(stream)
