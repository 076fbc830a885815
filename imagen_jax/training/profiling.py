"""A profile of a few steps in the middle of a run."""

import jax

NUM_STEPS = 5


class Profiler:
  """Traces `NUM_STEPS` steps into a directory (view it with XProf).

  Args:
    at: the first step to trace; None: no profile.
    directory: where the trace goes.
  """

  def __init__(self, at, directory):
    self._at, self._directory = at, directory
    self._running = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._running:
      jax.profiler.stop_trace()

  def before(self, step):
    """Called before each step."""
    if step == self._at:
      jax.profiler.start_trace(str(self._directory))
      self._running = True

  def after(self, step, state):
    """Called after each step, with its result."""
    if self._running and step == self._at + NUM_STEPS - 1:
      jax.block_until_ready(state)  # the trace holds what was computed
      jax.profiler.stop_trace()
      self._running = False
