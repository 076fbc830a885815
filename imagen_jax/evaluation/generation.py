"""Generates the images of a run; an interrupted run can be resumed.

A run's folder holds

  run.json                 what the images depend on
  images/<category>/…      one PNG each
  records-i-of-n.jsonl     one line per finished image, by process i of n
  section.json             the report's text on the run, once it is finished

An image is finished when its line is written. Any number of processes, on
any number of hosts that share the folder, may each generate a fraction of a
run. Their number may change when the run is resumed.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from imagen_jax.cascade.cascade import Cascade
from imagen_jax.errors import DataError, UsageError
from imagen_jax.evaluation.suite import Item, Record, Records, Suite
from imagen_jax.io import decode, files, lock, paths
from imagen_jax.io import images as image_io

FORMAT_VERSION = 1  # of run.json
# Batches that a stage samples before the next stage's weights replace its own.
BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Run:
  """One set of images: a suite's prompts with one choice of settings.

  Attributes:
    suite: the suite.
    folder: of the run.
    name: of the sweep's point, 'guidance=1,sr1.steps=4'; '' without a sweep.
    sampling: settings of `Cascade.sample`, each a list with one per stage.
    negative_prompt: of every image; '' is the null condition.
    seed: of the images.
    batch_size: images at a time.
    fraction: (i, n): this is process i of n.
    true_size: side of the true images that the first stage upsamples; None
      without `from_truth`.
  """

  suite: Suite
  folder: pathlib.Path
  name: str = ''
  sampling: Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)
  negative_prompt: str = ''
  seed: int = 0
  batch_size: int = 4
  fraction: tuple[int, int] = (0, 1)
  true_size: int | None = None

  @property
  def label(self) -> str:
    """Its entry in `scores.json`."""
    return self.labelled(self.suite.label)

  def labelled(self, entry: str) -> str:
    """The label of an entry of the score, such as 'fid@guidance=1'."""
    return f'{entry}@{self.name}' if self.name else entry


def open_run(folder: pathlib.Path, identity: Mapping[str, typing.Any]) -> None:
  """Creates a run's folder, or checks that it holds the same run.

  Args:
    folder: of the run.
    identity: all that the images depend on, JSON-ready.

  Raises:
    UsageError: the folder holds a run with another identity.
  """
  path = folder / 'run.json'
  identity = json.loads(json.dumps(identity))
  if path.exists():
    old = files.read_json(path, error=DataError, version=FORMAT_VERSION)
    before = old['identity']
    for key in before | identity:
      if before.get(key) != identity.get(key):
        raise UsageError(
          f'out: {folder} holds a run with another {key} '
          f'({_short(before.get(key))}; now {_short(identity.get(key))}); '
          'choose another folder, or the same settings to resume it.',
          key='out',
        )
    return
  paths.check_folder(folder, key='out').mkdir(parents=True, exist_ok=True)
  record = {'format_version': FORMAT_VERSION, 'identity': identity}
  files.write_json(path, record)


def _short(value: typing.Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:59] + '…'


def read_records(folder: pathlib.Path) -> dict[tuple[str, int], Record]:
  """{(category, number): record} of all finished images of a run.

  A line cut short by a kill is skipped; its image is generated again.
  """
  return {
    (record['category'], record['number']): record
    for path in sorted(folder.glob('records-*.jsonl'))
    for record in files.read_lines(
      path,
      fields={'category': str, 'number': int, 'file': str},
      error=DataError,
    )
  }


def unfinished(items: Sequence[Item], records: Records) -> list[Item]:
  """The items that have no record yet."""
  return [x for x in items if (x.category, x.number) not in records]


def generate(
  cascade: Cascade,
  run: Run,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
  """Generates this process's fraction of the unfinished images.

  Args:
    cascade: the model.
    run: the run, whose folder `open_run` has opened.
    progress: called as progress(done, total), first with done = 0.

  Raises:
    UsageError: another process generates the same fraction.
  """
  i, n = run.fraction
  with (
    lock.locked(run.folder, name=f'.{i}-of-{n}.lock', key='out'),
    _appended(run.folder / f'records-{i}-of-{n}.jsonl') as write,
  ):
    todo = unfinished(run.suite.items()[i::n], read_records(run.folder))
    # One call of `sample` takes one list of image indices for all prompts.
    todo.sort(key=lambda item: item.index)
    done, total = 0, len(todo)
    progress(done, total)
    for chunk in _chunks(todo, BATCHES * run.batch_size):
      low_res = None
      if run.true_size is not None:
        low_res = np.stack(
          [run.suite.true_image(item, run.true_size) for item in chunk]
        )
      cascade.sample(
        [item.prompt for item in chunk],
        negative_prompt=run.negative_prompt,
        seed=run.seed,
        indices=[chunk[0].index],
        low_res=low_res,
        batch_size=run.batch_size,
        finished=functools.partial(_keep, run, chunk, write),
        **run.sampling,
      )
      done += len(chunk)
      progress(done, total)


def _keep(
  run: Run,
  items: Sequence[Item],
  write: Callable[[Record], None],
  start: int,
  images: np.ndarray,
) -> None:
  """Judges finished images, those of items[start:], and writes them."""
  for item, image in zip(items[start:], images):
    verdict = run.suite.judge(item, image)
    metadata = {'prompt': item.prompt, 'seed': run.seed, 'index': item.index}
    image_io.save_png(run.folder / item.file, image, metadata)
    write(dataclasses.asdict(item) | {'file': item.file} | verdict)


def _chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
  """Lists of at most `size` items with the same index."""
  for _, group in itertools.groupby(items, lambda item: item.index):
    while chunk := list(itertools.islice(group, size)):
      yield chunk


def read_image(
  folder: pathlib.Path, record: Record
) -> UInt8[np.ndarray, 'h w 3']:
  """A finished image.

  Raises:
    DataError: it is missing or damaged.
  """
  path = files.inside(folder, record['file'])
  if path is None:
    raise DataError(
      f'the records of {folder} name an image outside it, {record["file"]!r}; '
      f'delete {folder} and run again.'
    )
  try:
    with decode.opened(path, min_side=1) as image:
      return np.asarray(decode.upright(image))
  except decode.BadSample as error:
    raise DataError(
      f'{path} cannot be read ({error}); delete {folder} and run again.'
    ) from error


def read_images(
  folder: pathlib.Path, records: Records, items: Iterable[Item]
) -> Iterator[UInt8[np.ndarray, 'h w 3']]:
  """The images of a run's items, in their order."""
  return (read_image(folder, records[x.category, x.number]) for x in items)


@contextlib.contextmanager
def _appended(path: pathlib.Path) -> Iterator[Callable[[Record], None]]:
  """A function that appends JSON lines to a file and flushes after each."""
  with path.open('a+b') as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b'\n':  # killed in the middle of a line
        file.write(b'\n')

    def write(record: Record) -> None:
      file.write(json.dumps(record).encode() + b'\n')
      file.flush()

    yield write
