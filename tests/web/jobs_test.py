"""Jobs of the page: the images of sample.py, one job at a time."""

import numpy as np
import PIL.Image
import pytest

from imagen_jax.cli import sample
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import images
from imagen_jax.web import command, jobs, view
from imagen_jax.web.jobs import Job, Studio

PROMPT = 'a <red> circle'


@pytest.fixture
def studio(model, tmp_path):
  return Studio({'tiny': str(model)}, tmp_path / 'page')


def from_sample_py(model, folder, *flags):
  """(path, pixels) of an image of sample.py."""
  argv = ['--model', str(model), '--prompt', PROMPT, '--out', str(folder)]
  assert sample.main([*argv, *flags]) == 0
  (path,) = folder.glob('000_*.png')
  return path, np.asarray(PIL.Image.open(path))


def same_image(path, other):
  pixels = [np.asarray(PIL.Image.open(p)) for p in (path, other)]
  np.testing.assert_array_equal(*pixels)
  assert images.read_metadata(path) == images.read_metadata(other)


def test_a_job_gives_the_file_of_sample_py(studio, model, tmp_path):
  job = Job('tiny', prompt=PROMPT, seed=3, guidance=(2.5, None))
  *seen, last = studio.run(job)
  flags = '--seed', '3', '--guidance', '2.5,1'
  path, pixels = from_sample_py(model, tmp_path / 'cli', *flags)
  (made,) = last.paths
  same_image(made, path)
  np.testing.assert_array_equal(last.preview.images['sr1'][0], pixels)
  stages = [('base', 8), ('sr1', 16)]
  texts = [view.live(stages, each.preview) for each in (*seen, last)]
  assert [text.count('<img') for text in texts] == [2] * len(seen) + [1]
  # Jobs that nobody waits for any more do not keep others waiting.
  given_up = [studio.run(job) for _ in range(3)]
  for each in given_up:
    next(each)
    each.close()
  assert [each.paths for each in studio.run(job)][-1]


def test_a_prompt_is_shown_as_text():
  assert '&lt;red&gt;' in view.facts(Job('tiny', prompt=PROMPT), 0)
  cleared = Job('tiny', prompt=PROMPT, steps=(16, None))
  assert '16, default' in view.facts(cleared, 0)
  assert '&lt;red&gt;' in view.waiting(PROMPT)


def test_a_task_has_the_stages_that_it_needs(studio, model, tmp_path):
  names = lambda made, task: [s.name for s in made.cascade('m', task).stages]
  whole = Studio({'m': str(model)}, tmp_path)
  assert names(whole, 'inpaint') == ['base', 'sr1']
  assert names(whole, 'upsample') == ['sr1']
  with pytest.raises(UsageError):
    Studio({'m': str(model / 'base')}, tmp_path).cascade('m', 'upsample')


@pytest.mark.parametrize(
  'key, change',
  [
    ('num_images', {'num_images': 0}),
    ('num_images', {'num_images': jobs.MAX_IMAGES + 1}),
    ('seed', {'seed': -1}),
    ('steps', {'steps': (0, 0)}),
    ('negative_prompt', {'negative_prompt': 'x', 'guidance': (1, 1)}),
    ('image', {'task': 'image'}),
    ('image', {'task': 'upsample'}),
    ('mask', {'task': 'inpaint', 'image': 'a.png'}),
  ],
)
def test_impossible_jobs_are_refused(studio, key, change):
  with pytest.raises(UsageError) as caught:
    list(studio.run(Job('tiny', **change)))
  assert caught.value.key == key


def test_an_upload_that_is_no_image_is_refused(studio, tmp_path):
  whole = tmp_path / 'whole.png'
  PIL.Image.effect_noise((64, 64), 50).save(whole)
  for data in b'', b'text', whole.read_bytes()[:-900]:
    upload = tmp_path / 'upload'
    upload.write_bytes(data)
    for task in 'image', 'upsample':
      with pytest.raises(DataError):
        list(studio.run(Job('tiny', task=task, image=str(upload))))
    with pytest.raises(DataError):
      jobs.write_mask(tmp_path / 'mask.png', [data], (64, 64))


def test_a_mask_is_what_was_painted_on_any_layer(tmp_path):
  layers = []
  for left in 0, 8:
    layer = PIL.Image.new('RGBA', (16, 8))
    layer.paste('white', (left, 0, left + 2, 8))
    layer.save(tmp_path / f'{left}.png')
    layers.append((tmp_path / f'{left}.png').read_bytes())
  path = jobs.write_mask(tmp_path / 'new' / 'mask.png', layers, (16, 8))
  mask = np.asarray(images.open_image(path, 'L'))
  white = np.nonzero(mask[0] == 255)[0]
  assert white.tolist() == [0, 1, 8, 9] and set(mask.flat) == {0, 255}
  empty = tmp_path / 'empty.png'
  PIL.Image.new('RGBA', (16, 8)).save(empty)
  assert jobs.write_mask(tmp_path / 'm.png', [empty], (16, 8)) is None


def test_without_gradio_the_command_names_the_extra(monkeypatch, capsys):
  monkeypatch.setattr(command.importlib.util, 'find_spec', lambda name: None)
  assert command.main([]) == 2
  assert 'imagen_jax[web]' in capsys.readouterr().err


def test_models_of_the_same_name_are_told_apart():
  assert command._names(None) == {'demo': None}
  assert command._names(['a/m', 'b/m']) == {'m': 'a/m', 'b/m': 'b/m'}


@pytest.mark.slow
def test_jobs_from_images_give_the_files_of_sample_py(studio, model, tmp_path):
  image, mask = tmp_path / 'image.png', tmp_path / 'mask.png'
  PIL.Image.effect_noise((24, 24), 50).convert('RGB').save(image)
  PIL.Image.fromarray(np.eye(24) > 0).save(mask)
  image, mask = str(image), str(mask)
  for job, flags in (
    (
      Job('tiny', 'image', PROMPT, image=image, strength=0.5),
      ('--init_image', image, '--strength', '0.5'),
    ),
    (
      Job('tiny', 'inpaint', PROMPT, image=image, mask=mask),
      ('--init_image', image, '--mask', mask),
    ),
    (
      Job('tiny', 'upsample', PROMPT, image=image),
      ('--low_res', image, '--stages', 'sr1'),
    ),
  ):
    *_, last = studio.run(job)
    path, _ = from_sample_py(model, tmp_path / job.task, *flags)
    same_image(last.paths[0], path)
