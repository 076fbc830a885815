"""What tests of the data share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  """A cache of checks that no other test has filled."""
  cache = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
  return cache


@pytest.fixture
def images(tmp_path):
  """A folder of ten images of 16 pixels."""
  folder = tmp_path / 'images'
  folder.mkdir()
  for i in range(10):
    rng = np.random.default_rng(i)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'caption {i} ü')
  return folder
