"""Files are written atomically; a file that cannot be read is named."""

import errno
import hashlib
import os

import pytest

from imagen_jax.errors import DataError, ModelError
from imagen_jax.io import files


def make(path, text='new'):
  """Writes or replaces a file."""
  with files.replacing(path) as temporary:
    temporary.write_text('half')
    temporary.write_text(text)


def make_folder(path, text='new'):
  """Writes a folder with a file."""
  with files.replacing(path) as temporary:
    temporary.mkdir()
    (temporary / 'file').write_text(text)


def test_what_is_replaced_is_seen_old_or_new_and_nothing_is_left(tmp_path):
  path = tmp_path / 'deep' / 'file'
  make(path, 'old')
  with files.replacing(path) as temporary:
    temporary.write_text('new')
    assert path.read_text() == 'old' and temporary.name.startswith('.')
  assert path.read_text() == 'new'
  make_folder(tmp_path / 'folder')
  assert (tmp_path / 'folder' / 'file').read_text() == 'new'
  names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*')}
  assert names == {'deep', 'deep/file', 'folder', 'folder/file'}


def test_the_mark_of_other_editors_is_no_text_and_lines_end_at_newlines(
  tmp_path,
):
  text, objects = tmp_path / 'a.txt', tmp_path / 'a.jsonl'
  text.write_bytes('\ufeffa\u2028b\r\nc'.encode())
  objects.write_bytes('\ufeff{"a": "\u2028"}\r\n{"b": 1}\n{"c"'.encode())
  assert files.read_text(text, advice='') == 'a\u2028b\nc'
  assert list(files.read_lines(objects)) == [{'a': '\u2028'}, {'b': 1}]
  objects.write_bytes('\ufeff{"a": 1}'.encode())
  assert files.read_json(objects) == {'a': 1}
  for data in (b'\xff\xfea\0', None):  # UTF-16; missing
    text.unlink() if data is None else text.write_bytes(data)
    with pytest.raises(DataError):
      files.read_text(text, advice='')


@pytest.mark.parametrize('kind', [make, make_folder])
def test_what_fails_leaves_the_old_and_no_temporary(kind, tmp_path):
  (tmp_path / 'file').write_text('old')
  with pytest.raises(TypeError):
    kind(tmp_path / 'file', 3)
  assert [p.name for p in tmp_path.iterdir()] == ['file']
  assert (tmp_path / 'file').read_text() == 'old'


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path):
  with files.replacing(tmp_path / 'file') as one:
    with files.replacing(tmp_path / 'file') as other:
      one.write_text('one')
      other.write_text('other')
    assert (tmp_path / 'file').read_text() == 'other'
  assert (tmp_path / 'file').read_text() == 'one'


def test_a_place_that_cannot_be_written_is_the_asked_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError):
    make(tmp_path / 'file' / 'below')
  with pytest.raises(ModelError, match='file/below'):
    with files.replacing(tmp_path / 'file' / 'below', error=ModelError):
      pass


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / 'x.json'
  files.write_json(path, {'a': (1, 'ü')})
  assert files.read_json(path) == {'a': [1, 'ü']}
  with pytest.raises(TypeError):
    files.write_json(path, {'a': object()})
  assert files.read_json(path) == {'a': [1, 'ü']}
  assert [p.name for p in tmp_path.iterdir()] == ['x.json']


@pytest.mark.parametrize(
  'text', [None, '', '{', '[]', '3', '[' * 10**5, '{"format_version": 2}']
)
def test_json_that_is_no_object_of_this_version_is_named(tmp_path, text):
  path = tmp_path / 'x.json'
  if text is not None:
    path.write_text(text)
  for error in (ModelError, DataError):
    with pytest.raises(error, match='x.json'):
      files.read_json(path, error=error, version=1)


def test_json_lines_are_read_without_one_that_a_kill_cut_short(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
  assert list(files.read_lines(path)) == [{'a': 1}, {'a': 2}]
  with pytest.raises(DataError):
    list(files.read_lines(tmp_path / 'none.jsonl', error=DataError))


def test_a_digest_is_of_the_bytes(tmp_path):
  path = tmp_path / 'file'
  path.write_bytes(b'12345')
  sha256 = hashlib.sha256(b'12345').hexdigest()
  assert files.digest(path) == {'bytes': 5, 'sha256': sha256}


def test_the_file_systems_reason_is_found_in_what_wraps_it():
  for number in files.STORAGE:
    wrapped = RuntimeError(f'pages of {OSError(number, os.strerror(number))}…')
    assert files.storage_reason(wrapped) == os.strerror(number)
  assert files.storage_reason(OSError(errno.ENOENT, 'No such file')) is None


def test_the_commit_is_this_checkouts():
  commit = files.git_commit()
  assert commit is None or len(commit) == 40
