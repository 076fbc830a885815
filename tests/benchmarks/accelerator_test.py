"""The benchmark of one accelerator: its parts, and a rehearsal on a CPU."""

import functools
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from imagen_jax.cli.configs import load_config
from imagen_jax.errors import DataError, UsageError
from imagen_jax.nets import remat

FOLDER = pathlib.Path(__file__).parents[2] / 'benchmarks'
sys.path.insert(0, str(FOLDER))

import accelerator  # noqa: E402
import accelerator_process as process  # noqa: E402
import accelerator_results as results  # noqa: E402
import accelerator_rows as rows  # noqa: E402
import accelerator_trace as trace  # noqa: E402
import accelerator_work as work  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from accelerator_table import table  # noqa: E402

MACHINE = {
  'device': 'NVIDIA H100', 'platform': 'gpu', 'gib': 73.0, 'cores': 16,
  'jax': '0', 'runtime': 'cuda',
}  # fmt: skip
TRAIN = {
  'work': 'sr256, batch 32', 'kind': 'train', 'batch': 32, 'seconds': 0.25,
  'mfu': 0.308, 'hfu': 0.36, 'gib': 42.0, 'compile': 90.4, 'cached': False,
}  # fmt: skip


# ---- The profile -------------------------------------------------------------
KERNELS = {
  'convolution': [
    ('sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32', 'cudnn-conv.12'),
    ('cutlass_tensorop_bf16_s16816dgrad_optimized', ''),
    ('cudnn_infer_wgrad2d_grouped', ''),
    ('convolution.4', 'convolution.4'),
  ],
  'matmul': [
    ('sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64', ''),
    ('nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT', 'custom-call.3'),
    ('void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16>', ''),
    ('gemm_fusion_dot_123', 'gemm_fusion_dot.123'),
    ('dot.7', 'dot.7'),
  ],
  'attention': [
    ('cudnn_generated_fort_native_sdpa_sm90_flash_fprop', ''),
    ('custom_kernel', 'cudnn$fmha.2'),
    ('pytorch_flash::flash_fwd_kernel', ''),
  ],
  'elementwise': [
    ('loop_convert_fusion_3', 'loop_convert_fusion.3'),
    ('input_reduce_fusion_12', 'input_reduce_fusion.12'),
    ('triton_softmax_4', 'triton_softmax.4'),
    ('wrapped_add', 'wrapped_add'),
    ('copy_multiply_fusion', 'copy_multiply_fusion'),
  ],
  'collective': [
    ('ncclDevKernel_AllReduce_Sum_bf16_RING_LL', 'all-reduce-start.1'),
    ('all-gather.3', 'all-gather.3'),
  ],
  'copy': [
    ('MemcpyD2D', ''),
    ('Memset', ''),
    ('cudnn::ops::nchwToNhwcKernel<float>', 'cudnn-conv.12'),
    ('loop_transpose_fusion_2', 'loop_transpose_fusion.2'),
    ('copy.9', 'copy.9'),
    ('copy_bitcast_fusion', ''),
  ],
  'other': [('some_unknown_thing', '')],
}


@pytest.mark.parametrize('kind', KERNELS)
def test_kernels_belong_to_the_class_of_their_name(kind):
  for name, op in KERNELS[kind]:
    assert trace.classify(name, op) == kind, name


def test_the_path_tells_matrix_products_of_a_tpu_from_its_convolutions():
  given = 'fusion.5', 'fusion.5', 'convolution fusion'
  assert trace.classify(*given) == 'convolution'
  dense = 'jit(train_step)/UNet/dense/dot_general'
  assert trace.classify(*given, dense) == 'matmul'
  convolved = 'jit(f)/conv1/conv_general_dilated'
  assert trace.classify('ynn_fusion', path=convolved) == 'convolution'
  assert trace.classify('fusion.1', '', 'data formatting') == 'copy'


@pytest.mark.parametrize(
  'path',
  [
    'jit(f)/jvp(UNet)/down_1_attn_0/vmap(BTNH,BSNH->BNTS)/dot_general',
    'jit(f)/jvp(UNet)/mid_attn/bnts,bnsh->bnth/dot_general',
    'jit(f)/transpose(jvp(UNet))/conditioning/text_pool/vmap()/exp',
  ],
)
def test_the_path_tells_attention_from_other_products_and_fusions(path):
  assert trace.classify('loop_multiply_fusion', path=path) == 'attention'
  assert trace.classify('gemm_fusion_dot', path=path) == 'attention'
  projection = 'jit(f)/jvp(UNet)/mid_attn/query/dot_general'
  assert trace.classify('gemm_fusion_dot', path=projection) == 'matmul'


