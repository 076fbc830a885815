"""Many parts, few open files; what fails is repeated, or named."""

import contextlib
import errno
import os
import pickle
import resource

import numpy as np
import pytest

from imagen_jax.data import checked, records
from imagen_jax.data.arrayrecord import write_records
from imagen_jax.data.checked import Checked
from imagen_jax.data.records import Part, Records
from imagen_jax.errors import DataError
from imagen_jax.io.decode import BadSample


def open_files():
  return len(os.listdir('/proc/self/fd'))


@contextlib.contextmanager
def few_files(number):
  """In it, this process may open no file whose descriptor is `number` or more.

  With 0, none, whatever another thread closes meanwhile.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def parts(tmp_path):
  """600 parts of 3 records, which name record and part, as links to 3 files."""
  made = []
  for i in range(600):
    file = tmp_path / f'{i}'
    if i < 3:
      write_records(file, [b'%d of %d' % (k, i) for k in range(3)])
    else:
      os.link(tmp_path / f'{i % 3}', file)
    made.append(Part(str(file), file.stat().st_size, 3))
  return made


def test_more_parts_than_files_that_may_be_open(parts):
  with few_files(256):
    before, whole = open_files(), Records(parts)
    assert len(whole) == 1800
    for i in np.random.default_rng(0).permutation(1800):
      assert whole[i] == b'%d of %d' % (i % 3, i // 3 % 3)
    assert before < open_files() <= before + 64
    assert pickle.loads(pickle.dumps(whole))[1799] == whole[1799]


def test_too_many_open_files_are_named_as_such(parts):
  source = Broken([Records(parts).__getitem__])
  with few_files(0), pytest.raises(DataError, match='ulimit'):
    source[0]


def test_a_damaged_record_is_bad_and_an_error_of_the_disk_is_not(
  parts, monkeypatch
):
  class Reader:
    def __init__(self, message):
      self.message = message

    def read(self, _):
      raise RuntimeError(self.message)

  for message, kind in [
    ('Corrupted Riegeli/records file: hash mismatch; at byte 3', BadSample),
    ('pread() failed: Input/output error; reading /x; at byte 3', OSError),
    ('last message of Unavailable; reading gs://b/x; at byte 3', OSError),
  ]:
    whole = Records(parts)
    reader = Reader(message)
    monkeypatch.setattr(records, '_open', lambda part, made=reader: made)
    with pytest.raises(kind):
      whole[0]
    monkeypatch.undo()
    assert whole[0] == b'0 of 0'  # with a new reader


class Broken(Checked):
  """Sample i calls `calls[i]`."""

  def __init__(self, calls):
    self.calls = calls
    super().__init__('', 1, max_bad=0.5)

  def scan(self, path):
    return {}, []

  def __len__(self):
    return len(self.calls)

  def name(self, i):
    return str(i)

  def example(self, i):
    return self.calls[i](i)


def failing(error, times):
  left = [error] * times

  def call(i):
    if left:
      raise left.pop()
    return i

  return call


def test_a_read_that_fails_is_repeated_and_not_remembered_as_bad(monkeypatch):
  monkeypatch.setattr(checked, 'PAUSES', (0, 0))
  io_error = OSError(errno.EIO, 'Input/output error')
  source = Broken([failing(io_error, 2), failing(io_error, 3), lambda i: i])
  assert source[0] == 0 and not source.bad and source.replaced == 0
  assert source[1] == 2 and list(source.bad) == ['1']
  assert source[1] == 1  # tried again
  gone = failing(FileNotFoundError(), 1)
  assert Broken([gone, lambda i: i, gone])[0] == 1  # at once
