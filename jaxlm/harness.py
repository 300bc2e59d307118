"""A loaded model under EleutherAI's lm-eval: any of its tasks, in process."""
import collections
import copy
import hashlib
import json
import logging
import os
from typing import Any, Iterator, Mapping, Sequence

import jax
from tqdm.auto import tqdm

from jaxlm import reading
from jaxlm.data import chat, templates
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM
from jaxlm.lookup import nearest

log = logging.getLogger(__name__)

# What a task may ask of generation beside do_sample, until and max_gen_toks.
SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'num_beams', 'length_penalty', 'seed')

Likelihood = tuple[float, bool]  # nats of a continuation, whether greedy decoding says it


class Harness:
  """What `lm_eval.api.model.TemplateLM` asks of a model; `harness_model` joins the two.

  Numbers are those of lm-eval's own `hf` model on the same weights: names of special tokens in text are these tokens,
  a text begins as its tokenizer lets it, contexts that are too long lose their beginnings. Where in `hf` other requests
  of a batch decide, here they do not: a text ends at its own stop, an encoder-decoder says max_gen_toks tokens at most.
  A continuation without a token of its own, at which `hf` fails, is scored with the token that reaches across.

  All processes of a run compute every request together, so to lm-eval they are one: rank 0 of 1.

  Attributes:
    lm: the model.
    batch_size: rows at once; it changes speed alone.
    max_length: tokens that are read at most, the continuation included.
    max_gen_toks: tokens that are said where a task does not say how many.
    backend: 'causal' or 'seq2seq', in lm-eval's words.
  """
  max_gen_toks = 256

  def __init__(self, lm: LM, batch_size: int, max_length: int | None, template: templates.Template | None,
               add_bos_token: bool | None):
    super().__init__()
    config, vocab = lm.model.config, lm.tokenizer.vocab
    self.lm, self.batch_size, self._template = lm, batch_size, template
    self.max_length = max_length or _window(lm)
    self.backend = 'seq2seq' if config.structure == 'encoder_decoder' else 'causal'
    self._prefix = vocab.eos if vocab.bos is None else vocab.bos
    self._start, self._end = lm.start, lm.end if self.backend == 'seq2seq' else []
    if add_bos_token is not None:
      self._start = (lm.start or [self.prefix_token_id]) if add_bos_token else []
    self._told: set[str] = set()

  @property
  def eot_token_id(self) -> int | None:
    return self.lm.tokenizer.vocab.eos

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text that nothing stands before."""
    if self._prefix is None:
      raise JaxlmError('A text without context is asked for, and this tokenizer has neither a bos nor an eos token to '
                       'begin it with; leave the task out, or name bos_token in its tokenizer_config.json.')
    return self._prefix

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    ids = self.lm.tokenizer.encode(string, special=True)
    add = ids[:1] != [self._prefix] if add_special_tokens is None else add_special_tokens
    return [*self._start, *ids, *self._end] if add else ids

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    before, after = super()._encode_pair(context, continuation)
    if after or self.backend == 'seq2seq':
      return before, after
    whole = self.tok_encode(context + continuation)  # one piece reaches across: it is scored whole
    start = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(whole))
    return whole[:start], whole[start:]

  # ---- likelihoods -------------------------------------------------------------------------------------------------

  def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                            **kwargs: Any) -> list[Likelihood]:
    pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
    found: list[Likelihood] = [(0.0, True)] * len(pairs)
    with self._bar('scoring', len(pairs), disable_tqdm) as bar:
      for rows in _chunks(range(len(pairs)), lambda row: sum(map(len, pairs[row])), self.batch_size):
        scores = self.lm.score(*zip(*(pairs[row] for row in rows)), self.batch_size)
        for row, (nats, _, is_greedy) in zip(rows, scores):
          found[row] = nats, is_greedy
          if requests[row][0] is not None:
            self.cache_hook.add_partial('loglikelihood', requests[row][0], found[row])
        bar.update(len(rows))
    return found

  def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
    """Both, and of the context the end that there is room for."""
    if len(continuation) > self.max_length:
      raise JaxlmError(f'A continuation has {len(continuation)} tokens, and max_length={self.max_length}; raise '
                       'max_length, or leave the task out.')
    room = self.max_length if self.backend == 'seq2seq' else self.max_length + 1 - len(continuation)
    return self._cut(context, room), continuation

  def _cut(self, context: list[int], room: int) -> list[int]:
    if len(context) > room:
      self._tell(f'Contexts are longer than max_length={self.max_length} leaves room for; their ends are read.')
    return context[-room:]

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """Nats of whole texts, in windows of max_length, each token predicted once.

    As with `hf`, a token that the tokenizer puts before a text is predicted, too; add_bos_token=False leaves it out.
    """
    from lm_eval import utils
    owners, windows = [], []
    for row, request in enumerate(requests):
      for window in utils.get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                    max_seq_len=self.max_length, context_len=1):
        owners.append(row)
        windows.append((None, *utils.make_disjoint_window(window)))
    totals = [0.0] * len(requests)
    for row, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
      totals[row] += nats
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  # ---- generation --------------------------------------------------------------------------------------------------

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    found, groups = [''] * len(requests), collections.defaultdict(list)
    for row, request in enumerate(requests):
      groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(row)
    with self._bar('generating', len(requests), disable_tqdm) as bar:
      for group in groups.values():
        wanted, stops, ends = self._manner(requests[group[0]].args[1])
        room = self.max_length - (len(self._end) if self.backend == 'seq2seq' else wanted['max_new_tokens'])
        if room < 1:
          raise JaxlmError(f"max_gen_toks={wanted['max_new_tokens']} leaves no room for a context in "
                           f"max_length={self.max_length}; set gen_kwargs={{'max_gen_toks': …}} lower.")
        contexts = {row: self._cut(self._context(requests[row].args[0]), room) for row in group}
        speaker = copy.copy(self.lm)
        speaker.eos = ends
        # A draw depends on the row's number in a call, so what is sampled is asked for in one.
        size = len(group) if wanted.get('temperature') else self.batch_size
        for rows in _chunks(group, lambda row: len(contexts[row]), size):
          said = speaker.generate([contexts[row] for row in rows], stop=stops, batch_size=self.batch_size, **wanted)
          for row, ids in zip(rows, said):
            found[row] = self._text(ids, ends, stops)
            self.cache_hook.add_partial('generate_until', requests[row].args, found[row])
          bar.update(len(rows))
    return found

  def _context(self, text: str) -> list[int]:
    """What is continued; an encoder-decoder puts the end there itself."""
    ids = self.tok_encode(text, add_special_tokens=True if self.backend == 'seq2seq' else None)
    return ids[:len(ids) - len(self._end)] or [self.prefix_token_id]

  def _manner(self, gen_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], tuple[int, ...]]:
    """(arguments of `LM.generate`, texts that end a text, ids that do) of what a task asks for."""
    from lm_eval.models import utils
    given = dict(utils.normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
    given.pop('do_sample', None)  # by now temperature says the same
    until = [text for text in given.pop('until') if text]
    wanted = {'max_new_tokens': given.pop('max_gen_toks')}
    for name, value in given.items():
      if name not in SAMPLING:
        raise JaxlmError(f'The task asks for generation with {name}={value!r}, which is not known here. Known: '
                         f'do_sample, until, max_gen_toks, {", ".join(SAMPLING)}; leave {name} out of its '
                         f'generation_kwargs.{nearest(name, SAMPLING)}')
      wanted |= {} if value is None else {name: value}
    tokenizer, eot = self.lm.tokenizer, self.eot_token_id
    ends = {*self.lm.eos, *(() if eot is None else (eot,))}
    for text in until:  # the name of a special token stands in no text, so that token ends it
      ids = tokenizer.encode(text, special=True)
      ends |= set(ids) if len(ids) == 1 and not tokenizer.decode(ids) else set()
    name = '' if eot is None else tokenizer.decode([eot], skip_special=False)
    return wanted, [*until, name] if name else until, tuple(sorted(ends))

  def _text(self, ids: list[int], ends: Sequence[int], stops: Sequence[str]) -> str:
    text = self.lm.tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids)
    for stop in stops:
      text = text.split(stop)[0]
    return text

  # ---- chat --------------------------------------------------------------------------------------------------------

  def apply_chat_template(self, chat_history: Sequence[chat.Message], add_generation_prompt: bool = True) -> str:
    """The text of a conversation up to the assistant's answer, or, without a prompt for it, up to what is said of it.

    Of a template that refuses a system's turn, the conversation without it.
    """
    if self._template is None:
      raise JaxlmError(f'{_TEMPLATE_WANTED}; none was given.')
    try:
      return self._rendered(chat_history, add_generation_prompt)
    except JaxlmError as e:
      rest = [message for message in chat_history if message['role'] != 'system']
      if len(rest) == len(chat_history):
        raise
      self._tell(f"{e} The system's turns are left out.")
      return self._rendered(rest, add_generation_prompt)

  def _rendered(self, messages: Sequence[chat.Message], prompted: bool) -> str:
    if prompted:
      return self._template.render(messages, add_generation_prompt=True)
    *before, last = messages
    # Behind the mark a space: a template that trims what is said takes it away, and so what was before the mark.
    marked = dict(last, content=f'{last["content"]}{chat.PROBE} ')
    text, mark, rest = self._template.render([*before, marked]).rpartition(chat.PROBE)
    if not mark:
      raise JaxlmError('The chat template does not write the beginning of an answer that the task gives; leave its '
                       'gen_prefix out.')
    return text if rest.startswith(' ') else text.rstrip()

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return self._template.source if chat_template and self._template else None

  @property
  def tokenizer_name(self) -> str:
    """Tells in the names of cached requests what made them: the tokenizer and the template, wherever they lie."""
    template = repr(self._template).encode()
    return f'{self.lm.tokenizer.digest[:16]}-{hashlib.sha256(template).hexdigest()[:16]}'

  # ---- to who waits ------------------------------------------------------------------------------------------------

  def _bar(self, what: str, total: int, off: bool) -> tqdm:
    return tqdm(desc=what, total=total, unit='request', disable=True if off or jax.process_index() else None)

  def _tell(self, text: str) -> None:
    """Warns, once in a model's life."""
    if text not in self._told:
      self._told.add(text)
      log.warning(text)


