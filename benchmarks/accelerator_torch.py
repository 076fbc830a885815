"""DeepFloyd IF's stage I by diffusers, as `accelerator_deepfloyd.py` does it.

The loop is that of diffusers' `IFPipeline`, with its scheduler, and without the
text encoder and the safety checker.
"""

import time
from collections.abc import Mapping
from typing import Any

from accelerator_deepfloyd import GUIDANCE, SCHEDULE, answer, sizes, texts
from accelerator_work import LeftOut

CALLS = 3  # that are timed


class Work:
  """All steps of a batch of images."""

  def __init__(self, given: Mapping[str, Any], rehearse: bool) -> None:
    import diffusers
    import torch

    self._torch = torch
    if not (rehearse or torch.cuda.is_available()):
      raise LeftOut('torch has no CUDA device')
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    raw, self._batch, self._steps = sizes(given, rehearse)
    self._who, self._raw = given['who'], raw
    self._scheduler = diffusers.DDPMScheduler(**SCHEDULE)
    self._make = diffusers.UNet2DConditionModel.from_config

  def compile(self) -> None:
    """Nothing: torch compiles in the first call, which `measure` makes."""

  def measure(self) -> dict[str, Any]:
    torch = self._torch
    torch.set_default_dtype(torch.bfloat16)
    start = time.perf_counter()
    with torch.device(self._device):
      net = self._make(self._raw).eval()
    if self._who.endswith('torch.compile'):
      net = torch.compile(net)
    given = [
      torch.from_numpy(text).to(self._device, torch.bfloat16)
      for text in texts(self._batch, self._raw['encoder_hid_dim'])
    ]
    text = torch.cat(given[::-1])
    self._call(net, text)
    ready, seconds = time.perf_counter() - start, []
    for _ in range(CALLS):
      start = time.perf_counter()
      self._call(net, text)
      seconds.append(time.perf_counter() - start)
    whole = answer(self._who, self._batch, self._steps, seconds)
    return {
      **whole, 'compile': ready, 'versions': f'torch {torch.__version__}'
    }  # fmt: skip

  def _call(self, net: Any, text: Any) -> Any:
    """The images, on the host."""
    torch, side = self._torch, self._raw['sample_size']
    z = torch.randn(
      (self._batch, 3, side, side), device=self._device, dtype=text.dtype
    )
    self._scheduler.set_timesteps(self._steps, device=self._device)
    with torch.no_grad():
      for t in self._scheduler.timesteps:
        out = net(torch.cat([z, z]), t, text, return_dict=False)[0]
        uncond, cond = out.chunk(2)
        (uncond, _), (cond, variance) = (
          x.split(3, dim=1) for x in (uncond, cond)
        )
        eps = uncond + GUIDANCE * (cond - uncond)
        step = self._scheduler.step(
          torch.cat([eps, variance], dim=1), t, z, return_dict=False
        )
        z = step[0]
    return z.float().cpu()
