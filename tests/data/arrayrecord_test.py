"""Prepared data: complete, never half-written."""

import itertools
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imagen_jax.cli import prepare as command_line
from imagen_jax.data import arrayrecord, encoding
from imagen_jax.data.arrayrecord import ArrayRecordSource
from imagen_jax.data.encoding import Encoding
from imagen_jax.data.folder import FolderSource
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError
from imagen_jax.io import decode
from tests import prepared
from tests.data.webdataset_test import encoded, pixels


def write(folder, out, **options):
  options = {'kind': 'folder', 'path': str(folder), 'part_size': 4} | options
  return prepared.prepare(out, **options)


def test_what_was_prepared_is_what_the_source_gave(images, tmp_path):
  report = write(images, tmp_path / 'out')
  assert (report['kept'], report['dropped']) == (10, {})
  header = json.loads((tmp_path / 'out' / 'dataset.json').read_text())
  assert [part['count'] for part in header['parts']] == [4, 4, 2]
  stored = make_source(kind='arrayrecord', path=tmp_path / 'out', size=16)
  source = FolderSource(images, 16)
  assert len(stored) == len(source)
  for mine, theirs in zip(stored, source):
    assert mine.keys() == {'image', 'caption'}
    assert mine['caption'] == theirs['caption']
    np.testing.assert_array_equal(mine['image'], theirs['image'])


def test_sets_prepared_side_by_side_are_one(images, tmp_path):
  write(images, tmp_path / 'set-0', number=4)
  write(images, tmp_path / 'set-1', size=16)
  pattern = str(tmp_path / 'set-*')
  both = make_source(kind='arrayrecord', path=pattern, size=16)
  alone = ArrayRecordSource(tmp_path / 'set-1', 16)
  assert [both[i]['caption'][8] for i in range(len(both))] == list(
    '01230123456789'
  )
  assert both.fingerprint != alone.fingerprint
  write(images, tmp_path / 'set-2', size=8)
  with pytest.raises(DataError, match='set-2'):
    ArrayRecordSource(pattern, 8)
  with pytest.raises(DataError, match='set-2'):
    ArrayRecordSource(pattern, 16)
  with pytest.raises(DataError, match='no-'):
    ArrayRecordSource(tmp_path / 'no-*', 16)


def test_a_smaller_size_is_the_box_mean(images, tmp_path):
  write(images, tmp_path / 'out')
  small = ArrayRecordSource(tmp_path / 'out', 4)[0]['image']
  large = ArrayRecordSource(tmp_path / 'out', 16)[0]['image']
  means = large.reshape(4, 4, 4, 4, 3).mean((1, 3))
  assert np.abs(small - means).max() <= 1
  with pytest.raises(DataError, match='--size 32'):
    ArrayRecordSource(tmp_path / 'out', 32)


@pytest.mark.parametrize('kind', ['raw', 'png', 'jpeg', 'webp'])
def test_encoded_images_come_back_as_good_as_their_quality(
  tmp_path, kind, capsys
):
  folder, out = tmp_path / 'images', tmp_path / 'out'
  folder.mkdir()
  y, x = np.mgrid[:64, :64]
  smooth = np.stack([2 * x, 3 * y, x + y], -1).astype(np.uint8)
  Image.fromarray(smooth).save(folder / '0.png')
  (folder / '0.txt').write_text('a gradient')
  command = ['--source', 'folder', '--path', str(folder), '--size', '64']
  command += ['--encode', kind, '--out', str(out)]
  assert command_line.main(command) == 0
  stored = ArrayRecordSource(out, 64)
  image = stored[0]['image']
  error = np.abs(image.astype(int) - smooth)
  assert error.max() == 0 if kind in ('raw', 'png') else error.mean() < 2
  assert (len(stored._records[0]) > 64 * 64 * 3) == (kind == 'raw')
  assert ArrayRecordSource(out, 32)[0]['image'].shape == (32, 32, 3)
  again = [*command, '--quality', '80']
  assert command_line.main(again) == 2
  named = 'quality' if kind in ('jpeg', 'webp') else '--quality'
  assert named in capsys.readouterr().err


