"""evaluate.py: scores as the contract has them, runs that continue."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.cli import evaluate
from imagen_jax.evaluation import generation, scores
from imagen_jax.worlds import shapes
from imagen_jax.worlds import suite as shapes_suite

FAST = ('--steps', 1, '--guidance', 1, '--sampler', 'ddim', '--stages', 'base')


def run(*argv):
  return evaluate.main([str(word) for word in argv])


@pytest.fixture(scope='module')
def report(model, tmp_path_factory):
  out = tmp_path_factory.mktemp('report')
  assert run('--model', model, '--num', 3, '--out', out, *FAST) == 0
  return out


def test_a_share_as_text():
  assert scores.cell([True] * 15 + [False] * 5) == '75 % (53 to 89)'
  assert scores.cell(iter(())) == ''


def test_wilsons_interval():
  # Table values; Wilson's interval of 15 of 20 and of 0 of 10.
  np.testing.assert_allclose(scores.wilson(15, 20), (0.5313, 0.8881), atol=1e-4)
  np.testing.assert_allclose(scores.wilson(0, 10), (0, 0.2775), atol=1e-4)
  assert scores.wilson(10, 10)[1] == 1
  # The ends are the fractions p with |k/n - p| = 1.96 sqrt(p (1 - p) / n).
  for p in scores.wilson(7, 30):
    assert abs(7 / 30 - p) == pytest.approx(
      scores.Z95 * (p * (1 - p) / 30) ** 0.5
    )
  with pytest.raises(ValueError, match='3 right of 2'):
    scores.wilson(3, 2)


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


def test_a_larger_num_continues(report, model, tmp_path, capsys):
  out = shutil.copytree(report, tmp_path / 'report')
  run('--model', model, '--num', 4, '--out', out, *FAST)
  assert '6/6 generated' in capsys.readouterr().err


def test_other_settings_do_not_mix(report, model, capsys):
  code = run('--model', model, '--out', report, *FAST, '--steps', 2)
  error = capsys.readouterr().err
  assert code == 2 and 'holds a run with another stages' in error
  assert 'another --out' in error


def test_an_image_does_not_depend_on_shares_or_interruptions(
  report, model, tmp_path
):
  args = ['--model', model, '--num', 3, '--out', tmp_path, *FAST]
  args += ['--categories', 'pair,count']
  run(*args, '--shard', '1/2')
  assert not (tmp_path / 'scores.json').exists()
  # One finished image is lost with its half-written line.
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


def test_from_truth_feeds_true_small_images(model, tmp_path, monkeypatch):
  given = []
  sample = evaluate.imagen_jax.Cascade.sample

  def spy(self, prompts, **options):
    given.append((prompts, options['low_res']))
    return sample(self, prompts, **options)

  monkeypatch.setattr(evaluate.imagen_jax.Cascade, 'sample', spy)
  args = ['--model', model, '--num', 2, '--out', tmp_path, '--from_truth']
  assert run(*args, '--categories', 'single', '--steps', 1) == 0
  (prompts, lows), *_ = given
  first = shapes_suite.scene('single', 0)
  assert prompts[0] == first.caption
  np.testing.assert_array_equal(lows[0], shapes.render(first, 8))
  found = json.loads((tmp_path / 'scores.json').read_text())
  assert found['shapes_from_truth']['single']['n'] == 2
  assert run(*args, '--stages', 'base') == 2


def test_stages_by_name_and_sweeps(model, tmp_path):
  args = ['--model', model, '--num', 1, '--out', tmp_path, '--steps', 1]
  args += ['--stages', 'base', '--categories', 'single']
  sweep = ['--sweep', 'threshold=static,none', '--sweep', 'base.guidance=2,3']
  assert run(*args, *sweep) == 0
  found = json.loads((tmp_path / 'scores.json').read_text())
  names = [name for name in found if name.startswith('shapes@')]
  assert names == [
    f'shapes@threshold={threshold},base.guidance={w}'
    for threshold in ('static', 'none')
    for w in (2, 3)
  ]
  notes = found['provenance'][names[-1]]
  assert notes['stages']['base']['guidance'] == 3
  assert notes['resolution'] == 8


@pytest.mark.parametrize(
  'argv, says',
  [
    (['--num', 0], 'score at least 1'),
    (['--batch_size', 0], 'at least 1'),
    (['--categories', 'pears'], 'there is no category'),
    (['--shard', '2/2'], 'is not understood'),
    (['--sweep', 'width=1'], 'is not understood'),
    (['--sweep', 'sr7.steps=1'], 'there is no stage'),
    (['--sweep', 'steps=1,x'], 'whole numbers'),
    (['--sweep', 'steps=1,0'], 'at least 1'),
  ],
)
def test_mistakes_are_one_sentence(argv, says, model, tmp_path, capsys):
  assert run('--model', model, '--out', tmp_path, *argv) == 2
  error = capsys.readouterr().err
  assert says in error and error.count('\n') == 1


def test_equal_sentences_get_different_images():
  found = shapes_suite.items(['single'], 300)
  assert len({(item.prompt, item.index) for item in found}) == 300


def test_the_judge_is_scored_on_the_true_images():
  def perfect(item):
    image = shapes_suite.true_image(item, 256)
    return shapes_suite.record(item, image)

  found = {
    (item.category, item.number): perfect(item)
    for item in shapes_suite.items(['relation', 'fill'], 8)
  }
  result, own = shapes_suite.score(found, ['relation', 'fill'], 8)
  assert result['judge']['accuracy'] >= 0.9
  assert {c: result[c] for c in own} == own
  assert result['shuffled']['accuracy'] == 0
  tables = shapes_suite.confusions(found)
  assert sum(n for (a, b), n in tables['fill'].items() if a == b) >= 5


def test_images_of_another_sentence_are_wrong():
  a, b = shapes_suite.items(['pair'], 2)
  image = shapes_suite.true_image(b, 256)
  kept = shapes_suite.record(a, image)
  assert not kept['correct'] and kept['judge']


@pytest.mark.slow
def test_an_interrupted_run_continues(model, tmp_path):
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