def test_a_compiled_program_gives_the_paths_of_its_operations():
  hlo = """
  %gemm_fusion.3 = bf16[8]{0} fusion(%x), kind=kCustom, metadata={op_name="jit(f)/a/dot_general" stack_frame_id=3}
  ROOT %cudnn-conv.1 = (f32[8]) custom-call(%y), custom_call_target="c", metadata={op_type="conv" op_name="jit(f)/conv"}, backend_config={}
  %plain = f32[] constant(0)
  """  # noqa: E501
  assert trace.scopes(hlo) == {
    'gemm_fusion_3': 'jit(f)/a/dot_general',
    'cudnn_conv_1': 'jit(f)/conv',
  }


def test_a_fusion_without_a_path_is_what_it_holds():
  hlo = """
%fused.1 (p: f32[8]) -> f32[8] {
  ROOT %convolution.3 = f32[8] convolution(%p, %q), dim_labels=b01f_01io->b01f
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %a.1 = f32[8] fusion(%x), kind=kCustom, calls=%fused.1, backend_config={}
  ROOT %b.2 = f32[8] fusion(%x), kind=kLoop, calls=%fused.2
}
"""
  path = trace.scopes(hlo)
  assert path == {'a_1': 'conv_general_dilated'}
  assert trace.classify('a.1', path=path['a_1']) == 'convolution'


def _named(pid, name, tid=None, line=None):
  """Events that name a process, or one of its threads."""
  event = {'ph': 'M', 'pid': pid, 'name': 'process_name'}
  if tid is None:
    return event | {'args': {'name': name}}
  return event | {'name': 'thread_name', 'tid': tid, 'args': {'name': line}}


def _ran(pid, tid, name, start, length, **args):
  return {
    'ph': 'X', 'pid': pid, 'tid': tid, 'name': name, 'ts': start,
    'dur': length, 'args': args,
  }  # fmt: skip


GPU = [
  _named(1, '/device:GPU:0'),
  _named(2, '/device:GPU:1'),
  _named(3, '/host:CPU'),
  _named(1, '', 13, 'Stream #13(Compute)'),
  _named(1, '', 14, 'Stream #14(MemcpyD2D)'),
  _named(1, '', 20, 'XLA Ops'),
  _named(2, '', 13, 'Stream #13(Compute)'),
  _ran(1, 13, 'sm90_xmma_fprop_1', 0, 40, hlo_op='cudnn-conv.1'),
  _ran(1, 13, 'fusion_7', 50, 20, hlo_op='fusion.7'),
  _ran(1, 14, 'MemcpyD2D', 60, 20),
  _ran(1, 20, 'cudnn-conv.1', 0, 40),  # the same again
  _ran(2, 13, 'sm90_xmma_fprop_1', 0, 40),  # another GPU's
  _ran(3, 1, 'fusion_7', 0, 500, hlo_op='fusion.7'),  # its launch
]


def test_of_a_gpu_the_kernels_of_the_streams_of_the_first_count():
  found = trace.summarise(GPU, {}, steps=2)
  seconds = {k: v for k, v in found['seconds'].items() if v}
  assert seconds == {
    'convolution': 20e-6,
    'elementwise': 10e-6,
    'copy': 10e-6,
  }
  assert found['busy'] == 70 / 80
  assert found['top'][0] == ['sm90_xmma_fprop', 'convolution', 20e-6]


def test_a_kernel_has_the_path_of_its_operation():
  path = {'fusion_7': 'jit(f)/mid_attn/vmap()/exp'}
  found = trace.summarise(GPU, path, steps=1)
  assert found['seconds']['attention'] == 20e-6


def test_of_a_tpu_an_operation_in_a_loop_counts_once():
  events = [
    _named(1, '/device:TPU:0'),
    _named(1, '', 3, 'XLA Modules'),
    _named(1, '', 4, 'XLA Ops'),
    _ran(1, 3, 'jit_train_step', 0, 100),
    _ran(1, 4, 'while.1', 0, 100, hlo_category='while'),
    _ran(1, 4, 'fusion.2', 10, 30, hlo_category='convolution fusion'),
    _ran(1, 4, 'fusion.3', 50, 20, hlo_category='loop fusion'),
  ]
  found = trace.summarise(events, {}, steps=1)['seconds']
  assert found['convolution'] == 30e-6
  assert found['elementwise'] == 20e-6
  assert found['other'] == pytest.approx(50e-6)


