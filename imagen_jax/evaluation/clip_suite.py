"""Suite clip: the CLIP score of images generated from a user's prompts."""

import collections
import dataclasses
import pathlib
import typing

from imagen_jax.errors import UsageError
from imagen_jax.evaluation import distances, scores
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.extractors import TextExtractor, load_clip
from imagen_jax.evaluation.generation import read_images
from imagen_jax.evaluation.prompts_suite import Prompts
from imagen_jax.evaluation.scores import Categories
from imagen_jax.evaluation.suite import Records


@dataclasses.dataclass(frozen=True)
class ClipScore(Prompts):
  """Mean CLIP score by category, see `distances.clip_scores`.

  Attributes:
    extractor: CLIP.
  """

  extractor: TextExtractor
  label = 'clip'
  uses = (*Prompts.uses, 'clip')

  @classmethod
  def from_config(cls, config: EvalConfig, resolution: int) -> 'ClipScore':
    prompts = Prompts.from_config(config, resolution)
    if not config.clip:
      raise UsageError(
        'clip is not set; suite clip needs the folder of a CLIP model in '
        'Hugging Face layout.',
        key='clip',
      )
    return cls(prompts.listed, prompts.num_images, load_clip(config.clip))

  def heading(self) -> tuple[str, str]:
    return 'CLIP score', (
      '100 times the cosine of image and prompt, with 95 % intervals.'
    )

  def score(
    self, folder: pathlib.Path, records: Records
  ) -> dict[str, Categories]:
    items = self.items()
    images = self.extractor.image(read_images(folder, records, items))
    texts = self.extractor.text([item.prompt for item in items])
    values = distances.clip_scores(images, texts)
    by_category = collections.defaultdict(list)
    for item, value in zip(items, values):
      by_category[item.category].append(value)
    result = {name: scores.mean(v) for name, v in by_category.items()}
    return {self.label: result | {'overall': scores.mean(values)}}

  def provenance(self) -> dict[str, typing.Any]:
    return super().provenance() | {
      'clip_sha256': self.extractor.digest,
      'clip_preprocessing': self.extractor.preprocessing,
    }
