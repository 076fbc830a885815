"""How a command shows an error."""

import os
import subprocess
import sys

import pytest

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError


@pytest.mark.parametrize(
  'message, key, shown',
  [
    ('num is 0; raise it.', 'num', '--num is 0; raise it.'),
    ('no.', 'num', '--num: no.'),
    ('stage.crop is 7.', 'config.stage.crop', '--config.stage.crop is 7.'),
    ('no.', 'config.seed', '--config.seed: no.'),
    ('data.kind is x.', 'config.data.kind', '--source is x.'),
  ],
)
def test_the_flag_stands_for_the_key_of_a_usage_error(
  message, key, shown, capsys
):
  def main(argv):
    raise UsageError(message, key=key)

  assert errors.run(main, [], {'config.data.kind': 'source'}) == 2
  assert capsys.readouterr().err == f'error: {shown}\n'


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_what_a_terminal_cannot_show_is_printed_in_escapes(encoding):
  code = (
    'import sys\nfrom imagen_jax.cli import errors\n'
    'def main(argv):\n  print("≤")\n  print("≤", file=sys.stderr)\n'
    'sys.exit(errors.run(main, []))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONIOENCODING': encoding},
    capture_output=True,
  )
  assert (done.returncode, done.stdout) == (0, rb'\u2264' + b'\n')
  assert done.stderr == done.stdout


@pytest.mark.parametrize(
  ('outcome', 'code'),
  [
    ('raise UsageError("no.")', 2),
    ('raise ModelError("no.")', 4),
    ('raise KeyboardInterrupt', 130),
    ('return 143', 143),
    ('return 1 / 0', 1),
  ],
)
def test_a_failed_process_ends_although_its_threads_wait_for_ever(
  outcome, code
):
  text = (
    'import sys, threading\n'
    'from imagen_jax.cli import errors\n'
    'from imagen_jax.errors import ModelError, UsageError\n'
    'errors.GRACE = 0.1\n'
    'def main(argv):\n'
    '  threading.Thread(target=threading.Event().wait).start()\n'
    f'  {outcome}\n'
    'sys.exit(errors.run(main))'
  )
  out = subprocess.run([sys.executable, '-c', text], timeout=20)
  assert out.returncode == code
