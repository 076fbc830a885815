"""InceptionV3 as the Fréchet inception distance uses it (Szegedy et al. 2016).

The network of the original FID (Heusel et al. 2017): its average pooling
excludes the padding, and its last block uses max pooling where InceptionV3 uses
average pooling. Parameters have the names and layouts of the usual converted
weights: 94 convolutions of five tensors each.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIZE = 299

Maps = Float[Array, 'b _ _ _']
Pair = tuple[int, int]  # along height and width
# (suffix of the name, features, kernel, padding)
Step = tuple[str, int, int | Pair, int | Pair]


class InceptionV3(nn.Module):
  """Images in [−1, 1] to the 2048 pooled features."""

  @nn.compact
  def __call__(self, x: Float[Array, 'b 299 299 3']) -> Float[Array, 'b 2048']:
    x = self._conv('Conv2d_1a_3x3', x, 32, 3, stride=2)
    x = self._conv('Conv2d_2a_3x3', x, 32, 3)
    x = self._conv('Conv2d_2b_3x3', x, 64, 3, pad=1)
    x = _max(x, 2)
    x = self._conv('Conv2d_3b_1x1', x, 80, 1)
    x = self._conv('Conv2d_4a_3x3', x, 192, 3)
    x = _max(x, 2)
    for name, pool in (('5b', 32), ('5c', 64), ('5d', 64)):
      x = self._mixed_a(f'Mixed_{name}', x, pool)
    x = self._mixed_b('Mixed_6a', x)
    for name, width in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      x = self._mixed_c(f'Mixed_{name}', x, width)
    x = self._mixed_d('Mixed_7a', x)
    x = self._mixed_e('Mixed_7b', x, _mean)
    x = self._mixed_e('Mixed_7c', x, lambda x: _max(x, 1, 1))
    return x.mean((1, 2))

  def _conv(
    self,
    name: str,
    x: Maps,
    features: int,
    kernel: int | Pair,
    *,
    stride: int = 1,
    pad: int | Pair = 0,
  ) -> Maps:
    """Convolution without bias, batch norm with fixed statistics, ReLU."""
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = (pad, pad) if isinstance(pad, int) else pad
    normal, ones = nn.initializers.he_normal(), nn.initializers.ones
    weight = self.param(
      f'{name}.conv.weight', normal, (features, x.shape[-1], high, wide)
    )
    scale, bias, mean, var = (
      self.param(f'{name}.bn.{part}', ones, (features,))
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    x = jax.lax.conv_general_dilated(
      x,
      weight,
      (stride, stride),
      [(p, p) for p in pads],
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
      precision='highest',
    )
    scale = scale * jax.lax.rsqrt(var + 1e-3)
    return jax.nn.relu((x - mean) * scale + bias)

  def _chain(self, name: str, x: Maps, *steps: Step) -> Maps:
    """A sequence of convolutions."""
    for suffix, features, kernel, pad in steps:
      x = self._conv(f'{name}.{suffix}', x, features, kernel, pad=pad)
    return x

  def _mixed_a(self, name: str, x: Maps, pool: int) -> Maps:
    branches: tuple[list[Step], ...] = (
      [('branch1x1', 64, 1, 0)],
      [('branch5x5_1', 48, 1, 0), ('branch5x5_2', 64, 5, 2)],
      [
        ('branch3x3dbl_1', 64, 1, 0),
        ('branch3x3dbl_2', 96, 3, 1),
        ('branch3x3dbl_3', 96, 3, 1),
      ],
    )
    parts = [self._chain(name, x, *steps) for steps in branches]
    parts.append(self._conv(f'{name}.branch_pool', _mean(x), pool, 1))
    return jnp.concatenate(parts, -1)

  def _mixed_b(self, name: str, x: Maps) -> Maps:
    a = self._conv(f'{name}.branch3x3', x, 384, 3, stride=2)
    b = self._chain(
      name, x, ('branch3x3dbl_1', 64, 1, 0), ('branch3x3dbl_2', 96, 3, 1)
    )
    b = self._conv(f'{name}.branch3x3dbl_3', b, 96, 3, stride=2)
    return jnp.concatenate([a, b, _max(x, 2)], -1)

  def _mixed_c(self, name: str, x: Maps, width: int) -> Maps:
    row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
    branches: tuple[list[Step], ...] = (
      [('branch1x1', 192, 1, 0)],
      [
        ('branch7x7_1', width, 1, 0),
        ('branch7x7_2', width, *row),
        ('branch7x7_3', 192, *column),
      ],
      [
        ('branch7x7dbl_1', width, 1, 0),
        ('branch7x7dbl_2', width, *column),
        ('branch7x7dbl_3', width, *row),
        ('branch7x7dbl_4', width, *column),
        ('branch7x7dbl_5', 192, *row),
      ],
    )
    parts = [self._chain(name, x, *steps) for steps in branches]
    parts.append(self._conv(f'{name}.branch_pool', _mean(x), 192, 1))
    return jnp.concatenate(parts, -1)

  def _mixed_d(self, name: str, x: Maps) -> Maps:
    a = self._conv(f'{name}.branch3x3_1', x, 192, 1)
    a = self._conv(f'{name}.branch3x3_2', a, 320, 3, stride=2)
    b = self._chain(
      name,
      x,
      ('branch7x7x3_1', 192, 1, 0),
      ('branch7x7x3_2', 192, (1, 7), (0, 3)),
      ('branch7x7x3_3', 192, (7, 1), (3, 0)),
    )
    b = self._conv(f'{name}.branch7x7x3_4', b, 192, 3, stride=2)
    return jnp.concatenate([a, b, _max(x, 2)], -1)

  def _mixed_e(self, name: str, x: Maps, pool: Callable[[Maps], Maps]) -> Maps:
    one = self._conv(f'{name}.branch1x1', x, 320, 1)
    a = self._conv(f'{name}.branch3x3_1', x, 384, 1)
    b = self._chain(
      name, x, ('branch3x3dbl_1', 448, 1, 0), ('branch3x3dbl_2', 384, 3, 1)
    )
    sides = [
      self._conv(f'{name}.{branch}{side}', h, 384, kernel, pad=pad)
      for branch, h, letters in (
        ('branch3x3_2', a, 'ab'),
        ('branch3x3dbl_3', b, 'ab'),
      )
      for side, kernel, pad in zip(letters, ((1, 3), (3, 1)), ((0, 1), (1, 0)))
    ]
    pooled = self._conv(f'{name}.branch_pool', pool(x), 192, 1)
    return jnp.concatenate([one, *sides, pooled], -1)


def _max(x: Maps, stride: int, pad: int = 0) -> Maps:
  """3×3 max pooling."""
  return jax.lax.reduce_window(
    x,
    -jnp.inf,
    jax.lax.max,
    (1, 3, 3, 1),
    (1, stride, stride, 1),
    ((0, 0), (pad, pad), (pad, pad), (0, 0)),
  )


def _mean(x: Maps) -> Maps:
  """3×3 average pooling with stride 1, excluding the padding."""

  def total(x: Maps) -> Maps:
    return jax.lax.reduce_window(
      x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), 'SAME'
    )

  return total(x) / total(jnp.ones_like(x[:1, :, :, :1]))
