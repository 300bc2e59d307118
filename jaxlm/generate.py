"""Continues text with a trained model.

  python -m jaxlm.generate --model=runs/quickstart --prompt="def "
  python -m jaxlm.generate --model=runs/quickstart --prompt="def " --prompt="class " --temperature=0.8 --top_p=0.95
  python -m jaxlm.generate --model=runs/large --draft=runs/small --prompt="def " --stream
  python -m jaxlm.generate --model=runs/glm --special --prompt="def [MASK] return x"          # fills the blank

Prints each prompt with its continuation; several are separated by a line of dashes.
"""
from jaxlm import programs
from jaxlm.errors import JaxlmError

flags = programs.Flags()
_MODEL = flags.DEFINE_string('model', None, 'A run directory, a Hugging Face folder, or a GGUF file.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be given several times.')
_PROMPT_FILE = flags.DEFINE_multi_string('prompt_file', [], 'A file whose whole text is a prompt; may be repeated.')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', None, 'Length of a continuation in tokens, at most. '
                                       'By default 64, or what learned positions leave room for.')
_TEMPERATURE = flags.DEFINE_float('temperature', None, 'Divides logits before drawing; 0: the likeliest token. '
                                  'By default 0.7, and 0 with beams.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among so many likeliest tokens; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among the fewest tokens that reach this probability; 1: all.')
_MIN_P = flags.DEFINE_float('min_p', 0.0, 'Draw among tokens at least this share as likely as the likeliest; 0: all.')
_REPETITION_PENALTY = flags.DEFINE_float('repetition_penalty', 1.0, 'Above 1 makes what was said less likely; 1: none.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')
_NUM_BEAMS = flags.DEFINE_integer('num_beams', 1, 'Above 1: beam search with so many beams.')
_LENGTH_PENALTY = flags.DEFINE_float('length_penalty', 1.0, 'Of beams: log-probability / length ** this; 0: none.')
_STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends a continuation, and is left out; may be repeated.')
_SPECIAL = flags.DEFINE_bool('special', False, 'Read the names of special tokens in prompts, such as [MASK], as these '
                              'tokens, not as text.')
_DRAFT = flags.DEFINE_string('draft', None, 'A smaller model with the same tokenizer that guesses tokens, which '
                             '--model checks several at a time; faster, and the same text.')
_LOOKUP = flags.DEFINE_integer('lookup', 0, 'Guess from the text itself: what followed where up to so many last tokens '
                               'stood before; 0: not.', lower_bound=0)
_GUESSES = flags.DEFINE_integer('guesses', 4, 'Tokens guessed at a time, with --draft or --lookup.', lower_bound=1)
_STREAM = flags.DEFINE_bool('stream', False, 'Print the continuation of a prompt while it is produced.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of parameters and computing; default: the run\'s.')

SEPARATOR = '-' * 40


def main(argv: list[str]) -> None:
  """Prints what the flags ask for."""
  del argv
  if not _MODEL.value:
    raise JaxlmError('--model is missing; give a run directory, a Hugging Face folder or a GGUF file.')
  prompts = list(_PROMPT.value) + [_read(file) for file in _PROMPT_FILE.value]
  if not prompts:
    raise JaxlmError('There is nothing to continue; give --prompt=TEXT or --prompt_file=FILE (--prompt= begins a '
                     'text).')
  if _STREAM.value and len(prompts) > 1:
    raise JaxlmError(f'--stream prints one continuation as it comes; give one prompt, not {len(prompts)}.')
  from jaxlm import loading  # late, for it imports jax
  model = loading.load(_MODEL.value, dtype=_DTYPE.value)
  max_new_tokens = _MAX_NEW_TOKENS.value
  if max_new_tokens is None:
    max_new_tokens = min(64, model.room(prompts))
  temperature = _TEMPERATURE.value
  if temperature is None:
    temperature = 0.7 if _NUM_BEAMS.value == 1 else 0.0  # small models repeat themselves without end when greedy
  draft = loading.load(_DRAFT.value, dtype=_DTYPE.value) if _DRAFT.value else None
  say = lambda text: print(text, end='', flush=True)
  if _STREAM.value:
    say(prompts[0])
  continuations = model.generate(
      prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=_TOP_K.value,
      top_p=_TOP_P.value, min_p=_MIN_P.value, repetition_penalty=_REPETITION_PENALTY.value, seed=_SEED.value,
      stop=_STOP.value, num_beams=_NUM_BEAMS.value, length_penalty=_LENGTH_PENALTY.value, special=_SPECIAL.value,
      draft=draft, lookup=_LOOKUP.value, guesses=_GUESSES.value,
      heard=(lambda _, text: say(text)) if _STREAM.value else None)
  if _STREAM.value:
    say('\n')
    return
  for number, (prompt, continuation) in enumerate(zip(prompts, continuations)):
    if number:
      print(SEPARATOR)
    print(prompt + continuation)


def _read(file: str) -> str:
  try:
    with open(file, encoding='utf-8') as f:
      return f.read()
  except (OSError, UnicodeDecodeError) as e:
    raise JaxlmError(f'--prompt_file={file} cannot be read as UTF-8 text: {getattr(e, "strerror", None) or e}.') from e


if __name__ == '__main__':
  programs.run(main)