def test_damage_is_noticed_by_part_and_by_record(images, tmp_path):
  out = tmp_path / 'out'
  write(images, out)
  part = out / 'part-00000.array_record'
  whole = part.read_bytes()
  part.write_bytes(whole[:-1])
  source = ArrayRecordSource(out, 16)
  with pytest.raises(DataError, match='part-00000.array_record'):
    source[0]
  part.unlink()
  with pytest.raises(DataError, match='part-00000.array_record'):
    ArrayRecordSource(out, 16)
  for place in range(0, 4):
    data = bytearray(whole)
    # Most of a record are its pixels, so this flips a bit of a pixel.
    start = data.find(f'caption {place}'.encode())
    data[(start if start > 0 else 400 + 900 * place) + 200] ^= 8
    part.write_bytes(data)
    source = ArrayRecordSource(out, 16, max_bad=1)
    expected = FolderSource(images, 16)
    found = [source[i]['caption'] for i in range(4)]
    assert source.replaced == 1
    lost = int(next(iter(source.bad)).split()[1])
    for i in range(4):
      assert found[i] == expected[i + (i == lost)]['caption']


def test_a_start_looks_at_no_part(images, tmp_path, monkeypatch):
  write(images, tmp_path / 'out', part_size=1)
  asked, stat = [], os.stat

  def counted(path, *args, **options):
    asked.append(str(path))
    return stat(path, *args, **options)

  monkeypatch.setattr(os, 'stat', counted)
  source = ArrayRecordSource(tmp_path / 'out', 16)
  assert len(source) == 10
  assert not [path for path in asked if 'part-' in path]
  assert source[3] and [path for path in asked if 'part-00003' in path]


def test_a_record_is_no_code(images, tmp_path):
  write(images, tmp_path / 'out')
  record = ArrayRecordSource(tmp_path / 'out', 16)._records[0]
  with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError)):
    pickle.loads(record)
  assert json.loads(record[4 : 4 + record[0]])['captions'] == ['caption 0 ü']


def test_other_folders_and_newer_formats_are_refused(images, tmp_path):
  with pytest.raises(DataError, match='dataset.json'):
    ArrayRecordSource(images, 16)
  out = tmp_path / 'out'
  write(images, out)
  text = (out / 'dataset.json').read_text()
  (out / 'dataset.json').write_text(
    text.replace('"format_version": 3', '"format_version": 9', 1)
  )
  with pytest.raises(DataError, match='dataset.json'):
    ArrayRecordSource(out, 16)


@pytest.mark.parametrize(
  'key, value',
  [
    ('size', '16'), ('count', None), ('parts', {}), ('parts', [3]),
    ('parts', [{}]), ('name', 3),
    ('bytes', '1'), ('count of a part', None), ('name', '../x'), ('name', '/x'),
    ('encode', 3), ('encode', 'jxl'), ('quality', 50),
  ],
)  # fmt: skip
def test_a_header_with_other_types_or_files_elsewhere_is_refused(
  images, tmp_path, key, value
):
  write(images, tmp_path / 'out')
  file = tmp_path / 'out' / 'dataset.json'
  header = json.loads(file.read_text())
  part = header['parts'][1]
  if isinstance(value, str) and 'x' in value:  # a good part, elsewhere
    elsewhere = tmp_path / 'x'
    (tmp_path / 'out' / part['name']).rename(elsewhere)
    value = '../x' if value == '../x' else str(elsewhere)
  of_part = key in ('name', 'bytes', 'count of a part')
  (part if of_part else header)[key.split()[0]] = value
  file.write_text(json.dumps(header))
  with pytest.raises(DataError, match='dataset.json'):
    ArrayRecordSource(tmp_path / 'out', 16)


GOOD = b'{"captions": ["a"], "shape": [16, 16], "image": 768}'


