"""The leaf packages can be deleted, together with their rows in the tables."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LEAVES = ('worlds', 'deepfloyd', 'planning', 'web')
COMMANDS = ('train', 'sample', 'evaluate', 'prepare', 'export')
CORE = ('diffusion', 'nets', 'io', 'text', 'cascade', 'data')


@pytest.fixture(scope='module')
def pruned(tmp_path_factory):
  """A copy of the project without the leaf packages."""
  top = tmp_path_factory.mktemp('pruned')
  for name in ('imagen_jax', 'configs', 'tests'):
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, top / name, ignore=ignore)
  shutil.copy(ROOT / 'pyproject.toml', top)
  for leaf in LEAVES:
    shutil.rmtree(top / 'imagen_jax' / leaf)
    shutil.rmtree(top / 'tests' / leaf)
  for table, rows_of_leaves in (
    ('data/sources.py', 3),
    ('training/experiment.py', 2),
  ):
    file = top / 'imagen_jax' / table
    leaves = '|'.join(LEAVES)
    rows = re.compile(rf"^  '\w+': 'imagen_jax\.({leaves})\..*\n", re.M)
    text, number = rows.subn('', file.read_text(encoding='utf-8'))
    assert number == rows_of_leaves
    file.write_text(text, encoding='utf-8')
  return top


def run(top, *words):
  env = {**os.environ, 'PYTHONPATH': str(top)}
  return subprocess.run(
    [sys.executable, *words], cwd=top, env=env, capture_output=True, text=True
  )


@pytest.mark.slow
def test_the_package_and_its_commands_do_without_the_leaves(pruned):
  code = 'import imagen_jax as i; print(i.__file__, i.load)'
  found = run(pruned, '-c', code)
  assert found.stdout.startswith(str(pruned)), found.stderr
  for command in COMMANDS:
    found = run(pruned, '-m', f'imagen_jax.cli.{command}', '--help')
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_the_cores_tests_do_without_the_leaves(pruned):
  folders = [f'tests/{name}' for name in CORE]
  found = run(pruned, '-m', 'pytest', '-q', '-n', '2', *folders)
  assert found.returncode == 0, found.stdout[-4000:]
