"""WebDataset tars from untrusted sources, with the defects of real ones."""

import errno
import gc
import gzip
import io
import json
import logging
import os
import pickle
import tarfile
import tempfile

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import index as command_line
from imagen_jax.data import checked, tar_index, tar_scan, tar_update
from imagen_jax.data.checked import write_skipped
from imagen_jax.data.sources import make_source
from imagen_jax.data.webdataset import WebDatasetSource, find_tars
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import ranges


def pixels(seed=0, height=16, width=16):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, kind='PNG', **options):
  out = io.BytesIO()
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  image.save(out, kind, **options)
  return out.getvalue()


def write(path, members, **kinds):
  """A tar of [(name, bytes)]; `kinds` gives names another member type."""
  with tarfile.open(path, 'w') as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      if name in kinds:
        info.type, info.linkname, info.size = kinds[name], '/etc/passwd', 0
      tar.addfile(info, io.BytesIO(data))
  return path


def sample(key, seed=0, caption=b'an image'):
  return [(f'{key}.png', encoded(pixels(seed))), (f'{key}.txt', caption)]


def good(number):
  return [m for i in range(number) for m in sample(f'{i:05d}', i)]


def test_samples_are_in_the_order_of_the_names_of_their_tars(tmp_path):
  write(tmp_path / 'b.tar', sample('x/1', 3, b'three'))
  write(tmp_path / 'a.tar', sample('0', 1, b'one ') + sample('1.a', 2, b'two'))
  source = WebDatasetSource(tmp_path, 16)
  assert [e['caption'] for e in source] == ['one', 'two', 'three']
  np.testing.assert_array_equal(source[0]['image'], pixels(1))
  np.testing.assert_array_equal(source[2]['image'], pixels(3))
  assert source.name(2) == 'b.tar/x/1.png'


def test_every_pair_is_used_whatever_dots_its_name_has(tmp_path):
  keys = ['a', 'a.v2', '1.5', '1.6', 'x.y/z.0.1', 'B.C']
  captions = [f'of {key}' for key in keys]
  members = []
  for i, key in enumerate(keys):
    image, text = sample(key, i, captions[i].encode())
    members += [(image[0].replace('C.png', 'C.PNG'), image[1]), text]
  source = WebDatasetSource(write(tmp_path / 'a.tar', members), 16)
  assert [e['caption'] for e in source] == captions
  assert source.skipped == ()


def test_other_columns_of_a_sample_are_no_samples(tmp_path):
  image = encoded(pixels())
  members = sample('1') + sample('2.0') + [
    ('1.seg.png', image), ('1.cls.txt', b'3'), ('1.npy', b''),
    ('2.0.seg.png', image), ('2.0.seg.json', b'{"text": "a pair"}'),
    ('3.seg.png', image), ('4.cls.txt', b'3'),
  ]  # fmt: skip
  source = WebDatasetSource(write(tmp_path / 'a.tar', members), 16, max_bad=1)
  assert [e['caption'] for e in source] == ['an image', 'an image', 'a pair']
  assert {name for name, _ in source.skipped} == {'a.tar/3.seg', 'a.tar/4.cls'}


def test_hidden_files_of_a_tar_belong_to_other_programs(tmp_path):
  names = ('./1', '._1', 'x/._1', '.trash/1', 'x/.ipynb_checkpoints/1')
  members = [m for name in names for m in sample(name)]
  source = WebDatasetSource(write(tmp_path / 'a.tar', members), 16)
  assert [source.name(i) for i in range(len(source))] == ['a.tar/./1.png']
  assert source.skipped == ()


def test_bad_samples_of_tars_and_keys_of_the_same_name_all_count(tmp_path):
  for folder in ('x', 'y/z'):
    (tmp_path / folder).mkdir(parents=True)
    members = sample('1') + sample('1') + sample('1') + [('2.txt', b'a')]
    write(tmp_path / folder / '0.tar', members)
  source = WebDatasetSource(tmp_path, 16, max_bad=1)
  assert len(source) == 2 and len(source.bad) == 6
  assert {'x/0.tar/2', 'y/z/0.tar/2'} < source.bad.keys()
  assert source.name(1) == 'y/z/0.tar/1.png'
  with pytest.raises(DataError, match='75'):  # per cent
    WebDatasetSource(tmp_path, 16, max_bad=0.74)


