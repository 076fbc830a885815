r"""Prints the script of a training job on a TPU slice or a SLURM cluster.

  python scripts/launch.py tpu --name imagen --zone us-west4-a \
      --topology v5e:16x16 --config imagen_sr256 --workdir /mnt/runs/sr256
  python scripts/launch.py slurm --nodes 4 --gpus 8 \
      --config imagen_sr256 --workdir /data/runs/sr256 > job.sbatch

Nothing is started: read the script, then run it. Arguments after `--` are
passed to train.py, such as `-- --config.data.path=/mnt/data`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError
from imagen_jax.training import chips

# (accelerator type, runtime version) for `gcloud`.
SLICES = {
  'v4': ('v4', 'tpu-ubuntu2204-base'),
  'v5e': ('v5litepod', 'v2-alpha-tpuv5-lite'),
  'v5p': ('v5p', 'v2-alpha-tpuv5'),
  'v6e': ('v6e', 'v2-alpha-tpuv6e'),
}
# Exit codes of a run that saved a checkpoint and can be resumed.
SAVED = '130 143'

TPU = """\
# 1. Ask for the slice, and wait until it is ACTIVE.
gcloud compute tpus queued-resources create {name} --node-id={name} \\
    --zone={zone} --type={kind} --topology={shape} \\
    --runtime-version={software}{spot}
gcloud compute tpus queued-resources describe {name} --zone={zone}

# 2. Install on every machine of it.
gcloud compute tpus tpu-vm scp --recurse . {name}:imagen_jax --zone={zone} \\
    --worker=all
gcloud compute tpus tpu-vm ssh {name} --zone={zone} --worker=all \\
    --command="cd imagen_jax && pip install -e '.[tpu]'"

# 3. Train; after an interruption that saved, resume.
gcloud compute tpus tpu-vm ssh {name} --zone={zone} --worker=all \\
    --command={train}

# 4. Give the slice back.
gcloud compute tpus queued-resources delete {name} --zone={zone} --force
"""
SLURM = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --signal=TERM@120
# One process per GPU; they find each other through SLURM. Two minutes before
# the time limit all of them get SIGTERM, save, and the job is queued again.
srun --kill-on-bad-exit=1 {train}
code=$?
case " {saved} " in
  *" $code "*) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv: list[str]) -> None:
  split = argv.index('--') if '--' in argv else len(argv)
  argv, more = argv[:split], argv[split + 1 :]
  parser = errors.Parser(prog='launch.py', description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('where', choices=('tpu', 'slurm'), help='where the job runs')
  add('--config', required=True, help='as for train.py')
  add('--workdir', required=True, help='on a disk that every machine sees')
  add('--name', default='imagen', help='of the job')
  add('--topology', help='tpu: chips and their shape, such as v5e:16x16')
  add('--zone', help='tpu: where the slice is')
  add('--spot', action='store_true', help='tpu: cheaper, may be preempted')
  add('--nodes', type=errors.positive, default=1, help='slurm: machines')
  add('--gpus', type=errors.positive, default=8, help='slurm: of each machine')
  add(
    '--cpus', type=errors.positive, default=8, help='slurm: cores for each GPU'
  )
  add('--time', default='24:00:00', help='slurm: before the job queues again')
  args = parser.parse_args(argv)
  print(render(args, more), end='')


def render(args: argparse.Namespace, more: Sequence[str]) -> str:
  """The script of a job; `more` are arguments passed to train.py."""
  train = shlex.join(
    [
      *('python', 'train.py', '--config', args.config),
      *('--workdir', args.workdir, '--distributed', *more),
    ]
  )
  if args.where == 'slurm':
    return SLURM.format(train=train, saved=SAVED, **vars(args))
  if not args.topology or not args.zone:
    raise UsageError('a TPU needs --topology, such as v5e:16x16, and --zone.')
  chip, _ = chips.parse_topology(args.topology)
  kind, software = SLICES[chip.name]
  again = f'cd imagen_jax && until {train}; do c=$?; '
  again += f'case " {SAVED} " in *" $c "*) ;; *) exit $c;; esac; done'
  changed = {
    'kind': kind,
    'software': software,
    'shape': args.topology.partition(':')[2],
    'spot': ' --spot' if args.spot else '',
    'train': shlex.quote(again),
  }
  return TPU.format(**(vars(args) | changed))


if __name__ == '__main__':
  sys.exit(main())
