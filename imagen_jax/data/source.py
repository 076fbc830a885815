"""The interface of every data set: random access to captioned images."""

import abc
import typing

from imagen_jax.errors import UsageError


class Source(abc.ABC):
  """Random access to captioned images; derive from it to bring your own.

  A class needs `__len__` and `__getitem__`; the other members have defaults.
  Both are called from several threads. `sources.make_source` constructs it
  with the keyword arguments that its `__init__` names, out of `size` (side of
  the images in pixels), `split` ('train' or 'eval') and the keys of a config's
  `data` section.

  Attributes:
    path_is: what `data.path` names, for the message if it is not set; None if
      the source needs no path.
    in_bucket: whether that may be in a bucket, such as gs://bucket/folder.
    has_eval_split: whether split 'eval' holds images that 'train' does not.
    parts, weights: the sources that this one mixes, each shuffled for itself,
      and the fraction of each; its own examples are theirs, one part behind the
      other. Empty: it mixes none.
    endless: whether it has no natural size, so that a user must choose one.
    skipped: ((name, reason), …) of the samples that are skipped.
    bad: {name: reason} of the samples that are damaged.
    unlisted_bad: number of further damaged samples, of sets too large to list
      them all.
    unlisted: {reason: number} of further samples that are skipped.
    buckets: {(height, width): the examples of that shape}, where images differ
      in shape; a batch is of one shape. Empty: all are squares of `size`.
    text_header: what made the stored embeddings of the captions, see
      `embeddings.IDENTITY`; None if none are stored.
  """

  path_is: typing.ClassVar[str | None] = None
  in_bucket: typing.ClassVar[bool] = False
  has_eval_split: bool = False
  endless: typing.ClassVar[bool] = False
  parts: 'typing.Sequence[Source]' = ()
  weights: typing.Sequence[float] = ()
  skipped: typing.Sequence[tuple[str, str]] = ()
  bad: typing.Mapping[str, str] = {}
  unlisted_bad = 0
  unlisted: typing.Mapping[str, int] = {}
  buckets: typing.Mapping[tuple[int, int], typing.Sequence[int]] = {}
  text_header: typing.Mapping | None = None

  @property
  def fingerprint(self) -> str | None:
    """Identifies the data set; None if the config determines it."""
    return None

  @abc.abstractmethod
  def __len__(self) -> int:
    """Number of examples."""

  @abc.abstractmethod
  def __getitem__(self, i: int) -> dict:
    """One example.

    Returns:
      {'image': uint8 [size, size, 3], 'caption': str}. Where an image has
      several captions, 'captions' is a tuple of all and 'caption' the first;
      `text` and `mask` are then sequences with an entry for each. Training
      chooses one each epoch. Of a source with `buckets`, an image has its
      bucket's height and width.
    """

  def example(self, i: int) -> dict:
    """As `self[i]`, but a damaged example raises `BadSample`."""
    return self[i]

  def to_store(self, i: int) -> dict:
    """As `example(i)`, but as `pack` takes it, if that is cheaper."""
    return self.example(i)

  def caption(self, i: int) -> str:
    """The caption of example `i`, without the image if that is cheaper."""
    return self[i]['caption']

  def name(self, i: int) -> str:
    """A readable name of example `i`, for messages."""
    return f'example {i}'

  def skipped_image(self, name: str) -> bytes | None:
    """The encoded image of a skipped sample, for a report; None: unknown."""
    return None

  @classmethod
  def find_shards(cls, path: str) -> typing.Mapping[str, str] | None:
    """The files of a set that can be read each for itself, such as its tars.

    Returns:
      {name: path}, sorted; a file's name depends on no other file. None: there
      are none, and the set is prepared by ranges of its samples.
    """
    return None

  @classmethod
  def check_shard(cls, path: str, **options: typing.Any) -> None:
    """Raises UsageError if `open_shard` would, for a reason seen at once."""

  @classmethod
  def open_shard(
    cls, path: str, **options: typing.Any
  ) -> typing.ContextManager['Source']:
    """The source of one of these files alone, from nothing but that file.

    Args:
      path: of the file, with whose name those of its samples begin.
      **options: the constructor's other arguments.

    Raises:
      DataError: the file is missing, cut short or damaged.
    """
    raise NotImplementedError(f'{cls.__name__} has no shards')

  def note(self, name: str, reason: str) -> None:
    """Counts an example that turned out bad; may raise `DataError`."""

  @classmethod
  def prompt_notes(cls, prompts: typing.Sequence[str]) -> typing.Sequence[str]:
    """Notes for the user on prompts for a model trained on this source.

    Returns:
      sentences, such as one that lists words that occur in no caption.
    """
    return ()

  def check_text(self, **wanted: typing.Any) -> None:
    """Raises `DataError` if `text_header` has another value of some key."""

  @classmethod
  def suite(cls, config: typing.Any) -> typing.Any:
    """The evaluation suite for models of these data.

    Args:
      config: an `EvalConfig`.

    Returns:
      an `evaluation.suite.Suite`.

    Raises:
      UsageError: these data have no suite, or the config does not fit it.
    """
    raise UsageError(
      f'suite: {cls.__name__} has no suite of its own; choose one that takes '
      'prompts or real images (prompts, clip, fid).',
      key='suite',
    )
