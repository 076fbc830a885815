"""A random T5 folder for the tests of the text encoder."""

import pathlib
import shutil

import pytest

from tests import tiny_text


@pytest.fixture(scope='session')
def t5(tmp_path_factory):
  """A random T5 folder; read only."""
  folder = tmp_path_factory.mktemp('text') / 't5'
  tiny_text.random_folder(folder)
  return folder


@pytest.fixture
def folder(t5, tmp_path):
  """A copy of `t5` that a test may change."""
  return pathlib.Path(shutil.copytree(t5, tmp_path / 't5'))
