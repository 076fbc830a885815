"""Memory, time and the best mesh of a step, computed without a compiler."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from imagen_jax import sharding
from imagen_jax.errors import UsageError
from imagen_jax.planning.job import Job
from imagen_jax.planning.memory import num_bytes, peak_and_traffic
from imagen_jax.training import chips
from imagen_jax.training.chips import Chip
from imagen_jax.training.flops import count_flops


@dataclasses.dataclass(frozen=True)
class Plan:
  """One step on one mesh; bytes and seconds are per device.

  Attributes:
    data: number of copies of the state.
    fsdp: number of devices over which each copy is sharded.
    batch_size: images per step, over all devices.
    accumulate: parts of a batch.
    memory: {name: bytes}, which add up to the peak.
    flops: FLOPs of a step.
    seconds: {'compute', 'memory', 'network': seconds of a step at the chip's
      full speed}.
  """

  data: int
  fsdp: int
  batch_size: int
  accumulate: int
  memory: dict[str, float]
  flops: float
  seconds: dict[str, float]

  @property
  def total(self) -> float:
    """Peak memory of a device, in bytes."""
    return sum(self.memory.values())

  @property
  def roofline(self) -> float:
    """Lower bound on the seconds of a step: `seconds` fully overlapped."""
    return max(self.seconds.values())


def abstract_mesh(data: int, fsdp: int) -> AbstractMesh:
  """A mesh without devices: `sharding`'s rule depends on its shape only."""
  return AbstractMesh((data, fsdp), sharding.AXES)


def tree_bytes(
  tree: Any,
  mesh: AbstractMesh | None = None,
  axes: Sequence[str] = sharding.SPLIT,
) -> float:
  """Bytes of a tree on one device, sharded by the rule of `sharding`.

  Args:
    tree: of arrays or their shapes.
    mesh: None is a single device.
    axes: that the tree is split over.
  """
  mesh = mesh or abstract_mesh(1, 1)

  def size(leaf: jax.ShapeDtypeStruct) -> float:
    placed = sharding.leaf_sharding(leaf, mesh, axes=axes)
    parts = math.prod(leaf.shape) / math.prod(placed.shard_shape(leaf.shape))
    return num_bytes(leaf) / parts

  return sum(map(size, jax.tree.leaves(tree)))


def make_plan(
  work: Job, chip: Chip, *, data: int, fsdp: int, step: str = 'train'
) -> Plan:
  """The `Plan` of a job on data × fsdp chips.

  Args:
    work: the `job.Job`.
    chip: a `chips.Chip`.
    data, fsdp: sizes of the mesh's axes.
    step: 'train' or 'sample' (all sampling steps of one batch).

  Raises:
    UsageError: the batch cannot be split over the chips.
  """
  mesh = abstract_mesh(data, fsdp)
  training = step == 'train'
  parts = work.accumulate if training else 1
  sharding.check_batch_size(work.batch_size, mesh, parts)
  # One device's part of the batch: its own computation and activations.
  local = work.batch_size // mesh.size
  traced = work.trace(step, local)
  state = work.state
  axes = sharding.ZERO if work.zero else sharding.SPLIT
  memory = {'parameters': tree_bytes(state.params, mesh)}
  if training:
    memory |= {
      'EMA': tree_bytes((state.ema_params, state.emas), mesh, axes),
      'optimizer': tree_bytes(state.opt_state, mesh, axes),
      'text encoder': tree_bytes(work.text_params, mesh),
    }
  moved = 2 * sum(memory.values())
  memory['batch'] = tree_bytes(work.experiment.batch_spec(local))
  gradients = state.params if training else ()
  memory['activations'], traffic = peak_and_traffic(
    traced, _size_without(gradients)
  )
  moved += traffic
  if training:
    # Compiled steps allocate all gradients before the first is computed. They
    # are written, read for their norm and read for the update.
    gradients_bytes = tree_bytes(state.params, mesh, axes)
    memory['gradients'] = gradients_bytes * (1 + (parts > 1))
    moved += 3 * memory['gradients']
  if fsdp > 1:
    # The gathered layer in use, and the next one being gathered.
    memory['gathered layers'] = 2 * max(
      map(_largest_layer, (state.params, work.text_params))
    )
  flops = count_flops(traced)
  seconds = {
    'compute': flops / chip.flops,
    'memory': moved / chip.bandwidth,
    'network': _network_bytes(work, mesh, step) / chip.link,
  }
  return Plan(data, fsdp, work.batch_size, parts, memory, flops, seconds)


def _size_without(gradients: Any) -> Callable[[Any], float]:
  """A function: aval -> bytes; 0 for gradients, recognised by their shape."""
  shapes = {leaf.shape for leaf in jax.tree.leaves(gradients)}
  return lambda x: 0 if getattr(x, 'shape', None) in shapes else num_bytes(x)


def _largest_layer(tree: Any) -> float:
  """Bytes of the largest leaf; of a stack of scanned layers, of one layer."""
  largest = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    stacked = re.fullmatch(r'layers|(down|up)_\d+', path[0].key)
    largest = max(largest, num_bytes(leaf) / (leaf.shape[0] if stacked else 1))
  return largest


