"""How a command shows an error."""

import pytest

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError


@pytest.mark.parametrize(
  'message, shown',
  [('num is 0; raise it.', '--num is 0; raise it.'), ('no.', '--num: no.')],
)
def test_the_flag_stands_for_the_key_of_a_usage_error(message, shown, capsys):
  def main(argv):
    raise UsageError(message, key='num')

  assert errors.run(main, []) == 2
  assert capsys.readouterr().err == f'error: {shown}\n'
