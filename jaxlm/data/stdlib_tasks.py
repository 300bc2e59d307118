"""Labelled tasks made of the standard library's code: real text, exact labels, nothing to download.

Records are dicts of plain values with an `id`, `path:line` in the library, the same in every run of one Python version;
another version has another library.
"""
import ast
import collections
import doctest
import functools
import inspect
import itertools
import re
import textwrap
import warnings
from typing import Iterable, Iterator

from jaxlm.data import library, lisp, sources, wordkinds
from jaxlm.lookup import lookup

MIN_WORDS = 4                            # of a docstring; a shorter one says nothing
MAX_CONTEXT = 2_000                      # characters of a function that is asked about
MAX_BEFORE = 800                         # characters of the file before a line that is to be written
CHUNK_LINES = 16                         # of a text whose module is to be named
NUM_MODULES = 20
TABLES = {'encodings', 'pydoc_data'}     # modules that are large for their tables
STATEMENT = range(24, 73)                # characters of a statement that is translated
LINE = range(8, 73)                      # of a line that is a function's body
FORMS = 3                                # in its translation, at least
COMMENT = re.compile(r'\s*#+(.*)\n')  # a line that is one
MIN_SPAN_WORDS, MAX_SPAN_WORDS, MAX_WORD = 16, 64, 40


# ---- splits ------------------------------------------------------------------------------------------------------


@functools.cache
def _all(task: str) -> tuple[dict, ...]:
  """Of all splits, once a process: some take seconds."""
  return tuple(RECORDS[task]())


def records(task: str, split: str) -> Iterator[dict]:
  """A task's records of a split; whole files are held out, but for tasks whose label is the module.

  Raises:
    JaxlmError: no such task or split.
  """
  lookup(RECORDS, task, 'task')
  lookup(dict.fromkeys(sources.SPLITS), split, 'split')
  scored = lambda record: split != 'test' or task != 'body' or record['doctests']  # a test without examples says nothing
  return (record for record in _all(task)
          if sources.split_of(record['id'], by_file=task not in WITHIN_FILES) == split and scored(record))


# ---- functions and what is said of them --------------------------------------------------------------------------


def _paragraph(doc: str) -> str:
  """A docstring's first paragraph in one line."""
  return ' '.join(re.split(r'\n\s*\n', inspect.cleandoc(doc), maxsplit=1)[0].split())


def _sentence(doc: str) -> str:
  """A docstring's first sentence: to a full stop before a capital."""
  paragraph = _paragraph(doc)
  found = re.match(r'.+?[.!?](?=\s+[A-Z(`])', paragraph)
  return found[0] if found else paragraph


def _described(describe) -> Iterator[tuple[library.Function, str]]:
  """Functions and descriptions; none that is short, an example, a signature, or fits several functions."""
  pairs = [(function, describe(function.doc)) for _, function in library.functions() if function.doc]
  count = collections.Counter(text for _, text in pairs)
  for function, text in pairs:
    plain = not text.startswith(('>>>', f'{function.name}('))
    if plain and count[text] == 1 and len(text.split()) >= MIN_WORDS:
      yield function, text


def summary() -> Iterator[dict]:
  """A function without its docstring -> the docstring's first sentence: id, code, summary."""
  for function, text in _described(_sentence):
    yield dict(id=function.id, code=function.code, summary=text)


def retrieve() -> Iterator[dict]:
  """A docstring's first paragraph -> its function without it: id, query, positive."""
  for function, text in _described(_paragraph):
    yield dict(id=function.id, query=text, positive=function.code)


def default() -> Iterator[dict]:
  """Extractive questions on parameters' defaults: id, context, question, answer, start (characters)."""
  for _, function in library.functions():
    if len(function.code) <= MAX_CONTEXT:
      for parameter, text, start in function.defaults:
        question = f'What is the default value of `{parameter}` in `{function.name}`?'
        yield dict(id=f'{function.id}:{parameter}', context=function.code, question=question, answer=text, start=start)


# ---- bodies and their doctests -----------------------------------------------------------------------------------


def body() -> Iterator[dict]:
  """Signature and docstring -> body: id, prompt, body, doctests, entry, module, lines, indent.

  `doctests` is the docstring if it has examples that are statements and its module can be imported, else ''. Whether
  they can score a body is known when both `proofs` have run.
  """
  for module, function in library.functions():
    if function.doc and len(_paragraph(function.doc).split()) >= MIN_WORDS:
      yield dict(id=function.id, prompt=function.head + function.doc_lines, body=function.body,
                 doctests=function.doc if module.name and _has_examples(function.doc) else '', entry=function.qualname,
                 module=module.name, lines=list(function.body_lines), indent=function.indent)


