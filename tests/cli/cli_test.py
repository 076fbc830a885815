"""The commands as users call them: files, records, one-sentence errors."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import imagen_jax
from imagen_jax.cli import (
  evaluate,
  export,
  output,
  plan,
  prepare,
  sample,
  train,
)
from imagen_jax.cli.configs import load_config
from imagen_jax.data import sources
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError
from imagen_jax.io import images as image_io
from imagen_jax.io import model_folder
from imagen_jax.io.checkpoint import Checkpoints
from tests import tiny_model

PROMPT = 'a red circle above a blue square'


def run(main, *argv):
  return main([str(word) for word in argv])


@pytest.fixture(scope='module')
def generated(model, tmp_path_factory):
  out = tmp_path_factory.mktemp('out')
  assert (
    run(sample.main, '--prompt', PROMPT, '--model', model, '--out', out) == 0
  )
  return out


def test_sample_writes_an_image_and_a_grid(generated):
  names = sorted(path.name for path in generated.iterdir())
  assert names == [f'000_{PROMPT.replace(" ", "-")}.png', 'grid_000.png']
  assert Image.open(generated / 'grid_000.png').width >= 256


def test_an_image_records_how_it_was_made(generated, model):
  record = image_io.read_metadata(next(generated.glob('000*')))
  assert record['prompt'] == PROMPT and record['seed'] == 0
  assert record['stages']['base']['steps'] == 3
  assert record['stages']['sr1']['aug_level'] == 0.1
  keys = 'index batch_size devices dtype jax model_digest version'.split()
  assert set(keys) <= record.keys()


def test_from_image_generates_the_same_image_again(model, tmp_path):
  args = ['--model', model, '--out', tmp_path, '--num_images', 3, '--seed', 9]
  run(sample.main, '--prompt', PROMPT, *args, '--steps', '4,1')
  third = next(tmp_path.glob('002*'))
  assert run(sample.main, '--from_image', third, '--out', tmp_path) == 0
  again = next(tmp_path.glob('003*'))
  np.testing.assert_array_equal(Image.open(third), Image.open(again))


def test_from_image_repeats_every_option_of_guidance(model, tmp_path):
  weak = tiny_model.write_weak(tmp_path / 'weak', model)
  args = ['--model', model, '--out', tmp_path / 'out', '--prompt', PROMPT]
  args += ['--stages', 'base', '--dtype', 'float32', '--guidance', 3]
  assert run(sample.main, *args) == 0
  args += ['--guidance_schedule', '0:1:2', '--guidance_interval=-9:9']
  args += ['--guidance_rescale', 0.5, '--apg_eta', 0.5, '--apg_momentum', -0.5]
  args += ['--apg_norm', 'none']
  args += ['--weak_model', weak, '--autoguidance', 2, '--sampler', 'dpmpp_sde']
  assert run(sample.main, *args, '--negative_prompt', 'a star') == 0
  plain, first = sorted((tmp_path / 'out').glob('00*'))
  record = image_io.read_metadata(first)
  assert record['negative_prompt'] == 'a star'
  assert record['stages']['base']['guidance_schedule'] == [0, 1, 2]
  assert record['stages']['base']['apg_norm'] == 'none'
  out = ['--from_image', first, '--out', tmp_path / 'again']
  assert run(sample.main, *out) == 0
  again = next((tmp_path / 'again').glob('00*'))
  np.testing.assert_array_equal(Image.open(first), Image.open(again))
  assert (np.asarray(Image.open(plain)) != Image.open(first)).any()


def test_nothing_is_overwritten(generated, model, tmp_path):
  out = shutil.copytree(generated, tmp_path / 'out')
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  run(sample.main, '--prompt', PROMPT, '--model', model, '--out', out)
  after = {p.name: p.read_bytes() for p in out.iterdir()}
  assert before.items() <= after.items() and len(after) == 4


def test_two_commands_with_one_folder_take_turns(tmp_path, monkeypatch):
  records, black = [{'prompt': PROMPT}], np.zeros((1, 8, 8, 3), np.uint8)

  def write():
    with output.Output(tmp_path, grid=True) as out:
      out.of(records)(0, black)

  save, others = image_io.save_png, []

  def interrupted(path, image, record):
    """Another command writes between the choice of a number and its use."""
    if len(others) < 2 and threading.current_thread() not in others:
      others.append(threading.Thread(target=write))
      others[-1].start()
      others[-1].join(0.3)
    save(path, image, record)

  monkeypatch.setattr(image_io, 'save_png', interrupted)
  write()
  for other in others:
    other.join()
  names = sorted(path.name for path in tmp_path.iterdir())
  slug = 'a-red-circle-above-a-blue-square'
  assert names == [
    *(f'{n:03d}_{slug}.png' for n in range(3)),
    *(f'grid_{n:03d}.png' for n in range(3)),
  ]


def test_every_prompt_of_a_file_is_sampled_with_the_named_stages(
  model, tmp_path
):
  file = tmp_path / 'prompts.txt'
  # As an editor on Windows writes it; U+2028 ends no line.
  file.write_bytes('\ufeffa red star\r\n\r\na\u2028blue heart\r\n'.encode())
  args = ['--model', model, '--out', tmp_path, '--stages', 'base']
  assert run(sample.main, '--prompts', file, *args) == 0
  images = sorted(tmp_path.glob('00*.png'))
  assert [image.name for image in images] == [
    '000_a-red-star.png',
    '001_a-blue-heart.png',
  ]
  prompts = [image_io.read_metadata(image)['prompt'] for image in images]
  assert prompts == ['a red star', 'a\u2028blue heart']
  assert Image.open(images[0]).size == (8, 8)


@pytest.mark.parametrize(
  'size, generated', [((40, 30), (20, 16)), ((9, 9), (16, 16))]
)
def test_a_later_stage_upsamples_a_given_image(
  model, tmp_path, size, generated
):
  Image.new('RGB', size, 'orange').save(tmp_path / 'mine.png')
  args = ['--model', model, '--out', tmp_path / 'out', '--stages', 'sr1']
  args += ['--prompt', PROMPT, '--low_res', tmp_path / 'mine.png']
  assert run(sample.main, *args) == 0
  assert Image.open(next(tmp_path.glob('out/000*'))).size == generated


def test_only_the_masked_part_of_a_given_image_is_inpainted(model, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  mask = np.zeros((8, 8), np.uint8)
  mask[2:6, 3:8] = 255
  Image.fromarray(pixels).save(tmp_path / 'mine.png')
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  args = ['--model', model, '--stages', 'base', '--prompt', PROMPT]
  args += ['--init_image', tmp_path / 'mine.png', '--out', tmp_path / 'out']
  assert run(sample.main, *args, '--mask', tmp_path / 'mask.png') == 0
  assert run(sample.main, *args, '--strength', '0.2') == 0
  painted, near = (
    np.asarray(Image.open(path)) for path in sorted(tmp_path.glob('out/0*'))
  )
  np.testing.assert_array_equal(painted[mask == 0], pixels[mask == 0])
  assert (painted != pixels)[mask == 255].mean() > 0.9
  assert (near != pixels).mean() > 0.5


@pytest.mark.parametrize(
  'flag, stage, side', [('init_image', 'base', 8), ('low_res', 'sr1', 16)]
)
@pytest.mark.parametrize('size, noted', [((40, 32), 0), ((50, 30), 1)])
def test_the_crop_of_a_given_image_is_noted(
  model, tmp_path, capsys, flag, stage, side, size, noted
):
  Image.new('RGB', size).save(tmp_path / 'mine.png')
  args = ['--model', model, '--out', tmp_path / 'out', '--stages', stage]
  args += ['--prompt', PROMPT, f'--{flag}', tmp_path / 'mine.png']
  assert run(sample.main, *args, '--steps', 1) == 0
  assert capsys.readouterr().err.count('mine.png') == noted
  assert Image.open(next(tmp_path.glob('out/000*'))).height == side


def test_an_image_below_the_low_resolution_is_refused(model, tmp_path):
  Image.new('RGB', (40, 6), 'orange').save(tmp_path / 'mine.png')
  args = ['--model', model, '--out', tmp_path / 'out', '--stages', 'sr1']
  args += ['--prompt', PROMPT, '--low_res', tmp_path / 'mine.png']
  assert run(sample.main, *args) == 3


def test_long_empty_and_unknown_prompts_get_a_note_each(
  model, tmp_path, capsys
):
  file = tmp_path / 'prompts.txt'
  file.write_text(f'{PROMPT} and {PROMPT} and {PROMPT}\na zebra\n')
  args = ['--model', model, '--out', tmp_path, '--stages', 'base']
  run(sample.main, '--prompts', file, *args)
  run(sample.main, '--prompt', '', *args)
  notes = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('note: ')
  ]
  assert notes[0].count(PROMPT[:20]) == 1 and '12' in notes[0]
  assert 'zebra' in notes[1]
  assert 'unconditional' in notes[2]
  assert len(notes) == 3


def test_sampling_does_without_the_source_that_trained_the_model(
  model, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sources.KINDS, 'shapes', 'deleted_module:ShapesSource')
  args = ['--model', model, '--out', tmp_path, '--stages', 'base']
  assert run(sample.main, '--prompt', 'a zebra', *args) == 0
  assert 'zebra' not in capsys.readouterr().err


def test_a_format_that_is_not_installed_is_skipped(
  model, tmp_path, monkeypatch
):
  gone = ('imagen_jax.gone.command_line', 'imagen_jax.cli.gone')
  monkeypatch.setattr(sample, 'FORMATS', gone)
  args = ['--model', model, '--out', tmp_path, '--stages', 'base']
  assert run(sample.main, '--prompt', PROMPT, *args) == 0
  assert run(sample.main, '--prompt', PROMPT, '--style_prompt', 'x') == 2


@pytest.mark.parametrize('below', ['file', 'file/sub'])
@pytest.mark.parametrize(
  'command, argv',
  [
    (sample, ['--prompt', 'x', '--out']),
    (evaluate, ['--out']),
    (export, ['--workdir', 'nowhere', '--out']),
    (prepare, ['--source', 'shapes', '--size', 8, '--num', 2, '--out']),
    (train, ['--config', 'shapes_base', '--dry_run', '--workdir']),
    (
      train,
      ['--config=folder64', '--workdir=w', '--config.train.checkpoint_dir'],
    ),
  ],
)
def test_an_output_folder_that_cannot_be_made_is_refused_at_once(
  tmp_path, monkeypatch, capsys, command, argv, below
):
  (tmp_path / 'file').touch()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('imagen_jax.io.model_folder.find_stages', None)
  assert run(command.main, *argv, below) == 2
  assert argv[-1] in capsys.readouterr().err
  assert os.listdir() == ['file']


def test_home_is_known_to_every_flag_and_config(model, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'model').symlink_to(model)
  args = ['--stages=base', '--model=~/model', '--out=~/images']
  assert run(sample.main, '--prompt', 'x', *args) == 0
  assert sorted(os.listdir()) == ['images', 'model']
  assert len(imagen_jax.load('~/model').stages) == 2
  (tmp_path / 'mine.py').write_text(
    'from imagen_jax.configs import folder64\n'
    'def get_config():\n'
    '  config = folder64.get_config()\n'
    "  config.text.path = '~/text'\n"
    '  return config\n'
  )
  config = load_config('./mine.py', ['data.path=~/images'])
  assert config.text.path == str(tmp_path / 'text')
  assert config.data.path == str(tmp_path / 'images')
  with pytest.raises(DataError, match=f'{tmp_path}/images'):
    make_source(kind='folder', size=8, path='~/images')


@pytest.mark.parametrize(
  'flag, argv',
  [
    ('seed', ['--from_image', '000.png', '--seed', '3']),
    ('steps', ['--from_image', '000.png', '--steps', '3']),
    ('num_images', ['--from_image', '000.png', '--num_images', '2']),
    # The default, which is not what the image has.
    ('batch_size', ['--from_image', '000.png', '--batch_size', '1']),
    ('num_images', ['--from_image', '000.png', '--num_images=1']),
    ('dtype', ['--from_image', '000.png', '--dtype', 'auto']),
    ('strength', ['--prompt', PROMPT, '--strength', '0.5']),
    ('weak_model', ['--prompt', PROMPT, '--weak_model', 'model']),
    (
      'negative_prompt',
      ['--prompt', PROMPT, '--negative_prompt', 'x', '--guidance', '1'],
    ),
    ('mask', ['--prompt', PROMPT, '--mask', 'mask.png']),
    ('aug_level', ['--prompt', PROMPT, '--stages', 'base', '--aug_level', '1']),
    ('style_prompt', ['--prompt', PROMPT, '--style_prompt', 'blue']),
  ],
)
def test_a_flag_without_effect_is_refused(
  generated, model, tmp_path, capsys, flag, argv
):
  first = next(generated.glob('000*'))
  Image.new('L', (8, 8)).save(tmp_path / 'mask.png')
  files = {'000.png': first, 'mask.png': tmp_path / 'mask.png', 'model': model}
  argv = [files.get(word, word) for word in argv]
  out = tmp_path / 'out'
  assert run(sample.main, *argv, '--model', model, '--out', out) == 2
  assert f'--{flag}' in capsys.readouterr().err
  assert not out.exists()


@pytest.mark.parametrize('threshold', ['dynamic', 'static', 'none'])
def test_an_image_that_is_no_number_is_an_error_and_not_written(
  model, tmp_path, capsys, threshold
):
  args = ['--model', model, '--out', tmp_path / 'out', '--prompt', PROMPT]
  args += ['--threshold', threshold, '--guidance']
  assert run(sample.main, *args, '3e38,1') == 5
  assert 'base' in capsys.readouterr().err
  for text in ('inf', 'nan', '1e39'):
    assert run(sample.main, *args, text) == 2
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'error, code', [(KeyboardInterrupt, 130), (OSError, 2)]
)
def test_what_is_finished_before_an_error_is_kept(
  model, tmp_path, monkeypatch, capsys, error, code
):
  save, saved = image_io.save_png, []

  def stops_at_the_third(path, *args):
    if len(saved) == 2:
      raise error(errno.ENOSPC, 'full') if error is OSError else error
    saved.append(str(path))
    save(path, *args)

  monkeypatch.setattr(image_io, 'save_png', stops_at_the_third)
  args = ['--model', model, '--out', tmp_path, '--num_images', 4]
  args += ['--batch_size', 1, '--prompt', PROMPT]
  assert run(sample.main, *args) == code
  assert capsys.readouterr().out.split() == saved
  assert sorted(map(str, tmp_path.iterdir())) == saved
  whole = np.asarray(Image.open(saved[1]))
  monkeypatch.undo()
  assert run(sample.main, *args) == 0
  again = np.asarray(Image.open(next(tmp_path.glob('003_*'))))
  np.testing.assert_array_equal(whole, again)


def test_the_grid_of_steps_is_chosen_and_recorded(model, tmp_path):
  args = ['--model', model, '--out', tmp_path, '--stages', 'base']
  for grid in ('time', 'logsnr'):
    assert run(sample.main, '--prompt', PROMPT, *args, '--grid', grid) == 0
  paths = sorted(tmp_path.glob('00*.png'))
  records = [image_io.read_metadata(path) for path in paths]
  grids = [record['stages']['base']['grid'] for record in records]
  assert grids == ['time', 'logsnr']
  assert (np.asarray(Image.open(paths[0])) != Image.open(paths[1])).any()


def break_weights(model):
  path = model / 'sr1' / 'weights.safetensors'
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def remove_weights(model):
  (model / 'sr1' / 'weights.safetensors').unlink()


def unchain(model):
  path = model / 'sr1' / 'stage.json'
  record = json.loads(path.read_text())
  record['config']['stage']['low_resolution'] = 4
  record['low_resolution'] = 4
  path.write_text(json.dumps(record))


@pytest.mark.parametrize(
  'breaking, argv, code, key',
  [
    (None, [], 2, '--prompt'),
    (None, ['--prompt', 'x', '--steps', '0'], 2, '--steps'),
    (None, ['--prompt', 'x', '--steps', 'many'], 2, '--steps'),
    (None, ['--prompt', 'x', '--steps', '1,2,3'], 2, '--steps'),
    (None, ['--promt', 'x'], 2, '--prompt'),
    (None, ['--prompt', 'x', '--stages', 'base,sr9'], 2, 'sr9'),
    (None, ['--prompt', 'x', '--dtype', 'int4'], 2, 'int4'),
    (None, ['--prompt', 'x', '--num_images', '0'], 2, '--num_images'),
    (None, ['--prompt', 'x', '--batch_size', '0'], 2, '--batch_size'),
    (None, ['--prompt', 'x', '--seed', '-3'], 2, '--seed'),
    (None, ['--prompt', 'x', '--low_res', 'a.png'], 2, '--low_res'),
    (None, ['--prompts', 'nowhere.txt'], 3, 'nowhere.txt'),
    (None, ['--from_image', 'nowhere.png'], 3, 'nowhere.png'),
    (shutil.rmtree, ['--prompt', 'x'], 4, 'm'),
    (remove_weights, ['--prompt', 'x'], 4, 'weights.safetensors'),
    (lambda m: shutil.rmtree(m / 'text'), ['--prompt', 'x'], 4, 'text'),
    (break_weights, ['--prompt', 'x'], 4, 'weights.safetensors'),
    (unchain, ['--prompt', 'x'], 4, 'sr1'),
  ],
)
def test_a_users_mistake_is_one_sentence(
  model, tmp_path, capsys, breaking, argv, code, key
):
  if breaking is not None:
    model = shutil.copytree(model, tmp_path / 'm')
    # Let the copy use no encoder but its own.
    for name in ('base', 'sr1'):
      path = model / name / 'stage.json'
      record = json.loads(path.read_text())
      record['config']['text']['path'] = ''
      path.write_text(json.dumps(record))
    breaking(model)
  out = tmp_path / 'out'
  assert run(sample.main, *argv, '--model', model, '--out', out) == code
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and key in error
  assert not out.exists() or not list(out.iterdir())


def test_a_png_without_our_metadata_cannot_be_repeated(tmp_path):
  Image.new('RGB', (8, 8)).save(tmp_path / 'x.png')
  assert run(sample.main, '--from_image', tmp_path / 'x.png') == 3


SAMPLING = {'sampler': 'ddpm', 'steps': 1}
EDITS = {
  'seed': ['7', 7.5, True, -1, 2**32, None],
  'index': [-1, 10**12, '0'],
  'prompt': [None, ['a'], 3, 'a\ud800'],
  'batch_size': ['4', 0, 10**9],
  'model': [3, 'a\0b'],
  'dtype': [32, 'int4'],
  'mask': [['a']],
  'negative_prompt': [3],
  'stages': [
    {}, [], 'base', {'base': None}, {'nowhere': SAMPLING},
    *({'base': SAMPLING | {key: value}} for key, value in [
      ('steps', '8'), ('steps', -1), ('steps', 1.5), ('guidance', 'x'),
      ('guidance', float('nan')), ('sampler', 1), ('sampler', 'euler'),
      ('guidance_interval', [3, -3]), ('apg_norm', 'x'), ('steps', 'none'),
    ]),
  ],
}  # fmt: skip


@pytest.mark.parametrize(
  'key, value', [(key, value) for key in EDITS for value in EDITS[key]]
)
def test_an_edited_record_is_one_sentence(
  generated, model, tmp_path, capsys, key, value
):
  first = next(generated.glob('000*'))
  record = image_io.read_metadata(first) | {'model': str(model), key: value}
  info = PngImagePlugin.PngInfo()
  info.add_text('imagen_jax', json.dumps(record))
  Image.open(first).save(tmp_path / 'x.png', pnginfo=info)
  args = ['--from_image', tmp_path / 'x.png', '--out', tmp_path / 'out']
  assert run(sample.main, *args) == 3
  assert 'x.png' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'text', ['{"prompt": "a", seed: 3}', '[1]', '[' * 9999]
)
def test_a_record_that_is_no_json_object_is_one_sentence(tmp_path, text):
  info = PngImagePlugin.PngInfo()
  info.add_text('imagen_jax', text)
  Image.new('RGB', (8, 8)).save(tmp_path / 'x.png', pnginfo=info)
  assert run(sample.main, '--from_image', tmp_path / 'x.png') == 3


@pytest.mark.parametrize(
  'section, key, value',
  [
    ('stage', 'schedule', None),
    ('stage', 'schedule', {'kind': 'x'}),
    ('stage', 'net', tiny_model.UNET),
    ('stage', 'sampling', {'guidance': 'x'}),
    ('stage', 'sampling', {'steps': 0}),
    ('stage', 'cond_drop', 'x'),
    ('stage', 'resolution', 10**12),
    ('stage', 'resolution', -8),
    ('data', 'kind', 3),
    ('text', 'path', 3),
  ],
)
def test_an_edited_stage_is_the_model_s_fault(
  model, tmp_path, capsys, section, key, value
):
  shutil.copytree(model, tmp_path / 'm')
  file = tmp_path / 'm' / 'base' / 'stage.json'
  record = json.loads(file.read_text())
  record['config'][section][key] = value
  file.write_text(json.dumps(record))
  args = ['--prompt', PROMPT, '--model', tmp_path / 'm', '--stages', 'base']
  assert run(sample.main, *args, '--out', tmp_path / 'out') == 4
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and 'm/base' in error


@pytest.mark.parametrize(
  ('file', 'code'), [('text/spiece.model', 4), ('text/model.safetensors', 4)]
)
def test_a_folder_or_a_dead_link_for_a_file_is_one_sentence(
  model, tmp_path, file, code
):
  shutil.copytree(model, tmp_path / 'm')
  path = tmp_path / 'm' / file
  args = ['--prompt', PROMPT, '--model', tmp_path / 'm', '--stages', 'base']
  args += ['--out', tmp_path / 'out']
  path.unlink()
  path.symlink_to('nowhere')
  assert run(sample.main, *args) == code
  path.unlink()
  path.mkdir()
  assert run(sample.main, *args) == code


@pytest.mark.parametrize(
  ('flag', 'value'),
  [
    ('out', ''),
    ('model', ''),
    ('prompts', ''),
    ('stages', ''),
    ('stages', 'base,base'),
    ('stages', 'sr1,base'),
    ('batch_size', 10**9),
    ('num_images', 10**9),
  ],
)
def test_what_is_empty_doubled_or_endless_is_refused(
  model, tmp_path, monkeypatch, capsys, flag, value
):
  monkeypatch.chdir(tmp_path)
  args = {'prompt': PROMPT, 'model': model, 'out': 'out', flag: value}
  if flag == 'prompts':
    del args['prompt']
  argv = [word for key, v in args.items() for word in (f'--{key}', v)]
  assert run(sample.main, *argv) == 2
  assert capsys.readouterr().err.startswith('error: ')
  assert not list(tmp_path.iterdir())


def test_a_file_with_null_bytes_is_no_list_of_prompts(model, tmp_path):
  file = tmp_path / 'prompts.txt'
  file.write_bytes('a red circle\n'.encode('utf-16-le'))
  args = ['--model', model, '--stages', 'base', '--out', tmp_path / 'out']
  assert run(sample.main, '--prompts', file, *args) == 3


def test_repeated_prompts_and_long_words_are_noted_shortly(
  model, tmp_path, capsys
):
  file = tmp_path / 'prompts.txt'
  file.write_text(f'{PROMPT}\n{"x" * 9999}\n{PROMPT}\n')
  args = ['--model', model, '--stages', 'base', '--out', tmp_path / 'out']
  assert run(sample.main, '--prompts', file, *args) == 0
  notes = capsys.readouterr().err
  assert '1 prompts repeat' in notes and 'x' * 30 in notes
  assert len(notes) < 2000


@pytest.fixture(scope='module')
def workdir(model, tmp_path_factory):
  """A workdir that train.py made, with its config file."""
  folder = tmp_path_factory.mktemp('train')
  text = repr(tiny_model.config(ema_lengths=(0.05, 0.1)).to_dict())
  (folder / 'tiny.py').write_text(
    'from ml_collections import ConfigDict\n'
    f'def get_config():\n  return ConfigDict({text})\n'
  )
  assert run(train.main, *train_args(folder, model)) == 0
  return folder


def train_args(folder, model, *more, workdir='base'):
  return [
    '--config',
    folder / 'tiny.py',
    '--workdir',
    folder / workdir,
    f'--config.text.path={model / "text"}',
    '--config.train.num_steps',
    '2',
    *more,
  ]


@pytest.mark.parametrize(
  'more, code, key',
  [
    (['--config.train.num_step=3'], 2, 'train.num_steps'),
    (['--config.train.batch_size=many'], 2, '--config.train.batch_size'),
    (['--config.train.batch_size=9'], 2, '--config.train.batch_size'),
    (['--config.seed=5'], 2, 'seed'),
    (['--config.data.kind=tfd'], 2, '--config.data.kind'),
    (['--config.data.eval_path=more'], 2, '--config.data.eval_path'),
    (['--config.train.log_to=tensorbord'], 2, '--config.train.log_to'),
    (['--config.data.max_bad=0.5'], 2, '--config.data.max_bad=0.01'),
    (['--config.text.path=/nowhere'], 4, '/nowhere'),
    (['--config.stage.name=a/b'], 2, 'stage.name'),
    (['--config.train.batch_size=2147483647'], 2, '--config.train.batch_size'),
    (['--config.train.checkpoint_dir=xx://b/c'], 2, 'train.checkpoint_dir'),
    (['--workdir', '/proc/self/nowhere'], 2, '--workdir'),
    (['--config.mesh.data=3', '--config.mesh.fsdp=3'], 2, 'mesh.data=3'),
    (['--config.stage.net.kind=dit'], 2, '--config.stage.net.kind'),
  ],
)
def test_a_mistake_in_training_is_one_sentence(
  workdir, model, capsys, more, code, key
):
  before = sorted(p.name for p in (workdir / 'base').rglob('*'))
  assert run(train.main, *train_args(workdir, model, *more)) == code
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and key in error
  assert sorted(p.name for p in (workdir / 'base').rglob('*')) == before


def test_export_makes_a_model_folder_that_generates(workdir, model, tmp_path):
  out = tmp_path / 'mine' / 'base'
  assert run(export.main, '--workdir', workdir / 'base', '--out', out) == 0
  record = json.loads((out / 'stage.json').read_text())
  assert record['provenance']['steps'] == 2
  assert record['weights']['dtype'] == 'bfloat16'
  assert record['provenance']['training_seconds'] >= 0
  args = ['--model', tmp_path / 'mine', '--out', tmp_path / 'out']
  assert run(sample.main, '--prompt', PROMPT, *args) == 0
  assert run(export.main, '--workdir', workdir / 'base', '--out', out) == 2


def test_export_writes_the_weights_that_were_asked_for(workdir, tmp_path):
  def exported(*more):
    out = tmp_path / '-'.join(more) / 'base'
    args = ['--workdir', workdir / 'base', '--out', out, '--dtype', 'float32']
    assert run(export.main, *args, *more) == 0
    stage = model_folder.load_stage(out)
    return model_folder.load_params(stage), stage.provenance['weights']

  with Checkpoints(workdir / 'base' / 'checkpoints') as checkpoints:
    emas, ema, raw = (
      checkpoints.restore_subtree(name)[0]
      for name in ('emas', 'ema_params', 'params')
    )
  for more, saved, weights in [
    (['--ema', '0.05'], emas['0.05'], 'ema 0.05'),
    (['--step', '2'], ema, 'ema'),
    (['--weights', 'raw'], raw, 'raw'),
  ]:
    params, described = exported(*more)
    assert described == weights
    jax.tree.map(np.testing.assert_array_equal, params, saved)


@pytest.mark.parametrize(
  'more, code, key',
  [
    (['--ema', '0.3'], 2, '--ema'),
    (['--ema', 'nan'], 2, '--ema'),
    (['--ema', 'long'], 2, '--ema'),
    (['--ema', '0.1', '--weights', 'raw'], 2, '--ema'),
    (['--ema', '0.1', '--step', '1'], 2, '--step'),
    (['--ema', '0.1'], 4, 'train.ema_lengths'),
  ],
)
def test_an_ema_that_cannot_be_made_is_one_sentence(
  workdir, tmp_path, capsys, more, code, key
):
  base = tmp_path / 'w'
  shutil.copytree(workdir / 'base', base)
  if code == 4:
    shutil.rmtree(base / 'checkpoints' / 'ema')
  args = ['--workdir', base, '--out', tmp_path / 'mine' / 'base']
  assert run(export.main, *args, *more) == code
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and key in error
  assert not (tmp_path / 'mine').exists()


@pytest.mark.parametrize(
  ('metrics', 'seconds'),
  [
    (None, None),
    ('', 0),
    ('{"step": 1, "images_per_sec": 4.0}\n{"step": 2, "im', 2),
    ('{"step": 1, "images_per_sec": 4}\n{"step": 2}\n{"step": "2"}\n', 2),
    ('[]\n3\n"step"\n{"step": null, "images_per_sec": 1}\n', 0),
  ],
)
def test_an_export_does_without_metrics(workdir, tmp_path, metrics, seconds):
  shutil.copytree(workdir / 'base', tmp_path / 'w')
  (tmp_path / 'w' / 'metrics.jsonl').unlink()
  if metrics is not None:
    (tmp_path / 'w' / 'metrics.jsonl').write_text(metrics)
  out = tmp_path / 'mine' / 'base'
  assert run(export.main, '--workdir', tmp_path / 'w', '--out', out) == 0
  record = json.loads((out / 'stage.json').read_text())
  assert record['provenance']['training_seconds'] == seconds


@pytest.mark.parametrize(
  'more',
  [
    ['--seed', -1],
    ['--seed', 2**32],
    ['--size', 10**9],
    ['--split', 'test'],
    ['--max_len', 5],
    ['--text', 'demo', '--max_len', 10**9],
  ],
)
def test_preparing_refuses_what_has_no_sense_or_no_effect(tmp_path, more):
  args = ['--source', 'shapes', '--size', 16, '--num', 2]
  assert run(prepare.main, *args, '--out', tmp_path / 'out', *more) == 2
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'more',
  [
    ['--seed', -1],
    ['--seed', 2**32],
    ['--num', 10**12],
    ['--batch_size', 10**9],
    ['--stages', ''],
    ['--shard', ''],
  ],
)
def test_evaluating_refuses_it_before_the_folder_is_claimed(
  model, tmp_path, more
):
  args = ['--model', model, '--suite', 'shapes', '--num', 2]
  assert run(evaluate.main, *args, '--out', tmp_path / 'out', *more) == 2
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flag', ['--chip', '--topology', '--config'])
def test_an_empty_flag_of_the_planner_is_refused(flag):
  assert run(plan.main, '--config', 'shapes_base', flag, '') == 2


@pytest.mark.parametrize(
  ('text', 'trains'),
  [('{"format_version": 2, "config": null}', 4), ('[]', 4), ('{', 4)],
)
def test_a_damaged_config_of_a_run_is_one_sentence(
  workdir, model, tmp_path, text, trains
):
  shutil.copytree(workdir / 'base', tmp_path / 'w')
  (tmp_path / 'w' / 'config.json').write_text(text)
  args = ['--workdir', tmp_path / 'w']
  assert run(export.main, *args, '--out', tmp_path / 'mine' / 'base') == 4
  assert run(train.main, *train_args(workdir, model), *args) == trains


def test_a_file_in_place_of_the_checkpoints_is_one_sentence(
  workdir, model, tmp_path
):
  shutil.copytree(workdir / 'base', tmp_path / 'w')
  args = ['--workdir', tmp_path / 'w']
  out = ['--out', tmp_path / 'mine' / 'base']
  for name, more in ('checkpoints/ema', ['--ema', '0.05']), ('checkpoints', []):
    shutil.rmtree(tmp_path / 'w' / name)
    (tmp_path / 'w' / name).write_text('')
    assert run(export.main, *args, *out, *more) == 4
  assert run(train.main, *train_args(workdir, model), *args) == 2


def test_a_damaged_snapshot_is_named(workdir, tmp_path, capsys):
  shutil.copytree(workdir / 'base', tmp_path / 'w')
  snapshot = tmp_path / 'w' / 'checkpoints' / 'ema' / '2'
  (snapshot / 'manifest.json').write_text('{}')
  args = ['--workdir', tmp_path / 'w', '--out', tmp_path / 'mine' / 'base']
  assert run(export.main, *args, '--ema', '0.05') == 4
  assert f'Remove {snapshot}' in capsys.readouterr().err


def test_help_and_import_do_not_start_jax():
  code = (
    'import sys, imagen_jax, imagen_jax.cli.sample as s\n'
    'assert s.main(["--help"]) == 0\n'
    'assert "jax" not in sys.modules, "jax"\n'
    'assert "transformers" not in sys.modules'
  )
  subprocess.run(
    [sys.executable, '-c', code], check=True, capture_output=True, timeout=60
  )


@pytest.mark.slow
def test_sampling_opens_no_connection(model, tmp_path):
  """In a process where connecting any socket but a loopback one raises."""
  code = (
    'import socket, sys\n'
    'connect = socket.socket.connect\n'
    'def guarded(self, address):\n'
    '  if self.family in (socket.AF_INET, socket.AF_INET6) and not str('
    'address[0]).startswith(("127.", "::1", "localhost")):\n'
    '    raise AssertionError(f"connection to {address}")\n'
    '  return connect(self, address)\n'
    'def lookup(*args, **kw):\n'
    '  raise AssertionError(f"name look-up of {args}")\n'
    'socket.socket.connect = guarded\n'
    'socket.getaddrinfo = lookup\n'
    'from imagen_jax.cli import sample\n'
    'sys.exit(sample.main(sys.argv[1:]))'
  )
  args = ['--prompt', PROMPT, '--model', str(model), '--out', str(tmp_path)]
  subprocess.run([sys.executable, '-c', code, *args], check=True, timeout=300)
  assert list(pathlib.Path(tmp_path).glob('*.png'))


@pytest.mark.slow
@pytest.mark.parametrize(
  'signal_name,code', [('SIGTERM', 143), ('SIGINT', 130)]
)
def test_a_signal_saves_and_the_same_command_resumes(
  model, tmp_path, signal_name, code
):
  import signal
  import time

  text = repr(tiny_model.config(ema_lengths=(0.05, 0.1)).to_dict())
  (tmp_path / 'tiny.py').write_text(
    'from ml_collections import ConfigDict\n'
    f'def get_config():\n  return ConfigDict({text})\n'
  )
  args = train_args(tmp_path, model, '--config.train.checkpoint_every=9999')
  args[args.index('2')] = '100000'
  command = [sys.executable, '-m', 'imagen_jax.cli.train', *map(str, args)]
  process = subprocess.Popen(command)
  metrics = tmp_path / 'base' / 'metrics.jsonl'
  while not metrics.exists() or metrics.read_text().count('\n') < 5:
    assert process.poll() is None
    time.sleep(0.2)
  process.send_signal(getattr(signal, signal_name))
  assert process.wait(timeout=60) == code
  saved = int(next((tmp_path / 'base' / 'checkpoints').iterdir()).name)
  assert saved >= 5
  args[args.index('100000')] = str(saved + 2)
  assert run(train.main, *args) == 0
