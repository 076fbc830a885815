"""InceptionV3 as the Fréchet inception distance uses it (Szegedy et al. 2016).

The network of the original FID (Heusel et al. 2017): its average pooling
excludes the padding, and its last block uses max pooling where InceptionV3 uses
average pooling. Parameters have the names and layouts of the usual converted
weights: 94 convolutions of five tensors each.

The score also depends on how images are resized and rounded (Parmar et al.
2022), so it is comparable only within one of `MODES`. Each is that of the
package of its name.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

SIZE = 299

Maps = Float[Array, 'b _ _ _']
Kernel = int | tuple[int, int]  # one side, or height and width
Step = tuple[str, int, Kernel]  # (suffix of the name, features, kernel)
ROW, COLUMN = (1, 7), (7, 1)


class InceptionV3(nn.Module):
  """Images in [−1, 1] to the 2048 pooled features."""

  @nn.compact
  def __call__(self, x: Float[Array, 'b 299 299 3']) -> Float[Array, 'b 2048']:
    x = self._conv('Conv2d_1a_3x3', x, 32, 3, stride=2, padding='VALID')
    x = self._conv('Conv2d_2a_3x3', x, 32, 3, padding='VALID')
    x = self._conv('Conv2d_2b_3x3', x, 64, 3)
    x = _max(x, 2)
    x = self._conv('Conv2d_3b_1x1', x, 80, 1)
    x = self._conv('Conv2d_4a_3x3', x, 192, 3, padding='VALID')
    x = _max(x, 2)
    for name, pool in (('5b', 32), ('5c', 64), ('5d', 64)):
      x = self._mixed_a(f'Mixed_{name}', x, pool)
    x = self._mixed_b('Mixed_6a', x)
    for name, width in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      x = self._mixed_c(f'Mixed_{name}', x, width)
    x = self._mixed_d('Mixed_7a', x)
    x = self._mixed_e('Mixed_7b', x, _mean)
    x = self._mixed_e('Mixed_7c', x, lambda x: _max(x, 1, 'SAME'))
    return x.mean((1, 2))

  def _conv(
    self,
    name: str,
    x: Maps,
    features: int,
    kernel: Kernel,
    *,
    stride: int = 1,
    padding: str = 'SAME',
  ) -> Maps:
    """Convolution without bias, batch norm with fixed statistics, ReLU."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    normal, ones = nn.initializers.he_normal(), nn.initializers.ones
    weight = self.param(
      f'{name}.conv.weight', normal, (features, x.shape[-1], *sides)
    )
    scale, bias, mean, var = (
      self.param(f'{name}.bn.{part}', ones, (features,))
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    x = jax.lax.conv_general_dilated(
      x,
      weight,
      (stride, stride),
      padding,
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
      precision='highest',
    )
    scale = scale * jax.lax.rsqrt(var + 1e-3)
    return jax.nn.relu((x - mean) * scale + bias)

  def _chain(self, name: str, x: Maps, *steps: Step) -> Maps:
    """A sequence of convolutions."""
    for suffix, features, kernel in steps:
      x = self._conv(f'{name}.{suffix}', x, features, kernel)
    return x

  def _half(self, name: str, x: Maps, features: int) -> Maps:
    """A convolution that halves the resolution."""
    return self._conv(name, x, features, 3, stride=2, padding='VALID')

  def _mixed_a(self, name: str, x: Maps, pool: int) -> Maps:
    a = self._chain(name, x, ('branch1x1', 64, 1))
    b = self._chain(name, x, ('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5))
    c = self._chain(
      name,
      x,
      ('branch3x3dbl_1', 64, 1),
      ('branch3x3dbl_2', 96, 3),
      ('branch3x3dbl_3', 96, 3),
    )
    pooled = self._conv(f'{name}.branch_pool', _mean(x), pool, 1)
    return jnp.concatenate([a, b, c, pooled], -1)

  def _mixed_b(self, name: str, x: Maps) -> Maps:
    a = self._half(f'{name}.branch3x3', x, 384)
    b = self._chain(
      name, x, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3)
    )
    b = self._half(f'{name}.branch3x3dbl_3', b, 96)
    return jnp.concatenate([a, b, _max(x, 2)], -1)

  def _mixed_c(self, name: str, x: Maps, width: int) -> Maps:
    a = self._chain(name, x, ('branch1x1', 192, 1))
    b = self._chain(
      name,
      x,
      ('branch7x7_1', width, 1),
      ('branch7x7_2', width, ROW),
      ('branch7x7_3', 192, COLUMN),
    )
    c = self._chain(
      name,
      x,
      ('branch7x7dbl_1', width, 1),
      ('branch7x7dbl_2', width, COLUMN),
      ('branch7x7dbl_3', width, ROW),
      ('branch7x7dbl_4', width, COLUMN),
      ('branch7x7dbl_5', 192, ROW),
    )
    pooled = self._conv(f'{name}.branch_pool', _mean(x), 192, 1)
    return jnp.concatenate([a, b, c, pooled], -1)

  def _mixed_d(self, name: str, x: Maps) -> Maps:
    a = self._conv(f'{name}.branch3x3_1', x, 192, 1)
    a = self._half(f'{name}.branch3x3_2', a, 320)
    b = self._chain(
      name,
      x,
      ('branch7x7x3_1', 192, 1),
      ('branch7x7x3_2', 192, ROW),
      ('branch7x7x3_3', 192, COLUMN),
    )
    b = self._half(f'{name}.branch7x7x3_4', b, 192)
    return jnp.concatenate([a, b, _max(x, 2)], -1)

  def _mixed_e(self, name: str, x: Maps, pool: Callable[[Maps], Maps]) -> Maps:
    one = self._conv(f'{name}.branch1x1', x, 320, 1)
    a = self._conv(f'{name}.branch3x3_1', x, 384, 1)
    b = self._chain(
      name, x, ('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3)
    )
    sides = [
      self._conv(f'{name}.{branch}{side}', h, 384, kernel)
      for branch, h in (('branch3x3_2', a), ('branch3x3dbl_3', b))
      for side, kernel in (('a', (1, 3)), ('b', (3, 1)))
    ]
    pooled = self._conv(f'{name}.branch_pool', pool(x), 192, 1)
    return jnp.concatenate([one, *sides, pooled], -1)


def _max(x: Maps, stride: int, padding: str = 'VALID') -> Maps:
  """3×3 max pooling."""
  return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean(x: Maps) -> Maps:
  """3×3 average pooling with stride 1, excluding the padding."""
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


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
