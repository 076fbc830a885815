"""What to evaluate and how: the settings of `run.evaluate`."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from imagen_jax.errors import UsageError, check_choice

# Settings of a stage's sampling. Evaluation never starts from an image, so
# `strength` is not one of them.
SAMPLING = (
  'sampler', 'steps', 'guidance', 'aug_level', 'threshold', 'grid',
  'guidance_interval', 'guidance_schedule', 'guidance_rescale', 'apg_eta',
  'apg_norm', 'apg_momentum', 'autoguidance',
)  # fmt: skip
LIMITS = {
  'num': (1, 10**6),
  'num_images': (1, 10**6),
  'batch_size': (1, 4096),
  'seed': (0, 2**32 - 1),
}

Value = str | int | float | tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """The settings of an evaluation; every field has a default.

  Attributes:
    suite: 'prompts', 'clip', 'fid', a data kind whose source has a suite, or
      'my_module:MySource'; None is the suite of the model's own data kind.
    model: model folder; None is the bundled demo model.
    weak_model: folder of weaker models, for `autoguidance`.
    negative_prompt: what guidance steers away from, for every prompt.
    out: folder of the images, `scores.json` and `index.html`.
    num: prompts per category, or in all for fid; None is the suite's default.
    categories: score these only; None is all of them.
    seed: of the images.
    stages: names of the stages to use; None is all of them.
    from_truth: condition the first super-resolution stage on true
      low-resolution images.
    sweep: {'guidance': (1, 2, 4), 'sr1.steps': (4, 8)}: one run for each
      combination. A key is one of `SAMPLING`, for all stages or for one.
    prompts: a .csv, .tsv, .jsonl or .txt file (prompts, clip).
    num_images: images per prompt (prompts, clip).
    data: real images with captions (fid), or the icon packages (icons).
    source: the data kind of `data` (fid).
    inception: file of InceptionV3 weights (fid).
    fid_mode: how images enter Inception, 'clean' or 'pytorch-fid' (fid).
    efficientnet: file of EfficientNet-Lite0 weights (fid, icons).
    clip: folder of a CLIP model in Hugging Face layout (clip, fid).
    sampling: {one of `SAMPLING`: a value, or a list of one per stage};
      settings left out keep each stage's default.
    dtype: of the activations, 'auto', 'float32' or 'bfloat16'.
    batch_size: images at a time; None is 4 on a CPU and 32 elsewhere.
    shard: (i, n): generate fraction i of n; None takes the process's index and
      the number of processes.

  Raises:
    UsageError: a value is out of range or a key of `sampling` or `sweep` is
      unknown.
  """

  suite: str | None = None
  model: str | pathlib.Path | None = None
  weak_model: str | pathlib.Path | None = None
  negative_prompt: str = ''
  out: str | os.PathLike = 'report'
  num: int | None = None
  categories: tuple[str, ...] | None = None
  seed: int = 0
  stages: tuple[str, ...] | None = None
  from_truth: bool = False
  sweep: Mapping[str, Sequence[Value]] = dataclasses.field(default_factory=dict)
  prompts: str | os.PathLike | None = None
  num_images: int = 1
  data: str | os.PathLike | None = None
  source: str = 'folder'
  inception: str | os.PathLike | None = None
  fid_mode: str = 'clean'
  efficientnet: str | os.PathLike | None = None
  clip: str | os.PathLike | None = None
  sampling: Mapping[str, Value | Sequence[Value]] = dataclasses.field(
    default_factory=dict
  )
  dtype: str = 'auto'
  batch_size: int | None = None
  shard: tuple[int, int] | None = None

  def __post_init__(self) -> None:
    for key, (least, most) in LIMITS.items():
      value = getattr(self, key)
      if value is not None and not least <= value <= most:
        raise UsageError(
          f'{key} is {value}; it must be in [{least}, {most}].', key=key
        )
    if self.shard and not 0 <= self.shard[0] < self.shard[1]:
      raise UsageError(
        f'shard is {self.shard[0]}/{self.shard[1]}; i/n needs 0 ≤ i < n, such '
        'as 0/4.',
        key='shard',
      )
    for field in ('sampling', 'sweep'):
      for key in getattr(self, field):
        setting = key.rpartition('.')[2]
        check_choice(f'a name in {field}', setting, SAMPLING, key=field)
