"""How the images of a prepared set are stored: as pixels, or compressed."""

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from imagen_jax.errors import UsageError, check_choice
from imagen_jax.io.decode import BadSample, opened, upright

# Pillow's options. Chroma is not subsampled in JPEG, which costs a quarter of
# the bytes and gains 4 dB; WebP cannot but subsample it.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
  'png': {},
  'jpeg': {'subsampling': 0},
  'webp': {},
}
KINDS = ('raw', *OPTIONS)
QUALITY = {'jpeg': 95, 'webp': 95}  # the defaults of the lossy ones
# Bytes a pixel, at most, in photographs of 64 pixels and more (docs/data.md).
BYTES = {'raw': 3.0, 'png': 2.1, 'jpeg': 1.1, 'webp': 0.6}


@dataclasses.dataclass(frozen=True)
class Encoding:
  """The format of stored images.

  Attributes:
    kind: 'raw' (the pixels), 'png' (lossless), 'jpeg' or 'webp'.
    quality: of JPEG or WebP, from 1 to 100; None for the others.

  Raises:
    UsageError: there is no such kind, or no such quality.
  """

  kind: str = 'raw'
  quality: int | None = None

  def __post_init__(self) -> None:
    check_choice('encode', self.kind, KINDS, key='encode')
    if self.quality is not None and self.kind not in QUALITY:
      raise UsageError(
        f'has no effect on {self.kind}, which is lossless.', key='quality'
      )
    if self.kind in QUALITY and not 1 <= (self.quality or 0) <= 100:
      raise UsageError(
        f'is {self.quality}; it must be from 1 to 100.', key='quality'
      )

  def encode(
    self,
    image: Image.Image | UInt8[np.ndarray, 'h w 3'],
    file: bytes | None = None,
  ) -> bytes:
    """An image as bytes.

    Args:
      image: as `decode.fitted` gives it.
      file: that it was decoded from; see `keeps`.
    """
    if self.kind == 'raw':
      return image.tobytes()
    if file is not None and self.keeps(image):
      return file
    if isinstance(image, np.ndarray):
      image = Image.fromarray(image)
    image.info = {}  # Pillow would write comments and profiles
    out = io.BytesIO()
    image.save(out, self.kind, **OPTIONS[self.kind], **self._quality)
    return out.getvalue()

  @property
  def _quality(self) -> dict[str, int]:
    return {} if self.quality is None else {'quality': self.quality}

  def keeps(self, image: Image.Image | np.ndarray) -> bool:
    """Whether the file of an image is kept as it is.

    It is if it is such a JPEG as this would write, of no more quality, and was
    not changed by decoding: encoded again, it would only lose.
    """
    if not isinstance(image, JpegImageFile) or self.kind != 'jpeg':
      return False
    plain = {name for name, _ in image.applist} <= {'APP0', 'APP14'}
    most = _tables(self.quality or 0)
    return (
      plain
      and 'progressive' not in image.info
      and all(
        (np.array(table) >= most[min(i, 1)]).all()
        for i, table in image.quantization.items()
      )
    )

  def decode(
    self, data: bytes | memoryview, height: int, width: int
  ) -> UInt8[np.ndarray, '{height} {width} 3']:
    """An image of that height and width, from bytes.

    Raises:
      ValueError, BadSample: they are not such an image.
    """
    shape = height, width, 3
    if self.kind == 'raw':
      return np.frombuffer(data, np.uint8).reshape(shape)
    with opened(bytes(data), min_side=1) as image:
      pixels = np.asarray(upright(image))
    if pixels.shape != shape:
      raise BadSample(f'it is not {width} pixels wide and {height} high')
    return pixels


@functools.cache
def _tables(quality: int) -> dict[int, list[int]]:
  """The quantization of brightness and of colour in JPEGs of a quality."""
  out = io.BytesIO()
  Image.new('RGB', (8, 8)).save(out, 'jpeg', quality=quality)
  with Image.open(out, formats=['JPEG']) as image:
    return image.quantization  # type: ignore[attr-defined]


RAW = Encoding()
