"""imagen-train: trains the model that a config describes."""

import argparse
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from imagen_jax.cli import errors, runtime
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.errors import ImagenError
from imagen_jax.io.paths import check_folder, user_path

if TYPE_CHECKING:
  from ml_collections import ConfigDict

# The limit of joining the other processes where the config is unusable.
JOIN_SECONDS = 600.0


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='train.py',
    description='Train one stage of the cascade; the same command resumes.',
    epilog='Any config key can be set: --config.train.num_steps=2000. A '
    'config is code: use only those you trust.',
  )
  parser.add_argument(
    '--config',
    type=user_path,
    required=True,
    help='name of a config, or a path to one',
  )
  parser.add_argument(
    '--workdir',
    type=user_path,
    required=True,
    help='directory of the run: config.json, checkpoints/, metrics.jsonl, '
    'samples/; a local path or gs://BUCKET/FOLDER',
  )
  parser.add_argument(
    '--dry_run',
    action='store_true',
    help='print the mesh, parameters, memory and FLOPs, and stop',
  )
  parser.add_argument(
    '--init_from',
    type=user_path,
    help='start a new run from the EMA of this workdir or exported stage',
  )
  parser.add_argument(
    '--force',
    action='store_true',
    help='resume although the config or the data set has changed, or begin '
    'anew although there are checkpoints, none of them usable',
  )
  runtime.add_process_flags(parser)
  return parser


def _main(argv: list[str]) -> int:
  began = time.time()  # before the imports that take seconds
  if hasattr(signal, 'SIGUSR1'):  # not on Windows
    faulthandler.register(signal.SIGUSR1, 2, all_threads=True)  # 2: stderr
  argv, overrides = split_overrides(argv)
  args = _parser().parse_args(argv)
  together = args.distributed or args.coordinator is not None
  config = _checked_config(args, overrides)
  if isinstance(config, ImagenError) and not together:
    raise config

  from imagen_jax.training.peers import Peers
  from imagen_jax.training.watchdog import Watchdog

  limit = JOIN_SECONDS
  if not isinstance(config, ImagenError):
    limit = config.train.startup_seconds
  with Peers(errors.outcome, joins=together) as job:
    with Watchdog(limit, end=job.abort) as alive:
      alive.phase('finding the devices and the other processes')
      runtime.start(split_cpu=True, processes=args)
    if isinstance(config, ImagenError):  # now the others can be told
      raise config
    return _train(args, config, began)


def _checked_config(
  args: argparse.Namespace, overrides: list[str]
) -> 'ConfigDict | ImagenError':
  """The config, or what is wrong with it or with the folders."""
  try:
    config = load_config(args.config, overrides)
    check_folder(args.workdir, key='workdir', in_bucket=True)
    elsewhere = config.train.get('checkpoint_dir')
    if elsewhere:
      key = 'config.train.checkpoint_dir'
      check_folder(elsewhere, key=key, in_bucket=True)
  except ImagenError as error:
    return error
  return config


def _train(args: argparse.Namespace, config: 'ConfigDict', began: float) -> int:
  """Trains; returns the exit code."""
  from imagen_jax.training.loop import train

  with _agreed() if _together() else _alone() as should_stop:
    step = train(
      config,
      args.workdir,
      should_stop=should_stop,
      init_from=args.init_from,
      force=args.force,
      dry_run=args.dry_run,
      began=began,
    )
  return 0 if args.dry_run else _ended(step, config, should_stop)


def _ended(step: int, config: 'ConfigDict', should_stop: '_alone') -> int:
  """The exit code of a run that ended after `step`."""
  if step >= config.train.num_steps:
    return 0
  print(
    f'stopped and saved at step {step}; the same command resumes from it',
    file=sys.stderr,
  )
  return 128 + should_stop.signal


def _together() -> bool:
  """Whether this is one process of a job that agrees on when to stop."""
  import jax

  return jax.distributed.is_initialized()


class _alone:
  """Stops after SIGTERM or SIGINT; a second SIGINT interrupts at once."""

  signal = 0  # the one that was received

  def __enter__(self) -> '_alone':
    self._old = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __call__(self, step: int) -> bool:
    """Whether to save and stop after `step`."""
    return self.signal != 0

  def _note(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT == self.signal:
      raise KeyboardInterrupt
    self.signal = number

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


class _agreed(_alone):
  """Stops all processes after the same step when one of them is signalled.

  jax forwards SIGTERM to the other processes and finds a step that all of them
  reach; SIGINT is converted to SIGTERM.
  """

  signal = int(signal.SIGTERM)

  def __enter__(self) -> '_agreed':
    self._old = {signal.SIGINT: signal.signal(signal.SIGINT, self._note)}
    return self

  def __call__(self, step: int) -> bool:
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _note(self, number: int, frame: FrameType | None) -> None:
    if self.signal == number:
      raise KeyboardInterrupt
    self.signal = number
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
  sys.exit(main())
