"""The last words of a process: said by a small companion that outlives it. A program of its own; needs Python alone.

A process whose coordinator is gone is aborted by JAX before any Python of it can speak.

  python lastwords.py FOLDER INDEX     stdin: open as long as the process lives; 'done' if it ended in order
"""
import json
import os
import signal
import sys
import time


def said(folder: str, index: int) -> dict:
  """What the process of this number wrote last, as cluster.Watch does."""
  try:
    with open(os.path.join(folder, f'{index}.json'), encoding='utf-8') as f:
      return json.load(f)
  except (OSError, ValueError):
    return {}


def words(folder: str, index: int, pause_s: float = 2.5) -> str:
  """One line about a process that has ended without a word."""
  mine, leader = said(folder, index), said(folder, 0)
  time.sleep(pause_s)  # longer than a live process takes to renew its file
  place = lambda x: f'(host {x.get("host")}, pid {x.get("pid")})'
  if index and leader and said(folder, 0) in (leader, {}):
    return (f'failed: process 0 {place(leader)}, which all others hang on, is gone; it was at step {leader["step"]}. '
            f'Process {index} ends, too; the same command goes on from what was saved.')
  return (f'failed: process {index} {place(mine)} was ended from outside, at step {mine.get("step")}; the same command '
          'goes on from what was saved.')


if __name__ == '__main__':
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  if sys.stdin.buffer.read() != b'done':
    print(words(sys.argv[1], int(sys.argv[2])), file=sys.stderr, flush=True)
