"""What the processes of a job tell each other, beside their devices.

Through jax's coordination service: from any thread, while the devices compute.
"""

import collections
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from imagen_jax import errors

PATIENCE = 3600  # seconds until a process that does not answer is given up
_asked: collections.Counter[str] = collections.Counter()

Answer = dict[str, Any]  # {'value': …} or {'error': [type, message, key]}


def agree(
  name: str, say: Callable[[], Any], decide: Callable[[list[Any]], Any]
) -> Any:
  """What process 0 decides once every process has spoken.

  It is a barrier as well. An error of one process is raised by all of them.

  Args:
    name: of the question. All processes ask those of one name in one order.
    say: what this process says, ready for JSON.
    decide: [what each process said] -> the answer, ready for JSON; called by
      process 0 only.

  Raises:
    ImagenError: raised by `say` or `decide`, of any process.
    RuntimeError: for an error of another type, of another process.
  """
  if jax.process_count() == 1:
    return decide([say()])
  client: Any = distributed.global_state.client
  me, count = jax.process_index(), jax.process_count()
  _asked[name] += 1
  key = f'imagen_jax/{name}/{_asked[name]}'

  def read(who: Any) -> Answer:
    try:
      text = client.blocking_key_value_get(f'{key}/{who}', PATIENCE * 1000)
    except RuntimeError as error:
      raise RuntimeError(f'{name}: no answer of process {who}') from error
    return json.loads(text)

  mine = _attempt(say)
  client.key_value_set(f'{key}/{me}', json.dumps(_plain(mine, me)))
  if me == 0:
    said = [mine, *(read(i) for i in range(1, count))]
    answer = next((s for s in said if 'error' in s), None)
    answer = answer or _attempt(lambda: decide([s['value'] for s in said]))
    client.key_value_set(f'{key}/answer', json.dumps(_plain(answer, me)))
    if _asked[name] > 1:  # everyone has read that by now
      client.key_value_delete(f'imagen_jax/{name}/{_asked[name] - 1}/')
  else:
    answer = read('answer')
  for own in (mine, answer):
    if isinstance(own.get('error'), Exception):  # with its traceback
      raise own['error']
  if 'error' in answer:
    raise _error(*answer['error'])
  return answer['value']


def shared(items: list[str]) -> list[str]:
  """This process's share of a list that all processes hold."""
  return items[jax.process_index() :: jax.process_count()]


def _attempt(call: Callable[[], Any]) -> Answer:
  try:
    return {'value': call()}
  except Exception as error:
    return {'error': error}


def _plain(answer: Answer, process: int) -> Answer:
  """The answer for JSON."""
  error = answer.get('error')
  if not isinstance(error, Exception):
    return answer
  message = str(error) or type(error).__name__
  if not isinstance(error, errors.ImagenError):
    message = f'process {process}: {message}'
  return {'error': [type(error).__name__, message, getattr(error, 'key', None)]}


def _error(kind: str, message: str, key: str | None) -> Exception:
  if kind == 'UsageError':
    return errors.UsageError(message, key=key)
  return getattr(errors, kind, RuntimeError)(message)
