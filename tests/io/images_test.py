"""Image files."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import DataError
from imagen_jax.io import decode, images


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
  path = tmp_path / 'a.png'
  images.save_png(path, np.zeros((2, 2, 3), np.uint8), {'prompt': 'a'})

  def full(self, file, *_, **__):
    file.write_bytes(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(Image.Image, 'save', full)
  with pytest.raises(OSError):
    images.save_png(path, np.ones((2, 2, 3), np.uint8))
  assert [file.name for file in tmp_path.iterdir()] == ['a.png']
  assert images.read_metadata(path) == {'prompt': 'a'}


def test_a_grid_has_rows_of_images_with_white_between_and_after_them():
  cells = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones(
    (1, 1, 2, 3), np.uint8
  )
  found = images.grid(cells, 2)
  expected = np.full((4, 6), 255)
  expected[0, :2], expected[0, 4:], expected[3, :2] = 0, 1, 2
  np.testing.assert_array_equal(found, expected[..., None].repeat(3, -1))
  assert images.grid(cells).shape == found.shape  # two columns for three


def photo(height=8, width=16):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_a_given_image_is_turned_upright(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the sensor's rows are the image's columns
  stored = np.rot90(photo()).copy()
  for name in ('a.png', 'a.tif', 'mask.png'):
    Image.fromarray(stored).save(tmp_path / name, exif=exif)
  for name in ('a.png', 'a.tif'):
    opened = images.open_image(tmp_path / name)
    np.testing.assert_array_equal(opened, photo())
    low = images.read_low_res(tmp_path / name, 8, 1)
    np.testing.assert_array_equal(low, photo())
  grey = Image.fromarray(photo()).convert('L')
  np.testing.assert_array_equal(
    images.open_image(tmp_path / 'mask.png', 'L'), grey
  )


def test_sixteen_bits_of_a_given_image_become_eight(tmp_path):
  grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
  Image.fromarray(grey * 257).save(tmp_path / 'a.png')
  opened = np.asarray(images.open_image(tmp_path / 'a.png'))
  np.testing.assert_array_equal(opened, grey[..., None].repeat(3, -1))


@pytest.mark.parametrize('hidden', [(255, 0, 0), (255, 255, 255), (0, 0, 0)])
def test_transparent_is_white_in_an_image_and_black_in_a_mask(tmp_path, hidden):
  pixels = np.zeros((8, 8, 4), np.uint8)
  pixels[..., :3], pixels[:4] = hidden, 255
  Image.fromarray(pixels).save(tmp_path / 'a.png')
  assert (np.asarray(images.open_image(tmp_path / 'a.png')) == 255).all()
  assert (images.read_low_res(tmp_path / 'a.png', 8, 8) == 255).all()
  mask = images.to_mask(images.open_image(tmp_path / 'a.png', 'L'), 8, 8)
  assert mask[:4].all() and not mask[4:].any()


@pytest.mark.parametrize(
  'read',
  [
    images.open_image,
    lambda path: images.open_image(path, 'L'),
    lambda path: images.read_low_res(path, 8, 1),
    images.read_metadata,
  ],
)
def test_only_formats_that_run_no_program_are_opened(
  tmp_path, monkeypatch, read
):
  Image.init()  # registers PostScript
  started = []
  monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', started.append)
  path = tmp_path / 'a.png'
  Image.fromarray(photo()).save(path, 'EPS')
  with pytest.raises(DataError, match='a.png'):
    read(path)
  Image.fromarray(photo()).save(path, 'PPM')  # another format, as harmless
  with pytest.raises(DataError, match='a.png'):
    read(path)
  assert not started


def test_huge_tiny_cut_and_missing_images_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(decode, 'MAX_PIXELS', 200)
  for name, shape in ('huge.png', (15, 15)), ('line.png', (2, 16)):
    Image.fromarray(photo(*shape)).save(tmp_path / name)
  Image.fromarray(photo()).save(tmp_path / 'cut.png')
  whole = (tmp_path / 'cut.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(whole[: len(whole) // 2])
  for name in ('huge.png', 'line.png', 'cut.png', 'missing.png', '.'):
    with pytest.raises(DataError, match=name):
      images.open_image(tmp_path / name)


def area_of(image, width, height):
  """Means over target pixels, by the overlap of every two intervals."""

  def weights(size, target):
    edges = np.arange(target + 1)[:, None] * size / target
    low, high = np.arange(size), np.arange(1, size + 1)
    return np.clip(
      np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None
    ) / (size / target)

  down, across = weights(image.height, height), weights(image.width, width)
  return np.einsum(
    'ip,pq...,jq->ij...', down, np.asarray(image), across, optimize=True
  )


def test_area_counts_fractions_of_pixels():
  row = np.array([[0, 0, 255]], np.uint8).repeat(3, 0)
  found = decode.resize_square(Image.fromarray(row), 2)
  np.testing.assert_array_equal(found, [[0, 170]] * 2)


@pytest.mark.parametrize(
  'size, target',
  [
    ((60, 60), (50, 50)),
    ((77, 61), (48, 40)),
    ((64, 64), (8, 8)),
    ((45, 50), (9, 40)),
    ((51, 60), (17, 17)),
    ((1030, 517), (24, 24)),
  ],
)
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_area_is_the_mean_over_each_target_pixel(
  size, target, mode, monkeypatch
):
  monkeypatch.setattr(decode, 'BAND', 2**12)  # in several bands
  image = Image.fromarray(photo(*size[::-1])).convert(mode)
  box = decode.central(size, *target)
  found = decode.fit(image, *target)
  assert np.abs(found - area_of(image.crop(box), *target)).max() < 0.501


@pytest.mark.parametrize('side', [256, 300, 410, 512])
def test_the_mean_of_blocks_of_an_areas_mean_is_that_of_larger_areas(side):
  image = Image.fromarray(photo(side, side))
  large = decode.resize_square(image, 256).astype(float)
  blocks = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
  small = decode.resize_square(image, 64)
  assert np.abs(blocks - small).max() <= 1  # each is rounded


def test_a_low_resolution_image_is_upsampled_by_bicubic(tmp_path):
  image = Image.fromarray(photo(8, 13))
  image.save(tmp_path / 'a.png')
  found = images.read_low_res(tmp_path / 'a.png', 8, 8)
  box = decode.central(image.size, 16, 8)
  expected = image.resize((16, 8), Image.Resampling.BICUBIC, box)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('size', [(40, 30), (30, 40), (33, 8), (8, 33)])
@pytest.mark.parametrize('shape', [(16, 16), (24, 16), (16, 24), (40, 30)])
def test_a_given_image_is_cropped_to_its_centre_and_not_stretched(size, shape):
  left, top, right, bottom = decode.central(size, *shape)
  assert abs(left - (size[0] - right)) <= 1
  assert abs(top - (size[1] - bottom)) <= 1
  assert (right - left, bottom - top)[0] == size[0] or bottom - top == size[1]
  width, height = right - left, bottom - top
  assert abs(width * shape[1] - height * shape[0]) <= max(shape) / 2
  # The pixels are those of that part, for the image and for its mask.
  image = Image.fromarray(photo(size[1], size[0]))

  def resized(image):
    box = left, top, right, bottom
    if width < shape[0]:
      return np.asarray(image.resize(shape, Image.Resampling.BICUBIC, box))
    return area_of(image.crop(box), *shape)

  found = (images.to_float(image, *shape) + 1) * 127.5
  assert np.abs(found - resized(image)).max() <= 1
  grey = image.convert('L')
  expected, found = resized(grey), images.to_mask(grey, *shape)
  clear = np.abs(expected - 127.5) > 1
  np.testing.assert_array_equal(found[clear, 0], expected[clear] >= 128)


def test_a_given_image_is_downsampled_by_its_mean_as_in_training():
  pixels = photo(16, 32)
  means = pixels.reshape(4, 4, 8, 4, 3).mean((1, 3)) / 127.5 - 1
  found = images.to_float(Image.fromarray(pixels), 8, 4)
  assert np.abs(found - means).max() < 1 / 127.5
