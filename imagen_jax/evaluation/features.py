"""Features of many images, a block of them in memory at a time."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from imagen_jax.evaluation.extractors import Extractor
from imagen_jax.evaluation.generation import read_image
from imagen_jax.evaluation.suite import Item, Records

BLOCK = 256  # images in memory at a time


def image_features(
  extractor: Extractor, images: Iterable[UInt8[np.ndarray, 'h w 3']]
) -> Float[np.ndarray, 'n d']:
  """Features of images, at least one."""
  found, block = [], []
  for image in images:
    block.append(image)
    if len(block) == BLOCK:
      found.append(extractor.image(np.stack(block)))
      block = []
  if block:
    found.append(extractor.image(np.stack(block)))
  return np.concatenate(found)


def generated_features(
  extractor: Extractor,
  folder: pathlib.Path,
  records: Records,
  items: Sequence[Item],
) -> Float[np.ndarray, 'n d']:
  """Features of the images of a run's items, in their order."""
  return image_features(
    extractor,
    (read_image(folder, records[x.category, x.number]) for x in items),
  )


def cosine_scores(
  images: Float[np.ndarray, 'n d'], texts: Float[np.ndarray, 'n d']
) -> Float[np.ndarray, ' n']:
  """CLIP score of each pair: 100 · max(cosine, 0) (Hessel et al. 2021)."""
  images = images / np.linalg.norm(images, axis=1, keepdims=True)
  texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
  return 100 * np.maximum((images * texts).sum(1), 0)