def line() -> Iterator[dict]:
  """A function up to its only statement, of one line -> that line: id, before, prompt, line. None that says nothing.

  `before` are the lines of the file ahead of it, as far as MAX_BEFORE characters hold them, dedented as it is.
  """
  for module, function in library.functions():
    try:
      [node] = ast.parse(function.code).body
      [statement] = node.body
    except (SyntaxError, ValueError):
      continue
    lines = function.code.splitlines(keepends=True)
    before, own = lines[:statement.lineno - 1], lines[statement.lineno - 1:]
    alone = len(own) == 1 and statement.lineno > node.lineno and not own[0][:statement.col_offset].strip()
    empty = isinstance(statement, (ast.Pass, ast.Raise)) or isinstance(getattr(statement, 'value', None), ast.Constant)
    if alone and not empty and len(own[0].strip()) in LINE:
      head = ''.join(before)
      prompt = function.head + function.doc_lines + head.removeprefix(function.head) if function.doc_lines else head
      yield dict(id=function.id, before=_before(module, function), prompt=prompt,
                 line=own[0][:library.column(own[0], statement.end_col_offset)])


def _before(module: library.Module, function: library.Function) -> str:
  """Whole lines ahead of a function, the last ones, without the columns that its own text has lost."""
  found, room = [], MAX_BEFORE
  for text in reversed(module.lines[:function.first - 1]):
    text = library.dedented([text], function.indent)
    room -= len(text)
    if room < 0:
      break
    found.append(text)
  return ''.join(reversed(found))


def _has_examples(doc: str) -> bool:
  """Whether it has examples, and all of them can be run outside a function."""
  try:
    examples = doctest.DocTestParser().get_examples(doc)
    for example in examples:
      compile(example.source, 'example', 'single')
  except (ValueError, SyntaxError):
    return False
  return bool(examples)


PROGRAM = '''\
import doctest, importlib.util, os, sys
path, name, entry, (first, last), body, tests = {arguments!r}
with open(os.path.join(os.path.dirname(os.__file__), path), encoding='utf-8-sig') as f:
  lines = f.readlines()
lines[first - 1:last] = [body]
spec = importlib.util.find_spec(name)
module = sys.modules[name] = importlib.util.module_from_spec(spec)
exec(compile(''.join(lines), path, 'exec', dont_inherit=True), module.__dict__)
parent, _, child = name.rpartition('.')
if parent:
  setattr(sys.modules[parent], child, module)
names = {{name.partition('.')[0]: sys.modules[name.partition('.')[0]], **module.__dict__}}
test = doctest.DocTestParser().get_doctest(tests, names, entry, path, 0)
failed, attempted = doctest.DocTestRunner(verbose=False).run(test)
if failed or not attempted:
  raise AssertionError(f'{{failed}} of {{attempted}} examples of {{entry}} fail')
'''


def program(record: dict, body: str) -> str:
  """A program that comes to its end only if a body passes the record's doctests; for a sandbox.

  The body takes the place of its own in the module's text, so that it finds there what the original found: helpers,
  its class, `super()`. The examples are the record's, whatever the text says. That it must come to its end, rather than
  exit with 0, is what `measure.sandbox` asks of every program.

  Args:
    record: one of `body` with doctests.
    body: lines as in `record['body']`, indented as they follow the prompt; where it ends is the caller's to find.
  """
  margin = ' ' * record['indent']
  moved = ''.join(margin + line if line.strip() else line for line in body.splitlines(keepends=True))
  arguments = (record['id'].partition(':')[0], record['module'], record['entry'], tuple(record['lines']),
               moved.rstrip('\n') + '\n', record['doctests'])
  return PROGRAM.format(arguments=arguments)


def proofs(record: dict) -> tuple[str, str]:
  """Two programs that say whether a record can score bodies: the first passes, and the second, which raises, fails."""
  return program(record, record['body']), program(record, '    raise NotImplementedError\n')


# ---- words and their kinds ---------------------------------------------------------------------------------------


def token_kinds(modules: tuple[library.Module, ...] | None = None) -> Iterator[dict]:
  """A few lines of code as words -> what each is, in BIO: id, words, tags (of `wordkinds.TAGS`).

  Args:
    modules: those to read; the whole library by default.
  """
  seen = set()
  for module in library.modules() if modules is None else modules:
    start, pairs = 0, []
    for number, line in wordkinds.logical_lines(module.lines):
      if len(line) > MAX_SPAN_WORDS or any(len(word) > MAX_WORD for word, _ in line):
        pairs = []
        continue
      if len(pairs) + len(line) > MAX_SPAN_WORDS:
        pairs = []
      start, pairs = start if pairs else number, pairs + line
      if len(pairs) >= MIN_SPAN_WORDS:
        words, tags = map(list, zip(*pairs))
        if tuple(words) not in seen:
          seen.add(tuple(words))
          yield dict(id=f'{module.path}:{start}', words=words, tags=tags)
        pairs = []


