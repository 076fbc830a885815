"""Preparing a set: shard by shard, by anybody, in any order, once."""

import base64
import errno
import gzip
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import prepare as command_line
from imagen_jax.data import arrayrecord, shards
from imagen_jax.data import prepare as preparation
from imagen_jax.data.arrayrecord import ArrayRecordSource
from imagen_jax.data.folder import FolderSource
from imagen_jax.data.merge import merge
from imagen_jax.data.prepare import attempt, prepare_shard
from imagen_jax.data.records import Part
from imagen_jax.data.webdataset import WebDatasetSource
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket as buckets
from tests.data.webdataset_test import (
  encoded,
  pixels,
  sample,
  write,
  write_table,
)
from tests.prepared import begun, prepare

SAYS = ('report.html', 'report.json')  # with measured times


@pytest.fixture
def tars(tmp_path):
  """Four tars of 3, 4, 5 and 6 images, and one with a bad and a small one."""
  folder = tmp_path / 'tars'
  (folder / 'below').mkdir(parents=True)
  for n in range(4):
    keys = [(f'{n}{i}', 10 * n + i) for i in range(3 + n)]
    members = sum((sample(key, seed) for key, seed in keys), [])
    if n == 3:
      small = encoded(pixels(99, 9, 9))
      members += [('small.png', small), ('small.txt', b'small')]
      members += [('mute.png', encoded(pixels(98)))]
    write(folder / ('below' if n == 2 else '') / f'{n}.tar', members)
  return folder


def tree(folder):
  """{name: bytes} of what must not depend on how it was made."""
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if path.name not in SAYS and not path.name.startswith('timing-')
  }


def from_folder(images):
  return {'kind': 'folder', 'path': str(images), 'part_size': 4}


def from_tars(tars):
  return {'kind': 'webdataset', 'path': str(tars), 'max_bad': 0.1}


def run(*words):
  return command_line.main([str(word) for word in words])


# Once, whole, and the same bytes.


@pytest.mark.parametrize('after', [0, 3, 4, 9])
def test_an_interrupted_preparation_resumes(
  images, tmp_path, monkeypatch, after
):
  prepare(tmp_path / 'whole', **from_folder(images))
  read, reads = FolderSource.read, []

  def dying(self, i):
    reads.append(i)
    if len(reads) > after:
      raise KeyboardInterrupt
    return read(self, i)

  out = tmp_path / 'out'
  with monkeypatch.context() as m:
    m.setattr(FolderSource, 'read', dying)
    with pytest.raises(KeyboardInterrupt):
      prepare(out, **from_folder(images))
  with pytest.raises(DataError, match='out'):
    ArrayRecordSource(out, 16)
  with monkeypatch.context() as m:
    m.setattr(FolderSource, 'read', lambda s, i: reads.append(i) or read(s, i))
    reads.clear()
    prepare(out, **from_folder(images))
  assert len(reads) == 10 - after // 4 * 4  # finished parts are kept
  assert tree(out) == tree(tmp_path / 'whole')


def test_the_bytes_depend_on_neither_order_nor_threads_nor_place(
  tars, tmp_path
):
  prepare(tmp_path / 'whole', **from_tars(tars))
  moved = tars.rename(tmp_path / 'moved')
  out = tmp_path / 'out'
  spec, found = begun(out, **from_tars(moved))
  for n in (2, 0, 3, 1, 2):
    prepare_shard(found[n], out, spec, threads=3)
  merge(out, max_bad=0.1)
  assert tree(out) == tree(tmp_path / 'whole')
  parts = json.loads((out / 'dataset.json').read_text())['parts']
  assert [part['count'] for part in parts] == [3, 4, 6, 5]  # 2.tar is below


def test_a_range_of_a_source_is_a_shard_too(images, tmp_path):
  out = tmp_path / 'out'
  spec, found = begun(out, **from_folder(images))
  report = prepare_shard(found[2], out, spec)
  assert (report['count'], report['shard']) == (2, [8, 10])
  assert {name for name in os.listdir(out) if 'part' in name} == {
    'part-00002.array_record',
    'part-00002.json',
  }
  with pytest.raises(DataError, match='samples 0 to 3'):
    merge(out, max_bad=0)


