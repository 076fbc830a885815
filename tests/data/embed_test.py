"""Embeddings beside the images: whole parts, of these images, and resumable."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import embed as command_line
from imagen_jax.data import arrayrecord, embed
from imagen_jax.data.arrayrecord import ArrayRecordSource, write_records
from imagen_jax.data.merge import merge
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, NumericError, UsageError
from imagen_jax.io.embeddings import pack
from tests import prepared


@pytest.fixture(scope='module')
def prepared_once(tmp_path_factory):
  """A set of ten images of 16 pixels in parts of four, four and two."""
  top = tmp_path_factory.mktemp('set')
  (top / 'images').mkdir()
  for i in range(10):
    image = np.full((16, 16, 3), i, np.uint8)
    Image.fromarray(image).save(top / 'images' / f'{i}.png')
    more = ' ü' * (i % 6)
    (top / 'images' / f'{i}.txt').write_text(f'caption {i}{more}')
  prepared.prepare(
    top / 'out', kind='folder', path=str(top / 'images'), part_size=4
  )
  return top / 'out'


@pytest.fixture
def out(prepared_once, tmp_path):
  """A copy of the set."""
  return shutil.copytree(prepared_once, tmp_path / 'out')


def source(out, text='auto'):
  return ArrayRecordSource(out, 16, text=text)


def tree(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize('store', ['bfloat16', 'int8'])
def test_embeddings_are_stored_ragged_and_come_back_padded(out, store):
  folder = prepared.add_text(out, store=store)
  example = source(out)[9]
  rows = [[9, n, 0.1] for n in range(5)]
  expected = np.array(rows, ml_dtypes.bfloat16)
  assert example['text'].dtype == ml_dtypes.bfloat16
  np.testing.assert_allclose(
    example['text'].astype(np.float32),
    expected.astype(np.float32),
    atol=0 if store == 'bfloat16' else 9 / 127 / 2 + 0.02,
  )
  assert source(out)[0]['mask'].tolist() == [True] * 2 + [False] * 3
  assert not source(out)[0]['text'][2:].any()
  header = json.loads((folder / 'embeddings.json').read_text())
  assert header['captions'] == 10 and header['cut'] == 2
  assert header['tokens'] == sum(min(5, 2 + i % 6) for i in range(10))


def test_all_captions_of_an_image_have_their_embeddings(out):
  several = [f'caption {n}{" a" * n}' for n in range(3)]
  image = np.zeros((16, 16, 3), np.uint8)
  examples = [
    {'image': image, 'caption': 'caption 7'},
    {'image': image, 'captions': several},
  ]
  count, digest = write_records(
    out / 'part-00002.array_record', [arrayrecord.pack(e) for e in examples]
  )
  header = json.loads((out / 'dataset.json').read_text())
  header['parts'][2].update(digest, count=count)
  (out / 'dataset.json').write_text(json.dumps(header))
  prepared.add_text(out)
  one, three = source(out)[8], source(out)[9]
  assert one['mask'].sum() == 2 and one['text'][0, 0] == 7
  assert [mask.sum() for mask in three['mask']] == [2, 3, 4]
  assert [text[0, 0] for text in three['text']] == [0, 1, 2]
  assert three['captions'] == tuple(several)


def test_an_image_left_out_as_a_duplicate_keeps_its_place(tmp_path):
  for i, value in enumerate([1, 2, 1, 3, 4]):
    image = np.full((16, 16, 3), value, np.uint8)
    Image.fromarray(image).save(tmp_path / f'{i}.png')
    (tmp_path / f'{i}.txt').write_text(f'caption {i}')
  made = dict(kind='folder', path=str(tmp_path), remove_duplicates=True)
  report = prepared.prepare(tmp_path / 'out', **made)
  assert report['duplicates']['removed'] == 1
  prepared.add_text(tmp_path / 'out')
  found = source(tmp_path / 'out')
  assert [int(example['text'][0, 0]) for example in found] == [0, 1, 3, 4]


def test_a_part_whose_images_are_duplicates_no_more_is_said_to_lack_embeddings(
  tmp_path,
):
  for i in range(4):
    Image.new('RGB', (16, 16), (i % 2, 0, 0)).save(tmp_path / f'{i}.png')
    (tmp_path / f'{i}.txt').write_text(f'caption {i}')
  out, made = tmp_path / 'out', dict(kind='folder', path=str(tmp_path))
  prepared.prepare(out, part_size=2, remove_duplicates=True, **made)
  prepared.add_text(out)
  merge(out, max_bad=0)
  with pytest.raises(DataError, match='part-00001.*repeat') as error:
    source(out)
  assert 'other images' not in str(error.value)
  prepared.add_text(out)
  assert [int(e['text'][0, 0]) for e in source(out)] == [0, 1, 2, 3]


def test_a_run_may_leave_the_embeddings_alone(out):
  assert source(out).text_header is None
  prepared.add_text(out)
  assert source(out, text=None).text_header is None
  assert 'text' not in source(out, text=None)[0]
  assert make_source(kind='arrayrecord', path=out, size=16).text_header is None


def test_of_several_embeddings_a_run_chooses_one(out, tmp_path):
  prepared.add_text(out, 'fine')
  prepared.add_text(out, 'coarse', store='int8')
  for wrong in ('auto', 'none'):
    with pytest.raises(UsageError) as error:
      source(out, wrong)
    assert error.value.key == 'config.data.text'
    assert 'coarse, fine' in str(error.value)
  assert source(out, 'coarse').text_header['store'] == 'int8'
  elsewhere = shutil.move(out / 'text' / 'fine', tmp_path / 'fine')
  (out / 'text' / 'notes.txt').touch()  # no embeddings
  assert source(out).text_header['store'] == 'int8'
  assert source(out, str(elsewhere)).text_header['store'] == 'bfloat16'


@pytest.mark.parametrize(
  'key', ['encoder', 'tokenizer', 'max_len', 'dtype', 'store']
)
def test_embeddings_made_otherwise_are_refused(out, key):
  prepared.add_text(out)
  have = source(out).text_header
  source(out).check_text(**have)
  value = 7 if key == 'max_len' else 'x' * 12
  with pytest.raises(DataError) as error:
    source(out).check_text(**have | {key: value})
  assert str(value) in str(error.value)


def test_embeddings_of_captions_cleaned_otherwise_are_refused(out, monkeypatch):
  prepared.add_text(out)
  monkeypatch.setattr('imagen_jax.data.arrayrecord.CLEANING', 'whitespace-2')
  with pytest.raises(DataError):
    source(out).check_text()


def test_embeddings_of_other_images_are_refused(out, tmp_path):
  folder = prepared.add_text(out)
  images = tmp_path / 'others'
  images.mkdir()
  for i in range(10):
    Image.new('RGB', (16, 16), (i, 0, 0)).save(images / f'{i}.png')
    (images / f'{i}.txt').write_text(f'caption {i}')
  other = tmp_path / 'other'
  prepared.prepare(other, kind='folder', path=str(images), part_size=4)
  shutil.copytree(folder, other / 'text' / 'fake')
  with pytest.raises(DataError, match='imagen-embed'):
    source(other)
  with pytest.raises(UsageError) as error:
    prepared.add_text(other)
  assert error.value.key == 'out'


def test_sets_side_by_side_have_the_same_embeddings(out, tmp_path):
  more = shutil.copytree(out, tmp_path / 'out-1')
  prepared.add_text(out)
  both = str(tmp_path / 'out*')
  with pytest.raises(DataError, match='out-1'):
    source(both)
  folder = prepared.add_text(more, store='int8')
  with pytest.raises(DataError, match='precision'):
    source(both)
  shutil.rmtree(folder)
  prepared.add_text(more)
  assert len(source(both)) == 20
  assert source(both)[19]['text'][0, 0] == 9


@pytest.mark.parametrize('after', [0, 3, 4, 9])
def test_an_interrupted_embedding_resumes(out, tmp_path, after):
  whole = prepared.add_text(out, 'whole')
  folder, fake, done = out / 'text' / 'fake', prepared.encoder(), []

  def dying(captions, mask):
    for i, rows in fake.encode(captions, mask):
      done.append(i)
      if len(done) > after:
        raise KeyboardInterrupt
      yield i, rows

  with pytest.raises(KeyboardInterrupt):
    embed.embed(out, folder, dataclasses.replace(fake, encode=dying))
  with pytest.raises(DataError):
    source(out, 'fake')
  done.clear()

  def counting(captions, mask):
    done.extend(captions)
    return fake.encode(captions, mask)

  embed.embed(out, folder, dataclasses.replace(fake, encode=counting))
  assert len(done) == 10 - after // 4 * 4  # finished parts are kept
  assert tree(folder) == tree(whole)


def test_hosts_share_the_parts_and_the_last_completes_the_set(out):
  whole = prepared.add_text(out, 'whole')
  folder, fake = out / 'text' / 'fake', prepared.encoder()
  assert embed.embed(out, folder, fake, shard=(1, 2)) is None
  assert sorted(p.stem for p in folder.iterdir()) == ['part-00001'] * 2
  assert embed.embed(out, folder, fake, shard=(0, 2))['captions'] == 10
  assert tree(folder) == tree(whole)
  before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
  embed.embed(out, folder, fake)
  assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_a_cut_part_is_made_again_and_other_embeddings_are_refused(out):
  folder = prepared.add_text(out)
  part, whole = folder / 'part-00001.array_record', tree(folder)
  part.write_bytes(part.read_bytes()[:-1])
  prepared.add_text(out)
  assert tree(folder) == whole
  for changed in ({'store': 'int8'}, {'dtype': 'bfloat16'}, {'max_len': 4}):
    with pytest.raises(UsageError) as error:
      prepared.add_text(out, **changed)
    assert error.value.key == 'out'
  assert tree(folder) == whole


@pytest.mark.parametrize('harm', ['cut', 'missing'])
def test_a_part_that_cannot_be_read_stops_no_other(out, harm):
  if harm == 'cut':
    (out / 'part-00001.array_record').write_bytes(b'cut')
  else:
    (out / 'part-00001.array_record').unlink()
  folder = out / 'text' / 'fake'
  with pytest.raises(DataError, match='part-00001'):
    embed.embed(out, folder, prepared.encoder())
  finished = {p.stem for p in folder.iterdir()}
  assert finished == {'part-00000', 'part-00002'}
  with pytest.raises(DataError):
    source(out)


def test_a_damaged_record_has_no_embedding_and_its_neighbours_have(out):
  file = out / 'part-00000.array_record'
  data = bytearray(file.read_bytes())
  data[200] ^= 8
  file.write_bytes(data)
  folder = prepared.add_text(out)
  header = json.loads((folder / 'embeddings.json').read_text())
  assert header['damaged'] == 1 and header['captions'] == 9
  found = ArrayRecordSource(out, 16, text='auto', max_bad=1)
  numbers = [int(found[i]['text'][0, 0]) for i in range(5)]
  lost = int(next(iter(found.bad)).split()[1])
  assert numbers == [i + (i == lost) for i in range(5)]


def test_nothing_is_written_among_other_files(out, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes.txt').write_text('mine')
  before = tree(out)
  for folder in out, tmp_path / 'mine':
    with pytest.raises(UsageError) as error:
      prepared.add_text(out, folder)
    assert error.value.key == 'out'
  assert tree(out) == before


def test_a_full_disk_stops_at_once(out, monkeypatch):
  parts = []

  def full(file, records):
    parts.append(file)
    raise DataError(f'{file} could not be written')

  monkeypatch.setattr(embed, 'write_records', full)
  with pytest.raises(DataError, match='part-00000'):
    prepared.add_text(out)
  assert len(parts) == 1


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_not_stored(out, value):
  fake = prepared.encoder()

  def broken(captions, mask):
    for i, rows in fake.encode(captions, mask):
      rows[-1, -1] = value if captions[i].startswith('caption 5') else 1
      yield i, rows

  with pytest.raises(NumericError, match='part-00001'):
    prepared.add_text(out, made=dataclasses.replace(fake, encode=broken))
  stored = {p.stem for p in (out / 'text' / 'fake').iterdir()}
  assert stored == {'part-00000'}


def test_captions_are_read_a_few_at_a_time(out, monkeypatch):
  whole = prepared.add_text(out, 'whole')
  monkeypatch.setattr(embed, 'LEAST', 3)
  monkeypatch.setattr(embed, 'MEMORY', 1)
  sizes, fake = [], prepared.encoder()

  def seen(captions):
    sizes.append(len(captions))
    return fake.tokenize(captions)

  prepared.add_text(out, made=dataclasses.replace(fake, tokenize=seen))
  assert sizes == [3, 1, 3, 1, 2]
  assert tree(out / 'text' / 'fake') == tree(whole)


@pytest.mark.parametrize(
  'key, value',
  [
    ('store', 'int4'), ('dim', '3'), ('max_len', True), ('parts', {}),
    ('parts', [3]), ('mark', None), ('of', 3), ('format_version', 2),
  ],
)  # fmt: skip
def test_a_damaged_header_is_refused(out, key, value):
  file = prepared.add_text(out) / 'embeddings.json'
  header = json.loads(file.read_text())
  (header['parts'][0] if key == 'of' else header)[key] = value
  file.write_text(json.dumps(header))
  with pytest.raises(DataError, match='embeddings.json'):
    source(out)


TOKEN = 1, bytes(6)  # one of three numbers


@pytest.mark.parametrize(
  'record',
  [b'', bytes(4), b'\xff' * 40, pack([TOKEN])[:-1], pack([TOKEN, TOKEN])],
)
def test_a_malformed_record_is_replaced_by_its_neighbour(out, record):
  folder = prepared.add_text(out)
  part = json.loads((folder / 'part-00002.json').read_text())
  good = source(out)._embeddings._records
  count, digest = write_records(folder / part['name'], [record, good[9]])
  header = json.loads((folder / 'embeddings.json').read_text())
  header['parts'][2].update(digest)
  (folder / 'embeddings.json').write_text(json.dumps(header))
  found = ArrayRecordSource(out, 16, text='auto', max_bad=1)
  assert found[8]['text'][0, 0] == 9 and found.bad.keys() == {'record 8'}


# The command.


def test_imagen_embed_stores_what_the_encoder_says(model, out, capsys):
  from imagen_jax.text.encoder import find_mark, load_text_encoder

  text = model / 'text'
  command = f'--path {out} --text {text} --max_len 12 --shard'.split()
  assert command_line.main([*command, '1/2']) == 0
  assert 'completes' in capsys.readouterr().out
  assert command_line.main([*command, '0/2']) == 0
  assert '10 captions' in capsys.readouterr().out
  encoder, found = load_text_encoder(text), source(out)
  assert found.text_header['encoder'] == encoder.digest
  assert found.text_header['mark'] == find_mark(text)
  assert (out / 'text' / 'text-bfloat16').exists()
  captions = [found[i]['caption'] for i in range(10)]
  emb, mask = encoder.encode(captions, max_len=12)
  for example, row, kept in zip(found, emb, mask):
    np.testing.assert_array_equal(example['mask'], kept)
    np.testing.assert_allclose(
      example['text'].astype(np.float32), row, rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize(
  'words, code, named',
  [
    ('--path {out}', 2, '--text'),
    ('--path {out} --text /nowhere', 4, '/nowhere'),
    ('--path /nowhere --text demo --out {out}/t', 3, '/nowhere'),
    ('--path {out} --text demo --store int4', 2, '--store'),
    ('--path {out} --text demo --dtype float16', 2, '--dtype'),
    ('--path {out} --text demo --shard 2/2', 2, '--shard'),
    ('--path {out} --text demo --max_len 1', 2, '--max_len'),
    ('--path {out} --text demo --kind bert', 2, '--kind'),
    ('--path {out} --text demo --fsdp 3', 2, 'fsdp'),
    ('--path {out} --text demo --out {out}/spec.json', 2, '--out'),
  ],
)
def test_imagen_embed_names_what_is_wrong(words, code, named, out, capsys):
  assert command_line.main(words.format(out=out).split()) == code
  assert named in capsys.readouterr().err
