"""The page: a form, images while they are sampled, and a gallery."""

import dataclasses
import pathlib
import random
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from imagen_jax.cascade import batching
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import ImagenError
from imagen_jax.io import files
from imagen_jax.web import uploads, view
from imagen_jax.web.jobs import Job, Studio, size_of, write_mask

MAX_UPLOAD = '20mb'
MAX_WAITING = 64  # jobs in the queue
VARIATIONS = 4
OWN = 'default'
LABELS = {
  'Text': 'text',
  'Image': 'image',
  'Inpaint': 'inpaint',
  'Upsample': 'upsample',
}
Entry = tuple[str, Job, int]  # the file of an image, its job, its index there
# One job at a time, whichever button asked for it.
QUEUED: dict[str, Any] = {'concurrency_id': 'device', 'concurrency_limit': 1}


@dataclasses.dataclass(frozen=True)
class Typed:
  """What the fields of stages hold.

  Attributes:
    shown: (model, stage) of each slot that is shown.
    kept: {(model, stage): (steps, guidance)} of those shown before.
  """

  shown: tuple[tuple[str, str], ...] = ()
  kept: Mapping[tuple[str, str], tuple[float | None, float | None]] = (
    dataclasses.field(default_factory=dict)
  )


def theme() -> gr.themes.Base:
  """Fonts of the system: the page loads nothing from elsewhere."""
  return gr.themes.Base(
    primary_hue='indigo',
    neutral_hue='slate',
    radius_size='md',
    font=['system-ui', 'sans-serif'],
    font_mono=['ui-monospace', 'monospace'],
  )


def launch(page: gr.Blocks, **options: Any) -> Any:
  """Serves a page, on this machine unless the options say otherwise.

  Args:
    page: from `make`.
    **options: of `gradio.Blocks.launch`, such as `share` in Colab.
  """
  chosen = {
    'server_name': '127.0.0.1',
    'share': False,
    'ssr_mode': False,
    'max_file_size': MAX_UPLOAD,
    'theme': theme(),
    'css': view.CSS,
    'footer_links': [],
  }
  page.queue(max_size=MAX_WAITING)
  return page.launch(**chosen | options)


