"""What a run writes of itself, and speed."""
import json

import jax
import pytest

from jaxlm import metrics
from jaxlm.metrics import Meter, Writer, mend, peak_flops, read_jsonl


class Device:
  platform = 'gpu'

  def __init__(self, device_kind):
    self.device_kind = device_kind


# ---- files -------------------------------------------------------------------------------------------------------


def test_lines_are_on_disk_when_write_returns_and_follow_those_that_were_there(tmp_path):
  for start in (0, 2):
    writer = Writer(str(tmp_path), start, 4, tensorboard=False)
    for step in (start + 1, start + 2):
      writer.write(step, {'train/loss': 1.5 / step, 'examples': 8 * step})
      last = read_jsonl(tmp_path / 'metrics.jsonl')[-1]
      assert last == {'step': step, 'train/loss': 1.5 / step, 'examples': 8 * step}
    writer.close()
  assert [line['step'] for line in read_jsonl(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4]


def test_the_last_line_of_a_repeated_step_counts_and_evaluations_have_lines_of_their_own(tmp_path):
  lines = [{'step': 1, 'train/loss': 3.0}, {'step': 2, 'train/loss': 2.0}, {'step': 2, 'eval/heldout/loss': 2.5},
           {'step': 2, 'train/loss': 1.9}]
  (tmp_path / 'm').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert read_jsonl(tmp_path / 'm') == [lines[0], lines[2], lines[3]]


@pytest.mark.parametrize('torn', ['{"step": 2, "tra', '{"step": 2}', '{'])
def test_a_torn_last_line_is_not_read_and_is_cut_off_before_writing_on(torn, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n' + torn)
  assert read_jsonl(path) == [{'step': 1}]
  writer = Writer(str(tmp_path), 1, 2, tensorboard=False)
  writer.write(2, {'train/loss': 1.0})
  writer.close()
  assert path.read_text() == '{"step": 1}\n{"step": 2, "train/loss": 1.0}\n'


@pytest.mark.parametrize('before, after', [('', ''), ('a\n', 'a\n'), ('a', ''), ('a\nb\nc', 'a\nb\n')])
def test_mending_leaves_whole_lines(before, after, tmp_path):
  path = tmp_path / 'file'
  path.write_text(before)
  mend(str(path))
  assert path.read_text() == after
  mend(str(tmp_path / 'nothing'))  # is no fault


def test_samples_and_events_are_written(tmp_path):
  writer = Writer(str(tmp_path), 0, 2, tensorboard=True)
  writer.write(1, {'train/loss': 1.0, 'note': 'text stays out of TensorBoard'})
  writer.sample(1, 'def ', 'f(x):\n  return x')
  writer.advance(1)
  writer.close()
  sample = json.loads((tmp_path / 'samples.jsonl').read_text())
  assert sample == {'step': 1, 'prompt': 'def ', 'text': 'f(x):\n  return x'}
  assert any((tmp_path / 'tensorboard').iterdir())


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  writer = Writer(str(tmp_path), 0, 2, tensorboard=True)
  writer.write(1, {'train/loss': 1.0})
  writer.sample(1, '', '')
  writer.advance(1)
  writer.say('hello')
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_terminal_every_line_is_told(tmp_path, capsys):
  writer = Writer(str(tmp_path), 0, 2, tensorboard=False)
  writer.write(1, {'train/loss': 1.23456, 'train/tokens_per_s': 123456.7, 'examples': 8})
  writer.close()
  assert capsys.readouterr().err == 'step 1  train/loss 1.235  train/tokens_per_s 123,457\n'


# ---- speed -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
  """A list of one number: the time."""
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
  return now


def test_speed_is_of_the_tokens_since_the_reading_before_the_last(clock):
  meter = Meter(flops_per_token=1e6, peak=1e9, seconds=50.0, tokens=1000)
  assert meter.seconds() == 50
  clock[0] += 2
  assert meter.read(1200) == {'train/tokens_per_s': pytest.approx(100), 'train/mfu': pytest.approx(0.1)}
  clock[0] += 1
  assert meter.read(1600)['train/tokens_per_s'] == pytest.approx(200)  # 600 in 3 seconds
  clock[0] += 1
  assert meter.read(1700)['train/tokens_per_s'] == pytest.approx(250)  # 500 in 2
  assert meter.seconds() == 54


def test_a_pause_takes_no_time(clock):
  meter = Meter(1.0, 0.0, 0.0, 0)
  clock[0] += 1
  with meter.paused():
    clock[0] += 30
  clock[0] += 1
  assert meter.seconds() == 2
  assert meter.read(10) == {'train/tokens_per_s': pytest.approx(5)}  # no peak known, no share of it


def test_a_restart_counts_on_from_where_it_is_told(clock):
  meter = Meter(1.0, 0.0, 0.0, 0)
  clock[0] += 9
  meter.restart(4.0, 100)
  clock[0] += 2
  assert meter.seconds() == 6 and meter.read(300)['train/tokens_per_s'] == pytest.approx(100)


@pytest.mark.parametrize('kind, dtype, peak', [
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989e12), ('NVIDIA H100 PCIe', 'bfloat16', 756e12),
    ('NVIDIA A100-SXM4-40GB', 'bfloat16', 312e12), ('TPU v5 lite', 'bfloat16', 197e12), ('TPU v5', 'bfloat16', 459e12)])
def test_a_known_accelerators_peak_is_the_vendors_times_their_number(kind, dtype, peak):
  flops, source = peak_flops([Device(kind)] * 4, dtype)
  assert flops == 4 * peak and 'data sheet' in source


def test_an_unknown_accelerator_has_no_peak():
  assert peak_flops([Device('Abacus 9000')], 'bfloat16') == (0.0, 'unknown for Abacus 9000')
  assert peak_flops([Device('TPU v4')], 'float32')[0] == 0.0


def test_a_cpus_peak_is_measured_once_for_all_its_simulated_devices():
  flops, source = peak_flops(jax.devices(), 'float32')
  assert 1e8 < flops < 1e14 and source.startswith('measured')
