"""How a command shows an error."""

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
