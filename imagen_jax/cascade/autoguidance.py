"""The weaker model of autoguidance (Karras et al. 2024)."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax

from imagen_jax.cascade import stage_config
from imagen_jax.cascade.stage import Stage
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import model_folder
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.nets.network import Network


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['params'],
  meta_fields=['net'],
)
@dataclasses.dataclass(frozen=True)
class Weak:
  """A weaker model of the same stage: less trained, or smaller.

  Attributes:
    net: its network, often the stage's own.
    params: its parameters.
  """

  net: Network
  params: dict


def find(
  path: str | pathlib.Path,
  records: Sequence[StageRecord],
  ours: Sequence[Stage],
) -> dict[str, tuple[StageRecord, Network]]:
  """{name: (record, network)} of the weaker stages in a folder.

  Args:
    path: a model folder, or one stage, exported or a training workdir.
    records: of the cascade.
    ours: its stages; a weaker stage has the name of one of them.

  Raises:
    UsageError: no stage of the folder has the name of one of the cascade's.
    ModelError: one cannot be read, or does not predict what that stage does.
  """
  weak = {record.name: record for record in model_folder.find_stages(path)}
  result = {}
  for record, stage in zip(records, ours):
    if stage.name not in weak:
      continue
    other = weak[stage.name]
    dtype = getattr(stage.net, 'dtype', 'float32')
    made = stage_config.from_record(other, dtype)
    for name in 'resolution', 'low_resolution', 'prediction':
      if getattr(made, name) != getattr(stage, name):
        raise ModelError(
          f'stage {stage.name} of {path} has {name} {getattr(made, name)} '
          f'and that of the model {getattr(stage, name)}; autoguidance needs '
          'two models of the same stage.'
        )
    if any(other.text[k] != record.text[k] for k in ('digest', 'max_len')):
      raise ModelError(
        f'stage {stage.name} of {path} was trained with another text '
        'encoder or length than that of the model; autoguidance needs the same.'
      )
    result[stage.name] = other, made.net
  if not result:
    raise UsageError(
      f'weak_model {path} has the stages {", ".join(weak)}, and the model '
      f'{", ".join(stage.name for stage in ours)}; a weaker stage has the name '
      'of the stage that it guides.',
      key='weak_model',
    )
  return result
