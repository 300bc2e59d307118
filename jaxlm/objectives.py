"""What is learned from a window of text: raw tokens become a batch's arrays, in NumPy.

An objective never sees the model and the model never sees it; they meet in the batch (`types.BATCH`). The parts are in
masking, spans, orders, middles, pairs and prompts; here each gets its settings, lengths, and the models it fits.
"""
import dataclasses
import functools
from typing import Any, Callable

import numpy as np

from jaxlm import answers, fits, masking, middles, orders, pairs, prompts, rows, spans
from jaxlm.errors import JaxlmError
from jaxlm.lookup import lookup
from jaxlm.rows import Example, Item
from jaxlm.types import Ids, Prompt


def same(seq_len: int) -> int:
  return seq_len


def one_more(seq_len: int) -> int:
  return seq_len + 1


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective, as data, model and loss see it. It pickles, so that worker processes can hold it.

  Attributes:
    example: (item, rng) -> the keys of `types.BATCH` but `example_ids`, from an item of `rows.Item` whose windows have
      raw_length(config.seq_len) tokens. With `random` the item is one row [R] and rng a `np.random.Generator` keyed by
      (seed, example number); without, a whole block [B, R] and rng is None.
    raw_length: seq_len -> R, the tokens of text that an example is made from.
    visibility: which tokens see which: 'causal', 'full', or 'order' (then the batch has `order`); an
      encoder-decoder's is its decoder's.
    overlap: tokens that a window shares with the one before it; 1 where the last token is only a target, so that
      cutting a document into windows loses no target.
    random: whether `example` draws from rng.
    target_length: seq_len -> columns of `targets`: of the decoder in an encoder-decoder, or the places predicted.
    loss: 'lm'; or 'replaced', where a generator fills the masks and a discriminator looks for what it changed.
    prompt: ids of a text -> what a model continues for it, as the objective taught it to.
    second: whether an item must have `second`, text of another document.
    covers: every token of the text is predicted once, from what stands before it: the loss is a code length.
    ids: special tokens that it writes.
    empty: of a task: seq_len -> an item of padding (`answers`), which says what its rows hold; None: it reads text.
  """
  example: Callable[[Item, Any], Example]
  raw_length: Callable[[int], int]
  visibility: str
  overlap: int = 0
  random: bool = True
  target_length: Callable[[int], int] = same
  loss: str = 'lm'
  prompt: Callable[[Ids], Prompt] = Prompt
  second: bool = False
  covers: bool = False
  ids: tuple[int, ...] = ()
  empty: Callable[[int], Item] | None = None


def make(config, vocab) -> Objective:
  """The objective that `config.objective.name` selects.

  Args:
    config: the whole config; an objective reads its own sub-config of `config.objective`, and `config.data`.
    vocab: the tokenizer's `Vocab` (size and special ids); it must have the `roles` of the config.
  Raises:
    JaxlmError: no objective has that name, or the tokenizer lacks a token that it writes.
  """
  return lookup(OBJECTIVES, config.objective.name, 'objective')(config, vocab)


def roles(config) -> tuple[str, ...]:
  """The special tokens that the config's objective writes, by role; `prepare` adds those the tokenizer lacks."""
  return ROLES[config.objective.name](config) if config.objective.name in ROLES else ()


