"""Holds a family to `transformers`: a tiny model of theirs goes out, comes in, goes back, and computes the same.

  check(tmp_path, transformers.GPT2LMHeadModel(config))            # everything that such a model can be asked
  check(tmp_path, model, gradients=True, greedy=False, atol=2e-4)  # with a reason beside it
"""
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

import safetensors.numpy  # noqa: E402

import jaxlm  # noqa: E402
from jaxlm import hf, losses, reading, trees  # noqa: E402
from jaxlm.families import table  # noqa: E402

ATOL = 1e-4          # float32, other kernels: logits of about 3, the bound
LENGTHS = (12, 7, 3)  # of the rows of a padded batch
SOURCES = (9, 11, 4)  # of an encoder-decoder's sources
NEW = 32             # tokens that are continued


def randomised(model: Any, seed: int = 0, std: float = 0.15) -> Any:
  """The model with every parameter far from its initial symmetry: no bias is 0, no scale is 1."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):  # sines are none
      parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
  return model.eval()


def check(tmp_path: Any, model: Any, *, gradients: bool = False, greedy: bool = True, packed: bool = True,
          atol: float = ATOL, seed: int = 0) -> Any:
  """Asks a model of theirs and ours the same questions; returns ours, loaded from its folder.

  Args:
    model: of any class that a family lists, tiny, on a CPU; it is randomised here.
    gradients: compare those of the language model's loss, too.
    greedy: compare 32 greedy tokens, where the class generates.
    packed: compare documents in one row with each alone.
    atol: of hidden states, logits and gradients.
  """
  theirs = tmp_path / 'theirs'
  randomised(model, seed).save_pretrained(theirs)
  lm = jaxlm.load(str(theirs))
  rng = np.random.default_rng(seed)
  rows = [rng.integers(3, lm.model.config.vocab_size, (3, max(lengths))) for lengths in (LENGTHS, SOURCES)]
  masks = [np.arange(max(lengths)) < np.array(lengths)[:, None] for lengths in (LENGTHS, SOURCES)]
  pad = getattr(model.config, 'pad_token_id', None) or 0  # by which their classifiers find a row's last token
  rows = [np.where(mask, row, pad) for row, mask in zip(rows, masks, strict=True)]
  batch = Rows(lm, *rows, *masks)
  batch.agrees(model, atol)
  if packed:
    packs(lm, rows, atol)
  goes_back(tmp_path, model, lm, batch, atol)
  if greedy and hasattr(model, 'generate') and model.can_generate() and reading.continues(lm.model.config):
    continues_alike(model, lm, batch)
  if gradients:
    learns_alike(tmp_path, model, lm, batch, atol)
  return lm


class Rows:
  """A padded batch for both sides."""

  def __init__(self, lm, tokens_BT, source_BS, mask_BT, mask_BS):
    self.lm, self.tokens, self.source, self.mask, self.source_mask = lm, tokens_BT, source_BS, mask_BT, mask_BS
    self.encodes = lm.model.config.structure == 'encoder_decoder'

  def of_theirs(self) -> dict[str, Any]:
    tensor = lambda x: torch.tensor(np.asarray(x, np.int64))
    if not self.encodes:
      return dict(input_ids=tensor(self.tokens), attention_mask=tensor(self.mask))
    return dict(input_ids=tensor(self.source), attention_mask=tensor(self.source_mask),
                decoder_input_ids=tensor(self.tokens), decoder_attention_mask=tensor(self.mask))

  def of_ours(self) -> tuple:
    return (self.tokens, self.source, self.mask, self.source_mask) if self.encodes else (self.tokens, self.mask)

  def agrees(self, model: Any, atol: float) -> None:
    """Hidden states, logits, label scores and pooled states are theirs, wherever there is a token."""
    lm, head = self.lm, self.lm.model.config.head
    with torch.no_grad():
      out = model(**self.of_theirs(), output_hidden_states=True)
    states = out.decoder_hidden_states if self.encodes else out.hidden_states
    last = getattr(out, 'last_hidden_state', None)
    last = states[-1] if last is None else last
    same = lambda got, want: np.testing.assert_allclose(np.asarray(got)[self.mask], want.numpy()[self.mask], atol=atol)
    projected = last.shape[-1] != lm.model.config.width  # OPT-350m's, to what its logits alone are made of
    if lm.model.config.structure != 'two_stream' and not projected:
      same(lm.hidden(*self.of_ours()), last)
    if head.lm and lm.model.config.structure != 'two_stream':
      same(lm.logits(*self.of_ours()), out.logits if hasattr(out, 'logits') else out.prediction_logits)
    if head.labels in ('token', 'replaced'):
      scores = out.logits if out.logits.ndim == 3 else out.logits[..., None]
      same(lm.scores(*self.of_ours()), scores)
    if head.labels == 'span':
      same(lm.scores(*self.of_ours()), torch.stack([out.start_logits, out.end_logits], -1))
    if head.labels == 'sequence':
      names = ('seq_relationship_logits', 'sop_logits', 'logits')  # of two heads, the second
      want = next(getattr(out, name) for name in names if hasattr(out, name))
      np.testing.assert_allclose(lm.scores(*self.of_ours()), want.numpy(), atol=atol)
    if head.labels == 'none' and head.pooler != 'none':
      batch = reading.batch_of(lm.model.config, jnp.asarray(self.tokens, jnp.int32), jnp.asarray(self.mask))
      pooled = jax.jit(lambda params: lm.model.apply({'params': params}, batch).scores)(lm.params)
      np.testing.assert_allclose(pooled, out.pooler_output.numpy(), atol=atol)


def packs(lm: Any, rows: list[np.ndarray], atol: float) -> None:
  """Two documents in one row, and padding, have the hidden states of each alone."""
  config, (a, b) = lm.model.config, (7, 4)
  T, parts = a + b + 2, [(0, a), (a, a + b)]
  row = lambda values: np.concatenate([*values, np.zeros(2, int)])[None]
  segments = row([np.full(end - start, i + 1) for i, (start, end) in enumerate(parts)])
  positions = row([np.arange(end - start) for start, end in parts])
  one = lambda documents: {
      'tokens': documents, 'segment_ids': segments, 'positions': positions, 'order': positions + 1,
      **({'source_tokens': documents[:, ::-1], 'source_segment_ids': segments[:, ::-1],
          'source_positions': positions[:, ::-1]} if config.structure == 'encoder_decoder' else {})}
  tokens = row([rows[0][0, :a], rows[0][0, a:a + b]])
  packed = {k: np.asarray(v, np.int32) for k, v in one(tokens).items()}
  run = jax.jit(lambda batch: lm.model.apply({'params': lm.params}, batch).hidden)
  together = run(packed)
  for number, (start, end) in enumerate(parts):
    alone = {k: np.where(packed['source_segment_ids' if k.startswith('source') else 'segment_ids'] == number + 1, v, 0)
             for k, v in packed.items()}
    np.testing.assert_allclose(np.asarray(together)[0, start:end], np.asarray(run(alone))[0, start:end], atol=atol)
  assert np.isfinite(np.asarray(together)).all() and together.shape[1] == T


def goes_back(tmp_path: Any, model: Any, lm: Any, batch: Rows, atol: float) -> None:
  """What is written loads there without a complaint, is bit for bit what was read, and computes the same."""
  theirs, ours = tmp_path / 'theirs', tmp_path / 'ours'
  folder = hf.load_folder(theirs)
  hf.save_folder(ours, folder.model, lm.params, kept=folder.hf, unused=folder.unused)
  before, after = ({name: x for file in sorted(path.glob('*.safetensors'))
                    for name, x in safetensors.numpy.load_file(file).items()} for path in (theirs, ours))
  family = table.by_model_type(folder.hf['model_type'])
  for pattern, replacement in getattr(family, 'RENAMED', ()):
    before = {re.sub(pattern, replacement, name): x for name, x in before.items()}
  for name, x in after.items():
    if name not in before and re.fullmatch(family.BUFFERS, name):
      continue  # of transformers 5.23's own making, which gives some buffers no proper name
    assert x.dtype == before[name].dtype and x.tobytes() == before[name].tobytes(), name
  back, told = type(model).from_pretrained(ours, output_loading_info=True)
  assert not any(told[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told
  kept, given = json.loads((ours / 'config.json').read_text()), json.loads((theirs / 'config.json').read_text())
  assert kept['model_type'] == given['model_type'] and kept['architectures'] == given['architectures']
  with torch.no_grad():
    first = lambda m: next(x for x in m.eval()(**batch.of_theirs()).values() if torch.is_tensor(x))
    torch.testing.assert_close(first(back), first(model), atol=atol, rtol=0)


def continues_alike(model: Any, lm: Any, batch: Rows) -> None:
  """32 greedy tokens are theirs, or their two best differ by less than 1e-4 where ours first differ."""
  lm.eos = ()
  for row, length in enumerate(SOURCES if batch.encodes else LENGTHS):
    ids = (batch.source if batch.encodes else batch.tokens)[row, :length]
    generation = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1, pad_token_id=0,
                      output_logits=True, return_dict_in_generate=True)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
      out = model.generate(torch.tensor(ids[None]), attention_mask=torch.ones(1, length, dtype=torch.long),
                           **generation)
    want = out.sequences[0, -NEW:].tolist()
    got = lm.generate([ids.tolist()], max_new_tokens=NEW)[0]
    if got != want:
      first = next(i for i in range(NEW) if got[i] != want[i])
      best = out.logits[first][0].topk(2).values
      assert float(best[0] - best[1]) < 1e-4, (row, first, got, want)


def learns_alike(tmp_path: Any, model: Any, lm: Any, batch: Rows, atol: float) -> None:
  """Gradients of the mean loss over real targets are theirs, by way of a folder that holds theirs as weights."""
  targets = np.random.default_rng(1).integers(3, lm.model.config.vocab_size, batch.tokens.shape)
  out = model(**batch.of_theirs())
  logits = out.logits[torch.tensor(batch.mask)]
  torch.nn.functional.cross_entropy(logits, torch.tensor(targets[batch.mask])).backward()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
  model.save_pretrained(tmp_path / 'gradients')
  want = trees.flatten(hf.load_folder(tmp_path / 'gradients').params)

  ours = reading.batch_of(lm.model.config, jnp.asarray(batch.tokens, jnp.int32), jnp.asarray(batch.mask))
  if batch.encodes:
    ours |= {'source_tokens': jnp.asarray(batch.source, jnp.int32),
             'source_segment_ids': jnp.asarray(batch.source_mask, jnp.int32)}
  ours |= {'targets': jnp.asarray(targets, jnp.int32), 'loss_weights': jnp.asarray(batch.mask, jnp.float32)}
  vocabulary = losses.Vocabulary(lm.model.config.vocab_size, lm.model.config.logit_softcap, 0.0, 0.0, 512, lm.layout)
  loss = functools.partial(losses.lm_loss, lm.model, vocabulary, batch=ours, rng=None)
  got = trees.flatten(jax.jit(jax.grad(lambda params: loss(params)[0] / batch.mask.sum()))(lm.params))
  for path, x in want.items():
    np.testing.assert_allclose(np.asarray(got[path])[tuple(slice(n) for n in x.shape)], x, atol=atol, err_msg=path)
