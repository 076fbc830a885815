"""Generates a stage's images in batches of one size, for any model.

Every image has its own key, and every batch the same shape (the last one is
padded), so an image does not depend on what else is generated.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade.conditioning import to_uint8
from imagen_jax.cascade.preview import EVERY, Emit, Preview
from imagen_jax.errors import NumericError, UsageError
from imagen_jax.typing import KeyData

SEEDS = 2**32  # jax silently drops higher bits
# Fields of `SamplingConfig` whose values are tuples.
TUPLES = ('guidance_interval', 'guidance_schedule')
MAX_BATCH = 4096  # every batch is padded to its size
MAX_IMAGES = 10**6  # of a call, which keeps them all in memory
# Steps done, all steps, z and x [B, H, W, 3].
Partial = tuple[int, int, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Request:
  """Which images to generate.

  Attributes:
    prompts: at least one; the images of a prompt are consecutive.
    seed: in [0, 2³²).
    indices: which images of each prompt.
    batch_size: images per batch; None: all of them, at most 4.
    callback: called as callback(stage name, images done, images in total).
    finished: called as finished(i, images) with images i, i + 1, … of the last
      stage, uint8 [n, H, W, 3], after each of its batches.
    preview: called with a `Preview` after every `every` steps of each batch.
    every: steps.

  Raises:
    UsageError: there is nothing to generate, or a number is out of range.
  """

  prompts: Sequence[str]
  seed: int = 0
  indices: Sequence[int] = (0,)
  batch_size: int | None = None
  callback: Callable[[str, int, int], None] | None = None
  finished: Callable[[int, np.ndarray], None] | None = None
  preview: Emit | None = None
  every: int = EVERY

  def __post_init__(self) -> None:
    batch, indices = self.batch_size, self.indices
    # In this order: the length of a range may be too large for Python.
    some = indices and 0 <= indices[0] <= indices[-1] < SEEDS
    some = some and len(self.prompts) * len(indices) <= MAX_IMAGES
    for key, valid, problem in (
      ('seed', 0 <= self.seed < SEEDS, f'seed is {self.seed}, not in [0, 2³²)'),
      (None, self.prompts, 'there is nothing to generate: give a prompt'),
      (
        'prompt',
        all(map(_is_text, self.prompts)),
        'prompt is not Unicode text',
      ),
      (
        'num_images',
        some,
        f'num_images is at least 1, and at most {MAX_IMAGES:,} images are '
        'generated at a time',
      ),
      ('every', self.every >= 1, f'every is {self.every}; it is at least 1'),
      (
        'batch_size',
        batch is None or 0 < batch <= MAX_BATCH,
        f'batch_size is {batch}; it must be in [1, {MAX_BATCH}]',
      ),
    ):
      if not valid:
        raise UsageError(f'{problem}.', key=key)

  @functools.cached_property
  def rows(self) -> list[tuple[int, int]]:
    """(index of its prompt, index in the prompt's images) per image."""
    return [(p, i) for p in range(len(self.prompts)) for i in self.indices]

  def records(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record of the call, with each image's prompt and index."""
    return [
      {**record, 'prompt': self.prompts[p], 'index': i} for p, i in self.rows
    ]

  @property
  def batch(self) -> int:
    """Images per batch."""
    return self.batch_size or min(4, len(self.rows))

  def key_data(self, rows: np.ndarray, resolution: int) -> KeyData:
    """uint32 [B, 2]: the key data of images for the stage of a resolution."""
    keys = [
      jax.random.fold_in(image_key(self.seed, self.prompts[p], i), resolution)
      for p, i in (self.rows[row] for row in rows)
    ]
    return np.stack([np.asarray(jax.random.key_data(key)) for key in keys])


def _is_text(prompt: str) -> bool:
  """Whether it has no lone surrogates: bytes that are not UTF-8, or JSON."""
  return not any('\ud800' <= c <= '\udfff' for c in prompt)


def image_key(seed: int, prompt: str, i: int) -> jax.Array:
  """The key of image i of a prompt, the same in every batch and run.

  Always Threefry, whatever jax's default, so that a seed means the same image
  on every device and in later versions.

  Args:
    seed: in [0, 2³²).
    prompt: the caption, exactly as given; the first 4 bytes of its SHA-256 are
      folded in.
    i: index of the image among those of the prompt.
  """
  key = jax.random.key(seed, impl='threefry2x32')
  digest = hashlib.sha256(prompt.encode('utf-8')).digest()
  key = jax.random.fold_in(key, int.from_bytes(digest[:4], 'big'))
  return jax.random.fold_in(key, i)


def generate(
  request: Request,
  name: str,
  mesh: jax.sharding.Mesh,
  inputs: Callable[[np.ndarray], Any],
  sample: Callable[[Any], Iterable[Partial]],
  finite: Callable[[Any], jax.Array],
) -> np.ndarray:
  """Generates one stage's images for all rows of a request.

  Args:
    request: which images.
    name: of the stage, for the callback.
    mesh: to generate on.
    inputs: indices of rows [B] -> tree of host arrays [B, ...].
    sample: that tree, on the mesh -> (steps done, all steps, z, x) after some
      of the steps and after the last one, of which x are the images.
    finite: that tree -> bool [steps], whether each step's images are finite;
      called if the result is not.

  Returns:
    [N, H, W, 3] in [−1, 1], on the host.

  Raises:
    NumericError: an image is NaN or Inf.
  """
  count, generated = len(request.rows), []
  for start, rows in batches(request, mesh):
    arrays = sharding.put_whole_batch(inputs(rows), mesh)
    done = np.empty(0)
    with jax.set_mesh(mesh):
      for step, steps, z, x in sample(arrays):
        done = sharding.fetch(x)[: count - start]
        if not np.isfinite(done).all():
          raise _not_finite(name, sharding.fetch(finite(arrays)))
        if request.preview is not None:
          noisy = x if step == steps else z  # the last z is not used
          shown = to_uint8(sharding.fetch(noisy)[: count - start])
          seen = Preview(name, start, step, steps, shown, to_uint8(done))
          request.preview(seen)
    done = np.clip(done, -1, 1)
    generated.append(done)
    if request.finished is not None:
      request.finished(start, to_uint8(done))
    if request.callback is not None:
      request.callback(name, min(start + len(rows), count), count)
  return np.concatenate(generated)


def batches(
  request: Request, mesh: jax.sharding.Mesh
) -> Iterator[tuple[int, np.ndarray]]:
  """(the first row, indices of the rows [B]) of every batch, of one size B.

  The last batch is padded with copies of the last row.
  """
  count = len(request.rows)
  batch = -(-request.batch // mesh.size) * mesh.size
  for start in range(0, count, batch):
    yield start, np.minimum(np.arange(start, start + batch), count - 1)


def _not_finite(name: str, finite: np.ndarray) -> NumericError:
  """The error for images of a stage, given which steps were finite."""
  step = int(np.argmin(finite)) + 1
  where = 'after the last step' if finite.all() else f'at step {step}'
  return NumericError(
    f'stage {name} generated NaN or Inf {where} of {len(finite)}; try '
    'float32, less guidance or dynamic thresholding, and check that the '
    'training of this stage did not diverge.'
  )


def free(params: Any) -> None:
  """Frees a stage's parameters on the devices, for those of the next stage."""
  jax.tree.map(lambda leaf: leaf.delete(), params)


def per_stage(
  choices: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
  """The choices of each stage, from one value for all or a list of one each.

  None keeps the stage's default. A tuple counts as a list, except for the
  fields in `TUPLES`; a list of these holds lists or tuples.

  Raises:
    UsageError: a list of another length.
  """
  result: list[dict[str, Any]] = [{} for _ in names]
  for key, value in choices.items():
    listed = isinstance(value, list)
    listed |= isinstance(value, tuple) and key not in TUPLES
    if listed and len(value) != len(names):
      raise UsageError(
        f'{key} has {len(value)} values for {len(names)} stages '
        f'({", ".join(names)}); give one, or one for each.',
        key=key,
      )
    for chosen, own in zip(result, value if listed else [value] * len(names)):
      if own is not None:
        chosen[key] = tuple(own) if isinstance(own, list) else own
  return result


def repeated(
  arrays: Mapping[str, np.ndarray], batch: int
) -> dict[str, np.ndarray]:
  """Repeats arrays for every image of a batch: [...] -> [batch, ...]."""
  return {
    name: np.broadcast_to(array, (batch, *array.shape))
    for name, array in arrays.items()
  }
