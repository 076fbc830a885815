"""One stage of the cascade: a network, its schedule, what it is fed.

A stage is a conditional diffusion model p(x | text) or, for the
super-resolution stages, p(x | low-resolution picture, text) (Section 2).
Everything is a pure function of (stage, params, …).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion import (
  guidance,
  process,
  samplers,
  schedule,
)
from imagen_jax.diffusion import (
  loss as losses,
)
from imagen_jax.errors import UsageError
from imagen_jax.nets.efficient_unet import EfficientUNet
from imagen_jax.nets.unet import UNet


@dataclasses.dataclass(frozen=True)
class Stage:
  """The hyper-parameters of one stage.

  Attributes:
    name: its directory's name, such as 'base' or 'sr1'.
    resolution: side of its pictures, in pixels.
    low_resolution: side of the pictures it enlarges; None for the base.
    net: the Linen module.
    logsnr_fn: t in [0, 1] -> log-SNR.
    text_dim: width of the text embeddings.
    text_len: number of text positions.
    prediction: 'eps' (the paper's), 'v' or 'x'.
    weighting: see `diffusion.loss.diffusion_loss`; None is the MSE of the
      prediction itself.
    stratified: spread the training times evenly over the batch.
    cond_drop: share of captions dropped in training (0.1); 0 forbids guidance.
    max_level: training draws augmentation levels from U(0, max_level); the
      paper's is 1 (2.4).
    crop: side of the training crops, None for whole pictures. The paper
      trains 256→1024 on 256-pixel crops.
    sampling: defaults of `sample` for this stage.
  """

  name: str
  resolution: int
  low_resolution: int | None
  net: nn.Module
  logsnr_fn: Callable
  text_dim: int
  text_len: int
  prediction: str = 'eps'
  weighting: str | None = None
  stratified: bool = False
  cond_drop: float = 0.1
  max_level: float = 1.0
  crop: int | None = None
  sampling: 'Sampling' = None


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one stage is sampled; every field can be chosen at call time.

  Attributes:
    sampler: 'ddpm', 'ddim' or 'dpmpp'.
    steps: network evaluations (each of two branches when guided).
    guidance: w in w·cond + (1 − w)·uncond; 1 is none.
    guidance_interval: (lowest, highest) log-SNR at which to guide, or None.
    threshold: 'dynamic', 'static' or None.
    percentile: of dynamic thresholding, on a 0–100 scale.
    aug_level: noise added to the low-resolution picture, in [0, 1].
    gamma: of DDPM, between the two variances of eq. 6.
    eta: of DDIM, 0 is deterministic.
    strength: when starting from a picture, how far back to noise, in (0, 1];
      the steps taken shrink with it.
  """

  sampler: str = 'dpmpp'
  steps: int = 32
  guidance: float = 1.0
  guidance_interval: tuple[float, float] | None = None
  threshold: str | None = 'dynamic'
  percentile: float = 99.5
  aug_level: float = 0.0
  gamma: float = 0.3
  eta: float = 0.0
  strength: float = 1.0


NETS = {'unet': UNet, 'efficient_unet': EfficientUNet}


def from_config(config, *, text_dim, text_len, dtype=jnp.float32):
  """Builds a `Stage` from a config's `stage` section (a plain mapping).

  Args:
    config: name, resolution, low_resolution, net {kind, …}, schedule {kind,
      …}, and any other field of `Stage`; `sampling` holds `Sampling`'s.
    text_dim: width of the text encoder's embeddings.
    text_len: its number of positions.
    dtype: activations' type.

  Raises:
    UsageError: naming the key that is wrong.
  """
  config = {k: v for k, v in config.items()}
  net = dict(config.pop('net'))
  kind = net.pop('kind')
  if kind not in NETS:
    raise UsageError(
      f'stage.net.kind is {kind!r}; it can be {" or ".join(NETS)}.'
    )
  net = {k: _tuples(v) for k, v in net.items()}
  if kind == 'unet':
    net.setdefault('resolution', config['resolution'])
  sampling = {k: _tuples(v) for k, v in dict(config.pop('sampling')).items()}
  _known('stage.net', net, NETS[kind])
  _known('stage.sampling', sampling, Sampling)
  logsnr_fn = make_schedule(**dict(config.pop('schedule')))
  _known('stage', config, Stage)
  level = config.get('max_level', 1.0)
  if not 0 <= level <= 1:
    raise UsageError(f'stage.max_level is {level:g}; it lies in [0, 1].')
  return Stage(
    net=NETS[kind](**net, dtype=dtype),
    logsnr_fn=logsnr_fn,
    sampling=Sampling(**sampling),
    text_dim=text_dim,
    text_len=text_len,
    **config,
  )


def _tuples(value):
  return tuple(value) if isinstance(value, list | tuple) else value


def _known(where, given, cls):
  fields = {field.name for field in dataclasses.fields(cls)}
  for key in given:
    if key not in fields:
      raise UsageError(
        f'{where} has no key {key!r}; it knows {", ".join(sorted(fields))}.'
      )


def make_schedule(kind, shift_from=None, resolution=None, **options):
  """A log-SNR function of t: kind 'cosine' or 'linear', optionally shifted.

  Args:
    kind: 'cosine' or 'linear'.
    shift_from: resolution at which the schedule holds unshifted; None: no
      shift. At `resolution` the log-SNR moves by 2·log(shift_from/resolution).
    resolution: the stage's, with `shift_from`.
    **options: of the schedule's function.
  """
  functions = {
    'cosine': schedule.cosine_logsnr,
    'linear': schedule.linear_logsnr,
  }
  if kind not in functions:
    raise UsageError(
      f"stage.schedule.kind is {kind!r}; it can be 'cosine' or 'linear'."
    )
  plain = functools.partial(functions[kind], **options)
  if shift_from is None:
    return plain
  return lambda t: schedule.shifted_logsnr(
    plain(t), resolution=resolution, base_resolution=shift_from
  )


def init_params(stage, key):
  """Fresh float32 parameters; `param_shapes` gives their shapes alone."""
  side = stage.crop or stage.resolution
  z = jnp.zeros((1, side, side, 3))
  level = jnp.zeros((1,))
  text = jnp.zeros((1, stage.text_len, stage.text_dim))
  mask = jnp.ones((1, stage.text_len), bool)
  extra = () if stage.low_resolution is None else (z, level)
  return stage.net.init(key, z, level, text, mask, *extra)['params']


def param_shapes(stage):
  """The shapes of `init_params`' result.

  Raises:
    UsageError: the values of `stage.net` do not make a network.
  """
  try:
    return jax.eval_shape(
      functools.partial(init_params, stage), jax.random.key(0)
    )
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UsageError(
      f'stage.net of {stage.name} does not make a network ({reason[:200]}); '
      'give one value per level where there are several, and widths that '
      'head_dim and norm_groups divide.'
    ) from error


def num_params(params):
  """How many numbers a parameter tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def box_downsample(image, size):
  """The one way this project makes a picture smaller: the mean of each box.

  Args:
    image: [B, H, W, C], H a multiple of `size`.
    size: the side of the result.
  """
  batch, height, width, channels = image.shape
  factor = height // size
  image = image.reshape(
    batch, height // factor, factor, width // factor, factor, channels
  )
  return jnp.mean(image, axis=(2, 4))


def enlarge(image, factor):
  """Bilinear enlargement of the low-resolution input: [B, h, w, C]."""
  batch, height, width, channels = image.shape
  return jax.image.resize(
    image, (batch, height * factor, width * factor, channels), 'linear'
  )


def to_uint8(image):
  """float [..., 3] in [−1, 1] -> numpy uint8, rounded to nearest."""
  image = (np.asarray(image, np.float32) + 1) * 127.5
  return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def low_res_input(stage, eps, low, level):
  """The low-resolution condition (2.4): noise first, then enlarge.

  Args:
    stage: a super-resolution stage.
    eps: standard normal noise shaped like `low`.
    low: [B, h, w, 3] in [−1, 1].
    level: [B] augmentation level in [0, 1].

  Returns:
    [B, H, W, 3] at the stage's scale.
  """
  factor = stage.resolution // stage.low_resolution
  return enlarge(process.augment(eps, low, level), factor)


def loss(stage, params, key, image, text, mask):
  """The loss of each picture of a batch (Appendix A; Sections 2.2 to 2.4).

  Args:
    stage: the stage.
    params: its parameters.
    key: one key for the whole batch.
    image: uint8 [B, R, R, 3] at the stage's resolution.
    text: [B, L, D] embeddings of the captions.
    mask: [B, L] bool.

  Returns:
    [B] float32, and a dict of [B]: t, logsnr, mse, weight.
  """
  keys = {
    name: jax.random.fold_in(key, i)
    for i, name in enumerate(['drop', 'level', 'low', 'crop', 'loss', 'net'])
  }
  batch = image.shape[0]
  x = image.astype(jnp.float32) / 127.5 - 1
  dropped = jax.random.bernoulli(keys['drop'], stage.cond_drop, (batch,))
  text, mask = null_where(dropped, text, mask)
  extra = ()
  if stage.low_resolution is not None:
    low = box_downsample(x, stage.low_resolution)
    if stage.crop is not None:
      x, low = _crop(stage, keys['crop'], x, low)
    level = stage.max_level * jax.random.uniform(keys['level'], (batch,))
    eps = jax.random.normal(keys['low'], low.shape)
    extra = (low_res_input(stage, eps, low, level), level)

  def predict(z, logsnr):
    return stage.net.apply(
      {'params': params},
      z,
      logsnr,
      text,
      mask,
      *extra,
      train=True,
      rngs={'dropout': keys['net']},
    )

  return losses.diffusion_loss(
    keys['loss'],
    x,
    predict,
    logsnr_fn=stage.logsnr_fn,
    prediction=stage.prediction,
    weighting=stage.weighting,
    stratified=stage.stratified,
  )


def _crop(stage, key, x, low):
  """The same random square of the picture and of its small version."""
  factor = stage.resolution // stage.low_resolution
  side = stage.crop // factor
  corners = jax.random.randint(key, (x.shape[0], 2), 0, low.shape[1] - side + 1)

  def cut(image, corner, size):
    start = (corner[0], corner[1], 0)
    return jax.lax.dynamic_slice(image, start, (size, size, 3))

  low = jax.vmap(functools.partial(cut, size=side))(low, corners)
  x = jax.vmap(functools.partial(cut, size=stage.crop))(x, corners * factor)
  return x, low


def null_where(dropped, text, mask):
  """The null condition where `dropped` [B] says so, in training and sampling.

  Zeros for the sequence and every position masked, so that neither the words
  nor the length of the caption remain (4.1: "zeroing out the text
  embeddings"); the pooled vector is then exactly zero too.
  """
  text = jnp.where(dropped[:, None, None], 0, text)
  return text, mask & ~dropped[:, None]


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


def multiple(stage):
  """Heights and widths of a stage's pictures are multiples of this."""
  if isinstance(stage.net, UNet):
    return 2 ** (len(stage.net.channel_mults) - 1)
  return math.prod(stage.net.strides)


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
  paint=None,
  *,
  settings,
):
  """Draws pictures from a stage; one compiled loop over the steps.

  Args:
    stage: the stage.
    params: its parameters.
    keys: [B] keys, one per picture.
    text: [B, L, D] embeddings.
    mask: [B, L] bool.
    low: [B, h, w, 3] in [−1, 1] for a super-resolution stage, else None.
    weight: guidance w, a scalar; ignored unless `settings.guidance` ≠ 1.
    level: augmentation level, a scalar.
    image: [B, H, W, 3] in [−1, 1], a picture to start from at
      `settings.strength`; its shape is the result's.
    paint: [B, H, W, 1], with `image`: 1 where to paint, 0 where to keep it.
    settings: `Sampling`; all but its guidance and aug_level are compiled in.

  Returns:
    [B, R, R, 3] float32 in [−1, 1]; H and W of `image` or of an enlarged
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
    # Noised once, before the loop: every step sees the same low-res picture.
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
    mask=paint,
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
      'pictures.'
    )
  if not 0 < settings.strength <= 1:
    raise UsageError(
      f'{where}: strength is {settings.strength:g}; it lies above 0 and up to '
      '1, which forgets the picture.'
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
