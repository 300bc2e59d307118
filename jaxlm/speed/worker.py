"""One side of a comparison in a process of its own, so that neither's threads and memory are the other's.

  python -m jaxlm.speed.worker SIDE JOB SHAPE FOLDER    stdin: [method, *arguments] a line; stdout: the answer
"""
import json
import os
import resource
import sys
import time

import numpy as np

from jaxlm.speed.shapes import ALL


def make(side: str, job: str, shape: str, folder: str):
  """What does the job: a Trainer or Generator of one of the sides."""
  config = ALL[shape]()
  if side == 'jaxlm':
    from jaxlm.speed import ours
    return getattr(ours, job)(config, folder)
  from jaxlm.speed import peers
  return getattr(peers, job)(config, folder, side.endswith('compiled'))


def main(argv: list[str]) -> None:
  """Answers with {seconds, result, peak_bytes} until stdin ends."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print is no answer
  job = make(*argv[1:])
  print(json.dumps('ready'), file=answers, flush=True)
  for line in sys.stdin:
    method, *arguments = json.loads(line)
    arguments = [np.array(x) if isinstance(x, list) else x for x in arguments]
    start = time.perf_counter()
    result = getattr(job, method)(*arguments)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(seconds=seconds, result=result, peak_bytes=peak)), file=answers, flush=True)


if __name__ == '__main__':
  main(sys.argv)
