"""Prepared data: complete, never half-written, with the right embeddings."""

import dataclasses
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import prepare as command_line
from imagen_jax.data import arrayrecord
from imagen_jax.data import prepare as preparation
from imagen_jax.data.arrayrecord import ArrayRecordSource
from imagen_jax.data.folder import FolderSource
from imagen_jax.data.prepare import Recipe, prepare
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import lock

TEXT = {'dim': 3, 'max_len': 5, 'dtype': 'bfloat16', 'cleaning': 'whitespace-1'}
TEXT |= {'encoder': 'e' * 64, 'tokenizer': 't' * 64}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture
def images(tmp_path):
  """A folder of ten images of 16 pixels."""
  folder = tmp_path / 'images'
  folder.mkdir()
  for i in range(10):
    rng = np.random.default_rng(i)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'caption {i} ü')
  return folder


def embed(captions):
  """One token per word; its embedding encodes the caption and the word."""
  return [
    np.array(
      [[int(c.split()[1]), n, 0.1] for n in range(len(c.split()))],
      ml_dtypes.bfloat16,
    )
    for c in captions
  ]


def write(folder, out, text=False, size=16, **options):
  source = FolderSource(folder, size)
  settings = {'fingerprint': source.fingerprint}
  recipe = Recipe(size, settings, **{'part_size': 4} | options)
  if text:
    recipe = dataclasses.replace(recipe, text=TEXT)
  return prepare(source, out, recipe, embed=embed if text else None)


def test_what_was_prepared_is_what_the_source_gave(images, tmp_path):
  header, dropped = write(images, tmp_path / 'out')
  assert (header['count'], dropped) == (10, [])
  assert [part['count'] for part in header['parts']] == [4, 4, 2]
  prepared = make_source(kind='arrayrecord', path=tmp_path / 'out', size=16)
  source = FolderSource(images, 16)
  assert len(prepared) == len(source)
  for mine, theirs in zip(prepared, source):
    assert mine.keys() == {'image', 'caption'}
    assert mine['caption'] == theirs['caption']
    np.testing.assert_array_equal(mine['image'], theirs['image'])


def test_two_processes_do_not_prepare_one_folder(images, tmp_path):
  with lock.locked(tmp_path / 'out'), pytest.raises(UsageError) as error:
    write(images, tmp_path / 'out')
  assert error.value.key == 'out' and not list((tmp_path / 'out').iterdir())
  assert write(images, tmp_path / 'out')[0]['count'] == 10


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


def test_a_part_has_a_few_hundred_megabytes_by_default():
  text = TEXT | {'dim': 4096}
  for size, each, given in [
    (64, 64**2 * 3, None), (256, 256**2 * 3, None), (1024, 1024**2 * 3, None),
    (64, 64**2 * 3 + 20 * 4096 * 2, text),
  ]:  # fmt: skip
    part_size = Recipe(size, {}, given).part_size
    assert 150e6 < part_size * each < 300e6
  assert Recipe(64, {}, part_size=7).part_size == 7


def test_embeddings_are_stored_ragged_and_come_back_padded(images, tmp_path):
  write(images, tmp_path / 'out', text=True)
  example = ArrayRecordSource(tmp_path / 'out', 16)[7]
  expected = np.zeros((5, 3), ml_dtypes.bfloat16)
  expected[:3] = embed(['caption 7 ü'])[0]
  np.testing.assert_array_equal(example['text'], expected)
  assert example['text'].dtype == ml_dtypes.bfloat16
  assert example['mask'].tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize('key', ['encoder', 'tokenizer', 'max_len'])
def test_embeddings_of_another_encoder_are_refused(images, tmp_path, key):
  write(images, tmp_path / 'out', text=True)
  source = ArrayRecordSource(tmp_path / 'out', 16)
  mine = {k: TEXT[k] for k in ('encoder', 'tokenizer', 'max_len')}
  source.check_text(**mine)
  with pytest.raises(DataError, match=key):
    source.check_text(**mine | {key: 7})


def test_embeddings_of_captions_cleaned_otherwise_are_refused(
  images, tmp_path, monkeypatch
):
  write(images, tmp_path / 'out', text=True)
  monkeypatch.setattr(arrayrecord, 'CLEANING', 'whitespace-2')
  mine = {k: TEXT[k] for k in ('encoder', 'tokenizer', 'max_len')}
  with pytest.raises(DataError, match='cleaning'):
    ArrayRecordSource(tmp_path / 'out', 16).check_text(**mine)


