"""What scripts/launch.py prints, run with stubs of the clouds' commands."""

import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jsonschema
import pytest
import yaml

HERE = pathlib.Path(__file__).parent
PATH = HERE.parents[1] / 'scripts' / 'launch.py'
SCHEMAS = json.loads((HERE / 'schemas.json').read_text())


@pytest.fixture(scope='module')
def launch():
  spec = importlib.util.spec_from_file_location('launch', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


RUN = ['--config', 'imagen_sr256', '--workdir', "gs://bucket/it's here"]
TPU = ['--topology', 'v5e:4x4', '--zone', 'z', '--spot']
TRAIN = ['python', 'train.py', *RUN, '--distributed']


def rendered(launch, capsys, *argv):
  assert launch.main([*argv[:1], *RUN, *argv[1:]]) == 0
  return capsys.readouterr().out


@pytest.fixture
def stubs(tmp_path):
  """Makes a command that logs its words and runs `body`."""
  (tmp_path / 'bin').mkdir()

  def make(name, body=''):
    path = tmp_path / 'bin' / name
    # Words end with 0x1f, calls with 0x1e: a word may have several lines.
    log = f'printf \'%s\\x1f\' {name} "$@" >> {tmp_path}/log'
    path.write_text(
      f"#!/bin/bash\n{log}; printf '\\x1e' >> {tmp_path}/log\n{body}\n"
    )
    path.chmod(0o755)

  return make


def calls(tmp_path):
  log = (tmp_path / 'log').read_text()
  return [call.split('\x1f')[:-1] for call in log.split('\x1e')[:-1]]


def run(text, tmp_path, **env):
  env = {key: str(value) for key, value in env.items()}
  env |= {'PATH': f'{tmp_path}/bin:{pathlib.Path(sys.executable).parent}'}
  env['PATH'] += ':/usr/bin:/bin'
  return subprocess.run(
    ['bash'], input=text, text=True, env=env, cwd=tmp_path, capture_output=True
  )


def test_the_commands_in_the_docs_print_a_job(launch, capsys):
  docs = HERE.parents[1] / 'docs'
  text = (docs / 'tpu.md').read_text() + (docs / 'gpu.md').read_text()
  found = re.findall(r'^python scripts/launch\.py ([^>]*) >', text, re.M)
  assert len(found) == 3
  for command in found:
    assert launch.main(shlex.split(command.replace('\\\n', ' '))) == 0
    assert 'train.py' in capsys.readouterr().out


# ---- SLURM -----------------------------------------------------------------
@pytest.mark.parametrize(
  'code,before,again',
  [
    *((code, 0, True) for code in (143, 1, 4, 5, 134, 137)),
    *((code, 0, False) for code in (0, 2, 3, 130)),
    (137, 49, True),
    (137, 50, False),
  ],
)
def test_slurm_queues_again_after_all_but_mistakes_and_within_a_limit(
  launch, capsys, stubs, tmp_path, code, before, again
):
  text = rendered(
    launch, capsys, 'slurm', '--nodes', '4', '--gpus', '2', '--', '--config.a=1'
  )
  assert '--nodes=4\n' in text and '--ntasks-per-node=2\n' in text
  stubs('srun', f'exit {code}')
  stubs('scontrol')
  done = run(text, tmp_path, SLURM_JOB_ID=7, SLURM_RESTART_COUNT=before)
  assert done.returncode == code
  srun, *rest = calls(tmp_path)
  assert [w for w in srun[1:] if w[:7] not in ('--kill-', '--wait=')] == [
    *('python', 'train.py', *RUN, '--config.a=1', '--distributed')
  ]
  assert rest == [['scontrol', 'requeue', '7']] * again


# ---- Queued resources ------------------------------------------------------
# The files hold what the slice is at each look, and how calls end.
GCLOUD = """
case $4 in
  describe)
    state=$(head -n 1 states); sed -i 1d states
    [ "$state" = NOT_FOUND ] && { echo "ERROR: NOT_FOUND: none" >&2; exit 1; }
    echo "$state" ;;
  create) exit $(head -n 1 creates; sed -i 1d creates) ;;
  ssh) code=$(head -n 1 ends); sed -i 1d ends
    [ "$code" = lost ] && exit 255
    echo "ended 0"; echo "ended $code"; exit "$code" ;;
esac
"""


def tpu_job(launch, capsys, stubs, tmp_path, *, states, ends, creates='0 0 0'):
  stubs('gcloud', GCLOUD)
  stubs('sleep')
  for name, words in ('states', states), ('ends', ends), ('creates', creates):
    (tmp_path / name).write_text(words.replace(' ', '\n'))
  done = run(rendered(launch, capsys, 'tpu', *TPU), tmp_path)
  verbs = [c[4] for c in calls(tmp_path) if c[0] == 'gcloud']
  return done.returncode, [v for v in verbs if v not in ('describe', 'scp')]


def test_a_preempted_slice_is_created_again_and_deleted_at_the_end(
  launch, capsys, stubs, tmp_path
):
  code, verbs = tpu_job(
    *(launch, capsys, stubs, tmp_path),
    states='NOT_FOUND WAITING_FOR_RESOURCES ACTIVE SUSPENDING SUSPENDED '
    'NOT_FOUND NOT_FOUND PROVISIONING ACTIVE ACTIVE ACTIVE',
    creates='0 1 0',  # no quota at once
    ends='lost 143 lost 0',
  )
  assert code == 0
  assert verbs == [
    *('create', 'ssh', 'delete'),  # a preemption while ssh waits
    *('create', 'create', 'ssh', 'ssh', 'ssh', 'delete'),
  ]
  create = next(c for c in calls(tmp_path) if c[4:5] == ['create'])
  assert create[5:] == [
    *('imagen', '--zone=z', '--node-id=imagen'),
    '--accelerator-type=v5litepod-16',
    '--runtime-version=v2-alpha-tpuv5-lite',
    '--spot',
  ]


@pytest.mark.parametrize('code', [1, 2, 3, 137])
def test_a_job_that_ended_for_good_ends_the_bill(
  launch, capsys, stubs, tmp_path, code
):
  assert tpu_job(
    *(launch, capsys, stubs, tmp_path), states='ACTIVE', ends=str(code)
  ) == (code, ['ssh', 'delete'])


def test_a_slice_that_cannot_be_asked_for_is_an_error_at_once(
  launch, capsys, stubs, tmp_path
):
  code, verbs = tpu_job(
    *(launch, capsys, stubs, tmp_path), states='NOT_FOUND', ends='', creates='1'
  )
  assert (code, verbs) == (1, ['create'])


def test_a_machine_is_installed_once_and_follows_what_runs(
  launch, capsys, stubs, tmp_path
):
  text = rendered(launch, capsys, 'tpu', *TPU)
  job = text.partition("<<'JOB'\n")[2].partition('JOB\n')[0]
  subprocess.run(['tar', '-czf', tmp_path / 'imagen_jax.tgz', '-T/dev/null'])
  # pip, then uv, which makes .venv
  stubs('python3', 'mkdir -p .venv/bin; touch .venv/bin/activate')
  stubs('imagen-supervise', 'exit 3')
  for _ in range(2):
    assert run(job, tmp_path).stdout == 'ended 3\n'
  names = [call[0] for call in calls(tmp_path)]
  assert names == ['python3'] * 3 + ['imagen-supervise'] * 2
  words = calls(tmp_path)[-1]
  assert words[words.index('--') + 1 :] == TRAIN


def test_a_machine_on_which_nothing_installs_ends_the_job(
  launch, capsys, tmp_path
):
  text = rendered(launch, capsys, 'tpu', *TPU)
  job = text.partition("<<'JOB'\n")[2].partition('JOB\n')[0]
  assert run(job, tmp_path).stdout == 'ended 1\n'


# ---- Kubernetes and SkyPilot -----------------------------------------------
def test_a_jobset_has_its_schema_and_restarts_on_all_but_mistakes(
  launch, capsys
):
  options = ['--topology', 'v5e:16x16', '--image', 'i', '--slices', '2']
  text = rendered(
    *(launch, capsys, 'gke', *options, '--compile_cache', 'gs://bucket/cache')
  )
  made = yaml.safe_load(text)
  jsonschema.validate(made, SCHEMAS['jobset'])
  (slices,) = made['spec']['replicatedJobs']
  job = slices['template']['spec']
  assert slices['replicas'] == 2 and job['parallelism'] == 256 / 4
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2, 3, 130]
  assert made['spec']['failurePolicy']['rules'][0]['action'] == 'FailJobSet'
  (container,) = job['template']['spec']['containers']
  cache = 'JAX_COMPILATION_CACHE_DIR=gs://bucket/cache'
  assert container['command'] == ['env', cache, *TRAIN]
  assert rule['onExitCodes']['containerName'] == container['name']
  job['backofLimit'] = 0
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(made, SCHEMAS['jobset'])


