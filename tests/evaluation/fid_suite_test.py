"""The FID protocol, with an image's mean colour as its features."""

import numpy as np

from imagen_jax.data.source import Source
from imagen_jax.evaluation import report
from imagen_jax.evaluation.extractors import Extractor, TextExtractor
from imagen_jax.evaluation.fid_suite import Fid
from tests.evaluation.runs import finish


class Greys(Source):
  """Real images, each of one grey level, with captions."""

  def __len__(self):
    return 12

  def __getitem__(self, i):
    image = np.full((8, 8, 3), 20 * i, np.uint8)
    return {'image': image, 'caption': f'grey {i // 2}'}


def mean_colour(images):
  return np.stack([x.mean((0, 1)) for x in images]) / 255 + 0.1


def ones(prompts):
  return np.ones((len(prompts), 3), np.float32)


INCEPTION = Extractor(mean_colour, 'a' * 64, 'none')
CLIP = TextExtractor(mean_colour, 'b' * 64, 'none', ones)


def grey(item):
  value = 40 * int(item.prompt[5:]) + 20 * item.index
  return np.full((8, 8, 3), value, np.uint8)


def test_captions_are_a_random_subset_and_none_is_generated_twice():
  suite = Fid(Greys(), 10, 0, inception=INCEPTION)
  prompts = [item.prompt for item in suite.items()]
  assert len(prompts) == 10
  assert set(prompts) <= {f'grey {i}' for i in range(6)}
  assert len({(x.prompt, x.index) for x in suite.items()}) == 10


def test_images_near_the_real_ones_score_better_than_others(tmp_path):
  suite = Fid(Greys(), 10, 0, inception=INCEPTION, clip=CLIP)
  near = finish(tmp_path, suite, grey, 'guidance=1')['fid']['all']
  assert near['n'] == 10 and near['n_real'] == 12
  assert near['frechet'] < 0.02 and near['precision'] == 1
  assert near['clip_score'] > 70
  red = lambda item: grey(item) // 2 + np.array([127, 0, 0], np.uint8)
  far = finish(tmp_path, suite, red, 'guidance=2')['fid']['all']
  assert far['frechet'] > 10 * near['frechet'] + 0.05
  assert far['precision'] < 0.5 and far['cmmd'] > near['cmmd']
  # Features of the real images are computed once for each network.
  assert len(list(tmp_path.glob('fid/real-*.npy'))) == 2
  page = report.write(tmp_path).read_text()
  assert 'Fréchet distance against CLIP score' in page
