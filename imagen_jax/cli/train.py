"""imagen-train: trains one stage, or the demo's text encoder."""

import pathlib
import signal
import sys

from imagen_jax.cli import errors
from imagen_jax.cli.configs import load_config, split_overrides


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
  args = parser.parse_args(argv)
  config = load_config(args.config, overrides)
  workdir = pathlib.Path(args.workdir)

  from imagen_jax.cli import runtime

  runtime.start(split_cpu=True)
  if config.get('kind') == 'text':
    from imagen_jax.text.pretrain import pretrain

    pretrain(config, workdir)
    return 0

  from imagen_jax.training.loop import train

  received = []
  with _signals(received):
    step = train(config, workdir, should_stop=lambda: bool(received))
  if received and step < config.train.num_steps:
    print(
      f'stopped at step {step}, saved; the same command goes on from there',
      file=sys.stderr,
    )
    return 128 + received[0]
  return 0


class _signals:
  """Notes SIGTERM and SIGINT; a second SIGINT interrupts at once."""

  def __init__(self, received):
    self._received = received

  def __enter__(self):
    self._old = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGTERM, signal.SIGINT)
    }

  def _note(self, number, frame):
    if number == signal.SIGINT and number in self._received:
      raise KeyboardInterrupt
    self._received.append(number)

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


if __name__ == '__main__':
  sys.exit(main())
