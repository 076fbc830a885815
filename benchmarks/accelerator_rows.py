"""What `accelerator.py` measures, the most important first."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from imagen_jax.nets import remat

CONFIGS = {'sr256': 32, 'base64': 32}  # images of a step
POLICIES = (
  None,
  *(name for name in remat.POLICIES if name != 'convs_saveable'),
)
DETERMINISTIC = '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
FLAGS = {
  'no latency hiding': '--xla_gpu_enable_latency_hiding_scheduler=false',
  'without Triton matmuls': '--xla_gpu_enable_triton_gemm=false',
  # XLA's default: what another process makes of the same flags.
  'autotune level 4': '--xla_gpu_autotune_level=4',
  'deterministic': DETERMINISTIC,
}
BUCKETS = (16, 32, 64, 128)
# A narrow one of few blocks of sr256's, whose loss two processes compute.
SHORT = {
  'config': 'sr256',
  'batch': 8,
  'change': {'stage.net.num_res_blocks': (1, 1, 1, 1)},
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One thing that is measured.

  Attributes:
    work: what it is, for the table.
    kind: of the table, see `accelerator_table.HEADERS`.
    given: arguments of the module's `Work`.
  """

  work: str
  kind: str
  given: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows that one process measures, one after the other.

  Attributes:
    module: `accelerator_{module}.py` has the class `Work`.
    rows: {name: `Row`}.
    least: seconds that must be left for it to begin.
    flags: of XLA.
    runs: processes that measure the same, one after the other and without a
      compile cache, to be compared.
  """

  module: str
  rows: Mapping[str, Row]
  least: float
  flags: str = ''
  runs: int = 1


def groups() -> list[Group]:
  """All groups, the most important first."""
  sr256, base64 = _variants('sr256'), _variants('base64')
  first = {'base64': base64.pop('base64')}
  first['base64:cudnn'] = _train(
    'base64', 'attention by cuDNN', {'stage.net.attention': 'cudnn'}
  )
  return [
    Group('train', sr256, 60),
    Group('train', first, 90),
    Group('sample', _samplers(), 45),
    Group('deepfloyd', {'if': _deepfloyd('imagen_jax')}, 45),
    Group('t5', _encoders(), 30),
    Group(
      'torch',
      {
        'if:diffusers': _deepfloyd('diffusers'),
        'if:compiled': _deepfloyd('diffusers, torch.compile'),
      },
      40,
    ),
    *(
      Group(
        'train',
        {
          f'determinism:{name}': Row(
            f'eight steps of a short sr256, {words}',
            'determinism',
            SHORT | {'steps': 8},
          )
        },
        60,
        flags,
        runs=2,
      )
      for name, words, flags in (
        ('default', 'as it is', ''),
        ('flags', DETERMINISTIC.replace('--', ''), DETERMINISTIC),
      )
    ),
    Group('train', base64, 90),
    *(
      Group('train', {f'{config}:{name}': _train(config, words)}, least, flags)
      for config, least in (('sr256', 60), ('base64', 90))
      for name, (words, flags) in _flags().items()
    ),
  ]


def _flags() -> dict[str, tuple[str, str]]:
  """{name: (what it is in words, flags)}."""
  return {
    words.replace(' ', '_'): (words, flags) for words, flags in FLAGS.items()
  }


def _train(
  config: str,
  words: str,
  change: Mapping[str, Any] | None = None,
  *,
  batch: int | None = None,
  profile: bool = False,
) -> Row:
  """A training step of a config with some keys changed."""
  batch = batch or CONFIGS[config]
  given = {
    'config': config,
    'batch': batch,
    'change': change or {},
    'profile': profile,
  }
  return Row(f'{config}, batch {batch}, {words}', 'train', given)


def _variants(config: str) -> dict[str, Row]:
  """{name: a training step}: as configured, then with one change each."""
  made = {config: _train(config, 'as configured', profile=True)}
  for policy in POLICIES:
    change = {'stage.net.remat': policy}
    made[f'{config}:remat={policy}'] = _train(config, f'remat {policy}', change)
  batch = 2 * CONFIGS[config]
  made[f'{config}:batch={batch}'] = _train(config, 'as configured', batch=batch)
  narrow = {'text.path': 'demo'}
  made[f'{config}:narrow'] = _train(config, "the demo's narrow text", narrow)
  return made


def _samplers() -> dict[str, Row]:
  return {
    f'sample:{config}': Row(
      f'{config}, guided', 'sample', {'config': config, 'batch': 4}
    )
    for config in ('base64', 'sr256', 'sr1024')
  }


def _deepfloyd(who: str) -> Row:
  given = {'who': who, 'batch': 4, 'steps': 50}
  words = 'IF-I-XL, 4 images of 64², 50 steps, guided, bfloat16'
  return Row(f'{words}: {who}', 'deepfloyd', given)


def _encoders() -> dict[str, Row]:
  return {
    f't5:{length}': Row(
      f'T5-XXL, bfloat16, 64 captions of at most {length} tokens',
      't5',
      {'length': length, 'batch': 64},
    )
    for length in BUCKETS
  }
