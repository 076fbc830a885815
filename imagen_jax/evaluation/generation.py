"""Generating many images so that an interrupted run continues.

A run's folder holds

  run.json                 what the images depend on
  images/<category>/…    one PNG each
  records-i-of-n.jsonl     one line per finished image, by process i of n

An image is finished when its line is written. Any number of processes, on
any number of hosts that share the folder, may generate their fractions of a
run; a later start with another number of them takes up what all of them left.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re

import numpy as np
from PIL import Image

from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import files
from imagen_jax.io import images as image_io

# Batches between two times that the stages change places on the device.
BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Item:
  """One image to generate.

  Attributes:
    category: of the prompt, one level of grouping.
    number: of the image within its category; with it the image's identity.
    prompt: what to generate.
    index: which image of this prompt, see `Cascade.sample`.
  """

  category: str
  number: int
  prompt: str
  index: int = 0

  @property
  def file(self):
    """Its image, relative to the run's folder."""
    return f'images/{slug(self.category)}/{self.number:05d}.png'


def slug(text):
  """A name as part of a path: letters, digits and = , . - alone."""
  return re.sub(r'[^A-Za-z0-9=,.]+', '-', text).strip('-.') or 'other'


def open_run(folder, identity):
  """Makes a run's folder, or checks that it is the same run's.

  Args:
    folder: of the run.
    identity: JSON object of everything that the images depend on.

  Raises:
    UsageError: the folder holds a run with another identity.
  """
  folder = pathlib.Path(folder)
  path = folder / 'run.json'
  identity = json.loads(json.dumps(identity))
  if path.exists():
    before = files.read_json(path, error=DataError, version=1)['identity']
    changed = [
      key
      for key in {**before, **identity}
      if before.get(key) != identity.get(key)
    ]
    if changed:
      key = changed[0]
      raise UsageError(
        f'{folder} holds a run with another {key} ({_short(before.get(key))}; '
        f'now {_short(identity.get(key))}); give another --out, or the same '
        'settings to continue it.'
      )
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise UsageError(f'{folder} cannot be a folder: {error}.') from error
  files.write_json(path, {'format_version': 1, 'identity': identity})


def _short(value):
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:59] + '…'


def read_records(folder):
  """{(category, number): record} of all finished images of a run.

  A line that a killed process left unfinished is passed over; its image is
  generated once more.
  """
  records = {}
  for path in sorted(pathlib.Path(folder).glob('records-*.jsonl')):
    for line in path.read_text(encoding='utf-8').splitlines():
      try:
        record = json.loads(line)
        records[record['category'], record['number']] = record
      except (ValueError, KeyError, TypeError):
        continue
  return records


def generate(
  cascade,
  folder,
  items,
  *,
  seed,
  batch_size,
  fraction=(0, 1),
  low_res=None,
  judge=None,
  progress=None,
  **choices,
):
  """Generates this process's fraction of the images that are not finished yet.

  Args:
    cascade: the model.
    folder: of the run, opened by `open_run`.
    items: every `Item` of the run, the same in all processes.
    seed: of the images.
    batch_size: images at a time.
    fraction: (i, n): this is process i of n.
    low_res: function of an item, its uint8 [h, w, 3] for the first stage; None
      where the first stage is the base.
    judge: function of (item, uint8 [H, W, 3]) to more fields of its record.
    progress: called as progress(done, total) after each chunk.
    **choices: see `Cascade.sample`.
  """
  folder = pathlib.Path(folder)
  done = read_records(folder)
  todo = [x for x in items[fraction[0] :: fraction[1]] if _key(x) not in done]
  # `sample` generates the same image numbers of all its prompts.
  todo.sort(key=lambda item: item.index)
  generated, size = 0, BATCHES * batch_size
  with _Lines(
    folder / f'records-{fraction[0]}-of-{fraction[1]}.jsonl'
  ) as write:
    for index, group in itertools.groupby(todo, lambda item: item.index):
      for chunk in _chunks(list(group), size):
        lows = None
        if low_res is not None:
          lows = np.stack([low_res(item) for item in chunk])
        results = cascade.sample(
          [item.prompt for item in chunk],
          seed=seed,
          indices=[index],
          low_res=lows,
          batch_size=batch_size,
          **choices,
        )
        for item, image in zip(chunk, list(results.values())[-1]):
          record = dataclasses.asdict(item) | {'file': item.file}
          if judge is not None:
            record |= judge(item, image)
          _save(folder / item.file, image, item, seed)
          write(record)
        generated += len(chunk)
        if progress is not None:
          progress(generated, len(todo))


def _chunks(items, size):
  return [items[i : i + size] for i in range(0, len(items), size)]


def _key(item):
  return item.category, item.number


def read_image(folder, record):
  """A finished image, uint8 [H, W, 3].

  Raises:
    DataError: it is gone or damaged.
  """
  path = pathlib.Path(folder) / record['file']
  try:
    with Image.open(path) as image:
      return np.asarray(image.convert('RGB'))
  except OSError as error:
    raise DataError(
      f'{path} cannot be read ({error}); delete {folder} and run again.'
    ) from error


def _save(path, image, item, seed):
  # Whole or not at all: a record may only name a good image.
  metadata = {'prompt': item.prompt, 'seed': seed, 'index': item.index}
  with files.replacing(path) as temporary:
    image_io.save_png(temporary, image, metadata)


class _Lines:
  """Appends JSON lines, each on the disk before the next is begun."""

  def __init__(self, path):
    self.path = path

  def __enter__(self):
    self.file = self.path.open('a+b')
    if self.file.tell():
      self.file.seek(-1, os.SEEK_END)
      if self.file.read(1) != b'\n':  # killed in the middle of a line
        self.file.write(b'\n')
    return self._write

  def _write(self, record):
    self.file.write(json.dumps(record).encode() + b'\n')
    self.file.flush()

  def __exit__(self, *error):
    self.file.close()