def _network_bytes(work: Job, mesh: AbstractMesh, step: str) -> float:
  """Bytes that a device sends in one step.

  On a ring of n devices an all-gather or a reduce-scatter moves (n − 1)/n of
  the array, an all-reduce twice that. Parameters are gathered in bfloat16.
  Compiled steps all-reduce a layer's gradient over all devices and keep their
  shard; with `mesh.zero` they reduce-scatter it, and the new parameters are
  gathered in float32.
  """
  data, fsdp = mesh.shape['data'], mesh.shape['fsdp']
  whole = tree_bytes(work.state.params)
  others = lambda n: (n - 1) / n
  layers = others(fsdp) * whole / 2
  if step == 'sample':
    return layers * work.stage.sampling.steps
  half = work.config.train.gradient_dtype == 'bfloat16'
  gradients = others(mesh.size) * whole / (1 + half)
  text = others(fsdp) * tree_bytes(work.text_params)
  if work.zero:
    new = others(data) * tree_bytes(work.state.params, mesh)
    return text + new + (2 * layers + gradients) * work.accumulate
  return text + 2 * (layers + gradients) * work.accumulate


def splits(
  work: Job, chip: Chip, num_chips: int, *, step: str = 'train'
) -> list[Plan]:
  """The plans of all meshes with data × fsdp = `num_chips`.

  Raises:
    UsageError: the batch cannot be split over the chips.
  """
  return [
    make_plan(work, chip, data=num_chips // fsdp, fsdp=fsdp, step=step)
    for fsdp in range(1, num_chips + 1)
    if num_chips % fsdp == 0
  ]


def best(plans: Iterable[Plan], chip: Chip) -> Plan | None:
  """The fastest plan that fits, of equals that of least fsdp; or None."""
  # Times within 0.1 % count as equal.
  return min(
    (p for p in plans if p.total <= chips.usable(chip)),
    key=lambda p: (round(math.log(max(p.roofline, 1e-12)), 3), p.fsdp),
    default=None,
  )


def cheapest_change(
  work: Job, chip: Chip, num_chips: int, *, step: str = 'train'
) -> str | None:
  """Flags of the cheapest change that makes a job fit, or None.

  Tried in order of cost: another mesh, a state that is split over all chips,
  gradient accumulation, remat policies from the fewest repeated FLOPs on,
  cached embeddings; for a sampling step, another mesh or a smaller batch.
  """
  for flags, candidate in _changes(work, chip, num_chips, step):
    try:
      plan = best(splits(candidate, chip, num_chips, step=step), chip)
    except UsageError:  # the batch cannot be split like this
      continue
    if plan:
      return f'{flags}--fsdp {plan.fsdp}'
  return None


def _changes(
  work: Job, chip: Chip, num_chips: int, step: str
) -> Iterator[tuple[str, Job]]:
  """(flags, job) of each change that may help, the cheapest first."""
  yield '', work
  times = _times(work, chip, num_chips, step)
  if step == 'sample':
    batch = work.batch_size // times if times else 0
    while batch >= num_chips:
      yield f'--batch_size {batch} ', work.changed({'train.batch_size': batch})
      batch //= 2
    return
  if num_chips > 1 and not work.zero:
    yield '--config.mesh.zero=True ', work.changed({'mesh.zero': True})
  parts = work.accumulate * times
  while 0 < parts <= work.batch_size // num_chips:
    yield f'--accumulate {parts} ', work.changed({'train.accumulate': parts})
    parts *= 2
  for policy in _less_saved(work):
    remat = {'stage.net.remat': policy}
    yield f'--config.stage.net.remat={policy} ', work.changed(remat)
  if not work.experiment.cached_text:
    yield '--text cached ', work.changed({}, cached_text=True)


def _less_saved(work: Job) -> list[str]:
  """The remat policies that save less than a job's, the most first.

  `dots_saveable` is left out: it only spares the products of attentions.
  """
  if not hasattr(work.stage.net, 'remat'):
    return []
  order = ['convs_saveable', 'nothing_saveable']
  if work.remat is None:
    return order
  return order[order.index(work.remat) + 1 :] if work.remat in order else []


def _times(work: Job, chip: Chip, num_chips: int, step: str) -> int:
  """The power of two by which activations must shrink; 0 if none is enough.

  It saves attempts: tracing the step of a large model takes seconds.
  """
  plan = make_plan(work, chip, data=1, fsdp=num_chips, step=step)
  activations = plan.memory['activations']
  room = chips.usable(chip) - (plan.total - activations)
  if room <= 0:
    return 0
  return 2 ** max(1, math.ceil(math.log2(activations / room)))


def require_fit(
  plan: Plan, work: Job, chip: Chip, num_chips: int, *, step: str = 'train'
) -> None:
  """Checks that a plan fits.

  Raises:
    UsageError: it does not; the message gives its memory and the cheapest
      change that would fit.
  """
  room = chips.usable(chip)
  if plan.total <= room:
    return
  change = cheapest_change(work, chip, num_chips, step=step)
  advice = f'it fits with {change}' if change else 'use more chips'
  raise UsageError(
    f'{work.stage.name} does not fit: each {chip.name} needs '
    f'{plan.total / chips.GIB:.1f} GiB and has {room / chips.GIB:.1f}; '
    f'{advice}.'
  )
