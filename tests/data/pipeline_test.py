"""Data order is a function of (seed, step), on any number of hosts."""

import dataclasses
import io
import itertools
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data.pipeline import Order, batches, flip
from imagen_jax.data.source import Source
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from tests import prepared as prepared_set

NUM = 10


class Numbers(Source):
  """One-pixel images whose colour and caption encode their number."""

  def __init__(self, num=NUM):
    self.num = num

  def __len__(self):
    return self.num

  def __getitem__(self, i):
    return {'image': np.full((1, 1, 3), i, np.uint8), 'caption': f'{i}' * i}


def jitter(example, rng):
  return example | {'noise': rng.integers(1 << 30)}


def all_hosts(source, order, **options):
  """The iterator of every host."""
  orders = [
    dataclasses.replace(order, host=host) for host in range(order.num_hosts)
  ]
  return [batches(source, one, **options) for one in orders]


def take(num_batches, source=None, *, batch_size=4, seed=3, **options):
  """(numbers, noise) of the global batches, [num_batches, batch_size] each."""
  order = Order(seed, batch_size, **options)
  hosts = all_hosts(source or Numbers(), order, augment=jitter)
  steps = [[next(host) for host in hosts] for _ in range(num_batches)]
  return tuple(
    np.stack(
      [np.concatenate([part[name] for part in parts]) for parts in steps]
    ).reshape(num_batches, batch_size, -1)[..., 0]
    for name in ('image', 'noise')
  )


@pytest.mark.parametrize('num', [3, 10, 16])
@pytest.mark.parametrize('num_hosts', [2, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_hosts(num_hosts, num):
  """Images and random numbers, over several epochs; 8 may not divide `num`."""
  together = take(10, Numbers(num), batch_size=8)
  apart = take(10, Numbers(num), batch_size=8, num_hosts=num_hosts)
  np.testing.assert_array_equal(together[0], apart[0])
  np.testing.assert_array_equal(together[1], apart[1])


@pytest.mark.parametrize('num_hosts', [1, 2])
@pytest.mark.parametrize('start', [0, 1, 7])
def test_starting_at_a_step_is_continuing(start, num_hosts):
  whole = take(start + 3)
  part = take(3, start_step=start, num_hosts=num_hosts)
  np.testing.assert_array_equal(whole[0][start:], part[0])
  np.testing.assert_array_equal(whole[1][start:], part[1])


def test_every_epoch_has_every_image_once_in_a_new_order():
  numbers = take(5 * 3)[0].reshape(-1, NUM)
  for epoch in numbers:
    assert sorted(epoch) == list(range(NUM))
  for one, other in itertools.combinations(numbers, 2):
    assert (one != other).any()


def test_random_noise_differs_by_example_and_epoch():
  noise = take(15)[1]
  assert len(np.unique(noise)) == noise.size


def test_another_seed_is_another_order():
  assert (take(3)[0] != take(3, seed=4)[0]).any()


def test_a_source_smaller_than_a_batch_fills_it():
  numbers = take(3, Numbers(3))[0]
  assert numbers.shape == (3, 4)
  assert set(numbers.ravel()) == {0, 1, 2}


def test_the_transform_sees_single_examples_last_and_captions_are_strings():
  seen = []

  def transform(example):
    seen.append(example['noise'])
    return example | {'length': np.int32(len(example['caption']))}

  batch = next(
    batches(Numbers(), Order(0, 4), augment=jitter, transform=transform)
  )
  assert np.ndim(seen[0]) == 0
  assert batch['image'].shape == (4, 1, 1, 3)
  assert batch['image'].dtype == np.uint8
  for row in range(4):
    number = batch['image'][row, 0, 0, 0]
    assert str(batch['caption'][row]) == f'{number}' * number
    assert batch['length'][row] == number


def test_an_error_in_the_data_keeps_its_type_and_message():
  def broken(example):
    raise DataError('one.png')

  with pytest.raises(DataError, match='one.png'):
    next(batches(Numbers(), Order(0, 4), transform=broken))


def test_hosts_must_divide_the_batch():
  with pytest.raises(UsageError):
    Order(0, 4, num_hosts=3)


def test_an_empty_source_is_refused():
  with pytest.raises(DataError):
    batches(Numbers(0), Order(0, 4))


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
  """{kind: path} of the same seven images; red encodes their number."""
  root = tmp_path_factory.mktemp('sets')
  folder, prepared = root / 'folder', root / 'arrayrecord'
  folder.mkdir()
  for i in range(7):
    Image.new('RGB', (8, 8), (i, 0, 0)).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'number {i}')
  for n, numbers in enumerate([range(4), range(4, 7)]):
    with tarfile.open(root / f'{n}.tar', 'w') as tar:
      for file in sorted(f for i in numbers for f in folder.glob(f'{i}.*')):
        info = tarfile.TarInfo(file.name)
        info.size = file.stat().st_size
        tar.addfile(info, io.BytesIO(file.read_bytes()))
  prepared_set.prepare(
    prepared, kind='folder', path=str(folder), size=8, part_size=3
  )
  return {'folder': folder, 'webdataset': root, 'arrayrecord': prepared}


@pytest.mark.parametrize('kind', ['folder', 'webdataset', 'arrayrecord'])
@pytest.mark.parametrize('num_hosts', [1, 2, 4, 8])
def test_every_source_gives_one_order_on_any_number_of_hosts(
  kind, num_hosts, sets, monkeypatch, tmp_path
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  source = make_source(kind=kind, path=sets[kind], size=8)
  found = take(5, source, batch_size=8, num_hosts=num_hosts)
  expected = take(5, Numbers(7), batch_size=8)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])


