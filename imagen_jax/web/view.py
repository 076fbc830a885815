"""The HTML of the page: images while they are sampled, an image's settings."""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

if TYPE_CHECKING:
  from imagen_jax.cascade.preview import Preview
  from imagen_jax.web.jobs import Job

CSS = """
.gradio-container {max-width: 1240px !important}
#dice {align-self: center}
.live {display: flex; flex-direction: column; gap: 14px}
.live .stages {display: flex; gap: 8px}
.live .stage {flex: 1; font-size: 13px; white-space: nowrap}
.live .bar {height: 6px; border-radius: 3px; margin-top: 4px;
  background: var(--border-color-primary); overflow: hidden}
.live .bar i {display: block; height: 100%; background: var(--color-accent);
  transition: width .2s}
.live .views {display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(220px, 1fr))}
.live .views.whole {grid-template-columns: minmax(0, 520px)}
.live figure {margin: 0}
.live .cells {display: grid; gap: 4px; border-radius: 8px; overflow: hidden}
.live img {width: 100%; display: block; image-rendering: pixelated}
.live figcaption, .live .idle {font-size: 13px; margin-top: 6px;
  color: var(--body-text-color-subdued)}
.live .idle {border: 1px dashed var(--border-color-primary);
  border-radius: 8px; padding: 120px 16px; text-align: center; margin: 0}
.live .problem {border: 1px solid #dc2626; color: #dc2626}
.facts {display: grid; grid-template-columns: max-content 1fr;
  gap: 2px 14px; font-size: 13px; overflow-wrap: anywhere}
.facts b {font-weight: 500; color: var(--body-text-color-subdued)}
"""
IDLE = (
  '<div class="live"><div class="idle">Describe an image and press Generate. '
  'It appears here while it is sampled.</div></div>'
)


def waiting(text: str) -> str:
  """The place of the images before there are any."""
  return f'<div class="live"><div class="idle">{html.escape(text)}</div></div>'


def problem(sentence: str) -> str:
  """The same place when there will be none."""
  return (
    '<div class="live"><div class="idle problem">'
    f'{html.escape(sentence)}</div></div>'
  )


def live(
  stages: Sequence[tuple[str, int]],
  seen: 'Preview',
  notes: Sequence[str] = (),
) -> str:
  """A preview: how far each stage is, z_t, and x̂.

  Args:
    stages: (name, side of its images in pixels) of every stage, in order.
    seen: the preview.
    notes: to show below.
  """
  names = [name for name, _ in stages]
  at, whole = names.index(seen.stage), seen.images is not None
  bars = []
  for i, (name, side) in enumerate(stages):
    percent, steps = (100 if i < at or whole else 0), ''
    if i == at and not whole:
      percent = 100 * seen.step // seen.steps
      steps = f' · step {seen.step}/{seen.steps}'
    bars.append(
      f'<div class="stage">{html.escape(name)} · {side} px{steps}'
      f'<div class="bar"><i style="width:{percent}%"></i></div></div>'
    )
  if seen.images is not None:
    figures = _figure('image', seen.x, 'The images')
  else:
    figures = _figure('z', seen.z, 'z<sub>t</sub>, the noisy image')
    figures += _figure('x', seen.x, 'x̂, the prediction')
  kind = 'views whole' if whole else 'views'
  below = ''.join(f'<figcaption>{html.escape(n)}</figcaption>' for n in notes)
  return (
    f'<div class="live"><div class="stages">{"".join(bars)}</div>'
    f'<div class="{kind}">{figures}</div>{below}</div>'
  )


def _figure(kind: str, images: np.ndarray, caption: str) -> str:
  """Images in a square grid, with a caption of HTML."""
  columns = int(np.ceil(np.sqrt(len(images))))
  cells = ''.join(
    f'<img class="{kind}" alt="{kind}" src="{_url(image)}">' for image in images
  )
  return (
    '<figure><div class="cells" style="grid-template-columns:'
    f'repeat({columns},1fr)">{cells}</div>'
    f'<figcaption>{caption}</figcaption></figure>'
  )


def _url(image: np.ndarray) -> str:
  """A PNG of an image, as a data URL."""
  data = io.BytesIO()
  PIL.Image.fromarray(image).save(data, 'PNG', compress_level=1)
  return 'data:image/png;base64,' + base64.b64encode(data.getvalue()).decode()


def facts(job: 'Job', index: int) -> str:
  """The settings of image `index` of a job."""
  said = lambda value: 'default' if value is None else f'{value:g}'
  listed = lambda values: values and ', '.join(map(said, values))
  rows = {
    'prompt': job.prompt or '(empty: unconditional)',
    'negative prompt': job.negative_prompt,
    'model': job.model,
    'from': None if job.task == 'text' else job.task,
    'seed': f'{job.seed}, image {index + 1} of {job.num_images}',
    'sampler': job.sampler,
    'steps': listed(job.steps),
    'guidance': listed(job.guidance),
    'strength': job.strength if job.task == 'image' else None,
  }
  return '<div class="facts">' + ''.join(
    f'<b>{name}</b><span>{html.escape(str(value))}</span>'
    for name, value in rows.items()
    if value
  ) + '</div>'  # fmt: skip
