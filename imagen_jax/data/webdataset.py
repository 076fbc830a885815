"""Webdataset tars, as img2dataset writes them: key.jpg, key.txt, key.json.

A tar is read through an index of offsets, so any sample is one read away, also
in a bucket, and nothing is extracted, unpickled or piped through a shell. The
index is made once, by imagen-index or by the first run, with a checksum of each
image to detect later changes. Images are decoded when they are used.
"""

import bisect
import contextlib
import hashlib
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from imagen_jax.data import tar_index, tar_scan
from imagen_jax.data.checked import LISTED, MAX_BAD, Checked
from imagen_jax.data.source import Source
from imagen_jax.data.tar_index import Tar
from imagen_jax.data.tar_update import below, common_folder, open_index
from imagen_jax.errors import DataError
from imagen_jax.io import ranges
from imagen_jax.io.decode import BadSample
from imagen_jax.io.files import AnyPath
from imagen_jax.io.ranges import State

NEAR = 2**16  # bytes between image and caption that are read along


class WebDatasetSource(Checked):
  """Random access to the images of tars, {'image', 'caption'} each.

  The caption is the sample's .txt, or else "caption" or "text" of its .json.

  Args:
    path: a tar, a folder of tars, or a pattern such as 'shards/*.tar' or
      'gs://bucket/{00000..00099}.tar'.
    index: the index's file; None: tars.index in the common folder of the tars,
      or in the user's cache directory if that cannot be written to. It is made
      if it is missing, and renewed if tars have changed, unless imagen-index
      made it.
    size, resize, max_bad: see `Checked`.

  Attributes:
    shards: the tars, sorted by name.
    tars: the same, as the index has them.

  Raises:
    DataError: there is no tar, a file is not a tar, no image is usable, too
      many are bad, or the index is not of these tars.
  """

  path_is = "tars, such as 'shards/*.tar'"
  in_bucket = True

  needs = 'Its tars need images with a .txt or .json of the same name.'

  def __init__(
    self,
    path: AnyPath,
    size: int,
    *,
    index: AnyPath | None = None,
    resize: str = 'area',
    max_bad: float = MAX_BAD,
  ) -> None:
    self._where = None if index is None else os.fspath(index)
    super().__init__(path, size, resize=resize, max_bad=max_bad)

  def scan(self, path: AnyPath) -> tuple[dict[str, str], list[str]]:
    found = find_tars(path)
    root = common_folder(found)
    self.shards = tuple(found)
    names = {below(root, shard): shard for shard in found}
    self._index = open_index(root, found, self._where)
    self.tars = [self._index.tars[name] for name in names]
    self._shards = [names[tar.name] for tar in self.tars]
    self._starts = [tar.start for tar in self.tars]
    self._rows = tar_index.Selected(self._index, self.tars, self.size)
    bad: dict[str, str] = {}
    if sum(tar.bad for tar in self.tars):
      for name, key, reason in self._index.bad():
        if name in names and len(bad) < LISTED:
          bad[f'{name}/{key}'] = reason
    self.unlisted_bad = sum(tar.bad for tar in self.tars) - len(bad)
    small = [self._name(row) for row in self._rows.examples]
    self.unlisted_small = self._rows.small - len(small)
    return bad, small

  @classmethod
  def find_shards(cls, path: str) -> list[str]:
    return [*find_tars(path)]

  @classmethod
  @contextlib.contextmanager
  def open_shard(cls, path: str, **options: Any) -> Iterator[Source]:
    with (
      tempfile.TemporaryDirectory() as folder, tar_scan.on_disk(path) as tar
    ):  # fmt: skip
      name = os.path.basename(tar)
      found = tar_scan.scan(tar, name)
      broken = tar_scan.CUT, tar_scan.DAMAGED
      where = [f'{k}: {why}' for k, why in found.bad.items() if why in broken]
      # A cut between two files shows by the blocks of zeros that end a tar.
      if not where and ranges.read(tar, found.tar.bytes - 512, 512).strip(
        b'\0'
      ):
        where = ['its end is missing']
      if where:
        raise DataError(f'{path} is not whole: {where[0]}; download it again.')
      index = os.path.join(folder, tar_index.NAME)
      tar_index.write(index, [found])
      yield cls(tar, **options | {'index': index})

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def fingerprint(self) -> str:
    """sha256 of all offsets and images' checksums, and of what is selected."""
    text = ' '.join([*(tar.digest for tar in self.tars), str(len(self))])
    return hashlib.sha256(text.encode()).hexdigest()

  def name(self, i: int) -> str:
    return self._name(self._rows[i])

  def _name(self, row: int) -> str:
    """The name of a row's image, from its header of 512 bytes in the tar."""
    tar, shard = self._tar(row)
    offset = int(self._index.rows[row]['image'])
    try:
      header = ranges.read(shard, offset - 512, 512)
      member = tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name
      return f'{tar.name}/{member}'
    except (OSError, tarfile.TarError):
      return f'{tar.name} at byte {offset}'

  def _tar(self, row: int) -> tuple[Tar, str]:
    number = bisect.bisect_right(self._starts, row) - 1
    return self.tars[number], self._shards[number]

  def skipped_image(self, name: str) -> bytes | None:
    shards = zip(self.tars, self._shards)
    for tar, shard in shards:
      member = name.removeprefix(f'{tar.name}/')
      if member != name:
        with contextlib.suppress(OSError, tarfile.TarError, KeyError):
          with tarfile.open(shard, 'r:') as file:
            found = file.extractfile(member)
            return found.read() if found else None
    return None

  def read(self, i: int) -> tuple[bytes, Sequence[str]]:
    row = self._rows[i]
    _, shard = self._tar(row)
    image, text, size, length, crc, is_json = self._index.rows[row].item()
    data, said = _read_both(shard, (image, size), (text, length))
    if zlib.crc32(data) != crc:
      raise BadSample('it has changed since it was indexed')
    return data, [tar_scan.caption(said, is_json)]


def _read_both(
  shard: str, one: tuple[int, int], other: tuple[int, int]
) -> tuple[bytes, bytes]:
  """Two parts (offset, size) of a file, by one read if they are close."""
  start = min(one[0], other[0])
  stop = max(one[0] + one[1], other[0] + other[1])
  if stop - start <= one[1] + other[1] + NEAR:
    data = ranges.read(shard, start, stop - start)
    parts = [data[o - start : o - start + size] for o, size in (one, other)]
  else:
    parts = [ranges.read(shard, offset, size) for offset, size in (one, other)]
  return (
    tar_scan.whole(parts[0], one[1]), tar_scan.whole(parts[1], other[1])
  )  # fmt: skip


def find_tars(path: AnyPath) -> dict[str, State | None]:
  """{tar: its state} that a path or pattern matches, sorted; see `ranges.find`.

  Raises:
    DataError: there are none.
  """
  path = str(path)
  if path.startswith('pipe:'):
    raise DataError(
      f'{path} would run a shell command, which imagen_jax never does; '
      'download the tars and give their path.'
    )
  found = ranges.find(path, '.tar')
  if not found:
    raise DataError(
      f'there is no tar at {path}; give a tar, a folder of tars, or a quoted '
      "pattern such as 'shards/*.tar'."
    )
  return found
