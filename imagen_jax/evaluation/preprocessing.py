"""From images to the input of the Fréchet inception distance's network.

The score depends on how images are resized and rounded (Parmar et al. 2022), so
it is comparable only within one protocol. Each is that of the package of its
name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from imagen_jax.evaluation.inception import SIZE


def clean(
  images: UInt8[np.ndarray, 'b h w 3'],
) -> Float32[np.ndarray, 'b 299 299 3']:
  """Antialiased bicubic without rounding, then (x − 128) / 128."""

  def resized(channel: UInt8[np.ndarray, 'h w']) -> np.ndarray:
    image = Image.fromarray(channel.astype(np.float32))
    kernel = Image.Resampling.BICUBIC
    return np.asarray(image.resize((SIZE, SIZE), kernel)).clip(0, 255)

  x = [[resized(image[..., c]) for c in range(3)] for image in images]
  return (np.moveaxis(np.stack(x), 1, -1) - 128) / 128


@jax.jit
def pytorch_fid(
  images: UInt8[np.ndarray, 'b h w 3'] | UInt8[Array, 'b h w 3'],
) -> Float32[Array, 'b 299 299 3']:
  """Bilinear without antialiasing of x / 255, then 2x − 1."""
  x = jnp.asarray(images, jnp.float32) / 255
  shape = len(images), SIZE, SIZE, 3
  return 2 * jax.image.resize(x, shape, 'linear', antialias=False) - 1


# Of `--fid_mode`.
MODES: dict[str, Callable] = {'clean': clean, 'pytorch-fid': pytorch_fid}
