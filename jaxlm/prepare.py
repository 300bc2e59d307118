"""Tokenises a corpus once into the token store, or says what is there.

  python -m jaxlm.prepare --config=experiments/x.py [--config.data.paths=corpus/*.jsonl.zst]

A run prepares its data itself; this does it beforehand, on a machine that needs no accelerator.
"""
from jaxlm import check, programs
from jaxlm.data import store

programs.define_config()


def table(prepared: store.Prepared) -> str:
  """What the stores hold: a line a source."""
  rows = [('source', 'folder', 'documents', 'held out', 'tokens', 'bytes', 'bytes/token')]
  for s in prepared.stores:
    m = s.manifest
    rows.append((s.name, str(s.folder), f'{m["documents"]:,}', f'{m["heldout_documents"]:,}', f'{m["tokens"]:,}',
                 f'{m["text_bytes"]:,}', f'{m["text_bytes"] / m["tokens"]:.3f}'))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join('  '.join([row[0].ljust(widths[0]), row[1].ljust(widths[1]),
                              *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))]) for row in rows)


def main(argv: list[str]) -> None:
  """Prepares the data of --config and prints what it is."""
  del argv
  config = programs.config()
  check.validate(config)
  prepared = store.prepare(config)
  print(table(prepared))
  print(f'tokenizer {prepared.tokenizer.name}: {prepared.tokenizer.vocab.size:,} ids, '
        f'digest {prepared.tokenizer.digest[:16]}')


if __name__ == '__main__':
  programs.run(main)
