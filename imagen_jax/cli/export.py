"""imagen-export: from a training workdir to a finished model folder."""

import pathlib
import sys
import time

from imagen_jax.cli import errors
from imagen_jax.io import files


def main(argv=None):
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv):
  parser = errors.Parser(
    prog='imagen-export',
    description='Write a stage of a training workdir as safetensors and JSON.',
  )
  parser.add_argument('--workdir', required=True, help='training directory')
  parser.add_argument(
    '--out', required=True, help='directory to write, such as models/mine/base'
  )
  parser.add_argument(
    '--weights', default='ema', choices=['ema', 'raw'], help='which weights'
  )
  parser.add_argument(
    '--step', type=int, help='which checkpoint; the newest good one if omitted'
  )
  parser.add_argument(
    '--dtype', default='bfloat16', choices=['bfloat16', 'float32']
  )
  args = parser.parse_args(argv)

  from imagen_jax.cli import runtime

  runtime.start()
  workdir, out = pathlib.Path(args.workdir), pathlib.Path(args.out)
  if _kind(workdir) == 'if_finetune':
    step = export_if(workdir, out, weights=args.weights, step=args.step)
    print(f'{out}: step {step}, {args.weights} weights, as diffusers has them')
    return 0
  return export(
    workdir,
    out,
    weights=args.weights,
    step=args.step,
    dtype=args.dtype,
    command=' '.join(['imagen-export', *argv]),
  )


def export_if(workdir, out, *, weights, step):
  """Writes a fine-tuned stage of IF's, finished or not; returns the step."""
  from ml_collections import ConfigDict

  from imagen_jax import sharding
  from imagen_jax.deepfloyd.experiment import IFRun
  from imagen_jax.errors import UsageError
  from imagen_jax.io import model_folder
  from imagen_jax.io.checkpoint import Checkpoints

  if out.exists():
    raise UsageError(f'{out} exists; give another --out, or remove it.')
  config = ConfigDict(
    files.read_json(
      workdir / 'config.json', version=model_folder.FORMAT_VERSION
    )['config']
  )
  run = IFRun(config)
  every = config.train
  with Checkpoints(
    every.get('checkpoint_dir') or workdir / 'checkpoints',
    keep_last=every.keep_last,
  ) as checkpoints:
    state, _, step = checkpoints.restore(
      sharding.with_shardings(run.abstract, run.shardings), step
    )
  run.load_frozen()
  run.export({'ema': state.ema_params, 'raw': state.params}[weights], out)
  return step


def _kind(workdir):
  """The kind of a training workdir's config; None: it is not one of these."""
  from imagen_jax.io import model_folder

  path = workdir / 'config.json'
  if not path.exists():
    return None
  record = files.read_json(path, version=model_folder.FORMAT_VERSION)
  return record.get('config', {}).get('kind')


def export(workdir, out, *, weights, step, dtype, command):
  """Writes the stage, and beside it the text encoder if none is there yet."""
  import json
  import shutil

  import jax

  from imagen_jax.errors import UsageError
  from imagen_jax.io import model_folder

  record = model_folder.load_stage(workdir)
  if record.weights is not None:
    raise UsageError(
      f'{workdir} is an exported stage already; give a training workdir.'
    )
  if step is None:
    step, _ = record.checkpoint
  params = model_folder.load_params(record, weights=weights, step=step)
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  rows = [row for row in map(json.loads, lines) if row['step'] <= step]
  batch = record.config['train']['batch_size']
  last, seconds = 0, 0.0
  for row in rows:
    seconds += batch * (row['step'] - last) / max(row['images_per_sec'], 1e-9)
    last = row['step']
  model_folder.save_stage(
    out,
    params,
    config=record.config,
    text=record.text,
    provenance={
      'command': command,
      'commit': files.git_commit(),
      'steps': step,
      'images': step * batch,
      'training_seconds': round(seconds),
      'weights': weights,
      'exported': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'jax': jax.__version__,
    },
    dtype=dtype,
  )
  text = out.parent / 'text'
  if not text.exists():
    source = model_folder.text_path(workdir.parent, record)
    shutil.copytree(source, text, ignore=_not_the_model)
  size = (out / 'weights.safetensors').stat().st_size
  print(f'{out}: step {step}, {weights} weights, {size / 1e6:.2f} MB {dtype}')
  return 0


def _not_the_model(_, names):
  """Files beside an encoder that are not part of it."""
  suffixes = ('.json', '.safetensors', '.model')
  return [n for n in names if not n.endswith(suffixes)]


if __name__ == '__main__':
  sys.exit(main())
