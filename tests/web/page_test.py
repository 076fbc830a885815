"""The page in a real browser, with a tiny model."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from imagen_jax.cli import sample
from imagen_jax.io import images

pytest.importorskip('gradio')
api = pytest.importorskip('playwright.sync_api')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason='chromium is not installed'),
]
PROMPT, ENDLESS = 'a red circle', '900000'
SECONDS = 120_000  # milliseconds; a program may have to be compiled first
# Keeps the source of every image that is shown while sampling.
WATCH = """() => {
  window.seen = new Set();
  const note = () => document.querySelectorAll('#live img').forEach(
    img => window.seen.add(img.className + ' ' + img.src));
  new MutationObserver(note).observe(
    document.body, {subtree: true, childList: true, attributes: true});
}"""


@pytest.fixture(scope='module')
def server(model, tmp_path_factory):
  """The page's address."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'imagen_jax.web.command', '--model', model]
  log = tmp_path_factory.mktemp('server') / 'log'
  with log.open('w') as file:
    process = subprocess.Popen(
      [*map(str, command), '--port', str(port)], stdout=file, stderr=file
    )
  try:
    url = f'http://127.0.0.1:{port}'
    for _ in range(600):
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', port), 1).close()
        break
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.2)
        pytest.fail(log.read_text())
    yield url
    assert 'Traceback' not in log.read_text()
  finally:
    process.terminate()
    process.wait()


@pytest.fixture(scope='module')
def browser():
  with api.sync_playwright() as play:
    browser = play.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox']
    )
    yield browser
    browser.close()


@pytest.fixture
def tab(server, browser):
  """Opens tabs."""
  with contextlib.ExitStack() as stack:

    def tab():
      page = browser.new_page()
      page.set_default_timeout(SECONDS)
      stack.callback(page.close)
      page.goto(server)
      api.expect(page.get_by_label('Steps, sr1')).to_have_value('2')
      return page

    yield tab


def generate(page, prompt=PROMPT, **fields):
  for label, value in fields.items():
    page.get_by_label(label.replace('_', ', ')).fill(value)
  page.locator('#prompt textarea').fill(prompt)
  page.locator('#go').click()


def thumbnails(page):
  return page.locator('#gallery .thumbnail-item')


def expect_images(page, number):
  api.expect(thumbnails(page)).to_have_count(number, timeout=SECONDS)


def saved(page, path, number=0):
  """Downloads an image of the gallery."""
  thumbnails(page).nth(number).click()
  # Another image's address may still be there.
  page.wait_for_timeout(1000)
  with page.expect_download() as download:
    page.locator('#save').click()
  download.value.save_as(path)
  return path


def pixels(path):
  return np.asarray(PIL.Image.open(path))


def expect_problem(page, *words):
  problem = page.locator('#live .problem')
  api.expect(problem).to_contain_text(words[0], timeout=SECONDS)
  text = problem.inner_text()
  assert all(word in text for word in words) and '/' not in text


def test_an_image_is_watched_and_is_that_of_sample_py(tab, model, tmp_path):
  page = tab()
  requests = []
  page.on('request', lambda request: requests.append(request.url))
  page.evaluate(WATCH)
  generate(page, Seed='5', Steps_base='7', Guidance_base='3')
  expect_images(page, 1)
  kinds = [text.split()[0] for text in page.evaluate('[...window.seen]')]
  # The steps of both stages, some of which may be too short to be seen.
  assert kinds.count('z') >= 4 and kinds.count('x') >= 4
  assert kinds.count('image') == 1
  made = saved(page, tmp_path / 'page.png')
  flags = ['--prompt', PROMPT, '--seed', '5', '--steps', '7,2']
  flags += ['--guidance', '3,1', '--out', str(tmp_path / 'cli')]
  assert sample.main(['--model', str(model), *flags]) == 0
  (other,) = (tmp_path / 'cli').glob('000_*.png')
  np.testing.assert_array_equal(pixels(made), pixels(other))
  records = [images.read_metadata(path) for path in (made, other)]
  assert records[1].pop('devices') != records[0].pop('devices')  # the tests' 8
  assert records[0] == records[1]
  own = re.compile(r'(http://127\.0\.0\.1:\d+/|data:|blob:)')
  assert [url for url in requests if not own.match(url)] == []