def test_of_a_cpu_the_events_that_name_an_operation_count():
  events = [
    _named(1, '/host:CPU'),
    _ran(1, 1, 'dot.1', 0, 10, hlo_op='dot.1'),
    _ran(1, 1, 'ThunkExecutor::Execute', 0, 100),
  ]
  found = trace.summarise(events, {}, steps=1)
  assert sum(found['seconds'].values()) == found['seconds']['matmul'] == 10e-6


def test_a_profile_without_operations_is_an_error(tmp_path):
  with pytest.raises(ValueError):
    trace.summarise([_named(1, '/device:GPU:0')], {}, steps=1)
  with pytest.raises(ValueError):
    trace.read(tmp_path)


def test_the_newest_profile_is_read(tmp_path):
  for day, events in ('2026_01_01', []), ('2026_01_02', GPU):
    folder = tmp_path / 'plugins' / 'profile' / day
    folder.mkdir(parents=True)
    with gzip.open(folder / 'host.trace.json.gz', 'wt') as file:
      json.dump({'traceEvents': events}, file)
  assert trace.read(tmp_path) == GPU


# ---- The table ---------------------------------------------------------------
def test_a_training_step_has_its_speed_and_where_the_time_goes():
  seconds = dict.fromkeys(trace.CLASSES, 0.0) | {'matmul': 0.03, 'copy': 0.01}
  row = TRAIN | {'ops': {'seconds': seconds, 'busy': 0.95}}
  lines = table({'sr256': row}).splitlines()
  assert lines[2] == (
    '| sr256, batch 32 | 128 | 30.8 % | 36.0 % | 250 | 42.0 | 90 s |'
  )
  assert lines[-1].split(' | ')[1:4] == ['40.0', '0.0 %', '75.0 %']
  assert lines[-1].endswith('| 95.0 % |')


def test_a_row_that_was_left_out_says_why_in_a_line_of_full_width():
  row = {'work': 'w', 'kind': 'train', 'left_out': 'out of memory: a | b'}
  header, _, line = table({'w': row}).splitlines()
  assert line.startswith('| w | left out: out of memory: a / b |')
  assert line.count('|') == header.count('|')
  ops = TRAIN | {'ops': {'left_out': 'no trace'}}
  assert 'left out: no trace' in table({'w': ops})


def test_a_program_from_the_cache_is_marked():
  assert '90 s, from the cache' in table({'w': TRAIN | {'cached': True}})


def test_ours_is_compared_with_each_peer_for_an_image():
  each = {'work': 'if', 'kind': 'deepfloyd', 'compile': 1.0, 'batch': 4}
  made = {
    'if': each | {'who': 'imagen_jax', 'seconds': 4.0},
    'peer': each | {'who': 'diffusers', 'seconds': 8.0},
  }
  *_, ours, theirs = table(made).splitlines()
  assert ours == '| if | 1.00 |  | 1 s |'
  assert theirs == '| if | 2.00 | **0.50** | 1 s |'
  assert '**' not in table({'peer': made['peer']})


def test_an_image_takes_all_steps_of_the_config():
  row = {
    'work': 's', 'kind': 'sample', 'batch': 4, 'steps': 256,
    'evaluation': 0.125, 'call': 1.0, 'gib': 20.0, 'compile': 30.0,
  }  # fmt: skip
  assert table({'s': row}).splitlines()[-1] == (
    '| s | 4 | 0.125 | 256 | 8.25 | 20.0 | 30 s |'
  )


def test_runs_that_differ_name_the_step():
  row = {'work': 'd', 'kind': 'determinism', 'runs': [[1, 2, 3], [1, 2, 3]]}
  assert table({'d': row}).endswith('| d | yes |  |')
  row['runs'][1][2] = 4
  assert table({'d': row}).endswith('| d | no | step 3 |')


# ---- The budget and the file -------------------------------------------------
class Scripted:
  """`Processes` that answer from a script, and take a second a row."""

  def __init__(self, seconds, fails=()):
    self.seconds, self.fails, self.began = seconds, fails, []

  def left(self):
    return self.seconds

  def run(self, group, names, on):
    self.began.append(list(names))
    on({'machine': MACHINE})
    for name in names:
      if self.seconds < 1:
        return process.NO_TIME
      self.seconds -= 1
      if name in self.fails:
        return 'the process ended with -6'
      on({'row': name, 'run': [1], 'batch': 1})
    return ''


