"""Words of Python code and what each is, in BIO: names, calls, strings, numbers, as Python's own tokenizer has them."""
import keyword
import token
import tokenize
from typing import Iterator

KINDS = ('KEYWORD', 'NAME', 'CALL', 'FUNCTION', 'CLASS', 'NUMBER', 'STRING', 'COMMENT')
TAGS = ('O', *(f'{place}-{kind}' for kind in KINDS for place in 'BI'))
TWO_WORDS = {('not', 'in'), ('is', 'not'), ('async', 'def'), ('async', 'for'), ('async', 'with'), ('yield', 'from')}


def _whole_strings(tokens: list[tokenize.TokenInfo], lines: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
  """(type, text, line) of each token; an f-string is one, as it was before Python 3.12."""
  depth, begin = 0, (0, 0)
  for each in tokens:
    name = token.tok_name[each.type]
    if name.endswith('STRING_START'):
      begin = begin if depth else each.start
      depth += 1
    elif name.endswith('STRING_END'):
      depth -= 1
      if not depth:
        (first, left), (last, right) = begin, each.end
        text = ''.join(lines[first - 1:last])
        yield 'STRING', text[left:len(text) - len(lines[last - 1]) + right], first
    elif not depth:
      yield name, each.string, each.start[0]


def _kind(name: str, before: str, after: str) -> str:
  if before in ('def', 'class'):
    return 'FUNCTION' if before == 'def' else 'CLASS'
  return 'CALL' if after == '(' else 'NAME'


def _tagged(line: list[tuple[str, str, int]]) -> Iterator[tuple[str, str]]:
  """(word, tag) of a logical line: dotted names, strings that stand side by side and comments are spans of words."""
  line = [(name, text) for name, text, _ in line if text.strip()]
  before, i = ('', ''), 0
  while i < len(line):
    name, text = line[i]
    end = i + 1
    if name in ('STRING', 'COMMENT'):
      words, kind = text.split(), name
      inside = name == 'STRING' == before[0]
    elif name == 'NAME' and keyword.iskeyword(text):
      words, kind, inside = [text], 'KEYWORD', (before[1], text) in TWO_WORDS
    elif name == 'NAME':
      while (end + 1 < len(line) and line[end][1] == '.' and line[end + 1][0] == 'NAME'
             and not keyword.iskeyword(line[end + 1][1])):
        end += 2
      words, inside = [word for _, word in line[i:end]], False
      kind = _kind(text, before[1], line[end][1] if end < len(line) else '')
    else:
      words, kind, inside = [text], 'NUMBER' if name == 'NUMBER' else '', False
    for j, word in enumerate(words):
      yield word, f'{"I" if inside or j else "B"}-{kind}' if kind else 'O'
    before, i = line[end - 1], end


def logical_lines(lines: tuple[str, ...]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
  """(number of its first line, its tagged words) of each logical line, with comments above it."""
  tokens = [*tokenize.generate_tokens(iter(lines).__next__)]
  group: list[tuple[str, str, int]] = []
  for each in _whole_strings(tokens, lines):
    if each[0] in ('INDENT', 'DEDENT', 'NL', 'ENCODING', 'ENDMARKER'):
      continue
    if each[0] != 'NEWLINE':
      group.append(each)
    elif group:
      yield group[0][2], [*_tagged(group)]
      group = []