def shapes(objective: Objective, seq_len: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """(shape of an example, dtype) of each key of a batch, `example_ids` apart; made from a row of padding."""
  if objective.empty is not None:
    example = objective.example(objective.empty(seq_len), None)
    return {key: (np.shape(value), np.asarray(value).dtype) for key, value in example.items()}
  row = np.zeros(objective.raw_length(seq_len), np.int32)
  item = dict(tokens=row, segment_ids=row, positions=row, starts=row > 0, second=row - 1)
  example = objective.example(item, np.random.default_rng(0) if objective.random else None)
  return {key: (np.shape(value), np.asarray(value).dtype) for key, value in example.items()}


def visibility(config) -> str:
  """The visibility that `make` would give the objective, without a tokenizer; a mismatch gives what it mostly has."""
  sees = fits.FITS.get(config.objective.name)
  if sees is None:
    return make(config, None).visibility
  return sees.get(fits.kind(config), next(iter(sees.values())))


# ---- left to right -----------------------------------------------------------------------------------------------


def causal(config, vocab) -> Objective:
  """Predict the next token: of the same document, or of whatever follows where documents are not masked."""
  del vocab
  return Objective(functools.partial(rows.causal, mask_documents=config.data.mask_documents, future=0), one_more,
                   visibility='causal', overlap=1, random=False, covers=True)


def multi_token(config, vocab) -> Objective:
  """Also predict the P tokens after the next, as far as the row has them.

  Source: Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437, 2.2.
  """
  del vocab
  return Objective(functools.partial(rows.causal, mask_documents=config.data.mask_documents,
                                     future=config.model.future_heads), one_more,
                   visibility='causal', overlap=1, random=False, covers=True)


def fim(config, vocab) -> Objective:
  """Some documents with their middle at the end, all of them predicted from left to right."""
  own = config.objective.fim
  marks = tuple(vocab.id(role) for role in ('fim_prefix', 'fim_middle', 'fim_suffix'))
  example = functools.partial(
      middles.example, settings=middles.Middles(own.rate, own.spm, *marks, vocab.bos, vocab.eos),
      seq_len=config.seq_len, every=own.every, mask_documents=config.data.mask_documents, filler=vocab.filler)
  return Objective(example, fits.RAW['fim'](config), visibility='causal', overlap=1, ids=marks)


# ---- tasks -------------------------------------------------------------------------------------------------------


def _empty(seq_len: int, more: int = 0, labels: tuple[int, ...] | None = None, whole: bool = True, source: int = 0) -> Item:
  """A row of padding, as data makes rows of a task."""
  row = np.zeros(seq_len + more, np.int32)
  item = dict(tokens=row, segment_ids=row, marks=row.astype(np.float32), types=row)
  if labels is not None:
    item['labels'] = np.zeros(labels, np.int32 if whole else np.float32)
  if source:
    item |= dict(source_tokens=np.zeros(source, np.int32), source_segment_ids=np.zeros(source, np.int32))
  return item


def _task(config, example, raw_length=same, loss='lm', **empty) -> Objective:
  """What objectives of tasks have in common; `empty` says what an item holds."""
  visibility = fits.FITS[config.objective.name].get(fits.kind(config), 'causal')
  return Objective(example, raw_length, visibility, random=False, loss=loss, empty=functools.partial(_empty, **empty))


def _labels(config, key: str, shape: tuple[int, ...], whole: bool = True) -> Objective:
  example = functools.partial(answers.labelled, types=config.model.embedding.token_types > 1, key=key)
  return _task(config, example, loss='labels', labels=shape, whole=whole)


def classify(config, vocab) -> Objective:
  """One of several classes for a text, or for two."""
  return _labels(config, 'labels', ())


def multi_label(config, vocab) -> Objective:
  """For each label whether a text has it."""
  return _labels(config, 'label_values', (config.model.head.num_labels,), whole=False)


def regress(config, vocab) -> Objective:
  """A number for a text, or for two."""
  return _labels(config, 'label_values', (1,), whole=False)


def extract(config, vocab) -> Objective:
  """Where in its context the answer to a question begins and ends."""
  return _labels(config, 'span_labels', (2,))


def tag(config, vocab) -> Objective:
  """A tag for each word of a text."""
  return _task(config, functools.partial(answers.tagged, types=config.model.embedding.token_types > 1), loss='labels')


def answer(config, vocab) -> Objective:
  """The answer to a question, the turns of an assistant: tokens, of which those of answers alone count."""
  if fits.kind(config) == 'encoder_decoder':
    target = config.objective.answer.target_length or config.seq_len
    objective = _task(config, functools.partial(answers.translated, start=vocab.decoder_start), source=config.seq_len)
    return dataclasses.replace(objective, target_length=functools.partial(_fixed, length=target), empty=functools.partial(
        _empty_pair, target=target), prompt=functools.partial(prompts.asked, question=prompts.bare, together=False,
                                                              start=vocab.decoder_start))
  return _task(config, answers.answered, one_more, more=1)


def _fixed(seq_len: int, length: int) -> int:
  return length


def _empty_pair(seq_len: int, target: int) -> Item:
  return _empty(target, source=seq_len)


def contrast(config, vocab) -> Objective:
  """Embeddings of queries near to those of their documents, and far from those of others."""
  return _task(config, answers.embedded, loss='contrast')


def reward(config, vocab) -> Objective:
  """A number for an answer, higher for the better of two."""
  return _task(config, answers.embedded, loss='reward')


def prefer(config, vocab) -> Objective:
  """The better of two answers."""
  return _task(config, answers.preferred, one_more, loss='prefer', more=1)


def kto(config, vocab) -> Objective:
  """Single answers that somebody liked or did not."""
  return _task(config, answers.single, one_more, loss='kto', more=1, labels=())


def grpo(config, vocab) -> Objective:
  """Answers of the policy's own, as much more likely as a verifier rewards them above others to the same question."""
  example = functools.partial(answers.written, kept=config.objective.grpo.updates > 1)
  return _task(config, example, one_more, loss='grpo', more=1)


def ppo(config, vocab) -> Objective:
  """Answers of the policy's own, as much more likely, token by token, as they turn out better than it expected."""
  return _task(config, answers.valued, one_more, loss='ppo', more=1)


# ---- masks -------------------------------------------------------------------------------------------------------


def _masking(own, vocab) -> masking.Masking:
  pieces = vocab.pieces()
  return masking.Masking(own.rate, own.mask, own.random, own.whole_words, own.max_ngram, own.geometric,
                         vocab.id('mask'), np.flatnonzero(~pieces.special).astype(np.int32), pieces)


def _slots(seq_len: int, chosen: masking.Masking) -> int:
  return masking.slots(chosen, seq_len)


def _masked(config, vocab, example, raw_length=same, **settings) -> Objective:
  """What the objectives that mask have in common; `settings` are the Objective's."""
  chosen = _masking(config.objective[config.objective.name], vocab)
  ids = (chosen.mask_id, *settings.pop('ids', ()))
  return Objective(functools.partial(example, filler=vocab.filler, chosen=chosen), raw_length,
                   visibility='full', target_length=functools.partial(_slots, chosen=chosen), ids=ids, **settings)


def masked(config, vocab) -> Objective:
  """Predict hidden tokens from both sides; another mask every epoch, as it depends on the example's number."""
  return _masked(config, vocab, functools.partial(masking.example, mask_documents=config.data.mask_documents))


def replaced(config, vocab) -> Objective:
  """Fill hidden tokens, and tell which of them were not filled as they were."""
  example = functools.partial(masking.example, mask_documents=config.data.mask_documents, keep=True)
  return _masked(config, vocab, example, loss='replaced')


def translation(config, vocab) -> Objective:
  """Masks in a text and its translation."""
  example = functools.partial(pairs.translation, between=vocab.last, mask_documents=config.data.mask_documents)
  return _masked(config, vocab, example)


def next_sentence(config, vocab) -> Objective:
  """Masks, and whether the second text follows the first."""
  frame = pairs.Frame(vocab.id('cls'), vocab.id('sep'))
  put = functools.partial(pairs.next_sentence, frame=frame)
  return _masked(config, vocab, put, fits.framed, second=True, ids=frame)


def sentence_order(config, vocab) -> Objective:
  """Masks, and whether two texts stand in their order."""
  frame = pairs.Frame(vocab.id('cls'), vocab.id('sep'))
  return _masked(config, vocab, functools.partial(pairs.sentence_order, frame=frame), fits.framed, ids=frame)


# ---- orders ------------------------------------------------------------------------------------------------------


def permutation(config, vocab) -> Objective:
  """Predict some tokens in a random order, each from the context and those before it."""
  own, pieces = config.objective.permutation, vocab.pieces()
  chosen = masking.Masking(own.rate, 0.0, 0.0, own.whole_words, own.max_ngram, False, 0, np.zeros(1, np.int32), pieces)
  example = functools.partial(orders.permutation, chosen=chosen, memory=own.memory,
                              mask_documents=config.data.mask_documents, filler=vocab.filler)
  return Objective(example, functools.partial(_plus, more=own.memory), visibility='order', overlap=own.memory,
                   target_length=functools.partial(_slots, chosen=chosen), prompt=prompts.context)


def _plus(seq_len: int, more: int) -> int:
  return seq_len + more


def infilling(config, vocab) -> Objective:
  """Fill blanks one after the other, each from left to right, from the text around them."""
  own = config.objective.infilling
  mask, gmask, sop, eop = (vocab.id(role) for role in ('mask', 'gmask', 'sop', 'eop'))
  smask, one_dim = vocab.id('smask') if own.sentences else mask, not config.model.positions.two_dims
  settings = orders.Blanks(own.rate, own.mean, own.long, own.long_min, own.sentences, mask, gmask, smask, sop, eop,
                           vocab.pieces(), one_dim)
  example = functools.partial(orders.infilling, settings=settings, length=config.seq_len,
                              mask_documents=config.data.mask_documents, filler=vocab.filler)
  return Objective(example, fits.RAW['infilling'](config), visibility='order',
                   prompt=functools.partial(prompts.blank, mask=mask, gmask=gmask, smask=smask, sop=sop,
                                            one_dim=one_dim), ids=(mask, gmask, smask, sop, eop))


# ---- text to text ------------------------------------------------------------------------------------------------


def _text_to_text(config, vocab, target_length, example, question, ids=(), **settings) -> Objective:
  """What objectives with a source and a target have in common, in an encoder-decoder or, as one row, in a decoder.

  Args:
    question: ids of a text -> (source, beginning of the target) that ask for how it goes on.
  """
  together = fits.kind(config) == 'decoder'
  target_length = same if together else target_length
  layout = spans.Layout(config.seq_len, target_length(config.seq_len), together, vocab.decoder_start, vocab.filler)
  example = functools.partial(example, mask_documents=config.data.mask_documents, layout=layout, **settings)
  return Objective(example, fits.RAW[config.objective.name](config), visibility='order' if together else 'causal',
                   target_length=target_length, ids=(*ids, vocab.decoder_start),
                   prompt=functools.partial(prompts.asked, question=question, together=together,
                                            start=vocab.decoder_start))


def prefix(config, vocab) -> Objective:
  """Predict how a text goes on from a beginning whose tokens all see one another."""
  own = config.objective.prefix
  if fits.kind(config) == 'decoder':
    example = functools.partial(orders.prefix, min_rate=own.min_rate, max_rate=own.max_rate,
                                mask_documents=config.data.mask_documents, filler=vocab.filler)
    return Objective(example, one_more, visibility='order', prompt=prompts.context)
  length = functools.partial(spans.prefix_target, raw=fits.RAW['prefix'](config), min_rate=own.min_rate)
  return _text_to_text(config, vocab, length, spans.prefix, prompts.bare, min_rate=own.min_rate, max_rate=own.max_rate)


def span(config, vocab) -> Objective:
  """Predict spans that were cut out of the text."""
  own = config.objective.span
  sentinels, eos = _sentinels(config, vocab), vocab.id('eos')
  length = functools.partial(spans.cut_target, raw=fits.RAW['span'](config), laws=((own.rate, own.mean),))
  ids = tuple(sentinels.tolist())
  question = functools.partial(prompts.gap, sentinels=ids, eos=eos)
  return _text_to_text(config, vocab, length, spans.t5, question, (*ids, eos),
                       rate=own.rate, mean=own.mean, tail=own.tail, sentinels=sentinels, eos=eos)


def ul2(config, vocab) -> Objective:
  """Predict what one of several kinds of noise took away, told which."""
  own = config.objective.ul2
  sentinels, eos = _sentinels(config, vocab), vocab.id('eos')
  denoisers = tuple(spans.Denoiser(vocab.id(f'mode_{mode}'), *law) for mode, *law in own.denoisers)
  laws = tuple((d.rate, d.mean) for d in denoisers)
  length = functools.partial(spans.cut_target, raw=fits.RAW['ul2'](config), laws=laws)
  ids = tuple(sentinels.tolist())
  lead = min(denoisers, key=lambda d: d.mean > 0).mode  # what the noise is called that takes a row's end
  question = functools.partial(prompts.gap, sentinels=ids, eos=eos, lead=(lead,))
  return _text_to_text(config, vocab, length, spans.ul2, question, (*ids, eos, *(d.mode for d in denoisers)),
                       denoisers=denoisers, sentinels=sentinels, eos=eos)


def _sentinels(config, vocab) -> np.ndarray:
  fault = fits.sentinels_missing(config)
  if fault:
    raise JaxlmError(fault)
  return np.array([vocab.id(role) for role in _sentinel_roles(config)], np.int32)


def _sentinel_roles(config) -> tuple[str, ...]:
  return tuple(f'sentinel_{i}' for i in range(config.objective[config.objective.name].num_sentinels))


def denoising(config, vocab) -> Objective:
  """Predict a whole text from one with spans, sentences or tokens disturbed."""
  own, mask, pieces = config.objective.denoising, vocab.id('mask'), vocab.pieces()
  noise = spans.Noise(own.rate, own.mean, own.permute, own.delete, own.rotate, mask, pieces)
  question = functools.partial(prompts.again, mask=mask)
  return _text_to_text(config, vocab, fits.RAW['denoising'](config), spans.bart, question, (mask,), settings=noise)


ROLES: dict[str, Callable[[Any], tuple[str, ...]]] = {
    'masked': lambda c: ('mask',), 'replaced': lambda c: ('mask',), 'translation': lambda c: ('mask',),
    'denoising': lambda c: ('mask',), 'next_sentence': lambda c: ('mask', 'cls', 'sep'),
    'sentence_order': lambda c: ('mask', 'cls', 'sep'), 'fim': lambda c: ('fim_prefix', 'fim_middle', 'fim_suffix'),
    'infilling': lambda c: ('mask', 'gmask', 'sop', 'eop', *(['smask'] if c.objective.infilling.sentences else [])),
    'span': lambda c: ('eos', *_sentinel_roles(c)),
    'ul2': lambda c: ('eos', *sorted({f'mode_{d[0]}' for d in c.objective.ul2.denoisers}), *_sentinel_roles(c)),
}

OBJECTIVES = {
    'causal': causal, 'multi_token': multi_token, 'fim': fim, 'prefix': prefix, 'masked': masked, 'replaced': replaced,
    'translation': translation, 'next_sentence': next_sentence, 'sentence_order': sentence_order,
    'permutation': permutation, 'infilling': infilling, 'span': span, 'ul2': ul2, 'denoising': denoising,
    'classify': classify, 'multi_label': multi_label, 'regress': regress, 'tag': tag, 'extract': extract,
    'answer': answer, 'contrast': contrast, 'prefer': prefer, 'reward': reward, 'grpo': grpo,
    'ppo': ppo, 'kto': kto,
}