def _chunks(rows: Sequence[int], length: Any, size: int) -> Iterator[list[int]]:
  """The longest first, so that what does not fit into memory shows at once."""
  order = sorted(rows, key=lambda row: -length(row))
  return (order[start:start + size] for start in range(0, len(order), size))


def _window(lm: LM) -> int:
  """Tokens of text that the model was made for; virtual tokens before them take learned positions, too."""
  config = lm.model.config
  return config.max_length - (len(lm.front) if config.positions.kind == 'learned' else 0)


_TEMPLATE_WANTED = (f'chat_template must be one of {", ".join(templates.TEMPLATES)}, a folder that holds one, or a '
                    'jaxlm.data.templates.Template')


def _template(given: str | os.PathLike | templates.Template | None) -> templates.Template | None:
  """The template of a name, of a Hugging Face folder or of a run directory."""
  if given is None or isinstance(given, templates.Template) or given in templates.TEMPLATES:
    return templates.TEMPLATES.get(given, given)
  folders = (os.fspath(given), os.path.join(given, 'tokenizer'))
  found = next(filter(None, map(templates.of_folder, folders)), None)
  if found is None:
    raise JaxlmError(f'{_TEMPLATE_WANTED}; got {os.fspath(given)!r}.{nearest(os.fspath(given), templates.TEMPLATES)}')
  return found


