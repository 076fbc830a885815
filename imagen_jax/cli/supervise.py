"""imagen-supervise: runs a command again until it ends well.

For machines where nothing else restarts a job: TPU VMs, one's own servers.
Kubernetes (JobSet) and SLURM have rules of their own, see `scripts/launch.py`.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from imagen_jax.cli import errors
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io.paths import check_folder, user_path

# What another attempt does not change: done, a user's mistake, Ctrl-C.
FINAL = (0, UsageError.exit_code, DataError.exit_code, 130)
SAVED = 143  # SIGTERM, as before a preemption; not counted as a failure
LONGEST = 120  # seconds between attempts: jax's processes wait 300 for others
HEALTHY = 600  # a run of this many seconds starts the delays anew
BEGUN, ENDED = 'SIGTERM to it saves and stops', 'ended for good with exit code'


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code of the command's last run."""
  return errors.run(_main, argv)


def _main(argv: list[str]) -> int:
  split = argv.index('--') if '--' in argv else len(argv)
  parser = errors.Parser(
    prog='imagen-supervise',
    usage='imagen-supervise [options] -- COMMAND …',
    description='Run a command, and again whenever it fails: a crash, a kill, '
    'no memory, a dead host. Not after exit codes 2 and 3 (usage, data) or '
    'Ctrl-C. SIGTERM is passed on, and ends both.',
  )
  add = parser.add_argument
  add(
    '--max_restarts',
    type=errors.positive,
    default=50,
    help='after as many failures give up; exit code 143 is none',
  )
  add(
    '--backoff',
    type=errors.positive,
    default=10,
    help=f'seconds before the first restart; doubled each time, to {LONGEST}',
  )
  add(
    '--detach',
    metavar='LOG',
    type=user_path,
    help='outlive this terminal or ssh connection, with all output in LOG; the '
    'same command again follows what runs',
  )
  args = parser.parse_args(argv[:split])
  errors.catch_interrupts()
  command = argv[split + 1 :]
  if not command or not shutil.which(command[0]):
    missing = f'{command[0]} is not a command' if command else 'no command'
    raise UsageError(
      f'{missing}; write one after --, as in imagen-supervise -- python '
      'train.py …'
    )
  if args.detach is not None:
    log = pathlib.Path(args.detach)
    check_folder(log.parent, key='detach').mkdir(parents=True, exist_ok=True)
    numbers = (f'--{n}={getattr(args, n)}' for n in ('max_restarts', 'backoff'))
    return _detach(log, [*numbers, '--', *command])
  return Supervisor(command).run(args.max_restarts, args.backoff)


class Supervisor:
  """Runs one command again and again; passes signals on to it.

  The command gets a process group of its own: Ctrl-C reaches it once, through
  the supervisor, and what it leaves behind is killed before the next run.
  """

  def __init__(self, command: Sequence[str]):
    self._command = list(command)
    self._process: subprocess.Popen[bytes] | None = None
    self._signal = 0  # the one that told this process to stop

  def run(self, max_restarts: int, backoff: float) -> int:
    """Runs the command until it ends for good; returns its exit code.

    Args:
      max_restarts: after this many failures the next one ends it.
      backoff: seconds before the first restart.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      signal.signal(number, self._stop)
    _say(f'process {os.getpid()}; {BEGUN}')
    failures, delay = 0, backoff
    while True:
      begin = time.monotonic()
      code = self._once()
      seconds = time.monotonic() - begin
      failures += code != SAVED
      if self._signal or code in FINAL or failures > max_restarts:
        _say(f'{ENDED} {code}')
        return code
      if seconds >= HEALTHY:
        delay = backoff
      _say(
        f'exit code {code} after {seconds:.0f} s, {failures} of at most '
        f'{max_restarts} failures; again in {delay:.0f} s'
      )
      self._sleep(delay)
      if self._signal:
        _say(f'{ENDED} {128 + self._signal}')
        return 128 + self._signal
      delay = min(2 * delay, LONGEST)

  def _once(self) -> int:
    """One run; its exit code, 128 + n after signal n."""
    self._process = subprocess.Popen(
      self._command, stdin=subprocess.DEVNULL, process_group=0
    )
    if self._signal:  # it came while the process started
      self._pass_on()
    code = self._process.wait()
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process = None
    return 128 - code if code < 0 else code

  def _sleep(self, seconds: float) -> None:
    """Sleeps, until a signal comes."""
    end = time.monotonic() + seconds
    while not self._signal and time.monotonic() < end:
      time.sleep(min(0.1, seconds))

  def _stop(self, number: int, frame: FrameType | None) -> None:
    self._signal = number
    self._pass_on()

  def _pass_on(self) -> None:
    """SIGINT as it is; a closed terminal too should save and stop."""
    if self._process is not None:
      interrupt = self._signal == signal.SIGINT
      self._process.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)


def _say(text: str) -> None:
  now = time.strftime('%Y-%m-%d %H:%M:%S')
  print(f'supervise {now}: {text}', file=sys.stderr, flush=True)


def _detach(log: pathlib.Path, arguments: list[str]) -> int:
  """Starts a supervisor in a session of its own, and follows its log.

  The open log is the lock as well: whoever writes to it holds it, the command
  included if its supervisor was killed.
  """
  import fcntl  # not on Windows

  with open(log, 'ab') as out:
    start = out.tell()
    try:
      fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _say(f'{log} is of a job that runs; following it')
      start = max(0, start - 10_000)
    else:
      subprocess.Popen(
        [sys.executable, '-m', __spec__.name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        start_new_session=True,
      )
  tail, running = b'', True
  with open(log, 'rb') as lines:
    lines.seek(start)
    while running:
      try:
        fcntl.flock(lines, fcntl.LOCK_SH | fcntl.LOCK_NB)
        running = False  # what follows is the last that was written
      except BlockingIOError:
        time.sleep(0.2)
      new = lines.read()
      tail = (tail + new)[-1000:]
      sys.stdout.buffer.write(new)
      sys.stdout.flush()
  said = tail.decode(errors='replace').rpartition(BEGUN)[2]  # not of the last
  codes = re.findall(rf'{ENDED} (\d+)', said)
  if not codes:
    _say(f'the supervisor of {log} was killed; the same command starts it anew')
  return int(codes[-1]) if codes else 1


if __name__ == '__main__':
  sys.exit(main())
