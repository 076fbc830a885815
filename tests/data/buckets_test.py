"""Sources whose images have several shapes."""

import gzip

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import prepare
from imagen_jax.data.pipeline import Order, batches
from imagen_jax.data.records import Spans
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from tests.data.webdataset_test import encoded, write

SIZES = [(64, 64), (72, 56), (200, 60), (56, 72), (64, 64), (40, 80), (80, 64)]
# (height, width) of the bucket of each; None: too small for it.
SHAPES = [(64, 64), (56, 72), (32, 128), (72, 56), (64, 64), None, (56, 72)]


def image(i):
  width, height = SIZES[i]
  rng = np.random.default_rng(i)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def folder(path):
  for i in range(len(SIZES)):
    Image.fromarray(image(i)).save(path / f'{i}.png')
    (path / f'{i}.txt').write_text(f'image {i}')
  return path


def tars(path):
  for start, stop in (0, 4), (4, len(SIZES)):
    members = []
    for i in range(start, stop):
      members.append((f'{i}.png', encoded(image(i))))
      members.append((f'{i}.txt', f'image {i}'.encode()))
    write(path / f'{start}.tar', members)
  return path


def made(kind, tmp_path, aspect='buckets', size=64):
  """A source of the images above."""
  path = tmp_path / kind
  if not path.exists() and kind != 'arrayrecord':
    path.mkdir()
    (folder if kind == 'folder' else tars)(path)
  if kind != 'arrayrecord':
    return make_source(kind=kind, path=path, size=size, aspect=aspect)
  if not path.exists():
    made('webdataset', tmp_path)
    words = f'--source webdataset --path {tmp_path}/webdataset --size 64'
    words += f' --aspect {aspect} --workers 1 --out {path}'
    assert prepare.main(words.split()) == 0
  return make_source(kind=kind, path=path, size=size)


KINDS = ['folder', 'webdataset', 'arrayrecord']


@pytest.mark.parametrize('kind', KINDS)
def test_each_image_is_in_the_bucket_of_its_shape(tmp_path, kind):
  source = made(kind, tmp_path)
  found = {}
  for shape, chosen in source.buckets.items():
    for i in chosen:
      example = source[i]
      assert example['image'].shape == (*shape, 3)
      found[int(example['caption'][-1])] = shape
      assert chosen.index(i) >= 0 and i in chosen
  assert found == {i: s for i, s in enumerate(SHAPES) if s}
  assert sum(map(len, source.buckets.values())) == len(source) == 6


@pytest.mark.parametrize('kind', KINDS)
def test_a_bad_image_is_replaced_by_one_of_its_shape(
  tmp_path, kind, monkeypatch
):
  source = made(kind, tmp_path)
  source.max_bad = 1
  chosen = source.buckets[56, 72]
  example = type(source).example

  def broken(self, i):
    if i == chosen[1]:
      raise OSError('gone')
    return example(self, i)

  monkeypatch.setattr(type(source), 'example', broken)
  monkeypatch.setattr('imagen_jax.data.checked.PAUSES', ())
  assert source[chosen[1]]['caption'] == source[chosen[0]]['caption']
  assert source[chosen[1]]['image'].shape == (56, 72, 3)


@pytest.mark.parametrize('kind', KINDS)
def test_batches_of_buckets_are_those_of_any_number_of_hosts(tmp_path, kind):
  source = made(kind, tmp_path)
  whole = batches(source, Order(0, 4))
  hosts = [batches(source, Order(0, 4, host=h, num_hosts=2)) for h in range(2)]
  shapes = set()
  for _ in range(30):
    one, parts = next(whole), [next(host) for host in hosts]
    both = np.concatenate([part['image'] for part in parts])
    np.testing.assert_array_equal(one['image'], both)
    shapes.add(one['image'].shape[1:3])
  assert shapes == {s for s in SHAPES if s}


def test_a_prepared_set_of_buckets_is_read_smaller_by_the_same_factor(
  tmp_path,
):
  source = made('arrayrecord', tmp_path)
  small = made('arrayrecord', tmp_path, size=32)
  assert [*small.buckets] == [(h // 2, w // 2) for h, w in source.buckets]
  for i, example in enumerate(small):
    large = source[i]['image']
    height, width = large.shape[:2]
    means = large.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    assert np.abs(example['image'] - means).max() <= 0.5
  with pytest.raises(DataError, match='12'):
    made('arrayrecord', tmp_path, size=12)


@pytest.mark.parametrize('kind', KINDS)
def test_padded_images_are_squares(tmp_path, kind):
  source = made(kind, tmp_path, 'pad')
  assert not source.buckets and len(source) == 7
  wide = next(e['image'] for e in source if e['caption'] == 'image 2')
  assert wide.shape == (64, 64, 3)
  assert (wide[:22] == 255).all() and (wide[-22:] == 255).all()
  assert wide[23:-23].std() > 5


def test_a_compressed_tar_has_the_buckets_of_the_tar(tmp_path):
  source = made('webdataset', tmp_path)
  packed = tmp_path / 'packed'
  packed.mkdir()
  for tar in (tmp_path / 'webdataset').glob('*.tar'):
    (packed / f'{tar.name}.gz').write_bytes(gzip.compress(tar.read_bytes()))
  other = make_source(kind='webdataset', path=packed, size=64, aspect='buckets')
  assert other.buckets == source.buckets


def test_an_unknown_aspect_is_refused(tmp_path):
  for options in {'aspect': 'stretch'}, {'aspect': 'buckets', 'size': 60}:
    with pytest.raises(UsageError) as error:
      made('folder', tmp_path, **options)
    assert error.value.key == 'config.data.aspect'
  with pytest.raises(UsageError) as error:
    make_source(kind='arrayrecord', path=tmp_path, size=8, aspect='pad')
  assert error.value.key == 'config.data.aspect'


def test_spans_are_a_sequence_of_whole_numbers():
  ranges = [range(3, 5), range(9, 10), range(12, 16)]
  spans, whole = Spans(ranges), [i for some in ranges for i in some]
  assert [*spans] == whole and len(spans) == 7
  for value in range(20):
    assert (value in spans) == (value in whole)
    if value in whole:
      assert spans.index(value) == whole.index(value)
  with pytest.raises(IndexError):
    spans[7]


def test_duplicates_that_are_left_out_are_not_in_a_bucket(tmp_path):
  tars(tmp_path)
  members = [('x.png', encoded(image(1))), ('x.txt', b'image 1')]
  write(tmp_path / '9.tar', members)
  words = f'--source webdataset --path {tmp_path} --size 64 --workers 1'
  words += f' --aspect buckets --remove_duplicates --out {tmp_path}/set'
  assert prepare.main(words.split()) == 0
  source = make_source(kind='arrayrecord', path=tmp_path / 'set', size=64)
  for shape, chosen in source.buckets.items():
    for i in chosen:
      assert source[i]['image'].shape == (*shape, 3)
  # The images 0 and 4 are noise, as all are: 1 is there twice.
  assert len(source) == 6 == sum(map(len, source.buckets.values()))
