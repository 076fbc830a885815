"""scripts/launch.py prints a valid shell script."""

import importlib.util
import pathlib
import shlex
import subprocess

import pytest

PATH = pathlib.Path(__file__).parents[2] / 'scripts' / 'launch.py'


@pytest.fixture(scope='module')
def launch():
  spec = importlib.util.spec_from_file_location('launch', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


RUN = ['--config', 'imagen_sr256', '--workdir', "/data/it's here"]


def rendered(launch, capsys, *argv):
  assert launch.main([*argv[:1], *RUN, *argv[1:]]) == 0
  text = capsys.readouterr().out
  subprocess.run(['bash', '-n'], input=text, text=True, check=True)
  return text


def test_a_slurm_job_starts_one_process_per_gpu_and_queues_again(
  launch, capsys, tmp_path
):
  text = rendered(
    launch, capsys, 'slurm', '--nodes', '4', '--gpus', '2', '--', '--config.a=1'
  )
  assert '--nodes=4' in text and '--ntasks-per-node=2' in text
  # Run it with fakes of the cluster's commands.
  for name, body in (
    ('srun', 'printf "%s\\n" "$@" > "$LOG"; exit $CODE'),
    ('scontrol', 'echo again >> "$LOG"'),
  ):
    (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
    (tmp_path / name).chmod(0o755)
  for code, again in ((143, True), (0, False), (4, False)):
    log = tmp_path / f'log{code}'
    env = {'PATH': f'{tmp_path}:/usr/bin:/bin', 'CODE': str(code)}
    env |= {'LOG': str(log), 'SLURM_JOB_ID': '7'}
    done = subprocess.run(['bash'], input=text, text=True, env=env)
    words = log.read_text().splitlines()
    assert done.returncode == code
    assert ('again' in words) == again
  assert words[1:] == [
    *('python', 'train.py', *RUN, '--distributed', '--config.a=1')
  ]


def test_a_tpu_job_resumes_after_an_interruption_that_saved(
  launch, capsys, tmp_path
):
  text = rendered(
    launch, capsys, 'tpu', '--topology', 'v5e:16x16', '--zone', 'z', '--spot'
  )
  assert '--type=v5litepod --topology=16x16' in text and ' --spot' in text
  words = shlex.split(text, comments=True)
  inner = next(
    w for w in words if w.startswith('--command=cd imagen_jax && un')
  )
  # A fake `python` that exits with CODE until its run number ENOUGH.
  (tmp_path / 'imagen_jax').mkdir()
  (tmp_path / 'python').write_text(
    '#!/bin/bash\necho x >> count\n'
    '[ $(wc -l < count) -lt ${ENOUGH} ] && exit ${CODE}\nexit 0\n'
  )
  (tmp_path / 'python').chmod(0o755)
  for code, runs, result in ((143, 3, 0), (4, 1, 4)):
    (tmp_path / 'imagen_jax/count').unlink(missing_ok=True)
    env = {'PATH': f'{tmp_path}:/usr/bin:/bin', 'CODE': str(code)}
    done = subprocess.run(
      ['bash', '-c', inner.removeprefix('--command=')],
      cwd=tmp_path,
      env=env | {'ENOUGH': '3'},
    )
    assert done.returncode == result
    assert (tmp_path / 'imagen_jax/count').read_text().count('x') == runs


@pytest.mark.parametrize(
  'argv,words',
  [
    (['tpu', '--zone', 'z'], 'needs --topology'),
    (['tpu', '--zone', 'z', '--topology', 'v9:2x2'], "chip 'v9' is unknown"),
    (['slurm', '--node', '3'], 'did you mean --nodes?'),
  ],
)
def test_a_mistake_is_one_sentence(launch, capsys, argv, words):
  assert launch.main([*argv[:1], *RUN, *argv[1:]]) == 2
  assert words in capsys.readouterr().err