def test_captions_are_also_found_in_the_json(tmp_path):
  image = encoded(pixels())
  members = [('1.jpg', image), ('1.json', b'{"caption": "from json"}')]
  members += [('2.JPG', image), ('2.json', b'{"text": "\\u00fc"}')]
  members += [('3.webp', image), ('3.json', b'{"text": "b"}'), ('3.txt', b'a')]
  source = WebDatasetSource(write(tmp_path / 'a.tar', members), 16)
  assert [e['caption'] for e in source] == ['from json', 'ü', 'a']


@pytest.mark.parametrize(
  'pattern', ['', 'a-0.tar', '*.tar', 'a-{0..1}.tar', 'a-?.tar']
)
def test_a_path_a_pattern_and_a_folder_give_their_tars(tmp_path, pattern):
  write(tmp_path / 'a-0.tar', sample('1'))
  write(tmp_path / 'a-1.tar', sample('1'))
  source = WebDatasetSource(f'{tmp_path}/{pattern}', 16)
  assert len(source) == (1 if pattern == 'a-0.tar' else 2)


def test_tars_are_found_in_folders_of_any_depth(tmp_path):
  for folder in ('', 'a', 'a/b/c'):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write(tmp_path / folder / 'x.tar', sample('1'))
  assert len(WebDatasetSource(tmp_path, 16)) == 3


def test_a_broken_sample_of_any_kind_is_left_out_and_named_once(
  tmp_path, caplog
):
  image = encoded(pixels())
  members = good(300) + [
    ('empty.png', b''),
    ('empty.txt', b'a'),
    ('html.jpg', b'<!DOCTYPE html>'),
    ('html.txt', b'a'),
    ('line.png', encoded(pixels(0, 1, 500))),
    ('line.txt', b'a'),
    ('mute.png', image),
    ('blank.png', image),
    ('blank.txt', b' \n'),
    ('long.png', image),
    ('long.txt', b'word ' * 20_000),
    ('latin.png', image),
    ('latin.txt', b'caf\xe9'),
    ('nul.png', image),
    ('nul.txt', b'a\0b'),
    ('broken.png', image),
    ('broken.json', b'{"caption":'),
    ('half.png', image),
    ('half.json', b'{"caption": "\\ud800"}'),
    ('number.png', image),
    ('number.json', b'{"caption": 3}'),
    ('text.txt', b'no image'),
    ('00007.png', image),
    ('../up.png', image),
    ('../up.txt', b'a'),
    ('/root.png', image),
    ('link.png', b''),
    ('link.txt', b'a'),
    ('device.png', b''),
    ('evil.pkl', pickle.dumps(print)),
  ]
  kinds = {'link.png': tarfile.SYMTYPE, 'device.png': tarfile.CHRTYPE}
  write(tmp_path / 'a.tar', members, **kinds)
  with caplog.at_level(logging.WARNING):
    source = WebDatasetSource(tmp_path, 16, max_bad=0.1)
    again = WebDatasetSource(tmp_path, 16, max_bad=0.1)
  assert len(source) == len(again) == 300
  assert source.skipped == again.skipped
  assert len(caplog.messages) == 1
  reasons = {k.removeprefix('a.tar/'): v for k, v in source.skipped}
  assert reasons.keys() == {
    'empty', 'html', 'line', 'mute', 'blank', 'long', 'latin', 'nul',
    'broken', 'half', 'number', 'text', '00007 (repeated)', '../up', 'root',
    'link', 'device',
  }  # fmt: skip
  for one, other in ('latin', 'half'), ('../up', 'root'), ('link', 'device'):
    assert reasons[one] == reasons.pop(other)
  assert len(set(reasons.values())) == len(reasons) == 14
  write_skipped(tmp_path / 'new' / 'bad.jsonl', source.skipped)
  lines = (tmp_path / 'new' / 'bad.jsonl').read_text().splitlines()
  assert len(lines) == 17
  assert set(json.loads(lines[0])) == {'name', 'reason'}
  with pytest.raises(DataError):
    WebDatasetSource(tmp_path, 16)


