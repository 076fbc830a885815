"""The output of sampling: PNG files, a grid, progress on stderr."""

import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.io import paths

if TYPE_CHECKING:
  import numpy as np


class Output:
  """Writes images when they are finished: 000_a-red-circle.png, …

  Numbers continue those of existing files, so nothing is overwritten. With
  several processes, which all hold the images, only process 0 writes. At the
  end, also after an error or Ctrl-C, the paths are printed.

    with Output('out', grid=True) as output:
      cascade.sample(prompts, finished=output.of(records))

  Attributes:
    paths: of what is written.
  """

  def __init__(self, out: str | pathlib.Path, *, grid: bool):
    """Opens a directory, made when the first image is written.

    Args:
      out: the directory.
      grid: whether to write all images as one grid_000.png too.

    Raises:
      UsageError: `out` cannot be a directory.
    """
    self._out = paths.check_folder(out, key='out')
    self._grid = grid
    self.paths: list[pathlib.Path] = []
    self._images: list[np.ndarray] = []
    self._prompts: set[str] = set()

  def of(
    self, records: Sequence[Mapping[str, Any]]
  ) -> Callable[[int, 'np.ndarray'], None]:
    """The `finished` of a call: writes its image i with records[i].

    Args:
      records: metadata of each image, including its `prompt`.
    """

    def finished(start: int, images: 'np.ndarray') -> None:
      import jax

      if jax.process_index() != 0:
        return
      for image, record in zip(images, records[start:]):
        name = f'{{:03d}}_{_slug(record["prompt"])}.png'
        self._save(name, r'(\d+)_.*\.png$', image, record)
        self._images.append(image)
        self._prompts.add(record['prompt'])

    return finished

  def __enter__(self) -> 'Output':
    return self

  def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
    if error is None and self._grid and self._images:
      self._write_grid()
    for path in self.paths:
      print(path)

  def _write_grid(self) -> None:
    """Writes all images as one, with a row for each of several prompts."""
    import numpy as np

    from imagen_jax.io import images as image_io

    each = len(self._images) // len(self._prompts)
    columns = each if len(self._prompts) > 1 < each else None
    large = image_io.upsample(np.stack(self._images), 256)
    grid = image_io.grid(large, columns)
    self._save('grid_{:03d}.png', r'grid_(\d+)', grid, None)

  def _save(
    self,
    name: str,
    pattern: str,
    image: 'np.ndarray',
    record: Mapping[str, Any] | None,
  ) -> None:
    """Writes an image, numbered after the files that match a pattern.

    Another process may write to the folder as well, but not between the two.
    """
    from imagen_jax.io import images as image_io
    from imagen_jax.io import lock

    with lock.locked(self._out, wait=True, key='out'):
      found = (re.match(pattern, path.name) for path in self._out.iterdir())
      last = max([int(match[1]) for match in found if match], default=-1)
      path = self._out / name.format(last + 1)
      image_io.save_png(path, image, record)
    self.paths.append(path)


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
