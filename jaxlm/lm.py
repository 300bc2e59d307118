"""A loaded model: logits, hidden states, continuations, scores, embeddings."""
import copy
import dataclasses
import functools
from typing import Any, Callable, Iterator, Sequence

import jax
import numpy as np

from jaxlm import decode, passes, reading, trees, wording
from jaxlm.data import tokenizers
from jaxlm.errors import JaxlmError
from jaxlm.models import peft, virtual
from jaxlm.models.config import PeftConfig
from jaxlm.models.transformer import Transformer
from jaxlm.sampling import Sampling, bucket
from jaxlm.sharding import Layout
from jaxlm.speculation import Guesses
from jaxlm.types import Array, Prompt, Tree
from jaxlm.wording import Text

HEARD = 4  # tokens of a row between two looks, where somebody listens


class LM:
  """A model with its parameters and tokenizer.

  Attributes:
    config: the run's.
    model: unrolled, as it decodes.
    params: unstacked, on the mesh.
    tokenizer: or None; then all text is given and taken as ids.
    layout: mesh and rules; `mesh` alone is offered, too.
    start: ids that every text begins with, as in training: the beginning-of-text token, or nothing.
    end: ids that a text ends with that is read whole, by an encoder.
    eos: ids that end a text that is produced.
    labels: names of what a label head tells apart; (): it has none, or they are not known.
    front: ids of virtual tokens, which stand before all that is read.
  """

  def __init__(self, config: Any, model: Transformer, params: Tree, tokenizer: tokenizers.Tokenizer | None,
               layout: Layout | None = None, eos: Sequence[int] | None = None,
               frame: tuple[list[int], list[int]] | None = None,
               prompting: Callable[[list[int]], Prompt] | None = None, labels: Sequence[str] = ()):
    """Args:
      model: scanned or not.
      params: the model's.
      layout: where computing happens; None: where the model's does.
      eos: None: the tokenizer's.
      frame: ids before and after a text; None: as config.data says.
      prompting: what is continued where a text, so many ids, is given; None: those ids.
    """
    if layout is not None:
      model = Transformer(model.config, layout)
    self.config, self.tokenizer, self.labels = config, tokenizer, tuple(labels)
    self.model, self.params = reading.unrolled(model, params)
    self.layout, self.mesh = self.model.layout, self.model.layout.mesh
    self._encodes = model.config.structure == 'encoder_decoder'
    size = self.model.config.vocab_size
    self.front = list(range(size, size + virtual.count(self.model.config.peft)))
    self._prompting = functools.partial(wording.fronted, self.front, self._encodes, prompting or Prompt)
    vocab = tokenizers.Vocab(0) if tokenizer is None else tokenizer.vocab
    one = lambda on, id: [id] if on and id is not None else []
    self.start, self.end = frame or (one(config.data.bos, vocab.first), one(config.data.eos, vocab.last))
    self.eos = tuple(eos) if eos is not None else () if vocab.last is None else (vocab.last,)

  def __repr__(self) -> str:
    config = self.model.config
    return (f'LM({config.structure}, {config.num_layers} layers of width {config.width}, '
            f'{trees.count(self.params):,} parameters, {config.vocab_size:,} tokens)')

  # ---- arrays ----------------------------------------------------------------------------------------------------

  def logits(self, tokens_BT: Any, source_BS: Any = None, mask: Any = None, source_mask: Any = None) -> Array:
    """float32 [B, T, vocab_size]: scores of the next token (of this one, where both sides are seen).

    Args:
      tokens_BT: ids; nothing is added.
      source_BS: what the encoder reads, of an encoder-decoder. Models without an encoder take mask in this place.
      mask: [B, T], 1 or True: a real token; 0: padding, which nobody sees, wherever it stands. None: all are real.
      source_mask: [B, S], the same of the source.
    Raises:
      JaxlmError: an id outside the vocabulary, a shape that is none, more tokens than learned positions.
    """
    self._needs_head('logits')
    return self._forward(tokens_BT, source_BS, mask, source_mask, 'logits')

  def hidden(self, tokens_BT: Any, source_BS: Any = None, mask: Any = None, source_mask: Any = None) -> Array:
    """[B, T, D] after the final norm, in the compute dtype; the arguments of `logits`."""
    return self._forward(tokens_BT, source_BS, mask, source_mask, 'hidden')

  def scores(self, tokens_BT: Any, source_BS: Any = None, mask: Any = None, source_mask: Any = None,
             types: Any = None) -> Array:
    """What the label head says: float32 [B, labels], or [B, T, labels]; the arguments of `logits`, and

    Args:
      types: [B, T], which of two texts a token belongs to, from 0; None: all to the first.
    """
    if self.model.config.head.labels == 'none':
      raise JaxlmError("scores needs a label head, and this model has none (config.model.head.labels='none').")
    return self._forward(tokens_BT, source_BS, mask, source_mask, 'scores', types)

  def attention(self, tokens_BT: Any, source_BS: Any = None, mask: Any = None,
                source_mask: Any = None) -> list[Array]:
    """A layer: float32 [B, N, T, T], how much each token (row) of each head takes from each other; to look at.

    The arguments of `logits`. Columns of virtual tokens come first. Of an encoder-decoder it is the decoder's, among
    its own tokens.
    """
    config = self.model.config
    if config.mixer != 'attention':
      raise JaxlmError(f'attention: the tokens of a layer of this model meet by config.model.mixer={config.mixer!r}.')
    rows = self._given(tokens_BT, source_BS, mask, source_mask)
    model = self.model.clone(config=dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, kernel='dense')))
    see = lambda params, rows: model.apply({'params': params}, passes.batch(config, *rows), mutable='attention')[1]
    T = rows[0][0].shape[1]
    if self.front:
      rows[-1] = self._behind_front(*rows[-1])
    P = rows[0][0].shape[1] - T
    seen = trees.flatten(jax.jit(see)(self.params, rows))
    return [seen[f'attention/stack/layer_{i}/attention/probs/0'][:, :, P:P + T] for i in range(config.num_layers)]

  def _forward(self, tokens: Any, source: Any, mask: Any, source_mask: Any, what: str, types: Any = None) -> Array:
    rows = self._given(tokens, source, mask, source_mask)
    (B, T), P = rows[0][0].shape, 0
    if self.front:
      read = -1  # the source, where there is one
      rows[read] = self._behind_front(*rows[read])
      P = rows[0][0].shape[1] - T
    grown = [self._grown(*row) for row in rows]
    if types is not None and self.model.config.embedding.token_types <= 1:
      types = None  # a table of one row tells no texts apart; training reads none either
    if types is not None:
      types = np.asarray(types, np.int32)
      reading.check_tokens(types, self.model.config.embedding.token_types, 'types')
      types = np.pad(types, [(0, n - m) for n, m in zip(grown[0][0].shape, types.shape)][:1] + [
          (P, grown[0][0].shape[1] - P - types.shape[1])])
    found = passes.outputs(self.model, self.params, *grown, what=what, types=types)
    return found[:B] if found.ndim == 2 else found[:B, P:P + T]

  def _behind_front(self, tokens_BT: np.ndarray, real_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with virtual tokens before them."""
    front = np.broadcast_to(np.array(self.front, np.int32), (len(tokens_BT), len(self.front)))
    reading.check_length(self.model, len(self.front) + int(real_BT.sum(1).max()),
                         'The longest row with its virtual tokens', 'Give shorter rows.')
    return np.concatenate([front, tokens_BT], 1), np.concatenate([np.ones(front.shape, bool), real_BT], 1)

  def _given(self, tokens: Any, source: Any, mask: Any, source_mask: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, which are real) of the tokens and, where there is an encoder, of its source."""
    if not self._encodes and mask is None:
      source, mask = None, source
    if self._encodes == (source is None):
      raise JaxlmError('This model has an encoder: give its source, too, as the second argument.' if self._encodes else
                       'This model has no encoder to read a source.')
    rows = [self._rows(tokens, mask)]
    if source is not None:
      rows.append(self._rows(source, source_mask, 'source_BS'))
      if len(rows[1][0]) != len(rows[0][0]):
        raise JaxlmError(f'source_BS must have as many rows as tokens_BT, {len(rows[0][0])}; got {len(rows[1][0])}.')
    return rows

  def _grown(self, tokens_BT: np.ndarray, real_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both padded to one of few sizes, so that a loop over texts of any length compiles a few programs."""
    B, T = tokens_BT.shape
    length = bucket(T)
    if self.model.config.positions.kind == 'learned':  # a table has no row for what is beyond its end
      length = max(T, min(length, self.model.config.max_length))
    grow = lambda x: np.pad(x, ((0, -B % self.layout.batch_parts), (0, length - T)))
    return grow(tokens_BT), grow(real_BT)

  def _rows(self, tokens: Any, mask: Any, name: str = 'tokens_BT') -> tuple[np.ndarray, np.ndarray]:
    """(ids, which are real), int32 and bool [B, T], checked."""
    try:
      tokens_BT = np.asarray(tokens)
    except ValueError:
      tokens_BT = np.zeros(0)  # lists of unequal length
    if tokens_BT.ndim != 2 or not tokens_BT.size:
      raise JaxlmError(f'{name} must be ids in rows of one length, [B, T], and not empty; got '
                       f'{wording.described(tokens)}. Fill shorter rows up with any id, and give mask=0 there.')
    real_BT = np.ones(tokens_BT.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if real_BT.shape != tokens_BT.shape:
      raise JaxlmError(f'mask must have the shape of {name}, {tokens_BT.shape}; got {real_BT.shape}.')
    reading.check_tokens(tokens_BT, self.model.config.vocab_size, name)
    reading.check_length(self.model, int(real_BT.sum(1).max()), 'The longest row', 'Give shorter rows.')
    return tokens_BT.astype(np.int32), real_BT

  # ---- text ------------------------------------------------------------------------------------------------------

  def generate(self, prompts: Any, max_new_tokens: int = 64, temperature: float = 0.0, top_k: int = 0,
               top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0,
               stop: str | Sequence[str] = (), num_beams: int = 1, length_penalty: float = 1.0, special: bool = False,
               batch_size: int = 32, draft: 'LM | None' = None, lookup: int = 0, guesses: int = 4,
               heard: Callable[[int, Any], None] | None = None) -> Any:
    """Continues texts, and returns the continuations alone.

    Args:
      prompts: a text, texts, ids, or lists of ids; what comes back is of the same kind. Text begins as documents did
        in training, and where it ends in a space the first piece is one that begins so (`Tokenizer.encode_prompt`);
        ids are taken as they are.
      max_new_tokens: at most.
      temperature, top_k, top_p, min_p, repetition_penalty, seed, num_beams, length_penalty: as in `sampling.Sampling`.
      stop: texts that end a continuation. In text they are cut off, with what follows; ids end with the token that
        completes one, as they end with the end token.
      special: read the names of special tokens in text, [MASK] or those of a chat, as these tokens; else they are text.
      batch_size: prompts continued at once.
      draft: a smaller model that guesses `guesses` tokens at a time, which this one checks in one pass; what is said is
        the same, or drawn from the same distribution.
      lookup: guess what followed the last tokens, as many as agree up to this number, where they stood before; 0: not.
      heard: told, while texts are produced, the number of a prompt and what has been added to it since; beams tell all
        at once. A character or a stop that is not whole yet is held back.
    """
    self._needs_head('generate')
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                        repetition_penalty=repetition_penalty, num_beams=num_beams, length_penalty=length_penalty)
    how = None
    if draft is not None and draft.tokenizer and self.tokenizer and draft.tokenizer.digest != self.tokenizer.digest:
      raise JaxlmError('The draft model has another tokenizer; take one that was trained on the same ids.')
    if lookup or draft is not None:
      how = Guesses(guesses, lookup, draft and draft.model, draft and draft.params)
    stops = wording.stops_of(stop)
    single, prompts = wording.listed(prompts)
    ids, first = zip(*(self._prompt(prompt, special) for prompt in prompts)) if prompts else ((), ())
    for row, (prompt, found) in enumerate(zip(prompts, ids)):
      if isinstance(prompt, str) and not found:
        raise JaxlmError(f'Prompt {row} is empty, and this model has no token that begins a text; give some text.')
    if stops:
      self._needs_tokenizer('stop')
    told = lambda new: any(text in self.tokenizer.decode(new) for text in stops)
    given = [self._prompting(list(found) + self.end if self._encodes else list(found)) for found in ids]

    def said(row, new):
      if isinstance(prompts[row], str):
        text = wording.said(self.tokenizer, self.eos, [] if self._encodes else ids[row], new, stops)
        return text if first[row] is None else text[1:]  # the space is the prompt's
      return wording.cut(new, told) if stops else new

    known = [0] * len(prompts)

    def hear(row, new, whole=False):
      now = said(row, new)
      end = len(now)
      if isinstance(now, str) and not whole:
        end = len(now.rstrip('\ufffd')) - max((len(text) - 1 for text in stops), default=0)
      if end > known[row]:
        heard(row, now[known[row]:end])
        known[row] = end

    outputs = decode.generate(
        self.model, self.params, given, max_new_tokens, sampling, self.eos, told if stops else None, batch_size, first,
        how, decode.BLOCK if heard is None else HEARD, heard and hear)
    for row, new in enumerate(outputs):
      if heard is not None:
        hear(row, new, whole=True)
      outputs[row] = said(row, new)
    return outputs[0] if single else outputs

  def room(self, prompts: Sequence[Text]) -> int:
    """Tokens that can follow the longest prompt; where positions are not learned, as many as one likes."""
    if self.model.config.positions.kind != 'learned':
      return 1 << 30
    longest = max((len(self._prompting(self._prompt(prompt)[0]).ids) for prompt in prompts), default=0)
    return max(self.model.config.max_length - longest, 1)

  def score(self, contexts: Sequence[Text], continuations: Sequence[Text],
            batch_size: int = 32) -> list[tuple[float, int, bool]]:
    """(nats, tokens, is_greedy) of each continuation after its context.

    nats is the sum of its log-probabilities, at most 0; tokens its length; is_greedy says whether each token was the
    likeliest. Both are tokenised as one text, as lm-eval does, so a space between them belongs to the continuation.
    An empty context is a text's beginning. Of a context too long for learned positions the end is read.

    Args:
      contexts, continuations: texts or ids, as many of each; ids are joined as they are.
      batch_size: pairs scored at once.
    """
    self._needs_head('score')
    if not reading.continues(self.model.config):
      raise JaxlmError('This model sees both sides of a token, so it gives no probability of a continuation; '
                       "use one trained with objective.name='causal'.")
    if isinstance(contexts, str) or isinstance(continuations, str) or len(contexts) != len(continuations):
      raise JaxlmError('contexts and continuations must be two lists of one length; got '
                       f'{wording.described(contexts)} and {wording.described(continuations)}.')
    pairs = [self._pair(*pair, row) for row, pair in enumerate(zip(contexts, continuations))]
    found: list[tuple[float, int, bool]] = [(0.0, 0, True)] * len(pairs)
    for rows, inputs in self._batches([prompt for prompt, _ in pairs], batch_size):
      targets_BT, weights_BT = np.zeros_like(inputs.tokens_BT), np.zeros(inputs.tokens_BT.shape, np.float32)
      for i, row in enumerate(rows):
        prompt, targets = pairs[row]
        end = len(prompt.ids)
        targets_BT[i, end - len(targets):end], weights_BT[i, end - len(targets):end] = targets, 1
      nats_B, correct_B = map(np.asarray, passes.scores(self.model, self.params, inputs, targets_BT, weights_BT))
      for i, row in enumerate(rows):
        count = len(pairs[row][1])
        found[row] = float(nats_B[i]) + 0.0, count, int(correct_B[i]) == count
    return found

  def embed(self, texts: Any, batch_size: int = 32) -> np.ndarray:
    """float32 [number of texts, D]: the mean of the last hidden states over a text's tokens, its start among them.

    Of a model that was trained to embed (objective contrast) what config.model.head.pool says, as it was trained; with
    'splade' D is the vocabulary's size.

    Of an encoder-decoder, the encoder's. What encoders read ends as texts do in training, too.

    Args:
      texts: a text, texts, or lists of ids; a single one gives [D].
      batch_size: texts at once.
    """
    single, texts = wording.listed(texts)
    whole = self._encodes or self.model.config.visibility == 'full'
    ids = [self._ids(text) + (self.end if whole and isinstance(text, str) else []) for text in texts]
    for row, found in enumerate(ids):
      if not found:
        raise JaxlmError(f'Text {row} is empty, and this model has no token that begins a text; leave it out.')
      reading.check_length(self.model, len(found), f'Text {row}', 'Cut it into pieces.')
    how = self.model.config.head.pool if self.config.objective.name == 'contrast' else 'mean'
    pooled = np.zeros((len(texts), self.model.config.vocab_size if how == 'splade' else self.model.config.width), np.float32)
    fronted = functools.partial(wording.fronted, self.front, self._encodes)
    prompts = [fronted(lambda found: Prompt([0], found), found) if self._encodes else fronted(Prompt, found)
               for found in ids]
    for rows, inputs in self._batches(prompts, batch_size):
      pooled[rows] = np.asarray(passes.pooled(self.model, self.params, inputs, how))[:len(rows)]
    return pooled[0] if single else pooled

  def merged(self) -> 'LM':
    """The same model with its delta in its weights, as fast as the base and exported like one; this one stays as it is.

    Raises:
      JaxlmError: the method adds what weights cannot express.
    """
    config = self.config.copy_and_resolve_references()
    with config.unlocked():
      config.model.peft.method, config.model.peft.base, config.checkpoint.init_from = 'none', 'same', ''
    model = self.model.clone(config=dataclasses.replace(self.model.config, peft=PeftConfig()))
    return self._with(config, model, peft.merge(self.params, self.model.config.peft))

  def _with(self, config: Any, model: Transformer, params: Tree) -> 'LM':
    """Another model that reads and writes text as this one does."""
    other = copy.copy(self)
    other.config, other.model, other.params = config, model, params
    return other

  # ---- between text and ids --------------------------------------------------------------------------------------

  def _needs_tokenizer(self, what: str) -> None:
    if self.tokenizer is None:
      raise JaxlmError(f'{what} needs a tokenizer, and this model came without one; give lists of ids.')

  def _needs_head(self, what: str) -> None:
    if not self.model.config.head.lm:
      also = 'scores, hidden' if self.model.config.head.labels != 'none' else 'hidden'
      raise JaxlmError(f'{what} needs an output layer over the vocabulary, which this model has not; {also} and embed '
                       'work.')

  def _ids(self, text: Text) -> list[int]:
    if not isinstance(text, str):
      reading.check_tokens(np.asarray(text), self.model.config.vocab_size, 'A list of ids')
      return [int(i) for i in text]
    self._needs_tokenizer('Text')
    return self.start + self.tokenizer.encode(text)

  def _prompt(self, text: Text, special: bool = False) -> tuple[list[int], np.ndarray | None]:
    """(ids, which may come first) of what is to be continued."""
    if not isinstance(text, str) or self.tokenizer is None:
      return self._ids(text), None
    ids, first = self.tokenizer.encode_prompt(text, special)
    return self.start + ids, first

  def _pair(self, context: Text, continuation: Text, row: int) -> tuple[Prompt, list[int]]:
    """(what is read to predict the continuation, its ids, which the last columns of that predict)."""
    if isinstance(context, str) != isinstance(continuation, str):
      raise JaxlmError(f'Pair {row}: context and continuation must both be text, or both ids.')
    if self._encodes:
      if isinstance(context, str):
        kept = context.rstrip()
        context, continuation = kept, context[len(kept):] + continuation
      prompt = self._prompting(self._ids(context) + (self.end if isinstance(context, str) else []))
      targets = self.tokenizer.encode(continuation) if isinstance(continuation, str) else self._ids(continuation)
      return dataclasses.replace(prompt, ids=[*prompt.ids, *targets][:-1] if targets else []), list(targets)
    if isinstance(context, str):
      kept = context.rstrip()
      ids, before = self._ids(context + continuation), self._ids(kept)
      start = len(before)
      if start >= len(ids) and continuation:  # one piece reaches across: it is scored whole
        start = next(i for i, pair in enumerate(zip(before + [None], ids + [None])) if pair[0] != pair[1])
    else:
      ids, start = self._ids(context) + self._ids(continuation), len(context)
    count = len(ids) - start
    if start == 0 and count:
      vocab = tokenizers.Vocab(0) if self.tokenizer is None else self.tokenizer.vocab
      first = next((i for i in (vocab.bos, vocab.eos) if i is not None), None)
      if first is None:
        raise JaxlmError(f'Pair {row} has an empty context, and this model has no token that begins a text; '
                         'give a context.')
      ids = [first] + ids
    reading.check_length(self.model, count, f'Continuation {row}', 'Score it in pieces.')
    if self.model.config.positions.kind == 'learned':
      ids = ids[-(self.model.config.max_length - len(self.front) + 1):]
    if not count:
      return Prompt([]), []
    prompt = self._prompting(ids[:-count])
    return dataclasses.replace(prompt, ids=[*prompt.ids, *ids[-count:-1]]), ids[-count:]

  def _batches(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[list[int], reading.Inputs]]:
    """Yields (numbers of prompts, those as arrays), like lengths together; empty ones are left out."""
    lengths = [(len(prompt.ids), len(prompt.source)) for prompt in prompts]
    order = sorted((i for i, prompt in enumerate(prompts) if len(prompt.ids)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
      rows = order[start:start + batch_size]
      yield rows, reading.pad(self.model, [prompts[i] for i in rows])
