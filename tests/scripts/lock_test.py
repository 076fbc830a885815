"""requirements.lock pins what setup.py asks for, on Python 3.11 to 3.13."""

import pathlib
import re
import runpy
import sys
import types

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
LINES = [
  line
  for line in (ROOT / 'requirements.lock').read_text().splitlines()
  if not line.startswith('#')
]


def asked_for(monkeypatch):
  """The requirements of setup.py with all extras but four."""
  found = {}
  # An environment of Python 3.12 or later need not have setuptools.
  setuptools = types.SimpleNamespace(
    setup=found.update, find_packages=lambda **_: []
  )
  monkeypatch.setitem(sys.modules, 'setuptools', setuptools)
  runpy.run_path(str(ROOT / 'setup.py'))
  extras = found['extras_require']
  # These have environments, or versions, of their own in .ci/run.
  for name in 'parity', 'peers', 'beam', 'web':
    del extras[name]
  return [
    Requirement(text)
    for text in sum(extras.values(), found['install_requires'])
  ]


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_all_that_setup_asks_for_is_pinned(monkeypatch, python):
  environment = {'python_full_version': f'{python}.9', 'sys_platform': 'linux'}
  pins = {}
  for pin in map(Requirement, LINES):
    if pin.marker is None or pin.marker.evaluate(environment):
      name = canonicalize_name(pin.name)
      assert name not in pins, f'{name} is pinned twice for Python {python}'
      pins[name] = str(pin.specifier).removeprefix('==')
  for requirement in asked_for(monkeypatch):
    name = canonicalize_name(requirement.name)
    assert name in pins, f'run the command at the top of the lock: no {name}'
    assert requirement.specifier.contains(pins[name], prereleases=True), name


def test_the_lock_names_no_index():
  text = (ROOT / 'requirements.lock').read_text()
  assert not re.search('https?:|--index|--extra-index|find-links', text)