def _group(*names, least=1.0, **more):
  made = {name: rows.Row(name, 'determinism', {}) for name in names}
  return rows.Group('train', made, least, **more)


@pytest.fixture
def silent(monkeypatch):
  monkeypatch.setattr(results, 'table', lambda rows: '')


def _measured(groups, processes, path=None):
  found = results.Results(path)
  process.measure(groups, found, processes)
  return found


def test_rows_after_the_deadline_are_left_out(silent):
  groups = [_group('a', 'b'), _group('c', least=5.0), _group('d', 'e')]
  found = _measured(groups, Scripted(seconds=3))
  why = {name: row.get('left_out') for name, row in found.rows.items()}
  assert why == dict.fromkeys('abd') | dict.fromkeys('ce', process.NO_TIME)


def test_a_process_that_dies_takes_one_row_with_it(silent):
  processes = Scripted(seconds=9, fails='b')
  found = _measured([_group('a', 'b', 'c')], processes)
  assert processes.began == [['a', 'b', 'c'], ['c']]
  assert found.rows['b']['left_out'] == 'the process ended with -6'
  assert 'left_out' not in found.rows['c']


def test_a_process_that_never_begins_takes_all_rows_with_it(silent):
  class Broken(Scripted):
    def run(self, group, names, on):
      self.began.append(names)
      return 'unknown flag'

  processes = Broken(seconds=9)
  found = _measured([_group('a', 'b')], processes)
  assert len(processes.began) == 1
  assert {row['left_out'] for row in found.rows.values()} == {'unknown flag'}


def test_two_runs_are_one_row(silent):
  processes = Scripted(seconds=9)
  found = _measured([_group('a', runs=2)], processes)
  assert processes.began == [['a'], ['a']]
  assert found.rows['a']['runs'] == [[1], [1]]
  late = _measured([_group('a', runs=2)], Scripted(seconds=1))
  assert late.rows['a']['left_out'] == process.NO_TIME


def test_the_file_is_written_after_every_row(silent, tmp_path):
  path, seen = tmp_path / 'h100.json', []

  class Watched(Scripted):
    def run(self, group, names, on):
      def after(answer):
        on(answer)
        if path.exists():
          seen.append(len(json.loads(path.read_text())['rows']))

      return super().run(group, names, after)

  _measured([_group('a', 'b')], Watched(seconds=9), path)
  assert seen == [1, 2]
  again = results.Results(path)
  assert again.machine == MACHINE and [*again.rows] == ['a', 'b']


def test_what_had_no_time_is_measured_by_the_next_call():
  found = results.Results(None)
  found.rows = {
    'a': {},
    'b': {'left_out': process.NO_TIME},
    'c': {'left_out': 'out of memory: 90 GB'},
    'd': {'left_out': 'the process ended with -6'},
  }
  group = _group(*'abcde')
  (left,) = accelerator.chosen([group], None, found)
  assert [*left.rows] == ['b', 'd', 'e']
  (left,) = accelerator.chosen([group], ['a'], found)
  assert [*left.rows] == ['a']
  with pytest.raises(UsageError) as caught:
    accelerator.chosen([group], ['f'], found)
  assert caught.value.key == 'rows'


def test_a_row_that_is_left_out_later_keeps_its_numbers(silent):
  found = results.Results(None)
  found.add('a', {'left_out': process.NO_TIME})
  found.add('a', {'seconds': 1.0})
  found.add('a', {'left_out': process.NO_TIME})
  assert found.rows['a'] == {'seconds': 1.0}
  found.add('a', {'seconds': 2.0})
  assert found.rows['a'] == {'seconds': 2.0}


def test_a_file_holds_rows_of_one_device(silent, tmp_path):
  path = tmp_path / 'h100.json'
  _measured([_group('a')], Scripted(seconds=9), path)
  with pytest.raises(UsageError):
    results.Results(path, rehearsal=True)
  with pytest.raises(UsageError):
    results.Results(path).on(MACHINE | {'device': 'TPU v5p'})
  path.write_text('{}')
  with pytest.raises(DataError):
    results.Results(path)


