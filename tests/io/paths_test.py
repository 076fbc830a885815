"""Paths as users give them."""

import os
import pathlib
import pwd

import pytest

from imagen_jax.errors import UsageError
from imagen_jax.io import paths


def test_a_leading_tilde_is_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert paths.user_path('~/a/*.tar') == f'{tmp_path}/a/*.tar'
  for same in ('a', './~/a', 'a/~', '', 'gs://~/a', '/a//b/'):
    assert paths.user_path(same) == same
  with pytest.raises(UsageError):
    paths.user_path('~nobody-of-this-name/a')


def test_without_a_home_there_is_no_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  assert paths.cache_folder() == tmp_path / 'cache' / 'imagen_jax'
  assert paths.cache_folder().is_dir()
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert paths.cache_folder() is None
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.delenv('HOME')
  monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
  assert paths.cache_folder() is None
  with pytest.raises(UsageError):
    paths.user_path('~/a')


def test_what_cannot_become_a_folder_is_refused(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  (tmp_path / 'link').symlink_to('nowhere')
  for good in (tmp_path, tmp_path / 'new' / 'deep', 'new'):
    assert paths.check_folder(good) == pathlib.Path(good)
  for bad in ('file', 'file/sub', 'file/sub/sub', 'link', 'link/a', 'x' * 300):
    with pytest.raises(UsageError) as caught:
      paths.check_folder(tmp_path / bad, key='out')
    assert caught.value.key == 'out'
  assert sorted(os.listdir(tmp_path)) == ['file', 'link']
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with pytest.raises(UsageError):
    paths.check_folder(tmp_path / 'new')
