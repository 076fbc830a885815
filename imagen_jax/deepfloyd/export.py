"""Exports fine-tuned weights as a stage folder in diffusers' layout."""

import dataclasses
import pathlib
import shutil

from imagen_jax.deepfloyd import weights
from imagen_jax.deepfloyd.stage import Stage
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.io import files


def without_variance(module: IFUNet) -> IFUNet:
  """The network without the variance channels."""
  config = dataclasses.replace(module.config, out_channels=3)
  return IFUNet(config, module.dtype)


def cut_variance(params: dict) -> dict:
  """The parameters without those of the variance channels."""
  last = {k: v[..., :3] for k, v in params['conv_out'].items()}
  return params | {'conv_out': last}


def export_stage(
  folder: pathlib.Path, params: dict, stage: Stage, *, drop: bool
) -> None:
  """Writes a stage folder.

  Args:
    folder: to write; an existing one is replaced.
    params: of the network.
    stage: the `Stage` that was fine-tuned.
    drop: whether the network has lost its variance channels.
  """
  raw = files.read_json(stage.folder / 'unet' / 'config.json')
  if folder.exists():  # the run was resumed
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
