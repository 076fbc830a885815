"""imagen-plan: whether a config fits a pod, its cost, and the best mesh."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagen_jax.cli import errors, runtime
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import user_path
from imagen_jax.training import chips
from imagen_jax.training.chips import GIB, Chip

if TYPE_CHECKING:
  from imagen_jax.planning.analytic import Plan
  from imagen_jax.planning.job import Job


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  flags = {f'config.train.{k}': k for k in ('batch_size', 'accumulate')}
  return errors.run(_main, argv, flags)


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='plan.py',
    description='Plan a stage for a pod without the pod: memory, time and the '
    'best mesh.',
    epilog='Any config key can be set: --config.train.batch_size=1024.',
  )
  add = parser.add_argument
  add(
    '--config',
    type=user_path,
    required=True,
    help='name of a config, or a path to one',
  )
  add('--topology', help='TPU chips and their shape, such as v5e:16x16')
  add('--chip', help=f'one of {", ".join(chips.CHIPS)}; v5e if left out')
  add(
    '--devices',
    type=errors.positive,
    help='number of chips, with --chip; 256 if left out',
  )
  for name, text in (
    ('data', "the mesh's copies of the state; the best if left out"),
    ('fsdp', 'chips that one copy is split over; the best if left out'),
    ('batch_size', "images per step; the config's if left out"),
    ('accumulate', "parts of a batch; the config's if left out"),
  ):
    add(f'--{name}', type=errors.positive, help=text)
  add(
    '--step', choices=('train', 'sample'), default='train', help='what to run'
  )
  add(
    '--text',
    default='auto',
    help='a size of T5 v1.1 (small, base, large, xl, xxl), bert-base, '
    'bert-large, clip-b, clip-l, t5gemma-2b, cached for stored embeddings, or '
    'auto for the encoder at text.path or the size in its name',
  )
  add(
    '--compile',
    action='store_true',
    help='compile the step with the TPU compiler (needs the extra "plan")',
  )
  add(
    '--effort',
    choices=('full', 'low'),
    default='full',
    help='of the compiler: full as for training, low to be faster',
  )
  return parser


def _main(argv: list[str]) -> None:
  argv, overrides = split_overrides(argv)
  args = _parser().parse_args(argv)
  config = load_config(args.config, overrides)
  chip, count = _chips(args)
  import jax

  # Another process may hold the accelerators.
  jax.config.update('jax_platforms', 'cpu')
  runtime.start()
  from imagen_jax.planning import analytic, job

  work = job.make_job(
    config,
    text=args.text,
    batch_size=args.batch_size,
    accumulate=args.accumulate,
  )
  if args.data or args.fsdp:
    data, fsdp = _mesh(args, count)
    plan = analytic.make_plan(work, chip, data=data, fsdp=fsdp, step=args.step)
    plans = [plan]
  else:
    plans = analytic.splits(work, chip, count, step=args.step)
    plan = analytic.best(plans, chip) or min(plans, key=lambda p: p.total)
  _print_parameters(work)
  _print_plan(work, chip, plan, args.step)
  if len(plans) > 1:
    _print_splits(plans, plan, chip)
  sys.stdout.flush()
  if args.compile:
    _compile(args, work, chip, plan)
  else:
    analytic.require_fit(plan, work, chip, count, step=args.step)


def _chips(args: argparse.Namespace) -> tuple[Chip, int]:
  """(chip, number of chips) that the flags ask for."""
  if args.topology is not None and (args.chip or args.devices):
    raise UsageError(
      'gives the chips and their number; leave out --chip and --devices.',
      key='topology',
    )
  if args.topology is not None:
    return chips.parse_topology(args.topology)
  if args.compile:
    raise UsageError(
      f'needs --topology, such as {" or ".join(chips.EXAMPLES[:2])}.',
      key='compile',
    )
  chip = 'v5e' if args.chip is None else args.chip
  return chips.find_chip(chip), args.devices or 256


def _mesh(args: argparse.Namespace, count: int) -> tuple[int, int]:
  """(data, fsdp), whose product is `count`; one flag may be missing."""
  data = args.data or count // args.fsdp
  fsdp = args.fsdp or count // args.data
  if data * fsdp != count:
    given = [f'--{k} {v}' for k in ('data', 'fsdp') if (v := vars(args)[k])]
    raise UsageError(
      f'{" ".join(given)} is no mesh of {count} chips: data × fsdp must be '
      f'{count}.'
    )
  return data, fsdp


def _print_parameters(work: 'Job') -> None:
  from imagen_jax.cascade import stage as stages
  from imagen_jax.training.report import parameter_table

  params = work.state.params
  print(f'{work.stage.name}: {stages.num_params(params):,} parameters')
  for group, size in parameter_table(params).items():
    print(f'  {group:28} {size / 1e6:10.2f} M')
  text = stages.num_params(work.text_params)
  counted = f', {text:,} parameters' if text else ''
  print(f'  frozen, not counted above: {work.text_name}{counted}')


def _print_plan(work: 'Job', chip: Chip, plan: 'Plan', step: str) -> None:
  count = plan.data * plan.fsdp
  parts = f' in {plan.accumulate} parts' if plan.accumulate > 1 else ''
  zero = ', zero' if work.zero and step == 'train' else ''
  print(
    f'\n{step} step on {count} {chip.name}, data {plan.data} × fsdp '
    f'{plan.fsdp}{zero}, {plan.batch_size} images{parts}, remat {work.remat}'
  )
  print('per chip, computed (not measured):')
  for name, size in plan.memory.items():
    print(f'  {name:28} {size / GIB:10.3f} GiB')
  room = chips.usable(chip)
  word = 'fits' if plan.total <= room else 'does not fit'
  print(
    f'  {"total":28} {plan.total / GIB:10.3f} GiB of {room / GIB:.1f}: {word}'
  )
  least = ', '.join(f'{k} {v:.3g} s' for k, v in plan.seconds.items())
  print(
    f'{plan.flops * count:.4g} FLOPs per step, {plan.flops:.4g} per chip; '
    f'at full speed: {least}'
  )
  if step == 'train' and work.remat:
    print(
      f'{_without_remat(work, plan) * count:.4g} FLOPs per step without those '
      'that rematerialization repeats: what an MFU counts'
    )
  if step == 'sample':
    print(f'at most {plan.batch_size / plan.roofline:.3g} images/s')
    return
  steps = work.config.train.num_steps
  hours = steps * plan.roofline / 3600
  print(
    f'at least {plan.roofline:.3g} s/step: {steps:,} steps take '
    f'{hours / 24:.1f} days, {hours * count:,.0f} chip-hours; real steps are '
    'slower'
  )
  if plan.accumulate > 1:
    print(
      f'train with --config.train.accumulate={plan.accumulate} for these parts'
    )


def _without_remat(work: 'Job', plan: 'Plan') -> float:
  """FLOPs of a chip's training step without rematerialization."""
  from imagen_jax.training.flops import count_flops

  plain = work.changed({'stage.net.remat': None})
  local = plan.batch_size // (plan.data * plan.fsdp)
  return count_flops(plain.trace('train', local))


