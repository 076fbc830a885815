r"""Distillation of a finished stage: the same images in fewer steps.

  python train.py --config distill:runs/shapes/base \
      --workdir runs/shapes/base_8 --config.stage.sampling.steps=8

The argument is the teacher, a training workdir or an exported stage. Its
network, text encoder and data set are taken over, its weights are the student's
start, and each `--config.…` overrides. The student needs no guidance, which
halves the work of a step, and `stage.sampling.steps` evaluations.

Source: progressive distillation (Salimans and Ho 2022) of a guided model (Meng
et al. 2023). A step of the student follows `teacher.steps` /
`stage.sampling.steps` steps of the teacher. With equal numbers only the
guidance is distilled. To go far, halve several times: the student is the next
run's teacher.

  python train.py --config distill:runs/shapes/base_8 \
      --workdir runs/shapes/base_4
"""

from imagen_jax.configs import common


def get_config(teacher=''):
  """The student of the stage in the folder `teacher`."""
  config = common.stage_run()
  config.kind = 'distill'
  config.teacher = {
    # Folder of the stage to distill.
    'path': teacher,
    # Its steps over the whole way from noise to image, with DDIM.
    'steps': 32,
    # Its guidance weight, which the student learns; 1 is none.
    'guidance': 1.0,
  }
  if teacher:
    _take_over(config, teacher)
  settings = config.stage.sampling
  settings.update(sampler='ddim', eta=0.0, guidance=1.0, autoguidance=1.0)
  settings.update(guidance_interval=None, guidance_schedule=None)
  settings.steps = max(1, config.teacher.steps // 2)
  if config.stage.prediction == 'eps':
    config.stage.prediction = 'v'
  plain = common.stage()
  for key in 'weighting', 'min_snr_gamma', 'sigmoid_bias':
    config.stage[key] = plain[key]
  config.train.update(num_steps=5000, ema_decay=0.999)
  config.train.optimizer.update(warmup=100, learning_rate=1e-4)
  return config


def _take_over(config, teacher):
  """The sections of the teacher's config, and how it is sampled."""
  # Only here: the defaults are read without any model.
  from imagen_jax.io import model_folder
  from imagen_jax.io.paths import user_path

  theirs = model_folder.load_stage(user_path(teacher)).config
  for section in ('stage', 'text', 'data'):
    for key, value in theirs[section].items():
      if key not in config[section]:
        continue
      with config[section].ignore_type():
        config[section][key] = value
  config.train.batch_size = theirs['train']['batch_size']
  config.teacher.steps = theirs['stage']['sampling']['steps']
  config.teacher.guidance = float(theirs['stage']['sampling']['guidance'])
