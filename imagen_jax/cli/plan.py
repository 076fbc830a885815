"""imagen-plan: whether a config fits a pod, its cost, and the best mesh."""

import sys

from imagen_jax.cli import errors
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.errors import UsageError


def main(argv=None):
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _parser():
  parser = errors.Parser(
    prog='plan.py',
    description='Plan a stage for a pod, without one: memory, time, the best '
    'split.',
    epilog='Any config key can be set: --config.train.batch_size=1024.',
  )
  add = parser.add_argument
  add('--config', required=True, help='name of a config, or a path to one')
  add('--topology', help='TPU chips and their shape, such as v5e:16x16')
  add('--chip', help='v4, v5e, v5p, v6e, a100, h100 or h200')
  add('--devices', type=int, help='how many chips, with --chip')
  add('--data', type=int, help='copies of the state; the best when omitted')
  add('--fsdp', type=int, help='chips that share one copy, likewise')
  add('--step', choices=('train', 'sample'), default='train', help='which step')
  add('--batch_size', type=int, help="images of a step; the config's")
  add('--accumulate', type=int, help="parts of a batch; the config's")
  add(
    '--text',
    default='auto',
    help='T5 v1.1 by size (small, base, large, xl, xxl), cached (embeddings '
    'made beforehand), or auto: what text.path is called',
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
    help="the compiler's: full as for training, low for a quicker look",
  )
  return parser


def _main(argv):
  argv, overrides = split_overrides(argv)
  args = _parser().parse_args(argv)
  config = load_config(args.config, overrides)
  from imagen_jax.training import chips

  chip, count = _chips(args, chips)
  from imagen_jax.cli import runtime

  _stay_off_accelerators()
  runtime.start()
  from imagen_jax.planning import analytic, job

  if args.text not in job.TEXTS:
    raise UsageError(
      f'--text {args.text!r} is unknown; choose {", ".join(job.TEXTS)}.'
    )
  for name in ('batch_size', 'accumulate', 'data', 'fsdp'):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise UsageError(f'--{name} {value}: give 1 or more.')
  work = job.make_job(
    config,
    text=args.text,
    batch_size=args.batch_size,
    accumulate=args.accumulate,
  )
  if args.data or args.fsdp:
    data, fsdp = _mesh(args, count)
    plans, plan = (
      [],
      analytic.make_plan(work, chip, data=data, fsdp=fsdp, step=args.step),
    )
  else:
    plans = analytic.splits(work, chip, count, step=args.step)
    plan = analytic.best(plans, chip) or min(plans, key=lambda p: p.total)
  _print_parameters(work)
  _print_plan(work, chip, plan, args.step)
  if len(plans) > 1:
    _print_splits(plans, plan, chip)
  sys.stdout.flush()
  if args.compile:
    return _compile(args, work, chip, plan)
  analytic.require_fit(plan, work, chip, count, step=args.step)
  return 0


def _stay_off_accelerators():
  """Uses the CPU only: another process may hold the accelerators."""
  import jax

  jax.config.update('jax_platforms', 'cpu')


def _chips(args, chips):
  """(chip, number of chips) that the flags ask for."""
  if args.topology and args.chip:
    raise UsageError('give --topology, or --chip with --devices, not both.')
  if args.topology:
    if args.devices:
      raise UsageError('--topology says how many chips: leave out --devices.')
    return chips.parse_topology(args.topology)
  if args.compile:
    raise UsageError(
      f'--compile needs --topology, such as {" or ".join(chips.EXAMPLES[:2])}.'
    )
  chip = chips.find_chip(args.chip or 'v5e')
  count = 256 if args.devices is None else args.devices
  if count < 1:
    raise UsageError(f'--devices {count}: give 1 or more.')
  return chip, count


def _mesh(args, count):
  """(data, fsdp), whose product is `count`; one flag may be missing."""
  known = args.data or args.fsdp
  if count % known or (
    args.data and args.fsdp and args.data * args.fsdp != count
  ):
    asked = ' '.join(
      f'--{name} {getattr(args, name)}'
      for name in ('data', 'fsdp')
      if getattr(args, name)
    )
    raise UsageError(
      f'{asked} does not make a mesh of {count} chips: their product must be '
      f'{count}.'
    )
  fsdp = args.fsdp or count // args.data
  return count // fsdp, fsdp


