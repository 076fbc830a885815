"""Batches for training from tars of captioned images, decoded and resized."""

import contextlib
import io
import itertools
import tarfile
import tempfile

import numpy as np
from PIL import Image, ImageOps
from prepare import made_up

IMAGES, BATCH, SIZE, WORKERS, LENGTH = 1280, 32, 64, 2, 32
DISTINCT = 128  # images, of which there are copies
TIMED, AHEAD = 40, 24  # batches; more than any loader has made ahead


def _images(stored, kind):
  """Encoded images and captions: scenes of shapes, or made-up photographs."""
  if kind == 'jpg':
    return [(made_up(stored, i), 'an image') for i in range(DISTINCT)]
  from imagen_jax.data.sources import make_source

  source, found = make_source(kind='shapes', size=stored), []
  for example in map(source.__getitem__, range(DISTINCT)):
    out = io.BytesIO()
    Image.fromarray(example['image']).save(out, 'PNG')
    found.append((out.getvalue(), example['caption']))
  return found


def _tars(folder, stored, kind):
  """The pattern of as many tars as there are workers."""
  images = _images(stored, kind)
  for number in range(WORKERS):
    with tarfile.open(f'{folder}/{number:05d}.tar', 'w') as tar:
      for i in range(number, IMAGES, WORKERS):
        image, caption = images[i % DISTINCT]
        for suffix, data in (kind, image), ('txt', caption.encode()):
          info = tarfile.TarInfo(f'{i:09d}.{suffix}')
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))
  return f'{folder}/{{00000..{WORKERS - 1:05d}}}.tar'


def _work(iterator):
  """TIMED batches, before which those are taken that were made ahead."""

  def work():
    for _ in itertools.islice(iterator, TIMED):
      pass

  work.before = lambda: [*itertools.islice(iterator, AHEAD)]
  return work


_open = contextlib.ExitStack()  # folders, until the process ends


def _pattern(stored, kind):
  return _tars(_open.enter_context(tempfile.TemporaryDirectory()), stored, kind)


def _ours(stored, kind):
  from imagen_jax.data.pipeline import Order, batches
  from imagen_jax.data.webdataset import WebDatasetSource
  from imagen_jax.io import text_folder
  from imagen_jax.text.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(text_folder.find('demo'))

  def tokens(example):
    ids, mask, _ = tokenizer([example['caption']], LENGTH)
    return {'image': example['image'], 'ids': ids[0], 'mask': mask[0]}

  source = WebDatasetSource(_pattern(stored, kind), SIZE)
  return _work(
    batches(source, Order(0, BATCH), transform=tokens, workers=WORKERS)
  )


def _torch(stored, kind):
  import torch.utils.data
  import webdataset

  def image(example):
    square = ImageOps.fit(example[kind], (SIZE, SIZE), Image.BICUBIC)
    return np.asarray(square.convert('RGB')), example['txt']

  data = webdataset.WebDataset(_pattern(stored, kind), shardshuffle=False)
  data = data.repeat().shuffle(1000).decode('pil').map(image)
  loader = torch.utils.data.DataLoader(data, BATCH, num_workers=WORKERS)
  return _work(iter(loader))


contenders = {'imagen_jax': _ours, 'torch, webdataset': _torch}
