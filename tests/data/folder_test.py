"""Folders of captioned images, with the defects that real ones have."""

import csv
import json
import logging
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import checked, folder
from imagen_jax.data.folder import FolderSource
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io.decode import decode as read_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pixels(height=16, width=16, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def add(path, name, image=None, caption='an image', **options):
  """Saves an image (an array or a Pillow image) and its caption."""
  if not isinstance(image, Image.Image):
    image = Image.fromarray(pixels() if image is None else image)
  file = path / name
  file.parent.mkdir(parents=True, exist_ok=True)
  image.save(file, **options)
  if caption is not None:
    file.with_suffix('.txt').write_text(caption, encoding='utf-8')
  return file


# Finding images and captions.


def test_text_files_beside_the_images_are_their_captions(tmp_path):
  one, two = pixels(seed=1), pixels(seed=2)
  add(tmp_path, 'b.png', one, 'a  red\n circle\n')
  add(tmp_path, 'a/deep.name.PNG', two, 'ein blauer Würfel')
  source = FolderSource(tmp_path, 16)
  assert len(source) == 2
  assert source.names == ('a/deep.name.PNG', 'b.png')
  assert source[0]['caption'] == 'ein blauer Würfel'
  assert source[1]['caption'] == source.caption(1) == 'a red circle'
  np.testing.assert_array_equal(source[0]['image'], two)
  np.testing.assert_array_equal(source[np.int64(1)]['image'], one)
  assert source[1]['image'].dtype == np.uint8


@pytest.mark.parametrize('key', ['text', 'caption'])
def test_metadata_lines_are_captions(tmp_path, key):
  add(tmp_path, 'x/one.png', caption='not this one')
  add(tmp_path, 'unlisted.png')
  lines = [{'file_name': 'x/one.png', key: 'from the list', 'other': 1}]
  text = '\n\n'.join(json.dumps(line) for line in lines)
  (tmp_path / 'metadata.jsonl').write_text(text, encoding='utf-8')
  source = FolderSource(str(tmp_path), 16)
  assert [example['caption'] for example in source] == ['from the list']


@pytest.mark.parametrize(
  'line',
  [
    '{"file_name": "one.png"}',
    'one.png',
    '[]',
    '{"text": "a"}',
    '3',
    '[' * 100_000,
  ],
)
def test_a_broken_metadata_line_is_named(tmp_path, line):
  good = '{"file_name": "one.png", "text": "a"}'
  (tmp_path / 'metadata.jsonl').write_text(f'{good}\n{line}\n')
  with pytest.raises(DataError, match=r'metadata.jsonl.* 2\b'):
    FolderSource(tmp_path, 16)


@pytest.mark.parametrize(
  'text, reason',
  [('null', 'no caption'), ('[]', 'no caption'), ('3', 'not text')],
)
def test_a_row_without_a_caption_is_a_bad_sample(tmp_path, text, reason):
  add(tmp_path, 'good.png')
  add(tmp_path, 'one.png')
  (tmp_path / 'metadata.jsonl').write_text(
    '{"file_name": "good.png", "text": "a"}\n'
    f'{{"file_name": "one.png", "text": {text}}}'
  )
  source = FolderSource(tmp_path, 16, max_bad=0.5)
  assert list(source.bad) == ['one.png'] and reason in source.bad['one.png']


def test_text_and_caption_files_are_several_captions(tmp_path):
  add(tmp_path, 'both.png', caption='one')
  add(tmp_path, 'equal.png', caption='same ')
  add(tmp_path, 'second.png', caption=None)
  for name, text in ('both', 'two'), ('equal', ' same'), ('second', 'alone'):
    (tmp_path / f'{name}.caption').write_text(text)
  both, equal, second = FolderSource(tmp_path, 16)
  assert (both['caption'], both['captions']) == ('one', ('one', 'two'))
  assert equal['caption'] == 'same' and 'captions' not in equal
  assert second['caption'] == 'alone' and 'captions' not in second


def write_table(path, kind, rows):
  """metadata.jsonl, .csv or .parquet of rows {column: value}."""
  file = path / f'metadata.{kind}'
  if kind == 'jsonl':
    file.write_text('\ufeff' + '\n'.join(map(json.dumps, rows)))
  elif kind == 'csv':
    with file.open('w', encoding='utf-8-sig', newline='') as out:
      writer = csv.DictWriter(out, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  else:
    parquet = pytest.importorskip('pyarrow.parquet')
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file


KINDS = ['jsonl', 'csv', 'parquet']


@pytest.mark.parametrize('kind', KINDS)
def test_metadata_of_every_format_are_the_same_set(tmp_path, kind):
  rows = []
  for i in range(4):
    add(tmp_path, f'{i}.png', caption=None)
    row = {
      'file_name': f'{i}.png',
      'text': f'die "{i}", ü\nzwei',
      'score': i / 4,
    }
    rows.append(row | {'blip': f'an image of {i}', 'nsfw': 'UNLIKELY'})
  rows[3]['nsfw'] = None
  write_table(tmp_path, kind, rows)
  source = FolderSource(tmp_path, 16)
  assert [e['caption'] for e in source] == [
    f'die "{i}", ü zwei' for i in range(4)
  ]
  assert 'captions' not in source[0]
  several = FolderSource(tmp_path, 16, captions=('blip', 'text'))
  assert several[1]['captions'] == ('an image of 1', 'die "1", ü zwei')
  assert several.fingerprint != source.fingerprint
  where = ('score>=0.25', 'nsfw==unlikely')
  some = FolderSource(tmp_path, 16, where=where, max_bad=0)
  assert some.names == ('1.png', '2.png')
  reasons = dict(some.skipped)
  assert where[0] in reasons['0.png'] and where[1] in reasons['3.png']
  for option, key in ('where', ('none>1',)), ('captions', ('none',)):
    with pytest.raises(UsageError) as error:
      FolderSource(tmp_path, 16, **{option: key})
    assert error.value.key == f'config.data.{option}'


@pytest.mark.parametrize('kind', KINDS)
def test_metadata_without_names_or_captions_are_refused(tmp_path, kind):
  add(tmp_path, 'one.png')
  for row in (
    {'name': 'one.png', 'text': 'a'},
    {'file_name': 'one.png', 'alt': 'a'},
  ):
    file = write_table(tmp_path, kind, [row])
    with pytest.raises(DataError, match='file_name') as error:
      FolderSource(tmp_path, 16)
    assert file.name in str(error.value)
  assert len(FolderSource(tmp_path, 16, captions='alt')) == 1


@pytest.mark.parametrize(
  'data', [b'file_name,text\none.png,a,b\n', b'file_name,text\n"one.png,a\n',
           b'file_name,text\none.png,caf\xe9\n', b'']
)  # fmt: skip
def test_a_broken_csv_is_refused(tmp_path, data):
  add(tmp_path, 'one.png')
  (tmp_path / 'metadata.csv').write_bytes(data)
  with pytest.raises(DataError, match='metadata.csv|no image'):
    FolderSource(tmp_path, 16)


def test_a_broken_parquet_or_two_tables_are_refused(tmp_path):
  pytest.importorskip('pyarrow')
  add(tmp_path, 'one.png')
  (tmp_path / 'metadata.parquet').write_bytes(b'PAR1' * 9)
  with pytest.raises(DataError, match='metadata.parquet'):
    FolderSource(tmp_path, 16)
  (tmp_path / 'metadata.csv').write_text('file_name,text\none.png,a\n')
  with pytest.raises(DataError, match='one of them'):
    FolderSource(tmp_path, 16)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
  add(tmp_path, 'one.png')
  (tmp_path / 'metadata.parquet').touch()
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UsageError, match='parquet'):
    FolderSource(tmp_path, 16)


def test_a_row_without_an_image_is_bad_and_an_image_without_a_row_unused(
  tmp_path,
):
  add(tmp_path, 'here.png')
  add(tmp_path, 'other.png')
  write_table(tmp_path, 'csv', [
    {'file_name': 'here.png', 'text': 'a'},
    {'file_name': 'gone.png', 'text': 'b'},
  ])  # fmt: skip
  source = FolderSource(tmp_path, 16, max_bad=0.5)
  assert source.names == ('here.png',) and list(source.bad) == ['gone.png']
  assert [name for name, _ in source.skipped] == ['gone.png', 'other.png']
  assert 'metadata.csv' in dict(source.skipped)['other.png']


def test_conditions_on_images_and_captions(tmp_path):
  for name, size, caption in [
    ('small', (16, 20), 'a red circle'), ('wide', (16, 48), 'a red circle'),
    ('large', (40, 40), 'a red circle'), ('short', (40, 40), 'red'),
  ]:  # fmt: skip
    add(tmp_path, f'{name}.png', pixels(*size), caption)

  def names(*where):
    found = FolderSource(tmp_path, 16, where=where).names
    return {name.removesuffix('.png') for name in found}

  assert names('side>=32') == {'large', 'short'}
  assert names('aspect<=1.25') == {'small', 'large', 'short'}
  assert names('width<=20', 'height>10') == {'small'}
  assert names('caption_words>=2', 'caption_length<=12') == {
    'small', 'wide', 'large'
  }  # fmt: skip
  with pytest.raises(DataError, match='side>99'):
    names('side>99')


def test_unusable_images_are_left_out_and_named_once(tmp_path, caplog):
  add(tmp_path, 'good.png')
  add(tmp_path, 'small.png', pixels(64, 15))
  add(tmp_path, 'mute.png', caption=None)
  add(tmp_path, 'empty.png', caption=' \n')
  add(tmp_path, 'html.jpg').write_text('<html>')
  add(tmp_path, 'nothing.png').write_bytes(b'')
  add(tmp_path, 'line.png', pixels(1, 64))
  add(tmp_path, 'long.png', caption='word ' * 20_000)
  cut = add(tmp_path, 'cut.jpg', pixels(64, 64))
  cut.write_bytes(cut.read_bytes()[:-500])
  add(tmp_path, 'latin.png').with_suffix('.txt').write_bytes(b'caf\xe9')
  add(tmp_path, 'float.tif', Image.fromarray(np.ones((16, 16), np.float32)))
  add(tmp_path, '._good.png')
  (tmp_path / 'notes.txt').write_text('not a caption')
  with caplog.at_level(logging.WARNING):
    source = FolderSource(tmp_path, 16, max_bad=1)
    FolderSource(tmp_path, 16, max_bad=1)
  assert source.names == ('good.png',)
  reasons = dict(source.skipped)
  assert reasons.keys() == {
    'small.png', 'mute.png', 'empty.png', 'html.jpg', 'nothing.png', 'line.png',
    'long.png', 'cut.jpg', 'latin.png', 'float.tif',
  }  # fmt: skip
  # html.jpg and nothing.png are not images; each other defect is its own.
  assert len(set(reasons.values())) == 9
  assert len(caplog.messages) == 1
  for reason in reasons.values():
    assert reason in caplog.messages[0]


def test_images_in_hidden_folders_belong_to_other_programs(tmp_path):
  base = tmp_path / '.mine'  # the folder itself may be hidden
  for name in ('a.png', '.ipynb_checkpoints/a.png', 'x/.Trash-0/y/b.png'):
    add(base, name)
  source = FolderSource(base, 16)
  assert source.names == ('a.png',) and source.skipped == ()


def test_images_that_are_no_samples_are_listed_but_not_bad(tmp_path):
  add(tmp_path, 'a.png')
  add(tmp_path, 'x/c.ppm').rename(tmp_path / 'x/c.HEIC')
  (tmp_path / 'notes.txt').write_text('not a caption')
  source = FolderSource(tmp_path, 16)
  assert [n for n, _ in source.skipped] == ['x/c.HEIC'] and not source.bad
  add(tmp_path, 'b.png')
  line = json.dumps({'file_name': 'a.png', 'text': 'a'})
  (tmp_path / 'metadata.jsonl').write_text(line)
  source = FolderSource(tmp_path, 16)
  assert source.names == ('a.png',) and not source.bad
  assert len(set(dict(source.skipped).values())) == 2
  assert [n for n, _ in source.skipped] == ['b.png', 'x/c.HEIC']


def test_an_image_listed_under_two_spellings_is_used_once(tmp_path):
  add(tmp_path, 'x/a.png')
  names = ['./x/a.png', 'x//a.png', 'x/a.png', '../a.png', '../a.png', 'b\0']
  lines = [json.dumps({'file_name': name, 'text': 'a'}) for name in names]
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(lines))
  source = FolderSource(tmp_path, 16, max_bad=1)
  assert source.names == ('x/a.png',)
  assert [n for n, _ in source.skipped] == [
    'line 2', 'line 3', '../a.png', 'line 5', 'b\0'
  ]  # fmt: skip


