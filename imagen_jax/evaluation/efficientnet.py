"""EfficientNet-Lite0, a classifier of ImageNet, as a source of features.

EfficientNet (Tan and Le 2019) without squeeze and excitation and with ReLU6.
Parameters have the names and layouts of the published PyTorch weights.

Images are normalised by ImageNet's mean and standard deviation. Google's lite
models take (x − 127) / 128; but of 60 icons in two styles whose names are
ImageNet's, these weights have 17.5 % right at once and 39 % among the first
five in this way, and 12.5 % and 28 % in that.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIZE = 224
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Maps = Float[Array, 'b _ _ _']
# (kernel, stride of the first, expansion, features, number) of the blocks.
BLOCKS = (
  (3, 1, 1, 16, 1),
  (3, 2, 6, 24, 2),
  (5, 2, 6, 40, 2),
  (3, 2, 6, 80, 3),
  (5, 1, 6, 112, 3),
  (5, 2, 6, 192, 4),
  (3, 1, 6, 320, 1),
)


class EfficientNetLite0(nn.Module):
  """Normalised images to the 1280 pooled features."""

  @nn.compact
  def __call__(self, x: Float[Array, 'b 224 224 3']) -> Float[Array, 'b 1280']:
    x = self._conv('_conv_stem', '_bn0', x, 32, 3, stride=2)
    number = 0
    for kernel, stride, expansion, features, repeats in BLOCKS:
      for repeat in range(repeats):
        first = stride if repeat == 0 else 1
        name = f'_blocks.{number}.'
        x = self._block(name, x, features, expansion, (kernel, first))
        number += 1
    return self._conv('_conv_head', '_bn1', x, 1280, 1).mean((1, 2))

  def _block(
    self,
    name: str,
    x: Maps,
    features: int,
    expansion: int,
    depthwise: tuple[int, int],
  ) -> Maps:
    """An inverted residual; `depthwise` is (kernel, stride)."""
    h, width = x, expansion * x.shape[-1]
    if expansion != 1:
      h = self._conv(f'{name}_expand_conv', f'{name}_bn0', h, width, 1)
    kernel, stride = depthwise
    h = self._conv(
      f'{name}_depthwise_conv',
      f'{name}_bn1',
      h,
      width,
      kernel,
      stride=stride,
      groups=width,
    )
    h = self._conv(
      f'{name}_project_conv', f'{name}_bn2', h, features, 1, linear=True
    )
    return h + x if h.shape == x.shape else h

  def _conv(
    self,
    name: str,
    norm: str,
    x: Maps,
    features: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    linear: bool = False,
  ) -> Maps:
    """Convolution without bias, batch norm with fixed statistics, ReLU6."""
    normal, ones = nn.initializers.he_normal(), nn.initializers.ones
    shape = features, x.shape[-1] // groups, kernel, kernel
    weight = self.param(f'{name}.weight', normal, shape)
    scale, bias, mean, var = (
      self.param(f'{norm}.{part}', ones, (features,))
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    x = jax.lax.conv_general_dilated(
      x,
      weight,
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
      feature_group_count=groups,
      precision='highest',
    )
    x = (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias
    return x if linear else jnp.clip(x, 0, 6)
