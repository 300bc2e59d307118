"""Conversations to token ids, and which of the tokens the assistant says."""
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError
from jaxlm.lookup import nearest

# A conversation is {'messages': [message, …], 'tools': [schema, …]}, tools if there are any. A message is
# {'role': …, 'content': text}, with 'tool_calls' and 'name' if the template knows them; beside calls content may be
# empty.
Message = Mapping[str, Any]
Span = tuple[int, int]  # of characters: from, up to

ROLES = ('system', 'user', 'assistant', 'tool')

# Noncharacters: no text has them, and no template strips them.
OPEN, CLOSE = '\ufdd0', '\ufdd1'  # around what {% generation %} … {% endgeneration %} writes, until it is rendered
BREAK = '\ufdd2'  # within the name of a special token that a message holds

PROBE = 'AnswerOfJaxlm'  # an answer that only asks what a template writes behind one
CONTEXT = 64  # characters that tell how a continuation is read; the longest names of special tokens have about 30
ANCHORS = ('\n', 'a')  # texts to stand before one that is to be read as a continuation


# ---- conversations -------------------------------------------------------------------------------------------------


def check(messages: Sequence[Message]) -> list[str]:
  """What is wrong with the messages of a conversation, one line each; nothing where all is well.

  Whether roles must alternate is the template's to say: it refuses when it renders.
  """
  faults = list(_faults(messages))
  if not faults and all(message['role'] != 'assistant' for message in messages):
    faults.append('Wanted a turn of the assistant, got none among '
                  f'{len(messages)} messages; leave this conversation out, there is nothing to learn from.')
  return faults


def _faults(messages: Sequence[Message]) -> Iterator[str]:
  """What is wrong with messages, an answer to which may still be wanted."""
  if not isinstance(messages, (list, tuple)) or not messages:
    yield f'Wanted messages as a list of {{"role": …, "content": …}}, got {_short(messages)}.'
    return
  spoken = None  # whose turn the last was, the system's apart
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      yield f'messages[{i}]: wanted {{"role": …, "content": …}}, got {_short(message)}.'
      continue
    role, calls = message.get('role'), message.get('tool_calls')
    where = f'messages[{i}] ({role})'
    if role not in ROLES:
      yield f'messages[{i}]: unknown role {role!r}. Known: {", ".join(ROLES)}.{nearest(role, ROLES)}'
    elif role == 'system' and i:
      yield f'{where}: the system speaks first or not at all; move its text to messages[0].'
    elif role == 'assistant' and spoken is None:
      yield f'{where}: an answer to nothing; begin with a user turn.'
    elif role == 'tool' and spoken not in ('assistant', 'tool'):
      yield f'{where}: no call comes before it; put it after the assistant turn that calls the tool.'
    if calls and (role != 'assistant' or not isinstance(calls, (list, tuple))):
      yield f'{where}: wanted tool_calls as a list and in an assistant turn, got {_short(calls)}.'
    yield from (f'{where}: {fault}' for fault in _content(message.get('content'), bool(calls)))
    spoken = spoken if role == 'system' else role


def _content(content: Any, calls: bool) -> Iterator[str]:
  if content is None and calls:
    return
  if not isinstance(content, str):
    yield f'wanted content as text, got {_short(content)}.'
  elif not content.strip() and not calls:
    yield 'empty content; leave the turn out.'
  elif re.search('[\ud800-\udfff]', content):
    yield 'content holds half of a surrogate pair, which is no text; mend it or leave the conversation out.'


def _short(value: Any) -> str:
  text = f'{type(value).__name__} {value!r}'
  return text if len(text) <= 60 else text[:59] + '…'


def _refuse(faults: Sequence[str]) -> None:
  if faults:
    raise JaxlmError(faults[0] + (f' ({len(faults) - 1} more faults.)' if len(faults) > 1 else ''))


