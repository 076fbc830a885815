"""Reading TFDS builds without TensorFlow."""

import io
import json
import pathlib
import sys

import numpy as np
import pytest
from imagen_jax.configs import common
from ml_collections import ConfigDict
from PIL import Image

from imagen_jax.data.sources import make_source
from imagen_jax.data.tfds import TfdsSource, find_build
from imagen_jax.errors import DataError, UsageError


def png(value, side=16):
  out = io.BytesIO()
  Image.new('RGB', (side, side), (value, 0, 0)).save(out, 'PNG')
  out.seek(0)
  return out


def build(data_dir, captions='captions', broken=False):
  """A build like coco_captions, with two captions per image."""
  import tensorflow_datasets as tfds

  class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.10.0')
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self):
      features = {'image': tfds.features.Image(shape=(None, None, 3))}
      features[captions] = tfds.features.Sequence(
        {'id': np.int64, 'text': tfds.features.Text()}
      )
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, manager):
      return {'train': self._examples(4), 'val': self._examples(1)}

    def _generate_examples(self):
      raise NotImplementedError

    def _examples(self, number):
      for i in range(number):
        bad = broken and i == 2
        yield (
          i,
          {
            'image': io.BytesIO(b'<html>') if bad else png(i * 10, 16 + i),
            captions: [{'id': j, 'text': f'{i} {j} ü'} for j in range(2)],
          },
        )

  Small(data_dir=data_dir, file_format='array_record').download_and_prepare()
  return data_dir / 'small' / '1.10.0'


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  pytest.importorskip('tensorflow_datasets')
  return build(tmp_path_factory.mktemp('tfds'))


def test_an_image_has_all_of_its_captions(small):
  source = make_source(kind='tfds', path=str(small), size=16)
  captions = sorted(e['captions'] for e in source)
  assert captions == [(f'{i} 0 ü', f'{i} 1 ü') for i in range(4)]
  for example in source:
    assert example['image'].shape == (16, 16, 3)
    assert example['image'][0, 0, 0] == int(example['caption'][0]) * 10
  assert 'tensorflow' not in sys.modules


def test_a_source_takes_the_data_section_of_a_config(small):
  data = common.data() | {'kind': 'tfds', 'path': str(small)}
  del data['flip'], data['workers']  # of the training step, not the source
  data = ConfigDict(data).to_dict()
  assert len(make_source(**data, size=16)) == 4
  some = make_source(**data | {'where': ('side>17',)}, size=16)
  assert sorted(e['caption'][0] for e in some) == ['2', '3']
  with pytest.raises(UsageError) as error:
    make_source(**data | {'mixture': {'pair': 1.0}}, size=16)
  assert error.value.key == 'config.data.mixture'


def test_eval_is_the_validation_split(small):
  source = make_source(kind='tfds', path=str(small), size=16, split='eval')
  assert [e['captions'] for e in source] == [('0 0 ü', '0 1 ü')]


def test_a_build_is_found_by_name(small, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(small.parent.parent))
  assert find_build('small') == small
  older = small.parent / '1.9.0'
  older.mkdir()
  (older / 'dataset_info.json').write_text('{"fileFormat": "array_record"}')
  assert find_build('small') == small
  with pytest.raises(DataError, match='nothing'):
    find_build('nothing')


def test_tfrecord_builds_are_refused(tmp_path):
  folder = tmp_path / 'coco_captions' / '1.1.0'
  folder.mkdir(parents=True)
  for info in ({'fileFormat': 'tfrecord'}, {}):
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    with pytest.raises(DataError, match='coco_captions'):
      TfdsSource(folder, 16)


def test_without_tfds_the_error_is_a_usage_error(tmp_path, monkeypatch):
  info = '{"fileFormat": "array_record"}'
  (tmp_path / 'dataset_info.json').write_text(info)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(UsageError):
    TfdsSource(tmp_path, 16)


def test_a_build_without_captions_is_refused_naming_its_columns(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  folder = build(tmp_path, captions='labels')
  with pytest.raises(DataError, match='labels'):
    TfdsSource(folder, 16)


def test_bad_and_small_images_are_left_out(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  source = TfdsSource(build(tmp_path, broken=True), 17, max_bad=0.5)
  assert sorted(e['caption'][0] for e in source) == ['1', '3']
  assert (len(source.bad), len(source.skipped)) == (1, 2)
  again = TfdsSource(source.folder, 17, max_bad=0.5)
  assert again.skipped == source.skipped
  assert again.fingerprint == source.fingerprint
