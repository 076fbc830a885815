"""The report page of an evaluation, and its charts."""

import re

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import DataError
from imagen_jax.evaluation import charts, generation, report
from imagen_jax.evaluation.prompts_suite import Prompts
from imagen_jax.evaluation.scores import accuracy
from imagen_jax.evaluation.suite import Suite, digest, number
from tests.evaluation.runs import finish


class Light(Suite):
  """Is the image light?"""

  label = 'light'
  reference = 'truth'
  controls = ('chance',)

  def heading(self):
    return 'Is it light?', 'Of <all> images.'

  def items(self):
    return number([('a', 'light'), ('a', 'dark'), ('b', 'light')])

  def digest(self):
    return digest('light')

  def judge(self, item, image):
    correct = bool(image.mean() > 127) == (item.prompt == 'light')
    return {'correct': correct, 'aspects': {'light': correct}}

  def score(self, folder, records):
    found = {
      name: accuracy(
        r['correct'] for r in records.values() if r['category'] == name
      )
      for name in 'ab'
    }
    truth = dict.fromkeys('ab', accuracy([True]))
    return {'light': found | {'chance': accuracy([False])}, 'truth': truth}

  def confusions(self, records):
    return {'tone': {'light': {'light': 2}, 'dark': {'light': 1}}}


def white(item):
  return np.full((8, 8, 3), 255, np.uint8)


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  out = tmp_path_factory.mktemp('report')
  for point in ('', 'steps=4', 'steps=8'):
    finish(out, Light(), white, point)
  return report.write(out).read_text()


def test_the_page_stands_alone(page):
  assert '<script' not in page and '<svg' in page
  assert not re.search(r'(?:src|href)="(?!data:)', page)
  assert '&lt;my model&gt;' in page and '<my model>' not in page
  assert '&lt;all&gt;' in page and '<all>' not in page


def test_the_page_shows_the_suites_heading_controls_and_confusions(page):
  for words in ('Is it light?', 'tone: prompted, seen', 'By steps'):
    assert words in page
  assert page.count('class="control"') == 1
  assert page.count('class="mark"') == 2  # the reference has no control
  # Two of three images are correct in the run's section; the sweep shows one
  # prompt per category for each of its two runs.
  assert page.count('<figure class="yes">') == 2 + 2 * 2
  assert page.count('<figure class="no">') == 1
  assert page.count('<h2>') == 2  # none of the reference


def test_an_interval_is_wilsons_around_the_end_of_its_bar():
  chart = charts.bars([charts.Bar('a', accuracy([True] * 15 + [False] * 5))])
  # The axis is 450 pixels from x = 120; Wilson's interval of 15 of 20.
  assert f'M{120 + 450 * 0.5313:.0f}' in re.sub(r'\.\d', '', chart)
  assert 'width="337.5"' in chart


def test_a_report_without_scores_is_a_data_error(tmp_path):
  with pytest.raises(DataError):
    report.write(tmp_path)
  (tmp_path / 'scores.json').write_text('[1]')
  with pytest.raises(DataError):
    report.write(tmp_path)


def test_a_damaged_section_is_a_data_error(tmp_path):
  finish(tmp_path, Prompts((('a', 'x'),), 1), white)
  report.write(tmp_path)
  section = tmp_path / 'prompts/run/section.json'
  section.write_text('{"format_version": 1, "title": "prompts"}')
  with pytest.raises(DataError):
    report.write(tmp_path)


def test_a_lost_image_is_a_data_error(tmp_path):
  record = {'file': 'images/a/0.png'}
  with pytest.raises(DataError):
    generation.read_image(tmp_path, record)
  (tmp_path / 'images/a').mkdir(parents=True)
  Image.new('RGB', (4, 4)).save(tmp_path / record['file'])
  assert generation.read_image(tmp_path, record).shape == (4, 4, 3)
  (tmp_path / 'run').mkdir()
  for name in '../images/a/0.png', str(tmp_path / record['file']):
    with pytest.raises(DataError):
      generation.read_image(tmp_path / 'run', {'file': name})


def test_ticks_enclose_and_are_round():
  assert charts._ticks(1.0, 8.0) == (0, 2, 4, 6, 8)
  for low, high in ((0.131, 0.1329), (-3.0, 250.0), (7.0, 7.0), (0.0, 0.0)):
    ticks = charts._ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and len(ticks) <= 6


def test_curves_place_words_evenly_and_percents_from_0_to_100():
  line = ('a', [('ddpm', 0.5, (0.4, 0.6)), ('ddim', 0.7, None)])
  chart = charts.curves([line], 't', ('sampler', 'y'), percent=True)
  assert 'ddpm' in chart and chart.count('<circle') == 2
  # 0 % is at y = 170, 100 % at y = 26.
  assert f'cy="{170 - 144 * 0.5:.1f}"' in chart
