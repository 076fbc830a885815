"""How every command ends: an exit code, and one line for a user's mistake."""

import argparse
import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from imagen_jax.errors import ImagenError, UsageError
from imagen_jax.io import bucket, files
from imagen_jax.io.paths import user_path
from imagen_jax.kinds import did_you_mean

# Seconds in which the other threads of a failed process may end.
GRACE = 5.0


def run(
  main: Callable[[list[str]], int | None],
  argv: Sequence[str] | None = None,
  flags: Mapping[str, str] | None = None,
) -> int:
  """Calls `main(argv)` and returns the exit code of the process.

  A user's mistake is printed to stderr as one line, `error: …`. Any other
  exception is a bug and keeps its traceback. With IMAGEN_DEBUG=1 in the
  environment every exception does. After an error the process ends within
  `GRACE` seconds, whatever its other threads wait for.

  Args:
    main: list of arguments -> exit code, or None for 0.
    argv: the arguments; None, of a process, are its own, `sys.argv[1:]`.
    flags: {key of a `UsageError`: the command's flag for it, if its name is
      another}, such as {'config.data.kind': 'source'}.

  Returns:
    0 ok, 2 usage, 3 data, 4 checkpoint or model, 5 numeric, 130 interrupted,
    or what `main` returned.
  """
  code = 1  # Python's, after a traceback
  if argv is None:
    # The first that is registered is called last, after those of jax.
    atexit.register(lambda: _leave(code))
  if argv is None and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports of jax do not survive an exception in the middle.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    code = _run(main, sys.argv[1:] if argv is None else list(argv), flags or {})
    return code
  finally:
    if argv is None and code:
      threading.Thread(target=_end, args=(code,), daemon=True).start()


def _run(
  main: Callable[[list[str]], int | None],
  argv: list[str],
  flags: Mapping[str, str],
) -> int:
  """`run`, without the end of the process."""
  sys.unraisablehook = _unraisable
  _open_streams()
  for stream in sys.stdout, sys.stderr:
    # Not every terminal or pipe is UTF-8: '≤' is then printed as \u2264.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  try:
    _ = os.getcwd()  # it may have been removed
    code = main(argv) or 0
    sys.stdout.flush()  # a closed pipe raises here, not at exit
    return code
  except SystemExit as stop:  # argparse after --help
    return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
  except KeyboardInterrupt:
    return _interrupted()
  except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except Exception as error:
    if _is_interrupt(error):
      return _interrupted()
    sentence = _sentence(error, flags)
    if sentence is None or os.environ.get('IMAGEN_DEBUG') == '1':
      raise
    print('error: ' + ' '.join(sentence.splitlines()), file=sys.stderr)
    return _exit_code(error)


def catch_interrupts() -> None:
  """From now on Ctrl-C is a `KeyboardInterrupt`; see `run`.

  A command calls it after its slow imports, and before it writes anything.
  """
  if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def outcome(error: BaseException) -> tuple[str, int]:
  """(sentence, exit code) of an error, for the other processes of a job."""
  if _is_interrupt(error):
    return 'it was interrupted.', 130
  sentence = _sentence(error, {})
  if sentence is None:
    text = ' '.join(str(error).split())[:500]
    return f'{type(error).__name__}: {text}', 1
  return sentence, _exit_code(error)


def _interrupted() -> int:
  """Says so, and returns the exit code."""
  print('interrupted', file=sys.stderr)
  return 130


def _is_interrupt(error: BaseException | None) -> bool:
  """Whether a Ctrl-C is the error, or what led to it.

  jax raises errors of its own from one that comes while it compares trees, and
  XLA quotes one that comes in a callback.
  """
  while error is not None:
    if isinstance(error, KeyboardInterrupt):
      return True
    if 'KeyboardInterrupt' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def _open_streams() -> None:
  """Opens /dev/null for standard streams that are closed, as by `>&-`.

  Otherwise the next file that is opened would take the place of one of them.
  """
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    if getattr(sys, name) is None:
      with contextlib.suppress(OSError):
        while os.open(os.devnull, os.O_RDWR) < number:
          pass
      setattr(sys, name, open(os.devnull, 'r' if number == 0 else 'w'))


