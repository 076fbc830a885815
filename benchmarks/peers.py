r"""Time and memory of this project and of its peers, side by side on a CPU.

  pip install 'imagen_jax[peers]'   # an environment of its own, with torch
  python benchmarks/peers.py --out peers.json
  python benchmarks/peers.py --short            # a rehearsal: tiny work
  python benchmarks/peers.py --rows loader t5
  python benchmarks/peers.py --table peers.json   # as Markdown

A row is one piece of work that every contender does with the same shapes, and
with networks of the same sizes: their parameters are within 2 %. Each contender
is a process of its own. They take turns, and wait while another works, so that
other load affects all alike. Printed are the times of a call in ms (minimum,
median, maximum), the ratio of our median to the peer's, and the most memory
that each process has held, its imports and workers included. A peer that is not
installed is named, and left out.

Ours trains and samples as the commands do, in a layout of their choice. With
`--layouts` a row is also run with one device of XLA's, and with its flag for
fused products, see docs/speed.md. Nothing else should be running.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

YNN = '--xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce'
OURS = 'imagen_jax'
# {contender: (devices of XLA's, flags)}; 0: one a core, as in training.
LAYOUTS = {
  OURS: (0, ''),
  f'{OURS}, 1 device': (1, ''),
  f'{OURS}, flag': (0, YNN),
  f'{OURS}, 1 device, flag': (1, YNN),
}
LEAST = 0.2  # seconds that are timed together, at least
LIBRARIES = (
  'jax', 'torch', 'imagen-pytorch', 'diffusers', 'transformers', 'webdataset',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One piece of work.

  Attributes:
    work: what is done, for the table.
    module: has `contenders`, {name: function}; a function takes the arguments
      `given` and returns one call of the work.
    given: numbers, for full size and for a rehearsal.
    peers: the contenders besides ours.
    targets: ours ÷ theirs, at most, for each peer.
  """

  work: str
  module: str
  given: tuple[dict, dict]
  peers: Sequence[str]
  targets: Sequence[float]


TORCH = ('imagen-pytorch',)
IF = ('diffusers', 'diffusers, torch.compile')
ROWS = {
  'train32': Row(
    'training step, 27 M U-Net, 32², batch 16',
    'train',
    ({'side': 32, 'batch': 16}, {'side': 16, 'batch': 2}),
    *(TORCH, [0.70]),
  ),
  'train64': Row(
    'training step, 27 M U-Net, 64², batch 8',
    'train',
    ({'side': 64, 'batch': 8}, {'side': 16, 'batch': 2}),
    *(TORCH, [0.75]),
  ),
  'train256': Row(
    'training step, 20 M Efficient U-Net, 64→256, batch 4',
    'train',
    ({'side': 256, 'low': 64, 'batch': 4}, {'side': 64, 'low': 16, 'batch': 2}),
    *(TORCH, [0.70]),
  ),
  'sample32': Row(
    'sampling, 27 M U-Net, 4 images of 32², {steps} steps, guided',
    'sample',
    ({'side': 32, 'steps': 100}, {'side': 16, 'steps': 2}),
    *(TORCH, [0.40]),
  ),
  'sample256': Row(
    'sampling, 20 M Efficient U-Net, 4 images 64→256, {steps} steps, guided',
    'sample',
    (
      {'side': 256, 'low': 64, 'steps': 100},
      {'side': 64, 'low': 16, 'steps': 2},
    ),
    *(TORCH, [0.42]),
  ),
  'if64': Row(
    'DeepFloyd IF evaluation, 28 M, 4 rows of 64²',
    'deepfloyd',
    ({'side': 64}, {'side': 16}),
    *(IF, [0.95, 1.0]),
  ),
  'if32': Row(
    'DeepFloyd IF evaluation, 28 M, 4 rows of 32²',
    'deepfloyd',
    ({'side': 32}, {'side': 16}),
    *(IF, [0.95, 1.0]),
  ),
  't5': Row(
    'T5-base encoder, 8 captions of 20 tokens, of at most 64',
    't5',
    ({'layers': 12}, {'layers': 1}),
    *(('transformers',), [0.5]),
  ),
  'png': Row(
    'loader, 40 batches of 32 at 64² from PNGs of 128², two workers',
    'loader',
    ({'stored': 128, 'kind': 'png'}, {'stored': 128, 'kind': 'png'}),
    *(('torch, webdataset',), [0.8]),
  ),
  'jpeg': Row(
    'loader, 40 batches of 32 at 64² from JPEGs of 512², two workers',
    'loader',
    ({'stored': 512, 'kind': 'jpg'}, {'stored': 128, 'kind': 'jpg'}),
    *(('torch, webdataset',), [0.9]),
  ),
  'forward': Row(
    'attention (4, 4, 1024, 1101, 32), forward',
    'attention',
    ({'queries': 1024, 'keys': 1101}, {'queries': 64, 'keys': 70}),
    *(('torch',), [1.3]),
  ),
  'backward': Row(
    'attention (4, 4, 1024, 1101, 32), with backward',
    'attention',
    (
      {'queries': 1024, 'keys': 1101, 'backward': True},
      {'queries': 64, 'keys': 70, 'backward': True},
    ),
    *(('torch',), [1.5]),
  ),
}


