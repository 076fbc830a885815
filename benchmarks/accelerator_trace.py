"""Where a step's time goes, by class of operation, from jax's profile.

jax writes a profile as `trace.json.gz`, in Chrome's format. Of a GPU the
kernels of its streams count, of a TPU the line "XLA Ops", and of a CPU the
threads' events that name an operation. An operation inside another, such as in
a loop, counts for itself alone.
"""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

CLASSES = (
  'convolution', 'matmul', 'attention', 'elementwise', 'collective', 'copy',
  'other',
)  # fmt: skip
TOP = 20  # operations that are listed by name
_LINE = re.compile(
  r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"'
)
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_PRODUCT = re.compile(r' (convolution|dot)\(')
_PRIMITIVES = {'convolution': 'conv_general_dilated', 'dot': 'dot_general'}
_FUSION = re.compile(
  r'^\s*(?:ROOT )?%?([\w.-]+) = .* fusion\(.*calls=%?([\w.-]+)', re.M
)
_COLLECTIVE = re.compile(
  'nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|'
  'collective-?(permute|broadcast)'
)
# Fused attention, by the names of its kernels and of XLA's calls.
_FUSED = re.compile('fmha|sdpa|flash')
# In an operation's path: the products of `nets.dot_product`, and what jax does
# between them.
_ATTENTION = re.compile(r'bnts|(attn|attention|pool)[^/]*/[^/]*vmap\(')
_LAYOUT = re.compile('memcpy|memset|nchw|nhwc|converttensor|data formatting')
_CONVOLUTION = re.compile('fprop|dgrad|wgrad|winograd|implicit|conv(?!ert)')
_MATMUL = re.compile('gemm|gemv|nvjet|cutlass|cublas|matmul|splitk|^dot|_dot')
_ELEMENTWISE = re.compile(
  'fusion|reduce|softmax|norm|^wrapped|scatter|select|rng|sort|convert|'
  'broadcast|iota|add|multiply|subtract|divide|exp|compare|elementwise'
)
# A fusion of nothing else moves data.
_MOVES = {
  'copy', 'transpose', 'bitcast', 'concatenate', 'slice', 'dynamic', 'update',
  'pad', 'reshape', 'reverse', 'gather',
}  # fmt: skip
_NO_WORK = {'fusion', 'loop', 'input', 'wrapped', 'start', 'done', 'kernel'}


def scopes(hlo: str) -> dict[str, str]:
  """{operation: its path in the traced program}, from a compiled program.

  Args:
    hlo: the text of the compiled program.

  Returns:
    paths such as 'jit(train_step)/UNet/conv1/conv_general_dilated', by names
    in the form of `_plain`. Of a fusion without a path, the last part of one,
    if it holds a convolution or a matrix product.
  """
  found, products, inside = {}, {}, ''
  for line in hlo.splitlines():
    if begins := _COMPUTATION.match(line):
      inside = begins[1]
    elif match := _PRODUCT.search(line):
      products[inside] = _PRIMITIVES[match[1]]
    if match := _LINE.match(line):
      found[_plain(match[1])] = match[2]
  for name, called in _FUSION.findall(hlo):
    if called in products:
      found.setdefault(_plain(name), products[called])
  return found


def classify(
  name: str, op: str = '', category: str = '', path: str = ''
) -> str:
  """The one of `CLASSES` that a kernel or operation belongs to.

  Args:
    name: of the event: a kernel's, or the operation's.
    op: XLA's name of the operation, where the event has it.
    category: XLA's `hlo_category`, where the event has it.
    path: of the operation in the traced program, where it is known.
  """
  kernel, path = name.lower(), path.lower()
  labels = [kernel, op.lower(), category.lower()]
  if any(map(_COLLECTIVE.search, labels)):
    return 'collective'
  if any(map(_FUSED.search, labels)):
    return 'attention'
  if _LAYOUT.search(kernel) or _LAYOUT.search(labels[2]) or _moves(labels):
    return 'copy'
  if _ATTENTION.search(path):
    return 'attention'
  # The path's end is the operation as it was written. A TPU multiplies
  # matrices by "convolution fusions".
  last = path.rpartition('/')[2]
  if last in ('dot_general', 'conv_general_dilated'):
    return 'matmul' if last == 'dot_general' else 'convolution'
  for pattern, kind in (
    (_CONVOLUTION, 'convolution'),
    (_MATMUL, 'matmul'),
    (_ELEMENTWISE, 'elementwise'),
  ):
    if any(map(pattern.search, labels)):
      return kind
  return 'other'


