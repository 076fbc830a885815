"""Image files."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.io import images


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
