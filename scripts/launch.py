r"""Prints the script of a training job that recovers from failures.

  python scripts/launch.py tpu --topology v5e:16x16 --zone us-west4-a --spot \
      --config imagen_sr256 --workdir gs://BUCKET/sr256 > job.sh
  python scripts/launch.py slurm --nodes 4 --gpus 8 \
      --config imagen_sr256 --workdir /data/runs/sr256 > job.sbatch

where     what is printed, from scripts/templates
tpu       a shell script: TPU VMs through queued resources
gke       a JobSet for `kubectl apply`
xpk       a command of xpk, for GKE clusters that xpk made
sky       a managed job of SkyPilot, TPUs or GPUs of any cloud
slurm     a batch script

Nothing is started: read the script, then run it. Arguments after `--` are
passed to train.py, such as `-- --config.data.path=gs://BUCKET/data`.
"""

import argparse
import json
import pathlib
import re
import shlex
import string
import sys
from collections.abc import Collection, Sequence
from typing import Any

from imagen_jax.cli import errors, supervise
from imagen_jax.errors import UsageError
from imagen_jax.training import chips

TEMPLATES = pathlib.Path(__file__).parent / 'templates'
# (accelerator type, cores or chips it counts for each chip, runtime version for
# `gcloud`, GKE's name). Accelerator types name the default shape of a size.
TPUS = {
  'v4': ('v4', 2, 'tpu-ubuntu2204-base', 'tpu-v4-podslice'),
  'v5e': ('v5litepod', 1, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice'),
  'v5p': ('v5p', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice'),
  'v6e': ('v6e', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice'),
}
CHIPS_PER_HOST = 4
# What each place needs besides --config and --workdir.
NEEDED = {
  'tpu': ('topology', 'zone'),
  'gke': ('topology', 'image'),
  'xpk': ('topology', 'image', 'cluster', 'zone'),
  'sky': (),
  'slurm': (),
}
# The other flags, and where they have an effect.
SOMEWHERE = {
  'topology': ('tpu', 'gke', 'xpk', 'sky'),
  'slices': ('tpu', 'gke', 'xpk'),
  'spot': ('tpu', 'gke', 'sky'),  # of xpk, the cluster is
  'zone': ('tpu', 'xpk'),
  'image': ('gke', 'xpk'),
  'cluster': ('xpk',),
  'nodes': ('sky', 'slurm'),
  'gpus': ('sky', 'slurm'),
  'gpu': ('sky',),
  'cpus': ('slurm',),
  'time': ('slurm',),
}
# How the processes of SkyPilot's GPU machines find each other, one on each.
SKY_PROCESSES = (
  '--coordinator "$(echo "$SKYPILOT_NODE_IPS" | head -n 1):7777"',
  '--num_processes "$SKYPILOT_NUM_NODES"',
  '--process_id "$SKYPILOT_NODE_RANK"',
)


class _Template(string.Template):
  """`@name` is replaced: `$` belongs to the shell."""

  delimiter = '@'


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv: list[str]) -> None:
  split = argv.index('--') if '--' in argv else len(argv)
  argv, more = argv[:split], argv[split + 1 :]
  parser = _parser()
  args = parser.parse_args(argv)
  _check_given(args, parser.given(argv))
  print(render(args, more), end='')


def _parser() -> errors.Parser:
  parser = errors.Parser(prog='launch.py', description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('where', choices=NEEDED, help='where the job runs')
  add('--config', required=True, help='as for train.py')
  add(
    '--workdir',
    required=True,
    help='that all machines see: gs://BUCKET/…, under SLURM a shared disk',
  )
  add('--name', default='imagen', help='of the job')
  add(
    '--max_restarts',
    type=errors.positive,
    default=50,
    help='after as many failures the job ends; gke and slurm count preemptions',
  )
  add(
    '--compile_cache',
    help='gs://… of compiled programs, which start the next run sooner; who '
    'may write there can run code in the job',
  )
  add('--topology', help='of TPUs: chips and their shape, such as v5e:16x16')
  add('--slices', type=errors.positive, default=1, help='of that shape')
  add('--spot', action='store_true', help='cheaper, may be preempted')
  add('--zone', help='tpu, xpk: where the slices are')
  add('--image', help='gke, xpk: built from the Dockerfile')
  add('--cluster', help='xpk: its name')
  add('--nodes', type=errors.positive, default=1, help='of GPUs: machines')
  add('--gpus', type=errors.positive, default=8, help='of each machine')
  add('--gpu', default='H100', help="sky: SkyPilot's name of them")
  add('--cpus', type=errors.positive, default=8, help='slurm: cores per GPU')
  add('--time', default='24:00:00', help='slurm: before the job queues again')
  return parser


def render(args: argparse.Namespace, more: Sequence[str]) -> str:
  """The script of a job; `more` are arguments passed to train.py.

  Raises:
    UsageError: a flag is missing, or would lose the training's work.
  """
  _check(args)
  command = [
    *('python', 'train.py', '--config', args.config),
    *('--workdir', args.workdir, *more),
  ]
  if args.compile_cache:
    setting = f'JAX_COMPILATION_CACHE_DIR={args.compile_cache}'
    command = ['env', setting, *command]
  values = vars(args) | _machines(args)
  processes: tuple[str, ...] = SKY_PROCESSES
  if args.where != 'sky' or args.topology:
    command.append('--distributed')
    processes = ()
  train = ' \\\n      '.join((shlex.join(command), *processes))
  values |= {
    'train': train,
    'quoted': shlex.quote(train),
    'command': json.dumps(command),
    'codes': ', '.join(str(code) for code in supervise.FINAL if code),
    'final': ' | '.join(str(code) for code in supervise.FINAL),
  }
  suffix = 'yaml' if args.where in ('gke', 'sky') else 'sh'
  text = (TEMPLATES / f'{args.where}.{suffix}').read_text(encoding='utf-8')
  return _Template(text).substitute(values)


def _check(args: argparse.Namespace) -> None:
  for key in NEEDED[args.where]:
    if getattr(args, key) is None:
      raise UsageError(f'is needed for {args.where}; see --help.', key=key)
  if not re.fullmatch('[a-z]([-a-z0-9]{0,26}[a-z0-9])?', args.name):
    raise UsageError(
      f'{args.name!r} is not a name that all clouds accept: at most 28 small '
      'letters, digits and -, a letter first.',
      key='name',
    )
  if args.image is not None and not re.fullmatch(r'[\w./:@-]+', args.image):
    raise UsageError(f'{args.image!r} is no name of an image.', key='image')
  if args.where != 'slurm' and '://' not in args.workdir:
    raise UsageError(
      f'{args.workdir} would be lost with its machine; give a bucket, as in '
      'gs://BUCKET/NAME.',
      key='workdir',
    )


def _check_given(args: argparse.Namespace, given: Collection[str]) -> None:
  """Refuses flags that have no effect on this job."""
  for key, places in SOMEWHERE.items():
    of_gpus = args.topology and key in ('nodes', 'gpus', 'gpu')
    if key in given and (of_gpus or args.where not in places):
      raise UsageError(
        f'has no effect on a job of {args.where}'
        f'{" with --topology" if args.where in places else ""}; leave it out.',
        key=key,
      )


def _machines(args: argparse.Namespace) -> dict[str, Any]:
  """What the templates say of the machines."""
  if args.where == 'slurm' or not args.topology:
    return {
      'accelerator': f'{args.gpu}:{args.gpus}',
      'use_spot': json.dumps(args.spot),
      'extra': 'cuda12,gcs',
    }
  chip, num_chips = chips.parse_topology(args.topology)
  kind, per_chip, software, pool = TPUS[chip.name]
  local = min(num_chips, CHIPS_PER_HOST)
  if num_chips % local:
    raise UsageError(
      f'{args.topology} has {num_chips} chips, and a machine has '
      f'{CHIPS_PER_HOST}; choose a multiple of that.',
      key='topology',
    )
  selector = {
    'cloud.google.com/gke-tpu-accelerator': pool,
    'cloud.google.com/gke-tpu-topology': args.topology.partition(':')[2],
  }
  if args.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  accelerator, nodes = (
    f'{kind}-{num_chips * per_chip}',
    f'--node-id={args.name}',
  )
  if args.slices > 1:
    nodes = f'--node-count={args.slices} --node-prefix={args.name}'
  return {
    'accelerator': f'tpu-{accelerator}' if args.where == 'sky' else accelerator,
    'nodes': 1 if args.where == 'sky' else nodes,
    'software': software,
    'spot': ' --spot' if args.spot else '',
    'use_spot': json.dumps(args.spot),
    'extra': 'tpu,gcs',
    'selector': json.dumps(selector),
    'hosts': num_chips // local,
    'local_chips': local,
  }


if __name__ == '__main__':
  sys.exit(main())
