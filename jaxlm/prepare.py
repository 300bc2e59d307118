"""Tokenises a corpus once into the token store: python -m jaxlm.prepare --config=experiments/x.py"""
from absl import flags
from ml_collections import config_flags

from jaxlm import programs
from jaxlm.data import store

CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment whose data is prepared.')


def table(prepared: store.Prepared) -> str:
  """What the stores hold: a line a source."""
  rows = [('source', 'documents', 'tokens', 'bytes', 'bytes/token', 'held out', 'folder')]
  for s in prepared.stores:
    m = s.manifest
    rows.append((s.name, f'{m["documents"]:,}', f'{m["tokens"]:,}', f'{m["text_bytes"]:,}',
                 f'{m["text_bytes"] / m["tokens"]:.3f}', f'{m["heldout_documents"]:,}', str(s.folder)))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join('  '.join(c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
                   .rstrip() for row in rows)


def main(argv):
  """Prepares the data of --config and prints what it is."""
  del argv
  prepared = store.prepare(CONFIG.value)
  vocab = prepared.tokenizer.vocab
  print(table(prepared))
  print(f'tokenizer {prepared.tokenizer.name}: {vocab.size:,} ids, digest {prepared.tokenizer.digest[:16]}')


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  programs.run(main)
