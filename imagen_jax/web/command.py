"""imagen-web: a page in the browser that generates images."""

import functools
import importlib.util
import os
import pathlib
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from imagen_jax.cli import errors, runtime
from imagen_jax.errors import UsageError
from imagen_jax.io import paths
from imagen_jax.io.paths import user_path


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv: list[str]) -> None:
  parser = errors.Parser(
    prog='imagen-web', description='Generate images in the browser.'
  )
  add = parser.add_argument
  add(
    '--model',
    type=user_path,
    action='append',
    help='model folder or the name of a bundled one, may be repeated; demo if '
    'left out',
  )
  add('--host', default='127.0.0.1', help='0.0.0.0 lets other machines see it')
  port = functools.partial(errors.positive, most=65535)
  add('--port', type=port, help='the first free one from 7860 if left out')
  add(
    '--share',
    action='store_true',
    help='a public address for 72 hours, through a server of Gradio',
  )
  add(
    '--out', type=user_path, help='keep the images in a new folder in this one'
  )
  args = parser.parse_args(argv)
  if importlib.util.find_spec('gradio') is None:
    raise UsageError(
      'imagen-web needs gradio: run pip install "imagen_jax[web]", then the '
      'same command again.'
    )
  with tempfile.TemporaryDirectory(prefix='imagen-web-') as temporary:
    # Uploads and copies; they are gone with the server.
    os.environ.setdefault('GRADIO_TEMP_DIR', str(pathlib.Path(temporary)))
    out = pathlib.Path(temporary, 'images')
    if args.out is not None:
      # Gradio serves all that is below this folder to whoever knows its name.
      run = f'{time.strftime("%Y%m%d-%H%M%S")}-{secrets.token_hex(8)}'
      out = paths.check_folder(args.out, key='out') / run
    runtime.start()
    from imagen_jax.web import page

    made = page.make(_names(args.model), out)
    # Gradio ends its server after a Ctrl-C, and the folder is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
      page.launch(
        made,
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        allowed_paths=[str(out)],
      )
    except OSError as error:
      raise UsageError(
        f'{args.host}:{args.port or "7860-7959"} cannot be used ({error}); '
        'choose another with --host or --port.',
        key='port',
      ) from error


def _names(models: Sequence[str] | None) -> dict[str, str | None]:
  """{name: folder} of the page's models."""
  if not models:
    return {'demo': None}
  names: dict[str, str | None] = {}
  for model in models:
    name = pathlib.PurePath(model).name or model
    names[model if name in names else name] = model
  return names


if __name__ == '__main__':
  sys.exit(main())
