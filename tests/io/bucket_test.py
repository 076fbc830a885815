"""Folders in a bucket: checked, locked, written whole."""

import http.server
import json
import subprocess
import sys
import threading
import time

import pytest

from imagen_jax.cli import supervise
from imagen_jax.data import tar_scan
from imagen_jax.errors import ImagenError, UsageError
from imagen_jax.io import bucket as buckets
from imagen_jax.io import bucket_lock, files, lock, paths, ranges


@pytest.fixture
def folder(bucket, request):
  return f'{bucket.url}/{request.node.name}'


def test_a_file_is_written_read_and_grows(folder):
  path = buckets.at(folder) / 'a' / 'b.jsonl'
  for number in range(3):
    files.append_line(path, {'step': number})
  assert [row['step'] for row in files.read_lines(path)] == [0, 1, 2]
  with files.replacing(f'{folder}/c') as temporary:
    temporary.write_bytes(b'12345')
  assert files.tree(folder) == {'a/b.jsonl': 36, 'c': 5}
  assert files.tree(f'{folder}/none') == {}


def test_a_listing_shows_what_another_process_has_written(bucket, folder):
  top = buckets.at(folder)
  (top / 'one').write_bytes(b'1')
  assert [p.name for p in top.iterdir()] == ['one']
  put = (
    'import sys; from imagen_jax.io import bucket;'
    "bucket.at(sys.argv[1]).write_bytes(b'2')"
  )
  subprocess.run([sys.executable, '-c', put, f'{folder}/two'], check=True)
  assert sorted(p.name for p in top.iterdir()) == ['one', 'two']


def test_a_folder_that_can_be_written_is_left_empty(folder):
  paths.check_folder(folder, in_bucket=True)
  assert files.tree(folder) == {}


@pytest.mark.parametrize(
  'path', ['gs:/runs/x', 'gs://', 'gs://a//b', 'nothing://bucket/x']
)
def test_what_is_no_path_of_a_bucket_is_refused(path):
  with pytest.raises(UsageError):
    buckets.at(path)


def test_a_folder_for_local_files_is_not_in_a_bucket(folder):
  with pytest.raises(UsageError) as error:
    paths.check_folder(folder, key='out')
  assert error.value.key == 'out'


def test_a_bucket_that_does_not_exist_is_named_and_not_made(bucket):
  for _ in range(2):
    with pytest.raises(UsageError, match='no-such-bucket') as error:
      buckets.check('gs://no-such-bucket/runs', key='workdir')
    assert error.value.key == 'workdir'


@pytest.mark.parametrize(
  'status, reason',
  [(401, buckets.NO_LOGIN), (403, buckets.DENIED)],
)
def test_a_bucket_that_refuses_says_why(monkeypatch, status, reason):
  import gcsfs

  class Refuses(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      self.rfile.read(int(self.headers['Content-Length']))
      self.send_error(status)

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(('127.0.0.1', 0), Refuses) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = gcsfs.GCSFileSystem(
      endpoint_url=f'http://127.0.0.1:{server.server_port}',
      token='anon',
      skip_instance_cache=True,
    )
    monkeypatch.setattr(buckets, '_filesystem', lambda scheme: made)
    with pytest.raises(UsageError, match=reason):
      buckets.check('gs://bucket/x')
    server.shutdown()


class Silent:
  """A file system whose server does not answer."""

  def __getattr__(self, name):
    def fail(*_, **__):
      raise type('ClientConnectorError', (OSError,), {})('no route')

    return fail


@pytest.mark.parametrize(
  'use',
  [
    lambda path: buckets.check(path),
    lambda path: ranges.find(f'{path}/*.tar', '.tar'),
    lambda path: tar_scan.scan(f'{path}/a.tar', 'a.tar'),
  ],
)
def test_a_server_that_does_not_answer_is_worth_another_attempt(
  monkeypatch, use
):
  monkeypatch.setattr(buckets, '_filesystem', lambda scheme: Silent())
  with pytest.raises(ImagenError) as caught:
    use('gs://bucket/x')
  assert caught.value.exit_code not in supervise.FINAL


# ---- Locks -----------------------------------------------------------------
HOLD = """
import sys
from imagen_jax.io import bucket_lock, lock
bucket_lock.BEAT = 0.2
with lock.locked(sys.argv[1]):
  print('locked', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def hurried(monkeypatch):
  monkeypatch.setattr(bucket_lock, 'BEAT', 0.2)
  monkeypatch.setattr(bucket_lock, 'STALE', 1.5)


def holder(folder):
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'locked\n'
  return process


def test_a_second_job_in_a_bucket_is_refused(folder, hurried):
  first = holder(folder)
  with pytest.raises(UsageError) as error, lock.locked(folder, key='workdir'):
    pass
  assert error.value.key == 'workdir' and str(first.pid) in str(error.value)
  first.communicate('')
  assert first.returncode == 0 and files.tree(folder) == {}
  with lock.locked(folder):
    pass


def test_a_job_that_was_killed_here_holds_no_lock(folder, monkeypatch):
  monkeypatch.setattr(bucket_lock, 'STALE', 1e9)
  first = holder(folder)
  first.kill()
  first.communicate()
  with lock.locked(folder):
    assert list(files.tree(folder)) == ['.lock']
  assert files.tree(folder) == {}


def test_a_job_killed_elsewhere_is_known_by_its_silence(
  folder, hurried, monkeypatch
):
  first = holder(folder)
  first.kill()
  first.communicate()
  monkeypatch.setattr(bucket_lock, '_machine', lambda: 'another')
  begin = time.monotonic()
  with lock.locked(folder):
    assert time.monotonic() - begin >= bucket_lock.STALE
    assert list(files.tree(folder)) == ['.lock']


def test_one_of_several_takes_over_a_lock_that_was_left(folder, hurried):
  body = {'owner': 'x', 'token': 'y', 'machine': 'elsewhere', 'process': 1}
  path = buckets.at(folder) / lock.FILE
  path.write_bytes(json.dumps(body).encode())
  inside, most, refused = [], [0], []

  def enter():
    try:
      with lock.locked(folder):
        inside.append(1)
        most[0] = max(most[0], len(inside))
        time.sleep(3)
        inside.pop()
    except UsageError:
      refused.append(1)

  threads = [threading.Thread(target=enter) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert most == [1] and len(refused) == 3


def test_a_job_whose_lock_was_taken_over_ends(folder):
  first = holder(folder)
  path = buckets.at(folder) / lock.FILE
  path.write_bytes(b'{"token": "another"}')
  assert first.wait(timeout=20) == 2
  assert first.stderr.read().startswith('error: ')
  assert b'another' in path.read_bytes()
