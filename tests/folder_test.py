"""Folders of captioned pictures, with the traps that real ones hold."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import folder
from imagen_jax.data.folder import FolderSource, read_picture
from imagen_jax.errors import DataError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pixels(height=16, width=16, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def add(path, name, image=None, caption='a picture', **options):
  """Saves a picture (an array or a Pillow image) and its caption."""
  if not isinstance(image, Image.Image):
    image = Image.fromarray(pixels() if image is None else image)
  file = path / name
  file.parent.mkdir(parents=True, exist_ok=True)
  image.save(file, **options)
  if caption is not None:
    file.with_suffix('.txt').write_text(caption, encoding='utf-8')
  return file


# Finding pictures and captions.


def test_text_files_beside_the_pictures_are_their_captions(tmp_path):
  one, two = pixels(seed=1), pixels(seed=2)
  add(tmp_path, 'b.png', one, 'a  red\n circle\n')
  add(tmp_path, 'a/deep.name.PNG', two, 'ein blauer Würfel')
  source = FolderSource(tmp_path, 16)
  assert len(source) == 2
  assert source.names == ('a/deep.name.PNG', 'b.png')
  assert source[0]['caption'] == 'ein blauer Würfel'
  assert source[1]['caption'] == 'a red circle'
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
    '{"file_name": "one.png", "text": null}',
  ],
)
def test_a_broken_metadata_line_is_named(tmp_path, line):
  good = '{"file_name": "one.png", "text": "a"}'
  (tmp_path / 'metadata.jsonl').write_text(f'{good}\n{line}\n')
  with pytest.raises(DataError, match='metadata.jsonl, line 2'):
    FolderSource(tmp_path, 16)


def test_unusable_pictures_are_left_out_and_named_once(tmp_path, caplog):
  add(tmp_path, 'good.png')
  add(tmp_path, 'small.png', pixels(64, 15))
  add(tmp_path, 'mute.png', caption=None)
  add(tmp_path, 'empty.png', caption=' \n')
  add(tmp_path, 'html.jpg').write_text('<html>')
  add(tmp_path, 'latin.png').with_suffix('.txt').write_bytes(b'caf\xe9')
  add(tmp_path, 'float.tif', Image.fromarray(np.ones((16, 16), np.float32)))
  add(tmp_path, '._good.png')
  (tmp_path / 'notes.txt').write_text('not a caption')
  with caplog.at_level(logging.WARNING):
    source = FolderSource(tmp_path, 16)
    FolderSource(tmp_path, 16)
  assert source.names == ('good.png',)
  reasons = dict(source.skipped)
  assert reasons == {
    'small.png': 'it is smaller than 16 pixels',
    'mute.png': 'it has no caption',
    'empty.png': 'its caption is empty',
    'html.jpg': 'it cannot be read as a picture',
    'latin.png': 'its caption is not UTF-8',
    'float.tif': 'its pixels have no fixed range (floating point)',
  }
  assert len(caplog.messages) == 1
  for name in reasons:
    assert name in caplog.messages[0]


def test_missing_files_of_the_list_are_left_out(tmp_path):
  add(tmp_path, 'here.png')
  (tmp_path / 'metadata.jsonl').write_text(
    '{"file_name": "here.png", "text": "a"}\n'
    '{"file_name": "gone.png", "text": "b"}\n'
  )
  source = FolderSource(tmp_path, 16)
  assert source.skipped == (('gone.png', 'it does not exist'),)


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
  add(tmp_path, 'good.png')
  add(tmp_path, 'bomb.png', pixels(64, 64))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  source = FolderSource(tmp_path, 16)
  assert source.skipped == (('bomb.png', 'it cannot be read as a picture'),)


def test_a_folder_without_usable_pictures_says_what_it_needs(tmp_path):
  with pytest.raises(DataError, match='no .jpg .* caption beside each'):
    FolderSource(tmp_path, 16)
  add(tmp_path, 'small.png', pixels(8, 8))
  with pytest.raises(DataError, match=r'smaller than 16 pixels \(small.png\)'):
    FolderSource(tmp_path, 16)
  with pytest.raises(DataError, match='not a folder'):
    FolderSource(tmp_path / 'nowhere', 16)


def test_a_picture_broken_after_its_header_is_named(tmp_path):
  file = add(tmp_path, 'cut.png', pixels(64, 64))
  file.write_bytes(file.read_bytes()[:2000])
  source = FolderSource(tmp_path, 16)
  with pytest.raises(DataError, match='cut.png cannot be decoded'):
    source[0]


def test_long_lists_of_left_out_pictures_are_cut_short():
  text = folder._summary([(f'{i}.png', 'it is odd') for i in range(9)])
  assert text == '9 because it is odd (0.png, 1.png, 2.png, …)'


# Reading one.


def test_whole_ratios_are_box_means(tmp_path):
  image = pixels(48, 48)
  file = add(tmp_path, 'a.png', image)
  means = image.reshape(16, 3, 16, 3, 3).mean(axis=(1, 3))
  # Rounded to 8 bits after the rows and after the columns.
  assert np.abs(read_picture(file, 16) - means).max() <= 1


def test_the_centre_is_kept(tmp_path):
  image = np.zeros((16, 40, 3), np.uint8)
  image[:, 12:28] = pixels()
  file = add(tmp_path, 'wide.png', image)
  np.testing.assert_array_equal(read_picture(file, 16), pixels())
  file = add(tmp_path, 'tall.png', image.transpose(1, 0, 2))
  np.testing.assert_array_equal(
    read_picture(file, 16), pixels().transpose(1, 0, 2)
  )


def test_exif_orientation_is_obeyed(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the sensor's rows are the picture's columns
  file = add(tmp_path, 'phone.png', pixels(), exif=exif)
  np.testing.assert_array_equal(
    read_picture(file, 16), np.rot90(pixels(), k=-1)
  )


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'tRNS'])
def test_transparency_lies_on_white(tmp_path, mode):
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
  assert (read_picture(file, 16) == 255).all()


def test_half_transparency_is_half_white(tmp_path):
  file = add(tmp_path, 'a.png', Image.new('RGBA', (16, 16), (*GREEN, 128)))
  np.testing.assert_allclose(
    read_picture(file, 16)[0, 0], [127, 255, 127], atol=1
  )


def test_sixteen_bits_of_grey_become_eight(tmp_path):
  grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
  expected = np.rint(grey / 257)
  for name in ('a.png', 'a.tif'):
    file = add(tmp_path, name, Image.fromarray(grey))
    found = read_picture(file, 16)
    np.testing.assert_array_equal(found, expected[..., None].repeat(3, -1))


@pytest.mark.parametrize(
  'mode, suffix', [('CMYK', 'jpg'), ('L', 'png'), ('1', 'png'), ('P', 'gif')]
)
def test_other_modes_become_rgb(tmp_path, mode, suffix):
  image = Image.new('RGB', (16, 16), (255, 255, 255)).convert(mode)
  found = read_picture(add(tmp_path, f'a.{suffix}', image), 16)
  assert found.shape == (16, 16, 3)
  assert (found >= 253).all()
