"""What a model is worth at a task: prompts as they are given, its answers, the measure, how sure that is.

Answers do not depend on the batch they were computed in, nor on the order of examples; a measurement that was stopped
goes on where it was.
"""
import collections
import dataclasses
import hashlib
import itertools
import json
import os
from typing import Any, Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

from jaxlm import heads, nearness, trees
from jaxlm.data import chat, encoders, tasks, templates
from jaxlm.data.tasks import Example, Task
from jaxlm.errors import JaxlmError
from jaxlm.lm import LM
from jaxlm.measure import baselines, intervals, sandbox, verdicts

CHUNK = 64  # examples between two savings of what has been said
NORMS = ('sum', 'token', 'byte', 'unconditional')  # of the scores of choices
HEADS = {'classify': 'sequence', 'multi_label': 'sequence', 'regress': 'sequence', 'tag': 'token', 'span': 'span'}


@dataclasses.dataclass(frozen=True)
class Terms:
  """How an exam is held; part of its record.

  Attributes:
    split: whose examples are asked.
    shots: examples with their answers before each question, drawn from the training split.
    seed: of that draw, and of intervals.
    limit: examples, drawn from the split; 0: all.
    norm: of ranked choices: one of NORMS, the answer's log-probability as it is, by token, by byte, or less its
      log-probability without the question.
    batch_size: rows computed at once; changes no answer.
    samples: programs that are drawn for a question, for pass@k; an answer is the list of them where there are several.
    temperature: of what is generated; 0: the likeliest token.
  """
  split: str = 'test'
  shots: int = 0
  seed: int = 0
  limit: int = 0
  norm: str = 'token'
  batch_size: int = 32
  samples: int = 1
  temperature: float = 0.0


# ---- prompts -----------------------------------------------------------------------------------------------------


def answer_text(task: Task, example: Example) -> str:
  """The right answer as text, as it stands behind its question in a prompt."""
  if task.kind == 'classify':
    return f' {task.labels[example.target]}'
  if task.kind == 'choice':
    return example.choices[example.target]
  if task.kind == 'span':
    return f' {example.answers[0] if example.answers else ""}'
  if task.kind == 'regress':
    return f' {example.target:g}'
  return example.second if task.kind == 'prefer' else example.target


def question_text(task: Task, example: Example) -> str:
  """What is asked: both texts where there are two."""
  if task.kind == 'span':
    return f'{example.second}\n\n{example.input}'
  return f'{example.input}\n{example.second}' if example.second and task.kind != 'prefer' else example.input


def prompt_of(task: Task, example: Example, shots: Sequence[Example]) -> str:
  """The prompt: the instruction, examples with their answers, the question."""
  parts = [task.instruction] if task.instruction else []
  parts += [question_text(task, shot) + answer_text(task, shot) for shot in shots]
  return task.between.join([*parts, question_text(task, example)])


def _rng(example: Example, seed: int) -> np.random.Generator:
  """Of a question's own draws: by its id, wherever its file lies, and the seed alone."""
  key = int.from_bytes(hashlib.sha256(os.path.basename(example.id).encode()).digest()[:8], 'little')
  return np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))


def choose_shots(pool: Sequence[Example], number: int, example: Example, seed: int) -> list[Example]:
  """Examples for a prompt, another draw for each question, by its id and the seed alone; never the question itself."""
  if number >= len(pool):
    raise JaxlmError(f'shots={number}: the training split has {len(pool)} examples, of which the question may be one; '
                     'ask for fewer.')
  drawn = (pool[i] for i in _rng(example, seed).choice(len(pool), number + 1, replace=False))
  return [shot for shot in drawn if shot.id != example.id][:number]


# ---- asking ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Said:
  """What a model said to one example, as JSON holds it.

  Attributes:
    id: of the example.
    prompt: what it was given, exactly.
    answer: what it said, or chose, or the numbers it gave.
    right: what is right, in the same form, where the task says it.
    row: the example's contribution to the measure, or None where only all together have one.
  """
  id: str
  prompt: Any
  answer: Any
  right: Any = None
  row: list[float] | None = None


Asker = Callable[[LM, Task, Sequence[Example], Sequence[str], Terms], list[Any]]