class Page:
  """The parts of a page for a `Studio`, and what its buttons do."""

  def __init__(self, studio: Studio) -> None:
    self.studio = studio
    model = next(iter(studio.models))
    self.slots = max(len(studio.cascade(name).stages) for name in studio.models)
    with gr.Blocks(
      title='imagen_jax', analytics_enabled=False, delete_cache=(3600, 86400)
    ) as self.blocks:
      gr.Markdown('# imagen_jax', elem_id='head')
      self.entries, self.chosen = gr.State([]), gr.State(None)
      with gr.Row():
        with gr.Column(scale=5, min_width=340):
          self._form(model)
        with gr.Column(scale=7, min_width=340):
          self._results()
      self._events()

  def _form(self, model: str) -> None:
    self.prompt = gr.Textbox(
      label='Prompt',
      lines=2,
      submit_btn=False,
      placeholder='a red circle above a blue square',
      elem_id='prompt',
    )
    self.negative = gr.Textbox(
      label='Negative prompt', placeholder='what guidance steers away from'
    )
    with gr.Row():
      self.go = gr.Button('Generate', variant='primary', elem_id='go', scale=3)
      self.stop = gr.Button('Stop', variant='stop', elem_id='stop', scale=1)
    with gr.Row():
      self.count = gr.Number(
        1, label='Images', precision=0, elem_id='count', min_width=90
      )
      self.seed = gr.Number(
        0, label='Seed', precision=0, elem_id='seed', min_width=90
      )
      self.dice = gr.Button(
        'Random seed', size='sm', scale=0, min_width=110, elem_id='dice'
      )
    self.task = gr.Radio(
      list(LABELS), value='Text', label='Start from', elem_id='task'
    )
    # An input that is itself hidden or shown would lose its `preprocess`.
    with gr.Group(visible=False) as self.of_image:
      self.image = uploads.upload(
        label='Image', sources=['upload', 'clipboard'], elem_id='image'
      )
    with gr.Group(visible=False) as self.of_painting:
      self.painting = uploads.painting(
        label='Image; paint white where to inpaint',
        brush=gr.Brush(colors=['#ffffff'], color_mode='fixed'),
        transforms=(),
        layers=False,
        sources=('upload', 'clipboard'),
        elem_id='painting',
      )
    self.strength = gr.Slider(
      0.05, 1, 0.6, label='Strength: how far from the image', visible=False
    )
    with gr.Accordion('Model and sampling', open=True):
      with gr.Row():
        self.model = gr.Dropdown(
          list(self.studio.models), value=model, label='Model'
        )
        self.sampler = gr.Dropdown(
          [OWN, *SAMPLERS], value=OWN, label='Sampler', elem_id='sampler'
        )
      self.steps, self.guidance = [], []
      for _ in range(self.slots):
        with gr.Row():
          self.steps.append(gr.Number(precision=0, min_width=120))
          self.guidance.append(gr.Number(step=0.5, min_width=120))
    self.typed = gr.State(Typed())
    self.blocks.load(
      self._fields, self._fixing, self._varying, show_progress='hidden'
    )

  def _results(self) -> None:
    self.live = gr.HTML(view.IDLE, elem_id='live')
    self.gallery = gr.Gallery(
      label='Gallery',
      columns=5,
      height='auto',
      object_fit='contain',
      fit_columns=False,
      interactive=False,
      buttons=['download', 'fullscreen'],
      elem_id='gallery',
    )
    with gr.Row(visible=False) as self.details:
      with gr.Column(scale=3):
        self.facts = gr.HTML(elem_id='facts')
      with gr.Column(scale=1, min_width=130):
        self.again = gr.Button('Again', size='sm', elem_id='again')
        self.vary = gr.Button('Variations', size='sm', elem_id='vary')
        self.save = gr.DownloadButton('Download', size='sm', elem_id='save')

  @property
  def _fixing(self) -> list[Any]:
    """What the fields depend on."""
    return [self.model, self.task, self.typed, *self.steps, *self.guidance]

  @property
  def _varying(self) -> list[Any]:
    """What depends on the model and the task."""
    return [
      self.of_image, self.of_painting, self.strength, self.typed,
      *self.steps, *self.guidance,
    ]  # fmt: skip

  def _events(self) -> None:
    results = [self.live, self.entries, self.gallery]
    form = {
      self.prompt, self.negative, self.seed, self.count, self.task, self.image,
      self.painting, self.strength, self.model, self.sampler, self.entries,
      *self.steps, *self.guidance,
    }  # fmt: skip
    started: list[Any] = []
    for event in self.go.click, self.prompt.submit:
      started.append(event(self._generate, form, results, **QUEUED))
    kept = [self.entries, self.chosen]
    for button, act in (self.again, self._again), (self.vary, self._vary):
      started.append(button.click(act, kept, results, **QUEUED))
    # Afterwards, or a preview that is on its way would replace the word.
    self.stop.click(None, cancels=started, queue=False).then(
      lambda: view.waiting('Stopped.'), outputs=self.live, queue=False
    )
    quick: dict[str, Any] = {'show_progress': 'hidden', 'queue': False}
    self.dice.click(
      lambda: random.randrange(batching.SEEDS), outputs=self.seed, **quick
    )
    for field in self.model, self.task:
      field.change(self._fields, self._fixing, self._varying, **quick)
    self.gallery.select(
      self._select,
      self.entries,
      [self.chosen, self.details, self.facts, self.save],
      **quick,
    )

  def _fields(
    self, model: str, label: str, typed: Typed, *values: float | None
  ) -> list[Any]:
    """Updates of `_varying`; a stage that was shown before keeps its values."""
    task = LABELS[label]
    try:
      cascade = self.studio.cascade(model, task)
    except ImagenError as error:
      raise gr.Error(str(error), print_exception=False) from error
    given = zip(values[: self.slots], values[self.slots :])
    kept = {**typed.kept, **dict(zip(typed.shown, given))}
    configs = zip(cascade.stages, cascade.settings())
    of = {(model, s.name): (c.steps, c.guidance) for s, c in configs}
    unused = [gr.update(visible=False, value=None)] * (self.slots - len(of))

    def fields(said: str, i: int) -> list[Any]:
      updates = [
        gr.update(
          label=f'{said}, {key[1]}', value=kept.get(key, own)[i], visible=True
        )
        for key, own in of.items()
      ]
      return updates + unused

    return [
      gr.update(visible=task in ('image', 'upsample')),
      gr.update(visible=task == 'inpaint'),
      gr.update(visible=task == 'image'),
      Typed(tuple(of), kept),
      *fields('Steps', 0),
      *fields('Guidance', 1),
    ]

  def _job(self, form: Mapping[Any, Any]) -> Job:
    """The job of the form."""
    task, model = LABELS[form[self.task]], form[self.model]
    image = mask = None
    if task == 'inpaint':
      image, mask = self._painted(*form[self.painting])
    elif task != 'text':
      image = form[self.image]
    stages = len(self.studio.cascade(model, task).stages)
    sampler = form[self.sampler]
    return Job(
      model=model,
      task=task,
      prompt=form[self.prompt].strip(),
      negative_prompt=form[self.negative].strip(),
      seed=int(form[self.seed] or 0),
      num_images=int(form[self.count] or 0),
      sampler=None if sampler == OWN else sampler,
      steps=tuple(form[field] for field in self.steps[:stages]),
      guidance=tuple(form[field] for field in self.guidance[:stages]),
      image=image,
      mask=mask,
      strength=form[self.strength] if task == 'image' else None,
    )

  def _painted(
    self, upload: Any, layers: list[Any]
  ) -> tuple[str | None, str | None]:
    """The files of an image and of the mask that was painted on it."""
    if upload is None:
      return None, None
    path = self.studio.out / 'uploads' / secrets.token_hex(8)
    if isinstance(upload, bytes):
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_bytes(path, upload)
      upload = str(path)
    mask = write_mask(path.with_suffix('.png'), layers, size_of(upload))
    return upload, None if mask is None else str(mask)

  def _generate(self, form: Mapping[Any, Any]) -> Iterator[list[Any]]:
    try:
      job = self._job(form)
    except ImagenError as error:
      yield [view.problem(str(error)), gr.skip(), gr.skip()]
    else:
      yield from self._watch(job, form[self.entries])

  def _again(
    self, entries: list[Entry], chosen: Entry | None
  ) -> Iterator[list[Any]]:
    if chosen is not None:
      yield from self._watch(chosen[1], entries)

  def _vary(
    self, entries: list[Entry], chosen: Entry | None
  ) -> Iterator[list[Any]]:
    if chosen is not None:
      seed = random.randrange(batching.SEEDS)
      job = dataclasses.replace(chosen[1], seed=seed, num_images=VARIATIONS)
      yield from self._watch(job, entries)

  def _watch(self, job: Job, entries: list[Entry]) -> Iterator[list[Any]]:
    """Updates of the results while a job runs; closing it ends the job."""
    same, finished = gr.skip(), 0
    yield [view.waiting('Loading the model …'), same, same]
    try:
      stages = self.studio.cascade(job.model, job.task).stages
      sides = [(stage.name, stage.resolution) for stage in stages]
      for preview, paths, notes in self.studio.run(job):
        shown = view.live(sides, preview, notes)
        if len(paths) == finished:
          yield [shown, same, same]
          continue
        finished = len(paths)
        made = [(str(path), job, i) for i, path in enumerate(paths)] + entries
        images = [
          (path, job.prompt or 'unconditional') for path, job, _ in made
        ]
        yield [shown, made, gr.Gallery(images, selected_index=None)]
    except ImagenError as error:
      sentence = str(error)
      if job.image is not None:  # of which the user knows the name only
        name = pathlib.PurePath(job.image).name
        sentence = sentence.replace(job.image, name)
      yield [view.problem(sentence), same, same]

  def _select(self, entries: list[Entry], event: gr.SelectData) -> list[Any]:
    entry = path, job, index = entries[event.index]
    return [
      entry,
      gr.update(visible=True),
      view.facts(job, index),
      gr.update(value=path),
    ]


def make(models: Mapping[str, str | None], out: pathlib.Path) -> gr.Blocks:
  """A page to generate with some models.

  Args:
    models: {name: model folder, None for the bundled demo}; the first is shown.
    out: the folder of the images.

  Raises:
    ModelError: as `imagen_jax.load`.
  """
  return Page(Studio(models, out)).blocks