def test_a_compressed_tar_gives_the_records_of_a_plain_one(tars, tmp_path):
  prepare(tmp_path / 'whole', **from_tars(tars))
  plain = (tars / '1.tar').read_bytes()
  (tars / '1.tar.gz').write_bytes(gzip.compress(plain))
  (tars / '1.tar').unlink()
  prepare(tmp_path / 'out', **from_tars(tars))
  found, whole = tree(tmp_path / 'out'), tree(tmp_path / 'whole')
  for name in found:
    if name.endswith('.array_record'):
      assert found[name] == whole[name]
  cut = gzip.compress(plain)[:-300]
  (tars / '1.tar.gz').write_bytes(cut)
  with pytest.raises(DataError, match='1.tar.gz'):
    prepare(tmp_path / 'again', **from_tars(tars))


def test_a_damaged_part_is_made_again(images, tmp_path):
  out = tmp_path / 'out'
  prepare(out, **from_folder(images))
  part = out / 'part-00001.array_record'
  whole = part.read_bytes()
  part.write_bytes(whole[:-100] + b'x' * 100)
  with pytest.raises(DataError, match='part-00001'):
    merge(out, max_bad=0)
  prepare(out, **from_folder(images))
  assert part.read_bytes() == whole


def test_a_tar_that_has_changed_is_prepared_again(tars, tmp_path):
  out = tmp_path / 'out'
  assert prepare(out, **from_tars(tars))['kept'] == 18
  write(tars / '0.tar', sum((sample(f'{i}', i) for i in range(20)), []))
  assert prepare(out, **from_tars(tars))['kept'] == 35


def test_other_settings_or_other_files_are_not_overwritten(images, tmp_path):
  out, options = tmp_path / 'out', from_folder(images)
  prepare(out, **options)
  with pytest.raises(UsageError, match='size'):
    prepare(out, **options | {'size': 8})
  with pytest.raises(UsageError, match='images'):
    prepare(images, **options)
  (images / '0.txt').write_text('another caption')
  with pytest.raises(UsageError, match='fingerprint') as error:
    prepare(out, **options)
  assert error.value.key == 'out'
  (images / '0.txt').write_text('caption 0 ü')
  prepare(out, **options)
  (images / '1.png').write_bytes((images / '0.png').read_bytes())
  with pytest.raises(UsageError, match='fingerprint'):
    prepare(out, **options)


def test_a_worker_of_another_version_does_not_mix_its_images(
  images, tmp_path, monkeypatch
):
  spec, found = begun(tmp_path / 'out', **from_folder(images))
  prepare(tmp_path / 'out', **from_folder(images))
  before = tree(tmp_path / 'out')
  monkeypatch.setattr(shards, 'RESIZING', 'exact-area-2')
  with pytest.raises(UsageError) as error:
    prepare_shard(found[0], tmp_path / 'out', spec)
  assert error.value.key == 'out'
  outcome = attempt(found[0], tmp_path / 'out', spec)
  assert 'resizing' in outcome.problem
  (tmp_path / 'out' / 'part-00000.failed.json').unlink()
  assert tree(tmp_path / 'out') == before


def test_several_captions_of_an_image_are_all_stored(images, tmp_path, source):
  source.captions = ('one', 'two')
  prepare(tmp_path / 'out', **from_folder(images) | {'kind': source.kind})
  example = ArrayRecordSource(tmp_path / 'out', 16)[0]
  assert example['captions'] == ('one', 'two')
  assert example['caption'] == 'one'


class Altered(FolderSource):
  """Images of many shapes, or with several captions."""

  forms, captions_ = [(16, 16)], None

  def example(self, i):
    found = super().example(i)
    height, width = self.forms[i % len(self.forms)]
    found['image'] = np.full((height, width, 3), i, np.uint8)
    return found | ({'captions': self.captions_} if self.captions_ else {})


@pytest.fixture
def source(monkeypatch):
  class Setting:
    kind = f'{__name__}:Altered'

    def __setattr__(self, name, value):
      name = 'captions_' if name == 'captions' else name
      monkeypatch.setattr(Altered, name, value)

  return Setting()


def test_the_shapes_of_the_records_are_listed_as_runs(images, tmp_path, source):
  source.forms = [(16, 16), (16, 16), (8, 32)]
  out = tmp_path / 'out'
  prepare(out, **from_folder(images) | {'kind': source.kind})
  parts = json.loads((out / 'dataset.json').read_text())['parts']
  assert [part['buckets'] for part in parts] == [
    [[16, 16, 2], [8, 32, 1], [16, 16, 1]],
    [[16, 16, 1], [8, 32, 1], [16, 16, 2]],
    [[8, 32, 1], [16, 16, 1]],
  ]