def _generated(lm: LM, task: Task, examples: Sequence[Example], prompts: Sequence[Any], terms: Terms) -> list[Any]:
  """Continuations, up to a stop, or as far as learned positions go after that very prompt."""
  found: list[Any] = [None] * len(prompts)
  rooms = [min(task.max_new_tokens, lm.room([prompt])) for prompt in prompts]
  if terms.temperature:
    # A question a call: draws depend on the number of a row, which is of the question here, not of what is asked with
    # it.
    for row, (example, prompt, room) in enumerate(zip(examples, prompts, rooms)):
      drawn = lm.generate([prompt] * terms.samples, max_new_tokens=room, temperature=terms.temperature, stop=task.stop,
                          seed=int(_rng(example, terms.seed).integers(2**32)), batch_size=terms.batch_size)
      found[row] = drawn if terms.samples > 1 else drawn[0]
    return found
  for room in set(rooms):
    rows = [row for row, other in enumerate(rooms) if other == room]
    said = lm.generate([prompts[row] for row in rows], max_new_tokens=room, stop=task.stop, batch_size=terms.batch_size)
    for row, answer in zip(rows, said):
      found[row] = answer
  return found


def _ranked(lm: LM, task: Task, examples: Sequence[Example], prompts: Sequence[str], terms: Terms) -> list[int]:
  """The number of the likeliest answer."""
  answers = [[f' {label}' for label in task.labels] if task.kind == 'classify' else list(example.choices)
             for example in examples]
  flat = [(prompt, answer) for prompt, own in zip(prompts, answers) for answer in own]
  scores = lm.score(*map(list, zip(*flat)), batch_size=terms.batch_size)
  values = [_normed(terms.norm, answer, nats, tokens) for (_, answer), (nats, tokens, _) in zip(flat, scores)]
  if terms.norm == 'unconditional':
    without = lm.score([''] * len(flat), [answer for _, answer in flat], batch_size=terms.batch_size)
    values = [value - nats for value, (nats, _, _) in zip(values, without)]
  ends = np.cumsum([len(own) for own in answers])
  return [int(np.argmax(part)) for part in np.split(np.array(values), ends[:-1])]


def _normed(norm: str, answer: str, nats: float, tokens: int) -> float:
  if norm not in NORMS:
    raise JaxlmError(f'norm must be one of {", ".join(NORMS)}; got {norm!r}.')
  return nats / {'token': max(tokens, 1), 'byte': max(len(answer.encode()), 1)}.get(norm, 1)


def _preferred(lm: LM, task: Task, examples: Sequence[Example], prompts: Sequence[str], terms: Terms) -> list[int]:
  """1 where the better answer is likelier, as `norm` compares them; of a reward model, has the higher score."""
  if lm.model.config.head.labels == 'sequence':
    better, worse = (heads.rewards(lm, examples, texts, terms.batch_size) for texts in (
        [e.second for e in examples], [e.choices[0] for e in examples]))
    return [int(a > b) for a, b in zip(better, worse)]
  pairs = [(prompt, answer) for prompt, example in zip(prompts, examples)
           for answer in (example.second, example.choices[0])]
  found = lm.score(*map(list, zip(*pairs)), batch_size=terms.batch_size)
  scores = [_normed(terms.norm, answer, nats, tokens) for (_, answer), (nats, tokens, _) in zip(pairs, found)]
  if terms.norm == 'unconditional':
    without = lm.score([''] * len(pairs), [answer for _, answer in pairs], batch_size=terms.batch_size)
    scores = [score - nats for score, (nats, _, _) in zip(scores, without)]
  return [int(a > b) for a, b in zip(scores[::2], scores[1::2])]


