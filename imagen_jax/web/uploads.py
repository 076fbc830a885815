"""Gradio's inputs of images, without its decoding.

An upload is given on as it came, for the one rule in `io.decode`. Gradio writes
a file beside every subclass of a component, so these are none; an input that an
event updates would be made anew, and must not be.
"""

from typing import Any

import gradio as gr


def upload(**options: Any) -> gr.Image:
  """An image input whose value is the path of the upload, unread."""
  made = gr.Image(type='filepath', **options)
  made.preprocess = _content
  return made


def painting(**options: Any) -> gr.ImageEditor:
  """An image to paint on; its value is (upload, layers), unread.

  Each is a path or the bytes of a file, the upload None if there is none.
  """
  made = gr.ImageEditor(**options)

  def preprocess(payload: Any) -> tuple[Any, list[Any]]:
    if payload is not None and payload.id is not None:
      # Sent beforehand, in parts.
      payload = made.blob_storage.pop(payload.id, None)
    if payload is None:
      return None, []
    layers = [_content(part) for part in payload.layers if part is not None]
    return _content(payload.background), layers

  made.preprocess = preprocess
  return made


def _content(part: Any) -> Any:
  return getattr(part, 'path', part)
