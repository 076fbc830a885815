r"""Images per second of one core: preparing tars, and reading them to train.

  python benchmarks/prepare.py
  python benchmarks/prepare.py --path 00000.tar --sizes 64 256

Each is given one tar of JPEGs: yours, or one of made-up images with the
spectrum of photographs, 512² and 1024². The time is that of the processor, all
threads together, so other processes matter little. Compared, where they are
installed (`pip install img2dataset webdataset torch`):

  prepare            `prepare_shard`: index, decode, crop, area, encode, write
  resize (4:4:4)     the same without the files: bytes -> JPEG of quality 95
  resize (4:2:0)     with the chroma subsampled, as img2dataset stores it
  resize (stored)    as `prepare (jpeg)` stores it: a JPEG of that size, not
                     of more quality, keeps its bytes and is only checked
  img2dataset        its Resizer: bytes -> JPEG of quality 95, center_crop, area
  load               batches of a source of tars, area
  torch DataLoader   webdataset, Pillow's bicubic, as torchvision resizes
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import pathlib
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image, ImageOps

from imagen_jax.data import shards
from imagen_jax.data.claim import claim
from imagen_jax.data.encoding import Encoding
from imagen_jax.data.prepare import prepare_shard
from imagen_jax.data.webdataset import WebDatasetSource
from imagen_jax.io.decode import fitted

CASES = ((512, 64), (512, 256), (1024, 64), (1024, 256), (1024, 1024))
PAIRS = (
  ('resize (4:2:0)', 'img2dataset'),
  ('resize (stored)', 'img2dataset'),
  ('load', 'torch DataLoader'),
)
BATCH = 16
ROUNDS = 5  # the fastest counts: others disturb in one direction only


def made_up(side, seed):
  """A JPEG of quality 90 with amplitudes ∝ 1 / frequency, as photographs."""
  rng = np.random.default_rng(seed)
  y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
  spectrum = 1 / np.maximum(np.hypot(y, x), 1 / side)
  noise = np.fft.rfft2(rng.normal(size=(side, side, 3)), axes=(0, 1))
  image = np.fft.irfft2(noise * spectrum[..., None], axes=(0, 1))
  image = 128 + 50 * (image - image.mean()) / image.std()
  grey = image.mean(-1, keepdims=True)
  image = np.clip(grey + 0.3 * (image - grey), 0, 255).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(image).save(out, 'JPEG', quality=90)
  return out.getvalue()


def write_tar(path, side, number):
  with tarfile.open(path, 'w') as tar:
    for i in range(number):
      for suffix, data in ('jpg', made_up(side, i)), ('txt', b'an image'):
        info = tarfile.TarInfo(f'{i:09d}.{suffix}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  return path


def rates(works, number):
  """{name: images per second of processor time} of functions, in turns."""
  seconds = dict.fromkeys(works, float('inf'))
  for _ in range(ROUNDS):
    for name, work in works.items():
      start = time.process_time()
      work()
      seconds[name] = min(seconds[name], time.process_time() - start)
  return {name: number / spent for name, spent in seconds.items()}


def prepared(tar, size, encode):
  """`imagen-prepare` of one tar, without starting a process."""
  with tempfile.TemporaryDirectory() as out:
    spec = shards.Spec(
      {'kind': 'webdataset', 'path': str(tar), 'resize': 'area'}, size, encode
    )
    spec, found = shards.plan(spec, max_bad=1.0)
    for shard in claim(out, spec, found):
      prepare_shard(shard, out, spec)


def img2dataset(data, size):
  """Its resizer, or None if it is not installed."""
  with contextlib.redirect_stderr(io.StringIO()):
    os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'
    resizer = importlib.import_module('img2dataset.resizer')
    # As its downloader does: its workers are processes.
    importlib.import_module('cv2').setNumThreads(1)
  resize = resizer.Resizer(
    image_size=size,
    resize_mode='center_crop',
    resize_only_if_bigger=True,
    downscale_interpolation='area',
    encode_quality=95,
  )

  def work():
    for one in data:
      result = resize(io.BytesIO(one))
      assert result[-1] is None, result[-1]

  return work


def torch_loader(tar, size):
  """Batches of torch's DataLoader, in this process, for one epoch."""
  webdataset = importlib.import_module('webdataset')
  data_utils = importlib.import_module('torch.utils.data')
  importlib.import_module('torch').set_num_threads(1)

  def image(example):
    square = ImageOps.fit(example['jpg'], (size, size), Image.BICUBIC)
    return np.asarray(square), example['txt']

  def work():
    data = webdataset.WebDataset(str(tar), shardshuffle=False)
    data = data.decode('pil').map(image)
    for _ in data_utils.DataLoader(data, BATCH, num_workers=0):
      pass

  return work


def measure(tar, size):
  """{what: images per second}."""
  source = WebDatasetSource(tar, size)
  number = len(source)
  data = [source.read(i)[0] for i in range(number)]
  jpeg = Encoding('jpeg', 95)

  def resize(subsampling):
    for one in data:
      image = fitted(one, size)
      if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
      image.save(io.BytesIO(), 'jpeg', quality=95, subsampling=subsampling)

  def load():  # without the threads of training, which would read ahead
    for start in range(0, number, BATCH):
      some = range(start, min(start + BATCH, number))
      np.stack([source[i]['image'] for i in some])

  works = {
    'prepare (raw)': lambda: prepared(tar, size, Encoding()),
    'prepare (jpeg)': lambda: prepared(tar, size, jpeg),
    'resize (4:4:4)': lambda: resize(0),
    'resize (4:2:0)': lambda: resize(2),
    'resize (stored)': lambda: [jpeg.encode(fitted(x, size), x) for x in data],
    'load': load,
  }
  peers = {
    'img2dataset': lambda: img2dataset(data, size),
    'torch DataLoader': lambda: torch_loader(tar, size),
  }
  for name, make in peers.items():
    try:
      works[name] = make()
    except ImportError as error:
      print(f'{name} is left out: {error.name} is not installed.')
  return rates(works, number)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--path', type=pathlib.Path, help='a tar of JPEGs')
  parser.add_argument('--sizes', type=int, nargs='+', default=[64, 256])
  parser.add_argument('--number', type=int, default=48, help='images made up')
  args = parser.parse_args()
  cases = [(None, size) for size in args.sizes] if args.path else CASES
  with tempfile.TemporaryDirectory() as folder:
    for side, size in cases:
      tar = args.path or pathlib.Path(folder, f'{side}.tar')
      if not tar.exists():
        write_tar(tar, side, args.number)
      found = measure(tar, size)
      row = {k: round(v, 1) for k, v in found.items()}
      for ours, peer in PAIRS:
        if peer in found:
          row[f'{ours} : {peer}'] = round(found[ours] / found[peer], 2)
      print(json.dumps({'from': side, 'to': size, **row}), flush=True)


if __name__ == '__main__':
  main()
