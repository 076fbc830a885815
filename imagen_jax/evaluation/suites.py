"""What is generated and how it is scored: one small class per suite.

A suite has `label`, `num`, and

  items()                  every `Item` of a run
  digest()                 16 hex digits for the prompts
  judge                    function of (item, image) to fields of its record
  score(folder, records)   {suite name: {category: score}} of a finished run
  provenance(), notes(resolution)
"""

import dataclasses
import hashlib
import json
import pathlib
import random

import numpy as np

from imagen_jax.errors import DataError, UsageError
from imagen_jax.evaluation import frechet, prompts, scores
from imagen_jax.evaluation.generation import Item, read_image
from imagen_jax.io import files
from imagen_jax.worlds import suite as shapes_suite

BLOCK = 256  # images in memory at a time
NEIGHBOURS = 10_000  # images of either set for precision and recall


def make(args, resolution):
  """The suite that the command line asks for.

  Args:
    args: of cli/evaluate.py.
    resolution: of the images to come.

  Raises:
    UsageError, DataError, ModelError: what it needs is missing or broken.
  """
  if args.suite == 'shapes':
    categories = _chosen(args.categories, shapes_suite.CATEGORIES)
    return Shapes(categories, args.num or 300, args.from_truth)
  if args.suite == 'fid':
    return _fid(args, resolution)
  if not args.prompts:
    raise UsageError(
      f'--suite {args.suite} needs --prompts FILE: DrawBench .csv, '
      'PartiPrompts .tsv, GenEval .jsonl, or .txt with one prompt a line.'
    )
  if args.suite == 'clip' and not args.clip:
    raise UsageError(
      '--suite clip needs --clip DIR, a CLIP model in Hugging Face layout.'
    )
  listed = prompts.read_prompts(args.prompts)
  known = tuple(dict.fromkeys(category for category, _ in listed))
  categories = _chosen(args.categories, known)
  chosen = [
    (category, prompt)
    for name in categories
    for category, prompt in [x for x in listed if x[0] == name][: args.num]
  ]
  extractor = None
  if args.clip:
    from imagen_jax.evaluation import extractors

    extractor = extractors.load_clip(args.clip)
  return Prompts(args.suite, tuple(chosen), args.num_images, extractor)


def _fid(args, resolution):
  if not args.data or not (args.inception or args.clip):
    raise UsageError(
      '--suite fid needs --data DIR, real images with captions, and '
      '--inception FILE or --clip DIR, the weights to compare them with.'
    )
  from imagen_jax.data.sources import make_source
  from imagen_jax.evaluation import extractors

  return Fid(
    source=make_source(kind=args.source, size=resolution, path=args.data),
    num=args.num or 30_000,
    seed=args.seed,
    inception=args.inception and extractors.load_inception(args.inception),
    clip=args.clip and extractors.load_clip(args.clip),
  )


def _chosen(text, known):
  """The categories named in a list such as 'pair,count', in known order."""
  if text is None:
    return tuple(known)
  names = text.split(',')
  for name in names:
    if name not in known:
      raise UsageError(
        f'there is no category {name!r}; there are {", ".join(known)}.'
      )
  return tuple(name for name in known if name in names)


