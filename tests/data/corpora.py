"""Small corpora that the data tests share."""
import json

import numpy as np

from jaxlm import config as configs


def corpus(folder, documents=60, seed=0):
  """A JSON Lines file of random words, and a config that reads it."""
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  texts = [' '.join(rng.choice(['alpha', 'béta', 'gamma', 'Δ', '\n'], rng.integers(1, 60))) + f' {i}'
           for i in range(documents)]
  (folder / 'a.jsonl').write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts))
  config = configs.default()
  config.data.update(source='jsonl', paths=str(folder / '*.jsonl'), store=str(folder / 'stores'), holdout=0.2)
  return config, texts