def _leave(code: int) -> None:
  """Ends the process after an error, before Python takes itself down.

  What jax was doing then may still run, and has crashed there: exit code -11.
  """
  if code:
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
      sys.stderr.flush()
    os._exit(code)


def _end(code: int) -> None:
  """Ends the process if it hangs at its exit.

  Python waits there for every thread, and Orbax's wait for ever for the rest of
  a save that has failed.
  """
  threading.main_thread().join()
  time.sleep(GRACE)
  os._exit(code)


def _unraisable(problem: Any) -> None:
  """Python's hook, without the errors that follow a failed save.

  When a disk is full, the queued writes report to an event loop that is closed;
  the failure itself has been reported by then. A Ctrl-C that came while jax
  collected garbage would be lost, and is repeated.
  """
  if isinstance(problem.exc_value, KeyboardInterrupt):
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
  elif str(problem.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(problem)


def _exit_code(error: BaseException) -> int:
  """The exit code of an error that has a sentence."""
  if isinstance(error, ImagenError):
    return error.exit_code
  return bucket.kind_of(error, UsageError).exit_code


def _sentence(error: BaseException, flags: Mapping[str, str]) -> str | None:
  """The message for the user, or None for a bug."""
  if isinstance(error, ImagenError):
    sentence, key = str(error), getattr(error, 'key', None)
    if key is None:
      return sentence
    # The library says 'num is 0; …'; the user gave --num.
    flag, name = flags.get(key, key), key.removeprefix('config.')
    if sentence.startswith(name):
      return f'--{flag}{sentence.removeprefix(name)}'
    return f'--{flag}: {sentence}'
  if isinstance(error, FileNotFoundError) and error.filename is None:
    try:
      os.getcwd()
    except FileNotFoundError:
      return 'the current folder was removed; change to one that exists.'
  if isinstance(error, OSError) and error.errno in files.STORAGE:
    where = error.filename or 'an unnamed file'
    return files.STORAGE[error.errno].format(where)
  where = type(error).__module__.split('.')[0]
  of_bucket = where in ('aiohttp', 'gcsfs', 'google', 's3fs')
  if of_bucket or (isinstance(error, OSError) and error.errno is None):
    reason = bucket.reason(error)
    if reason:
      return (
        f'a bucket could not be used ({reason}: {error}); check it with gcloud '
        'storage ls, then run the same command again.'
      )
  # jax's error is matched by name: importing jax would slow down --help.
  device_full = type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError')
  device_full = device_full and 'RESOURCE_EXHAUSTED' in str(error)
  if isinstance(error, MemoryError) or device_full:
    return (
      'memory ran out; use a smaller batch (--batch_size, or '
      '--config.train.batch_size when training) or fewer stages.'
    )
  return None


class _Help(argparse.ArgumentDefaultsHelpFormatter):
  """Shows the default of a flag that has one."""

  def _get_help_string(self, action: argparse.Action) -> str | None:
    if isinstance(action.default, bool) or action.default in (None, []):
      return action.help
    return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
  """argparse that raises `UsageError` and suggests the nearest flag."""

  def __init__(self, **options: Any):
    super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

  def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
    namespace, rest = self.parse_known_args(args, namespace)
    if rest:
      flag = rest[0].partition('=')[0]
      raise UsageError(
        f'{self.prog} has no argument {flag}'
        + did_you_mean(flag, self._option_string_actions)
        + f' See {self.prog} --help.'
      )
    for action in self._actions:
      if action.type is user_path and getattr(namespace, action.dest, 0) == '':
        raise UsageError(
          'is empty; was a variable not set? Give a path, such as . for this '
          'folder.',
          key=action.dest,
        )
    return namespace

  def given(self, args: Sequence[str]) -> set[str]:
    """Names of the flags in `args`, also of those with their default."""
    absent = object()
    empty = dict.fromkeys((a.dest for a in self._actions), absent)
    found = self.parse_args(args, argparse.Namespace(**empty))
    return {key for key, value in vars(found).items() if value is not absent}

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message}; see {self.prog} --help.')


def positive(text: str, most: int = 2**31 - 1) -> int:
  """The `type` of a flag that is a whole number from 1 to `most`."""
  if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= most:
    raise argparse.ArgumentTypeError(
      f'{text[:20]!r} is not a whole number in [1, {most}]'
    )
  return int(text)
