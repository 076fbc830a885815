"""Memory, time and the best mesh of a step, computed without a compiler."""

import dataclasses
import functools
import math
import re

import jax

from imagen_jax import sharding
from imagen_jax.errors import UsageError
from imagen_jax.planning.memory import num_bytes, peak_and_traffic
from imagen_jax.training import chips
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
  memory: dict
  flops: float
  seconds: dict

  @property
  def total(self):
    """Peak memory of a device, in bytes."""
    return sum(self.memory.values())

  @property
  def roofline(self):
    """Lower bound on the seconds of a step: `seconds` fully overlapped."""
    return max(self.seconds.values())


def abstract_mesh(data, fsdp):
  """A mesh without devices: `sharding`'s rule depends on its shape only."""
  return jax.sharding.AbstractMesh((data, fsdp), sharding.AXES)


def tree_bytes(tree, mesh=None):
  """Bytes of a tree on one device, sharded by the rule of `sharding`."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    size = num_bytes(leaf)
    if mesh is not None:
      spec = sharding.leaf_sharding(leaf, mesh).spec
      size /= math.prod(mesh.shape[axis] for axis in spec if axis)
    total += size
  return total


def make_plan(work, chip, *, data, fsdp, step='train'):
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
  parts = work.accumulate if step == 'train' else 1
  sharding.check_batch_size(work.batch_size, mesh, parts)
  # One device's part of the batch: its own computation and activations.
  traced = work.trace(step, work.batch_size // mesh.size)
  state = work.state
  params = state.params
  memory = {'parameters': tree_bytes(params, mesh)}
  if step == 'train':
    memory |= {
      'EMA': tree_bytes(state.ema_params, mesh),
      'optimizer': tree_bytes(state.opt_state, mesh),
      'text encoder': tree_bytes(work.text_params, mesh),
    }
  batch = work.experiment.batch_spec(work.batch_size // mesh.size)
  memory['batch'] = tree_bytes(batch)
  memory['activations'], moved = peak_and_traffic(
    traced, _size_of(params, step)
  )
  if step == 'train':
    # Compiled steps allocate all gradients before the first is computed. They
    # are written, read for their norm and read for the update.
    memory['gradients'] = tree_bytes(params, mesh) * (1 + (parts > 1))
    moved += 3 * memory['gradients']
  if fsdp > 1:
    # The gathered layer in use, and the next one being gathered.
    memory['gathered layers'] = 2 * max(
      map(_largest_layer, (params, work.text_params))
    )
  flops = count_flops(traced)
  moved += 2 * sum(
    memory.get(k, 0) for k in ('parameters', 'EMA', 'optimizer', 'text encoder')
  )
  return Plan(
    data=data,
    fsdp=fsdp,
    batch_size=work.batch_size,
    accumulate=parts,
    memory=memory,
    flops=flops,
    seconds={
      'compute': flops / chip.flops,
      'memory': moved / chip.bandwidth,
      'network': _network_bytes(work, params, mesh, step) / chip.link,
    },
  )


def _size_of(params, step):
  """A function: aval -> bytes; 0 for gradients, recognised by their shape."""
  counted_apart = set()
  if step == 'train':
    counted_apart = {leaf.shape for leaf in jax.tree.leaves(params)}

  def size_of(aval):
    if getattr(aval, 'shape', None) in counted_apart:
      return 0
    return num_bytes(aval)

  return size_of


def _largest_layer(tree):
  """Bytes of the largest leaf; of a stack of scanned layers, of one layer."""
  largest = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    size = num_bytes(leaf)
    if re.fullmatch(r'layers|(down|up)_\d+', path[0].key):
      size /= leaf.shape[0]
    largest = max(largest, size)
  return largest


def _network_bytes(work, params, mesh, step):
  """Bytes that a device sends in one step.

  On a ring of n devices an all-gather moves (n − 1)/n of the array, an
  all-reduce twice that. Parameters and gradients are sent in bfloat16; compiled
  steps all-reduce a layer's gradient over all devices and keep their shard.
  """
  fsdp, devices = mesh.shape['fsdp'], mesh.size
  split = (fsdp - 1) / fsdp
  whole = tree_bytes(params) / 2
  if step == 'sample':
    return split * whole * work.stage.sampling.steps
  text = split * tree_bytes(work.text_params)
  layers = 2 * split * whole + 2 * (devices - 1) / devices * whole
  return text + layers * work.accumulate


def splits(work, chip, num_chips, *, step='train'):
  """The plans of all meshes with data × fsdp = `num_chips`.

  Raises:
    UsageError: the batch cannot be split over the chips.
  """
  plans = []
  for fsdp in range(1, num_chips + 1):
    if num_chips % fsdp == 0:
      plans.append(
        make_plan(work, chip, data=num_chips // fsdp, fsdp=fsdp, step=step)
      )
  return plans


def best(plans, chip):
  """The fastest plan that fits, of equals that of least fsdp; or None."""
  fitting = [p for p in plans if p.total <= chips.usable(chip)]
  # Times within 0.1 % count as equal.
  return min(
    fitting,
    key=lambda p: (round(math.log(max(p.roofline, 1e-12)), 3), p.fsdp),
    default=None,
  )


def cheapest_change(work, chip, num_chips, *, step='train'):
  """Flags of the cheapest change that makes a job fit, or None.

  Tried in order of cost: another mesh, gradient accumulation, remat policy,
  cached embeddings; for a sampling step, another mesh or a smaller batch.
  """
  changed = functools.partial(dataclasses.replace, work)

  def fits(candidate):
    try:
      plans = splits(candidate, chip, num_chips, step=step)
    except UsageError:
      return None
    return best(plans, chip)

  plan = fits(work)
  if plan:
    return f'--data {plan.data} --fsdp {plan.fsdp}'
  local = work.batch_size // num_chips
  times = _times(work, chip, num_chips, step)
  if step == 'sample':
    batch = work.batch_size // times if times else 0
    while batch >= num_chips:
      plan = fits(changed(batch_size=batch))
      if plan:
        return f'--batch_size {batch} --fsdp {plan.fsdp}'
      batch //= 2
    return None
  parts = work.accumulate * times
  while 1 < parts <= local:
    plan = fits(changed(accumulate=parts))
    if plan:
      return f'--accumulate {parts} --fsdp {plan.fsdp}'
    parts *= 2
  if work.stage.net.remat is None:
    plan = fits(work.with_remat('nothing_saveable'))
    if plan:
      return f'--config.stage.net.remat=nothing_saveable --fsdp {plan.fsdp}'
  if not work.experiment.cached_text:
    plan = fits(work.with_cached_text())
    if plan:
      return f'--text cached --fsdp {plan.fsdp}'
  return None


def _times(work, chip, num_chips, step):
  """The power of two by which activations must shrink; 0 if none is enough.

  It saves attempts: tracing the step of a large model takes seconds.
  """
  plan = make_plan(work, chip, data=1, fsdp=num_chips, step=step)
  activations = plan.memory['activations']
  room = chips.usable(chip) - (plan.total - activations)
  if room <= 0:
    return 0
  return 2 ** max(1, math.ceil(math.log2(activations / room)))


def require_fit(plan, work, chip, num_chips, *, step='train'):
  """Checks that a plan fits.

  Raises:
    UsageError: it does not; the message gives the missing memory and the
      cheapest change that would fit.
  """
  room = chips.usable(chip)
  if plan.total <= room:
    return
  change = cheapest_change(work, chip, num_chips, step=step)
  advice = f'it would with {change}' if change else 'use more chips'
  raise UsageError(
    f'{work.stage.name} does not fit: each {chip.name} needs '
    f'{plan.total / chips.GIB:.1f} GiB and has {room / chips.GIB:.1f}, '
    f'{(plan.total - room) / chips.GIB:.1f} too few; {advice}.'
  )
