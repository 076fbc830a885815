r"""Text embeddings: captions per second, error of storage, memory on a TPU.

  python benchmarks/embeddings.py speed --size small
  python benchmarks/embeddings.py speed --size xxl --dtype bfloat16
  python benchmarks/embeddings.py error --num 512
  python benchmarks/embeddings.py compile --topology v5e:4x4 --fsdp 4

`speed` encodes random tokens with random weights of T5 v1.1, at the length of
each bucket. `error` prepares scenes of the shapes world, stores embeddings of
the demo's text encoder, and compares them, and the held-out losses of the
demo's stages with the same noise, with float32. `compile` gives what the TPU
compiler (extra `plan`) says of `imagen-embed`'s step. Nothing else should be
running.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.cli import embed as embed_command
from imagen_jax.cli import prepare as prepare_command
from imagen_jax.cli.configs import load_config
from imagen_jax.data.sources import make_source
from imagen_jax.io import embeddings, model_folder, paths
from imagen_jax.nets.t5 import SIZES, T5Encoder
from imagen_jax.planning import compile as compiler
from imagen_jax.text import encoder as text_encoder
from imagen_jax.text import weights
from imagen_jax.training import chips
from imagen_jax.training.experiment import find_experiment
from imagen_jax.training.flops import count_flops
from imagen_jax.training.heldout import make_heldout_loss


def module_of(args):
  return T5Encoder(**SIZES[args.size], dtype=jnp.dtype(args.dtype))


def random_params(module):
  """Random weights, made on the device."""

  def leaf(number, shape):
    key = jax.random.fold_in(jax.random.key(0), number)
    scale = 1 if len(shape.shape) < 2 else shape.shape[-2] ** -0.5
    return scale * jax.random.normal(key, shape.shape, shape.dtype)

  leaves, tree = jax.tree.flatten(weights.abstract_params(module))
  made = [jax.jit(leaf, static_argnums=1)(i, x) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(tree, made)


def flops_of(module, *arrays):
  encode = functools.partial(text_encoder.encode_tokens, module)
  return count_flops(jax.make_jaxpr(encode)(*arrays))


def speed(args):
  """Captions per second at the length of each bucket."""
  module = module_of(args)
  params = random_params(module)
  device = jax.devices()[0].device_kind
  print(f'T5 {args.size}, {args.dtype}, on one {device}')
  print('positions  captions/batch  captions/s  FLOPs/caption  FLOPs/s')
  for size in text_encoder.buckets(args.max_len):
    rows = max(1, args.batch_tokens // size)
    ids = np.random.default_rng(0).integers(3, 32000, (rows, size), np.int32)
    mask = np.ones(ids.shape, bool)
    run = functools.partial(
      text_encoder.encode_tokens, module, params, ids, mask
    )
    jax.block_until_ready(run())
    times = []
    until = time.perf_counter() + args.seconds
    while len(times) < 3 or time.perf_counter() < until:
      start = time.perf_counter()
      jax.block_until_ready(run())
      times.append(time.perf_counter() - start)
    rate = rows / np.median(times)
    each = flops_of(module, params, ids, mask) / rows
    print(f'{size:9} {rows:15} {rate:11.1f} {each:14.3g} {rate * each:8.3g}')


def error(args):
  """What storing in bfloat16 and int8 changes."""
  with tempfile.TemporaryDirectory() as folder:
    for record in model_folder.find_stages(paths.located(None)):
      _error_of_stage(record, pathlib.Path(folder) / record.name, args.num)


def _error_of_stage(record, out, num):
  silent = contextlib.redirect_stdout(open(os.devnull, 'w'))
  data, text = record.config['data'], record.config['text']
  seeds = {'train': data['seed'], 'eval': data['seed'] + 1}
  for split, seed in seeds.items():
    path = str(out / split)
    with silent:
      words = f'--source shapes --size {record.resolution} --num {num}'.split()
      words += ['--seed', str(seed), '--out', path]
      assert prepare_command.main(words) == 0
      for store in embeddings.STORES:
        words = ['--path', path, '--text', text['path'], '--store', store]
        words += ['--max_len', str(text['max_len'])]
        assert embed_command.main(words) == 0
  losses = {}
  for name in (None, *(f'demo-{store}' for store in embeddings.STORES)):
    config = load_config(f'shapes_{record.name}').to_dict()
    for key in 'stage', 'text':
      config[key] |= record.config[key]
    config['data'] |= {'kind': 'arrayrecord', 'path': str(out / 'train')}
    config['data'] |= {'eval_path': str(out / 'eval'), 'text': name}
    config['data'] |= {'mixture': None, 'seed': 0}
    config = ConfigDict(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = find_experiment('stage')(config, mesh)
    params = jax.device_put(model_folder.load_params(record))
    with jax.set_mesh(mesh):
      losses[name] = make_heldout_loss(made, made.load_frozen())(params)
    if name is None:
      exact = made
  whole = losses.pop(None)
  print(f'{record.name}: held-out loss {whole:.6f}')
  captions = [e['caption'] for e in exact.source('eval')]
  emb, mask = exact.text.encode(captions, max_len=text['max_len'])
  for name, loss in losses.items():
    source = make_source(
      kind='arrayrecord',
      path=out / 'eval',
      size=record.resolution,
      text=name,
    )
    stored = np.stack([e['text'] for e in source]).astype(np.float32)
    one, two = emb[mask], stored[mask]
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    cosine = (one * two).sum(-1) / norms
    print(
      f'  {name}: cosine per token mean {cosine.mean():.7f}, least '
      f'{cosine.min():.7f}; held-out loss {loss:.6f}, {loss / whole - 1:+.3%}'
    )


def compile_step(args):
  """What a TPU's compiler says of a batch of each bucket."""
  module = module_of(args)
  devices = compiler.topology_devices(args.topology)
  mesh = sharding.make_mesh(fsdp=args.fsdp, devices=devices)
  params = weights.abstract_params(module)
  params = sharding.with_shardings(
    params, sharding.state_shardings(params, mesh)
  )
  rows = sharding.batch_sharding(mesh)
  chip, _ = chips.parse_topology(args.topology)
  room = chips.usable(chip) / chips.GIB
  print(
    f'T5 {args.size}, {args.dtype}, on {args.topology}, data '
    f'{mesh.shape["data"]} × fsdp {args.fsdp}; a chip has {room:.1f} GiB'
  )
  print('positions  captions  arguments  outputs  temporaries  FLOPs  seconds')
  for size in text_encoder.buckets(args.max_len):
    count = max(1, args.batch_tokens // size) * mesh.size
    ids, mask = (
      jax.ShapeDtypeStruct((count, size), dtype, sharding=rows)
      for dtype in (jnp.int32, bool)
    )
    with jax.set_mesh(mesh):
      lowered = text_encoder.encode_tokens.lower(module, params, ids, mask)
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - start
    sizes = [
      getattr(memory, f'{part}_size_in_bytes') / chips.GIB
      for part in ('argument', 'output', 'temp')
    ]
    flops = flops_of(module, params, ids, mask)
    print(
      f'{size:9} {count:9} {sizes[0]:10.3f} {sizes[1]:8.3f} {sizes[2]:12.3f} '
      f'{flops / mesh.size:6.3g} {seconds:8.0f}'
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', choices=('speed', 'error', 'compile'))
  parser.add_argument('--size', choices=SIZES, default='xxl')
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--max_len', type=int, default=128)
  parser.add_argument('--batch_tokens', type=int, default=4096)
  parser.add_argument('--seconds', type=float, default=10)
  parser.add_argument('--num', type=int, default=512)
  parser.add_argument('--topology', default='v5e:4x4')
  parser.add_argument('--fsdp', type=int, default=1)
  args = parser.parse_args()
  {'speed': speed, 'error': error, 'compile': compile_step}[args.what](args)


if __name__ == '__main__':
  main()
