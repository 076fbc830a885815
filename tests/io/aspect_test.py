"""The shapes that images get."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UsageError
from imagen_jax.io import aspect
from imagen_jax.io.decode import BadSample, decode


@pytest.mark.parametrize('size', [64, 256, 1024])
def test_buckets_have_nearly_equal_areas_and_scale_with_the_size(size):
  found = aspect.shapes(size, 'buckets')
  assert len(found) == 9 and {s[::-1] for s in found} == {*found}
  for height, width in found:
    assert 0.93 * size**2 < height * width <= size**2
    assert height % (size // 8) == width % (size // 8) == 0
  small = aspect.shapes(size // 4, 'buckets')
  assert [(4 * h, 4 * w) for h, w in small] == [*found]


def test_an_image_gets_the_shape_of_the_nearest_aspect_ratio():
  shapes = aspect.shapes(64, 'buckets')
  rng = np.random.default_rng(0)
  sizes = rng.integers(64, 1000, (500, 2))
  found = aspect.choose(sizes * 4, 64, 'buckets')
  for (width, height), number in zip(sizes, found):
    distance = [abs(math.log(width / height * h / w)) for h, w in shapes]
    assert distance[number] == pytest.approx(min(distance))


@pytest.mark.parametrize(
  'size, crop, pad, bucket',
  [
    ((64, 64), 0, 0, (64, 64)), ((63, 64), -1, 0, None),
    ((72, 56), -1, 0, (56, 72)), ((71, 56), -1, 0, None),
    ((32, 128), -1, 0, (128, 32)), ((32, 2000), -1, 0, (128, 32)),
    ((63, 63), -1, -1, None),
  ],
)  # fmt: skip
def test_no_image_is_upsampled(size, crop, pad, bucket):
  assert aspect.choose([size], 64, 'crop') == crop
  assert aspect.choose([size], 64, 'pad') == pad
  number = int(aspect.choose([size], 64, 'buckets')[0])
  assert (
    aspect.shapes(64, 'buckets')[number] if number >= 0 else None
  ) == bucket


def test_an_unknown_way_or_a_size_without_eighths_is_refused():
  for size, way in (64, 'stretch'), (60, 'buckets'):
    with pytest.raises(UsageError) as error:
      aspect.shapes(size, way)
    assert error.value.key == 'config.data.aspect'


def encoded(pixels, **options):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG', **options)
  return out.getvalue()


def test_padding_keeps_the_whole_image_in_the_middle():
  wide = np.random.default_rng(0).integers(0, 255, (16, 64, 3), np.uint8)
  found = decode(encoded(wide), 32, aspect='pad')
  means = wide.reshape(8, 2, 32, 2, 3).mean((1, 3))
  assert np.abs(found[12:20] - means).max() <= 0.5
  assert (found[:12] == 255).all() and (found[20:] == 255).all()
  tall = decode(encoded(wide.swapaxes(0, 1)), 32, aspect='pad')
  np.testing.assert_array_equal(tall, found.swapaxes(0, 1))
  with pytest.raises(BadSample):
    decode(encoded(wide), 65, aspect='pad')


def test_a_bucket_has_the_central_part_of_its_shape():
  wide = np.random.default_rng(0).integers(0, 255, (56, 80, 3), np.uint8)
  found = decode(encoded(wide), 64, aspect='buckets')
  np.testing.assert_array_equal(found, wide[:, 4:76])


def test_a_turned_image_has_the_shape_of_the_upright_one():
  pixels = np.zeros((72, 56, 3), np.uint8)
  exif = Image.Exif()
  exif[0x112] = 6
  assert decode(encoded(pixels), 64, aspect='buckets').shape == (72, 56, 3)
  turned = decode(encoded(pixels, exif=exif), 64, aspect='buckets')
  assert turned.shape == (56, 72, 3)