def summarise(
  events: Sequence[Mapping], paths: Mapping[str, str], steps: int
) -> dict:
  """The time of a step on the first device, by class.

  Args:
    events: `traceEvents` of the profile.
    paths: from `scopes`; may be empty.
    steps: that were profiled.

  Returns:
    `seconds`: {class: seconds a step}; `busy`: the fraction of the time from
    the first to the last operation in which one ran; `top`: the longest
    operations, [name, class, seconds a step].

  Raises:
    ValueError: no operation was recorded.
  """
  lines = _lines(events)
  if not lines:
    raise ValueError('the profile has no operations of the device')
  seconds = dict.fromkeys(CLASSES, 0.0)
  top: collections.Counter[tuple[str, str]] = collections.Counter()
  for line in lines:
    for event, own in _own_times(line):
      args = event.get('args') or {}
      op = args.get('hlo_op', '')
      path = paths.get(_plain(op)) or paths.get(_plain(event['name'])) or ''
      path = path or args.get('tf_op', '')
      kind = classify(event['name'], op, args.get('hlo_category', ''), path)
      seconds[kind] += own / 1e6 / steps
      # Equal layers have operations that differ in a number.
      plain = re.sub(r'[._]\d+$', '', event['name'])[:80]
      top[plain, kind] += own / 1e6 / steps
  return {
    'seconds': seconds,
    'busy': _busy(event for line in lines for event in line),
    'top': [[*which, spent] for which, spent in top.most_common(TOP)],
  }


def read(folder: pathlib.Path) -> list[dict]:
  """The events of the newest profile under a folder.

  Raises:
    ValueError: there is none.
  """
  files = sorted(folder.glob('plugins/profile/*/*.trace.json.gz'))
  if not files:
    raise ValueError('jax wrote no trace.json.gz')
  with gzip.open(files[-1], 'rt', encoding='utf-8') as file:
    return json.load(file)['traceEvents']


def _plain(name: str) -> str:
  """A name as kernels have it: 'loop_add_fusion_3' of 'loop_add_fusion.3'."""
  return re.sub(r'[.-]', '_', name)


def _moves(labels: Iterable[str]) -> bool:
  """Whether an operation only moves data, by its names."""
  for label in labels:
    words = set(re.findall('[a-z]+', label)) - _NO_WORK
    if words and words <= _MOVES:
      return True
  return False


def _lines(events: Sequence[Mapping]) -> list[list[Mapping]]:
  """The operations of the first device, a list for each stream or thread."""
  processes, threads = {}, {}
  for event in events:
    if event.get('ph') == 'M' and event['name'] == 'process_name':
      processes[event['pid']] = event['args']['name']
    if event.get('ph') == 'M' and event['name'] == 'thread_name':
      threads[event['pid'], event['tid']] = event['args']['name']
  ran = collections.defaultdict(list)
  for event in events:
    if event.get('ph') == 'X' and event.get('dur'):
      ran[event['pid'], event['tid']].append(event)
  devices = sorted(
    (name, pid) for pid, name in processes.items() if '/device:' in name
  )
  for _, pid in devices:
    # A TPU has no streams. A device's other lines repeat the same time.
    for kind in 'Stream #', 'XLA Ops':
      of_device = [
        line
        for (owner, tid), line in ran.items()
        if owner == pid and threads.get((owner, tid), '').startswith(kind)
      ]
      if of_device:
        return of_device
  named = lambda event: 'hlo_op' in (event.get('args') or {})
  of_host = [[e for e in line if named(e)] for line in ran.values()]
  return [line for line in of_host if line]


def _own_times(line: Sequence[Mapping]) -> list[tuple[Mapping, float]]:
  """(event, its time without that of the events inside it), in microseconds."""
  found: list[list] = []
  open_: list[int] = []  # indices of the events around the current one
  for event in sorted(line, key=lambda e: (e['ts'], -e['dur'])):
    while open_ and event['ts'] >= _end(found[open_[-1]][0]):
      open_.pop()
    if open_:
      around = found[open_[-1]]
      around[1] -= min(_end(event), _end(around[0])) - event['ts']
    open_.append(len(found))
    found.append([event, event['dur']])
  return [(event, max(own, 0.0)) for event, own in found]


def _end(event: Mapping) -> float:
  return event['ts'] + event['dur']


def _busy(events: Iterable[Mapping]) -> float:
  """The fraction of the time from first to last in which an event ran."""
  spans = sorted((event['ts'], _end(event)) for event in events)
  first, last = spans[0][0], spans[0][0]
  busy = 0.0
  for start, end in spans:
    busy += max(end - max(start, last), 0.0)
    last = max(last, end)
  return busy / (last - first)
