"""A stage's folder with new weights, as diffusers has it."""

import dataclasses
import shutil

from imagen_jax.deepfloyd import weights
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.io import files


def without_variance(module):
  """The network without the channels that say the variance."""
  config = dataclasses.replace(module.config, out_channels=3)
  return IFUNet(config, module.dtype)


def cut_variance(params):
  """Its parameters."""
  last = {k: v[..., :3] for k, v in params['conv_out'].items()}
  return params | {'conv_out': last}


def export_stage(folder, params, stage, *, drop):
  """Writes one.

  Args:
    folder: to write; one of before is replaced.
    params: the network's.
    stage: the `Stage` that the weights come from.
    drop: whether the network has no variance any more.
  """
  raw = files.read_json(stage.folder / 'unet' / 'config.json')
  if folder.exists():  # of a run that went on
    shutil.rmtree(folder)
  weights.save(
    folder / 'unet', params, source=raw | ({'out_channels': 3} if drop else {})
  )
  for name in ('scheduler', 'image_noising_scheduler'):
    if (stage.folder / name).is_dir():
      shutil.copytree(stage.folder / name, folder / name)
  if (stage.folder / 'model_index.json').exists():
    shutil.copy(stage.folder / 'model_index.json', folder)
  if drop:
    path = folder / 'scheduler' / 'scheduler_config.json'
    made = files.read_json(path) | {'variance_type': 'fixed_small'}
    files.write_json(path, made)
