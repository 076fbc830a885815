r"""Distillation of a finished stage by matching moments: random, few steps.

  python train.py --config moments:runs/shapes/base \
      --workdir runs/shapes/base_4 --config.stage.sampling.steps=4

As `distill`, with a student that takes the random steps of the ancestral
sampler (DDIM with eta 1). Better than `distill` where noise in every step makes
better images, and for several steps; an auxiliary network of the same size is
trained beside the student, so that a training step takes about three times as
long and needs twice the memory.

Source: multistep moment matching (Salimans et al. 2024) of a guided model
(Meng et al. 2023).
"""

from imagen_jax.configs import distill


def get_config(teacher=''):
  """The student of the stage in the folder `teacher`."""
  config = distill.get_config(teacher)
  config.kind = 'moments'
  del config.teacher.steps
  config.stage.sampling.eta = 1.0
  return config