@pytest.mark.parametrize('after', [0, 3, 4, 9])
def test_an_interrupted_preparation_resumes(
  images, tmp_path, monkeypatch, after
):
  write(images, tmp_path / 'whole', text=True)
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
      write(images, out, text=True)
  with pytest.raises(DataError, match='out'):
    ArrayRecordSource(out, 16)
  with monkeypatch.context() as m:
    m.setattr(FolderSource, 'read', lambda s, i: reads.append(i) or read(s, i))
    reads.clear()
    write(images, out, text=True)
  assert len(reads) == 10 - after // 4 * 4  # finished parts are kept
  assert not (out / 'unfinished.json').exists()
  names = sorted(file.name for file in out.iterdir())
  assert names == sorted(f.name for f in (tmp_path / 'whole').iterdir())
  for name in names:
    assert (out / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


def test_a_damaged_part_is_made_again(images, tmp_path):
  out = tmp_path / 'out'
  write(images, out)
  part = out / 'part-00001.array_record'
  whole = part.read_bytes()
  part.write_bytes(whole[:-100] + b'x' * 100)
  write(images, out)
  assert part.read_bytes() == whole


def test_other_settings_or_other_files_are_not_overwritten(images, tmp_path):
  out = tmp_path / 'out'
  write(images, out)
  with pytest.raises(UsageError, match='size'):
    write(images, out, size=8)
  with pytest.raises(UsageError, match='text'):
    write(images, out, text=True)
  with pytest.raises(UsageError, match='images'):
    write(images, images)
  (images / '0.txt').write_text('another caption')
  with pytest.raises(UsageError, match='fingerprint'):
    write(images, out)


def test_images_of_an_older_resize_are_not_mixed_with_new_ones(
  images, tmp_path, monkeypatch
):
  out = tmp_path / 'out'
  write(images, out)
  monkeypatch.setattr(preparation, 'RESIZING', 'exact-area-2')
  with pytest.raises(UsageError) as error:
    write(images, out)
  assert error.value.key == 'out'


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


def test_what_fails_while_writing_is_left_out_and_listed(images, tmp_path):
  source = FolderSource(images, 16, max_bad=0.5)
  (images / '3.png').write_bytes(b'')
  header, dropped = prepare(source, tmp_path / 'out', Recipe(16, {}))
  assert header['count'] == 9
  [(name, reason)] = dropped
  line = json.loads((tmp_path / 'out' / 'dropped.jsonl').read_text())
  assert line == {'name': '3.png', 'reason': reason} and name == '3.png'


def test_too_much_that_fails_ends_the_writing_unfinished(images, tmp_path):
  source = FolderSource(images, 16)
  (images / '3.png').write_bytes(b'')
  with pytest.raises(DataError, match='3.png'):
    prepare(source, tmp_path / 'out', Recipe(16, {}))
  assert not (tmp_path / 'out' / 'dataset.json').exists()


def test_a_full_disk_is_noticed_and_the_set_unfinished(
  images, tmp_path, monkeypatch
):
  verify = arrayrecord._verify
  monkeypatch.setattr(
    arrayrecord, '_verify', lambda file, count: verify(file, count + 1)
  )
  with pytest.raises(DataError, match='part-00000'):
    write(images, tmp_path / 'out')
  with pytest.raises(DataError, match='out'):
    ArrayRecordSource(tmp_path / 'out', 16)


# The command.


def test_imagen_prepare_writes_reports_and_repeats(images, tmp_path, capsys):
  Image.new('RGB', (16, 16)).save(images / 'mute.png')
  Image.new('RGB', (9, 9)).save(images / 'small.png')
  (images / 'small.txt').write_text('small')
  out = tmp_path / 'out'
  command = f'--source folder --path {images} --size 16 --out {out}'.split()
  assert command_line.main(command) == 3
  assert 'mute.png' in capsys.readouterr().err
  assert not out.exists()
  for _ in range(2):
    assert command_line.main([*command, '--max_bad', '0.1']) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert 'mute.png' in printed and 'small.png' in printed
  assert len((out / 'dropped.jsonl').read_text().splitlines()) == 2
  again = ['--size', '8', '--out', str(out)]
  assert command_line.main([*command[:4], *again, '--max_bad', '1']) == 2


def test_imagen_prepare_stores_what_the_encoder_says(model, images, tmp_path):
  from imagen_jax.text.encoder import load_text_encoder

  out, folder = tmp_path / 'out', model / 'text'
  command = f'--source folder --path {images} --size 16 --out {out}'.split()
  command += ['--text', str(folder), '--max_len', '12']
  assert command_line.main(command) == 0
  source = ArrayRecordSource(out, 16)
  encoder = load_text_encoder(folder)
  source.check_text(
    encoder=encoder.digest, tokenizer=encoder.tokenizer.digest, max_len=12
  )
  examples = [source[i] for i in range(3)]
  emb, mask = encoder.encode([e['caption'] for e in examples], max_len=12)
  for example, row, kept in zip(examples, emb, mask):
    np.testing.assert_array_equal(example['mask'], kept)
    np.testing.assert_allclose(
      example['text'].astype(np.float32), row, rtol=2**-8
    )


@pytest.mark.parametrize(
  'words, code, named',
  [
    ('--source shaps --size 16', 2, '--source'),
    ('--source folder --size 16', 2, '--path'),
    ('--source folder --size 16 --path /nowhere', 3, '/nowhere'),
    ('--source folder --size 0 --path .', 2, '--size'),
    ('--source folder --size 8 --path . --resize best', 2, 'best'),
    ('--source webdataset --size 8 --path s3://b/*.tar', 2, 's3://b/*.tar'),
  ],
)
def test_imagen_prepare_names_what_is_wrong(
  words, code, named, tmp_path, capsys
):
  out = ['--out', str(tmp_path / 'out')]
  assert command_line.main([*words.split(), *out]) == code
  assert named in capsys.readouterr().err


@pytest.mark.parametrize(
  'key, value',
  [
    ('size', '16'), ('count', None), ('parts', {}), ('parts', [3]),
    ('parts', [{}]), ('text', []), ('text', {'dim': 3}), ('name', 3),
    ('bytes', '1'), ('count of a part', None), ('name', '../x'), ('name', '/x'),
    ('encode', 3), ('encode', 'jxl'), ('quality', 50),
  ],
)  # fmt: skip
def test_a_header_with_other_types_or_files_elsewhere_is_refused(
  images, tmp_path, key, value
):
  write(images, tmp_path / 'out', text=True)
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
  'header, text',
  [
    (b'[' * 100_000, b''), (b'3', b''), (GOOD.replace(b'["a"]', b'[3]'), b''),
    (GOOD.replace(b'["a"]', b'[]'), b''), (GOOD.replace(b'768', b'"x"'), b''),
    (GOOD.replace(b'[16, 16]', b'[16]'), b''),
    (GOOD.replace(b'[16, 16]', b'[16, 15]'), b''),
    (GOOD, bytes(7)),  # no row of 3 bfloat16
    (GOOD, bytes(6 * 6)),  # 6 rows of at most 5
  ],
)  # fmt: skip
def test_a_malformed_record_is_replaced_by_its_neighbour(
  images, tmp_path, monkeypatch, header, text
):
  write(images, tmp_path / 'out', text=True)
  source = ArrayRecordSource(tmp_path / 'out', 16, max_bad=1)
  bad = len(header).to_bytes(4, 'little') + header + bytes(768) + text
  records = [bad, *(source._records[i] for i in range(1, 10))]
  monkeypatch.setattr(source, '_records', records)
  assert source[0]['caption'] == source[1]['caption']
  assert source.bad.keys() == {'record 0'}


def test_several_captions_of_an_image_are_all_stored(tmp_path):
  class Twice(FolderSource):
    def example(self, i):
      return super().example(i) | {'captions': ('one', 'two')}

  Image.new('RGB', (16, 16)).save(tmp_path / '0.png')
  (tmp_path / '0.txt').write_text('one')
  prepare(Twice(tmp_path, 16), tmp_path / 'out', Recipe(16, {}))
  example = ArrayRecordSource(tmp_path / 'out', 16)[0]
  assert example['captions'] == ('one', 'two')
  assert example['caption'] == 'one'


def test_a_smaller_size_keeps_the_aspect_ratio(images, tmp_path):
  write(images, tmp_path / 'out')
  record = arrayrecord.pack(
    {'image': np.full((8, 24, 3), 7, np.uint8), 'caption': 'wide'}, None
  )
  source = ArrayRecordSource(tmp_path / 'out', 8)
  source._records = [record]
  assert source.example(0)['image'].shape == (4, 12, 3)