def test_missing_files_of_the_list_are_left_out(tmp_path):
  add(tmp_path, 'here.png')
  (tmp_path / 'metadata.jsonl').write_text(
    '{"file_name": "here.png", "text": "a"}\n'
    '{"file_name": "gone.png", "text": "b"}\n'
  )
  source = FolderSource(tmp_path, 16, max_bad=0.5)
  assert [name for name, _ in source.skipped] == ['gone.png']


def test_names_that_leave_the_folder_and_repeated_ones_are_left_out(tmp_path):
  add(tmp_path, 'set/here.png')
  add(tmp_path, 'secret.png')
  names = [
    'here.png',
    '../secret.png',
    str(tmp_path / 'secret.png'),
    'here.png',
  ]
  lines = [json.dumps({'file_name': name, 'text': name}) for name in names]
  (tmp_path / 'set' / 'metadata.jsonl').write_text('\n'.join(lines))
  source = FolderSource(tmp_path / 'set', 16, max_bad=1)
  assert source.names == ('here.png',)
  assert {name for name, _ in source.skipped} == {*names[1:3], 'line 4'}


def png(width, height, bits, rows):
  """A PNG file in RGB, written by hand."""

  def chunk(kind, data):
    crc = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + crc

  header = struct.pack('>IIBBBBB', width, height, bits, 2, 0, 0, 0)
  return b''.join(
    [
      b'\x89PNG\r\n\x1a\n',
      chunk(b'IHDR', header),
      chunk(b'IDAT', zlib.compress(rows)),
      chunk(b'IEND', b''),
    ]
  )


