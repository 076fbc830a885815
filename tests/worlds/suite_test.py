"""The shapes suite: prompts, the judge's accuracy, the control."""

from imagen_jax.evaluation import report
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.worlds.shapes import CATEGORIES, ShapesSource
from imagen_jax.worlds.suite import ShapesSuite
from tests.evaluation.runs import finish


def test_a_config_chooses_categories_in_the_suites_order():
  suite = ShapesSource.suite(EvalConfig(categories=('fill', 'pair'), num=2))
  assert suite.categories == ('pair', 'fill') and suite.num == 2
  whole = ShapesSource.suite(EvalConfig())
  assert whole.categories == CATEGORIES and whole.num == 300
  assert whole.digest() == suite.digest()  # so one may resume the other


def test_equal_prompts_get_different_images():
  found = ShapesSuite(('single',), 300).items()
  assert len({(item.prompt, item.index) for item in found}) == 300
  assert len({item.prompt for item in found}) < 300


def test_the_judge_is_scored_on_the_true_images(tmp_path):
  suite = ShapesSuite(('relation', 'fill'), 8)
  records = {
    (item.category, item.number): suite.judge(item, suite.true_image(item, 256))
    for item in suite.items()
  }
  found = suite.score(tmp_path, records)
  result, own = found['shapes'], found['judge']
  assert result['judge']['accuracy'] >= 0.9
  assert {c: result[c] for c in own} == own
  assert result['shuffled']['accuracy'] == 0
  fills = suite.confusions(records)['fill']
  assert sum(row[fill] for fill, row in fills.items()) >= 5


def test_images_of_another_prompt_are_wrong():
  suite = ShapesSuite(('pair',), 2)
  a, b = suite.items()
  kept = suite.judge(a, suite.true_image(b, 256))
  assert not kept['correct'] and kept['judge']


def test_the_report_marks_the_judges_accuracy(tmp_path):
  suite = ShapesSuite(('single', 'fill'), 2)
  finish(tmp_path, suite, lambda item: suite.true_image(item, 256))
  first = suite.items()[0]
  finish(tmp_path, suite, lambda item: suite.true_image(first, 256), 'steps=4')
  page = report.write(tmp_path).read_text()
  assert page.count('class="mark"') == 2
  assert page.count('class="control"') == 2
  assert 'fill: prompted, seen' in page
  assert page.count('<figure class="yes">') >= 4