class Sided(Source):
  """Images dark on the left; half of the captions mention left or right."""

  def __len__(self):
    return 64

  def __getitem__(self, i):
    image = np.array([[[0] * 3, [255] * 3]], np.uint8)
    said = ['a dark side', 'dark on the Left', 'upright, bright', 'its right']
    return {'image': image, 'caption': said[i % 4]}


def mirrored(num_hosts=1):
  """{caption: [whether mirrored, …]} over twelve epochs."""
  found = {}
  hosts = all_hosts(Sided(), Order(1, 64, num_hosts=num_hosts), augment=flip)
  for _ in range(12):
    for part in [next(host) for host in hosts]:
      for caption, image in zip(part['caption'], part['image']):
        found.setdefault(str(caption), []).append(bool(image[0, 0, 0]))
  return found


def test_half_is_mirrored_but_never_what_says_left_or_right():
  found = mirrored()
  assert not any(found['dark on the Left'] + found['its right'])
  for caption in ('a dark side', 'upright, bright'):
    assert 0.38 < np.mean(found[caption]) < 0.62


def test_what_is_mirrored_depends_on_seed_and_place_alone():
  assert mirrored() == mirrored() == mirrored(num_hosts=4)


def test_an_image_is_mirrored_in_some_epochs_only():
  iterator = batches(Sided(), Order(1, 64), augment=flip)
  epochs = [next(iterator)['image'][:, 0, 0, 0].sum() for _ in range(3)]
  assert len(set(epochs)) > 1


def test_on_many_cores_no_thread_waits_for_room(monkeypatch, caplog):
  monkeypatch.setattr(os, 'cpu_count', lambda: 64)
  next(batches(Numbers(), Order(0, 4)))
  assert 'prefetch_buffer_size' not in caplog.text


# Several captions, and batches of one shape.


class Captioned(Numbers):
  """Image i has i + 1 captions, and stored embeddings that encode them."""

  def __getitem__(self, i):
    said = tuple(f'{i}-{j}' for j in range(i + 1))
    example = super().__getitem__(i) | {'caption': said[0]}
    if i:
      text = [np.full((2, 3), j) for j in range(i + 1)]
      mask = [np.array([True, j % 2 == 0]) for j in range(i + 1)]
      return example | {'captions': said, 'text': text, 'mask': mask}
    return example | {'text': np.zeros((2, 3), int), 'mask': np.ones(2, bool)}


