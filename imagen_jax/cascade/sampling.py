"""Images from a stage."""

import jax
import jax.numpy as jnp

from imagen_jax.cascade.conditioning import low_res_input, null_where
from imagen_jax.diffusion import guidance, process, samplers
from imagen_jax.errors import UsageError


def network(stage, params, text, mask, extra=()):
  """`f(z, logsnr, branch)` for `diffusion.guidance.guided`.

  branch: 'cond', or 'both', which runs the conditional model and the null
  condition as one batch of 2B rows and returns the pair.
  """

  def apply(z, logsnr, branch):
    if branch == 'both':
      both = _twice((z, logsnr, text, mask, *extra))
      dropped = jnp.arange(2 * z.shape[0]) >= z.shape[0]
      hidden = null_where(dropped, both[2], both[3])
      out = stage.net.apply({'params': params}, *both[:2], *hidden, *both[4:])
      return out[: z.shape[0]], out[z.shape[0] :]
    return stage.net.apply({'params': params}, z, logsnr, text, mask, *extra)

  return apply


def _twice(arrays):
  return [jnp.concatenate([a, a], axis=0) for a in arrays]


def sample(
  stage,
  params,
  keys,
  text,
  mask,
  low,
  weight,
  level,
  image=None,
  inpaint_mask=None,
  *,
  settings,
):
  """Generates images from a stage; one compiled loop over the steps.

  Args:
    stage: the stage.
    params: its parameters.
    keys: [B] keys, one per image.
    text: [B, L, D] embeddings.
    mask: [B, L] bool.
    low: [B, h, w, 3] in [−1, 1] for a super-resolution stage, else None.
    weight: guidance w, a scalar; ignored unless `settings.guidance` ≠ 1.
    level: augmentation level, a scalar.
    image: [B, H, W, 3] in [−1, 1], an image to start from at
      `settings.strength`; its shape is the result's.
    inpaint_mask: [B, H, W, 1], with `image`: 1 where to inpaint, 0 where to
      keep it.
    settings: `Sampling`; all but its guidance and aug_level are compiled in.

  Returns:
    [B, R, R, 3] float32 in [−1, 1]; H and W of `image` or of an upsampled
    `low` that is no square.
  """
  batch = text.shape[0]
  height = width = stage.resolution
  if image is not None:
    height, width = image.shape[1:3]
  extra = ()
  if low is not None:
    factor = stage.resolution // stage.low_resolution
    height, width = low.shape[1] * factor, low.shape[2] * factor
    level = jnp.full((batch,), level, jnp.float32)
    eps = jax.vmap(
      lambda key: jax.random.normal(
        jax.random.fold_in(key, 1), low.shape[1:], jnp.float32
      )
    )(keys)
    # Noised once, before the loop: every step sees the same low-res image.
    extra = (low_res_input(stage, eps, low, level), level)
  denoise = guidance.guided(
    network(stage, params, text, mask, extra),
    weight=weight if settings.guidance != 1 else None,
    prediction=stage.prediction,
    threshold=settings.threshold,
    percentile=settings.percentile,
    interval=settings.guidance_interval,
  )
  z, start, steps = None, 1.0, settings.steps
  if image is not None and settings.strength < 1:
    start = settings.strength
    steps = max(1, round(steps * start))
    eps = jax.vmap(
      lambda key: jax.random.normal(
        jax.random.fold_in(key, 2), image.shape[1:], jnp.float32
      )
    )(keys)
    z = process.diffuse(image, eps, stage.logsnr_fn(jnp.float32(start)))
  x = samplers.sample(
    jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys),
    denoise,
    (height, width, 3),
    logsnr_fn=stage.logsnr_fn,
    steps=steps,
    z=z,
    start=start,
    known=image,
    mask=inpaint_mask,
    sampler=settings.sampler,
    gamma=settings.gamma,
    eta=settings.eta,
  )
  return jnp.clip(x, -1, 1)


def check_sampling(stage, settings):
  """Refuses settings that cannot work, in one sentence each.

  Raises:
    UsageError: steps < 1, an unknown sampler, guidance without dropout, an
      augmentation level outside [0, max_level], a percentile outside (1, 100].
  """
  where = f'stage {stage.name}'
  if settings.steps < 1:
    raise UsageError(
      f'{where}: steps is {settings.steps}; sampling takes at least 1, and '
      f'this stage was tuned for {stage.sampling.steps}.'
    )
  if settings.sampler not in ('ddpm', 'ddim', 'dpmpp'):
    raise UsageError(
      f'{where}: sampler {settings.sampler!r} is unknown; choose ddpm, ddim '
      'or dpmpp.'
    )
  if settings.guidance != 1 and stage.cond_drop == 0:
    raise UsageError(
      f'{where}: guidance {settings.guidance:g} needs a model trained with '
      'caption dropout, and this one had stage.cond_drop = 0; use '
      '--guidance 1.'
    )
  if not 0 <= settings.aug_level <= stage.max_level:
    raise UsageError(
      f'{where}: aug_level is {settings.aug_level:g}; it lies in '
      f'[0, {stage.max_level:g}], and 0.1 to 0.3 give the best-looking '
      'images.'
    )
  if not 0 < settings.strength <= 1:
    raise UsageError(
      f'{where}: strength is {settings.strength:g}; it lies above 0 and up to '
      '1, which forgets the image.'
    )
  if not 1 < settings.percentile <= 100:
    raise UsageError(
      f'{where}: percentile is {settings.percentile:g}; it is on a '
      'scale of 0 to 100, above 1; the paper uses 99.5.'
    )
  if settings.threshold not in ('dynamic', 'static', None):
    raise UsageError(
      f'{where}: threshold {settings.threshold!r} is unknown; choose dynamic, '
      'static or none.'
    )
