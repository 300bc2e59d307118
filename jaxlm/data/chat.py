"""Conversations to token ids, and which of the tokens the assistant says."""
import itertools
import re
from typing import Any, Iterator, Mapping, Sequence

from jaxlm.data.templates import ROLES, TEMPLATES, Message, Span, Template, check, faults_of, line_of, refuse, short
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError

BREAK = '\ufdd2'  # within the name of a special token that a message holds

PROBE = 'AnswerOfJaxlm'  # an answer that only asks what a template writes behind one
CONTEXT = 64  # characters that tell how a continuation is read; the longest names of special tokens have about 30
ANCHORS = ('\n', 'a')  # texts to stand before one that is to be read as a continuation


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
  refuse(check(messages))
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
      raise _unmaskable(i, line_of(e)) from e
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
        raise _unmaskable(i, line_of(e)) from e
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
    raise JaxlmError(f'Wanted a conversation {{"messages": […]}}, got {short(conversation)}.')
  refuse(check(conversation.get('messages')))
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
  refuse(list(faults_of(messages)))
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