def bomb(side):
  """A PNG of about a kilobyte with a huge size in its header."""
  return png(side, side, 8, bytes(1000))


@pytest.mark.parametrize('side', [9_000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path, side):
  add(tmp_path, 'good.png')
  add(tmp_path, 'bomb.png').write_bytes(bomb(side))
  source = FolderSource(tmp_path, 16, max_bad=0.5)
  assert [name for name, _ in source.skipped] == ['bomb.png']


@pytest.mark.slow
def test_a_bomb_raises_memory_by_less_than_64_mb(tmp_path):
  file = tmp_path / 'bomb.png'
  file.write_bytes(bomb(30_000))
  code = (
    'import resource, sys\n'
    'from imagen_jax.io.decode import BadSample, inspect\n'
    'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    'before = peak()\n'
    'try: inspect(sys.argv[1])\n'
    'except BadSample: print(peak() - before)\n'
  )
  command = [sys.executable, '-c', code, str(file)]
  out = subprocess.run(command, capture_output=True, text=True, check=True)
  assert int(out.stdout) < 64 * 1024


def test_a_check_is_made_once_and_again_for_what_changed(tmp_path, monkeypatch):
  looked = []
  inspect = folder.inspect
  monkeypatch.setattr(
    folder, 'inspect', lambda file: looked.append(file.name) or inspect(file)
  )
  add(tmp_path, 'a.png', pixels(seed=1))
  add(tmp_path, 'b.png', pixels(20, 20))
  FolderSource(tmp_path, 16)
  FolderSource(tmp_path, 8)
  assert sorted(looked) == ['a.png', 'b.png']
  add(tmp_path, 'b.png', pixels(12, 12, seed=2))
  assert FolderSource(tmp_path, 16).names == ('a.png',)
  assert sorted(looked) == ['a.png', 'b.png', 'b.png']


def test_no_place_for_a_cache_is_no_error(tmp_path, monkeypatch):
  add(tmp_path, 'a.png')
  monkeypatch.setenv('XDG_CACHE_HOME', '/proc/nowhere')
  assert len(FolderSource(tmp_path, 16)) == 1


def test_too_many_bad_samples_stop_the_run_and_are_named(tmp_path):
  for i in range(9):
    add(tmp_path, f'{i}.png')
  add(tmp_path, 'bad.png', caption='')
  with pytest.raises(DataError, match='bad.png'):
    FolderSource(tmp_path, 16)
  assert len(FolderSource(tmp_path, 16, max_bad=0.1)) == 9


def test_small_images_are_not_bad(tmp_path):
  add(tmp_path, 'small.png', pixels(15, 15))
  add(tmp_path, 'good.png')
  source = FolderSource(tmp_path, 16, max_bad=0)
  assert [name for name, _ in source.skipped] == ['small.png']


def test_what_fails_later_is_replaced_by_its_neighbour_and_counted(
  tmp_path, caplog
):
  for i in range(4):
    add(tmp_path, f'{i}.png', pixels(seed=i))
  source = FolderSource(tmp_path, 16, max_bad=0.5)
  (tmp_path / '1.png').write_bytes(b'<html>')
  for _ in range(2):
    np.testing.assert_array_equal(source[1]['image'], pixels(seed=2))
  assert (source.replaced, list(source.bad)) == (2, ['1.png'])
  assert len(caplog.messages) == 1
  for i in (2, 3):
    (tmp_path / f'{i}.png').unlink()
  with pytest.raises(DataError):
    source[2]


def test_a_folder_without_usable_images_is_refused(tmp_path):
  with pytest.raises(DataError):
    FolderSource(tmp_path, 16)
  add(tmp_path, 'small.png', pixels(8, 8))
  with pytest.raises(DataError, match='small.png'):
    FolderSource(tmp_path, 16)
  with pytest.raises(DataError, match='nowhere'):
    FolderSource(tmp_path / 'nowhere', 16)


def test_long_lists_of_left_out_images_are_cut_short():
  text = checked.summary([(f'{i}.png', 'it is odd') for i in range(9)])
  assert text == '9 because it is odd (0.png, 1.png, 2.png, …)'


# Reading one.


def test_whole_ratios_are_box_means(tmp_path):
  image = pixels(48, 48)
  file = add(tmp_path, 'a.png', image)
  means = image.reshape(16, 3, 16, 3, 3).mean(axis=(1, 3))
  # Pillow rounds to 8 bits after each axis.
  assert np.abs(read_image(file, 16) - means).max() <= 1


def test_the_centre_is_kept(tmp_path):
  image = np.zeros((16, 40, 3), np.uint8)
  image[:, 12:28] = pixels()
  file = add(tmp_path, 'wide.png', image)
  np.testing.assert_array_equal(read_image(file, 16), pixels())
  file = add(tmp_path, 'tall.png', image.transpose(1, 0, 2))
  np.testing.assert_array_equal(
    read_image(file, 16), pixels().transpose(1, 0, 2)
  )


def test_exif_orientation_is_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the sensor's rows are the image's columns
  file = add(tmp_path, 'phone.png', pixels(), exif=exif)
  np.testing.assert_array_equal(read_image(file, 16), np.rot90(pixels(), k=-1))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'tRNS'])
