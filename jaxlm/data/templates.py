"""Conversations as text: what is wrong with one, chat templates, the well-known ones and those of folders."""
import dataclasses
import datetime
import functools
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

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


# ---- conversations -------------------------------------------------------------------------------------------------


def check(messages: Sequence[Message]) -> list[str]:
  """What is wrong with the messages of a conversation, one line each; nothing where all is well.

  Whether roles must alternate is the template's to say: it refuses when it renders.
  """
  faults = list(faults_of(messages))
  if not faults and all(message['role'] != 'assistant' for message in messages):
    faults.append('Wanted a turn of the assistant, got none among '
                  f'{len(messages)} messages; leave this conversation out, there is nothing to learn from.')
  return faults


def faults_of(messages: Sequence[Message]) -> Iterator[str]:
  """What is wrong with messages, an answer to which may still be wanted."""
  if not isinstance(messages, (list, tuple)) or not messages:
    yield f'Wanted messages as a list of {{"role": …, "content": …}}, got {short(messages)}.'
    return
  spoken = None  # whose turn the last was, the system's apart
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      yield f'messages[{i}]: wanted {{"role": …, "content": …}}, got {short(message)}.'
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
      yield f'{where}: wanted tool_calls as a list and in an assistant turn, got {short(calls)}.'
    yield from (f'{where}: {fault}' for fault in _content(message.get('content'), bool(calls)))
    spoken = spoken if role == 'system' else role


def _content(content: Any, calls: bool) -> Iterator[str]:
  if content is None and calls:
    return
  if not isinstance(content, str):
    yield f'wanted content as text, got {short(content)}.'
  elif not content.strip() and not calls:
    yield 'empty content; leave the turn out.'
  elif re.search('[\ud800-\udfff]', content):
    yield 'content holds half of a surrogate pair, which is no text; mend it or leave the conversation out.'


def short(value: Any) -> str:
  text = f'{type(value).__name__} {value!r}'
  return text if len(text) <= 60 else text[:59] + '…'


def refuse(faults: Sequence[str]) -> None:
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
      raise JaxlmError(f'The chat template refuses these messages: {line_of(e)}.') from e
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
    raise JaxlmError(f'Wanted messages and tools that JSON can hold, got others: {line_of(e)}.') from e
  if OPEN in text or CLOSE in text:
    raise JaxlmError('The conversation holds U+FDD0 or U+FDD1, which no text has; leave them out.')
  messages, tools = json.loads(text)
  return [{key: value for key, value in message.items() if value is not None} for message in messages], tools


def line_of(e: Exception) -> str:
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
    raise JaxlmError(f'The chat template is not valid jinja2: line {e.lineno}: {line_of(e)}.') from e


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