def digest(value):
  """16 hex digits that stand for a JSON value."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The judge's scores, see `shapes_suite`."""

  categories: tuple[str, ...]
  num: int
  from_truth: bool = False

  @property
  def label(self):
    return 'shapes_from_truth' if self.from_truth else 'shapes'

  def items(self):
    return shapes_suite.items(self.categories, self.num)

  def digest(self):
    # Not of `num`: a longer run continues a shorter one.
    some = shapes_suite.items(shapes_suite.CATEGORIES, 20)
    return digest([item.prompt for item in some])

  judge = staticmethod(shapes_suite.record)
  true_image = staticmethod(shapes_suite.true_image)

  def score(self, folder, records):
    result, own = shapes_suite.score(records, self.categories, self.num)
    suffix = '_from_truth' if self.from_truth else ''
    return {self.label: result, f'judge{suffix}': own}

  def provenance(self):
    return {'scenes': f'seed {shapes_suite.SEED}, split eval'}

  def notes(self, resolution):
    note = shapes_suite.notes(resolution)
    return [note] if note else []


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Images of a user's prompts; with CLIP's weights also their CLIP score.

  Attributes:
    label: 'prompts' or 'clip'.
    listed: ((category, prompt), …).
    num_images: of each prompt.
    extractor: CLIP, or None.
  """

  label: str
  listed: tuple[tuple[str, str], ...]
  num_images: int
  extractor: object = None
  judge = None

  @property
  def num(self):
    return len(self.listed)

  def items(self):
    result, numbers, seen = [], {}, {}
    for category, prompt in self.listed:
      for _ in range(self.num_images):
        number = numbers[category] = numbers.get(category, -1) + 1
        # A prompt that is listed twice gets other images.
        key = category, prompt
        index = seen[key] = seen.get(key, -1) + 1
        result.append(Item(category, number, prompt, index))
    return result

  def digest(self):
    return digest([self.listed, self.num_images])

  def score(self, folder, records):
    if self.extractor is None:
      result = {}
      for category, _ in records:
        result.setdefault(category, {'n': 0})['n'] += 1
      return {self.label: result}
    items = self.items()
    values = clip_scores(self.extractor, folder, records, items)
    by_category = {}
    for item, value in zip(items, values):
      by_category.setdefault(item.category, []).append(value)
    result = {c: scores.mean(v) for c, v in by_category.items()}
    return {self.label: result | {'overall': scores.mean(values)}}

  def provenance(self):
    if self.extractor is None:
      return {'prompts_digest': self.digest()}
    return {
      'prompts_digest': self.digest(),
      'clip_sha256': self.extractor.digest,
      'resize': self.extractor.resize,
    }

  def notes(self, resolution):
    return []


@dataclasses.dataclass(frozen=True)
class Fid:
  """The paper's protocol (Section 4.1): captions of real images, generated.

  `num` captions are taken at random; the images generated of them are compared
  with all real images, which are cut square and averaged to the model's
  resolution.

  Attributes:
    source: of the real images, see `data.sources`.
    num: captions.
    seed: of their choice.
    inception: `Extractor` for the Fréchet distance, KID, precision, recall.
    clip: `Extractor` for CMMD and the CLIP score.
  """

  source: object
  num: int
  seed: int
  inception: object = None
  clip: object = None
  label = 'fid'
  judge = None

  def _captions(self):
    total = len(self.source)
    chosen = random.Random(self.seed).sample(range(total), min(self.num, total))
    captions = getattr(self.source, 'captions', None)
    if captions is None:
      captions = [self.source[i]['caption'] for i in range(total)]
    return [captions[i] for i in chosen]

  def items(self):
    result, seen = [], {}
    for number, caption in enumerate(self._captions()):
      index = seen[caption] = seen.get(caption, -1) + 1
      result.append(Item('all', number, caption, index))
    return result

  def digest(self):
    return digest(self._captions())

  def score(self, folder, records):
    items, result = self.items(), {}
    if self.inception:
      generated = _features(self.inception, _generated(folder, records, items))
      real = self._real(folder, self.inception)
      if min(len(generated), len(real)) < 4:
        raise DataError(
          f'{len(generated)} generated and {len(real)} real images are too few '
          'to compare; raise --num.'
        )
      result['frechet'] = frechet.frechet(
        *frechet.moments(generated), *frechet.moments(real)
      )
      result['kid'], result['kid_sd'] = frechet.kid(generated, real)
      result['precision'], result['recall'] = frechet.precision_recall(
        real[:NEIGHBOURS], generated[:NEIGHBOURS]
      )
    if self.clip:
      generated = _features(self.clip, _generated(folder, records, items))
      result['cmmd'] = frechet.cmmd(generated, self._real(folder, self.clip))
      texts = self.clip.text([item.prompt for item in items])
      result['clip_score'] = float(cosine_scores(generated, texts).mean())
    result |= {'n': len(items), 'n_real': len(self.source)}
    return {'fid': {'all': result}}

  def _real(self, folder, extractor):
    """Features of all real images, kept for the next run of a sweep."""
    captions = digest([self._captions(), len(self.source)])
    name = f'real-{extractor.digest[:16]}-{captions}.npy'
    path = pathlib.Path(folder).parent / name
    if path.exists():
      return np.load(path, allow_pickle=False)
    images = (self.source[i]['image'] for i in range(len(self.source)))
    features = _features(extractor, images)
    with files.replacing(path) as temporary:
      with temporary.open('wb') as file:
        np.save(file, features)
    return features

  def provenance(self):
    used = {'inception': self.inception, 'clip': self.clip}
    found = {'captions_digest': self.digest(), 'real_resize': 'area'}
    for name, extractor in used.items():
      if extractor:
        found[f'{name}_sha256'] = extractor.digest
        found[f'{name}_resize'] = extractor.resize
    return found

  def notes(self, resolution):
    few = min(self.num, len(self.source))
    if few < 10_000:
      return [
        f'{few} images bias the Fréchet distance upwards; compare it only '
        'with values of the same number. The paper uses 30000.'
      ]
    return []


def cosine_scores(images, texts):
  """The CLIP score of each pair: 100 · max(cosine, 0), [N] (Hessel 2021)."""
  images = images / np.linalg.norm(images, axis=1, keepdims=True)
  texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
  return 100 * np.maximum((images * texts).sum(1), 0)


def clip_scores(extractor, folder, records, items):
  """The CLIP score of each item's image with its prompt, [N]."""
  images = _features(extractor, _generated(folder, records, items))
  return cosine_scores(images, extractor.text([x.prompt for x in items]))


def _generated(folder, records, items):
  for item in items:
    yield read_image(folder, records[item.category, item.number])


def _features(extractor, images):
  found, block = [], []
  for image in images:
    block.append(image)
    if len(block) == BLOCK:
      found.append(extractor.image(np.stack(block)))
      block = []
  if block:
    found.append(extractor.image(np.stack(block)))
  return np.concatenate(found)
