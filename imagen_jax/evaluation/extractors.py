"""The networks in whose feature space images are compared.

The user brings the weights: a file for Inception, a Hugging Face folder for
CLIP. The provenance of each score includes their digest.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import typing
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagen_jax.errors import check_choice
from imagen_jax.evaluation import clip, efficientnet, inception
from imagen_jax.evaluation.inception import MODES
from imagen_jax.evaluation.weights import read_tensors, with_weights
from imagen_jax.io import files, paths
from imagen_jax.text.tokenizer import load_tokenizer

BATCH = 16
CHUNK = 16 * BATCH  # images whose features are kept in one file
VERSION = 1  # of the networks here; in the names of kept features

Images = Iterable[UInt8[np.ndarray, 'h w 3']]
Features = Float[np.ndarray, 'n d']


@dataclasses.dataclass(frozen=True)
class Extractor:
  """A network with its weights.

  Attributes:
    image: N images, read a batch at a time -> float32 [N, D].
    digest: sha256 of the weights' file, 64 hex digits.
    preprocessing: how images become the network's input.
  """

  image: Callable[[Images], Features]
  digest: str
  preprocessing: str


@dataclasses.dataclass(frozen=True)
class TextExtractor(Extractor):
  """CLIP, which embeds prompts in the same space as images.

  Attributes:
    text: N prompts -> float32 [N, D].
  """

  text: Callable[[list[str]], Features]


def load_inception(path: str | os.PathLike, mode: str = 'clean') -> Extractor:
  """The FID's InceptionV3, from a file of the usual converted weights.

  Args:
    path: of the file.
    mode: one of `inception.MODES`.

  Raises:
    UsageError: there is no such mode.
    ModelError: the file cannot be read or is of another network.
  """
  check_choice('fid_mode', mode, MODES, key='fid_mode')
  tensors, digest = read_tensors(path)
  module, size = inception.InceptionV3(), inception.SIZE
  # fc belongs to the classifier; num_batches_tracked counts training steps.
  ignored = ('fc.', 'AuxLogits.', '.num_batches_tracked')
  apply = with_weights(module, _image(size), tensors, path, ignored=ignored)
  image = lambda batch: apply(MODES[mode](batch))
  return Extractor(_batched(image), digest, mode)


def load_efficientnet(path: str | os.PathLike) -> Extractor:
  """EfficientNet-Lite0, from a file of its weights as safetensors.

  Raises:
    ModelError: the file cannot be read or is of another network.
  """
  tensors, digest = read_tensors(path)
  module, size = efficientnet.EfficientNetLite0(), efficientnet.SIZE
  ignored = ('_fc.', '.num_batches_tracked')
  apply = with_weights(module, _image(size), tensors, path, ignored=ignored)

  mean, std = (
    np.array(x, np.float32) for x in (efficientnet.MEAN, efficientnet.STD)
  )

  def image(batch: np.ndarray) -> jax.Array:
    return apply((_resized(batch, size).astype(np.float32) - mean) / std)

  preprocessing = f'Pillow bicubic to {size}, rounded'
  return Extractor(_batched(image), digest, preprocessing)


def load_clip(folder: str | os.PathLike) -> TextExtractor:
  """CLIP from a Hugging Face folder: config, weights, tokenizer.

  Raises:
    ModelError: one of its files is missing, broken or of another model.
  """
  folder = pathlib.Path(folder)
  vision, text = clip.read_config(folder / 'config.json')
  path = folder / 'model.safetensors'
  if not path.exists() and (folder / 'model.npz').exists():
    path = folder / 'model.npz'
  tensors, digest = read_tensors(path)
  shared, length = ('logit_scale', 'position_ids'), text.max_position_embeddings
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  embed_image = with_weights(
    vision, _image(vision.image_size), tensors, path, ignored=(*shared, 'text_')
  )
  embed_text = with_weights(
    text, ids, tensors, path, ignored=(*shared, 'vision_', 'visual_')
  )
  tokenizer = load_tokenizer(folder)

  def image(batch: np.ndarray) -> jax.Array:
    x = _resized(batch, vision.image_size).astype(np.float32) / 255
    x = (x - np.array(clip.MEAN, np.float32)) / np.array(clip.STD, np.float32)
    return embed_image(x)

  encode = _batched(embed_text)
  return TextExtractor(
    image=_batched(image),
    digest=digest,
    preprocessing=f'Pillow bicubic to {vision.image_size}, rounded',
    text=lambda prompts: encode(tokenizer(prompts, length)[0]),
  )


def kept(extractor: Extractor) -> Callable[[Images], Features]:
  """As `extractor.image`, with memory: for images that are compared again.

  The user's cache directory has the features of every `CHUNK` images, under a
  digest of their pixels and of the network.
  """
  base = paths.cache_folder()
  if base is None:
    return extractor.image

  def one(images: list[UInt8[np.ndarray, 'h w 3']]) -> Features:
    digest = hashlib.sha256(
      f'{VERSION} {extractor.digest} {extractor.preprocessing}'.encode()
    )
    for image in images:
      digest.update(f'{image.shape}'.encode() + image.tobytes())
    path = base / 'features' / f'{digest.hexdigest()[:24]}.npy'
    with contextlib.suppress(OSError, ValueError, EOFError):
      found = np.load(path, allow_pickle=False)
      if len(found) == len(images):
        return found
    found = extractor.image(images)
    with contextlib.suppress(OSError):  # a full or read-only disk
      with files.replacing(path) as temporary, temporary.open('wb') as file:
        np.save(file, found)
    return found

  def image(images: Images) -> Features:
    rows, found = iter(images), []
    while chunk := list(itertools.islice(rows, CHUNK)):
      found.append(one(chunk))
    return np.concatenate(found)

  return image


def _image(size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
  """uint8 [N, H, W, 3] resized, and rounded to uint8 again."""
  if images.shape[1:3] == (size, size):
    return images
  resample = Image.Resampling.BICUBIC
  shown = (Image.fromarray(x).resize((size, size), resample) for x in images)
  return np.stack([np.asarray(image) for image in shown])


def _batched(
  function: Callable[[np.ndarray], jax.Array],
) -> Callable[[typing.Any], Features]:
  """Applies `function` to any number of rows, in padded batches of `BATCH`."""

  def all_rows(rows: Iterable[np.ndarray]) -> np.ndarray:
    rows, found = iter(rows), []
    while chunk := list(itertools.islice(rows, BATCH)):
      fill = [chunk[-1]] * (BATCH - len(chunk))
      out = function(np.stack(chunk + fill))
      found.append(np.asarray(out, np.float32)[: len(chunk)])
    return np.concatenate(found)

  return all_rows
