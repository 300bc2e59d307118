"""Tokenises a corpus once into the token store, or says what is there.

  python -m jaxlm.prepare --config=experiments/x.py [--config.data.paths=corpus/*.jsonl.zst]
  python -m jaxlm.prepare --config=experiments/x.py --export=parquet --to=DIR

A run prepares its data itself; this does it beforehand, on a machine that needs no accelerator. --export also writes
the documents, tokens and all, as other programs read them.
"""
from jaxlm import programs
from jaxlm.data import exports, store
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup

flags = programs.Flags()
EXPORT = flags.DEFINE_string('export', None, f'Also write the documents as one of {", ".join(exports.FORMATS)}.')
TO = flags.DEFINE_string('to', None, 'The new folder they go to.')

programs.define_config()


def table(prepared: store.Prepared, weights: list[int]) -> str:
  """What the stores hold: a line a source. Of given tokens only what is held out was decoded and has bytes."""
  rows = [('source', 'folder', 'documents', 'held out', 'tokens', 'bytes', 'bytes/token', 'weight')]
  for s, weight in zip(prepared.stores, weights):
    m = s.manifest
    tokens = m['heldout_tokens'] if m.get('is_tokens') else m['tokens']
    rows.append((s.name, str(s.folder), f'{m["documents"]:,}', f'{m["heldout_documents"]:,}', f'{m["tokens"]:,}',
                 f'{m["text_bytes"]:,}', f'{m["text_bytes"] / max(tokens, 1):.3f}', f'{weight:,}'))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join('  '.join([row[0].ljust(widths[0]), row[1].ljust(widths[1]),
                              *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))]) for row in rows)


def main(argv: list[str]) -> None:
  """Prepares the data of --config, prints what it is, and exports it if asked to."""
  del argv
  if (EXPORT.value is None) != (TO.value is None):
    raise JaxlmError('--export and --to go together; give both or neither.')
  if EXPORT.value is not None:
    lookup(exports.FORMATS, EXPORT.value, 'export format')
  config = programs.config()
  from jaxlm import check, objectives  # late, for they import jax
  check.validate(config)
  prepared = store.prepare(config, objectives.roles(config))
  print(table(prepared, store.weights(config.data, [s.num_train_tokens for s in prepared.stores])))
  print(f'tokenizer {prepared.tokenizer.name}: {prepared.tokenizer.vocab.size:,} ids, '
        f'digest {prepared.tokenizer.digest[:16]}')
  if EXPORT.value is not None:
    for file in exports.export(prepared, EXPORT.value, TO.value):
      print(file)


if __name__ == '__main__':
  programs.run(main)