# What is bad, and what is lost.


def test_what_fails_while_writing_is_left_out_and_listed(images, tmp_path):
  spec, found = begun(tmp_path / 'out', **from_folder(images))
  prepare_shard(found[0], tmp_path / 'out', spec)
  (images / '5.png').write_bytes(b'')
  for shard in found:
    prepare_shard(shard, tmp_path / 'out', spec)
  with pytest.raises(DataError, match='1 of 10'):
    merge(tmp_path / 'out', max_bad=0.09)
  assert not (tmp_path / 'out' / 'dataset.json').exists()
  report = merge(tmp_path / 'out', max_bad=0.11)
  assert (report['kept'], report['bad']) == (9, 1)
  line = json.loads((tmp_path / 'out' / 'dropped.jsonl').read_text())
  assert line['name'] == '5.png' and [line['reason']] == [*report['dropped']]


def test_a_sample_that_cannot_be_read_now_is_not_written_down_as_bad(
  images, tmp_path, monkeypatch
):
  out = tmp_path / 'out'
  spec, found = begun(out, **from_folder(images))
  with monkeypatch.context() as m:
    m.setattr('imagen_jax.data.checked.PAUSES', ())
    m.setattr(FolderSource, 'read', lambda s, i: (_ for _ in ()).throw(
      OSError(errno.EIO, 'Input/output error')
    ))  # fmt: skip
    outcome = attempt(found[0], out, spec)
  assert '0.png' in outcome.problem and not list(out.glob('*.array_record'))
  assert (out / 'part-00000.failed.json').exists()
  assert attempt(found[0], out, spec).problem is None
  assert not (out / 'part-00000.failed.json').exists()


def test_an_attempt_that_another_one_has_overtaken_is_not_lost(
  images, tmp_path, monkeypatch
):
  spec, found = begun(tmp_path / 'out', **from_folder(images))
  written = preparation.write_records

  def overtaken(file, records):
    monkeypatch.setattr(preparation, 'write_records', written)
    prepare_shard(found[0], tmp_path / 'out', spec)
    raise FileNotFoundError(errno.ENOENT, 'it was removed', str(file))

  monkeypatch.setattr(preparation, 'write_records', overtaken)
  outcome = attempt(found[0], tmp_path / 'out', spec)
  assert (outcome.problem, outcome.count) == (None, 4)
  assert not (tmp_path / 'out' / 'part-00000.failed.json').exists()


def test_a_full_disk_is_noticed_and_the_set_unfinished(
  images, tmp_path, monkeypatch
):
  verify = arrayrecord._verify
  monkeypatch.setattr(
    arrayrecord, '_verify', lambda file, count: verify(file, count + 1)
  )
  with pytest.raises(DataError, match='part-00000'):
    prepare(tmp_path / 'out', **from_folder(images))
  with pytest.raises(DataError, match='out'):
    ArrayRecordSource(tmp_path / 'out', 16)


@pytest.mark.parametrize(
  'harm', ['vanished', 'cut', 'cut between', 'no tar', 'denied']
)
def test_a_lost_shard_is_named_and_the_others_are_prepared(
  tars, tmp_path, monkeypatch, capsys, harm
):
  whole, out, bad = tmp_path / 'whole', tmp_path / 'out', tars / '1.tar'
  prepare(whole, **from_tars(tars))
  command = ['--source', 'webdataset', '--path', tars, '--size', 16]
  command += ['--out', out, '--workers', 1, '--max_bad', 0.1]
  begun(out, **from_tars(tars))
  good = bad.read_bytes()
  replacing = preparation.files.replacing

  def denied(path, **options):
    if 'part-00001.array' in str(path):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return replacing(path, **options)

  if harm == 'vanished':
    bad.unlink()
  elif harm == 'denied':
    monkeypatch.setattr(preparation.files, 'replacing', denied)
  else:
    between = good.index(b'12.png')  # a file begins there
    cuts = {'cut': good[: between + 700], 'cut between': good[:between]}
    bad.write_bytes(cuts.get(harm, b'<html>'))
  assert run(*command) == 3
  said = capsys.readouterr().err
  assert said.count('1.tar') >= 2 and '0.tar' not in said
  assert len(list(out.glob('*.array_record'))) == 3
  assert json.loads((out / 'report.json').read_text())['lost'][0]['shard']
  assert '1.tar' in (out / 'report.html').read_text()
  # Who can do without it says so.
  assert run(*command, '--max_bad', 0.5) == 0
  assert len(ArrayRecordSource(out, 16)) == 14
  monkeypatch.undo()
  bad.write_bytes(good)
  assert run(*command) == 0
  assert tree(out) == tree(whole)


