"""Builds the suite that a config names."""

from collections.abc import Callable, Sequence

from imagen_jax import kinds
from imagen_jax.data.source import Source
from imagen_jax.data.sources import KINDS
from imagen_jax.errors import UsageError
from imagen_jax.evaluation.clip_suite import ClipScore
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.fid_suite import Fid
from imagen_jax.evaluation.prompts_suite import Prompts
from imagen_jax.evaluation.suite import Suite, check_uses
from imagen_jax.io.model_folder import StageRecord

# Suites for any data. All others belong to a data source.
BUILT_IN: dict[str, Callable[[EvalConfig, int], Suite]] = {
  'prompts': Prompts.from_config,
  'clip': ClipScore.from_config,
  'fid': Fid.from_config,
}


def make_suite(config: EvalConfig, records: Sequence[StageRecord]) -> Suite:
  """The suite that a config asks for.

  Args:
    config: of the evaluation.
    records: the stages to evaluate, the last of which gives the resolution.

  Raises:
    UsageError, DataError, ModelError: there is no such suite, or what it needs
      is missing or broken.
  """
  name = config.suite or _own(records)
  if name in BUILT_IN:
    suite = BUILT_IN[name](config, records[-1].resolution)
  else:
    # Built-in names are there for the error message only.
    table = dict.fromkeys(BUILT_IN, '') | KINDS
    source: type[Source] = kinds.find(name, table, key='suite', base=Source)
    suite = source.suite(config)
  check_uses(suite, config)
  return suite


def _own(records: Sequence[StageRecord]) -> str:
  """The data kind that the stages were trained on."""
  names = {record.config['data']['kind'] for record in records}
  if len(names) > 1:
    raise UsageError(
      f'suite is not set, and the stages were trained on different data '
      f'({", ".join(sorted(names))}); choose one of these or of '
      f'{", ".join(BUILT_IN)}.',
      key='suite',
    )
  return names.pop()
