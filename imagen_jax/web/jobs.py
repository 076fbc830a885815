"""What the page asks for, generated one job at a time; without the page."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image

import imagen_jax
from imagen_jax.cascade import batching, preview
from imagen_jax.cascade.preview import Emit, Preview
from imagen_jax.cli import input_images, output, sample
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import decode, files, images

if TYPE_CHECKING:
  from imagen_jax.cascade.cascade import Cascade

PREVIEWS, MOST = 10, 8  # of the longest stage; steps between two
MAX_IMAGES = 16  # of a job
# What an image starts from, and the images that it needs.
TASKS = {
  'text': (),
  'image': ('image',),
  'inpaint': ('image', 'mask'),
  'upsample': ('image',),
}


@dataclasses.dataclass(frozen=True)
class Job:
  """The settings of one press of the button, kept with its images.

  Attributes:
    model: a name in `Studio.models`.
    task: a name in `TASKS`.
    prompt, negative_prompt: texts.
    seed: in [0, 2³²).
    num_images: at most `MAX_IMAGES`.
    sampler: of all stages; None is each stage's own.
    steps, guidance: of each stage of the task; None is its own.
    image: the file to start from, to inpaint or to upsample.
    mask: the file of the inpaint mask, of the size of `image`.
    strength: with task 'image', how far from it.
  """

  model: str
  task: str = 'text'
  prompt: str = ''
  negative_prompt: str = ''
  seed: int = 0
  num_images: int = 1
  sampler: str | None = None
  steps: tuple[int | None, ...] | None = None
  guidance: tuple[float | None, ...] | None = None
  image: str | None = None
  mask: str | None = None
  strength: float | None = None

  def check(self) -> None:
    """Rejects a job without its images, or of too many.

    Raises:
      UsageError: it is one.
    """
    if not 1 <= self.num_images <= MAX_IMAGES:
      raise UsageError(
        f'the number of images is {self.num_images}; it lies in '
        f'[1, {MAX_IMAGES}].',
        key='num_images',
      )
    for name in TASKS[self.task]:
      if getattr(self, name) is None:
        what = {'image': 'upload an image first', 'mask': 'paint a mask'}
        raise UsageError(f'task {self.task}: {what[name]}.', key=name)


class Progress(NamedTuple):
  """What a job has so far.

  Attributes:
    preview: the newest.
    paths: of the images that are finished.
    notes: on the prompt, a sentence each.
  """

  preview: Preview
  paths: list[pathlib.Path]
  notes: list[str]


class Studio:
  """Models and the one thread that generates with them.

  Attributes:
    models: {name: folder, None for the bundled demo}.
    out: the folder of the images.
  """

  def __init__(
    self, models: Mapping[str, str | None], out: pathlib.Path
  ) -> None:
    self.models, self.out = models, out
    self._device = concurrent.futures.ThreadPoolExecutor(1)
    self._load = functools.lru_cache(imagen_jax.load)

  def cascade(self, model: str, task: str = 'text') -> 'Cascade':
    """The stages of a model that a task needs; no weights are read.

    Raises:
      UsageError: the model has none for it.
      ModelError: as `imagen_jax.load`.
    """
    whole = self._load(self.models[model])
    upsample = tuple(s.name for s in whole.stages if s.low_resolution)
    if (task == 'upsample') == (len(upsample) == len(whole.stages)):
      return whole  # its first stage is one for this task
    if task != 'upsample' or not upsample:
      raise UsageError(f'model {model} has no stage for task {task}.')
    return self._load(self.models[model], stages=upsample)

  def run(self, job: Job) -> Generator[Progress, None, None]:
    """Generates a job's images after the jobs that came before.

    Closing the generator ends the job at its next preview.

    Raises:
      ImagenError: the job or one of its images cannot be used.
    """
    job.check()
    cascade = self.cascade(job.model, job.task)
    # Nothing is printed, as at the end of a `with`.
    out = output.Output(self.out, grid=False)
    call = _call(cascade, job, self.models[job.model], out)
    notes: list[str] = []

    def work(emit: Emit) -> None:
      embedding = cascade.embed([job.prompt], job.negative_prompt)
      notes.extend(sample.notes(cascade, embedding))
      cascade.sample(embedding, preview=emit, **call)

    with contextlib.closing(preview.stream(work, self._device)) as seen:
      for each in seen:
        yield Progress(each, out.paths, notes)


def _call(
  cascade: 'Cascade',
  job: Job,
  folder: str | None,
  out: output.Output,
) -> dict[str, Any]:
  """The arguments of `Cascade.sample`, with the images read."""
  choices = {
    'sampler': job.sampler,
    'steps': job.steps and list(job.steps),
    'guidance': job.guidance and list(job.guidance),
    'strength': job.strength if job.task == 'image' else None,
  }
  configs = cascade.settings(**choices)
  upsample = job.task == 'upsample'
  flags = argparse.Namespace(
    seed=job.seed,
    model=folder,
    weak_model=None,
    negative_prompt=job.negative_prompt or None,
    low_res=job.image if upsample else None,
    init_image=None if upsample else job.image,
    mask=job.mask,
  )
  longest = max(config.steps for config in configs)
  request = batching.Request((job.prompt,), job.seed, range(job.num_images))
  kept = sample.record(cascade, configs, flags) | {'batch_size': request.batch}
  return choices | {
    'seed': job.seed,
    'num_images': job.num_images,
    'low_res': input_images.read_low_res(cascade, flags.low_res),
    **input_images.open_images(image=flags.init_image, mask=flags.mask),
    'batch_size': request.batch,
    'finished': out.of(request.records(kept)),
    'every': min(max(1, longest // PREVIEWS), MOST),
  }


def write_mask(
  path: pathlib.Path, layers: list[decode.Encoded], size: tuple[int, int]
) -> pathlib.Path | None:
  """Writes what was painted on transparent layers as an inpaint mask.

  Args:
    path: of the PNG.
    layers: image files.
    size: (width, height) of the mask.

  Returns:
    the path, or None if nothing was painted.

  Raises:
    DataError: a layer is not an image.
  """
  painted = np.zeros(size[::-1], bool)
  try:
    for layer in layers:
      with decode.opened(layer) as image:
        alpha = image.convert('RGBA').getchannel('A').resize(size)
        painted |= np.asarray(alpha) > 127
  except (decode.BadSample, OSError) as error:
    raise DataError(f'the mask cannot be used: {error}.') from error
  if not painted.any():
    return None
  with files.replacing(path) as temporary:
    PIL.Image.fromarray(painted).save(temporary, 'PNG')
  return path


def size_of(image: str) -> tuple[int, int]:
  """(width, height) of an upload, upright; `DataError` if it is no image."""
  return images.open_image(image).size
