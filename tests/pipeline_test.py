"""The order of the data is a function of (seed, step) on any hosts."""

import itertools

import numpy as np
import pytest

from imagen_jax.data.pipeline import batches
from imagen_jax.errors import DataError, UsageError

NUM = 10


class Numbers:
  """Ten one-pixel pictures, telling their number in colour and caption."""

  def __init__(self, num=NUM):
    self.num = num

  def __len__(self):
    return self.num

  def __getitem__(self, i):
    return {'image': np.full((1, 1, 3), i, np.uint8), 'caption': f'{i}' * i}


def jitter(example, rng):
  return example | {'draw': rng.integers(1 << 30)}


def take(num_batches, source=None, *, num_hosts=1, **options):
  """(numbers, draws), [num_batches, 4], of the global batches of 4."""
  options = dict(seed=3, batch_size=4, augment=jitter) | options
  hosts = [
    batches(source or Numbers(), host=host, num_hosts=num_hosts, **options)
    for host in range(num_hosts)
  ]

  def whole(parts, name):
    """Row j of host h is row j · num_hosts + h."""
    columns = [part[name].reshape(4 // num_hosts, -1)[:, 0] for part in parts]
    return np.stack(columns, axis=1).ravel()

  steps = [[next(host) for host in hosts] for _ in range(num_batches)]
  return tuple(
    np.stack([whole(parts, name) for parts in steps])
    for name in ('image', 'draw')
  )


@pytest.mark.parametrize('num_hosts', [2, 4])
def test_global_batches_are_the_same_on_any_number_of_hosts(num_hosts):
  """Pictures and random draws, over several epochs that 4 does not divide."""
  together, apart = take(10), take(10, num_hosts=num_hosts)
  np.testing.assert_array_equal(together[0], apart[0])
  np.testing.assert_array_equal(together[1], apart[1])


@pytest.mark.parametrize('num_hosts', [1, 2])
@pytest.mark.parametrize('start', [0, 1, 7])
def test_starting_at_a_step_is_continuing(start, num_hosts):
  whole = take(start + 3)
  part = take(3, start_step=start, num_hosts=num_hosts)
  np.testing.assert_array_equal(whole[0][start:], part[0])
  np.testing.assert_array_equal(whole[1][start:], part[1])


def test_every_epoch_has_every_picture_once_in_a_new_order():
  numbers = take(5 * 3)[0].reshape(-1, NUM)
  for epoch in numbers:
    assert sorted(epoch) == list(range(NUM))
  for one, other in itertools.combinations(numbers, 2):
    assert (one != other).any()


def test_random_draws_differ_by_example_and_epoch():
  draws = take(15)[1]
  assert len(np.unique(draws)) == draws.size


def test_another_seed_is_another_order():
  assert (take(3)[0] != take(3, seed=4)[0]).any()


def test_a_source_smaller_than_a_batch_fills_it():
  numbers = take(3, Numbers(3))[0]
  assert numbers.shape == (3, 4)
  assert set(numbers.ravel()) == {0, 1, 2}


def test_the_transform_sees_single_examples_last_and_captions_are_strings():
  seen = []

  def transform(example):
    seen.append(example['draw'])
    return example | {'length': np.int32(len(example['caption']))}

  batch = next(
    batches(
      Numbers(), seed=0, batch_size=4, augment=jitter, transform=transform
    )
  )
  assert np.ndim(seen[0]) == 0
  assert batch['image'].shape == (4, 1, 1, 3)
  assert batch['image'].dtype == np.uint8
  for row in range(4):
    number = batch['image'][row, 0, 0, 0]
    assert str(batch['caption'][row]) == f'{number}' * number
    assert batch['length'][row] == number


def test_an_error_in_the_data_keeps_its_sentence():
  def broken(example):
    raise DataError('one.png cannot be decoded')

  with pytest.raises(DataError, match='one.png cannot be decoded'):
    next(batches(Numbers(), seed=0, batch_size=4, transform=broken))


def test_hosts_must_divide_the_batch():
  with pytest.raises(UsageError, match='multiple of 3'):
    batches(Numbers(), seed=0, batch_size=4, num_hosts=3)


def test_an_empty_source_is_refused():
  with pytest.raises(DataError, match='no pictures'):
    batches(Numbers(0), seed=0, batch_size=4)
