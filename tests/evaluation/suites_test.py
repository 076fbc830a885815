"""Prompt lists, CLIP scores, the FID protocol, and the page that shows them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import evaluate
from imagen_jax.errors import DataError
from imagen_jax.evaluation import (
  charts,
  extractors,
  generation,
  report,
  scores,
  suites,
)
from imagen_jax.evaluation.prompts import read_prompts
from imagen_jax.worlds import suite as shapes_suite
from tests import tiny_clip

FILES = {
  'bench.csv': '\ufeffPrompt,Category\n"A cat, asleep.",Colors \n'
  'A "red" dog,Colors\n,Colors\nTwo birds,Counting\n',
  'parti.tsv': 'Prompt\tCategory\tChallenge\tNote\n'
  '"hi" on a sign\tText\tBasic\t-\nbond\tAbstract\tBasic\t-\n',
  'gen.jsonl': '{"tag": "two_object", "prompt": "a cat and a dog"}\n\n'
  '{"category": "mine", "prompt": "a cat"}\n{"prompt": "a fish"}\n',
  'mine.txt': 'a cat\n\n  two   dogs\n',
}
READ = {
  'bench.csv': [
    ('Colors', 'A cat, asleep.'),
    ('Colors', 'A "red" dog'),
    ('Counting', 'Two birds'),
  ],
  'parti.tsv': [('Text', '"hi" on a sign'), ('Abstract', 'bond')],
  'gen.jsonl': [
    ('two_object', 'a cat and a dog'),
    ('mine', 'a cat'),
    ('all', 'a fish'),
  ],
  'mine.txt': [('all', 'a cat'), ('all', 'two dogs')],
}


class Painter:
  """Stands for a cascade: paints items by a function of theirs."""

  def __init__(self, items, paint):
    self.items = {(item.prompt, item.index): item for item in items}
    self.paint = paint

  def sample(self, prompts, *, indices, **_):
    chosen = [self.items[p, i] for p in prompts for i in indices]
    return {'sr': np.stack([self.paint(item) for item in chosen])}


def finish(out, suite, paint, name=''):
  """Generates and scores a run without a model."""
  folder = out / suite.label / (name or 'run')
  items = suite.items()
  generation.open_run(folder, {'prompts': suite.digest()})
  generation.generate(
    Painter(items, paint),
    folder,
    items,
    seed=0,
    batch_size=4,
    judge=suite.judge,
  )
  found = suite.score(folder, generation.read_records(folder))
  note = {
    'run': str(folder.relative_to(out)),
    'model': '<my model>',
    'model_digest': '0',
    'date': '2022-05-23',
    'stages': {'base': {'steps': 1}},
    **suite.provenance(),
  }
  for key, value in found.items():
    scores.add_scores(out, key + (f'@{name}' if name else ''), value, note)
  return found


@pytest.mark.parametrize('name', FILES)
def test_peoples_prompt_files_are_read(name, tmp_path):
  path = tmp_path / name
  path.write_text(FILES[name], encoding='utf-8')
  assert read_prompts(path) == READ[name]


@pytest.mark.parametrize(
  'name, text, says',
  [
    ('a.csv', 'Text,Category\nx,y\n', 'has no column Prompt'),
    ('a.jsonl', '{"prompt": "a"}\n{"tag": "b"}\n', 'line 2'),
    ('a.jsonl', '[1]\n', 'line 1'),
    ('a.txt', '\n', 'holds no prompt'),
    ('a.pkl', 'x', 'is no list of prompts'),
    ('missing.txt', None, 'cannot be read'),
  ],
)
def test_broken_prompt_files_are_one_sentence(name, text, says, tmp_path):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(DataError, match=says):
    read_prompts(tmp_path / name)


def test_prompts_listed_twice_and_several_images():
  listed = (('a', 'x'), ('b', 'y'), ('a', 'x'))
  items = suites.Prompts('prompts', listed, 2).items()
  assert [(i.category, i.number, i.prompt, i.index) for i in items] == [
    ('a', 0, 'x', 0),
    ('a', 1, 'x', 1),
    ('b', 0, 'y', 0),
    ('b', 1, 'y', 1),
    ('a', 2, 'x', 2),
    ('a', 3, 'x', 3),
  ]


def test_the_clip_score_is_100_times_the_cosine():
  images = np.array([[3.0, 0], [0, 2.0], [1, 1]])
  texts = np.array([[5.0, 0], [0, -1.0], [1, 0]])
  found = suites.cosine_scores(images, texts)
  np.testing.assert_allclose(found, [100, 0, 100 / 2**0.5])


def test_clip_and_prompts_from_the_command_line(model, tmp_path, capsys):
  (tmp_path / 'p.csv').write_text(FILES['bench.csv'])
  tiny_clip.write(tmp_path / 'clip')
  args = ['--model', model, '--prompts', tmp_path / 'p.csv', '--stages', 'base']
  args += ['--sampler', 'ddim', '--steps', 1, '--guidance', 1]
  args += ['--out', tmp_path / 'r']
  run = lambda *more: evaluate.main([str(x) for x in [*args, *more]])
  assert run('--suite', 'prompts', '--num_images', 2) == 0
  assert run('--suite', 'clip', '--clip', tmp_path / 'clip') == 0
  found = json.loads((tmp_path / 'r/scores.json').read_text())
  assert found['prompts'] == {'Colors': {'n': 4}, 'Counting': {'n': 2}}
  assert list(found['clip']) == ['Colors', 'Counting', 'overall']
  assert found['clip']['overall']['n'] == 3
  assert len(found['provenance']['clip']['clip_sha256']) == 64
  page = (tmp_path / 'r/index.html').read_text()
  assert 'A cat, asleep.' in page and 'Counting' in page
  assert run('--suite', 'clip') == 2 and run('--suite', 'fid') == 2
  assert '--data DIR' in capsys.readouterr().err


@dataclasses.dataclass
class Images:
  """Real images of one colour each, with their captions."""

  size: int = 8

  def __len__(self):
    return 12

  def __getitem__(self, i):
    image = np.full((self.size, self.size, 3), 20 * i, np.uint8)
    return {'image': image, 'caption': f'grey {i // 2}'}


def colours(images):
  return images.reshape(len(images), -1, 3).mean(1) / 255 + 0.1


EYES = extractors.Extractor(colours, 'a' * 64, 'none')


def test_the_fid_protocol(tmp_path):
  words = lambda prompts: np.ones((len(prompts), 3), np.float32)
  clip = dataclasses.replace(EYES, digest='b' * 64, text=words)
  suite = suites.Fid(Images(), 10, 0, inception=EYES, clip=clip)
  captions = [item.prompt for item in suite.items()]
  assert len(captions) == 10 and set(captions) <= {
    f'grey {i}' for i in range(6)
  }
  assert len({(x.prompt, x.index) for x in suite.items()}) == 10
  grey = lambda item: np.full(
    (8, 8, 3), 40 * int(item.prompt[5:]) + 20 * item.index, np.uint8
  )
  near = finish(tmp_path, suite, grey, 'guidance=1')['fid']['all']
  assert near['n'] == 10 and near['n_real'] == 12
  assert near['frechet'] < 0.02 and near['precision'] == 1
  assert near['clip_score'] > 70
  # Images of another colour are far away, and the page shows the curve.
  red = lambda item: grey(item) // 2 + np.array([127, 0, 0], np.uint8)
  far = finish(tmp_path, suite, red, 'guidance=2')['fid']['all']
  assert far['frechet'] > 10 * near['frechet'] + 0.05
  assert far['precision'] < 0.5 and far['cmmd'] > near['cmmd']
  assert len(list(tmp_path.glob('fid/real-*.npy'))) == 2
  page = report.write(tmp_path).read_text()
  assert 'Fréchet distance against CLIP score' in page


def test_the_page_stands_alone(tmp_path):
  suite = suites.Shapes(('single', 'fill'), 2)
  paint = lambda item: shapes_suite.true_image(item, 256)
  finish(tmp_path, suite, paint)
  finish(tmp_path, suite, lambda item: paint(suite.items()[0]), 'steps=4')
  page = report.write(tmp_path).read_text()
  assert '<script' not in page and '<svg' in page
  assert not re.search(r'(?:src|href)="(?!data:)', page)
  assert '&lt;my model&gt;' in page and '<my model>' not in page
  for word in ('Confusions', 'shuffled', 'By steps'):
    assert word in page
  assert page.count('<figure class="yes">') >= 4


def test_a_report_without_scores_is_one_sentence(tmp_path):
  with pytest.raises(DataError, match='holds no scores yet'):
    report.write(tmp_path)
  (tmp_path / 'scores.json').write_text('[1]')
  with pytest.raises(DataError, match='scores.json'):
    report.write(tmp_path)


def test_a_lost_image_is_one_sentence(tmp_path):
  record = {'file': 'images/a/0.png'}
  with pytest.raises(DataError, match='run again'):
    generation.read_image(tmp_path, record)
  (tmp_path / 'images/a').mkdir(parents=True)
  Image.new('RGB', (4, 4)).save(tmp_path / record['file'])
  assert generation.read_image(tmp_path, record).shape == (4, 4, 3)


def test_ticks_enclose_and_are_round():
  assert charts._ticks(1, 8) == (0, 2, 4, 6, 8)
  for low, high in ((0.131, 0.1329), (-3, 250), (7.0, 7.0), (0.0, 0.0)):
    ticks = charts._ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and len(ticks) <= 6


def test_curves_over_words_and_numbers():
  line = [('a', [('ddpm', 0.5, (0.4, 0.6)), ('ddim', 0.7, None)])]
  generated = charts.curves(
    line, title='t', across='sampler', up='y', percent=True
  )
  assert 'ddpm' in generated and generated.count('<circle') == 2
