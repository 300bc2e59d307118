"""Rollouts: answers that the policy writes to a task's questions, and what a verifier gives for them, as batches."""
import bisect
import dataclasses
import functools
import math
import os
from typing import Any, Callable, Sequence

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from jaxlm import decode, heads, loading, losses, task_losses, trees
from jaxlm.data import examples as examples_module
from jaxlm.data import tasks
from jaxlm.data.examples import Encoded, TaskData, TaskStream
from jaxlm.data.pipeline import Batches, Skips
from jaxlm.data.tasks import Example, Task
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import JaxlmError
from jaxlm.evaluators import Evaluators
from jaxlm.lm import LM
from jaxlm.lookup import lookup
from jaxlm.measure import sandbox
from jaxlm.measure.scores import METRICS
from jaxlm.models.transformer import Transformer
from jaxlm.policies import group_advantages, whitened
from jaxlm.sampling import Sampling
from jaxlm.types import Array, Ids, Tree, TrainState

# ---- verifiers ---------------------------------------------------------------------------------------------------

Verifier = Callable[[Example, str], float]
Grader = Callable[[Task, Sequence[Example], Sequence[str]], list[float]]


def exact(example: Example, text: str) -> float:
  """1 where the answer is the target, but for space around it."""
  return float(text.strip() == example.target.strip())


def contains(example: Example, text: str) -> float:
  """1 where the target stands in the answer."""
  return float(example.target.strip() in text)


def f1(example: Example, text: str) -> float:
  """How many words answer and target share, as SQuAD's F1 counts them: a reward for answers that are nearly right."""
  return METRICS['squad'].of_example(text, example.target)[1]


def each(verifier: Verifier) -> Grader:
  """Answers by themselves, one after the other."""
  return lambda task, examples, texts: [verifier(*pair) for pair in zip(examples, texts)]