def test_an_image_is_made_again_and_varied(tab, tmp_path):
  page = tab()
  generate(page, Images='2')
  expect_images(page, 2)
  one = pixels(saved(page, tmp_path / 'one.png', 1))
  assert 'image 2 of 2' in page.locator('#facts').inner_text()
  page.locator('#again').click()
  expect_images(page, 4)
  again = pixels(saved(page, tmp_path / 'again.png', 1))
  np.testing.assert_array_equal(one, again)
  page.locator('#vary').click()
  expect_images(page, 8)
  record = images.read_metadata(saved(page, tmp_path / 'varied.png', 3))
  assert (record['prompt'], record['index']) == (PROMPT, 3)
  assert record['seed'] != 0


def test_twenty_tabs_each_get_their_image(tab, tmp_path):
  pages = [tab() for _ in range(20)]
  for i, page in enumerate(pages):
    generate(page, Seed=str(i))
  for i, page in enumerate(pages):
    page.bring_to_front()
    expect_images(page, 1)
    record = images.read_metadata(saved(page, tmp_path / f'{i}.png'))
    assert record['seed'] == i


def test_stop_ends_a_job(tab):
  page = tab()
  generate(page, Steps_base=ENDLESS)
  page.locator('#live img').first.wait_for()
  page.locator('#stop').click()
  api.expect(page.locator('#live')).to_contain_text('Stopped')
  generate(page, Steps_base='3')
  expect_images(page, 1)


def test_a_closed_tab_ends_its_job(tab):
  page, other = tab(), tab()
  generate(page, Steps_base=ENDLESS)
  page.locator('#live img').first.wait_for()
  generate(other)
  page.close()
  expect_images(other, 1)


def test_a_mistake_is_told_in_a_sentence(tab, tmp_path):
  page = tab()
  generate(page, Images='999')
  expect_problem(page, '999')
  generate(page, Images='1', Guidance_base='-1')
  expect_problem(page, 'guidance')
  expect_images(page, 0)


def test_uploads_are_read_by_the_one_rule(tab, tmp_path):
  whole = tmp_path / 'whole.png'
  PIL.Image.effect_noise((256, 256), 50).save(whole)
  damaged = tmp_path / 'damaged.png'
  damaged.write_bytes(whole.read_bytes()[:-9000])
  text, huge = tmp_path / 'text.png', tmp_path / 'huge.png'
  text.write_text('no image')
  huge.write_bytes(whole.read_bytes() + b'\0' * 21 * 2**20)
  page = tab()
  page.locator('#task').get_by_label('Image').check()
  upload = page.locator('#image input[type=file]')
  for file, word in (text, 'text.png'), (damaged, 'damaged.png'):
    upload.set_input_files(file)
    page.locator('#image img').wait_for()
    generate(page)
    expect_problem(page, word)
    page.locator('#image').get_by_label('Remove Image').click()
  upload.set_input_files(huge)
  api.expect(page.locator('.toast-message-text')).to_contain_text('huge.png')
  upload.set_input_files(whole)
  page.locator('#image img').wait_for()
  generate(page)
  expect_images(page, 1)


def test_what_is_painted_is_inpainted_and_the_rest_kept(tab, tmp_path):
  image = tmp_path / 'image.png'
  colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  whole = colours.repeat(32, 0).repeat(32, 1)
  PIL.Image.fromarray(whole).save(image)
  page = tab()
  page.locator('#task').get_by_label('Inpaint').check()
  page.locator('#painting input[type=file]').first.set_input_files(image)
  canvas = page.locator('#painting canvas').first
  canvas.wait_for()
  page.wait_for_timeout(3000)
  box = canvas.bounding_box()
  middle = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
  page.mouse.move(*middle)
  page.mouse.down()
  for i in range(1, 40):
    page.mouse.move(middle[0] + i, middle[1] + i % 7)
  page.mouse.up()
  page.wait_for_timeout(1000)
  generate(page)
  expect_images(page, 1)
  made = saved(page, tmp_path / 'made.png')
  mask = images.open_image(images.read_metadata(made)['mask'], 'L')
  kept = images.to_mask(mask, 16, 16)[..., 0] == 0
  assert 0.3 < kept.mean() < 1
  np.testing.assert_array_equal(pixels(made)[kept], colours[kept])


def test_the_fields_of_a_stage_outlive_a_change_of_task(tab):
  page = tab()
  base, sr1 = (page.get_by_label(f'Steps, {name}') for name in ('base', 'sr1'))
  base.fill('7')
  sr1.fill('5')
  page.locator('#task').get_by_label('Upsample').check()
  api.expect(base).to_have_count(0)
  api.expect(sr1).to_have_value('5')
  sr1.fill('6')
  page.locator('#task').get_by_label('Text').check()
  api.expect(base).to_have_value('7')
  api.expect(sr1).to_have_value('6')
