"""Tars and prepared data in a bucket, read by ranges."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import index as index_command
from imagen_jax.cli import prepare as prepare_command
from imagen_jax.data import embed, tar_update
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket as buckets
from tests import prepared
from tests.data.webdataset_test import good, write


def upload(folder, bucket, name):
  url = f'{bucket.url}/{name}'
  buckets.filesystem(url).put(str(folder), url, recursive=True)
  return url


def same(one, other):
  assert len(one) == len(other)
  for mine, theirs in zip(one, other):
    assert mine['caption'] == theirs['caption']
    np.testing.assert_array_equal(mine['image'], theirs['image'])


def test_tars_of_a_bucket_are_those_of_a_disk(tmp_path, bucket, monkeypatch):
  shards = tmp_path / 'shards'
  for i, folder in enumerate(('', 'x', 'x/y')):
    (shards / folder).mkdir(parents=True, exist_ok=True)
    write(shards / folder / f'{i}.tar', good(3 + i))
  url = upload(shards, bucket, 'tars')
  local = make_source(kind='webdataset', path=shards, size=16)
  same(make_source(kind='webdataset', path=url, size=16), local)
  assert (bucket.folder / 'tars' / 'tars.index').exists()  # beside them
  monkeypatch.setattr(tar_update, 'scan', None)
  source = make_source(kind='webdataset', path=url, size=16)
  assert source.fingerprint == local.fingerprint
  assert source.name(7) == local.name(7)
  monkeypatch.undo()
  for pattern, number in ('x/*.tar', 4), ('{0..2}.tar', 3), ('x/y/2.tar', 5):
    one = make_source(kind='webdataset', path=f'{url}/{pattern}', size=16)
    assert len(one) == number


def test_an_index_of_a_bucket_is_made_by_its_command(tmp_path, bucket):
  shards = tmp_path / 'shards'
  shards.mkdir()
  write(shards / 'a.tar', good(3))
  url = upload(shards, bucket, 'indexed')
  out = f'{bucket.url}/elsewhere/mine.index'
  command = ['--path', f'{url}/*.tar', '--workers', '1', '--out', out]
  assert index_command.main(command) == 0
  source = make_source(
    kind='webdataset', path=f'{url}/*.tar', size=16, index=out
  )
  assert len(source) == 3
  assert not (bucket.folder / 'indexed' / 'tars.index').exists()


def test_an_object_that_changes_is_noticed(tmp_path, bucket):
  shards = tmp_path / 'shards'
  shards.mkdir()
  write(shards / 'a.tar', good(3))
  url = upload(shards, bucket, 'changing')
  source = make_source(kind='webdataset', path=url, size=16, max_bad=0.9)
  write(shards / 'a.tar', good(4)[2:])
  upload(shards / 'a.tar', bucket, 'changing/a.tar')
  with pytest.raises(DataError):
    list(source)
  again = make_source(kind='webdataset', path=url, size=16)
  same(again, make_source(kind='webdataset', path=shards, size=16))


def test_prepared_data_of_a_bucket_are_those_of_a_disk(tmp_path, bucket):
  images, out = tmp_path / 'images', tmp_path / 'out'
  images.mkdir()
  for i in range(6):
    Image.new('RGB', (16, 16), (40 * i, 0, 0)).save(images / f'{i}.png')
    (images / f'{i}.txt').write_text(f'number {i}')
  command = f'--source folder --path {images} --size 16 --out {out}'.split()
  assert prepare_command.main([*command, '--part_size', '4']) == 0
  url = upload(out, bucket, 'prepared')
  local = make_source(kind='arrayrecord', path=out, size=16)
  source = make_source(kind='arrayrecord', path=url, size=16)
  same(source, local)
  assert source.fingerprint == local.fingerprint
  upload(out, bucket, 'prepared-2')
  both = f'{bucket.url}/prepared*'
  assert len(make_source(kind='arrayrecord', path=both, size=16)) == 12
  (bucket.folder / 'prepared' / 'part-00001.array_record').unlink()
  with pytest.raises(DataError, match='part-00001'):
    make_source(kind='arrayrecord', path=url, size=16)


def test_what_is_missing_or_read_from_no_bucket_is_said(bucket):
  for kind in 'webdataset', 'arrayrecord':
    for path in f'{bucket.url}/nowhere', 'gs://no-such-bucket/x':
      with pytest.raises(DataError, match=path.rpartition('/')[2]):
        make_source(kind=kind, path=path, size=16)
  with pytest.raises(UsageError) as error:
    make_source(kind='folder', path=bucket.url, size=16)
  assert error.value.key == 'config.data.path'


def test_embeddings_are_made_and_read_in_a_bucket(tmp_path, bucket):
  for i in range(6):
    Image.new('RGB', (16, 16), (i, 0, 0)).save(tmp_path / f'{i}.png')
    (tmp_path / f'{i}.txt').write_text(f'caption {i}')
  words = f'--source folder --path {tmp_path} --size 16 --part_size 4'.split()
  assert prepare_command.main([*words, '--out', str(tmp_path / 'set')]) == 0
  url = upload(tmp_path / 'set', bucket, 'embedded')
  fake = prepared.encoder()
  for shard in (0, 1):
    header = embed.embed(url, f'{url}/text/fake', fake, shard=(shard, 2))
  assert header['captions'] == 6
  assert embed.embed(url, f'{url}/text/fake', fake) == header  # all are there
  source = make_source(kind='arrayrecord', path=url, size=16, text='auto')
  assert [int(example['text'][0, 0]) for example in source] == [*range(6)]