def _documents(lm: LM, task: Task, examples: Sequence[Example], prompts: Sequence[str],
               terms: Terms) -> list[list[float]]:
  """(nats, tokens, bytes) of each text, every token predicted once, from at least half a window before it."""
  window = lm.model.config.max_length if lm.model.config.positions.kind == 'learned' else lm.config.seq_len
  contexts, continuations, owner = [], [], []
  for number, example in enumerate(examples):
    ids = [*lm.start, *lm.tokenizer.encode(example.input)]
    begin = len(lm.start)
    while begin < len(ids):
      end = min(len(ids), begin + (window - len(lm.front) if begin <= len(lm.start) else window // 2))
      contexts.append(ids[max(0, end - window + len(lm.front)):begin])
      continuations.append(ids[begin:end])
      owner.append(number)
      begin = end
  totals = np.zeros((len(examples), 3))
  for number, (nats, tokens, _) in zip(owner, lm.score(contexts, continuations, batch_size=terms.batch_size)):
    totals[number, :2] += -nats, tokens
  totals[:, 2] = [len(example.input.encode()) for example in examples]
  return totals.tolist()


def _answered_chats(lm: LM, task: Task, examples: Sequence[Example], prompts: Sequence[Any], terms: Terms) -> list[str]:
  """The assistant's last turn, said again, up to what ends a turn in the template."""
  ends = [*task.stop, *filter(None, [encoders.template_of(lm.config.data.template).eos])]
  said = _generated(lm, dataclasses.replace(task, stop=tuple(ends)), examples, prompts, terms)
  found = []
  for ids in said:
    text = lm.tokenizer.decode(ids, skip_special=False)
    text = text[:min((at for at in map(text.find, ends) if at >= 0), default=len(text))]
    found.append(lm.tokenizer.decode(ids) if text == lm.tokenizer.decode(ids, skip_special=False) else text)
  return found


ASKERS: dict[str, Asker] = {'text': _generated, 'span': _generated, 'classify': _ranked, 'choice': _ranked,
                            'prefer': _preferred, 'document': _documents, 'chat': _answered_chats}


def _by_head(lm: LM, task: Task, examples: Sequence[Example], terms: Terms) -> list[Any]:
  """What the label head says.

  Raises:
    JaxlmError: the head has not as many labels as the task.
  """
  outputs = {'regress': 1, 'span': 2}.get(task.kind, len(task.labels))
  if lm.model.config.num_labels != outputs:
    raise JaxlmError(f'The label head of this model has {lm.model.config.num_labels} outputs, the task {outputs}; take '
                     'the model that was fine-tuned for it.')
  if lm.labels and task.labels and lm.labels != task.labels:
    raise JaxlmError(f'The label head of this model tells apart {", ".join(lm.labels)}, the task '
                     f'{", ".join(task.labels)}; give the task these labels, in that order.')
  encoded, form, found = heads.asked(lm, task, terms.split, examples, terms.batch_size)
  widest = max(x.shape[0] for x in found)
  pad = lambda x: np.pad(x, ((0, widest - len(x)), (0, 0)), constant_values=-1e9) if x.ndim == 2 else x
  return verdicts.predicted(task, examples, encoded, form, np.stack([pad(x) for x in found]))


# ---- the exam ----------------------------------------------------------------------------------------------------


def judged(task: Task, examples: Sequence[Example], answers: Sequence[Any]) -> tuple[Any, np.ndarray]:
  """(the measure, each example's row of it) of what a model said."""
  metric, references = verdicts.metric_of(task), right(task, examples)
  if task.program:
    said = [[answer] if isinstance(answer, str) else answer for answer in answers]
    results = sandbox.run_all(tasks.program_of(task, example, one)
                              for example, own in zip(examples, said) for one in own)
    return metric, metric.rows([[next(results).passed for _ in own] for own in said])
  if task.kind == 'document':
    return metric, metric.rows([tuple(answer) for answer in answers])
  if task.kind == 'retrieve':  # a document that another query has, too, is right for both
    own = [number for number, in references]
    answers = [list(dict.fromkeys(own[i] for i in order)) for order in answers]
  if task.kind in ('text', 'chat', 'span'):
    answers = [answer.strip() if isinstance(answer, str) else answer for answer in answers]
    references = [x.strip() if isinstance(x, str) else x for x in references]
  return metric, metric.rows(answers, references)


def right(task: Task, examples: Sequence[Example]) -> list[Any]:
  """What is right, as the measure takes it; a document to be found has the number of the first with its text."""
  if task.kind == 'retrieve':
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(example.second, len(numbers))] for example in examples]
  if task.kind == 'prefer':
    return [1] * len(examples)
  if task.kind == 'chat':
    return [tasks.last_said(example, 'assistant') for example in examples]
  return verdicts.references(task, examples)


