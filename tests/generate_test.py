"""The generate program: what it prints, and its errors as one line each."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import generate, loading, programs


class FakeLM:
  """Records how it was called; continues each prompt with '!'."""

  def __init__(self):
    self.calls = []

  def generate(self, prompts, **settings):
    self.calls.append((prompts, settings))
    return ['!' for _ in prompts]


@pytest.fixture
def fake(monkeypatch):
  model = FakeLM()
  monkeypatch.setattr(loading, 'load', lambda path, dtype=None: model)
  return model


def outcome(*flags):
  return programs.outcome(generate.main, ['generate', *flags])


def test_prompts_are_printed_with_their_continuations(fake, capsys, tmp_path):
  (tmp_path / 'p.txt').write_text('from a file\n', encoding='utf-8')
  code = outcome('--model=m', '--prompt=one', '--prompt=two', f'--prompt_file={tmp_path}/p.txt', '--max_new_tokens=5',
                 '--temperature=0.5', '--top_k=3', '--top_p=0.9', '--repetition_penalty=1.1', '--seed=7', '--stop=x',
                 '--stop=y')
  dashes = generate.SEPARATOR
  assert (code, capsys.readouterr().out) == (0, f'one!\n{dashes}\ntwo!\n{dashes}\nfrom a file\n!\n')
  assert fake.calls == [(['one', 'two', 'from a file\n'], dict(
      max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.9, min_p=0.0, repetition_penalty=1.1, seed=7, stop=['x', 'y'],
      num_beams=1, length_penalty=1.0, special=False, draft=None, lookup=0, guesses=4, heard=None))]


@pytest.mark.parametrize('flags, line', [
    (('--prompt=a',), 'error: --model is missing; give a run directory, a Hugging Face folder or a GGUF file.'),
    (('--model=m',), 'error: There is nothing to continue; give --prompt=TEXT or --prompt_file=FILE '
     '(--prompt= begins a text).'),
    (('--model=m', '--prompt_file=nowhere'), 'error: --prompt_file=nowhere cannot be read as UTF-8 text: '
     'No such file or directory.'),
    (('--model=m', '--prompt=a', 'b'), "error: Unknown argument 'b'"),
    (('--model=m', '--prompt=a', '--prompt=b', '--stream'), 'error: --stream prints one continuation as it comes; give '
     'one prompt, not 2.'),
    (('--model=m', '--prompt=a', '--top_k=many'), 'error: flag --top_k=many'),
])
def test_a_users_error_is_one_line_and_exit_code_2(fake, capsys, flags, line):
  assert outcome(*flags) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(line) and captured.err.count('\n') == 1 and not captured.out


def test_a_missing_run_is_one_line_for_the_whole_program(tmp_path):
  root = Path(generate.__file__).parent.parent
  done = subprocess.run([sys.executable, '-m', 'jaxlm.generate', '--model=nowhere', '--prompt=a'], cwd=tmp_path,
                        env=os.environ | {'PYTHONPATH': str(root)}, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == 'error: nowhere is not there; give a run directory, a Hugging Face folder or a GGUF file.\n'


def test_help_tells_every_flag(capsys):
  assert outcome('--help') == 0
  told = capsys.readouterr().out
  for flag in ('model', 'prompt', 'prompt_file', 'max_new_tokens', 'temperature', 'top_k', 'top_p',
               'min_p', 'repetition_penalty', 'draft', 'lookup', 'guesses', 'stream', 'seed', 'num_beams',
               'length_penalty', 'stop', 'dtype'):
    assert f'--{flag}:' in told or f'--[no]{flag}:' in told