class Contender:
  """A process that does one row's work whenever it is told to."""

  def __init__(self, name: str, row: str, given: dict) -> None:
    self.name, self.seconds, self.megabytes = name, [], 0.0
    devices, flags = LAYOUTS.get(name, (0, ''))
    flags = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()
    arguments = {'row': row, 'name': name, 'given': given, 'devices': devices}
    self.process = subprocess.Popen(
      [sys.executable, __file__, '--serve', json.dumps(arguments)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'XLA_FLAGS': flags, 'HF_HUB_OFFLINE': '1'},
    )

  def answer(self) -> dict:
    """What the process says next; {'error': …} if it has ended."""
    line = self.process.stdout.readline()
    return json.loads(line) if line else {'error': 'it ended'}

  def turn(self) -> dict:
    """One more measurement."""
    self.process.stdin.write('\n')
    self.process.stdin.flush()
    said = self.answer()
    if 'seconds' in said:
      self.seconds.append(said['seconds'])
      self.megabytes = said['megabytes']
    return said

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()

  def summary(self) -> dict:
    s = self.seconds
    return {
      'min': min(s),
      'median': statistics.median(s),
      'max': max(s),
      'megabytes': self.megabytes,
    }


def megabytes() -> float:
  """The most that this process has held, and what its workers hold now."""
  held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for worker in multiprocessing.active_children():
    lines = pathlib.Path(f'/proc/{worker.pid}/smaps_rollup').read_text()
    # A page that processes share counts once among them.
    held += int(lines.split('Pss:')[1].split()[0])
  return held / 1024


