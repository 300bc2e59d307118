"""Texts that a model is given and says: what stands for several, what a prompt is, where a continuation ends."""
import dataclasses
from typing import Any, Callable, Sequence

import numpy as np

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError
from jaxlm.types import Prompt

Text = str | Sequence[int]  # text, or its ids


def listed(given: Any) -> tuple[bool, list[Text]]:
  """(whether one text or one list of ids was given, a list of them)."""
  if isinstance(given, str):
    return True, [given]
  given = list(given)
  if given and all(isinstance(item, (int, np.integer)) for item in given):
    return True, [given]
  if not all(isinstance(item, str) for item in given) and any(isinstance(item, str) or np.ndim(item) != 1
                                                              for item in given):
    raise JaxlmError(f'Wanted a text, texts, ids or lists of ids; got {described(given)}.')
  return False, given


def stops_of(stop: str | Sequence[str]) -> tuple[str, ...]:
  """Texts that end a continuation, checked; one alone need not be in a list."""
  stops = (stop,) if isinstance(stop, str) else tuple(stop)
  if not all(isinstance(text, str) and text for text in stops):
    raise JaxlmError(f'stop must be texts, none of them empty; got {stop!r}.')
  return stops


def described(value: Any) -> str:
  """What an error says of a value that may be large."""
  if isinstance(value, (str, bytes)) or not hasattr(value, '__len__'):
    return repr(value)[:60]
  shape = getattr(value, 'shape', None)
  return f'an array of shape {tuple(shape)}' if shape is not None else f'{type(value).__name__} of {len(value)}'


def fronted(front: list[int], encodes: bool, prompting: Callable[[list[int]], Prompt], ids: list[int]) -> Prompt:
  """What is continued where a text is given, behind the virtual tokens."""
  prompt = prompting(ids)
  if not front:
    return prompt
  if encodes:
    return dataclasses.replace(prompt, source=[*front, *prompt.source])
  return dataclasses.replace(prompt, ids=[*front, *prompt.ids], context=prompt.context and prompt.context + len(front))


def said(tokenizer: Tokenizer, eos: Sequence[int], prompt: list[int], new: list[int], stops: Sequence[str]) -> str:
  """The text that ids add to a prompt, cut before the first stop."""
  new = new[:-1] if new and new[-1] in eos else new
  # With some of the prompt before it: pieces may lose a leading space, or begin in the middle of a character.
  near = prompt[-8:]
  before, both = tokenizer.decode(near), tokenizer.decode(near + new)
  text = both[len(before):] if both.startswith(before) else tokenizer.decode(new)
  return text[:min((at for at in (text.find(s) for s in stops) if at >= 0), default=len(text))]


def cut(new: list[int], told: Callable[[list[int]], bool]) -> list[int]:
  """Ids up to the one that completes a stop."""
  return next((new[:n] for n in range(1, len(new) + 1) if told(new[:n])), new)
