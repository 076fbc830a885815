"""Distilling a finished stage into one that samples in fewer steps."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.cascade import objective, sampling, stage_config
from imagen_jax.diffusion import guidance
from imagen_jax.diffusion.distillation import distillation_loss, moment_loss
from imagen_jax.diffusion.reverse import logsnr_grid
from imagen_jax.diffusion.threshold import threshold
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import UsageError
from imagen_jax.io import model_folder
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.io.paths import user_path
from imagen_jax.training.experiment import Preview, Start, Tree
from imagen_jax.training.stage_experiment import (
  StageExperiment,
  matching_params,
)
from imagen_jax.typing import Array

LEVELS = 64  # of noise in a step of the student, at which moments are matched


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
  eta: ClassVar[float] = 0.0  # of the student's DDIM steps

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

  @property
  def identity(self) -> str | None:
    ours, teacher = super().identity, self.teacher.net
    if ours is None or not type(teacher).__module__.startswith('imagen_jax.'):
      return None
    return json.dumps([ours, repr(teacher), self._record.config])

  def _check(self) -> None:
    """Refuses a student that cannot follow its teacher."""
    student, teacher, config = self.stage, self.teacher, self.config.teacher
    settings = student.sampling
    plain = (settings.sampler, settings.eta, settings.guidance) == (
      'ddim', self.eta, 1.0,
    )  # fmt: skip
    sides = lambda stage: (stage.resolution, stage.low_resolution)
    for key, valid, rule in (
      (
        'teacher.steps',
        config.get('steps', settings.steps) % settings.steps == 0,
        f'it is {config.get("steps")}, which must be a multiple of the '
        f"student's steps, {settings.steps}",
      ),
      (
        'stage.sampling',
        plain and settings.autoguidance == 1,
        f'a student is sampled with DDIM, eta {self.eta:g} and no guidance: '
        "the teacher's guidance is teacher.guidance",
      ),
      (
        'teacher.path',
        teacher.sampling.apg_momentum == 0,
        f'{self._record.path} is guided with apg_momentum, which goes from '
        'step to step; choose 0 where it was trained',
      ),
      (
        'stage.weighting',
        student.weighting in (None, 'v', 'x'),
        f'{student.weighting} leaves the step from pure noise without weight, '
        'or is for an integral over time, and a student has few steps; use '
        'None, v or x',
      ),
      (
        'stage.prediction',
        student.prediction != 'eps',
        'at pure noise, where the first of few steps begins, eps says nothing '
        'about the image; predict v or x',
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
    given = self._given(key, batch)
    return distillation_loss(
      given.keys['loss'],
      given.x,
      objective.predictor(self.stage, params, given),
      self._denoise(given, key, frozen),
      grid=self._grid(self.config.teacher.steps),
      parts=self.config.teacher.steps // self.stage.sampling.spec.steps,
      spec=self.stage.loss_spec,
      pixel_weight=given.weight,
      t=batch.get('t'),
    )

  def _given(self, key: jax.Array, batch: Tree) -> objective.TrainingInputs:
    return objective.training_inputs(
      self.stage, key, batch['image'], batch['text'], batch['mask']
    )

  def _grid(self, steps: int) -> Array:
    spec = dataclasses.replace(self.stage.sampling.spec, steps=steps)
    return logsnr_grid(self.stage.logsnr_fn, spec)

  def _denoise(
    self, given: objective.TrainingInputs, key: jax.Array, frozen: Tree
  ) -> Callable[[Array, Array], Array]:
    """The teacher, guided and thresholded: (z, logsnr [B]) -> x."""
    teacher, spec = self.teacher, self.stage.sampling.spec
    weight = self.config.teacher.guidance
    inputs = sampling.SampleInputs(
      keys=key,
      text=given.text,
      mask=given.mask,
      guidance=None if weight == 1 else weight,
    )
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
    return lambda z, logsnr: guided(z, logsnr, ())[0]

  def condition(self, key: jax.Array, batch: Tree, frozen: Tree) -> Tree:
    return super().condition(key, batch, frozen['text'])

  def frozen_spec(self) -> Tree:
    teacher = jax.eval_shape(super().init, jax.random.key(0))
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


class MomentExperiment(DistillExperiment):
  """Trains a stage whose random steps are distributed as its teacher's.

  The student is sampled with DDIM and eta 1, the ancestral sampler, in
  `stage.sampling.steps` steps. Beside it an auxiliary network of the same size
  is trained, and forgotten in the end.
  """

  eta = 1.0

  def init(self, key: jax.Array) -> Tree:
    params = super().init(key)
    return params | {model_folder.AUXILIARY: params}

  def loss(
    self, params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    given, spec = self._given(key, batch), self.stage.sampling.spec
    predict = functools.partial(objective.predictor, self.stage, given=given)
    return moment_loss(
      given.keys['loss'],
      given.x,
      predict(model_folder.without_auxiliary(params)),
      predict(params[model_folder.AUXILIARY]),
      self._denoise(given, key, frozen),
      grid=self._grid(spec.steps * LEVELS),
      parts=LEVELS,
      spec=self.stage.loss_spec,
      finish=functools.partial(
        threshold, kind=spec.threshold, percentile=spec.percentile
      ),
      pixel_weight=given.weight,
      t=batch.get('t'),
    )

  def start(self, shardings: Tree, init_from: StageRecord | None) -> Start:
    both = dict(shardings)
    placed = both.pop(model_folder.AUXILIARY)
    first = super().start(both, init_from)
    copy = jax.device_put(jax.tree.map(jnp.copy, first.params), placed)
    params = first.params | {model_folder.AUXILIARY: copy}
    return dataclasses.replace(first, params=params)

  def make_preview(self, frozen: Tree) -> Callable[[Tree], Preview | None]:
    preview = super().make_preview(frozen)
    return lambda params: preview(model_folder.without_auxiliary(params))


def _encoder(record: Mapping[str, Any]) -> dict[str, Any]:
  """What two stages' text must have in common; without a kind it is T5's.

  Embeddings may be stored in another precision.
  """
  same = ('kind', 'dim', 'max_len', 'digest')
  return {key: {'kind': 't5', **record}[key] for key in same}
