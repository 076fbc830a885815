"""Distilling a finished stage into one that samples in fewer steps."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.cascade import objective, sampling, stage_config
from imagen_jax.diffusion import guidance
from imagen_jax.diffusion.distillation import distillation_loss
from imagen_jax.diffusion.reverse import logsnr_grid
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import UsageError
from imagen_jax.io import model_folder
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.io.paths import user_path
from imagen_jax.training.experiment import Start, Tree
from imagen_jax.training.stage_experiment import (
  StageExperiment,
  matching_params,
)
from imagen_jax.typing import Array


class DistillExperiment(StageExperiment):
  """Trains a stage to sample in one step what its teacher does in several.

  The student starts from the teacher's weights, needs no guidance, and is
  sampled with DDIM in `stage.sampling.steps` steps. The teacher is guided with
  the weight `teacher.guidance`, in other respects as its own settings say, and
  thresholded as the student's say.

  Attributes:
    teacher: the `Stage` of `config.teacher.path`.

  Raises:
    UsageError: the settings of teacher and student do not go together.
    ModelError: the teacher cannot be read, or is of another network.
    Besides those of `StageExperiment`.
  """

  frozen_name = 'teacher, text encoder'

  def __init__(
    self,
    config: ConfigDict,
    mesh: Mesh | None = None,
    workdir: pathlib.Path | None = None,
    **options: Any,
  ):
    if not config.teacher.path:
      raise UsageError(
        'a teacher is needed; give its folder, as in --config distill:FOLDER.',
        key='config.teacher.path',
      )
    self._record = model_folder.load_stage(user_path(config.teacher.path))
    super().__init__(config, mesh, workdir, **options)
    self.teacher = stage_config.from_record(
      self._record, resolve_dtype(config.dtype)
    )
    self._check()

  def _check(self) -> None:
    """Refuses a student that cannot follow its teacher."""
    student, teacher, config = self.stage, self.teacher, self.config.teacher
    settings = student.sampling
    plain = (settings.sampler, settings.eta, settings.guidance) == (
      'ddim', 0.0, 1.0,
    )  # fmt: skip
    sides = lambda stage: (stage.resolution, stage.low_resolution)
    for key, valid, rule in (
      (
        'teacher.steps',
        config.steps % settings.steps == 0,
        f'it is {config.steps}, which must be a multiple of the '
        f"student's steps, {settings.steps}",
      ),
      (
        'stage.sampling',
        plain and settings.autoguidance == 1,
        "a student is sampled with DDIM, eta 0 and no guidance: the teacher's "
        'guidance is teacher.guidance',
      ),
      (
        'teacher.path',
        teacher.sampling.apg_momentum == 0,
        f'{self._record.path} is guided with apg_momentum, which goes from '
        'step to step; choose 0 where it was trained',
      ),
      (
        'stage.weighting',
        student.weighting != 'sigmoid',
        'sigmoid weights an integral over time, and a student has steps',
      ),
      (
        'stage.prediction',
        student.prediction != 'eps' or settings.steps > 1,
        'at pure noise eps says nothing about the image; with one step '
        'predict v or x',
      ),
      (
        'stage.resolution',
        sides(student) == sides(teacher),
        f"the student's (side, low-resolution side) are {sides(student)}, the "
        f"teacher's {sides(teacher)}",
      ),
      (
        'text.path',
        _encoder(self.text_record()) == _encoder(self._record.text),
        f'{self._record.path} was trained with another text encoder or length',
      ),
      (
        'teacher.guidance',
        config.guidance == 1 or teacher.cond_drop > 0,
        'the teacher was trained without dropping captions, so it has no '
        'guidance; use 1',
      ),
    ):
      if not valid:
        raise UsageError(f'{rule}.', key=f'config.{key}')

  def loss(
    self, params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    student, teacher, config = self.stage, self.teacher, self.config.teacher
    given = objective.training_inputs(
      student, key, batch['image'], batch['text'], batch['mask']
    )
    weight = None if config.guidance == 1 else config.guidance
    inputs = sampling.SampleInputs(
      keys=key, text=given.text, mask=given.mask, guidance=weight
    )
    spec = student.sampling.spec
    guided = guidance.guided(
      sampling.network(teacher, frozen['teacher'], inputs, given.low_res),
      weights=inputs.weights,
      prediction=teacher.prediction,
      spec=dataclasses.replace(
        teacher.sampling.spec,
        threshold=spec.threshold,
        percentile=spec.percentile,
      ),
    )
    grid = logsnr_grid(
      student.logsnr_fn, dataclasses.replace(spec, steps=config.steps)
    )
    return distillation_loss(
      given.keys['loss'],
      given.x,
      objective.predictor(student, params, given),
      lambda z, logsnr: guided(z, logsnr, ())[0],
      grid=grid,
      parts=config.steps // spec.steps,
      spec=student.loss_spec,
      pixel_weight=given.weight,
      t=batch.get('t'),
    )

  def condition(self, key: jax.Array, batch: Tree, frozen: Tree) -> Tree:
    return super().condition(key, batch, frozen['text'])

  def frozen_spec(self) -> Tree:
    teacher = jax.eval_shape(self.init, jax.random.key(0))
    return {'text': super().frozen_spec(), 'teacher': teacher}

  def load_frozen(self) -> Tree:
    spec = self.frozen_spec()['teacher']
    params = matching_params(self._record, spec)
    placed = sharding.state_shardings(params, self.mesh)
    return {
      'text': super().load_frozen(),
      'teacher': jax.device_put(params, placed),
    }

  def start(self, shardings: Tree, init_from: StageRecord | None) -> Start:
    return super().start(shardings, init_from or self._record)


def _encoder(record: Mapping[str, Any]) -> dict[str, Any]:
  """What two stages' text must have in common; without a kind it is T5's.

  Embeddings may be stored in another precision.
  """
  same = ('kind', 'dim', 'max_len', 'digest')
  return {key: {'kind': 't5', **record}[key] for key in same}
