"""Webdataset tars, as img2dataset writes them: key.jpg, key.txt, key.json.

A tar is read through an index of offsets, so any sample is one read away, also
in a bucket, and nothing is extracted, unpickled or piped through a shell. The
index is made once, by imagen-index or by the first run, with a checksum of each
image to detect later changes. Images are decoded when they are used.
"""

import bisect
import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.data import tar_columns, tar_index, tar_scan
from imagen_jax.data.checked import LISTED, MAX_BAD, Checked
from imagen_jax.data.progress import Progress
from imagen_jax.data.source import Source
from imagen_jax.data.tar_index import Tar
from imagen_jax.data.tar_update import below, common_folder, open_index
from imagen_jax.errors import DataError
from imagen_jax.io import aspect as aspects
from imagen_jax.io import ranges
from imagen_jax.io.decode import BadSample
from imagen_jax.io.files import AnyPath
from imagen_jax.io.ranges import State

UNUSED = -128  # a row of a tar that is not asked for
NEAR = 2**16  # bytes between image and caption that are read along


class WebDatasetSource(Checked):
  """Random access to the images of tars, {'image', 'caption'} each.

  The caption is the sample's .txt, or else "caption" or "text" of its .json,
  which may be a list of several. Further columns are those of the table that
  img2dataset writes beside a tar, 00000.parquet of 00000.tar.

  Args:
    path: a tar, a folder of tars, or a pattern such as 'shards/*.tar' or
      'gs://bucket/{00000..00099}.tar'. A .tar.gz is decompressed into the
      temporary folder for as long as the source is there.
    index: the index's file; None: tars.index in the common folder of the tars,
      or in the user's cache directory if that cannot be written to. It is made
      if it is missing, and renewed if tars have changed, unless imagen-index
      made it.
    size, resize, max_bad, aspect, where, captions: see `Checked`.

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
    aspect: str = 'crop',
    where: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    _plain: tar_scan.Plain | None = None,
  ) -> None:
    self._where = None if index is None else os.fspath(index)
    self._plain = _plain or tar_scan.Plain()
    super().__init__(
      path,
      size,
      resize=resize,
      max_bad=max_bad,
      aspect=aspect,
      where=where,
      captions=captions,
    )

  def scan(self, path: AnyPath) -> tuple[dict[str, str], Mapping[str, str]]:
    found = find_tars(path)
    root = common_folder(found)
    self.shards = tuple(found)
    names = {below(root, shard): shard for shard in found}
    self._index = open_index(root, found, self._where)
    self.tars = [self._index.tars[name] for name in names]
    self._shards = [names[tar.name] for tar in self.tars]
    self._starts = [tar.start for tar in self.tars]
    bad: dict[str, str] = {}
    if sum(tar.bad for tar in self.tars):
      for name, key, reason in self._index.bad():
        if name in names and len(bad) < LISTED:
          bad[f'{name}/{key}'] = reason
    self.unlisted_bad = sum(tar.bad for tar in self.tars) - len(bad)
    self._texts: dict[int, tuple[str, ...]] = {}
    self._rule = [self.aspect] if self.aspect != 'crop' else []
    return self._select(bad)

  def _select(self, bad: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """Chooses the rows; returns `bad` with more, and what is left out."""
    codes = self._codes(bad)
    spans = [*tar_index.spans(self.tars)]

    def choose(start: int, stop: int) -> np.ndarray:
      sizes = self._index.sizes(start, stop)
      chosen = aspects.choose(sizes, self.size, self.aspect)
      if codes is not None:
        some = codes[start:stop]
        chosen = np.where((chosen >= 0) & (some < 0), some, chosen)
      used = np.zeros(stop - start, bool)
      for first, last in spans:
        used[max(first - start, 0) : max(last - start, 0)] = True
      return np.where(used, chosen, UNUSED)

    total = len(self._index.rows)
    self._rows = tar_index.Selected(total, choose, len(self.shapes))
    self.set_buckets(self._rows.counts)
    left: dict[str, str] = {}
    for code, some in self._rows.examples.items():
      if code not in (UNUSED, tar_columns.BAD):
        condition = -1 if code == aspects.SMALL else tar_columns.FIRST - code
        reason = self.why_left(condition)
        left |= {self._name(row): reason for row in some}
        more = self._rows.left[code] - len(some)
        more += self.unlisted.get(reason, 0)
        self.unlisted = {**self.unlisted, reason: more}
    return bad, left

  def _codes(self, bad: dict[str, str]) -> np.ndarray | None:
    """`Columns.codes` of all rows, if any are asked for; adds to `bad`."""
    wanted = tar_columns.Wanted(self.conditions, self.columns)
    if not wanted:
      return None
    codes = np.zeros(len(self._index.rows), np.int8)
    progress = Progress(f'{self.where}: columns of tars', len(self.tars))
    for tar, shard in zip(self.tars, self._shards):
      file = self._plain[shard]
      found = tar_columns.examine(self._index, tar, shard, file, wanted)
      codes[tar.start : tar.start + tar.count] = found.codes
      bad |= {self._name(tar.start + i): why for i, why in found.bad.items()}
      if wanted.captions:
        self._texts |= dict(enumerate(found.captions, start=tar.start))
      progress.add()
    progress.close()
    said = json.dumps([*self._texts.items()]).encode()
    self._rule.append(hashlib.sha256(codes.tobytes() + said).hexdigest())
    return codes

  @classmethod
  def find_shards(cls, path: str) -> dict[str, str]:
    found = find_tars(path)
    # Not their common folder, which is another if some vanish.
    root = ranges.top(path, found)
    return {below(root, tar): tar for tar in found}

  @classmethod
  def check_shard(cls, path: str, **options: Any) -> None:
    tar_columns.check(path, options.get('where'), options.get('captions'))

  @classmethod
  @contextlib.contextmanager
  def open_shard(cls, path: str, **options: Any) -> Iterator[Source]:
    with contextlib.ExitStack() as stack:
      packed = stack.enter_context(tar_scan.on_disk(path))
      file, cut = stack.enter_context(tar_scan.unzipped(path, packed))
      whole = f'{path} is not whole: {{}}; download it again.'
      if cut:
        raise DataError(whole.format('its end is missing'))
      try:
        found = tar_scan.scan(file, os.path.basename(path))
      except DataError as error:  # which names the copy
        raise DataError(str(error).replace(file, path)) from error
      broken = tar_scan.CUT, tar_scan.DAMAGED
      where = [f'{k}: {why}' for k, why in found.bad.items() if why in broken]
      # A tar ends with blocks of zeros, so a cut between two files shows too.
      last = ranges.read(file, found.tar.bytes - 512, 512)
      if where or last.strip(b'\0'):
        raise DataError(whole.format([*where, 'its end is missing'][0]))
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      index = os.path.join(folder, tar_index.NAME)
      tar = dataclasses.replace(found.tar, bytes=os.stat(packed).st_size)
      tar_index.write(index, [dataclasses.replace(found, tar=tar)])
      plain = tar_scan.Plain({path: file})
      yield cls(path, **options | {'index': index, '_plain': plain})

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def fingerprint(self) -> str:
    """sha256 of all offsets and images' checksums, and of what is selected."""
    what = [*(tar.digest for tar in self.tars), str(len(self)), *self._rule]
    return hashlib.sha256(' '.join(what).encode()).hexdigest()

  def name(self, i: int) -> str:
    return self._name(self._rows[i])

  def _name(self, row: int) -> str:
    """The name of a row's image, from its header of 512 bytes in the tar."""
    tar, shard = self._tar(row)
    offset = int(self._index.rows[row]['image'])
    try:
      return f'{tar.name}/{tar_columns.member(shard, offset)}'
    except (OSError, tarfile.TarError):
      return f'{tar.name} at byte {offset}'

  def _tar(self, row: int) -> tuple[Tar, str]:
    number = bisect.bisect_right(self._starts, row) - 1
    return self.tars[number], self._plain[self._shards[number]]

  def skipped_image(self, name: str) -> bytes | None:
    shards = zip(self.tars, self._shards)
    for tar, shard in shards:
      member = name.removeprefix(f'{tar.name}/')
      if member != name:
        with contextlib.suppress(OSError, tarfile.TarError, KeyError):
          with tarfile.open(self._plain[shard], 'r:') as file:
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
    if self._texts:
      return data, self._texts[row]
    return data, tar_scan.captions(said, is_json)


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
  found = ranges.find(path, tar_scan.KINDS)
  if not found:
    raise DataError(
      f'there is no tar at {path}; give a tar, a folder of tars, or a quoted '
      "pattern such as 'shards/*.tar'."
    )
  named = {name for name in ranges.expand(path) if not glob.has_magic(name)}
  if len(named) > 1 and (missing := sorted(named - found.keys())):
    logging.getLogger(__name__).warning(
      '%s: %d of the tars named are not there (%s%s).',
      path,
      len(missing),
      ', '.join(missing[:3]),
      ', …' if len(missing) > 3 else '',
    )
  return found
