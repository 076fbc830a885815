"""A random T5 folder for the tests of its parts."""

import pathlib
import shutil

import pytest

from tests import tiny_text


@pytest.fixture(scope='session')
def t5(tmp_path_factory):
  """A random T5 folder, to be read."""
  folder = tmp_path_factory.mktemp('text') / 't5'
  tiny_text.random_folder(folder)
  return folder


@pytest.fixture
def folder(t5, tmp_path):
  """A copy of it, to be changed."""
  return pathlib.Path(shutil.copytree(t5, tmp_path / 't5'))