# ---- statements in another language ------------------------------------------------------------------------------


def translation() -> Iterator[dict]:
  """A statement on a line of its own -> the same in a Lisp (`lisp`): id, python, lisp."""
  seen = set()
  for module in library.modules():
    for number, line in enumerate(module.lines, 1):
      text = line.strip()
      if len(text) not in STATEMENT or text in seen or text[0] in '#"\'@' or text.endswith((':', ',', '\\', '(', '[', '{')):
        continue
      seen.add(text)
      try:
        with warnings.catch_warnings():
          warnings.simplefilter('ignore')
          [statement] = ast.parse(text).body
        said = lisp.translated(statement)
      except (SyntaxError, ValueError, lisp.Untranslatable):
        continue
      if said.count('(') >= FORMS and '#' not in text:
        yield dict(id=f'{module.path}:{number}', python=text, lisp=said)


# ---- chunks and their modules ------------------------------------------------------------------------------------


def _runs(module: library.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Its lines without blank ones and imports, CHUNK_LINES at a time: id, lines."""
  numbers = [n for n, line in enumerate(module.lines, 1) if line.strip() and n not in module.imports]
  for i in range(0, len(numbers) - CHUNK_LINES + 1, CHUNK_LINES):
    yield f'{module.path}:{numbers[i]}', tuple(module.lines[n - 1] for n in numbers[i:i + CHUNK_LINES])


def _text(lines: Iterable[str]) -> str:
  return textwrap.dedent(''.join(lines))


def _chunks(module: library.Module, label: str) -> Iterator[dict]:
  """Runs of lines, none that says the label."""
  named = re.compile(rf'\b{re.escape(label)}\b', re.IGNORECASE)
  for place, lines in _runs(module):
    if not named.search(_text(lines)):
      yield dict(id=place, text=_text(lines), label=label)


def module() -> Iterator[dict]:
  """A chunk of code -> which of the largest modules or packages it is from, as many of each: id, text, label."""
  of_label = collections.defaultdict(list)
  for file in library.modules():
    label = file.path.split('/')[0].removesuffix('.py')
    if label not in TABLES:
      of_label[label] += _chunks(file, label)
  largest = sorted(of_label, key=lambda label: (-len(of_label[label]), label))[:NUM_MODULES]
  count = min(len(of_label[label]) for label in largest)
  for label in sorted(largest):
    chunks = of_label[label]
    yield from (chunks[i * len(chunks) // count] for i in range(count))  # evenly from its files


def neighbours() -> Iterator[dict]:
  """Some lines -> those after them: id, query, positive. Nothing is labelled: what texts of one place share is learned
  before any questions (Izacard et al. 2022, arXiv:2112.09118)."""
  half = CHUNK_LINES // 2
  for file in library.modules():
    if file.path.split('/')[0] not in TABLES:
      for place, lines in _runs(file):
        yield dict(id=place, query=_text(lines[:half]), positive=_text(lines[half:]))


def _commented(file: library.Module) -> Iterator[dict]:
  """Comments on lines of their own, each with the lines under it, two at least, to an empty one or another comment."""
  parts = [(is_comment, [*part]) for is_comment, part in itertools.groupby(
      enumerate(file.lines, 1), lambda numbered: COMMENT.fullmatch(numbered[1]) is not None)]
  for (is_comment, above), (_, below) in itertools.pairwise(parts):
    under = [line for _, line in itertools.takewhile(lambda numbered: numbered[1].strip(), below[:CHUNK_LINES])]
    if is_comment and len(under) >= 2:
      said = [word for _, line in above for word in COMMENT.fullmatch(line)[1].split() if re.search(r'\w', word)]
      yield dict(id=f'{file.path}:{above[0][0]}', query=' '.join(said), positive=_text(under))


def comments() -> Iterator[dict]:
  """A comment -> the lines that it stands over: id, query, positive. None that is short or said twice. Nobody labelled
  these either, and they are more like questions than `neighbours` are."""
  pairs = [pair for file in library.modules() for pair in _commented(file)]
  count = collections.Counter(pair['query'] for pair in pairs)
  yield from (pair for pair in pairs if count[pair['query']] == 1 and len(pair['query'].split()) >= MIN_WORDS)


WITHIN_FILES = {'module'}  # tasks whose splits divide files
RECORDS = {'summary': summary, 'body': body, 'retrieve': retrieve, 'token_kinds': token_kinds, 'module': module,
           'default': default, 'translation': translation, 'neighbours': neighbours, 'comments': comments,
           'line': line}