def hold(lm: LM, task: Task, terms: Terms = Terms(), kept: str = '') -> dict[str, Any]:
  """Measures a model at a task.

  Args:
    kept: a file to which what was said is appended, and from which it is taken where it is there; '': none.
  Returns:
    {'metrics': {name: number}, 'intervals': {name: (low, high)}, 'examples': number, 'terms', 'said': [Said as dicts]};
    with task.group 'groups': {group: {'metrics', 'examples'}}.
  Raises:
    JaxlmError: a task that this model cannot be asked, or a record that does not fit.
  """
  _check_draws(task, terms)
  asked = _drawn(task, terms)
  if not reads_shots(lm, task):
    terms = dataclasses.replace(terms, shots=0)  # and so it is told
  if _has_head(lm, task):
    said = [Said(e.id, question_text(task, e) if task.kind != 'tag' else list(e.words), answer)
            for e, answer in zip(asked, _by_head(lm, task, asked, terms))]
  elif (by_embeddings := nearness.asker(task)) is not None:
    answers = by_embeddings(lm, task, asked, terms.batch_size, terms.seed)
    said = [Said(e.id, e.input, answer[:10] if task.kind == 'retrieve' else answer) for e, answer in zip(asked, answers)]
    return _report(task, asked, answers, said, terms)
  else:
    said = _asked(lm, task, asked, terms, kept)
  return _report(task, asked, [one.answer for one in said], said, terms)


def _has_head(lm: LM, task: Task) -> bool:
  """Whether a label head of the model answers."""
  head = HEADS.get(task.kind)
  return head is not None and lm.model.config.head.labels == head


def reads_shots(lm: LM, task: Task) -> bool:
  """Whether examples stand before a question: not in conversations and documents, nor where a label head or embeddings
  answer."""
  rewards = task.kind == 'prefer' and lm.model.config.head.labels == 'sequence'
  return not (rewards or _has_head(lm, task) or nearness.asker(task) or task.kind in ('chat', 'document'))


def _check_draws(task: Task, terms: Terms) -> None:
  """Raises JaxlmError where answers would be drawn that nobody writes or counts."""
  if terms.samples > 1 and not (task.program and terms.temperature):
    raise JaxlmError(f'samples={terms.samples} are drawn for a task that has a `program`, at a temperature above 0; '
                     'give both, or 1 sample.')
  if terms.temperature and ASKERS.get(task.kind) not in (_generated, _answered_chats):
    raise JaxlmError(f'temperature={terms.temperature}: to a task of kind {task.kind!r} no answer is written that could be '
                     'drawn; leave it 0.')


def _drawn(task: Task, terms: Terms) -> list[Example]:
  """The examples that are asked, in their order."""
  return tasks.drawn(list(tasks.examples(task, terms.split)), terms.limit,
                     np.random.Generator(np.random.Philox(terms.seed)))


def _report(task: Task, asked: Sequence[Example], answers: Sequence[Any], said: Sequence[Said],
            terms: Terms) -> dict[str, Any]:
  metric, rows = judged(task, asked, answers)
  found = dict(metrics=metric.total(rows), intervals=intervals.bootstrap(metric, rows, terms.seed), examples=len(asked),
               terms=dataclasses.asdict(terms))
  if task.group:
    groups = np.array([example.group for example in asked])
    found['groups'] = {name: dict(metrics=metric.total(rows[groups == name]), examples=int((groups == name).sum()))
                       for name in sorted(set(groups))}
  return found | dict(said=[dataclasses.asdict(dataclasses.replace(one, right=gold, row=row))
                            for one, gold, row in zip(said, right(task, asked), rows.tolist())])


def _asked(lm: LM, task: Task, asked: Sequence[Example], terms: Terms, kept: str) -> list[Said]:
  """Answers to prompts, in chunks; what an earlier exam of the same terms has kept is not asked again."""
  ask = ASKERS.get(task.kind)
  if ask is None:
    raise JaxlmError(f'A task of kind {task.kind!r} needs a model with a label head of kind {HEADS[task.kind]!r} '
                     f'(config.model.head.labels), fine-tuned for it; this one has {lm.model.config.head.labels!r}.')
  if task.program:
    verdicts.metric_of(task).rows([[True] * terms.samples])  # too few are told of before any is drawn
  elif task.kind in ('text', 'chat'):
    verdicts.metric_of(task).rows([''], right(task, asked)[:1])  # and a package that is missing before any is asked
  prompts = _prompts(lm, task, asked, terms)
  key = json.dumps([dataclasses.asdict(dataclasses.replace(terms, batch_size=0, limit=0)), dataclasses.asdict(task),
                    _fingerprint(lm) if kept else ''], sort_keys=True, default=str)
  known = _read_kept(kept, key)
  # Long ones first: a chunk pads to its longest, and what does not fit into memory shows at once.
  # By what is asked, too: a record may have changed since.
  names = [hashlib.sha256(repr((e.id, prompt, e.second, e.choices, task.labels)).encode()).hexdigest()
           for e, prompt in zip(asked, prompts)]
  order = sorted((i for i, name in enumerate(names) if name not in known), key=lambda i: (-len(prompts[i]), i))
  for start in tqdm(range(0, len(order), CHUNK), unit='chunk', disable=None):
    chosen = order[start:start + CHUNK]
    answers = ask(lm, task, [asked[i] for i in chosen], [prompts[i] for i in chosen], terms)
    for i, answer in zip(chosen, answers):
      known[names[i]] = answer
    _keep(kept, key, {names[i]: known[names[i]] for i in chosen})
  return [Said(e.id, prompt, known[name]) for e, prompt, name in zip(asked, prompts, names)]


