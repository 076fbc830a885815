"""evaluate.py --follow: the checkpoints of a run are scored as they appear."""

import json
import shutil

import pytest

from imagen_jax.cli import evaluate, follow
from imagen_jax.errors import ModelError
from imagen_jax.training import loop
from tests import tiny_model

FAST = ('--steps', 1, '--guidance', 1, '--sampler', 'ddim', '--num', 1)
FAST += ('--categories', 'single')


def run(*argv):
  return evaluate.main([str(word) for word in argv])


def config(model):
  made = tiny_model.config(keep_last=5)
  made.text.path = str(model / 'text')
  return made


def lines(folder):
  text = (folder / follow.FILE).read_text()
  return {row['step']: row for row in map(json.loads, text.splitlines())}


@pytest.fixture(scope='module')
def stopped(model, tmp_path_factory):
  """The workdir of a run of 6 steps that was stopped after 3."""
  workdir = tmp_path_factory.mktemp('follow') / 'base'
  loop.train(config(model), workdir, should_stop=lambda step: step == 3)
  return workdir


def test_checkpoints_are_scored_as_they_appear_until_the_run_ends(
  stopped, model, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(stopped, tmp_path / 'base')
  scored = []

  def go_on(seconds):
    scored.append(list(lines(workdir / 'scores')))
    loop.train(config(model), workdir)

  monkeypatch.setattr(follow.time, 'sleep', go_on)
  assert run('--follow', workdir, *FAST) == 0
  assert scored == [[3]]
  found = lines(workdir / 'scores')
  assert list(found) == [3, 6]
  digests = set()
  for step, row in found.items():
    folder = workdir / 'scores' / f'step_{step:07d}'
    scores = json.loads((folder / 'scores.json').read_text())
    assert row['shapes'] == scores['shapes']
    digests.add(scores['provenance']['shapes']['model_digest'])
    assert (folder / 'index.html').exists()
  assert len(digests) == 2  # each step's own weights
  assert not (workdir / 'scores' / '.model').exists()
  # Again: there is nothing left to do.
  capsys.readouterr()
  assert run('--follow', workdir, *FAST) == 0
  assert 'step' not in capsys.readouterr().err
  assert run('--follow', workdir, *FAST, '--seed', 1) == 2
  assert 'seed' in capsys.readouterr().err


def test_a_checkpoint_that_is_removed_before_its_turn_is_left_out(
  stopped, model, tmp_path, monkeypatch
):
  workdir = shutil.copytree(stopped, tmp_path / 'base')
  loop.train(config(model), workdir)
  export = follow._export

  def late(record, step, *more):
    if step == 3:
      shutil.rmtree(workdir / 'checkpoints' / '3')
      raise ModelError('it is gone')
    export(record, step, *more)

  monkeypatch.setattr(follow, '_export', late)
  assert run('--follow', workdir, '--out', tmp_path / 'out', *FAST) == 0
  assert list(lines(tmp_path / 'out')) == [6]


def test_a_damaged_checkpoint_is_an_error(stopped, tmp_path, capsys):
  workdir = shutil.copytree(stopped, tmp_path / 'base')
  files = [p for p in (workdir / 'checkpoints/3/state').rglob('*')]
  largest = max(
    (p for p in files if p.is_file()), key=lambda p: p.stat().st_size
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  assert run('--follow', workdir, *FAST) == 4
  assert largest.name in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--model', '--shard'])
def test_flags_that_contradict_it_are_refused(stopped, capsys, flag):
  assert run('--follow', stopped, flag, '0/2', *FAST) == 2
  assert flag in capsys.readouterr().err


def test_a_stage_that_does_not_change_is_refused(model, capsys):
  assert run('--follow', model / 'base', *FAST) == 2
  assert '--follow' in capsys.readouterr().err


def test_a_folder_for_the_scores_is_checked_first(tmp_path):
  (tmp_path / 'file').touch()
  assert run('--follow', tmp_path, '--out', tmp_path / 'file', *FAST) == 2