def test_xpk_gets_the_same_job(launch, capsys, stubs, tmp_path):
  stubs('xpk')
  options = ['--topology', 'v5p:4x4x8', '--slices', '2', '--image', 'i']
  options += ['--cluster', 'c', '--zone', 'z']
  assert (
    run(rendered(launch, capsys, 'xpk', *options), tmp_path).returncode == 0
  )
  (words,) = calls(tmp_path)
  flags = dict(word.removeprefix('--').split('=', 1) for word in words[3:])
  assert shlex.split(flags['command']) == TRAIN
  assert flags['tpu-type'] == 'v5p-256' and flags['num-slices'] == '2'


@pytest.mark.parametrize(
  'options,accelerator', [([], 'H100:8'), (TPU[:2], 'tpu-v5litepod-16')]
)
def test_a_managed_job_has_its_schema_and_is_supervised(
  launch, capsys, stubs, tmp_path, options, accelerator
):
  machines = options or ['--nodes', '2']
  text = rendered(launch, capsys, 'sky', '--spot', *machines)
  made = yaml.safe_load(text)
  jsonschema.validate(made, SCHEMAS['skypilot'])
  assert made['resources']['accelerators'] == accelerator
  assert made['resources']['use_spot'] is True
  assert made['num_nodes'] == (1 if options else 2)
  (tmp_path / '.venv/bin').mkdir(parents=True)
  (tmp_path / '.venv/bin/activate').touch()
  stubs('imagen-supervise', 'exit 3')
  done = run(
    made['run'],
    tmp_path,
    SKYPILOT_NODE_IPS='10.0.0.1\n10.0.0.2',
    SKYPILOT_NUM_NODES=2,
    SKYPILOT_NODE_RANK=1,
  )
  assert done.returncode == 3
  (words,) = calls(tmp_path)
  by_hand = ['--coordinator', '10.0.0.1:7777', '--num_processes', '2']
  by_hand += ['--process_id', '1']
  processes = TRAIN[-1:] if options else by_hand
  assert words[words.index('--') + 1 :] == [*TRAIN[:-1], *processes]