def _prompts(lm: LM, task: Task, asked: Sequence[Example], terms: Terms) -> list[Any]:
  """What each example gives a model: a document itself, ids of a conversation before its last answer, else a text."""
  if task.kind == 'document':
    return [example.input for example in asked]
  if task.kind == 'chat':
    template = encoders.template_of(lm.config.data.template)
    return [_chat_prompt(lm, template, example) for example in asked]
  pool = list(tasks.examples(task, 'train')) if terms.shots else []
  shots = lambda example: choose_shots(pool, terms.shots, example, terms.seed) if terms.shots else ()
  return [prompt_of(task, example, shots(example)) for example in asked]


def _fingerprint(lm: LM) -> str:
  """Tells models apart, by what they are and some rows of each array; a step of training changes it."""
  digest = hashlib.sha256(repr((lm.model.config, lm.eos, lm.start, lm.tokenizer and lm.tokenizer.digest)).encode())
  for path, x in trees.flatten(lm.params).items():
    digest.update(path.encode() + np.asarray(x[::max(1, len(x) // 8)] if x.ndim else x).tobytes())
  return digest.hexdigest()


def _chat_prompt(lm: LM, template: templates.Template, example: Example) -> list[int]:
  last = max(i for i, message in enumerate(example.messages) if message['role'] == 'assistant')
  return chat.prompt_ids(lm.tokenizer, template, list(example.messages[:last]), example.tools)


def _read_kept(kept: str, key: str) -> dict[str, Any]:
  """What was said before on the same terms; a torn last line counts nothing."""
  known: dict[str, Any] = {}
  if kept and os.path.exists(kept):
    with open(kept, encoding='utf-8') as file:
      for line in file:
        try:
          record = json.loads(line)
        except ValueError:  # torn, or empty
          continue
        if record['key'] == key:
          known |= record['said']
  return known


def _keep(kept: str, key: str, said: dict[str, Any]) -> None:
  if kept:
    with open(kept, 'a', encoding='utf-8') as file:
      file.write('\n' + json.dumps(dict(key=key, said=said)) + '\n')  # what stands before may be torn


def _names(ids: Sequence[str]) -> list[str]:
  """Ids without the folders of their files, where those are not needed to tell them apart."""
  short = [os.path.basename(id) for id in ids]
  return short if len(set(short)) == len(ids) else list(ids)


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
  """Names, each with how many like it stand before."""
  seen: collections.defaultdict[str, itertools.count] = collections.defaultdict(itertools.count)
  return [(name, next(seen[name])) for name in names]


def compared(task: Task, found: dict[str, Any], other: dict[str, Any], seed: int = 0) -> dict[str, dict[str, float]]:
  """{measure: difference to another model's results, its interval and p}, by the same examples.

  Raises:
    JaxlmError: the other was asked other examples.
  """
  rows = {name: dict(zip(_numbered(_names([said['id'] for said in results['said']])),
                         [said['row'] for said in results['said']])) for name, results in (('here', found), ('there', other))}
  if rows['here'].keys() != rows['there'].keys():
    raise JaxlmError('The two results are of other examples; measure both with the same split and limit.')
  paired = intervals.paired(verdicts.metric_of(task), np.array(list(rows['here'].values())),
                            np.array([rows['there'][id] for id in rows['here']]), seed)
  return {name: pair._asdict() for name, pair in paired.items()}


def hold_baseline(name: str, task: Task, terms: Terms = Terms()) -> dict[str, Any]:
  """As `hold`, of a baseline (`measure.baselines`) in a model's place, on the very same examples."""
  asked, train = _drawn(task, terms), list(tasks.examples(task, 'train'))
  answers, terms = baselines.answers(name, task, train, asked), dataclasses.replace(terms, shots=0)
  said = [Said(e.id, e.input, answer[:10] if task.kind == 'retrieve' else answer) for e, answer in zip(asked, answers)]
  return _report(task, asked, answers, said, terms)