def captions(num_batches, num_hosts=1, start_step=0):
  """[[caption, …] of each global batch]."""
  order = Order(3, 4, start_step=start_step, num_hosts=num_hosts)
  found = []
  hosts = all_hosts(Captioned(5), order)
  for _ in range(num_batches):
    parts = [next(host) for host in hosts]
    assert all('captions' not in part for part in parts)
    for name, array in ('text', (2, 3)), ('mask', (2,)):
      assert parts[0][name].shape == (4 // num_hosts, *array)
    for part in parts:
      for said, text, mask in zip(part['caption'], part['text'], part['mask']):
        chosen = int(said.split('-')[1])
        assert (text == chosen).all() and mask[1] == (chosen % 2 == 0)
    found.append([str(c) for part in parts for c in part['caption']])
  return found


def test_one_of_an_images_captions_is_chosen_at_each_epoch():
  said = [c for batch in captions(100) for c in batch]  # 80 epochs
  for i in range(5):
    counts = [said.count(f'{i}-{j}') for j in range(i + 1)]
    assert sum(counts) == 80
    assert min(counts) > 0.4 * 80 / (i + 1)


def test_the_chosen_caption_is_the_same_on_any_hosts_and_when_resumed():
  whole = captions(12)
  assert captions(12, num_hosts=2) == whole == captions(12, num_hosts=4)
  assert captions(5, num_hosts=2, start_step=7) == whole[7:]


def test_an_image_is_mirrored_by_the_caption_that_was_chosen():
  class Said(Numbers):
    def __getitem__(self, i):
      image = np.array([[[0] * 3, [255] * 3]], np.uint8)
      said = ('on the left', 'upright')
      return {'image': image, 'caption': said[0], 'captions': said}

  found = {}
  iterator = batches(Said(), Order(0, 10), augment=flip)
  for batch in itertools.islice(iterator, 20):
    for caption, image in zip(batch['caption'], batch['image']):
      found.setdefault(str(caption), []).append(bool(image[0, 0, 0]))
  assert not any(found['on the left'])
  assert 0.35 < np.mean(found['upright']) < 0.65


SHAPES = {(2, 4): range(6), (3, 3): range(6, 20), (4, 2): range(20, 21)}


class Shaped(Numbers):
  """21 images of three shapes; red encodes their number."""

  buckets = SHAPES

  def __init__(self):
    super().__init__(21)

  def __getitem__(self, i):
    (shape,) = [s for s, chosen in SHAPES.items() if i in chosen]
    return {'image': np.full((*shape, 3), i, np.uint8), 'caption': 'a'}


class Pair(Source):
  """A mixture of one source with shapes and one without."""

  parts, weights = (Shaped(), Numbers(5)), (0.75, 0.25)

  def __len__(self):
    return 26

  def __getitem__(self, i):
    raise NotImplementedError


def shaped(num_batches, source, num_hosts=1, start_step=0):
  """[(shape, [(index, noise), …]) of each global batch]."""
  order = Order(7, 4, start_step=start_step, num_hosts=num_hosts)
  hosts = all_hosts(source, order, augment=jitter)
  found = []
  for _ in range(num_batches):
    parts = [next(host) for host in hosts]
    (shape,) = {part['image'].shape[1:] for part in parts}
    pairs = [np.stack([part['index'], part['noise']], 1) for part in parts]
    found.append((shape, [*map(tuple, np.concatenate(pairs).tolist())]))
  return found


@pytest.mark.parametrize('source', [Shaped(), Pair()])
def test_a_batch_has_one_shape_on_any_hosts_and_when_resumed(source):
  whole = shaped(40, source)
  assert len({shape for shape, _ in whole}) == 3 + (len(source) == 26)
  for num_hosts in 2, 4:
    assert shaped(40, source, num_hosts) == whole
  assert shaped(10, source, 2, start_step=30) == whole[30:]
  noise = [n for _, rows in whole for _, n in rows]
  assert len(set(noise)) == len(noise)


def test_every_image_comes_equally_often_whatever_its_shape():
  rows = [row for _, rows in shaped(21 * 5, Shaped()) for row in rows]
  counts = np.bincount([i for i, _ in rows], minlength=21)
  assert counts.sum() == 420
  assert abs(counts - 20).max() <= 4
  for chosen in SHAPES.values():  # epochs of each shape
    of_shape = [i for i, _ in rows if i in chosen]
    for start in range(0, len(of_shape) - len(chosen), len(chosen)):
      assert sorted(of_shape[start : start + len(chosen)]) == [*chosen]


def test_a_mixture_keeps_its_fractions_over_the_shapes():
  rows = [i for _, rows in shaped(160, Pair()) for i, _ in rows]
  assert np.mean(np.array(rows) < 21) == pytest.approx(0.75, abs=0.02)
  counts = np.bincount(rows, minlength=26)
  assert abs(counts[:21] / (480 / 21) - 1).max() < 0.2