# ---- Mistakes --------------------------------------------------------------
@pytest.mark.parametrize(
  'argv,flag',
  [
    (['tpu', '--zone', 'z'], '--topology'),
    (['tpu', '--topology', 'v5e:4x4'], '--zone'),
    (['gke', '--topology', 'v5e:4x4'], '--image'),
    (['gke', '--topology', 'v5e:4x4', '--image', 'a b'], '--image'),
    (['sky', '--topology', 'v5e:3x3'], '--topology'),
    (['sky', '--slices', '2'], '--slices'),
    (['tpu', '--zone', 'z', '--topology', 'v9:2x2'], "chip 'v9'"),
    (['slurm', '--node', '3'], '--nodes'),
    (['slurm', '--spot'], '--spot'),
    (['slurm', '--topology', 'v5e:4x4'], '--topology'),
    (['tpu', *TPU, '--gpus', '8'], '--gpus'),
    (['sky', *TPU[:2], '--nodes', '2'], '--nodes'),
    (['slurm', '--name', 'My_Job'], '--name'),
    (['tpu', *TPU, '--workdir', '/mnt/runs'], '--workdir'),
  ],
)
def test_a_mistake_is_one_sentence(launch, capsys, argv, flag):
  assert launch.main([*argv[:1], *RUN, *argv[1:]]) == 2
  assert flag in capsys.readouterr().err
