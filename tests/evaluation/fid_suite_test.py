"""The FID protocol, with an image's mean colour as its features."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data.source import Source
from imagen_jax.errors import UsageError
from imagen_jax.evaluation import fid_suite, report
from imagen_jax.evaluation.config import EvalConfig
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


def test_the_distance_in_efficientnets_features_comes_with_its_floor(tmp_path):
  suite = Fid(Greys(), 6, 0, efficientnet=INCEPTION)
  exact = finish(tmp_path, suite, grey)['fid']['all']
  floor = exact['FD-EffLite0 real_against_real']
  assert 0 < floor < 1 and 'frechet' not in exact
  black = lambda item: 0 * grey(item)
  far = finish(tmp_path, suite, black, 'guidance=1')['fid']['all']
  assert far['FD-EffLite0 real_against_real'] == floor
  # Real images have means of 0 to 220 in 255, evenly spaced, in 3 channels;
  # half of them are set aside for the floor.
  levels = 20 * np.random.default_rng(0).permutation(12)[6:] / 255
  expected = 3 * (levels.mean() ** 2 + levels.var(ddof=1))
  assert far['FD-EffLite0'] == pytest.approx(expected, rel=1e-4)


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


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
  """Evaluates into one folder: settings -> (computations, provenance).

  Computations are those of the real images' features.
  """
  data = tmp_path / 'real'
  computed: list[str] = []
  data.mkdir()
  for i in range(6):
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(data / f'{i}.png')
    (data / f'{i}.txt').write_text('grey 3')

  def load(path, mode):
    def image(images):
      computed.append(mode)
      return mean_colour(images)

    return Extractor(image, path * 64, mode)

  monkeypatch.setattr(fid_suite, 'load_inception', load)

  def evaluate(resolution=8, weights='a', mode='clean'):
    config = EvalConfig(data=data, inception=weights, fid_mode=mode)
    suite = Fid.from_config(config, resolution)
    finish(tmp_path, suite, grey)
    real = len(computed) - 1  # one call is for the generated images
    computed.clear()
    return real, suite.provenance()

  evaluate.data = data
  return evaluate


def repaint(data):
  """Other pixels under the same names and captions."""
  for path in data.glob('*.png'):
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


@pytest.mark.parametrize(
  'change',
  [
    {'resolution': 16},
    {'weights': 'b'},
    {'mode': 'pytorch-fid'},
    'other pixels',
    'other resize',
  ],
  ids=str,
)
def test_features_of_real_images_are_reused_for_the_same_images_only(
  evaluated, change, monkeypatch
):
  assert [evaluated()[0] for _ in range(2)] == [1, 0]
  if change == 'other pixels':
    repaint(evaluated.data)
  elif change == 'other resize':
    monkeypatch.setattr(fid_suite, 'RESIZING', 'another')
  settings = change if isinstance(change, dict) else {}
  assert [evaluated(**settings)[0] for _ in range(2)] == [1, 0]


def test_the_scores_say_how_images_were_prepared(evaluated):
  _, note = evaluated(mode='pytorch-fid')
  assert note['inception_preprocessing'] == 'pytorch-fid'
  assert note['real']['size'] == 8 and note['real']['resize'] == 'area'
  assert note['real']['count'] == 6 and note['real']['fingerprint']


def test_a_mode_without_inception_is_refused():
  config = EvalConfig(data='a', clip='b', fid_mode='pytorch-fid')
  with pytest.raises(UsageError) as error:
    Fid.from_config(config, 8)
  assert error.value.key == 'fid_mode'
