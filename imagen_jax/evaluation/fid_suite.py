"""Suite fid: the distance between generated and real images."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import random
import typing
from collections.abc import Mapping

import numpy as np

from imagen_jax.data.source import Source
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from imagen_jax.evaluation import distances
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.distances import FeaturesA, FeaturesB
from imagen_jax.evaluation.extractors import (
  Extractor,
  TextExtractor,
  load_clip,
  load_efficientnet,
  load_inception,
)
from imagen_jax.evaluation.generation import read_images
from imagen_jax.evaluation.scores import Categories, Score
from imagen_jax.evaluation.suite import Item, Records, Suite, digest, number
from imagen_jax.io import files
from imagen_jax.io.decode import RESIZING

SAMPLE = 16  # real images, at least, whose pixels identify the set


@dataclasses.dataclass(frozen=True)
class Fid(Suite):
  """The paper's zero-shot FID protocol (Section 3).

  `num` captions are chosen at random. The images generated from them are
  compared with all real images, cropped square and downsampled to the model's
  resolution.

  Attributes:
    source: of the real images, see `data.sources`.
    num: number of captions.
    seed: of the choice of captions.
    inception: `Extractor` for the Fréchet distance, KID, precision, recall.
    efficientnet: `Extractor` for the distance in its features, FD-EffLite0.
    clip: `TextExtractor` for CMMD and the CLIP score.
    settings: JSON-ready, what `source` was made from.
  """

  source: Source
  num: int
  seed: int
  inception: Extractor | None = None
  efficientnet: Extractor | None = None
  clip: TextExtractor | None = None
  settings: Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)
  label = 'fid'
  uses = (
    'num',
    'data',
    'source',
    'inception',
    'fid_mode',
    'efficientnet',
    'clip',
  )

  @classmethod
  def from_config(cls, config: EvalConfig, resolution: int) -> 'Fid':
    if not config.data:
      raise UsageError(
        'data is not set; suite fid needs a folder of real images with '
        'captions.',
        key='data',
      )
    if not (config.inception or config.efficientnet or config.clip):
      raise UsageError(
        'none of inception, efficientnet and clip is set; suite fid needs the '
        'weights of a network to compare images with.',
        key='inception',
      )
    if not config.inception and config.fid_mode != EvalConfig.fid_mode:
      raise UsageError(
        'fid_mode has no effect without inception; leave it out.',
        key='fid_mode',
      )
    inception = efficientnet = clip = None
    if config.inception:
      inception = load_inception(config.inception, config.fid_mode)
    if config.efficientnet:
      efficientnet = load_efficientnet(config.efficientnet)
    if config.clip:
      clip = load_clip(config.clip)
    settings: dict[str, typing.Any] = {
      'kind': config.source,
      'path': os.fspath(config.data),
      'size': resolution,
      'split': 'train',
      'resize': 'area',
    }
    source = make_source(**settings)
    num = config.num or 30_000
    networks = inception, efficientnet, clip
    return cls(source, num, config.seed, *networks, settings)

  def heading(self) -> tuple[str, str]:
    return 'Distance from real images', (
      'Lower is better for the Fréchet distance, KID and CMMD; higher is '
      'better for precision, recall and CLIP score.'
    )

  @functools.cached_property
  def captions(self) -> list[str]:
    """The captions to generate from."""
    total = len(self.source)
    chosen = random.Random(self.seed).sample(range(total), min(self.num, total))
    return [self.source.caption(i) for i in chosen]

  def items(self) -> list[Item]:
    return number(('all', caption) for caption in self.captions)

  def digest(self) -> str:
    return digest(self.captions)

  def score(
    self, folder: pathlib.Path, records: Records
  ) -> dict[str, Categories]:
    items = self.items()
    result: Score = {}

    def features(extractor: Extractor) -> tuple[FeaturesA, FeaturesB]:
      generated = extractor.image(read_images(folder, records, items))
      return generated, self._real(folder, extractor)

    frechet = self.inception or self.efficientnet
    if frechet and min(len(items), len(self.source)) < 4:
      raise DataError(
        f'{len(items)} generated and {len(self.source)} real images are too '
        'few to compare; raise num, or give more data.'
      )
    if self.inception:
      result |= _inception_scores(*features(self.inception))
    if self.efficientnet:
      result |= efflite0_scores(*features(self.efficientnet))
    if self.clip:
      generated, real = features(self.clip)
      result['cmmd'] = distances.cmmd(generated, real)
      texts = self.clip.text([item.prompt for item in items])
      result['clip_score'] = float(
        distances.clip_scores(generated, texts).mean()
      )
    result |= {'n': len(items), 'n_real': len(self.source)}
    return {'fid': {'all': result}}

  @functools.cached_property
  def real(self) -> dict[str, typing.Any]:
    """All that the real images depend on."""
    count, pixels = len(self.source), hashlib.sha256()
    for i in range(0, count, max(1, count // SAMPLE)):
      pixels.update(self.source[i]['image'].tobytes())
    return {
      **self.settings,
      'resizing': RESIZING,
      'count': count,
      'fingerprint': self.source.fingerprint,
      # Not every source's fingerprint covers the pixels.
      'sample_sha256': pixels.hexdigest(),
    }

  def _real(self, folder: pathlib.Path, extractor: Extractor) -> FeaturesB:
    """Features of all real images, cached for the next run of a sweep."""
    key = digest([self.real, extractor.digest, extractor.preprocessing])
    path = folder.parent / f'real-{key}.npy'
    if path.exists():
      return np.load(path, allow_pickle=False)
    features = extractor.image(
      self.source[i]['image'] for i in range(len(self.source))
    )
    with files.replacing(path) as temporary, temporary.open('wb') as file:
      np.save(file, features)
    return features

  def provenance(self) -> dict[str, typing.Any]:
    found = {'num': self.num, 'real': self.real}
    for name in ('inception', 'efficientnet', 'clip'):
      if extractor := getattr(self, name):
        found[f'{name}_sha256'] = extractor.digest
        found[f'{name}_preprocessing'] = extractor.preprocessing
    return found

  def notes(self, resolution: int) -> list[str]:
    few = min(self.num, len(self.source))
    if few >= 10_000:
      return []
    return [
      f'{few} images bias the Fréchet distance upwards; compare it only with '
      'values of the same number. The paper uses 30000.'
    ]


def efflite0_scores(generated: FeaturesA, real: FeaturesB) -> Score:
  """The Fréchet distance in EfficientNet-Lite0's features; it is no FID.

  Of the real images as many as were generated, but at most half, are set aside.
  `real_against_real` is their distance from the others, the floor of that of
  the generated ones from the same others.
  """
  number = min(len(generated), len(real) // 2)
  order = np.random.default_rng(0).permutation(len(real))
  some, others = real[order[:number]], real[order[number:]]
  between = lambda a, b: distances.frechet(
    *distances.moments(a), *distances.moments(b)
  )
  return {
    'FD-EffLite0': between(generated, others),
    'FD-EffLite0 real_against_real': between(some, others),
  }


def _inception_scores(generated: FeaturesA, real: FeaturesB) -> Score:
  kid, kid_sd = distances.kid(generated, real)
  precision, recall = distances.precision_recall(real, generated)
  moments = *distances.moments(generated), *distances.moments(real)
  return {
    'frechet': distances.frechet(*moments),
    'kid': kid,
    'kid_sd': kid_sd,
    'precision': precision,
    'recall': recall,
  }
