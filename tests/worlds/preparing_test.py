"""Preparing endless sources."""

from imagen_jax.cli import prepare as command_line
from imagen_jax.data import shards


def test_a_part_has_some_tens_of_megabytes_by_default(tmp_path):
  for size in (64, 256, 1024):
    spec = shards.Spec({'kind': 'shapes'}, size, number=10**6)
    spec, found = shards.plan(spec, max_bad=0)
    assert 40e6 < spec.part_size * size**2 * 3 < 210e6
    assert len(found) == -(-(10**6) // spec.part_size)


def test_an_endless_source_needs_a_number(tmp_path, capsys):
  command = ['--source', 'shapes', '--size', '8', '--out', str(tmp_path / 'o')]
  assert command_line.main(command) == 2
  assert '--num' in capsys.readouterr().err
