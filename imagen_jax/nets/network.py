"""The base class of a stage's network; derive from it to add your own."""

import flax.linen as nn

from imagen_jax.typing import AugLevel, Image, LogSNR, TextEmb, TextMask


class Network(nn.Module):
  """A denoiser: predicts eps, v or x from z, its log-SNR and the text.

  A class needs `__call__` and, if it downsamples, `multiple`. The config's
  `stage.net` sets its attributes; `resolution` (side of the stage's images in
  pixels) and `dtype` (of the activations) are filled in if the class has them.
  """

  @property
  def multiple(self) -> int:
    """Height and width of the images must be multiples of this."""
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