def test_odd_but_whole_images_are_read(tmp_path):
  rgb = Image.fromarray(pixels())
  grey16 = Image.fromarray(np.full((16, 16), 25700, np.uint16))
  kinds = {
    'cmyk.jpg': encoded(rgb.convert('CMYK'), 'JPEG'),
    'grey16.png': encoded(grey16),
    'palette.png': encoded(rgb.convert('P')),
    'moving.gif': encoded(
      rgb, 'GIF', save_all=True, append_images=[Image.new('RGB', (16, 16))]
    ),
  }
  members = []
  for name, data in kinds.items():
    members += [(name, data), (f'{name.split(".")[0]}.txt', name.encode())]
  source = WebDatasetSource(write(tmp_path / 'a.tar', members), 16)
  found = {e['caption']: e['image'] for e in source}
  assert found.keys() == kinds.keys()
  assert (found['grey16.png'] == 100).all()
  assert np.abs(found['moving.gif'].astype(int) - pixels()).mean() < 40


def test_an_oversized_member_is_refused_unread(tmp_path, monkeypatch):
  monkeypatch.setattr(tar_scan, 'MAX_MEMBER', 10_000)
  members = good(1) + [('big.png', bytes(10_001)), ('big.txt', b'a')]
  source = WebDatasetSource(write(tmp_path / 'a.tar', members), 16, max_bad=1)
  assert [name for name, _ in source.skipped] == ['a.tar/big']


def test_a_tar_cut_short_gives_what_is_whole(tmp_path):
  tar = write(tmp_path / 'a.tar', good(10))
  with tarfile.open(tar) as whole:
    places = {m.name: m.offset_data for m in whole}
  data = tar.read_bytes()
  tar.write_bytes(data[: places['00005.png'] + 100])
  source = WebDatasetSource(tar, 16, max_bad=1)
  assert len(source) == 5
  assert [name for name, _ in source.skipped] == ['a.tar/00005']


def test_a_broken_header_in_a_tar_is_not_taken_for_its_end(tmp_path):
  tar = write(tmp_path / 'a.tar', good(10))
  with tarfile.open(tar) as whole:
    start = {m.name: m.offset for m in whole}['00005.png']
  data = bytearray(tar.read_bytes())
  data[start : start + 512] = b'x' * 512
  tar.write_bytes(data)
  source = WebDatasetSource(tar, 16, max_bad=1)
  assert len(source) == 5
  assert [name for name, _ in source.skipped] == ['a.tar/after 00004']


@pytest.mark.parametrize(
  'data', [b'', b'<html>' * 500, b'\x1f\x8b' + b'x' * 999]
)
def test_a_file_that_is_not_a_tar_is_named(tmp_path, data):
  (tmp_path / 'a.tar').write_bytes(data)
  with pytest.raises(DataError, match='a.tar'):
    WebDatasetSource(tmp_path, 16)


def test_missing_tars_and_shell_commands_are_refused(tmp_path):
  with pytest.raises(DataError):
    WebDatasetSource(tmp_path / '*.tar', 16)
  with pytest.raises(DataError):
    WebDatasetSource('pipe:touch /tmp/no', 16)


def test_a_set_without_captions_is_refused(tmp_path):
  tar = write(tmp_path / 'a.tar', [('1.png', encoded(pixels()))])
  with pytest.raises(DataError, match='a.tar/1'):
    WebDatasetSource(tar, 16)


def test_the_index_lies_beside_the_tars_and_follows_their_changes(
  tmp_path, monkeypatch
):
  tar = write(tmp_path / 'a.tar', good(3))
  assert len(WebDatasetSource(tar, 16)) == 3
  assert {f.name for f in tmp_path.iterdir()} == {'a.tar', 'tars.index'}
  with monkeypatch.context() as m:
    m.setattr(tar_update, 'scan', None)  # raises if called
    assert len(WebDatasetSource(tar, 16)) == 3
  write(tar, good(4))
  write(tmp_path / 'b.tar', good(2))
  scanned, scan = [], tar_update.scan
  monkeypatch.setattr(
    tar_update, 'scan', lambda p, n, t: scanned.append(n) or scan(p, n, t)
  )
  assert len(WebDatasetSource(tar, 16)) == 4
  assert len(WebDatasetSource(tmp_path, 16)) == 6
  assert len(WebDatasetSource(tmp_path / 'b.tar', 16)) == 2
  assert scanned == ['a.tar', 'b.tar']


