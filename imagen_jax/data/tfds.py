"""TensorFlow Datasets without TensorFlow, such as coco_captions.

Only builds stored as ArrayRecord can be read without TensorFlow. Images are
read encoded and decoded as in every other source.
"""

import glob
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagen_jax.data import index_cache
from imagen_jax.data.checked import (
  MAX_BAD,
  UNREADABLE,
  Checked,
  clean_captions,
  survey,
)
from imagen_jax.data.where import caption_columns, check_columns
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import files
from imagen_jax.io.decode import BadSample, inspect
from imagen_jax.io.files import AnyPath

CAPTION_KEYS = ('caption', 'captions', 'text', 'title', 'description')
# Names of evaluation splits, in order of preference.
EVAL = ('validation', 'val', 'test', 'train')
INFO = 'dataset_info.json'


class TfdsSource(Checked):
  """Random access to one split of a prepared build, {'image', 'caption'} each.

  Args:
    path: the build's folder (the one with dataset_info.json), or its name,
      such as 'coco_captions', searched for in $TFDS_DATA_DIR or
      ~/tensorflow_datasets; the latest of several versions is used.
    split: 'train', or 'eval' for the build's validation split.
    size, resize, max_bad, aspect, where: see `Checked`.

  Raises:
    DataError: there is no such build, it is stored as TFRecord, it has no
      images or captions, or too many are bad.
    UsageError: tensorflow-datasets is not installed.
  """

  path_is = 'the name or folder of a prepared TFDS build'
  has_eval_split = True

  needs = f'Captions are read from {", ".join(CAPTION_KEYS)}.'

  def __init__(
    self,
    path: AnyPath,
    size: int,
    *,
    split: str = 'train',
    resize: str = 'area',
    max_bad: float = MAX_BAD,
    aspect: str = 'crop',
    where: Sequence[str] | None = None,
  ) -> None:
    self.split = split
    super().__init__(
      path, size, resize=resize, max_bad=max_bad, aspect=aspect, where=where
    )

  def scan(self, path: AnyPath) -> tuple[dict[str, str], dict[str, str]]:
    self.folder = find_build(path)
    self._records, self._image, self._caption, self.split = _open(
      self.folder, self.split
    )
    self.where = f'{self.folder} ({self.split})'
    check_columns(self.conditions, (), self.where)
    rows, bad = self._index()
    columns = {'caption_length': rows[:, 3], 'caption_words': rows[:, 4]}
    names = [f'record {row}' for row in rows[:, 0]]
    order, left = self.select(names, rows[:, 1:3], columns)
    self.rows = rows[order, 0]  # numbers of records
    return bad, left

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def fingerprint(self) -> str:
    """sha256 of the build's dataset_info.json, the split and the examples."""
    digest = hashlib.sha256((self.folder / INFO).read_bytes())
    digest.update(self.split.encode() + self.rows.tobytes())
    return digest.hexdigest()

  def name(self, i: int) -> str:
    return f'record {self.rows[i]}'

  def read(self, i: int) -> tuple[bytes, Sequence[str]]:
    data, captions = self._record(self.rows[i])
    return data, clean_captions(captions)

  def _record(self, number: int) -> tuple[bytes, list[str | bytes]]:
    """(encoded image, captions) of one record."""
    try:
      record = self._records[int(number)]
    except RuntimeError as error:  # ArrayRecord's checksum
      raise BadSample('its record is damaged') from error
    captions = record[self._caption]
    if isinstance(captions, dict):
      captions = captions['text']
    return record[self._image], np.atleast_1d(
      np.array(captions, object)
    ).tolist()

  def _index(self) -> tuple[np.ndarray, dict[str, str]]:
    """(int64 rows [n, 5], {name: problem}).

    A row is the number of a record, its image's width and height, and the
    characters and words of its longest caption.
    """
    location = f'{self.folder.resolve()} {self.split}'
    state = [
      [file.name, file.stat().st_size, file.stat().st_mtime_ns]
      for file in sorted(self.folder.iterdir())
    ]

    def examine(i: int) -> list[int]:
      data, captions = self._record(i)
      said = caption_columns([clean_captions(captions)])
      return [i, *inspect(data), *(value for (value,) in said.values())]

    found = index_cache.load('tfds', location)
    if found is None or found[0]['state'] != state:
      numbers = range(len(self._records))
      good, wrong = survey(numbers, examine, f'checking {self.folder}')
      bad = {f'record {i}': reason for i, reason in wrong.items()}
      table = np.array([*good.values()], np.int64)
      found = {'state': state, 'bad': bad}, table
      # What a disk that failed left unread may be good.
      if not any(reason.startswith(UNREADABLE) for reason in bad.values()):
        index_cache.save('tfds', location, *found)
    header, table = found
    return table.reshape(-1, 5), header['bad']