def test_tars_of_equal_names_in_folders_are_told_apart(tmp_path):
  tars = tmp_path / 'tars'
  for folder in 'a', 'b':
    (tars / folder).mkdir(parents=True)
    small = ('1.png', encoded(pixels(1, 9, 9))), ('1.txt', b'small')
    write(tars / folder / '0.tar', [*sample('0', ord(folder)), *small])
  out, given = tmp_path / 'out', {'kind': 'webdataset', 'path': str(tars)}
  prepare(out, **given)
  lines = (out / 'dropped.jsonl').read_text().splitlines()
  names = [json.loads(line)['name'] for line in lines]
  assert names == ['a/0.tar/1.png', 'b/0.tar/1.png']
  assert 'b/0.tar/1.png' in (out / 'report.html').read_text()
  # Without the others of one, it is the same.
  (tars / 'a' / '0.tar').unlink()
  spec, found = begun(out, **given)
  assert [shard.name for shard in found] == ['a/0.tar', 'b/0.tar']
  assert str(found[0]) == str(tars / 'a' / '0.tar')
  prepare_shard(found[1], out, spec)


@pytest.mark.parametrize(
  'path, top',
  [
    ('', ''), ('/', ''), ('/below', '/below'), ('/*.tar', ''),
    ('/0.tar', ''), ('/**/{0..3}.tar', ''), ('/below/[12].tar', '/below'),
  ],
)  # fmt: skip
def test_a_tars_name_depends_on_the_path_alone(tars, path, top):
  found = WebDatasetSource.find_shards(f'{tars}{path}')
  for name, tar in found.items():
    assert os.path.samefile(tar, f'{tars}{top}/{name}') and '..' not in name