def test_a_process_ends_at_the_deadline(tmp_path, monkeypatch):
  (tmp_path / 'accelerator.py').write_text('import time; time.sleep(60)')
  monkeypatch.setattr(process, 'HERE', tmp_path)
  begin = time.monotonic()
  processes = process.Processes(tmp_path, True, begin + 0.5)
  assert processes.run(_group('a'), ['a'], print) == process.NO_TIME
  assert time.monotonic() - begin < 30


def test_with_a_process_those_end_that_it_has_started():
  begun = subprocess.Popen(
    ['sh', '-c', 'sleep 60 & echo begun; wait'],
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  assert begun.stdout.readline() == b'begun\n'
  begin = time.monotonic()
  process._end(begun)
  assert begun.stdout.read() == b''  # closed by the last that holds it
  assert time.monotonic() - begin < 30


def test_a_process_that_fails_leaves_its_last_words(tmp_path, monkeypatch):
  (tmp_path / 'accelerator.py').write_text('raise SystemExit("no such flag")')
  monkeypatch.setattr(process, 'HERE', tmp_path)
  processes = process.Processes(tmp_path, True, time.monotonic() + 60)
  why = processes.run(_group('a'), ['a'], print)
  assert why == 'the process ended with 1: no such flag'


# ---- The rows ----------------------------------------------------------------
def test_every_other_policy_of_rematerialization_is_a_row():
  names = [name for g in rows.groups() for name in g.rows]
  for config in rows.CONFIGS:
    own = load_config(f'imagen_{config}', []).stage.net.remat
    for policy in {None, *remat.POLICIES} - {own}:
      assert f'{config}:remat={policy}' in names
    assert f'{config}:remat={own}' not in names
  assert len(names) == len({*names})


def test_the_flags_are_those_of_the_documentation():
  page = (FOLDER.parent / 'docs' / 'gpu.md').read_text()
  assert f'XLA_FLAGS="{rows.DETERMINISTIC}"' in page


def test_utilization_is_a_fraction_of_the_peak(monkeypatch):
  assert work.utilization(5e11, 2.0) is None  # of a CPU there is none
  monkeypatch.setattr(work, 'peak', lambda: 1e12)
  assert work.utilization(5e11, 2.0) == 0.25


def test_a_call_that_is_too_slow_is_not_repeated(monkeypatch):
  calls = []
  assert len(work.call_times(lambda: calls.append(1), True)) == work.FEWEST
  monkeypatch.setattr(work, 'SLOW', -1.0)
  calls.clear()
  with pytest.raises(work.LeftOut):
    work.call_times(lambda: calls.append(1))
  assert len(calls) == 1


@pytest.mark.parametrize(
  'error, begins',
  [
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 'out of memory'),
    (RuntimeError('CUDA out of memory. Tried'), 'out of memory'),
    (ImportError('No module', name='diffusers'), 'diffusers is not installed'),
    (work.LeftOut('no CUDA'), 'no CUDA'),
    (ValueError('a\nb'), 'ValueError: a b'),
  ],
)
def test_an_error_is_one_line(error, begins):
  assert work.reason(error).startswith(begins)


def test_weights_are_random_and_repeat_a_block():
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  shapes = {'kernel': like(3, 5), 'bias': like(4), 'scale': like(4)}
  made = work.random_tree(shapes)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes
  )
  assert made['bias'].sum() == 0 and made['scale'].sum() == 4
  assert jnp.unique(made['kernel']).size > 10


# One of every kind; all of them take minutes.
REHEARSED = (
  'sr256', 'base64:cudnn', 'sample:sr1024', 'if', 't5:16', 'if:diffusers',
  'determinism:flags',
)  # fmt: skip


@pytest.mark.slow
def test_a_rehearsal_measures_rows_of_every_kind(tmp_path):
  out = tmp_path / 'rehearsal.json'
  program = [sys.executable, FOLDER / 'accelerator.py']
  run = functools.partial(
    subprocess.run,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': str(FOLDER.parent)},
  )
  done = run([*program, '--rehearse', '--out', out, '--rows', *REHEARSED])
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())['rows']
  assert {*found} == {*REHEARSED}
  for name, row in found.items():
    why = row.get('left_out')
    absent = name == 'if:diffusers' and str(why).endswith('is not installed')
    assert why is None or absent, (name, why)
  assert 'left_out' not in found['sr256']['ops']
  assert sum(found['sr256']['ops']['seconds'].values()) > 0
  printed = run([*program, '--table', out]).stdout
  assert printed.strip() and printed.strip() in done.stdout
