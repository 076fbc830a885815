"""imagen-train: trains one stage, or the demo's text encoder."""

import os
import pathlib
import signal
import sys

from imagen_jax.cli import errors, runtime
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.errors import UsageError


def main(argv=None):
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv):
  argv, overrides = split_overrides(argv)
  parser = errors.Parser(
    prog='train.py',
    description='Train one stage of the cascade; the same command resumes.',
    epilog='Any config key can be set: --config.train.num_steps=2000. A '
    'config is code: use only those you trust.',
  )
  parser.add_argument(
    '--config', required=True, help='name of a config, or a path to one'
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='directory of the run: config.json, checkpoints/, metrics.jsonl, '
    'samples/',
  )
  parser.add_argument(
    '--dry_run',
    action='store_true',
    help='print the mesh, parameters, memory and FLOPs, and stop',
  )
  parser.add_argument(
    '--init_from',
    help='start a new run from the EMA of this workdir or exported stage',
  )
  parser.add_argument(
    '--force',
    action='store_true',
    help='continue although the config or the data set has changed',
  )
  runtime.add_process_flags(parser)
  args = parser.parse_args(argv)
  config = load_config(args.config, overrides)
  workdir = pathlib.Path(args.workdir)

  runtime.start(split_cpu=True, processes=args)
  if config.kind == 'text':
    from imagen_jax.worlds.pretraining import pretrain

    for flag in ('dry_run', 'init_from', 'force'):
      if getattr(args, flag):
        raise UsageError(f'--{flag} is for stages, not for the text encoder.')
    pretrain(config, workdir)
    return 0

  import jax

  from imagen_jax.planning import chips, program
  from imagen_jax.training.loop import train

  with _agreed() if _together() else _alone() as should_stop:
    step = train(
      config,
      workdir,
      should_stop=should_stop,
      init_from=args.init_from,
      force=args.force,
      dry_run=args.dry_run,
      count_flops=program.flops,
      peak=chips.find_peak(jax.devices()[0].device_kind),
    )
  return 0 if args.dry_run else _ended(step, config, should_stop)


def _ended(step, config, should_stop):
  """The exit code of a run that ended after `step`."""
  if step >= config.train.num_steps:
    return 0
  print(
    f'stopped at step {step}, saved; the same command resumes from there',
    file=sys.stderr,
  )
  return 128 + should_stop.signal


def _together():
  """Whether this is one process of a job that agrees on when to stop."""
  import jax

  return jax.distributed.is_initialized()


class _alone:
  """Stops after SIGTERM or SIGINT; a second SIGINT interrupts at once."""

  def __init__(self):
    self.signal = None

  def __enter__(self):
    self._old = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __call__(self, step):
    """Whether to save and stop after `step`."""
    return self.signal is not None

  def _note(self, number, frame):
    if number == signal.SIGINT == self.signal:
      raise KeyboardInterrupt
    self.signal = number

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


class _agreed(_alone):
  """Stops all processes after the same step when one of them is signalled.

  jax passes SIGTERM on to the other processes and finds a step that all of
  them reach; SIGINT is turned into it.
  """

  def __init__(self):
    self.signal = signal.SIGTERM

  def __enter__(self):
    self._old = {signal.SIGINT: signal.signal(signal.SIGINT, self._note)}
    return self

  def __call__(self, step):
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _note(self, number, frame):
    if self.signal == number:
      raise KeyboardInterrupt
    self.signal = number
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
  sys.exit(main())
