"""train.py with a fault in one process, for the part `faults` of `torture.py`.

The environment's FAULT is KIND:PROCESS:STEP. `data`: the step's batch cannot be
read; `bug`: the step raises; `save`: its checkpoint does; `config`: the config
does; `init`, `compile`, `step`: the process stops there, as by SIGSTOP.
"""

import os
import signal
import sys
import time

from imagen_jax.cli import train as cli
from imagen_jax.errors import DataError, UsageError
from imagen_jax.training import loop, watchdog
from imagen_jax.training.loop import Checkpoints, Monitor

PHASES = {'init': 'finding', 'compile': 'compiling'}


def main():
  kind, process, step = os.environ['FAULT'].split(':')
  if f'--process_id={process}' not in sys.argv:
    return cli.main()
  step = int(step)

  def before(owner, name, when, fault):
    """Makes a function or method begin with a fault, for some arguments."""
    function = getattr(owner, name)

    def faulty(*args, **options):
      if when(*args, **options):
        fault()
      return function(*args, **options)

    setattr(owner, name, faulty)

  def now():
    print('fault at', time.time(), flush=True)

  def stop():
    now()
    os.kill(os.getpid(), signal.SIGSTOP)

  def error(error):
    def fault():
      now()
      raise error

    return fault

  at_step = lambda self, number, *_, **__: number == step
  if kind == 'data':
    original = loop.train_batches

    def batches(experiment, start):
      for i, batch in enumerate(original(experiment, start), start + 1):
        if i == step:
          error(DataError('photo.jpg cannot be decoded.'))()
        yield batch

    loop.train_batches = batches
  elif kind == 'bug':
    before(Monitor, 'after', at_step, error(RuntimeError('a bug')))
  elif kind == 'save':
    full = OSError(28, 'No space left on device')
    before(Checkpoints, '_make_room', at_step, error(full))
  elif kind == 'config':
    before(cli, 'load_config', lambda *_: True, error(UsageError('no config.')))
  elif kind == 'kill':
    before(Monitor, 'after', at_step, lambda: os.kill(os.getpid(), 9))
  elif kind == 'step':
    before(Monitor, 'after', at_step, stop)
  else:
    at_phase = lambda self, name: name.startswith(PHASES[kind])
    before(watchdog.Watchdog, 'phase', at_phase, stop)
  return cli.main()


if __name__ == '__main__':
  sys.exit(main())
