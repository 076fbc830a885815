"""evaluate.py: the format of the scores, and resumed runs."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.cascade.cascade import Cascade
from imagen_jax.cli import evaluate
from imagen_jax.evaluation import generation
from imagen_jax.worlds import shapes
from imagen_jax.worlds import suite as shapes_suite
from tests import tiny_clip

FAST = ('--steps', 1, '--guidance', 1, '--sampler', 'ddim', '--stages', 'base')


def run(*argv):
  return evaluate.main([str(word) for word in argv])


@pytest.fixture(scope='module')
def report(model, tmp_path_factory):
  out = tmp_path_factory.mktemp('report')
  assert run('--model', model, '--num', 3, '--out', out, *FAST) == 0
  return out


def test_scores_have_the_format_of_the_contract(report):
  found = json.loads((report / 'scores.json').read_text())
  assert list(found['shapes']) == [
    *'single pair relation count fill heldout shuffled judge'.split()
  ]
  for score in found['shapes'].values():
    assert set(score) == {'accuracy', 'n', 'ci95'}
    assert score['ci95'][0] <= score['accuracy'] <= score['ci95'][1]
  assert found['shapes']['pair']['n'] == 3
  assert found['shapes']['shuffled']['n'] == 18
  notes = found['provenance']['shapes']
  assert notes['num'] == 3 and notes['resolution'] == 8
  assert notes['stages']['base']['steps'] == 1


def test_the_same_command_again_generates_nothing(report, model, capsys):
  before = {p: p.stat().st_mtime_ns for p in report.rglob('*.png')}
  run('--model', model, '--num', 3, '--out', report, *FAST)
  assert 'generated' not in capsys.readouterr().err
  assert before == {p: p.stat().st_mtime_ns for p in report.rglob('*.png')}


def test_a_larger_num_generates_only_the_new_images(
  report, model, tmp_path, capsys
):
  out = shutil.copytree(report, tmp_path / 'report')
  run('--model', model, '--num', 4, '--out', out, *FAST)
  assert '6/6 generated' in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(report, model, capsys):
  code = run('--model', model, '--out', report, *FAST, '--steps', 2)
  error = capsys.readouterr().err
  assert code == 2 and error.splitlines()[-1].startswith('error: --out')


def test_an_image_does_not_depend_on_shards_or_interruptions(
  report, model, tmp_path
):
  args = ['--model', model, '--num', 3, '--out', tmp_path, *FAST]
  args += ['--categories', 'pair,count']
  run(*args, '--shard', '1/2')
  assert not (tmp_path / 'scores.json').exists()
  # The last record is half-written, so its image counts as missing.
  lines = tmp_path / 'shapes/run/records-1-of-2.jsonl'
  data = lines.read_bytes()
  lines.write_bytes(data[:-20])
  run(*args, '--shard', '1/2')
  assert len(generation.read_records(tmp_path / 'shapes/run')) == 3
  run(*args, '--shard', '0/2')
  found = json.loads((tmp_path / 'scores.json').read_text())
  assert found['shapes']['pair']['n'] == 3
  for path in tmp_path.rglob('*.png'):
    same = report / path.relative_to(tmp_path)
    np.testing.assert_array_equal(
      generation.read_image(path.parent, {'file': path.name}),
      generation.read_image(same.parent, {'file': same.name}),
    )


def test_from_truth_conditions_on_true_low_resolution_images(
  model, tmp_path, monkeypatch
):
  given = []
  sample = Cascade.sample

  def spy(self, prompts, **options):
    given.append((prompts, options['low_res']))
    return sample(self, prompts, **options)

  monkeypatch.setattr(Cascade, 'sample', spy)
  args = ['--model', model, '--num', 2, '--out', tmp_path, '--from_truth']
  assert run(*args, '--categories', 'single', '--steps', 1) == 0
  (prompts, lows), *_ = given
  first = shapes_suite.scene('single', 0)
  assert prompts[0] == first.caption
  np.testing.assert_array_equal(lows[0], shapes.render(first, 8))
  found = json.loads((tmp_path / 'scores.json').read_text())
  assert found['shapes_from_truth']['single']['n'] == 2
  assert run(*args, '--stages', 'base') == 2


def test_the_suites_clip_and_prompts_score_a_file_of_prompts(model, tmp_path):
  prompts = tmp_path / 'p.csv'
  prompts.write_text('Prompt,Category\n"A cat.",a\nA dog,a\nTwo birds,b\n')
  tiny_clip.write(tmp_path / 'clip')
  out = tmp_path / 'report'
  args = ['--model', model, '--prompts', prompts, '--out', out, *FAST]
  assert run(*args, '--suite', 'prompts', '--num_images', 2) == 0
  assert run(*args, '--suite', 'clip', '--clip', tmp_path / 'clip') == 0
  found = json.loads((out / 'scores.json').read_text())
  assert found['prompts'] == {'a': {'n': 4}, 'b': {'n': 2}}
  assert list(found['clip']) == ['a', 'b', 'overall']
  assert found['clip']['overall']['n'] == 3
  assert len(found['provenance']['clip']['clip_sha256']) == 64
  page = (out / 'index.html').read_text()
  assert 'A cat.' in page and 'Two birds' in page


def test_a_sweep_is_one_run_for_each_value(model, tmp_path):
  args = ['--model', model, '--num', 1, '--out', tmp_path, '--steps', 1]
  args += ['--stages', 'base', '--categories', 'single']
  assert run(*args, '--sweep', 'guidance=1.0,1.50') == 0
  found = json.loads((tmp_path / 'scores.json').read_text())
  names = [name for name in found if name.startswith('shapes@')]
  assert names == ['shapes@guidance=1', 'shapes@guidance=1.5']


@pytest.mark.parametrize(
  'argv, flag',
  [
    (['--num', 0], '--num'),
    (['--batch_size', 0], '--batch_size'),
    (['--categories', 'pears'], '--categories'),
    (['--shard', '2/2'], '--shard'),
    (['--shard', 'half'], '--shard'),
    (['--sweep', 'width=1'], '--sweep'),
    (['--sweep', 'steps'], '--sweep'),
    (['--sweep', 'steps=1', '--sweep', 'steps=2'], '--sweep'),
    (['--sweep', 'sr7.steps=1'], '--sweep'),
    (['--sweep', 'steps=1,x'], '--steps'),
    (['--sweep', 'steps=1,0'], ''),
    (['--suite', 'pears'], '--suite'),
    (['--prompts', 'p.txt'], '--prompts'),
    (['--suite', 'fid'], '--data'),
  ],
)
def test_a_mistake_is_one_line_that_names_the_flag(
  argv, flag, model, tmp_path, capsys
):
  assert run('--model', model, '--out', tmp_path, *argv) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {flag}') and error.count('\n') == 1


@pytest.mark.slow
def test_an_interrupted_run_resumes(model, tmp_path):
  command = [sys.executable, '-m', 'imagen_jax.cli.evaluate', '--num', '40']
  command += ['--model', str(model), '--out', str(tmp_path), '--steps', '1']
  command += ['--stages', 'base', '--guidance', '1']
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  assert 'generated' in [line for line, _ in zip(process.stderr, range(2))][-1]
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 143 and 'same command' in error
  kept = len(generation.read_records(tmp_path / 'shapes/run'))
  assert 0 < kept < 240
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 0
  assert f'/{240 - kept} generated' in again.stderr
