"""Which samples of a tar meet conditions, and captions out of its table.

The columns come from the index (sizes), the tar (captions), and the table that
img2dataset writes beside a tar, which is joined by the samples' keys.
"""

import contextlib
import dataclasses
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8

from imagen_jax.data import metadata, tar_scan
from imagen_jax.data import where as conditions
from imagen_jax.data.checked import clean_captions, retried, thread_pool
from imagen_jax.data.tar_index import Index, Tar
from imagen_jax.data.where import Condition
from imagen_jax.errors import DataError
from imagen_jax.io import bucket, ranges
from imagen_jax.io.decode import BadSample

KEY = 'key'  # the table's column with the samples' keys
# Codes of rows that are not used; −1 is `aspect.SMALL`.
BAD = -2
FIRST = -3  # the first condition fails; −4: the second one, …


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is asked of the samples.

  Attributes:
    conditions: that they must meet.
    captions: the table's columns with captions; None: those of the tar.
  """

  conditions: Sequence[Condition] = ()
  captions: Sequence[str] | None = None

  @property
  def table(self) -> list[str]:
    """The columns of the table that are needed."""
    asked = [one.column for one in self.conditions]
    return [
      *(self.captions or ()),
      *(c for c in asked if c not in conditions.OWN),
    ]

  def __bool__(self) -> bool:
    return bool(self.conditions or self.captions)


@dataclasses.dataclass(frozen=True)
class Columns:
  """What was asked of the samples of a tar.

  Attributes:
    codes: of its rows: 0, `BAD`, or `FIRST` − the number of a condition.
    captions: of its rows, if they are the table's; of bad ones, ().
    bad: {number of a row of the tar: what is wrong}.
  """

  codes: Int8[np.ndarray, ' n']
  captions: Sequence[tuple[str, ...]]
  bad: Mapping[int, str]


def examine(
  index: Index, tar: Tar, shard: str, file: str, wanted: Wanted
) -> Columns:
  """What is asked of the samples of a tar.

  Args:
    index: with the tar.
    tar: which.
    shard: its path.
    file: with the uncompressed tar.
    wanted: what is asked.

  Raises:
    DataError: there is no table, or it is another tar's.
    UsageError: the table lacks a column.
  """
  rows = index.rows[tar.start : tar.start + tar.count]
  sizes = index.sizes(tar.start, tar.start + tar.count)
  columns: dict[str, Any] = {**conditions.image_columns(sizes)}
  captions: list[tuple[str, ...]] = []
  bad: dict[int, str] = {}
  if wanted.table:
    joined = _joined(rows, shard, file, wanted)
    for name in wanted.table:
      columns.setdefault(name, [row.get(name) for row in joined])
    bad |= {
      i: 'the table has no row for it' for i, r in enumerate(joined) if not r
    }
    if wanted.captions:
      said = lambda i: clean_captions(
        metadata.captions(joined[i], wanted.captions)
      )
      captions = _captions(len(rows), said, bad)
  if any(one.column in conditions.CAPTION for one in wanted.conditions):
    texts = captions or _captions(
      len(rows), lambda i: _text(file, rows[i]), bad
    )
    columns |= conditions.caption_columns(texts)
  failed = conditions.first_failure(wanted.conditions, columns, len(rows))
  codes = np.where(failed < 0, 0, FIRST - failed).astype(np.int8)
  codes[[*bad]] = BAD
  return Columns(codes, captions, bad)


def check(
  shard: str, where: Sequence[str] | None, captions: Sequence[str] | str | None
) -> None:
  """Raises UsageError if a tar's table, which is there, lacks a column."""
  columns = [captions] if isinstance(captions, str) else captions
  wanted = Wanted(conditions.parse(where), columns)
  if wanted.table:
    with contextlib.suppress(DataError):  # of this tar, not of all
      _table(shard, wanted)


def _captions(
  count: int, read: Callable[[int], tuple[str, ...]], bad: dict[int, str]
) -> list[tuple[str, ...]]:
  """The captions of rows; () of those that are `bad`, or found to be."""

  def one(i: int) -> tuple[str, ...] | BadSample:
    try:
      return () if i in bad else retried(read, i)
    except BadSample as error:
      return error

  with thread_pool() as pool:
    found = [*pool.map(one, range(count))]
  bad |= {i: str(e) for i, e in enumerate(found) if isinstance(e, BadSample)}
  return [() if isinstance(e, BadSample) else e for e in found]


def _text(file: str, row: np.void) -> tuple[str, ...]:
  """The captions in a tar."""
  size = int(row['text_size'])
  data = ranges.read(file, int(row['text']), size)
  return tar_scan.captions(tar_scan.whole(data, size), bool(row['is_json']))


def member(file: str, offset: int) -> str:
  """The name of the member of a tar whose data begin at an offset.

  Raises:
    OSError, tarfile.TarError: it cannot be read.
  """
  header = ranges.read(file, offset - 512, 512)
  return tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name


def _joined(
  rows: np.ndarray, shard: str, file: str, wanted: Wanted
) -> list[dict[str, Any]]:
  """The table's row of each sample; {} where there is none."""
  place, table = _table(shard, wanted)
  known = {str(row[KEY]): row for _, row in table.rows}
  with thread_pool() as pool:
    names = pool.map(lambda row: member(file, int(row['image'])), rows)
    # `tar -C folder .` puts ./ before the names.
    keys = [
      os.path.splitext(os.path.normpath(name.lstrip('/')))[0] for name in names
    ]
  joined = [known.get(key, {}) for key in keys]
  if keys and not any(joined):
    raise DataError(
      f'{place} is not the table of {shard}: it has none of its keys, such as '
      f'{keys[0]}.'
    )
  return joined


def _table(shard: str, wanted: Wanted) -> tuple[str, metadata.Table]:
  """(path, table) of what img2dataset writes beside a tar."""
  found = (shard.removesuffix(k) for k in tar_scan.KINDS if shard.endswith(k))
  stem = next(found, shard)
  place = f'{stem}.parquet'
  if not bucket.at(place).exists():
    raise DataError(
      f'{place} is missing: data.where and data.captions name columns of the '
      f'table that img2dataset writes beside each tar ({wanted.table[0]}).'
    )
  table = metadata.read(place, {KEY, *wanted.table})
  metadata.check_columns(wanted.captions or (), table.columns, place)
  conditions.check_columns(wanted.conditions, table.columns, place)
  if KEY not in table.columns:
    raise DataError(
      f'{place} has no column {KEY}, which names the samples of the tar; it '
      f'has {", ".join(table.columns)}.'
    )
  return place, table
