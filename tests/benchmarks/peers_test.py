"""The benchmarks against peers: our side of every row works."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'benchmarks/peers.py'
ROWS = (
  'train32', 'train256', 'sample32', 'sample256', 't5', 'png',
  'forward', 'backward',
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('row', ROWS)
def test_ours_is_measured(row, tmp_path):
  out = tmp_path / 'peers.json'
  command = [sys.executable, SCRIPT, '--short', '--rows', row, '--out', out]
  printed = subprocess.run(command, capture_output=True, text=True)
  assert printed.returncode == 0, printed.stderr
  assert '| imagen_jax |' in printed.stdout
  assert 'imagen_jax is left out' not in printed.stderr