def test_transparent_images_are_composited_on_white(tmp_path, mode):
  if mode == 'P':
    image = Image.new('P', (16, 16), 1)
    image.putpalette([*BLUE, *RED])
    file = add(tmp_path, 'a.png', image, transparency=1)
  elif mode == 'tRNS':
    file = add(
      tmp_path, 'a.png', Image.new('RGB', (16, 16), RED), transparency=RED
    )
  else:
    clear = (0, 0) if mode == 'LA' else (*RED, 0)
    file = add(tmp_path, 'a.png', Image.new(mode, (16, 16), clear))
  assert (read_image(file, 16) == 255).all()


def test_half_transparent_pixels_become_half_white(tmp_path):
  file = add(tmp_path, 'a.png', Image.new('RGBA', (16, 16), (*GREEN, 128)))
  np.testing.assert_allclose(
    read_image(file, 16)[0, 0], [127, 255, 127], atol=1
  )


def test_sixteen_bits_of_grey_become_eight(tmp_path):
  grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
  expected = np.rint(grey / 257)
  for name in ('a.png', 'a.tif'):
    file = add(tmp_path, name, Image.fromarray(grey))
    found = read_image(file, 16)
    np.testing.assert_array_equal(found, expected[..., None].repeat(3, -1))


def test_sixteen_bits_of_colour_become_eight():
  # Pillow does not write such files: rows of four times the same two pixels.
  row = struct.pack('>6H', 65535, 0, 257 * 100, 0, 65535, 257 * 7)
  found = read_image(png(8, 8, 16, (b'\0' + row * 4) * 8), 8)
  np.testing.assert_array_equal(found[0, :2], [[255, 0, 100], [0, 255, 7]])


