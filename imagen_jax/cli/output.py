"""The output of sampling: PNG files, a grid, progress on stderr."""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from imagen_jax.errors import UsageError

if TYPE_CHECKING:
  from imagen_jax.typing import Uint8Image


def write(
  out: str | pathlib.Path,
  images: 'Uint8Image',
  records: Sequence[dict],
  *,
  grid: bool = True,
) -> list[pathlib.Path]:
  """Writes 000_a-red-circle.png, …, and grid_000.png.

  Numbers continue those of existing files, so nothing is overwritten. With
  several processes, which all hold the images, only process 0 writes.

  Args:
    out: the directory, created if it is missing.
    images: uint8 [N, H, W, 3].
    records: metadata of each image, including its `prompt`.
    grid: whether to write all images as one grid too.

  Raises:
    UsageError: `out` is a file.
  """
  import jax
  import numpy as np

  from imagen_jax.io import images as image_io

  if jax.process_index() != 0:
    return []
  out = pathlib.Path(out)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except FileExistsError as error:
    raise UsageError(
      f'{out} is a file; give a directory.', key='out'
    ) from error
  paths, first = [], _next(out, r'(\d+)_.*\.png$')
  for n, (image, record) in enumerate(zip(images, records), first):
    path = out / f'{n:03d}_{_slug(record["prompt"])}.png'
    image_io.save_png(path, image, record)
    paths.append(path)
  if grid:
    number = _next(out, r'grid_(\d+)')
    path = out / f'grid_{number:03d}.png'
    num_prompts = len({record['prompt'] for record in records})
    columns = len(records) // num_prompts if num_prompts > 1 else 1
    large = image_io.upsample(np.asarray(images), 256)
    image_io.save_png(
      path, image_io.grid(large, columns if columns > 1 else None)
    )
    paths.append(path)
  return paths


def _next(out: pathlib.Path, pattern: str) -> int:
  """One more than the largest number in the files that match a pattern."""
  found = (re.match(pattern, path.name) for path in out.iterdir())
  return 1 + max([int(match[1]) for match in found if match], default=-1)


def _slug(prompt: str) -> str:
  slug = re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')
  return slug[:48].rstrip('-') or 'unconditional'


def progress() -> Callable[[str, int, int], None]:
  """A callback: one updated line on a terminal, else one line per stage."""
  terminal = sys.stderr.isatty()

  def show(stage: str, done: int, total: int) -> None:
    if terminal:
      end = '\n' if done == total else ''
      print(f'\r{stage}: {done}/{total}', end=end, file=sys.stderr, flush=True)
    elif done == total:
      print(f'{stage}: {total} generated', file=sys.stderr)

  return show


def note(text: str) -> None:
  """Prints a note to stderr."""
  print(f'note: {text}', file=sys.stderr)


def devices() -> str:
  """The devices, such as '1 cpu' or '8 tpu', for an image's record."""
  import jax

  return f'{len(jax.devices())} {jax.devices()[0].platform}'
