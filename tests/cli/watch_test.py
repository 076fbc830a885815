"""imagen-watch: what the files of runs say."""

import json
import shutil

import pytest

from imagen_jax.cli import watch
from imagen_jax.io import manifest
from imagen_jax.io.model_folder import FORMAT_VERSION
from imagen_jax.training import ledger

ROW = {'step': 400, 'loss': 0.25, 'images_per_sec': 64.0, 'mfu_percent': 31.25}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  """A run of 1000 steps of 32 images, seen 75 s ago at step 400."""
  folder = tmp_path / 'base'
  (folder / 'checkpoints').mkdir(parents=True)
  train = {'num_steps': 1000, 'batch_size': 32, 'checkpoint_dir': None}
  config = {'format_version': FORMAT_VERSION, 'config': {'train': train}}
  (folder / 'config.json').write_text(json.dumps(config))
  lines = [json.dumps(ROW | {'step': step}) for step in range(1, 401)]
  (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n{"step": 401, ')
  seconds = dict.fromkeys(ledger.PARTS, 0.0) | {'step': 90.0, 'down': 10.0}
  account = {'format_version': ledger.FORMAT_VERSION, 'time': 1000.0}
  account |= {'seconds': seconds, 'starts': 1, 'finished': False}
  (folder / ledger.FILE).write_text(json.dumps(account))
  for step in (200, 400):  # the second is being written
    (folder / 'checkpoints' / str(step)).mkdir()
  monkeypatch.setattr(manifest, 'is_whole', lambda path: path.name == '200')
  monkeypatch.setattr(watch.time, 'time', lambda: 1075.0)
  return folder


def once(capsys, *folders):
  assert watch.main(['--once', *map(str, folders)]) == 0
  head, *lines = capsys.readouterr().out.splitlines()
  return head, lines


def test_a_row_has_the_last_whole_line_and_the_newest_whole_checkpoint(
  workdir, capsys
):
  head, [line] = once(capsys, workdir)
  assert [part for name in watch.COLUMNS for part in name.split()] == (
    head.split()
  )
  # 600 steps of 32 images at 64 images/s take 300 s.
  assert line.removeprefix(str(workdir)).split() == (
    '400/1000 0.25 64.0 31.2 % 90.0 % 5m00s 200 1m15s ago'.split()
  )


def test_a_run_without_a_step_and_one_that_has_ended(workdir, tmp_path, capsys):
  new, done = tmp_path / 'new', shutil.copytree(workdir, tmp_path / 'done')
  new.mkdir()
  shutil.copy(workdir / 'config.json', new)
  with (done / 'metrics.jsonl').open('a') as file:
    file.write('\n' + json.dumps(ROW | {'step': 1000, 'loss': None}) + '\n')
  _, lines = once(capsys, new, done)
  assert lines[0].split()[1:] == ['0/1000', *'–––––––']
  assert lines[1].split()[1:3] == ['1000/1000', '–']
  assert lines[1].split()[-1] == watch.FINISHED
  # Without --once it ends when all runs have.
  assert watch.main([str(done)]) == 0


def test_the_table_is_printed_again_until_the_runs_have_ended(
  workdir, monkeypatch, capsys
):
  def finish(seconds):
    assert seconds == 3
    with (workdir / 'metrics.jsonl').open('a') as file:
      file.write('\n' + json.dumps(ROW | {'step': 1000}) + '\n')

  monkeypatch.setattr(watch.time, 'sleep', finish)
  assert watch.main([str(workdir), '--every', '3']) == 0
  assert capsys.readouterr().out.count('images/s') == 2


def test_a_folder_that_is_no_workdir_is_refused(tmp_path, capsys):
  assert watch.main(['--once', str(tmp_path)]) == 2
  assert str(tmp_path) in capsys.readouterr().err