def test_of_an_animation_the_first_frame_is_read(tmp_path):
  frames = [Image.new('RGB', (16, 16), c) for c in (RED, GREEN, BLUE)]
  for name in ('a.gif', 'a.png', 'a.webp'):
    file = add(
      tmp_path, name, frames[0], save_all=True, append_images=frames[1:]
    )
    found = read_image(file, 16)
    assert np.abs(found.astype(int) - RED).max() < 8


@pytest.mark.parametrize('resize', ['area', 'bicubic', 'lanczos'])
def test_no_kind_of_resize_aliases(tmp_path, resize):
  """Stripes finer than a target pixel become grey, not other stripes."""
  stripes = np.zeros((192, 192, 3), np.uint8)
  stripes[:, ::2] = 255
  file = add(tmp_path, 'a.png', stripes)
  found = read_image(file, 16, resize).astype(int)
  assert np.abs(found[:, 1:-1] - 127.5).max() < 6


@pytest.mark.parametrize(
  'mode, suffix', [('CMYK', 'jpg'), ('L', 'png'), ('1', 'png'), ('P', 'gif')]
)
def test_other_modes_become_rgb(tmp_path, mode, suffix):
  image = Image.new('RGB', (16, 16), (255, 255, 255)).convert(mode)
  found = read_image(add(tmp_path, f'a.{suffix}', image), 16)
  assert found.shape == (16, 16, 3)
  assert (found >= 253).all()