def _lm_eval() -> Any:
  try:
    import lm_eval
    import lm_eval.api.model
    import lm_eval.models.utils
    import lm_eval.tasks
  except ImportError as e:
    raise JaxlmError(f'Tasks of lm-eval need the package lm-eval: pip install "jaxlm[harness]" ({e}).') from e
  return lm_eval


def harness_model(lm: LM, batch_size: int = 32, max_length: int | None = None,
                  chat_template: str | os.PathLike | templates.Template | None = None,
                  add_bos_token: bool | None = None) -> Any:
  """A model as lm-eval wants one, for `lm_eval.simple_evaluate(model=…)`.

  Args:
    lm: decoder-only or encoder-decoder, with a tokenizer.
    batch_size: rows at once.
    max_length: tokens that are read at most; None: as many as the model was made for.
    chat_template: a name of `templates.TEMPLATES`, a folder that holds one, or the template; None: no task asks for it.
    add_bos_token: whether a text begins with the prefix token; None: as its tokenizer says, or as in training.
  Raises:
    JaxlmError: lm-eval is not installed, the model cannot continue text, or an argument is none.
  """
  config = lm.model.config
  if lm.tokenizer is None:
    raise JaxlmError("Tasks are text, and this model came without a tokenizer; put its tokenizer.json into the folder.")
  if not reading.continues(config):
    raise JaxlmError('Tasks of lm-eval ask how likely a continuation is, which this model cannot say: it sees both '
                     "sides of a token, or has no output layer; use one trained with objective.name='causal'.")
  if batch_size < 1:
    raise JaxlmError(f'batch_size must be at least 1; got {batch_size!r}.')
  if max_length is not None and max_length < 1:
    raise JaxlmError(f'max_length must be at least 1; got {max_length!r}.')
  if max_length and config.positions.kind == 'learned' and max_length > _window(lm):
    raise JaxlmError(f'max_length={max_length} is more than the {_window(lm)} positions that the model learned; set at '
                     'most that.')
  base = _lm_eval().api.model.TemplateLM
  return type('JaxlmModel', (Harness, base), {})(lm, batch_size, max_length, _template(chat_template), add_bos_token)


