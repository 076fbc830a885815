"""Batches of a source's examples, in an order that is f(seed, step).

Batch k is a pure function of (source, seed, batch size, k), so a run resumes
by starting at k, on any number of hosts. This depends on the order of
operations: slicing by host comes after everything random, so hosts see
disjoint parts of one global batch. Slicing first would give every host the
same random numbers for different images, and would misalign the epochs where
the hosts do not divide the number of images.

Where images differ in shape, a batch has one shape. Each shape is shuffled for
itself, and they take turns in a fixed pattern, each as often as it has images.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import grain
import numpy as np

from imagen_jax.data.source import Source
from imagen_jax.data.workers import InWorkers
from imagen_jax.errors import DataError, UsageError

Example: TypeAlias = dict[str, Any]

PREFETCH = 16  # batches, each made by one thread
# Captions that would be wrong for the mirrored image.
SIDED = re.compile(r'\b(left|right)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Order:
  """Which examples are in which batch, and which rows this host makes.

  Attributes:
    seed: of the permutations and of `augment`.
    batch_size: the global batch size, over all hosts.
    start_step: number of the first batch.
    host, num_hosts: index of this process, and number of processes. The global
      batch is the concatenation of the hosts' batches.

  Raises:
    UsageError: the hosts do not divide the batch.
  """

  seed: int
  batch_size: int
  start_step: int = 0
  host: int = 0
  num_hosts: int = 1

  def __post_init__(self) -> None:
    if self.batch_size % self.num_hosts:
      raise UsageError(
        f'train.batch_size={self.batch_size} cannot be split over '
        f'{self.num_hosts} hosts; use a multiple of {self.num_hosts}.'
      )

  @property
  def rows(self) -> int:
    """Rows of a batch that each host makes."""
    return self.batch_size // self.num_hosts


def batches(
  source: Source,
  order: Order,
  *,
  augment: Callable[[Example, np.random.Generator], Example] | None = None,
  transform: Callable[[Example], Example] | None = None,
  workers: int = 0,
) -> Iterator[Example]:
  """An endless iterator over this host's part of the batches.

  Every epoch is a new permutation of the source, or of each of its `buckets`.
  Batches span epoch boundaries, so a source may be smaller than a batch. Of an
  image's captions one is chosen at random each time.

  Args:
    source: of the examples.
    order: seed, batch size, first step, and this host's part.
    augment: (example, numpy Generator) -> example, or None. Each example has
      its own generator, new in every epoch, the same on any host. It sees the
      caption that was chosen.
    transform: example -> example, or None; runs last, before batching. It and
      `augment` must not return None, which would misalign the hosts. `index`
      is kept in any case.
    workers: processes that read, decode and augment; 0: threads of this one
      do. It does not change what comes out.

  Returns:
    an iterator over dicts of numpy arrays [batch_size / num_hosts, ...];
    strings become arrays of strings, and `index` holds the examples' positions
    in the source. It prefetches.

  Raises:
    DataError: the source is empty.
    UsageError: the source cannot be copied to workers.
  """
  if len(source) == 0:
    raise DataError('the data set has no images; check data.path.')

  def make(
    chosen: tuple[Source, int, int], rng: np.random.Generator
  ) -> Example:
    part, number, index = chosen
    example = one_caption(part[number] | {'index': index}, rng)
    return example if augment is None else augment(example, rng)

  def batch(examples: list[Example]) -> Example:
    if transform is not None:
      examples = [transform(e) | {'index': e['index']} for e in examples]
    return grain.experimental.batch_and_pad(examples, batch_size=order.rows)

  weights, shapes = [], []
  for weight, data in _shuffled(source, order.seed):
    # One step from a number to its example: each step costs time per image.
    rows = _HostRows(data.random_map(make), order)
    weights.append(weight)
    shapes.append(rows.batch(order.rows, batch_fn=list))
  data = shapes[0]
  if len(shapes) > 1:
    data = grain.MapDataset.mix(shapes, weights)
  # The number of threads and of workers does not change the order.
  threads = min(PREFETCH, os.cpu_count() or 1)
  if workers:
    data = InWorkers(data, source.parts or (source,), workers)
    threads = min(PREFETCH, 2 * workers)  # which wait for workers
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=PREFETCH
  )
  data = data.map(batch).to_iter_dataset(options)
  iterator = iter(data)
  iterator.set_state({'next_index': order.start_step})
  return iterator


def _shuffled(
  source: Source, seed: int
) -> list[tuple[float, grain.MapDataset]]:
  """(weight, endless sequence of `_Chosen`) of the examples of each shape.

  It has each epoch of a source, or of each part of a mixture. A mixture takes
  turns in a fixed pattern, so a batch has the parts' fractions as nearly as
  whole numbers can.
  """
  shapes: dict[Any, list[tuple[float, grain.MapDataset]]] = {}
  start = 0
  for number, part in enumerate(source.parts or (source,)):
    weight = source.weights[number] if source.parts else 1.0
    own = (number,) if source.parts else ()
    whole: Mapping[tuple[int, ...], Sequence[int]] = {(): range(len(part))}
    for shape, chosen in (part.buckets or whole).items():
      data = _Chosen(part, chosen, start).seed(_derived(seed, *own, *shape))
      data = data.shuffle().repeat(None)
      fraction = weight * len(chosen) / len(part)
      shapes.setdefault(shape, []).append((fraction, data))
    start += len(part)
  found = []
  for shape, some in sorted(shapes.items()):
    weights, parts = zip(*some)
    data = parts[0]
    if source.parts:
      data = grain.MapDataset.mix(parts, weights).seed(_derived(seed, *shape))
    found.append((sum(weights), data))
  return found


def _derived(seed: int, *numbers: int) -> int:
  """The seed itself, or one of these numbers."""
  if not numbers:
    return seed
  return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])


class _Chosen(grain.MapDataset):
  """(source, number in it, `index`) of examples; `index` begins at `start`."""

  def __init__(self, source: Source, chosen: Sequence[int], start: int) -> None:
    super().__init__()
    self._source, self._chosen, self._start = source, chosen, start

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: Any) -> Any:
    number = int(self._chosen[index % len(self._chosen)])
    return self._source, number, self._start + number


class _HostRows(grain.MapDataset):
  """One host's rows of every global batch, in order.

  A slice [host::num_hosts] would be simpler, but would order the rows of the
  global batch differently than one process does, so that a row's noise would
  be added to another image.
  """

  def __init__(self, parent: grain.MapDataset, order: Order) -> None:
    super().__init__(parent)
    self._order = order

  def __len__(self) -> int:
    return len(self._parent) // self._order.num_hosts

  def __getitem__(self, index: Any) -> Any:
    batch, row = divmod(index, self._order.rows)
    start = batch * self._order.batch_size + self._order.host * self._order.rows
    return self._parent[start + row]


def one_caption(example: Example, rng: np.random.Generator) -> Example:
  """Chooses one of the captions of an example, with its embeddings if stored.

  Each is as likely. An example with one caption is unchanged, and takes no
  random number.
  """
  if 'captions' not in example:
    return example
  chosen = int(rng.integers(len(example['captions'])))
  one = {k: v for k, v in example.items() if k != 'captions'}
  one['caption'] = example['captions'][chosen]
  for key in 'text', 'mask':
    if key in example:
      one[key] = example[key][chosen]
  return one


def crop(
  example: Example, rng: np.random.Generator, *, side: int, unit: int
) -> Example:
  """Cuts a random square out of an image, for `batches(augment=…)` (2.5).

  Only this part of an image goes to a device: a 16th of 1024², for 256².

  Args:
    example: with an `image` uint8 [H, W, 3].
    rng: of the example.
    side: of the square, in pixels.
    unit: the square's corner is a multiple of it: with the upsampling factor,
      the mean of each box of the crop is a pixel of the low-resolution image.
  """
  image = example['image']
  spare = np.subtract(image.shape[:2], side) // unit
  top, left = rng.integers(0, spare + 1) * unit
  cut = image[top : top + side, left : left + side]
  return example | {'image': np.ascontiguousarray(cut)}


def flip(example: Example, rng: np.random.Generator) -> Example:
  """Mirrors an image with probability 0.5, for `batches(augment=flip)`.

  An image whose caption says left or right is not mirrored, since its caption
  would be wrong.
  """
  mirrored = rng.random() < 0.5 and not SIDED.search(example['caption'])
  if not mirrored:
    return example
  return example | {'image': np.ascontiguousarray(example['image'][:, ::-1])}
