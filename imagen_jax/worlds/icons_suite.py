"""The icons suite: does the image show the thing that the prompt names?

The scenes are of the split 'eval', with a seed of their own. The judge is a
linear probe on EfficientNet-Lite0's features (see `icons_judge`); its accuracy
on true images of the same scenes stands beside each score.
"""

import copy
import dataclasses
import functools
import glob
import pathlib
import typing
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from imagen_jax.data.claim import SPEC
from imagen_jax.errors import DataError, UsageError
from imagen_jax.evaluation import scores
from imagen_jax.evaluation import suite as suites
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.extractors import Extractor, kept, load_efficientnet
from imagen_jax.evaluation.fid_suite import efflite0_scores
from imagen_jax.evaluation.generation import read_images
from imagen_jax.evaluation.scores import Categories
from imagen_jax.evaluation.suite import Item, Records
from imagen_jax.io import files, model_folder, paths
from imagen_jax.worlds.icon_scenes import CATEGORIES, MIXTURE, Scene
from imagen_jax.worlds.icons import IconsSource
from imagen_jax.worlds.icons_judge import Judge, count, fit, foreground, halves

SEED = 2205  # of the evaluation scenes; nothing else uses it
REAL = (
  3  # per generated image, for the distance: one is set aside for its floor
)


