"""The sample grid of a running training, drawn with the EMA parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import pictures, sharding
from imagen_jax import stage as stages

NUM_PREVIEWS = 8


def make_preview(stage, encoder, source, mesh, *, seed, max_len):
  """A function that draws a few pictures of a source's captions.

  The grid has a row of the source's own pictures, for a super-resolution
  stage a row of what it was given, and a row of what the stage drew.

  Args:
    stage: the stage.
    encoder: the text encoder.
    source: of captioned pictures, at the stage's resolution.
    mesh: on which the parameters lie.
    seed: of the noise, which is the same in every grid.
    max_len: of the captions, in tokens.

  Returns:
    EMA parameters -> uint8 [H, W, 3], or None where this is not the first
    process. Every process must call it.
  """
  shown = min(NUM_PREVIEWS, len(source))
  # Every device draws as many: the last pictures may be there twice.
  count = -(-shown // mesh.size) * mesh.size
  examples = [source[i % shown] for i in range(count)]
  truth = np.stack([example['image'] for example in examples])
  text, mask = encoder.encode(
    [example['caption'] for example in examples], max_len=max_len
  )
  keys = jax.random.split(jax.random.key(seed), count)
  given = {'keys': np.asarray(jax.random.key_data(keys))}
  given |= {'text': text, 'mask': mask}
  if stage.low_resolution is not None:
    x = jnp.asarray(truth, jnp.float32) / 127.5 - 1
    given['low'] = np.asarray(stages.box_downsample(x, stage.low_resolution))
  settings = stage.sampling

  def draw(params, given):
    return stages.sample(
      stage,
      params,
      jax.random.wrap_key_data(given['keys']),
      given['text'],
      given['mask'],
      given.get('low'),
      settings.guidance,
      settings.aug_level,
      settings=settings,
    )

  draw = jax.jit(draw, out_shardings=sharding.batch_sharding(mesh))

  def preview(ema_params):
    drawn = draw(ema_params, sharding.put_whole_batch(given, mesh))
    drawn = sharding.fetch(drawn)
    return show(truth, given.get('low'), drawn, shown)

  return preview


def show(truth, low, drawn, shown):
  """The grid of `make_preview`, on the first process; None on others.

  Args:
    truth: uint8 [N, R, R, 3].
    low: [N, r, r, 3] in [−1, 1], or None.
    drawn: [N, R, R, 3] in [−1, 1].
    shown: how many of them to show.
  """
  if jax.process_index() != 0:
    return None
  rows = [truth[:shown]]
  if low is not None:
    factor = truth.shape[1] // low.shape[1]
    small = stages.to_uint8(low[:shown])
    rows.append(small.repeat(factor, axis=1).repeat(factor, axis=2))
  rows.append(stages.to_uint8(drawn[:shown]))
  return pictures.grid(pictures.enlarge(np.concatenate(rows), 64), shown)