def _print_parameters(work):
  from imagen_jax.cascade import stage as stages
  from imagen_jax.training.report import parameter_table

  params = work.state.params
  print(f'{work.stage.name}: {stages.num_params(params):,} parameters')
  for group, size in parameter_table(params).items():
    print(f'  {group:28} {size / 1e6:10.2f} M')
  text = stages.num_params(work.text_params)
  print(f'  frozen, besides: {work.text_name}', end='')
  print(f', {text:,} parameters' if text else '')


def _print_plan(work, chip, plan, step):
  from imagen_jax.training import chips

  count = plan.data * plan.fsdp
  print(
    f'\n{step} step on {count} {chip.name}, data {plan.data} × fsdp '
    f'{plan.fsdp}, {plan.batch_size} images'
    + (f' in {plan.accumulate} parts' if plan.accumulate > 1 else '')
    + f', remat {work.stage.net.remat}'
  )
  print('per chip, computed (not measured):')
  for name, size in plan.memory.items():
    print(f'  {name:28} {size / chips.GIB:10.3f} GiB')
  room = chips.usable(chip)
  word = 'fits' if plan.total <= room else 'DOES NOT FIT'
  print(
    f'  {"in all":28} {plan.total / chips.GIB:10.3f} GiB of '
    f'{room / chips.GIB:.1f}: {word}'
  )
  print(
    f'{plan.flops * count:.4g} FLOPs a step, {plan.flops:.4g} a chip; '
    'least seconds for it: '
    + ', '.join(f'{k} {v:.3g}' for k, v in plan.seconds.items())
  )
  _print_cost(work, plan, count, step)


def _print_cost(work, plan, count, step):
  if step == 'sample':
    print(
      f'at full speed {plan.batch_size / plan.roofline:.3g} images a second'
    )
    return
  steps = work.config.train.num_steps
  hours = steps * plan.roofline / 3600
  print(
    f'at full speed {plan.roofline:.3g} s a step: {steps:,} steps are '
    f'{hours / 24:.1f} days, {hours * count:,.0f} chip-hours; no real step '
    'reaches that'
  )
  if plan.accumulate > 1:
    print(
      f'the batch fits in {plan.accumulate} parts: '
      f'--config.train.accumulate={plan.accumulate} when training'
    )


def _print_splits(plans, chosen, chip):
  from imagen_jax.training import chips

  print('\n  data × fsdp     GiB     s/step')
  for plan in plans:
    fits = plan.total <= chips.usable(chip)
    note = '' if fits else '  does not fit'
    note += '  <- chosen' if plan is chosen else ''
    print(
      f'  {plan.data:4} × {plan.fsdp:<4} {plan.total / chips.GIB:8.2f} '
      f'{plan.roofline:10.3g}{note}'
    )


def _compile(args, work, chip, plan):
  import jax

  from imagen_jax.planning import compile
  from imagen_jax.training import chips

  devices = len(compile.topology_devices(args.topology))
  data = devices // plan.fsdp
  room = chips.usable(chip)
  print(f'\ncompiling for {args.topology}, {devices} devices …', flush=True)
  try:
    done = compile.compile_step(
      work,
      args.topology,
      data=data,
      fsdp=plan.fsdp,
      step=args.step,
      effort=args.effort,
    )
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UsageError(
      f'the TPU compiler says that {work.stage.name} does not fit: '
      f'{compile.out_of_memory(error)}; try a larger --fsdp or --accumulate.'
    ) from error
  gib = chips.GIB
  print(f'  arguments {done.arguments / gib:.3f} GiB')
  print(f'  results   {done.outputs / gib:.3f} GiB')
  print(f'  between   {done.temporaries / gib:.3f} GiB')
  print(f'  in all    {done.total / gib:.3f} GiB of {room / gib:.1f} a device')
  print(
    f'  {done.flops:.4g} FLOPs, {done.bytes_accessed:.4g} bytes '
    '(the body of a loop counts once)'
  )
  for kind, (number, size) in sorted(done.collectives.items()):
    print(f'  {number} {kind}, {size / 1e6:.1f} MB')
  print(
    f'  traced in {done.lower_seconds:.0f} s, compiled in '
    f'{done.compile_seconds:.0f} s'
  )
  if done.total > room:
    raise UsageError(
      f'{work.stage.name} compiles but does not fit: '
      f'{(done.total - room) / gib:.1f} GiB too few; try a larger --fsdp or '
      '--accumulate.'
    )
  return 0


if __name__ == '__main__':
  sys.exit(main())