def _print_splits(plans: list['Plan'], chosen: 'Plan', chip: Chip) -> None:
  print('\n  data × fsdp     GiB     s/step')
  for plan in plans:
    note = '' if plan.total <= chips.usable(chip) else '  does not fit'
    note += '  <- chosen' if plan is chosen else ''
    print(
      f'  {plan.data:4} × {plan.fsdp:<4} {plan.total / GIB:8.2f} '
      f'{plan.roofline:10.3g}{note}'
    )


def _compile(
  args: argparse.Namespace, work: 'Job', chip: Chip, plan: 'Plan'
) -> None:
  import jax

  from imagen_jax.planning import compile

  print(f'\ncompiling for {args.topology} …', flush=True)
  name, room = work.stage.name, chips.usable(chip)
  try:
    done = compile.compile_step(
      work, args.topology, fsdp=plan.fsdp, step=args.step, effort=args.effort
    )
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UsageError(
      f'{name} does not fit, the TPU compiler says: '
      f'{compile.out_of_memory(error)}; try a larger --fsdp or --accumulate.'
    ) from error
  for part in ('arguments', 'outputs', 'temporaries', 'total'):
    print(f'  {part:11} {getattr(done, part) / GIB:.3f} GiB')
  print(f'  a device has {room / GIB:.1f} GiB')
  print(
    f'  {done.flops:.4g} FLOPs, {done.bytes_accessed:.4g} bytes '
    '(the body of a loop counts once)'
  )
  if done.collectives is None:
    print('  communication not listed: jaxlib cannot read the program')
  for kind, (number, size) in sorted((done.collectives or {}).items()):
    print(f'  {number} {kind}, {size / 1e6:.1f} MB')
  print(
    f'  traced in {done.lower_seconds:.0f} s, compiled in '
    f'{done.compile_seconds:.0f} s'
  )
  if done.total > room:
    raise UsageError(
      f'{name} compiles but does not fit: it needs '
      f'{(done.total - room) / GIB:.1f} GiB more; try a larger --fsdp or '
      '--accumulate.'
    )


if __name__ == '__main__':
  sys.exit(main())
