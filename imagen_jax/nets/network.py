"""What a network of a stage is; derive from it to bring your own."""

import flax.linen as nn

from imagen_jax.typing import AugLevel, Image, LogSNR, TextEmb, TextMask


class Network(nn.Module):
  """A denoiser: z, its log-SNR and a text give eps, v or x.

  A class needs `__call__` and, if it downsamples, `multiple`. `stage.net`
  holds its attributes; `resolution` (side of the stage's images in pixels) and
  `dtype` (activations' type) are filled in where the class has them.
  """

  @property
  def multiple(self) -> int:
    """Heights and widths of its images are multiples of this."""
    return 1

  def __call__(
    self,
    z: Image,
    logsnr: LogSNR,
    text: TextEmb,
    mask: TextMask,
    low_res: Image | None = None,
    aug_level: AugLevel | None = None,
    train: bool = False,
  ) -> Image:
    """Predicts eps, v or x, whichever it was trained for.

    Args:
      z: [B, H, W, 3] noisy images.
      logsnr: [B] their log-SNR.
      text: [B, L, D] text embeddings.
      mask: [B, L] bool, True at real tokens.
      low_res: [B, H, W, 3] upsampled low-resolution images, or None.
      aug_level: [B] in [0, 1], their noise augmentation, with `low_res` only.
      train: whether dropout is on (needs the 'dropout' rng).

    Returns:
      [B, H, W, 3] float32.
    """
    raise NotImplementedError