def serve(row: str, name: str, given: dict, devices: int) -> None:
  """Runs in a contender's process: builds the work, and times it when told."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print is not an answer

  def say(**values: object) -> None:
    print(json.dumps(values), file=out, flush=True)

  try:
    if name in LAYOUTS:
      importlib.import_module('imagen_jax.sharding').set_cpu_devices(
        devices or None
      )
    module = importlib.import_module(f'peers_{ROWS[row].module}')
    key = OURS if name in LAYOUTS else name
    work = module.contenders[key](**given)
    work()  # compiles
    start = time.perf_counter()
    work()
    number = max(1, int(LEAST / (time.perf_counter() - start)))
  except ImportError as error:
    say(error=f'{error.name or error} is not installed')
    return
  except Exception as error:  # of a peer: no compiler, an unknown version
    say(error=f'{type(error).__name__}: {error}'.splitlines()[0][:200])
    return
  say(ready=True)
  # What a loader has made while others worked does not count.
  before = getattr(work, 'before', lambda: None)
  for _ in sys.stdin:
    before()
    start = time.perf_counter()
    for _ in range(number):
      work()
    seconds = (time.perf_counter() - start) / number
    say(seconds=seconds, megabytes=megabytes())


def measure(name: str, args: argparse.Namespace) -> dict:
  """A row's times, in turns; {'work', 'targets', 'contenders', 'skipped'}."""
  row = ROWS[name]
  given = dict(row.given[1 if args.short else 0])
  if args.steps and 'steps' in given:
    given['steps'] = args.steps
  running, skipped = [], {}
  ours = [*LAYOUTS] if args.layouts else [OURS]
  for who in [*ours, *row.peers]:
    made = Contender(who, name, given)
    said = made.answer()  # one builds at a time
    if 'error' in said:
      skipped[who] = said['error']
      print(f'{name}: {who} is left out, {said["error"]}.', file=sys.stderr)
      made.close()
    else:
      running.append(made)
  for _ in range(1 if args.short else args.repeat):
    for made in running:
      made.turn()
  for made in running:
    made.close()
  return {
    'work': row.work.format(**given),
    'targets': dict(zip(row.peers, row.targets)),
    'contenders': {m.name: m.summary() for m in running if m.seconds},
    'skipped': skipped,
  }


def machine() -> dict:
  """Where this was measured, and with what."""
  found = {}
  for library in LIBRARIES:
    try:
      found[library] = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
      continue
  cpu = platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    names = [line for line in lines if line.startswith('model name')]
    cpu = names[0].split(': ')[1] if names else cpu
  cores = len(os.sched_getaffinity(0))
  return {'cores': cores, 'cpu': cpu, 'versions': found}


def ratios(row: dict) -> dict[str, float]:
  """{peer: our median ÷ its median}."""
  found = row['contenders']
  return {
    peer: found[OURS]['median'] / found[peer]['median']
    for peer in row['targets']
    if peer in found and OURS in found
  }


def table(rows: dict[str, dict]) -> str:
  """Rows as Markdown."""
  lines = [
    '| work | | ms: min, median, max | peak MB | ours ÷ theirs | target |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows.values():
    ratio = ratios(row)
    work = row['work']
    for who, x in row['contenders'].items():
      times = ', '.join(
        f'{1e3 * x[k]:,.{0 if x[k] > 0.1 else 1}f}'
        for k in ('min', 'median', 'max')
      )
      last = ' | '
      if who in ratio:
        target = row['targets'][who]
        missed = '' if ratio[who] <= target else ', missed'
        last = f'**{ratio[who]:.2f}** | ≤ {target:.2f}{missed}'
      lines.append(
        f'| {work} | {who} | {times} | {x["megabytes"]:,.0f} | {last} |'
      )
      work = ''
    for who, why in row['skipped'].items():
      lines.append(f'| {work} | {who} | left out: {why} | | | |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', nargs='+', choices=ROWS, default=[*ROWS])
  parser.add_argument('--repeat', type=int, default=5, help='turns of each')
  parser.add_argument('--steps', type=int, help='of sampling, else 100')
  parser.add_argument('--short', action='store_true', help='tiny work')
  parser.add_argument('--layouts', action='store_true', help="four of ours'")
  parser.add_argument('--out', type=pathlib.Path, help='JSON, added to')
  parser.add_argument('--table', type=pathlib.Path, help='print this JSON')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(**json.loads(args.serve))
    return
  if args.table:
    print(table(json.loads(args.table.read_text())['rows']))
    return
  rows = {}
  if args.out and args.out.exists():
    rows = json.loads(args.out.read_text())['rows']
  for name in args.rows:
    rows[name] = measure(name, args)
    print(table({name: rows[name]}), flush=True)
    if args.out:  # after every row, so that a stop loses little
      whole = {'machine': machine(), 'rows': rows}
      args.out.write_text(json.dumps(whole, indent=1) + '\n')


if __name__ == '__main__':
  main()
