"""Text with documents planted in it, for the tests of what is known by heart and what has leaked."""
import json
import random

WORDS = [''.join(random.Random(i).choices('abcdefghijklmnopqrstuvwxyz', k=random.Random(-i).randint(3, 9)))
         for i in range(300)]
HEADER = 'printed for the society by its own press, all rights are kept by them. '


def words(seed, count=40):
  """Words that no other seed gives in this order."""
  return ' '.join(random.Random(seed).choices(WORDS, k=count))


PLANTED, UNIQUE, LEAKED = words('fifty'), words('unique'), words('leaked')
# One document 50 times, one once, a header after ever new text, and a test example inside a document.
TEXTS = {
    'plain': [words(i) for i in range(30)],
    'planted': [PLANTED] * 50,
    'unique': [UNIQUE],
    'headers': [f'{words(f"header {i}", 8)} {HEADER}' for i in range(9)],
    'leaked': [f'{words("before")} {LEAKED} {words("after")}'],
}


def written(path, records):
  """A JSONL file of records; its path as text."""
  path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
  return str(path)


def plant(folder, config):
  """Writes the texts, a file each, and makes them what a config learns from; a part of the plain ones is held out."""
  for name, texts in TEXTS.items():
    written(folder / f'{name}.jsonl', [dict(text=text) for text in texts])
  config.data.update(source='jsonl', paths=str(folder / '*.jsonl'), store=str(folder / 'stores'), holdout=0.11)