@pytest.mark.parametrize(
  'header, more',
  [
    (b'[' * 100_000, b''), (b'3', b''), (GOOD.replace(b'["a"]', b'[3]'), b''),
    (GOOD.replace(b'["a"]', b'[]'), b''), (GOOD.replace(b'768', b'"x"'), b''),
    (GOOD.replace(b'[16, 16]', b'[16]'), b''),
    (GOOD.replace(b'[16, 16]', b'[16, 15]'), b''),
    (GOOD, bytes(6)),  # more than the image
  ],
)  # fmt: skip
def test_a_malformed_record_is_replaced_by_its_neighbour(
  images, tmp_path, monkeypatch, header, more
):
  write(images, tmp_path / 'out')
  source = ArrayRecordSource(tmp_path / 'out', 16, max_bad=1)
  bad = len(header).to_bytes(4, 'little') + header + bytes(768) + more
  records = [bad, *(source._records[i] for i in range(1, 10))]
  monkeypatch.setattr(source, '_records', records)
  assert source[0]['caption'] == source[1]['caption']
  assert source.bad.keys() == {'record 0'}


def test_a_smaller_size_keeps_the_aspect_ratio(images, tmp_path):
  write(images, tmp_path / 'out')
  record = arrayrecord.pack(
    {'image': np.full((8, 24, 3), 7, np.uint8), 'caption': 'wide'}
  )
  source = ArrayRecordSource(tmp_path / 'out', 8)
  source._records = [record]
  assert source.example(0)['image'].shape == (4, 12, 3)


def test_an_image_is_encoded_the_same_from_pillow_and_from_numpy():
  text = PngImagePlugin.PngInfo()
  text.add_text('comment', 'secret')
  for side, kind in itertools.product((16, 24, 32), encoding.KINDS):
    data = encoded(pixels(side, side, side), icc_profile=b'x', pnginfo=text)
    how = Encoding(kind, encoding.QUALITY.get(kind))
    stored = how.encode(decode.fitted(data, 16), data)
    assert stored == how.encode(decode.decode(data, 16))
    assert b'secret' not in stored


@pytest.mark.parametrize(
  'options, kept',
  [
    ({}, True), ({'quality': 70}, True), ({'subsampling': 2}, True),
    ({'quality': 96}, False), ({'progressive': True}, False),
    ({'comment': b'of mine'}, False), ({'icc_profile': b'x'}, False),
    ({'exif': b'Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0'}, False),
    ({'height': 24}, False), ({'grey': True}, False), ({'kind': 'PNG'}, False),
  ],
)  # fmt: skip
def test_a_jpeg_that_need_not_change_keeps_its_bytes(options, kept):
  options = {'kind': 'JPEG', 'quality': 95} | options
  image = pixels(0, options.pop('height', 16), 16)
  if options.pop('grey', False):
    image = image[..., 0]
  data = encoded(image, **options)
  stored = Encoding('jpeg', 95).encode(decode.fitted(data, 16), data)
  assert (stored == data) == kept
  assert Encoding('webp', 95).encode(decode.fitted(data, 16), data) != data
  example = {'image': decode.fitted(data, 16), 'caption': 'a', 'file': data}
  header, found = arrayrecord.unpack(
    arrayrecord.pack(example, Encoding('jpeg', 95))
  )
  assert (header['shape'], bytes(found)) == ([16, 16], stored)


def test_jpegs_of_the_prepared_size_are_stored_as_they_are(tmp_path):
  folder, data = tmp_path / 'images', encoded(pixels(), 'JPEG', quality=90)
  folder.mkdir()
  (folder / '0.jpg').write_bytes(data)
  (folder / '0.txt').write_text('a')
  write(folder, tmp_path / 'out', encoding=Encoding('jpeg', 95))
  stored = make_source(kind='arrayrecord', path=tmp_path / 'out', size=16)
  assert arrayrecord.unpack(stored._records[0])[1] == data
  np.testing.assert_array_equal(
    stored[0]['image'], FolderSource(folder, 16)[0]['image']
  )