def test_the_cache_has_the_index_of_tars_beside_which_it_cannot_be(
  tmp_path, own_cache, monkeypatch
):
  tar = write(tmp_path / 'a.tar', good(3))
  (tmp_path / 'tars.index').mkdir()  # in the way
  (tmp_path / 'tars.index' / 'x').touch()
  for _ in range(2):
    assert len(WebDatasetSource(tar, 16)) == 3
    monkeypatch.setattr(tar_update, 'scan', None)
  assert len(list((own_cache / 'imagen_jax' / 'index').iterdir())) == 1


@pytest.mark.parametrize('damage', ['cut', 'replaced', 'empty'])
def test_a_damaged_index_is_made_again(tmp_path, damage):
  tar = write(tmp_path / 'a.tar', good(3))
  before = [e['caption'] for e in WebDatasetSource(tar, 16)]
  index = tmp_path / 'tars.index'
  data = index.read_bytes()
  index.write_bytes(
    {'cut': data[:-1], 'replaced': b'{}' * 99, 'empty': b''}[damage]
  )
  assert [e['caption'] for e in WebDatasetSource(tar, 16)] == before
  assert index.read_bytes() == data


def test_imagen_index_is_shared_out_and_merged(tmp_path, capsys, monkeypatch):
  shards = tmp_path / 'shards'
  (shards / 'x').mkdir(parents=True)
  for i in range(5):
    name = f'{i}.tar' if i % 2 else f'x/{i}.tar'
    write(shards / name, good(i + 1) + [(f'only-{i}.txt', b'a')])
  alone = WebDatasetSource(shards, 16, max_bad=1)
  command = ['--path', str(shards), '--workers', '1']
  parts = [str(tmp_path / f'{i}.index') for i in range(3)]
  for i, part in enumerate(parts):
    assert command_line.main([*command, '--part', f'{i}/3', '--out', part]) == 0
  capsys.readouterr()
  whole = str(tmp_path / 'whole.index')
  assert command_line.main([*command, '--merge', *parts, '--out', whole]) == 0
  assert '15 samples in 5 tars; 5 are left out' in capsys.readouterr().out
  monkeypatch.setattr(tar_update, 'scan', None)
  merged = WebDatasetSource(shards, 16, max_bad=1, index=whole)
  assert merged.fingerprint == alone.fingerprint
  for i in range(15):
    assert merged.name(i) == alone.name(i)
    assert merged[i]['caption'] == alone[i]['caption']
  assert merged.skipped == alone.skipped
  assert command_line.main([*command, '--merge', *parts[:2]]) == 3
  assert command_line.main([*command, '--part', '3/3', '--out', whole]) == 2
  assert command_line.main([*command, '--part', '0/3']) == 2


@pytest.mark.parametrize('out', ['shards/a.tar', 'folder', 'notes.txt/x'])
def test_an_index_is_written_over_nothing_else(tmp_path, monkeypatch, out):
  monkeypatch.chdir(tmp_path)
  for folder in 'shards', 'folder':
    (tmp_path / folder).mkdir()
  (tmp_path / 'notes.txt').write_text('mine')
  tar = write(tmp_path / 'shards/a.tar', good(3))
  data = tar.read_bytes()
  monkeypatch.setattr(tar_scan, 'scan', None)  # found before all the work
  monkeypatch.setattr(tar_update, 'scan', None)
  assert command_line.main(['--path', 'shards', '--out', out]) == 2
  with pytest.raises(UsageError) as caught:
    WebDatasetSource('shards', 16, index=out)
  assert caught.value.key == 'config.data.index'
  assert tar.read_bytes() == data