def find_build(path: AnyPath) -> pathlib.Path:
  """The folder of a build, by path or by name.

  Raises:
    DataError: there is none, or it needs TensorFlow.
  """
  folder = pathlib.Path(path)
  if not (folder / INFO).exists():
    base = pathlib.Path(
      os.path.expanduser(
        os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
      )
    )
    found = [
      pathlib.Path(file).parent
      for root in map(str, (folder, base / path))
      for file in glob.glob(f'{glob.escape(root)}/**/{INFO}', recursive=True)
    ]
    if not found:
      raise DataError(
        f'there is no TFDS build {path}, neither as a folder nor in {base}; '
        f'make one where TensorFlow is installed: tfds build {path} '
        '--file_format=array_record'
      )
    folder = max(found, key=_version)
  info = files.read_json(
    folder / INFO, error=DataError, advice='build the set again'
  )
  kind = info.get('fileFormat')
  if kind != 'array_record':
    raise DataError(
      f'{folder} is stored as {kind or "tfrecord"}, which only TensorFlow '
      'reads; make an ArrayRecord build where TensorFlow is installed: tfds '
      f'build {folder.parent.name} --file_format=array_record'
    )
  return folder


def _version(folder: pathlib.Path) -> tuple[list[int], str]:
  """Sort key: 1.10.0 after 1.9.0, then by path."""
  parts = folder.name.split('.')
  return [int(p) if p.isdigit() else -1 for p in parts], str(folder)


def _open(folder: pathlib.Path, split: str) -> tuple[Any, str, str, str]:
  """(the records, key of the image, key of the caption, the split)."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UsageError(
      'data.kind=tfds needs a package that is not installed '
      f"({error.name}): pip install 'imagen_jax[tfds]'."
    ) from error
  try:
    builder = tfds.builder_from_directory(str(folder))
    features, splits = builder.info.features, builder.info.splits
  except Exception as error:  # of many types, also where TensorFlow is missing
    raise DataError(
      f'{folder} cannot be opened as a TFDS build ({error}); build it again '
      'with --file_format=array_record.'
    ) from error
  images = [
    k for k, v in features.items() if isinstance(v, tfds.features.Image)
  ]
  captions = [k for k in CAPTION_KEYS if k in features]
  if not images or not captions:
    raise DataError(
      f'{folder} has no {"captions" if images else "image column"}: its '
      f'columns are {", ".join(features)}; images are columns of type Image '
      f'and captions are named {", ".join(CAPTION_KEYS)}.'
    )
  image = 'image' if 'image' in images else images[0]
  wanted = [split] if split != 'eval' else EVAL
  names = [name for name in wanted if name in splits]
  if not names:
    raise DataError(
      f'{folder} has no split {split}; it has {", ".join(splits)}.'
    )
  records = builder.as_data_source(
    split=names[0], decoders={image: tfds.decode.SkipDecoding()}
  )
  return records, image, captions[0], names[0]