def test_a_part_of_a_tar_that_is_cut_now_is_lost_until_it_is_mended(
  tars, tmp_path, capsys
):
  whole, out, bad = tmp_path / 'whole', tmp_path / 'out', tars / '1.tar'
  prepare(whole, **from_tars(tars))
  command = ['--source', 'webdataset', '--path', tars, '--size', 16]
  command += ['--out', out, '--workers', 1, '--max_bad', 0.1]
  assert run(*command) == 0
  good = bad.read_bytes()
  bad.write_bytes(good[: len(good) // 2])
  capsys.readouterr()
  assert run(*command) == 3
  assert '1.tar' in capsys.readouterr().err
  assert run(*command, '--max_bad', 0.5) == 0
  assert len(ArrayRecordSource(out, 16)) == 14
  bad.write_bytes(good)
  assert run(*command) == 0
  assert tree(out) == tree(whole)


def test_tars_that_are_new_are_another_set(tars, tmp_path):
  prepare(tmp_path / 'out', **from_tars(tars))
  write(tars / 'new.tar', sample('new', 50))
  with pytest.raises(UsageError, match='new.tar') as error:
    prepare(tmp_path / 'out', **from_tars(tars))
  assert error.value.key == 'out'


def test_a_tar_without_any_good_image_is_an_empty_part(tars, tmp_path):
  small = [('s.png', encoded(pixels(1, 9, 9))), ('s.txt', b'small')]
  write(tars / '0.tar', small)
  report = prepare(tmp_path / 'out', **from_tars(tars))
  assert report['kept'] == 15 and not report['lost']
  assert len(ArrayRecordSource(tmp_path / 'out', 16)) == 15


def test_a_part_of_another_spec_is_not_joined(tars, tmp_path):
  prepare(tmp_path / 'one', **from_tars(tars))
  prepare(tmp_path / 'two', **from_tars(tars) | {'size': 8})
  for name in 'part-00001.json', 'part-00001.array_record':
    (tmp_path / 'two' / name).replace(tmp_path / 'one' / name)
  with pytest.raises(DataError, match='part-00001'):
    merge(tmp_path / 'one', max_bad=0)


# Duplicates.


def test_exact_duplicates_are_found_and_on_request_removed(images, tmp_path):
  for new, old in (('91', '1'), ('92', '1'), ('93', '0'), ('94', '9')):
    (images / f'{new}.png').write_bytes((images / f'{old}.png').read_bytes())
    (images / f'{new}.txt').write_text(f'again {new}')
  out = tmp_path / 'out'
  assert prepare(out, **from_folder(images))['duplicates'] == {
    'found': 4,
    'removed': 0,
  }
  assert len(ArrayRecordSource(out, 16)) == 14
  bytes_of_all = tree(out)
  assert prepare(out, **from_folder(images), remove_duplicates=True)[
    'kept'
  ] == (10)
  source = ArrayRecordSource(out, 16)
  assert [source[i]['caption'] for i in range(len(source))] == [
    f'caption {i} ü' for i in range(10)
  ]
  prepare(out, **from_folder(images))
  assert tree(out) == bytes_of_all
  prepare(out, **from_folder(images), remove_duplicates=True)
  (out / 'duplicates.u32').unlink()
  with pytest.raises(DataError, match='duplicates.u32'):
    ArrayRecordSource(out, 16)


def test_the_rows_of_a_part_skip_those_that_are_left_out():
  removed = np.array([0, 3, 4, 9], np.uint32)
  part = Part('x', 0, 10, removed)
  rows = [part.row(i) for i in range(len(part))]
  assert rows == [1, 2, 5, 6, 7, 8]


# The report.


def test_the_page_shows_what_was_left_out(tars, tmp_path):
  out = tmp_path / 'out'
  report = prepare(out, **from_tars(tars))
  too_small = 'it is smaller than 16 pixels'
  assert report['dropped'][too_small]['number'] == 1
  assert report['captions']['at most 8 words'] == report['kept'] == 18
  page = (out / 'report.html').read_text()
  assert too_small in page and 'mute' in page and 'src="http' not in page
  [data] = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
  assert Image.open(io.BytesIO(base64.b64decode(data))).size == (9, 9)


# The command.


def test_imagen_prepare_writes_reports_and_repeats(images, tmp_path, capsys):
  Image.new('RGB', (16, 16)).save(images / 'mute.png')
  Image.new('RGB', (9, 9)).save(images / 'small.png')
  (images / 'small.txt').write_text('small')
  out = tmp_path / 'out'
  command = f'--source folder --path {images} --size 16 --out {out}'.split()
  assert run(*command) == 3
  assert 'mute.png' in capsys.readouterr().err
  assert not out.exists()
  for _ in range(2):
    assert run(*command, '--max_bad', '0.1') == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert 'mute.png' in printed and 'small.png' in printed
  assert len((out / 'dropped.jsonl').read_text().splitlines()) == 2
  assert run(*command, '--max_bad', 1, '--resize', 'bicubic') == 2


@pytest.mark.parametrize(
  'words, code, named',
  [
    ('--source shaps --size 16', 2, '--source'),
    ('--source folder --size 16', 2, '--path'),
    ('--source folder --size 16 --path /nowhere', 3, '/nowhere'),
    ('--source folder --size 0 --path .', 2, '--size'),
    ('--source folder --path .', 2, '--size'),
    ('--size 8', 2, '--source'),
    ('--source folder --size 8 --path . --resize best', 2, 'best'),
    ('--source webdataset --size 8 --path s3://b/*.tar', 2, 's3://b/*.tar'),
    ('--source webdataset --size 8 --path /no/*.tar', 3, '/no/*.tar'),
    ('--source shapes --size 8 --num 2 --shard 2/2', 2, '--shard'),
    ('--source shapes --size 8 --num 2 -- --project x', 2, '--project'),
    ('--merge --size 8', 2, '--size'),
    ('--merge --shard 0/2', 2, '--shard'),
    ('--merge', 3, 'spec.json'),
    ('--source shapes --size 8 --num 2 --max_len 5', 2, '--max_len'),
  ],
)
def test_imagen_prepare_names_what_is_wrong(
  words, code, named, tmp_path, capsys
):
  command, _, beam = words.partition(' -- ')
  rest = ['--', beam] if beam else []
  assert run(*command.split(), '--out', tmp_path / 'out', *rest) == code
  assert named in capsys.readouterr().err


@pytest.mark.parametrize(
  'words, named',
  [
    (['--aspect', 'round'], '--aspect'),
    (['--aspect', 'buckets', '--size', 60], '--aspect'),
    (['--where', 'side=5'], '--where'),
    (['--split', 'eval'], '--split'),
    (['--where', 'similar>0.3'], '--where'),
    (['--where', 'similarity>0.3', '--captions', 'alt'], '--captions'),
  ],
)
def test_what_is_wrong_for_every_tar_is_said_before_the_first(
  words, named, tars, tmp_path, capsys
):
  write_table(tars / '0.tar', [{'key': '00', 'similarity': 0.5}])
  command = ['--source', 'webdataset', '--path', tars, '--size', 16]
  assert run(*command, '--out', tmp_path / 'out', *words) == 2
  said = capsys.readouterr().err
  assert said.count(named) == 1 and len(said.splitlines()) == 1
  assert not (tmp_path / 'out').exists()


def test_a_folder_without_a_held_out_split_gives_none(images, tmp_path, capsys):
  command = ['--source', 'folder', '--path', images, '--size', 16]
  assert run(*command, '--out', tmp_path / 'out', '--split', 'eval') == 2
  assert '--split' in capsys.readouterr().err


def test_a_set_is_not_opened_while_parts_of_it_are_others(tars, tmp_path):
  out = tmp_path / 'out'
  prepare(out, **from_tars(tars))
  write(tars / '1.tar', sample('new', 5))
  spec, found = begun(out, **from_tars(tars))
  prepare_shard(found[1], out, spec)
  with pytest.raises(DataError, match='not finished'):
    ArrayRecordSource(out, 16)


def test_a_set_is_not_opened_after_a_merge_that_fails(tars, tmp_path):
  out = tmp_path / 'out'
  prepare(out, **from_tars(tars))
  (out / 'part-00000.array_record').unlink()
  with pytest.raises(DataError):
    merge(out, max_bad=0)
  assert not (out / 'dataset.json').exists()


def test_tars_take_no_number_of_images(tars, tmp_path, capsys):
  for flag in '--num', '--part_size':
    command = ['--source', 'webdataset', '--path', tars, '--size', 16]
    assert run(*command, '--out', tmp_path / 'out', flag, 3) == 2
    assert flag in capsys.readouterr().err


def test_jobs_of_an_array_and_a_merge_are_one_command(tars, tmp_path, capsys):
  prepare(tmp_path / 'whole', **from_tars(tars))
  out = tmp_path / 'out'
  command = ['--source', 'webdataset', '--path', tars, '--size', 16]
  command += ['--out', out, '--workers', 1]
  for i in (2, 0):
    assert run(*command, '--shard', f'{i}/3') == 0
  capsys.readouterr()
  assert run('--merge', '--out', out) == 3
  assert '1.tar' in capsys.readouterr().err
  assert run(*command, '--shard', '1/3') == 0
  assert run('--merge', '--out', out, '--max_bad', 0.1) == 0
  assert tree(out) == tree(tmp_path / 'whole')
  timing = json.loads((out / 'report.json').read_text())['timing']
  assert timing['images'] == 18 and timing['images_per_process_second'] > 0


def test_a_bucket_gets_the_bytes_of_a_disk(tars, tmp_path, bucket, monkeypatch):
  prepare(tmp_path / 'whole', **from_tars(tars))
  url = f'{bucket.url}/prepare-tars'
  buckets.filesystem(url).put(str(tars), url, recursive=True)
  out = f'{bucket.url}/prepare-out'
  command = ['--source', 'webdataset', '--path', f'{url}/**/*.tar']
  command += ['--size', 16, '--out', out, '--workers', 1, '--max_bad', 0.1]
  command[3] = url
  assert run(*command) == 0
  with monkeypatch.context() as m:  # no finished part is downloaded again
    m.setattr('imagen_jax.io.files.digest', None)
    assert run(*command) == 0
  assert tree(bucket.folder / 'prepare-out') == tree(tmp_path / 'whole')
  assert len(ArrayRecordSource(out, 16)) == 18


def test_a_bucket_that_does_not_exist_is_said(tars, bucket, capsys):
  command = ['--source', 'webdataset', '--path', tars, '--size', 16]
  assert run(*command, '--out', 'gs://no-such-bucket/x') == 2
  assert 'no-such-bucket' in capsys.readouterr().err