# ---- templates -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Template:
  """A jinja2 template that writes a conversation as one text, as Hugging Face's `chat_template` does.

  Attributes:
    source: of the template. It reads messages, tools, add_generation_prompt, bos_token, eos_token, and may mark what
      the assistant says with {% generation %} … {% endgeneration %}.
    bos, eos: names of the tokens, '' where there is none.
  """
  source: str
  bos: str
  eos: str

  def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None,
             add_generation_prompt: bool = False) -> str:
    """The text of a conversation; with `add_generation_prompt` up to where the assistant's next answer begins."""
    return self.marked(messages, tools, add_generation_prompt)[0]

  def marked(self, messages: Sequence[Message], tools: Sequence[Any] | None = None,
             add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
    """`render`, and the parts of the text that the template marks as generated.

    Raises:
      JaxlmError: the template is not jinja2, or it refuses the messages.
    """
    compiled = _compiled(self.source)
    messages, tools = _plain(messages, tools)
    try:
      text = compiled.render(messages=messages, tools=tools, documents=None, bos_token=self.bos, eos_token=self.eos,
                             add_generation_prompt=add_generation_prompt)
    except Exception as e:  # a template is a program
      raise JaxlmError(f'The chat template refuses these messages: {_line(e)}.') from e
    parts, spans, length, start = [], [], 0, 0
    for part in re.split(f'([{OPEN}{CLOSE}])', text):
      if part == OPEN:
        start = length
      elif part == CLOSE:
        spans += [(start, length)] if start < length else []
      else:
        parts.append(part)
        length += len(part)
    return ''.join(parts), spans


def _plain(messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[list[dict], Any]:
  """Messages and tools as a template may see them: data, and no keys that say nothing."""
  try:
    text = json.dumps([list(messages), tools], ensure_ascii=False)
  except (TypeError, ValueError) as e:
    raise JaxlmError(f'Wanted messages and tools that JSON can hold, got others: {_line(e)}.') from e
  if OPEN in text or CLOSE in text:
    raise JaxlmError('The conversation holds U+FDD0 or U+FDD1, which no text has; leave them out.')
  messages, tools = json.loads(text)
  return [{key: value for key, value in message.items() if value is not None} for message in messages], tools


def _line(e: Exception) -> str:
  return (' '.join(str(e).split()) or type(e).__name__).rstrip('.')


@functools.lru_cache(maxsize=64)
def _compiled(source: str):
  """The jinja2 template, which can neither change its arguments nor reach beyond them."""
  import jinja2
  from jinja2 import ext, nodes, sandbox

  class Generation(ext.Extension):
    """{% generation %} … {% endgeneration %}, a scope of its own as in Hugging Face's renderer."""
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      mark = lambda sign: nodes.Output([nodes.TemplateData(sign)], lineno=line)
      return [mark(OPEN), nodes.Scope(body, lineno=line), mark(CLOSE)]

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
  environment.filters['tojson'] = tojson  # jinja2's own escapes HTML
  environment.globals.update(raise_exception=raise_exception,
                             strftime_now=lambda form: datetime.datetime.now().strftime(form))
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as e:
    raise JaxlmError(f'The chat template is not valid jinja2: line {e.lineno}: {_line(e)}.') from e


def of_folder(path: str | os.PathLike) -> Template | None:
  """The template of a Hugging Face folder, or None if it has none.

  chat_template.jinja comes before tokenizer_config.json's chat_template; of several named ones it is 'default'.

  Raises:
    JaxlmError: the files are not valid JSON, or none of several templates is the default.
  """
  folder = Path(path)
  config = {**_json(folder / 'special_tokens_map.json'), **_json(folder / 'tokenizer_config.json')}
  file, source = folder / 'chat_template.jinja', config.get('chat_template')
  if file.is_file():
    source = file.read_text(encoding='utf-8')
  elif isinstance(source, list):
    named = {entry['name']: entry['template'] for entry in source}
    if 'default' not in named:
      raise JaxlmError(f'Wanted a chat template named default in {folder / "tokenizer_config.json"}, got '
                       f'{", ".join(named)}; write the one to use to {file}.')
    source = named['default']
  if source is None:
    return None
  return Template(source, _name(config.get('bos_token')), _name(config.get('eos_token')))


def _json(file: Path) -> dict:
  try:
    value = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
  except ValueError as e:
    raise JaxlmError(f'{file} is not valid JSON: {e}.') from e
  return value if isinstance(value, dict) else {}


def _name(token: str | Mapping[str, Any] | None) -> str:
  return (token.get('content') if isinstance(token, Mapping) else token) or ''


# ---- what the assistant says ---------------------------------------------------------------------------------------


def spans(template: Template, messages: Sequence[Message],
          tools: Sequence[Any] | None = None) -> tuple[str, list[Span]]:
  """The text of a conversation, and which characters of it the assistant says.

  These are what the template marks with {% generation %}, if it marks anything. Else each is found by rendering: an
  answer begins where the prompt for it ends, and ends with the last sign that the template writes for it as the last
  turn, white space apart: of ChatML's "<|im_end|>\\n" the model says the token and has then stopped.

  Raises:
    JaxlmError: `check` finds a fault, or the template cannot be masked: what comes before an answer is not the prompt
      for it; the answer reads differently once others follow, is not in the text, or has no end.
  """
  _refuse(check(messages))
  text, marks = template.marked(messages, tools)
  answers = _answers(template, messages, tools, text, marks)
  return text, [span for _, said in answers for span in said]


def _answers(template: Template, messages: Sequence[Message], tools: Sequence[Any] | None, text: str,
             marks: list[Span]) -> list[tuple[int, list[Span]]]:
  """Of each answer in a text: where the prompt for it ends, and what the assistant says.

  What is found of an answer is the same in every text that begins as this one does up to its end, so that the prompt
  for a later answer is cut as the whole conversation is.
  """
  turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
  prompts = []
  for i in turns:
    try:
      prompts.append(template.marked(messages[:i], tools, add_generation_prompt=True))
    except JaxlmError as e:
      raise _unmaskable(i, _line(e)) from e
  counts = [len(earlier) for _, earlier in prompts] + [len(marks)]  # of marks up to each answer
  answers: list[tuple[int, list[Span]]] = []
  done = 0
  for i, (before, earlier), count, following in zip(turns, prompts, counts, counts[1:]):
    start = len(before)
    if start < done or not text.startswith(before):
      raise _unmaskable(i, 'what comes before it is not what the model is prompted with there')
    if marks[:count] != earlier or count and not done:
      raise _unmaskable(i, 'other text before it is marked than in the prompt for it, or than answers')
    if marks:
      said = marks[count:following]
      if not said or said[0][0] < start:
        raise _unmaskable(i, 'no mark begins in it, or one begins before the prompt for it ends')
      content = ''.join(text[a:b] for a, b in said)
    else:
      try:
        answer, content = _answer(template, messages[:i + 1], tools, before)
      except JaxlmError as e:
        raise _unmaskable(i, _line(e)) from e
      if not text.startswith(answer, start):
        raise _unmaskable(i, 'it reads differently once other turns follow')
      said = [(start, start + len(answer))]
    if (messages[i].get('content') or '').strip() not in content:
      raise _unmaskable(i, 'its content does not stand in the text as it is')
    answers.append((start, said))
    done = said[-1][1]
  return answers


def _unmaskable(i: int, why: str) -> JaxlmError:
  return JaxlmError(f'messages[{i}] (assistant): the chat template cannot be masked: {why}; mark in it what the '
                    'assistant says, {% generation %} … {% endgeneration %}, or take another template '
                    f'({", ".join(TEMPLATES)}).')


def _answer(template: Template, messages: Sequence[Message], tools: Sequence[Any] | None,
            before: str) -> tuple[str, str]:
  """What the template writes for the last message, and that without its end."""
  written = template.render(messages, tools).rstrip()
  probed = template.render([*messages[:-1], dict(role='assistant', content=PROBE)], tools)
  _, probe, end = probed.rpartition(PROBE)
  end = end.strip()
  if not probe or not end:
    raise JaxlmError('it writes no end behind an answer, so a model would not learn to stop.')
  if not written.startswith(before) or not written[len(before):].endswith(end):
    raise JaxlmError(f'the turn does not begin with the prompt for it and end with {end}.')
  answer = written[len(before):]
  return answer, answer.removesuffix(end)


# ---- token ids -----------------------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, template: Template,
           conversation: Mapping[str, Any]) -> tuple[list[int], list[float]]:
  """Ids of a conversation, and a weight for each: 1 on what the assistant says, 0 elsewhere.

  The text is tokenised piece by piece, cut where answers begin and end: a token across such a border would be one that
  the model never reads after the prompt, nor says. What a piece becomes depends on it and on what is before it alone,
  so the ids up to an answer are those of `prompt_ids`, whatever follows. Where no token of the whole text crosses a
  border, as is usual at special tokens and line breaks, the ids are those of the whole text.

  Special tokens are those that the template writes, none is added; their names in a message are text. Weights come
  from characters: pad may be eos.

  Raises:
    JaxlmError: as `spans`, or the conversation is none.
  """
  if not isinstance(conversation, Mapping):
    raise JaxlmError(f'Wanted a conversation {{"messages": […]}}, got {_short(conversation)}.')
  _refuse(check(conversation.get('messages')))
  names = _Names(tokenizer)
  messages, tools = names.broken(conversation['messages']), names.broken(conversation.get('tools'))
  text, marks = template.marked(messages, tools)
  answers = _answers(template, messages, tools, text, marks)
  spoken = [span for _, said in answers for span in said]
  ids, weights = [], []
  for start, end, piece in _pieces(tokenizer, text, answers, names):
    ids += piece
    weights += [float(any(a <= start and end <= b for a, b in spoken))] * len(piece)
  return ids, weights


def prompt_ids(tokenizer: Tokenizer, template: Template, messages: Sequence[Message],
               tools: Sequence[Any] | None = None) -> list[int]:
  """Ids to continue with the assistant's next answer: those that `encode` has before it.

  Earlier answers that cannot be masked, which `encode` refuses, are tokenised with the text around them.

  Raises:
    JaxlmError: the messages have a fault, or the template refuses them.
  """
  _refuse(list(_faults(messages)))
  names = _Names(tokenizer)
  messages, tools = names.broken(messages), names.broken(tools)
  text, marks = template.marked(messages, tools, add_generation_prompt=True)
  try:
    answers = _answers(template, messages, tools, text, marks)
  except JaxlmError:  # a template that drops earlier thinking, say: it can be answered, not learned from
    answers = []
  return [id for _, _, piece in _pieces(tokenizer, text, answers, names) for id in piece]


class _Names:
  """The names of a tokenizer's special tokens, which a message may hold as text."""

  def __init__(self, tokenizer: Tokenizer):
    added = tokenizer.backend.get_added_tokens_decoder().values()
    names = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
    self._whole = re.compile('|'.join(map(re.escape, names)) or '(?!)')
    self._broken = re.compile(f"({'|'.join(re.escape(self._break(name)) for name in names) or '(?!)'})")

  @staticmethod
  def _break(name: str) -> str:
    return name[0] + BREAK + name[1:]

  def broken(self, value: Any) -> Any:
    """Messages or tools in whose texts the names are broken, so that no template and no tokenizer knows them."""
    if isinstance(value, str):
      return self._whole.sub(lambda found: self._break(found[0]), value)
    if isinstance(value, Mapping):
      return {key: x if key == 'role' and x in ROLES else self.broken(x) for key, x in value.items()}
    return [self.broken(x) for x in value] if isinstance(value, (list, tuple)) else value

  def parts(self, text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text, and whether special tokens may be read in it; the others are names, whole again."""
    for i, part in enumerate(self._broken.split(text)):
      if part:
        yield (part.replace(BREAK, ''), False) if i % 2 else (part, True)


def _pieces(tokenizer: Tokenizer, text: str, answers: list[tuple[int, list[Span]]],
            names: _Names) -> Iterator[tuple[int, int, list[int]]]:
  """Each piece of a text between the borders of answers: from, up to, its ids."""
  borders = {0, len(text)}
  for prompt, said in answers:
    borders |= {prompt, *itertools.chain(*said)}
  before: str | None = ''
  for start, end in itertools.pairwise(sorted(borders)):
    ids = []
    for part, special in names.parts(text[start:end]):
      ids += _after(tokenizer, before, part, special)
      before = part if special else None  # with `special`, a name would be read as its token
    yield start, end, ids


def _after(tokenizer: Tokenizer, before: str | None, text: str, special: bool) -> list[int]:
  """Ids of a text behind another, of which no token takes a part.

  Some tokenizers begin every text with a space, so a continuation is read behind something and that taken away: behind
  what does come before (None: not known), if the border between them holds there.
  """
  if before == '':
    return tokenizer.encode(text, special)
  for context in ANCHORS if before is None else (before[-CONTEXT:], *ANCHORS):
    head, both = tokenizer.encode(context, special), tokenizer.encode(context + text, special)
    if both[:len(head)] == head:
      return both[len(head):]
  return tokenizer.encode(text, special)


# ---- well-known formats --------------------------------------------------------------------------------------------

_NO_TOOLS = r'''
{%- if tools or messages | selectattr('tool_calls', 'defined') | list or 'tool' in messages | map(attribute='role') %}
  {{- raise_exception('it has no place for tools; take chatml') }}
{%- endif %}
'''

# No role of its own for the system: its text stands in the first user turn.
_ALTERNATING = _NO_TOOLS + r'''
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for turn in turns %}
  {%- if turn.role != ('user', 'assistant')[loop.index0 % 2] %}
    {{- raise_exception('turns must be of user, assistant, user, assistant and so on') }}
  {%- endif %}
{%- endfor %}
'''

_CHATML = r'''
{%- if tools %}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
  {{- 'The tools, one a line:\n<tools>\n' + tools | map('tojson') | join('\n') + '\n</tools>\n' }}
  {{- 'A call is <tool_call>{"name": …, "arguments": {…}}</tool_call>.<|im_end|>\n' }}
{%- endif %}
{%- for turn in messages if not (tools and turn.role == 'system') %}
  {{- '<|im_start|>' + turn.role + '\n' + (turn.content or '') }}
  {%- for call in turn.tool_calls or [] %}
    {{- '\n' if turn.content or not loop.first }}
    {{- '<tool_call>\n' + (call.function or call) | tojson + '\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
'''

_LLAMA2 = _ALTERNATING + r'''
{%- for turn in turns %}
  {%- if turn.role == 'assistant' %}
    {{- ' ' + turn.content | trim + ' ' + eos_token }}
  {%- else %}
    {{- bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first else '') }}
    {{- turn.content | trim + ' [/INST]' }}
  {%- endif %}
{%- endfor %}
'''

_LLAMA3 = _NO_TOOLS + r'''
{{- bos_token }}
{%- for turn in messages %}
  {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}
'''

_MISTRAL = _ALTERNATING + r'''
{{- bos_token }}
{%- for turn in turns %}
  {%- if turn.role == 'assistant' %}
    {{- ' ' + turn.content | trim + eos_token }}
  {%- else %}
    {{- '[INST] ' + (system + '\n\n' if system and loop.first else '') + turn.content | trim + ' [/INST]' }}
  {%- endif %}
{%- endfor %}
'''

_GEMMA = _ALTERNATING + r'''
{{- bos_token }}
{%- for turn in turns %}
  {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else 'user') + '\n' }}
  {{- (system + '\n\n' if system and loop.first else '') + turn.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}
'''

TEMPLATES = {  # eos here is what ends an answer
    'chatml': Template(_CHATML, '', '<|im_end|>'),
    'gemma': Template(_GEMMA, '<bos>', '<end_of_turn>'),
    'llama2': Template(_LLAMA2, '<s>', '</s>'),
    'llama3': Template(_LLAMA3, '<|begin_of_text|>', '<|eot_id|>'),
    'mistral': Template(_MISTRAL, '<s>', '</s>'),
}
