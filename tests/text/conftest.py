"""A random T5 folder for the tests of its parts."""

import pytest

from tests import tiny_text


@pytest.fixture
def folder(tmp_path):
  """A random T5 folder; tests spoil it as they like."""
  tiny_text.random_folder(tmp_path / 't5')
  return tmp_path / 't5'
