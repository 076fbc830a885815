"""Logging to TensorBoard and Weights & Biases."""

import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from imagen_jax.errors import UsageError, check_choice
from imagen_jax.io import bucket, files

Grid = UInt8[np.ndarray, 'h w 3']


class Logger(Protocol):
  """Sends the metrics and samples of a run to another tool."""

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Logs numbers by name."""

  def image(self, step: int, image: Grid) -> None:
    """Logs a grid of samples."""

  def close(self) -> None:
    """Called once, at the end of the run."""


def find_loggers(names: str | None) -> list[Callable[..., Logger]]:
  """The classes that a config's `train.log_to` asks for.

  Args:
    names: '' or None, 'tensorboard', 'wandb', or both with a comma.

  Raises:
    UsageError: an unknown name, or a library that is not installed.
  """
  wanted = [name.strip() for name in (names or '').split(',') if name.strip()]
  for name in wanted:
    check_choice('train.log_to', name, LOGGERS, key='config.train.log_to')
    library, _ = LOGGERS[name]
    try:
      importlib.import_module(library)
    except ImportError as error:
      raise UsageError(
        f'train.log_to needs {library}, which is not installed: pip install '
        f"'imagen_jax[{name}]'.",
        key='config.train.log_to',
      ) from error
  return [LOGGERS[name][1] for name in wanted]


class TensorBoard:
  """Event files in `workdir/tensorboard`.

  Args:
    workdir: of the run.
    config: a plain dict, logged with the run.
    start_step: the step that the run resumes from; 0 if it is new.
  """

  def __init__(self, workdir: pathlib.Path, config: dict, start_step: int):
    import tensorboardX

    # Hides earlier events of the steps that are now run again.
    self._writer = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=start_step + 1
    )
    self._writer.add_text('config', f'```\n{config}\n```', 0)

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def image(self, step: int, image: Grid) -> None:
    self._writer.add_image('samples', image, step, dataformats='HWC')

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """A run named after the workdir, which resumes under the same name.

  Args:
    workdir, config, start_step: see `TensorBoard`.
  """

  def __init__(self, workdir: pathlib.Path, config: dict, start_step: int):
    import wandb

    self._wandb = wandb
    files.make_folder(workdir)
    local = not bucket.is_bucket(workdir)
    parts = (workdir.resolve() if local else workdir).parts[-3:]
    self._run = wandb.init(
      project='imagen_jax',
      name='/'.join(parts),
      id='-'.join(parts),
      resume='allow',
      config=config,
      dir=str(workdir) if local else None,
    )

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(values, step=step)

  def image(self, step: int, image: Grid) -> None:
    self._run.log({'samples': self._wandb.Image(image)}, step=step)

  def close(self) -> None:
    self._run.finish()


# {name in `train.log_to`: (library, class)}
LOGGERS: dict[str, tuple[str, Callable[..., Logger]]] = {
  'tensorboard': ('tensorboardX', TensorBoard),
  'wandb': ('wandb', Wandb),
}
