"""A mixture holds its fractions in every batch, and each part's epochs."""

import collections
import dataclasses

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data.checked import Checked
from imagen_jax.data.pipeline import Order, batches
from imagen_jax.data.source import Source
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from imagen_jax.training.workdir import differences


class Numbers(Source):
  """`num` images of a number, captioned with a letter and their own number."""

  path_is = 'a letter'
  has_eval_split = False

  def __init__(self, path, num, held=False, stored=None):
    self.letter, self.num = path, num
    self.has_eval_split, self.text_header = held, stored

  def __len__(self):
    return self.num

  def __getitem__(self, i):
    image = np.full((1, 1, 3), i, np.uint8)
    return {'image': image, 'caption': f'{self.letter}{i}'}

  def name(self, i):
    return f'image {i}'


def section(letter, num, weight, **more):
  kind = 'tests.data.mixture_test:Numbers'
  return {'kind': kind, 'path': letter, 'num': num, 'weight': weight, **more}


MIXTURE = {
  'many': section('a', 50, 3),
  'few': section('b', 7, 1.5),
  'more': section('c', 20, 1.5),
}


def make(mixture, split='train'):
  return make_source(kind='mixture', size=1, split=split, mixture=mixture)


def jitter(example, rng):
  return example | {'noise': rng.integers(1 << 30)}


def take(number, *, num_hosts=1, **options):
  """[(captions, noise, indices)] of global batches of 8."""
  order = Order(3, 8, num_hosts=num_hosts, **options)
  hosts = [
    batches(make(MIXTURE), dataclasses.replace(order, host=h), augment=jitter)
    for h in range(num_hosts)
  ]
  steps = []
  for _ in range(number):
    rows = [next(host) for host in hosts]
    steps.append(
      tuple(
        np.concatenate([row[key] for row in rows]).tolist()
        for key in ('caption', 'noise', 'index')
      )
    )
  return steps


def test_every_batch_has_the_fractions_and_every_epoch_each_image():
  steps = take(40)
  for captions, _, _ in steps:
    assert collections.Counter(c[0] for c in captions) == {
      'a': 4,
      'b': 2,
      'c': 2,
    }
  order = [c for captions, _, _ in steps for c in captions]
  for letter, num in ('a', 50), ('b', 7), ('c', 20):
    own = [c for c in order if c[0] == letter]
    for start in range(0, len(own) - num + 1, num):
      assert len({*own[start : start + num]}) == num
  assert order[:8] != order[8:16]


@pytest.mark.parametrize('num_hosts, start', [(1, 5), (2, 0), (4, 3)])
def test_batches_are_those_of_the_step_on_any_number_of_hosts(num_hosts, start):
  assert take(3, num_hosts=num_hosts, start_step=start) == take(8)[start:][:3]


def test_an_index_names_its_example():
  source = make(MIXTURE)
  for captions, _, indices in take(3):
    assert [source[i]['caption'] for i in indices] == captions
    assert [source.caption(i) for i in indices] == captions
  assert (len(source), source.name(56)) == (77, 'few: image 6')
  with pytest.raises(IndexError):
    source[77]


def test_the_fingerprint_depends_on_weights_and_lengths():
  found = {make(MIXTURE).fingerprint}
  for changes in {'weight': 2}, {'num': 8}:
    found.add(make(MIXTURE | {'few': MIXTURE['few'] | changes}).fingerprint)
  assert len(found) == 3


def test_held_out_images_are_those_of_the_parts_that_have_some():
  mixture = MIXTURE | {'held': section('d', 5, 1, held=True)}
  assert make(mixture).has_eval_split and len(make(mixture)) == 82
  assert {e['caption'][0] for e in make(mixture, 'eval')} == {'d'}
  assert not make(MIXTURE).has_eval_split
  mixture = {'a': section('a', 3, 1, eval_path='e'), 'b': section('b', 3, 1)}
  assert [e['caption'] for e in make(mixture, 'eval')] == ['e0', 'e1', 'e2']


@pytest.mark.parametrize(
  'change, key',
  [
    ({'weight': 0}, '.few'), ({'weight': True}, '.few'),
    ({'weight': '1'}, '.few'), ({'weight': float('inf')}, '.few'),
    ({'path': None}, '.few.path'),
    ({'size': 2}, '.few.size'), ({'split': 'eval'}, '.few.split'),
    ({'kind': 'mixture', 'mixture': {'x': section('x', 3, 1)}, 'path': None,
      'num': None}, '.few.kind'),
    ({'kind': 'fewer'}, '.few.kind'), ({'flop': 1}, '.few.flop'), (None, ''),
  ],
)  # fmt: skip
def test_a_section_that_is_wrong_is_named(change, key):
  few = None if change is None else MIXTURE['few'] | change
  mixture = None if few is None else MIXTURE | {'few': few}
  with pytest.raises(UsageError) as error:
    make(mixture)
  assert error.value.key == f'config.data.mixture{key}'


def test_a_name_that_messages_cannot_hold_is_refused():
  with pytest.raises(UsageError):
    make({'a: b': MIXTURE['few']})


def test_a_part_without_images_is_named():
  with pytest.raises(DataError, match='few'):
    make(MIXTURE | {'few': section('b', 0, 1)})


def test_parts_of_which_some_have_embeddings_are_refused():
  with pytest.raises(DataError, match='few'):
    make(MIXTURE | {'few': section('b', 7, 1, stored={'dim': 3})})


def test_bad_samples_of_a_part_are_the_mixtures_too(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  for i in range(4):
    Image.new('RGB', (8, 8)).save(tmp_path / f'{i}.png')
    (tmp_path / f'{i}.txt').write_text('' if i == 3 else 'an image')
  folder = {'kind': 'folder', 'path': str(tmp_path), 'max_bad': 1.0}
  mixture = {'a': section('a', 2, 1), 'f': folder | {'weight': 1}}
  source = make_source(kind='mixture', size=8, mixture=mixture)
  assert isinstance(source.parts[1], Checked)
  assert [name for name, _ in source.skipped] == ['f: 3.png']
  (tmp_path / '1.png').write_bytes(b'')
  assert source[3]['image'].shape == (8, 8, 3)
  assert source.bad.keys() == {'f: 3.png', 'f: 1.png'}


def test_a_part_may_move_but_its_weight_stays():
  def differ(**change):
    new = MIXTURE | {'few': MIXTURE['few'] | change}
    configs = [{'config': {'data': {'mixture': m}}} for m in (MIXTURE, new)]
    return differences(*configs)

  assert not differ(path='elsewhere') and differ(weight=2)