def test_an_index_of_imagen_index_is_never_silently_made_again(tmp_path):
  tar = write(tmp_path / 'a.tar', good(3))
  assert command_line.main(['--path', str(tmp_path), '--workers', '1']) == 0
  os.utime(tar, (1, 1))  # as a copy has it
  assert len(WebDatasetSource(tmp_path, 16)) == 3
  write(tmp_path / 'b.tar', good(1))
  for index in None, str(tmp_path / 'tars.index'):
    with pytest.raises(DataError, match='imagen-index'):
      WebDatasetSource(tmp_path, 16, index=index)


def test_images_are_decoded_when_they_are_used(tmp_path):
  members = good(3)
  jpeg = encoded(pixels(0, 64, 64), 'JPEG')
  members[2] = '00001.jpg', jpeg[: len(jpeg) // 2]
  write(tmp_path / 'a.tar', members)
  source = WebDatasetSource(tmp_path, 16, max_bad=0.5)
  assert len(source) == 3 and not source.bad
  np.testing.assert_array_equal(source[1]['image'], pixels(2))
  assert list(source.bad) == ['a.tar/00001.jpg']


def test_small_images_are_left_out_and_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(tar_index.Selected, 'EXAMPLES', 2)
  members = []
  for i in range(10):
    side = 16 if i % 2 else 12
    members += [(f'{i}.png', encoded(pixels(i, side, 20))), (f'{i}.txt', b'a')]
  write(tmp_path / 'a.tar', members)
  source = WebDatasetSource(tmp_path, 16)
  names = [source.name(i) for i in range(len(source))]
  assert names == [f'a.tar/{i}.png' for i in (1, 3, 5, 7, 9)]
  assert [name for name, _ in source.skipped] == ['a.tar/0.png', 'a.tar/2.png']
  assert source.unlisted == {'it is smaller than 16 pixels': 3}
  other = WebDatasetSource(tmp_path, 12)
  assert len(other) == 10 and other.fingerprint != source.fingerprint


@pytest.mark.parametrize('block, chunk', [(8, 16), (64, 128)])
def test_the_selection_is_that_of_a_list(tmp_path, monkeypatch, block, chunk):
  monkeypatch.setattr(tar_index.Selected, 'BLOCK', block)
  monkeypatch.setattr(tar_index.Selected, 'CHUNK', chunk)
  rng = np.random.default_rng(0)
  codes = rng.integers(-2, 3, 150).astype(np.int8)
  selected = tar_index.Selected(150, lambda start, stop: codes[start:stop], 3)
  expected = [
    row for shape in range(3) for row in np.flatnonzero(codes == shape)
  ]
  assert [selected[i] for i in range(len(selected))] == expected
  assert selected.counts == [(codes == shape).sum() for shape in range(3)]
  for code in -1, -2:
    rows = np.flatnonzero(codes == code).tolist()
    assert selected.left[code] == len(rows) and selected.examples[code] == rows
  with pytest.raises(IndexError):
    selected[len(selected)]


def test_a_disk_that_fails_while_indexing_leaves_no_index(
  tmp_path, monkeypatch
):
  tar = write(tmp_path / 'a.tar', good(3))
  monkeypatch.setattr(checked, 'PAUSES', (0,))
  failed = []

  def broken(path, start, size):
    failed.append(start)
    raise OSError(errno.EIO, 'Input/output error')

  with monkeypatch.context() as m:
    m.setattr(ranges, 'read', broken)
    with pytest.raises(DataError, match='00000'):
      WebDatasetSource(tar, 16)
  assert len(failed) == 6  # each of three samples, twice
  assert list(tmp_path.iterdir()) == [tar]
  source = WebDatasetSource(tar, 16)
  assert len(source) == 3 and not source.bad


def test_a_flipped_bit_after_indexing_is_noticed(tmp_path):
  tar = write(tmp_path / 'a.tar', good(3))
  source = WebDatasetSource(tar, 16, max_bad=0.5)
  data = bytearray(tar.read_bytes())
  data[int(source._index.rows[1]['image']) + 200] ^= 1
  tar.write_bytes(data)
  np.testing.assert_array_equal(source[1]['image'], pixels(2))
  assert source.bad == {
    'a.tar/00001.png': 'it has changed since it was indexed'
  }


def test_different_sets_have_different_fingerprints(tmp_path):
  one = WebDatasetSource(write(tmp_path / 'a.tar', good(3)), 16)
  same = WebDatasetSource(write(tmp_path / 'b.tar', good(3)), 16)
  other = WebDatasetSource(write(tmp_path / 'c.tar', good(4)[2:]), 16)
  assert one.fingerprint == same.fingerprint != other.fingerprint


def test_tars_as_img2dataset_writes_them_are_read(tmp_path):
  for shard in range(2):
    members = []
    for i in range(3):
      key = f'{shard:05d}{i:04d}'
      record = {'caption': f'image {key}', 'width': 40, 'url': 'https://…'}
      members += [
        (f'{key}.jpg', encoded(pixels(i, 30, 40), 'JPEG', quality=95)),
        (f'{key}.json', json.dumps(record).encode()),
        (f'{key}.txt', record['caption'].encode()),
      ]
    write(tmp_path / f'{shard:05d}.tar', members)
  path = str(tmp_path / '{00000..00001}.tar')
  source = make_source(kind='webdataset', path=path, size=16)
  assert source.skipped == ()
  names = [f'image {s:05d}{i:04d}' for s in range(2) for i in range(3)]
  assert [example['caption'] for example in source] == names
  assert source[5]['image'].shape == (16, 16, 3)


# Compressed tars, tables beside tars, several captions.


def test_a_compressed_tar_is_that_tar(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
  (tmp_path / 'tmp').mkdir()
  plain, packed = tmp_path / 'a', tmp_path / 'b'
  for folder in plain, packed:
    folder.mkdir()
    write(folder / '0.tar', good(3))
    write(folder / '1.tar', good(5))
  for name in '0.tar.gz', '1.tgz':
    data = (packed / f'{name[0]}.tar').read_bytes()
    (packed / name).write_bytes(gzip.compress(data))
    (packed / f'{name[0]}.tar').unlink()
  one, other = (WebDatasetSource(folder, 16) for folder in (plain, packed))
  assert one.fingerprint == other.fingerprint and len(one) == 8
  for mine, theirs in zip(other, one):
    assert mine['caption'] == theirs['caption']
    np.testing.assert_array_equal(mine['image'], theirs['image'])
  assert len(WebDatasetSource(f'{packed}/{{0..0}}.tar.gz', 16)) == 3
  with monkeypatch.context() as m:
    m.setattr(tar_update, 'scan', None)
    again = pickle.loads(pickle.dumps(WebDatasetSource(packed, 16)))
  assert again[7]['caption'] == one[7]['caption']
  del other, again
  gc.collect()
  assert not list((tmp_path / 'tmp').iterdir())


def test_a_compressed_tar_cut_short_gives_what_is_whole(tmp_path):
  data = gzip.compress(write(tmp_path / 'a.tar', good(300)).read_bytes(), 0)
  packed = tmp_path / 'b.tar.gz'
  packed.write_bytes(data[: len(data) // 2])
  source = WebDatasetSource(packed, 16, max_bad=1)
  assert 50 < len(source) <= 150 and 'b.tar.gz/the rest' in source.bad
  for broken in b'<html>' * 500, data[:20] + b'x' * 5000:
    packed.write_bytes(broken)
    with pytest.raises(DataError, match='b.tar.gz'):
      WebDatasetSource(packed, 16)


def write_table(tar, rows):
  """The parquet beside a tar, of rows {column: value}."""
  parquet = pytest.importorskip('pyarrow.parquet')
  import pyarrow

  file = tar.with_suffix('.parquet')
  parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file


def as_img2dataset(tmp_path, number=6):
  """A tar in another order than its table, which has a failed download."""
  tar = write(tmp_path / '00000.tar', good(number))
  rows = [
    {
      'key': f'{i:05d}', 'caption': f'image {i}', 'status': 'success',
      'similarity': i / 10, 'NSFW': 'NSFW' if i == 4 else 'UNLIKELY',
      'blip': [f'a {i}', f'the {i}'],
    }
    for i in reversed(range(number))
  ]  # fmt: skip
  rows[0] |= {'similarity': None}
  failed = rows[0] | {'key': '99999', 'status': 'failed_to_download'}
  return tar, [*rows, failed]


def test_conditions_on_the_table_beside_a_tar(tmp_path):
  tar, rows = as_img2dataset(tmp_path)
  write_table(tar, rows)
  where = ('similarity>=0.2', 'NSFW!=NSFW')
  source = WebDatasetSource(tar, 16, where=where, max_bad=0)
  names = [source.name(i)[-9:-4] for i in range(len(source))]
  assert names == ['00002', '00003']
  assert len(source.skipped) == 4 and not any(source.unlisted.values())
  assert {reason for _, reason in source.skipped} == {
    f'data.where has {text}' for text in where
  }
  whole = WebDatasetSource(tar, 16)
  assert len({source.fingerprint, whole.fingerprint}) == 2
  with pytest.raises(DataError, match='similarity>9'):
    WebDatasetSource(tar, 16, where=('similarity>9',))


def test_captions_out_of_the_table_beside_a_tar(tmp_path):
  tar, rows = as_img2dataset(tmp_path)
  rows[1]['blip'] = [None, ' ']
  write_table(tar, rows)
  source = WebDatasetSource(tar, 16, captions=('blip', 'caption'))
  assert source[0]['captions'] == ('a 0', 'the 0', 'image 0')
  assert source[4]['caption'] == 'image 4' and 'captions' not in source[4]
  source = WebDatasetSource(tar, 16, captions='blip', max_bad=0.2)
  assert len(source) == 5 and list(source.bad) == ['00000.tar/00004.png']
  some = ('caption_words>=3',)  # only of the table's captions
  with pytest.raises(DataError, match='caption_words'):
    WebDatasetSource(tar, 16, captions='blip', where=some, max_bad=1)
  assert len(WebDatasetSource(tar, 16, where=('caption_words>=2',))) == 6


def test_a_table_is_joined_whatever_tar_puts_before_the_names(tmp_path):
  tar, rows = as_img2dataset(tmp_path)
  write(tar, [(f'./{name}', data) for name, data in good(6)])
  write_table(tar, rows)
  source = WebDatasetSource(tar, 16, captions='caption', max_bad=0)
  assert [source.caption(i) for i in (0, 5)] == ['image 0', 'image 5']


def test_a_table_that_does_not_fit_its_tar_is_refused(tmp_path):
  tar, rows = as_img2dataset(tmp_path)
  where = ('similarity>=0.2',)
  with pytest.raises(DataError, match='00000.parquet'):
    WebDatasetSource(tar, 16, where=where)
  write_table(tar, rows[:4])
  with pytest.raises(DataError, match='00001'):  # has no row
    WebDatasetSource(tar, 16, where=where)
  source = WebDatasetSource(tar, 16, where=where, max_bad=0.5)
  assert {name[-9:-4] for name in source.bad} == {'00000', '00001'}
  write_table(tar, [row | {'key': 'x' + row['key']} for row in rows])
  with pytest.raises(DataError, match='00000.parquet'):
    WebDatasetSource(tar, 16, where=where, max_bad=1)
  write_table(tar, [{'id': 3, 'similarity': 0.5}])
  with pytest.raises(DataError, match='key'):
    WebDatasetSource(tar, 16, where=where, max_bad=1)
  write_table(tar, rows)
  for option, value in ('where', ('nsfw<1',)), ('captions', ('alt',)):
    with pytest.raises(UsageError) as error:
      WebDatasetSource(tar, 16, **{option: value})
    assert error.value.key == f'config.data.{option}'


def test_a_list_of_captions_in_the_json_is_several(tmp_path):
  image, said = encoded(pixels()), b'{"caption": ["one", "two ", "one"]}'
  tar = write(tmp_path / 'a.tar', [('1.png', image), ('1.json', said)])
  assert WebDatasetSource(tar, 16)[0]['captions'] == ('one', 'two')


def test_tars_that_are_named_and_not_there_are_said(tmp_path, caplog):
  for i in (0, 2, 3):
    write(tmp_path / f'{i}.tar', sample('a', i))
  assert len(find_tars(f'{tmp_path}/{{0..3}}.tar')) == 3
  assert '1.tar' in caplog.text and '2.tar' not in caplog.text
  caplog.clear()
  assert len(find_tars(f'{tmp_path}/*.tar')) == 3
  assert len(find_tars(tmp_path)) == 3
  assert not caplog.text