def passes(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
  """1 where the task's program with the answer in it comes to its end; each in a sandbox, several at a time."""
  if not task.program:
    raise JaxlmError("config.objective: verifier='program' runs what the task makes of an answer, and this task "
                     "has no `program`; give it one, or set the verifier to 'exact', 'contains' or \"module:function\".")
  programs = (tasks.program_of(task, example, text) for example, text in zip(examples, texts))
  return [float(result.passed) for result in sandbox.run_all(programs)]


VERIFIERS: dict[str, Grader] = {'exact': each(exact), 'contains': each(contains), 'f1': each(f1),
                                'program': passes}


def grader_of(name: str) -> Grader:
  """What grades answers: a key of VERIFIERS, the run directory of a reward model, or "module:function" of (example, text)
  -> reward.

  Raises:
    JaxlmError: none of them.
  """
  if os.path.isdir(name):
    return lambda task, examples, texts: heads.rewards(_reward_model(name), examples, texts)
  return VERIFIERS.get(name) or each(lookup(VERIFIERS, name, 'verifier'))


@functools.lru_cache(1)
def _reward_model(path: str) -> LM:
  return loading.load(path)


def graded(name: str, task: Task, examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
  """float32, the reward of each text. One process of a run asks the verifier, and tells the others.

  Args:
    name: as `grader_of` takes it.
  Raises:
    JaxlmError: no such verifier, or one that gives something else than finite numbers.
  """
  found = np.zeros(len(texts), np.float32)
  if jax.process_index() == 0:
    grade = grader_of(name)
    for i, reward in enumerate(grade(task, examples, texts)):
      if not isinstance(reward, (bool, int, float, np.number, np.bool_)) or not math.isfinite(reward):
        raise JaxlmError(f'config.objective: verifier={name!r} gave {reward!r} for an answer to {examples[i].id}; '
                         'it must give a finite number.')
      found[i] = reward
  return multihost_utils.broadcast_one_to_all(found) if jax.process_count() > 1 else found


# ---- questions and answers ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Questions:
  """Which question each row of the stream asks: one after the other, each `group` times. It pickles.

  Attributes:
    stream: of the task, whose order this has.
    group: answers to a question.
  """
  stream: TaskStream
  group: int

  def examples(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of encoded rows, as `question`."""
    return {'question': self.stream.schedule.locate(np.asarray(numbers, np.int64) // self.group)[2]}


def question(encoded: Encoded, row: int) -> np.ndarray:
  """Ids of what is asked: the text before the answer."""
  here = slice(*encoded.begins[[encoded.first[row], encoded.first[row + 1]]])
  return encoded.ids[here][encoded.marks[here] == 0]


class Writer:
  """Answers questions of a task, and has the answers graded.

  Args:
    config: the whole config.
    model: the policy.
    data: the task's.
    tokenizer: of the model.
  """

  def __init__(self, config: Any, model: Transformer, data: TaskData, tokenizer: Tokenizer):
    self.config, self.model, self.data, self.tokenizer = config, model, data, tokenizer
    self.settings, self.form = config.objective[config.objective.name], data.form

  def prompt(self, encoded: Encoded, row: int) -> list[int]:
    """A question that leaves room for its answer: of one that is too long the end, as where answers are given."""
    ids, begin = question(encoded, row).tolist(), len(self.form.begin)
    room = self.config.seq_len - self.settings.max_new_tokens
    return ids if len(ids) <= room else [*ids[:begin], *ids[len(ids) - room + begin:]]

  def write(self, params: Tree, prompts: Sequence[Ids], sampling: Sampling) -> list[list[int]]:
    """Ids of an answer to each, with the one that ends it; a stop of the task ends it too."""
    rows = self.config.batch_size // self.config.accumulation  # as many as training's memory holds
    stopped = (lambda ids: self._stop(ids) is not None) if self.data.task.stop else None
    written = decode.generate(self.model, params, prompts, self.settings.max_new_tokens, sampling, self.form.end,
                              stopped, batch_size=rows)
    # Generation looks for stops now and then only.
    return [ids[:bisect.bisect_left(range(len(ids)), True, key=lambda n: self._stop(ids[:n]) is not None)]
            for ids in written]

  def _stop(self, ids: Ids) -> int | None:
    """Where in the text of an answer the first stop is."""
    if not self.data.task.stop:
      return None
    text = self.tokenizer.decode(ids)
    return min((place for stop in self.data.task.stop if (place := text.find(stop)) >= 0), default=None)

  def grade(self, examples: Sequence[Example], answers: Sequence[Ids]) -> np.ndarray:
    """Rewards, of texts up to a stop."""
    texts = [self.tokenizer.decode(ids)[:self._stop(ids)] for ids in answers]
    return graded(self.settings.verifier, self.data.task, examples, texts)


class Rollouts:
  """Batches of rollouts: a function of (state, step), whatever was written before.

  A rollout is of `updates` batches, all written by the policy as it is before the first update; each update learns from
  its own.

  Args:
    stream: of the task.
    config, model, prepared, objective, loss_fn, arrange: as of `Evaluators`.

  Attributes:
    questions: the stream that batches are of.
    writer: of answers.
  """

  def __init__(self, stream: TaskStream, config: Any, model: Transformer, prepared: examples_module.Prepared,
               objective: Any, loss_fn: Any, arrange: Callable[[dict[str, Any]], dict[str, Any]]):
    del loss_fn
    self._config, self._objective, self._arrange = config, objective, arrange
    self._settings = config.objective[config.objective.name]
    self.questions = Questions(stream, self._settings.group)
    self.writer = Writer(config, model, prepared.task, prepared.tokenizer)
    self._asked = examples_module.drawn(list(tasks.examples(prepared.task.task, 'train')), config)
    self._appraise = {'grpo': ByGroup, 'ppo': ByValue}[objective.loss](config, model)
    self._written: list[tuple[dict[str, Array], dict[str, float]]] = []

  def begins(self, step: int) -> bool:
    """Whether the update after this step is a rollout's first."""
    return step % self._settings.updates == 0

  def batch(self, batches: Batches, step: int, state: TrainState, frozen: Tree, examples: int,
            skips: Skips) -> tuple[dict[str, Array], dict[str, float]]:
    """(the batch of the update after `step`, what is told of it).

    Args:
      batches: of `Questions`, all rows of a batch.
      examples: consumed before.
    """
    if self.begins(step):
      asked = []
      for _ in range(self._settings.updates):
        asked.append(batches.at(examples, skips=skips)['question'])
        examples += len(asked[-1])
      self._written = self._roll_out(trees.combine(frozen, state.params), step, asked)
    return self._written[step % self._settings.updates]

  def _roll_out(self, params: Tree, step: int, asked: Sequence[np.ndarray]):
    """Prompts, answers, rewards, what they teach: a placed batch each, and what is told of it."""
    group, train, writer = self._settings.group, self.writer.data.train, self.writer
    numbers = np.concatenate([rows[::group] for rows in asked]).repeat(group)
    prompts = [writer.prompt(train, number) for number in numbers]
    seed = int(np.random.SeedSequence((self._config.seed, step)).generate_state(1)[0])
    policy = task_losses.without_reference(params)
    answers = writer.write(policy, prompts, Sampling(self._settings.temperature, seed=seed))
    rewards = writer.grade([self._asked[train.record[number]] for number in numbers], answers)
    ends = np.cumsum([0, *map(len, asked)])
    parts = [slice(*ends[i:i + 2]) for i in range(len(asked))]
    placed = [self._placed(prompts[here], answers[here]) for here in parts]
    taught, said = self._appraise(params, placed, [rewards[here] for here in parts])
    return [(batch, more | told(rewards[here].reshape(-1, group), answers[here]))
            for batch, more, here in zip(taught, said, parts)]

  def _placed(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> dict[str, Array]:
    """Rows of questions and answers, on the mesh."""
    item = {key: np.stack([value] * len(prompts)) for key, value in self._objective.empty(self._config.seq_len).items()}
    item['tokens'][:] = self.writer.tokenizer.vocab.filler
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
      end = len(prompt) + len(answer)
      item['tokens'][row, :end], item['segment_ids'][row, :end] = [*prompt, *answer], 1
      item['marks'][row, len(prompt):end] = 1
    batch = self._objective.example(item, None) | dict(example_ids=np.arange(len(prompts), dtype=np.int32))
    return self.writer.model.layout.place(self._arrange(batch), len(prompts))


Batch = dict[str, Array]
Said = dict[str, float]


class ByGroup:
  """What an answer is worth: how much better it was than others to its question (GRPO)."""

  def __init__(self, config: Any, model: Transformer):
    self._settings, self._layout = config.objective.grpo, model.layout
    vocabulary = losses.vocabulary_of(model, config.loss)
    self._log_probs = jax.jit(lambda params, batch: task_losses.token_log_probs(
        model, vocabulary, params, batch, None, self._settings.temperature))

  def __call__(self, params: Tree, batches: Sequence[Batch],
               rewards: Sequence[np.ndarray]) -> tuple[list[Batch], list[Said]]:
    policy = task_losses.without_reference(params)
    found = []
    for batch, rewards_B in zip(batches, rewards):
      rewards_BG = rewards_B.reshape(-1, self._settings.group)
      advantages = group_advantages(rewards_BG, by_std=self._settings.by_std).reshape(-1)
      batch = batch | self._layout.place(dict(advantages=advantages), len(advantages))
      if 'old_log_probs' in batch:
        batch['old_log_probs'] = self._log_probs(policy, batch)
      found.append(batch)
    return found, [{} for _ in found]


class ByValue:
  """What a token is worth: how much more came of it than the policy's label head expected (PPO).

  Advantages are of mean 0 and variance 1 over the rollout.
  """

  def __init__(self, config: Any, model: Transformer):
    self._layout = model.layout
    self._worth = jax.jit(functools.partial(task_losses.worth, model, config))
    self._whitened = jax.jit(_whitened)

  def __call__(self, params: Tree, batches: Sequence[Batch],
               rewards: Sequence[np.ndarray]) -> tuple[list[Batch], list[Said]]:
    found, said = [], []
    for batch, rewards_B in zip(batches, rewards):
      worth, sums = self._worth(params, batch, self._layout.place(dict(rewards=rewards_B), len(rewards_B))['rewards'])
      found.append(batch | worth)
      said.append({f'train/{name}': float(total) / max(float(count), 1) for name, (total, count) in sums.items()})
    advantages = self._whitened(*([batch[key] for batch in found] for key in ('advantages', 'loss_weights')))
    return [batch | dict(advantages=advantages_BT) for batch, advantages_BT in zip(found, advantages)], said


def _whitened(advantages: Sequence[Array], weights: Sequence[Array]) -> list[Array]:
  return jnp.split(whitened(jnp.concatenate(advantages), jnp.concatenate(weights)), len(advantages))


def told(rewards_XG: np.ndarray, answers: Sequence[Ids]) -> dict[str, float]:
  """What a run tells of rollouts: the reward, its standard deviation in a group, tokens of an answer and of all."""
  tokens = sum(map(len, answers))
  return {'train/reward': float(rewards_XG.mean()), 'train/reward_std': float(rewards_XG.std(1).mean()),
          'train/answer_length': tokens / len(answers), 'targets': tokens}


# ---- evaluation --------------------------------------------------------------------------------------------------


class Graded(Evaluators):
  """Measures the likelihood of a task's own answers, and the reward of the likeliest ones by the policy."""

  def __init__(self, writer: Writer, config: Any, model: Transformer, prepared: Any, objective: Any, loss_fn: Any,
               arrange: Callable[[dict[str, Any]], dict[str, Any]]):
    del loss_fn
    super().__init__(config, model, prepared, objective, task_losses.make('lm', model, config), arrange)
    self._writer = writer

  def measure(self, params: Tree, going_on: Callable[[], None] = lambda: None) -> dict[str, float]:
    """eval/validation/…: as `Evaluators`, and `reward`."""
    params = task_losses.without_reference(params)
    found, data = super().measure(params, going_on), self._writer.data
    prompts = [self._writer.prompt(data.validation, row) for row in range(len(data.validation))]
    answers = self._writer.write(params, prompts, Sampling())
    going_on()
    rewards = self._writer.grade([data.examples[i] for i in data.validation.record], answers)
    return found | {f'eval/{data.validation.name}/reward': float(rewards.mean())}