def run(lm: LM, tasks: str | Sequence[str] | None = None, include_path: str | os.PathLike | None = None,
        num_fewshot: int | None = None, limit: int | float | None = None, batch_size: int = 32,
        max_length: int | None = None, chat_template: str | os.PathLike | templates.Template | None = None,
        add_bos_token: bool | None = None, **options: Any) -> dict[str, Any]:
  """Measures a model on tasks of lm-eval; returns what `lm_eval.simple_evaluate` does: 'results', 'samples', ….

  Args:
    tasks: names of tasks, groups or tags, with * if several are meant, or YAML files; None: all of include_path.
    include_path: a folder of YAML tasks, which go before lm-eval's own.
    num_fewshot: examples before each question; None: as the task says.
    limit: the first so many documents of each task, or below 1 this share; None: all.
    batch_size, max_length, add_bos_token: as of `harness_model`.
    chat_template: the same; where it is given, questions are asked as conversations.
    options: more for `simple_evaluate`: system_instruction, gen_kwargs, use_cache, log_samples, bootstrap_iters, ….
  Raises:
    JaxlmError: as `harness_model`; an unknown task; data of one that is not there.
  """
  model = harness_model(lm, batch_size, max_length, chat_template, add_bos_token)
  manager, names = _tasks([tasks] if isinstance(tasks, str) else tasks, include_path)
  # lm-eval would import torch for its seed alone.
  options = {'apply_chat_template': model.chat_template(True) is not None, 'torch_random_seed': None} | options
  try:
    return _lm_eval().simple_evaluate(model=model, tasks=names, task_manager=manager, num_fewshot=num_fewshot,
                                      limit=limit, batch_size=batch_size, **options)
  except OSError as e:  # of datasets: no such data set, no such file, no network
    told = next(iter(str(e).splitlines()), '') or type(e).__name__
    raise JaxlmError(f'Data of {", ".join(names)} cannot be read: {told.rstrip(".")}. Download it first, or give '
                     'tasks on files of your own.') from e


def _tasks(tasks: Sequence[str] | None, include_path: str | os.PathLike | None) -> tuple[Any, list[str]]:
  """(a task manager, what it shall load)."""
  TaskManager = _lm_eval().tasks.TaskManager
  if include_path is not None and not os.path.isdir(include_path):
    raise JaxlmError(f'include_path must be a folder of YAML tasks; got {os.fspath(include_path)!r}, which is none.')
  manager = TaskManager(include_path=include_path, include_defaults=False)
  tasks = manager.all_subtasks if tasks is None else tasks
  if not set(tasks) <= set(manager.all_subtasks):  # lm-eval's own take seconds to list
    manager = TaskManager(include_path=include_path)
  names = []
  for task in tasks:
    found = [task] if os.path.isfile(task) else manager.match_tasks([task])
    if not found:
      raise JaxlmError(f'Unknown task {task!r} among {len(manager.all_tasks)} of lm-eval and include_path='
                       f'{include_path and os.fspath(include_path)!r}.{nearest(task, manager.all_tasks)}')
    names += [name for name in found if name not in names]
  if not names:
    raise JaxlmError('No task to measure; give tasks, or an include_path with YAML tasks.')
  return manager, names
