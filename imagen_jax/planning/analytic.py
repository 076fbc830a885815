"""Memory, time and the best mesh of a step, computed without any compiler."""

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
    data: devices that hold copies of the state.
    fsdp: devices that share one copy.
    batch_size: images of a step.
    accumulate: parts of a batch.
    memory: {what: bytes}, all of it alive at the worst moment.
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
    """Bytes a device needs."""
    return sum(self.memory.values())

  @property
  def roofline(self):
    """Least seconds of a step: all three at once, none waiting for another."""
    return max(self.seconds.values())


def abstract_mesh(data, fsdp):
  """A mesh for `sharding`'s rule, which looks at its shape alone."""
  return jax.sharding.AbstractMesh((data, fsdp), sharding.AXES)


def tree_bytes(tree, mesh=None):
  """Bytes of a tree on one device, split by the rule of `sharding`."""
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
    data: size of the mesh's axis.
    fsdp: size of the other.
    step: 'train' or 'sample' (one batch through all its steps).

  Raises:
    UsageError: the batch does not split over the chips.
  """
  mesh = abstract_mesh(data, fsdp)
  parts = work.accumulate if step == 'train' else 1
  sharding.check_batch_size(work.batch_size, mesh, parts)
  # One device's part of the batch: what it computes and stores for itself.
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
    # Compiled steps set all of them aside before the first is known. They are
    # written, read for their norm and read again.
    memory['gradients'] = tree_bytes(params, mesh) * (1 + (parts > 1))
    moved += 3 * memory['gradients']
  if fsdp > 1:
    # One layer whole while it is used, and the next one on its way.
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
  """Bytes of a value of a step; gradients, told by their shape, are none."""
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
  """Bytes that leave a device in one step.

  A ring of n moves (n − 1)/n of the array to gather it, and twice that for a
  sum that all keep. Parameters and gradients travel in bfloat16; compiled
  steps sum a layer's gradient over all devices and keep their fraction of it.
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
  """The plans of every data × fsdp = `num_chips` that the batch allows."""
  plans = []
  for fsdp in range(1, num_chips + 1):
    if num_chips % fsdp == 0:
      plans.append(
        make_plan(work, chip, data=num_chips // fsdp, fsdp=fsdp, step=step)
      )
  return plans


def best(plans, chip):
  """The fastest plan that fits, on equal times the least split; or None."""
  fitting = [p for p in plans if p.total <= chips.usable(chip)]
  # A thousandth is no difference.
  return min(
    fitting,
    key=lambda p: (round(math.log(max(p.roofline, 1e-12)), 3), p.fsdp),
    default=None,
  )


def cheapest_change(work, chip, num_chips, *, step='train'):
  """What to change so that a job fits: a phrase, or None if nothing does.

  From the cheapest on: another split, gradient accumulation, recomputation,
  cached embeddings; of a sampling step, fewer images at a time.
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
  """By what power of two the activations must shrink; 0 when none is enough.

  Where to begin: tracing the step of a large model takes seconds.
  """
  plan = make_plan(work, chip, data=1, fsdp=num_chips, step=step)
  activations = plan.memory['activations']
  room = chips.usable(chip) - (plan.total - activations)
  if room <= 0:
    return 0
  return 2 ** max(1, math.ceil(math.log2(activations / room)))


def require_fit(plan, work, chip, num_chips, *, step='train'):
  """Refuses a plan that does not fit.

  Raises:
    UsageError: by how much, and the cheapest change that would fit.
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