@dataclasses.dataclass(frozen=True)
class IconsSuite(suites.Suite):
  """The fraction of images that show what the prompt says, by category.

  Attributes:
    source: of true images, at the size of the generated ones.
    extractor: EfficientNet-Lite0.
    categories: those to score.
    num: images of each.
    from_truth: whether the first stage upsamples true images.
  """

  source: IconsSource
  extractor: Extractor
  categories: tuple[str, ...] = CATEGORIES
  num: int = 300
  from_truth: bool = False
  uses = ('num', 'categories', 'from_truth', 'data', 'efficientnet')

  @classmethod
  def from_config(cls, config: EvalConfig) -> 'IconsSuite':
    path = paths.located(config.model)
    record = model_folder.find_stages(path, config.stages)[-1]
    data = _settings(record.config['data'])
    if not data:
      raise UsageError(
        f'suite icons needs a model of icons; {path} was trained on other '
        'data, or on a prepared set that is gone: its spec.json is enough.',
        key='suite',
      )
    if not config.efficientnet:
      raise UsageError(
        'efficientnet is not set; suite icons needs the weights of '
        'EfficientNet-Lite0 as safetensors, see docs/icons.md.',
        key='efficientnet',
      )
    if not (config.data or data.get('path')):
      raise UsageError(
        'data is not set; it names the folder of the icon packages, which a '
        'prepared set does not know.',
        key='data',
      )
    source = IconsSource(
      config.data or data['path'],
      record.resolution,
      seed=SEED,
      split='eval',
      styles=data.get('styles'),
      things=data.get('things'),
      licences=data.get('licences'),
    )
    return cls(
      source,
      load_efficientnet(config.efficientnet),
      suites.choose(config.categories, source.categories()),
      config.num or 300,
      config.from_truth,
    )

  @property
  def label(self) -> str:
    return 'icons_from_truth' if self.from_truth else 'icons'

  @property
  def reference(self) -> str:
    return 'judge_from_truth' if self.from_truth else 'judge'

  def heading(self) -> tuple[str, str]:
    return 'Does the image show the thing that the prompt names?', (
      'A linear probe on features of EfficientNet-Lite0, fitted to renders, '
      'says which thing an image shows in which style; things are counted as '
      'connected parts. Whiskers are Wilson’s 95 % intervals. The green tick '
      'is the accuracy on true images of the same scenes.'
    )

  def scene(self, item: Item) -> Scene:
    return self.source.scene(item.number, item.category)

  def items(self) -> list[Item]:
    return suites.number(
      (category, self.source.scene(i, category).caption)
      for category in self.categories
      for i in range(self.num)
    )

  def digest(self) -> str:
    # `num` is not part of it: a longer run may resume a shorter one.
    some = [
      self.source.scene(i, category).caption
      for category in self.source.categories()
      for i in range(20)
    ]
    return suites.digest([self.source.fingerprint, some])

  def true_image(self, item: Item, size: int) -> UInt8[np.ndarray, 's s 3']:
    source = copy.copy(self.source)
    source.size = size
    return source.render(self.scene(item))

  @functools.cached_property
  def judge_of_renders(self) -> Judge:
    fitted = fit(self.source, kept(self.extractor))
    return dataclasses.replace(fitted, features=self.extractor.image)

  def score(
    self, folder: pathlib.Path, records: Records
  ) -> dict[str, Categories]:
    """Accuracies of the model, and of the judge on true images.

    The latter stand beside each score too, as 'judge'. 'single' is the thing
    alone, 'single_top5' the thing among the five likeliest, 'style' the style
    of these where the prompt names it, 'count' the number. 'pair' has both
    things right and, where the prompt has a relation, each on its side.
    'heldout_style' has the thing and the style right. 'distance' is from
    renders of other scenes, see `efflite0_scores`.
    """
    items = self.items()
    generated = list(read_images(folder, records, items))
    true = [self.source.render(self.scene(item)) for item in items]
    judge = self.judge_of_renders
    result: Categories = self._accuracies(items, generated, judge)
    judge = dataclasses.replace(judge, features=kept(self.extractor))
    own = self._accuracies(items, true, judge)
    for name, score in result.items():
      score['judge'] = own[name]['accuracy']
    some = {
      category: [x for x, i in zip(generated, items) if i.category == category]
      for category in MIXTURE
    }
    if any(some.values()):
      result['distance'] = self._distance(some)
    return {self.label: result, self.reference: own}

  def _accuracies(
    self,
    items: Sequence[Item],
    images: Sequence[np.ndarray],
    judge: Judge,
  ) -> Categories:
    found: Categories = {}
    for category in self.categories:
      chosen = [i for i, item in enumerate(items) if item.category == category]
      shown = [self.scene(items[i]) for i in chosen]
      right = self._verdicts(
        category, shown, [images[i] for i in chosen], judge
      )
      found |= {name: scores.accuracy(v.tolist()) for name, v in right.items()}
    return found

  def _verdicts(
    self,
    category: str,
    shown: Sequence[Scene],
    images: Sequence[np.ndarray],
    judge: Judge,
  ) -> dict[str, np.ndarray]:
    """{score: whether each image is right} of the scenes of a category."""
    if category in ('pair', 'heldout_pair'):
      seen = judge.parts(images)
      every = zip(shown, seen, images)
      return {category: np.array([_pair_is_right(*one) for one in every])}
    if category == 'count':
      return {
        category: np.array(
          [count(image) == len(s.things) for s, image in zip(shown, images)]
        )
      }
    found = judge.icons(images)
    wanted = np.array([scene.things[0] for scene in shown])
    top5 = np.argsort(-found.max(2), axis=1)[:, :5]
    thing = top5[:, 0] == wanted
    styles = np.array([scene.style for scene in shown])
    style = found.max(1).argmax(1) == styles
    if category == 'heldout_style':
      return {category: thing & style}
    right = {
      category: thing,
      f'{category}_top5': (top5 == wanted[:, None]).any(1),
    }
    if category == 'single' and len(self.source.world.styles) > 1:
      # Where the caption leaves the style open, any is right.
      right['style'] = style[[self._says_style(scene) for scene in shown]]
    return right

  def _says_style(self, scene: Scene) -> bool:
    return (
      self.source.world.styles[scene.style].lower() in scene.caption.lower()
    )

  def _distance(
    self, generated: Mapping[str, Sequence[np.ndarray]]
  ) -> scores.Score:
    """FD-EffLite0 of {category: images} from renders of other such scenes."""
    world = dataclasses.replace(self.source.world, seed=SEED + 1)
    other = copy.copy(self.source)
    other.world = world
    images = (image for some in generated.values() for image in some)
    real = (
      other.render(other.scene(i, category))
      for category, some in generated.items()
      for i in range(REAL * len(some))
    )
    found = efflite0_scores(
      self.extractor.image(images), kept(self.extractor)(real)
    )
    n = sum(map(len, generated.values()))
    return found | {'n': n, 'n_real': (REAL - 1) * n}

  def provenance(self) -> dict[str, typing.Any]:
    return {
      'num': self.num,
      'scenes': f'seed {SEED}, split eval',
      'icons': self.source.fingerprint,
      'efficientnet_sha256': self.extractor.digest,
      'efficientnet_preprocessing': self.extractor.preprocessing,
    }


def _settings(data: Mapping[str, typing.Any]) -> Mapping[str, typing.Any]:
  """The settings of the icons that a model was trained on; {} if unknown.

  Args:
    data: section of its config; of a prepared set, its folder has them.
  """
  if data['kind'] == 'icons':
    return data
  for folder in sorted(glob.glob(str(data.get('path') or ''))):
    spec = pathlib.Path(folder) / SPEC
    if data['kind'] == 'arrayrecord' and spec.exists():
      settings = files.read_json(spec, error=DataError)['settings']
      return settings if settings['source'] == 'icons' else {}
  return {}


def _pair_is_right(
  scene: Scene, seen: np.ndarray, image: UInt8[np.ndarray, 'h w 3']
) -> bool:
  """Whether two parts are the two things, and on their sides if it matters."""
  first, second = scene.things
  if scene.relation is None:
    return {first, second} == set(seen.tolist())
  across = scene.relation in ('left of', 'right of')
  if halves(foreground(image))[2] != across:
    return False
  before = scene.relation in ('left of', 'above')
  return [first, second] == (seen if before else seen[::-1]).tolist()
