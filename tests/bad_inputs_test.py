"""Bad inputs, each one clear line, and nothing saved is harmed by any.

CASES is the table in BUILD_NOTES.md; `python tests/bad_inputs_test.py` prints it.
"""
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import subprocess
import sys
from typing import Callable, Mapping

import pytest

TINY = '''"""Two layers of width 32 on the text files beside it."""
from jaxlm import config as base


def get_config(arg=None):
  arg = base.parse_arg(arg, size=base.one_of('small', ('small', 'large')), rate=1e-3)
  config = base.smoke(base.default())
  config.update(steps=2, batch_size=8, seq_len=32, tensorboard=False)
  config.model.update(num_layers=2, width=32, vocab_pad_to=64)
  config.model.mlp.width = 64
  config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=8)
  config.data.update(source='text', paths='corpus/*.txt', holdout=0.2, tokenizer='pieces')
  config.eval.update(batch_size=8, max_tokens=2048, prompts=())
  config.optim.update(lr=arg.rate, total_steps=4)
  return config
'''
BASE = 'from jaxlm import config as base\ndef get_config():\n  config = base.default()\n'
TASK = '''from jaxlm import config as base
def get_config(arg):
  config = base.smoke(base.tune(base.default(), 'task.json', arg))
  config.data.update(tokenizer='pieces', too_long='refuse', task_examples=0)
  config.model.head.update(labels='sequence' if arg == 'classify' else 'none', lm=arg != 'classify')
  return config
'''
WORDS = json.dumps(dict(version='1.0', added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None,
                        decoder=None, model=dict(type='WordLevel', vocab={'a': 0, 'b': 1}, unk_token='a')))

ENV = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}  # of programs started elsewhere


# ---- what some cases need besides files ----------------------------------------------------------------------------


def in_use(stack: contextlib.ExitStack) -> None:
  """Another process holds the run directory until the case ends."""
  code = 'import sys\nfrom jaxlm.rundir import lock\nwith lock("runs/tiny"): print(flush=True); sys.stdin.read()'
  holder = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV)
  stack.callback(holder.wait)
  stack.callback(holder.stdin.close)
  holder.stdout.readline()


def newer(_) -> None:
  """run.json as a later jaxlm would write it."""
  file = pathlib.Path('runs/tiny/run.json')
  file.write_text(json.dumps({**json.loads(file.read_text()), 'format': 2}))


def edited_tokenizer(_) -> None:
  """One special token has another name."""
  for file in pathlib.Path('pieces').iterdir():
    file.write_text(file.read_text().replace('<|pad|>', '<|fill|>'))


def damaged(_) -> None:
  """A byte of the only checkpoint is another."""
  file = max(pathlib.Path('runs/tiny/checkpoints/2/params').rglob('d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def table_of_content(_) -> None:
  """A table without a column of the usual name."""
  import pyarrow.parquet
  pyarrow.parquet.write_table(pyarrow.table(dict(id=[1], content=['fine'])), 'r.parquet')


def truncated_parquet(_) -> None:
  table_of_content(_)
  os.truncate('r.parquet', os.path.getsize('r.parquet') - 9)


def of_task(kind: str, *records: str, **more: str) -> Mapping[str, str]:
  """Files of a task: its description, and records by line."""
  described = dict(kind=kind, files={'train': 'train.jsonl', 'validation': 'validation.jsonl'}, labels=['no', 'yes'])
  good = {'classify': '{"text": "a", "label": "no"}', 'text': '{"text": "a", "label": "b"}',
          'chat': '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'}[kind]
  return {'task.py': TASK, 'task.json': json.dumps(described), 'validation.jsonl': good + '\n',
          'train.jsonl': '\n'.join([*[good] * 3416, *records]) + '\n'} | more


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """A bad input and the lines it gives.

  Attributes:
    what: in words.
    argv: of `python -m jaxlm.main`.
    lines: on stderr, each after 'error: '; {here} is the working folder, {digest} 12 letters, {differences} parameters
      with their shapes, {host} and {pid} another process's.
    make: files to write first ({path: content, None to remove it}), or a function.
  """
  what: str
  argv: str
  lines: tuple[str, ...]
  make: Mapping[str, str | bytes | None] | Callable[[contextlib.ExitStack], None] | None = None


TRAINS = '--config=task.py:{} --workdir=runs/new'  # an objective
CASES = (
    # ---- the command line ----
    Case('no `--config`', '',
         ('--config is missing; give an experiment, for instance --config=experiments/quickstart.py.',)),
    Case('`--config` without a value', '--config',
         ('Missing value for flag --config.',)),
    Case('a config file that is not there', '--config=experiments/quickstrat.py',
         ("No config file 'experiments/quickstrat.py'; give an experiment such as experiments/quickstart.py.",)),
    Case('a config file that is not Python', '--config=corpus/10.txt',
         ('corpus/10.txt is not a Python file; give an experiment such as experiments/quickstart.py.',)),
    Case('a config file with a syntax error', '--config=bad.py',
         ('bad.py:2: invalid syntax.',),
         {'bad.py': 'x = 1\ndef get_config(:\n'}),
    Case('a config file without `get_config`', '--config=bad.py',
         ('bad.py has no get_config; an experiment defines get_config(arg=None), which returns a config.',),
         {'bad.py': 'x = 1\n'}),
    Case('a `get_config` that raises', '--config=bad.py',
         ('bad.py:2: KeyError: 1.',),
         {'bad.py': 'def get_config():\n  return {}[1]\n'}),
    Case('a `get_config` that imports what is not there', '--config=bad.py',
         ("bad.py:1: ModuleNotFoundError: No module named 'nonesuch'.",),
         {'bad.py': 'import nonesuch\n'}),
    Case('a `get_config` that sets a misspelt key', '--config=bad.py',
         ("bad.py:4: no key 'warmup_step' there. Did you mean 'warmup_steps'?",),
         {'bad.py': BASE + '  config.optim.warmup_step = 3\n'}),
    Case('a `get_config` that updates a misspelt key', '--config=bad.py',
         ("bad.py:4: no key 'lrr' there. Did you mean 'lr'?",),
         {'bad.py': BASE + '  config.optim.update(lrr=3e-4)\n'}),
    Case('a `get_config` that returns no config', '--config=bad.py',
         ('bad.py: get_config must return a ConfigDict, as jaxlm.config.default() makes one; got int.',),
         {'bad.py': 'def get_config():\n  return 1\n'}),
    Case('an argument for a `get_config` that takes none', '--config=bad.py:small',
         ('bad.py: get_config takes no argument; leave :small out.',),
         {'bad.py': 'def get_config():\n  return 1\n'}),
    Case('an unknown argument of an experiment', '--config=tiny.py:sise=small',
         ("Unknown argument 'sise' of the experiment. Known: size, rate. Did you mean 'size'?",)),
    Case('an unknown value of an argument', '--config=tiny.py:size=smal',
         ("Unknown size 'smal'. Known: small, large. Did you mean 'small'?",)),
    Case('an argument of another type', '--config=tiny.py:rate=fast',
         ("Argument rate wants float, got 'fast'.",)),
    Case('a misspelt key', '--config=tiny.py --config.optim.lrr=3e-4',
         ("config.optim.lrr is unknown. Did you mean 'optim.lr'?",)),
    Case('a misspelt group', '--config=tiny.py --config.optm.lr=3e-4',
         ("config.optm.lr is unknown. Did you mean 'optim.lr'?",)),
    Case('a key without its group', '--config=tiny.py --config.lr=3e-4',
         ("config.lr is unknown. Did you mean 'optim.lr'?",)),
    Case('a group as a key', '--config=tiny.py --config.optim=adamw',
         ('config.optim is a group of keys; set one of them, for instance config.optim.name.',)),
    Case('text for an integer', '--config=tiny.py --config.steps=abc',
         ("config.steps must be an integer, at least 1; got 'abc'.",)),
    Case('a fraction for an integer', '--config=tiny.py --config.steps=1.5',
         ("config.steps must be an integer, at least 1; got '1.5'.",)),
    Case('text for a number', '--config=tiny.py --config.optim.lr=high',
         ("config.optim.lr must be a number, above 0.0; got 'high'.",)),
    Case('a flag that is neither True nor False', '--config=tiny.py --config.tensorboard=maybe',
         ("config.tensorboard must be True or False; got 'maybe'.",)),
    Case('a tuple that is none', '--config=tiny.py --config.batch_ramp=((3,',
         ("config.batch_ramp must be a tuple of (until this step, batch size) pairs; got '((3,'.",)),
    Case('a key without a value', '--config=tiny.py --config.steps',
         ('--config.steps has no value; give --config.steps=VALUE.',)),
    Case('three faults at once', '--config=tiny.py --config.steps=0 --config.optim.lr=-1 --config.optim.b3=0',
         ('config.optim.b3 is unknown. Known there: name, lr, layer_decay, schedule, warmup_steps, total_steps, '
          'final_fraction, decay_fraction, weight_decay, decay_rules, lr_rules, freeze, clip_norm, ema_decay.',
          'config.steps must be an integer, at least 1; got 0 (int).',
          'config.optim.lr must be a number, above 0.0; got -1.0 (float).')),
    Case('an unknown flag', '--config=tiny.py --wrkdir=here',
         ("Unknown flag --wrkdir. Did you mean 'workdir'? --help lists them.",)),
    Case('a word that is no flag', '--config=tiny.py runs/here',
         ("Unknown argument 'runs/here'; flags start with --, as --config=runs/here.",)),
    Case('one flag of a run of several processes', '--config=tiny.py --process_id=0',
         ('--coordinator, --num_processes and --process_id go together; give all three, or none where a launcher '
          'tells.',)),
    Case('a process number that is too high',
         '--config=tiny.py --coordinator=localhost:1 --num_processes=2 --process_id=2',
         ('--process_id=2 must be below --num_processes=2.',)),
    Case('a coordinator without a port', '--config=tiny.py --coordinator=node1 --num_processes=2 --process_id=0',
         ("--coordinator must be host:port of process 0; got 'node1'.",)),
    Case('an unknown group of `--allow_change`', '--config=tiny.py --allow_change=modle',
         ("--allow_change: unknown 'modle'. Known: seed, steps, batch_size, batch_ramp, accumulation, seq_len, "
          'log_every, eval_every, save_every, heartbeat_s, watchdog_s, compiler_options, tensorboard, on_nonfinite, '
          'max_rewinds, model, objective, data, tokenizer, loss, optim, mesh, sharding, pipeline, precision, '
          "checkpoint, eval. Did you mean 'model'?",)),
    # ---- single keys ----
    Case('a learning rate that is nan', '--config=tiny.py --config.optim.lr=nan',
         ('config.optim.lr must be a number, above 0.0; got nan (float).',)),
    Case('a negative learning rate', '--config=tiny.py --config.optim.lr=-1',
         ('config.optim.lr must be a number, above 0.0; got -1.0 (float).',)),
    Case('an infinite clipping norm', '--config=tiny.py --config.optim.clip_norm=inf',
         ('config.optim.clip_norm must be a number, at least 0.0; got inf (float).',)),
    Case('a dropout of 1', '--config=tiny.py --config.model.dropout=1',
         ('config.model.dropout must be a number, at least 0 and less than 1; got 1.0 (float).',)),
    Case('no heads', '--config=tiny.py --config.model.attention.num_heads=0',
         ('config.model.attention.num_heads must be an integer, at least 1; got 0 (int).',)),
    Case('a mesh axis of size 0', '--config=tiny.py --config.mesh.data=0',
         ('config.mesh.data must be an integer, at least 1, or -1 for what is left; got 0 (int).',)),
    Case('another choice', '--config=tiny.py --config.precision.compute=float8',
         ("config.precision.compute must be text, one of 'float32', 'bfloat16', 'float16'; got 'float8' (str).",)),
    Case('an unknown objective', '--config=tiny.py --config.objective.name=casual',
         ("config.objective.name: Unknown objective 'casual'. Known: answer, causal, classify, contrast, "
          'denoising, extract, fim, grpo, infilling, kto, masked, multi_label, multi_token, next_sentence, '
          'permutation, ppo, prefer, prefix, regress, replaced, reward, sentence_order, span, tag, translation, ul2;'
          ' or pass "module:attribute". Did you mean \'causal\'?',)),
    Case('an unknown optimizer', '--config=tiny.py --config.optim.name=adam',
         ("config.optim.name: Unknown optimizer 'adam'. Known: adafactor, adagrad, adamw, lamb, lars, lion, muon, "
          'novograd, rmsprop, sgd; or pass "module:attribute". Did you mean \'adamw\'?',)),
    Case('an unknown schedule', '--config=tiny.py --config.optim.schedule=cosin',
         ("config.optim.schedule: Unknown schedule 'cosin'. Known: constant, cosine, linear, rsqrt, wsd; or pass "
          '"module:attribute". Did you mean \'cosine\'?',)),
    Case('an unknown activation', '--config=tiny.py --config.model.mlp.activation=swish',
         ("config.model.mlp.activation: Unknown activation 'swish'. Known: gelu, gelu_tanh, relu, relu2, silu, tanh; "
          'or pass "module:attribute".',)),
    Case('unknown positions', '--config=tiny.py --config.model.positions.kind=ropes',
         ("config.model.positions.kind: Unknown kind of positions 'ropes'. Known: alibi, buckets, learned, none, "
          'relative, rope, sinusoidal; or pass "module:attribute". Did you mean \'rope\'?',)),
    Case('an unknown rope scaling', '--config=tiny.py --config.model.positions.rope.scaling=llama',
         ("config.model.positions.rope.scaling: Unknown rope scaling 'llama'. Known: linear, llama3, none, ntk, "
          'yarn; or pass "module:attribute". Did you mean \'llama3\'?',)),
    Case('an unknown kernel', '--config=tiny.py --config.model.attention.kernel=flash',
         ("config.model.attention.kernel: Unknown attention kernel 'flash'. Known: auto, blockwise, cudnn, dense, "
          'ring; or pass "module:attribute".',)),
    Case('a kernel that does not import', '--config=tiny.py --config.model.attention.kernel=my_lab.kernels:ring',
         ("config.model.attention.kernel: Cannot import attention kernel 'my_lab.kernels:ring': No module named "
          "'my_lab'.",)),
    Case('an unknown remat policy', '--config=tiny.py --config.model.remat=dot',
         ("config.model.remat: Unknown remat policy 'dot'. Known: dots, full, names, none, offload; or pass "
          '"module:attribute". Did you mean \'dots\'?',)),
    Case('an unknown remat name', '--config=tiny.py --config.model.remat_names=attention_outs',
         ("config.model.remat_names: unknown 'attention_outs'. Known: attention_out, attention_lse, mlp_hidden.",)),
    Case('an unknown source', '--config=tiny.py --config.data.source=parqet',
         ('config.data.source: Unknown source \'parqet\'. Known: arrayrecord, fasta, hf_dataset, jsonl, llmc, '
          'megatron, nanogpt, parquet, stdlib, text; or pass "module:attribute". Did you mean \'parquet\'?',)),
    Case('an unknown packing', '--config=tiny.py --config.data.packing=best',
         ("config.data.packing: Unknown packing 'best'. Known: best_fit, concatenated, contiguous, padded; or pass "
          '"module:attribute". Did you mean \'best_fit\'?',)),
    Case('an unknown tokenizer', '--config=tiny.py --config.data.tokenizer=bpee',
         ("config.data.tokenizer: Unknown tokenizer 'bpee'. Known: bytes, bpe, unigram, wordpiece; or give the "
          "path of a tokenizer.json or of a SentencePiece model. Did you mean 'bpe'?",)),
    Case('a pattern that is no regular expression', '--config=tiny.py --config.optim.freeze=(.*',
         ("config.optim.freeze: '(.*' is not a regular expression: missing ), unterminated subpattern at position "
          '0.',)),
    # ---- keys that do not go together ----
    Case('heads that do not divide by key heads', '--config=tiny.py --config.model.attention.num_kv_heads=3',
         ('config.model.attention: num_heads=4 does not divide by num_kv_heads=3; each key head serves a whole '
          'group of query heads.',)),
    Case('a width that does not divide by heads', '--config=bad.py',
         ('config.model.width=100 does not divide by attention.num_heads=12; change one, or set '
          'attention.head_dim.',),
         {'bad.py': BASE + '  config.model.width = 100\n  return config\n'}),
    Case('rows longer than the learned positions', '--config=tiny.py --config.model.max_length=16',
         ('config.seq_len=32 is longer than config.model.max_length=16, the learned positions there are; raise '
          'that.',)),
    Case('dropout of attention in the blockwise kernel',
         '--config=tiny.py --config.model.attention.kernel=blockwise --config.model.attention.dropout=0.1',
         ('config.model.attention.dropout: the blockwise kernel cannot drop attention probabilities; set it to 0, '
          "or attention.kernel='dense'.",)),
    Case('an odd head for rope',
         '--config=tiny.py --config.model.positions.kind=rope --config.model.attention.head_dim=7',
         ('config.model.attention.head_dim times positions.rope.fraction is 7; rope rotates pairs, so make it even.',)),
    Case('a warmup longer than the run', '--config=tiny.py --config.optim.warmup_steps=5',
         ('config.optim.warmup_steps=5 is more than total_steps=4; the rate would never reach its peak.',)),
    Case('a batch that does not divide by accumulation', '--config=tiny.py --config.accumulation=3',
         ('config.batch_size=8 does not divide by config.accumulation=3; every microbatch has the same number of '
          'examples.',)),
    Case('a batch ramp whose steps do not rise', '--config=tiny.py --config.batch_ramp=((5,8),(3,16))',
         ('config.batch_ramp: steps must rise; got (5, 3).',)),
    Case('two sources of one name',
         '--config=tiny.py '
         '--config.data.mixture="((\'a\',\'text\',\'corpus/1*.txt\',1),(\'a\',\'text\',\'corpus/2*.txt\',1))"',
         ('config.data.mixture: names must differ; got a, a.',)),
    Case('weights for another number of sources', '--config=tiny.py --config.data.phases=((100,(1,2)),)',
         ('config.data.phases: 2 weights from example 100, but the mixture has 1 sources; give each one.',)),
    Case('two mesh axes left open', '--config=tiny.py --config.mesh.fsdp=-1',
         ('config.mesh: only one axis may be -1; got data, fsdp.',)),
    Case('a run to resume and one to begin from',
         '--config=tiny.py --config.checkpoint.resume=runs/tiny --config.checkpoint.init_from=runs/tiny',
         ('config.checkpoint: resume and init_from are both set; resume continues a run, init_from only takes its '
          'weights.',)),
    # ---- the mesh; here are 8 devices ----
    Case('a mesh that does not multiply out', '--config=tiny.py --config.mesh.data=3',
         ('config.mesh: data=3 needs 3 devices, there are 8; change a size, or set one to -1 to take what is left.',)),
    Case('a mesh with a rest', '--config=tiny.py --config.mesh.fsdp=3',
         ('config.mesh: 8 devices do not divide by 3 (data=-1 × fsdp=3); change a size.',)),
    Case('a batch that does not divide by the mesh', '--config=tiny.py --config.batch_size=12',
         ('batch: dim 0 (act_batch=12) does not divide by mesh axis data=8; set config.batch_size (and '
          'config.accumulation) so that each microbatch divides by it.',)),
    Case('microbatches that do not divide by the mesh', '--config=tiny.py --config.accumulation=2',
         ('batch: dim 0 (act_batch=4) does not divide by mesh axis data=8; set config.batch_size (and '
          'config.accumulation) so that each microbatch divides by it.',)),
    Case('heads that do not divide by the mesh', '--config=tiny.py --config.mesh.data=1 --config.mesh.tensor=8',
         ('stack/period/slot_0/attention/key/bias: dim 1 (kv_heads=4) does not divide by mesh axis tensor=8; choose '
          "fewer devices there, or give ('kv_heads', None) in config.sharding.rules.",)),
    Case('a vocabulary that does not divide by the mesh',
         '--config=tiny.py --config.mesh.tensor=2 --config.model.vocab_pad_to=1 --config.model.vocab_size=259 '
         '--config.model.tie_embeddings=false',
         ('embed/embedding: dim 0 (vocab=259) does not divide by mesh axis tensor=2; set config.model.vocab_pad_to to '
          'a multiple of it.',)),
    Case('an axis that no rule names',
         '--config=tiny.py --config.sharding.rules="((\'act_batch\',\'data\'),(\'act_length\',None))"',
         ("activation: no rule for logical axis 'act_stream'; add one to config.sharding.rules.",)),
    Case('a rule to an unknown mesh axis',
         '--config=tiny.py --config.sharding.rules="((\'act_length\',None),(\'act_batch\',\'dta\'))"',
         ("config.sharding.rules: 'act_batch' goes to unknown mesh axis 'dta'. Known: replica, pipe, data, fsdp, "
          'expert, seq, tensor.',)),
    # ---- data ----
    Case('paths that match nothing', '--config=tiny.py --config.data.paths=nothing/*.txt',
         ("config.data.paths: 'nothing/*.txt' matches no file (looked from {here}).",)),
    Case('no paths', '--config=tiny.py --config.data.paths=',
         ('config.data.paths is empty; give files as globs joined by commas, "corpus/**/*.txt".',)),
    Case('an empty corpus', '--config=tiny.py --config.data.paths=empty/*.txt',
         ('The text source has no text: its 2 files are empty; see config.data.paths.',),
         {'empty/a.txt': '', 'empty/b.txt': ''}),
    Case('an empty corpus for a tokenizer',
         '--config=tiny.py --config.data.paths=empty/*.txt --config.data.tokenizer=bpe',
         ("There is no text to train tokenizer 'bpe' on: the corpus is empty; see config.data.paths.",),
         {'empty/a.txt': ''}),
    Case('a corpus that is all held out', '--config=tiny.py --config.data.holdout=0.9999999',
         ("Source 'text' has no text to train on: 30 documents, 30 of them held out; lower config.data.holdout or "
          'give more text.',)),
    Case('text that is not UTF-8', '--config=tiny.py --config.data.paths=latin.txt',
         ('{here}/latin.txt:2: not UTF-8 at byte 12; convert the file, or leave it out of config.data.paths.',),
         {'latin.txt': b'one line\ncaf\xe9\n'}),
    Case('a corrupted record', '--config=tiny.py --config.data.source=jsonl --config.data.paths=r.jsonl',
         ('{here}/r.jsonl:2: not a line of JSON (Invalid control character at: line 1 column 15 (char 14)); mend '
          'or remove it.',),
         {'r.jsonl': '{"text": "fine"}\n{"text": "torn\n'}),
    Case('a record that is no object', '--config=tiny.py --config.data.source=jsonl --config.data.paths=r.jsonl',
         ('{here}/r.jsonl:2: wanted a JSON object, got list.',),
         {'r.jsonl': '{"text": "fine"}\n[1, 2]\n'}),
    Case('a record without the field', '--config=tiny.py --config.data.source=jsonl --config.data.paths=r.jsonl',
         ("{here}/r.jsonl:1: no field 'text'; it has 'body'. Set config.data.text_field.",),
         {'r.jsonl': '{"body": "fine"}\n'}),
    Case('a record whose field is no text', '--config=tiny.py --config.data.source=jsonl --config.data.paths=r.jsonl',
         ("{here}/r.jsonl:1: field 'text' wants text, got int.",),
         {'r.jsonl': '{"text": 3}\n'}),
    Case('a truncated gzip file', '--config=tiny.py --config.data.source=jsonl --config.data.paths=r.jsonl.gz',
         ('{here}/r.jsonl.gz is damaged after byte 17 of its decompressed text: Compressed file ended before the '
          'end-of-stream marker was reached; restore it, or leave it out of config.data.paths.',),
         {'r.jsonl.gz': gzip.compress(b'{"text": "fine"}\n' * 9, mtime=0)[:-12]}),
    Case('a gzip file that is none', '--config=tiny.py --config.data.source=jsonl --config.data.paths=r.jsonl.gz',
         ('{here}/r.jsonl.gz is damaged after byte 0 of its decompressed text: Not a gzipped file (b\'{"\'); '
          'restore it, or leave it out of config.data.paths.',),
         {'r.jsonl.gz': '{"text": "fine"}\n'}),
    Case('a Parquet file that is none', '--config=tiny.py --config.data.source=parquet',
         ('{here}/corpus/10.txt is no Parquet file, or is damaged: Parquet magic bytes not found in footer; restore'
          ' it, or leave it out of config.data.paths.',)),
    Case('a truncated Parquet file', '--config=tiny.py --config.data.source=parquet --config.data.paths=r.parquet',
         ('{here}/r.parquet is no Parquet file, or is damaged: Parquet magic bytes not found in footer; restore it,'
          ' or leave it out of config.data.paths.',),
         truncated_parquet),
    Case('a column that a table lacks',
         '--config=tiny.py --config.data.source=parquet --config.data.paths=r.parquet '
         '--config.data.text_field=contents',
         ("{here}/r.parquet: no column 'contents'; it has 'id', 'content'. Set config.data.text_field. Did you mean"
          " 'content'?",),
         table_of_content),
    Case('a column of another type',
         '--config=tiny.py --config.data.source=parquet --config.data.paths=r.parquet --config.data.text_field=id',
         ("{here}/r.parquet: column 'id' wants text, or lists of token ids, got int64. Set config.data.text_field.",),
         table_of_content),
    Case('a split that a saved dataset lacks',
         '--config=tiny.py --config.data.source=hf_dataset --config.data.paths=saved --config.data.split=tets',
         ("{here}/saved has no split 'tets'; it has 'train', 'test'. Set config.data.split. Did you mean 'test'?",),
         {'saved/dataset_dict.json': '{"splits": ["train", "test"]}'}),
    Case('a folder that is no saved dataset',
         '--config=tiny.py --config.data.source=hf_dataset --config.data.paths=corpus',
         ('{here}/corpus is no saved dataset: it has neither state.json nor dataset_dict.json; write it with the '
          "datasets package's save_to_disk, or set config.data.source to what its files are.",)),
    Case('an ArrayRecord file that is none', '--config=tiny.py --config.data.source=arrayrecord',
         ('{here}/corpus/10.txt is no ArrayRecord file, or is damaged after record 0: ArrayRecord file should be at'
          ' least 64KB big; restore it, or leave it out of config.data.paths.',)),
    Case('a protein sequence without a header', '--config=tiny.py --config.data.source=fasta --config.data.paths=r.fa',
         ('{here}/r.fa:1: a sequence without a header; FASTA has a line that begins with ">" before each.',),
         {'r.fa': 'MKVLA\n'}),
    Case('a token file of an odd number of bytes',
         '--config=tiny.py --config.data.source=nanogpt --config.data.paths=train.bin',
         ('{here}/train.bin has 3 bytes, an odd number; nanoGPT writes 16 bits a token. Restore it, or leave it out'
          ' of config.data.paths.',),
         {'train.bin': b'\1\0\2'}),
    Case("a token file with llm.c's header for nanoGPT's",
         '--config=tiny.py --config.data.source=nanogpt --config.data.paths=train.bin',
         ("{here}/train.bin has llm.c's header; set config.data.source='llmc'.",),
         {'train.bin': (20240520).to_bytes(4, 'little') + bytes(1020)}),
    Case('a token file with another magic number',
         '--config=tiny.py --config.data.source=llmc --config.data.paths=train.bin',
         ('{here}/train.bin is no token file of llm.c: wanted 1,024 bytes that begin with 20240520, version 1 or '
          '20240801, version 7; got magic number 0, version 0. Restore it, or leave it out of config.data.paths.',),
         {'train.bin': bytes(1026)}),
    Case('a token file with ids beyond the vocabulary',
         '--config=tiny.py --config.data.source=nanogpt --config.data.paths=train.bin',
         ("{here}/train.bin: the document at byte 0 holds id 50175, but tokenizer 'pieces' has 258 ids; set "
          'config.data.tokenizer to the one that made the file.',),
         {'train.bin': b'\1\0\xff\xc3' * 9}),
    Case('a damaged index', '--config=tiny.py --config.data.source=megatron --config.data.paths=train.*',
         ('{here}/train.idx is no index of Megatron-LM, or is damaged: it has 10 bytes, and 34 of them are the '
          'header; restore it, or leave it out of config.data.paths.',),
         {'train.idx': b'MMIDIDX\0\0\1', 'train.bin': b'\1\0'}),
    Case('an index without its tokens', '--config=tiny.py --config.data.source=megatron --config.data.paths=train.*',
         ('{here}/train.idx: an indexed dataset of Megatron-LM is NAME.idx and NAME.bin; there is no '
          '{here}/train.bin.',),
         {'train.idx': b'MMIDIDX\0\0\1'}),
    Case('a tokenizer trained on tokens',
         '--config=tiny.py --config.data.source=nanogpt --config.data.paths=train.bin --config.data.tokenizer=bpe',
         ("Source 'nanogpt' holds tokens, so no tokenizer can be trained here: tokenizer 'bpe' would give other "
          'ids; set config.data.tokenizer to the one that made them.',),
         {'train.bin': b'\1\0' * 9}),
    Case('a temperature beside weights that change',
         '--config=tiny.py --config.data.temperature=3.3 --config.data.phases=((100,(1,)),)',
         ('config.data.temperature=3.3 weighs sources by their sizes, for the whole run; leave config.data.phases '
          'empty, or set the temperature to 0.',)),
    Case('a temperature near 0', '--config=tiny.py --config.data.temperature=0.05',
         ('config.data.temperature must be a number, 0, or at least 0.1; got 0.05 (float).',)),
    Case('a token store that cannot be made', '--config=tiny.py --config.data.store=tiny.py/stores',
         ('Cannot prepare the token store in tiny.py/stores: Not a directory (tiny.py/stores); set '
          'config.data.store to a folder that can be written and has room.',)),
    # ---- tokenizer and vocabulary ----
    Case('a tokenizer file that is not there', '--config=tiny.py --config.data.tokenizer=my/tokenizer.json',
         ("config.data.tokenizer: Wanted a tokenizer.json, a folder that holds one, or a SentencePiece model; got "
          "'my/tokenizer.json', no such file.",)),
    Case('a tokenizer.json that is not JSON', '--config=tiny.py --config.data.tokenizer=tokenizer.json',
         ('config.data.tokenizer: tokenizer.json is not a tokenizer.json that the tokenizers library can read: '
          'expected value at line 1 column 1.',),
         {'tokenizer.json': 'pieces:\n'}),
    Case('a SentencePiece model that is none', '--config=tiny.py --config.data.tokenizer=x.model',
         ('config.data.tokenizer: x.model is no SentencePiece model, or is damaged; restore it, or use another '
          'tokenizer.',),
         {'x.model': 'pieces:\n'}),
    Case('a tokenizer without an end-of-text token', '--config=tiny.py --config.data.tokenizer=tokenizer.json',
         ("config.data.bos is True, but tokenizer 'tokenizer.json' has no bos token; set config.data.bos=False, or "
          'name it in the tokenizer_config.json beside it.',),
         {'tokenizer.json': WORDS}),
    Case("a vocabulary smaller than the tokenizer's",
         '--config=tiny.py --workdir=runs/new --config.model.vocab_size=100',
         ("Source 'text' was tokenised by 'pieces' and holds id 257, but the model has 100 ids; set "
          'config.model.vocab_size to 0 or at least 258, or use the tokenizer that belongs to the model.',)),
    # ---- the run directory ----
    Case('a run directory in use', '--config=tiny.py',
         ('{here}/runs/tiny is in use by another process (host {host}, pid {pid}). Wait for it, stop it, or use '
          'another workdir.',),
         in_use),
    Case('a file where the run directory should be', '--config=tiny.py --workdir=tiny.py',
         ('Cannot lock {here}/tiny.py: File exists. Give a workdir that can be written.',)),
    Case('a run directory under a file', '--config=tiny.py --workdir=tiny.py/run',
         ('Cannot lock {here}/tiny.py/run: Not a directory. Give a workdir that can be written.',)),
    Case('a garbled config.json', '--config=tiny.py',
         ('{here}/runs/tiny/config.json is not JSON (Expecting property name enclosed in double quotes: line 1 '
          'column 12 (char 11)); put it back, or use another workdir.',),
         {'runs/tiny/config.json': '{"seed": 0,'}),
    Case('a config.json that holds no object', '--config=tiny.py',
         ('{here}/runs/tiny/config.json holds no JSON object; put it back, or use another workdir.',),
         {'runs/tiny/config.json': '[]'}),
    Case('a garbled run.json', '--config=tiny.py',
         ('{here}/runs/tiny/run.json is not JSON (Expecting value: line 1 column 1 (char 0)); put it back, or use '
          'another workdir.',),
         {'runs/tiny/run.json': ''}),
    Case('a run.json of a newer format', '--config=tiny.py',
         ('{here}/runs/tiny has format 2, this version reads 1; use the jaxlm that made it.',),
         newer),
    Case('checkpoints without a config.json', '--config=tiny.py',
         ('{here}/runs/tiny has checkpoints but no config.json; put that back, or use another workdir.',),
         {'runs/tiny/config.json': None}),
    Case('no run.json', '--config=tiny.py',
         ('{here}/runs/tiny has no run.json, which tells its data and tokenizer; put it back, or go on with '
          '--allow_change=data,tokenizer.',),
         {'runs/tiny/run.json': None}),
    Case('another model', '--config=tiny.py --config.model.dropout=0.1',
         ('{here}/runs/tiny holds a run with config.model.dropout=0.0, now 0.1; go on with --allow_change=model, '
          'set it back, or use another --workdir.',)),
    Case('another optimizer', '--config=tiny.py --config.optim.name=lion',
         ("{here}/runs/tiny holds a run with config.optim.name='adamw', now 'lion'; go on with "
          '--allow_change=optim, set it back, or use another --workdir.',)),
    Case('another seed and another batch size',
         '--config=tiny.py --config.seed=1 --config.batch_size=16 --config.eval.batch_size=8',
         ('{here}/runs/tiny holds a run with config.batch_size=8, now 16; go on with --allow_change=batch_size, '
          'set it back, or use another --workdir.',
          '{here}/runs/tiny holds a run with config.seed=0, now 1; go on with --allow_change=seed, set it back, or '
          'use another --workdir.')),
    Case('other packing', '--config=tiny.py --config.data.packing=best_fit',
         ("{here}/runs/tiny holds a run with config.data.packing='concatenated', now 'best_fit'; go on with "
          '--allow_change=data, set it back, or use another --workdir.',)),
    Case('another tokenizer', '--config=tiny.py --config.data.tokenizer=bpe',
         ("{here}/runs/tiny holds a run with config.data.tokenizer='pieces', now 'bpe'; go on with "
          '--allow_change=tokenizer, set it back, or use another --workdir.',)),
    Case('a file of the data edited', '--config=tiny.py',
         ('{here}/runs/tiny was trained with other data (digest text {digest}, now text {digest}); put the old '
          'back, go on with --allow_change=data, or use another --workdir.',),
         {'corpus/10.txt': 'other text\n'}),
    Case('a file of the data removed', '--config=tiny.py',
         ('{here}/runs/tiny was trained with other data (digest text {digest}, now text {digest}); put the old '
          'back, go on with --allow_change=data, or use another --workdir.',),
         {'corpus/10.txt': None}),
    Case('the tokenizer file edited', '--config=tiny.py',
         ('{here}/runs/tiny was trained with other tokenizer (digest {digest}, now {digest}); put the old back, go '
          'on with --allow_change=tokenizer, or use another --workdir.',),
         edited_tokenizer),
    Case('a model allowed to change into one that does not fit',
         '--config=tiny.py --config.model.width=64 --config.model.attention.head_dim=8 --allow_change=model',
         ('Checkpoint 2 in {here}/runs/tiny/checkpoints does not fit: {differences} Use the config it was saved '
          'with, or a new workdir, where config.checkpoint.init_from takes weights of the same shapes alone.',)),
    # ---- other runs ----
    Case('a run to resume that is not there',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.resume=runs/nothing',
         ("config.checkpoint.resume: no folder 'runs/nothing'; give the run directory to start from.",)),
    Case('a run to begin from that is not there',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.init_from=runs/nothing',
         ("config.checkpoint.init_from: no folder 'runs/nothing'; give the run directory to start from.",)),
    Case('a run to resume without a checkpoint',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.resume=corpus',
         ('config.checkpoint.resume: corpus has no valid checkpoint to continue from.',)),
    Case('a run to begin from without a checkpoint',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.init_from=corpus',
         ('config.checkpoint.init_from: corpus is neither a run directory nor a Hugging Face folder.',)),
    Case('a run to resume whose checkpoint is damaged',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.resume=runs/tiny',
         ('config.checkpoint.resume: runs/tiny has no valid checkpoint to continue from.',),
         damaged),
    Case('a run to begin from of another architecture',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.init_from=runs/tiny --config.model.num_layers=3',
         ('config.checkpoint.init_from: stack/period/slot_0/attention/key/bias has shape (2, 4, 8) there, (3, 4, 8) '
          "here; give config.model the base's own shape: config.adopt(config, path) does.",)),
    Case('a run to resume with another optimizer',
         '--config=tiny.py --workdir=runs/new --config.checkpoint.resume=runs/tiny --config.optim.name=sgd',
         ("{here}/runs/tiny holds a run with config.optim.name='adamw', now 'sgd'; go on with --allow_change=optim, "
          'set it back, or use another --workdir.',)),
    Case('fewer steps than the run has done', '--config=tiny.py --config.steps=1',
         ('{here}/runs/tiny has done 2 steps, config.steps=1 is less; raise it, or use another workdir.',)),
    Case('experts that are not there, split', '--config=tiny.py --config.mesh.expert=2',
         ('config.mesh.expert=2: the model has no experts to split over it; set it to 1, or '
          'config.model.moe.num_experts.',)),
    Case('more stages than layers', '--config=tiny.py --workdir=runs/new --config.mesh.data=2 --config.mesh.pipe=4',
         ('config.mesh.pipe=4 × config.pipeline.repeats=1 makes 4 stages, more than the 2 repeated layers of a stack; '
          'lower one of them.',)),
    Case('rows that do not cut into microbatches', '--config=tiny.py --workdir=runs/new --config.mesh.pipe=2 '
         '--config.mesh.data=4 --config.pipeline.microbatches=4',
         ('8 rows (config.batch_size / config.accumulation, or config.eval.batch_size) do not divide by '
          'config.pipeline.microbatches=4 × 4 devices that rows are split over; change one of them.',)),
    Case('microbatches that do not go round in groups', '--config=tiny.py --workdir=runs/new --config.mesh.pipe=2 '
         '--config.mesh.data=1 --config.mesh.fsdp=4 --config.pipeline.microbatches=1 --config.pipeline.repeats=2 '
         '--config.model.num_layers=4',
         ('config.pipeline.microbatches=1 does not divide by config.mesh.pipe=2; with config.pipeline.repeats=2 '
          'microbatches go round in groups of as many as there are stages.',)),
    Case('stages of one layer for all', '--config=tiny.py --config.mesh.pipe=2 --config.model.share_layers=true',
         ('config.mesh.pipe=2: config.model.share_layers leaves one layer, no stages; set one of them back.',)),
    Case('stages of layers that are not stacked', '--config=tiny.py --config.mesh.pipe=2 --config.model.scan=false',
         ('config.mesh.pipe=2: stages are stacked layers; set config.model.scan to True.',)),
    Case('bfloat16 in stages on a CPU', '--config=tiny.py --workdir=runs/new --config.mesh.pipe=2 --config.mesh.data=4 '
         '--config.precision.compute=bfloat16',
         ("config.precision.compute='bfloat16' with mesh.pipe=2 beside other axes cannot be compiled for a CPU; set it "
          "to 'float32' here.",)),
    Case('a recurrent net split over its length', '--config=tiny.py --config.mesh.seq=2 --config.model.mixer=lstm',
         ('config.mesh.seq=2: a lstm reads a token after the other; set it to 1.',)),
    Case('dropped probabilities split over the length',
         '--config=tiny.py --config.mesh.seq=2 --config.model.attention.dropout=0.1',
         ('config.mesh.seq=2: attention probabilities cannot be dropped where lengths are split; set '
          'config.model.attention.dropout to 0.',)),
    Case('a capacity split over the length', '--config=tiny.py --config.mesh.seq=2 --config.model.moe.num_experts=4 '
         '--config.model.moe.mode=capacity',
         ("config.mesh.seq=2: a mixture's capacity is counted over whole rows; set config.model.moe.mode to "
          "'dropless', or the axis to 1.",)),
    Case('a length that does not divide', '--config=tiny.py --workdir=runs/new --config.mesh.data=1 '
         '--config.mesh.seq=8 --config.seq_len=20',
         ('batch: dim 1 (act_length=20) does not divide by mesh axis seq=8; set config.seq_len to a multiple of it.',)),
    Case('rows of evaluation that do not cut into microbatches', '--config=tiny.py --workdir=runs/new '
         '--config.mesh.pipe=2 --config.mesh.data=4 --config.pipeline.microbatches=2 --config.eval.batch_size=4',
         ('4 rows (config.batch_size / config.accumulation, or config.eval.batch_size) do not divide by '
          'config.pipeline.microbatches=2 × 4 devices that rows are split over; change one of them.',)),
    Case('predicted places that do not divide', '--config=tiny.py --workdir=runs/new --config.mesh.data=1 '
         '--config.mesh.seq=8 --config.seq_len=24 --config.model.structure=encoder --config.objective.name=masked '
         '--config.data.tokenizer=bytes',
         ("targets: at config.seq_len=24 objective 'masked' makes 4 of them a row, which do not divide by the 8 "
          'devices that lengths are split over; choose another seq_len, or rate of the objective.',)),
    Case('a frozen parameter that is not there',
         '--config=tiny.py --workdir=runs/new --config.optim.freeze="(\'nosuch\',)"',
         ("config.optim.freeze: 'nosuch' matches no parameter; patterns match a whole path, such as "
          "'embed/embedding'.",)),
    # ---- a task ----
    Case('a record that is not JSON', TRAINS.format('classify'),
         ('{here}/train.jsonl:3417: not a line of JSON (Expecting value: line 2 column 1 (char 24)); mend or remove it.',),
         of_task('classify', '{"text": "a", "label": ')),
    Case('a record without a field', TRAINS.format('classify'),
         ("{here}/train.jsonl:3417: template '{{ text }}': 'text' is undefined; the record has 'label'. Mend the record, or the "
          'template.',),
         of_task('classify', '{"label": "no"}')),
    Case('a label that the task has not', TRAINS.format('classify'),
         ("{here}/train.jsonl:3417: unknown label 'nay'; the task has 'no', 'yes'. Mend the record, or the labels of the task.",),
         of_task('classify', '{"text": "a", "label": "nay"}')),
    Case('a conversation that nobody answers', TRAINS.format('answer'),
         ('{here}/train.jsonl:3417: Wanted a turn of the assistant, got none among 1 messages; leave this conversation out, '
          'there is nothing to learn from.',),
         of_task('chat', '{"messages": [{"role": "user", "content": "a"}]}')),
    Case('a turn of nobody', TRAINS.format('answer'),
         ("{here}/train.jsonl:3417: messages[0]: unknown role 'teacher'. Known: system, user, assistant, tool.",),
         of_task('chat', '{"messages": [{"role": "teacher", "content": "a"}, {"role": "assistant", "content": "b"}]}')),
    Case('an answer longer than a row', TRAINS.format('answer'),
         ('{here}/train.jsonl:3417: the target has 100 tokens, the window has room for 64; make config.seq_len longer, '
          'or leave the record out.',),
         of_task('text', json.dumps(dict(text='a', label='b' * 99)))),
    Case('a split without records', TRAINS.format('classify'),
         ("Split 'validation' of the task is empty: validation.jsonl gives no record. Give it files, or raise held_out.",),
         of_task('classify', **{'validation.jsonl': ''})),
)


def table() -> str:
  """CASES as Markdown."""
  cell = lambda text: text.replace('|', '\\|')
  rows = [f'| {cell(case.what)} | {"<br>".join(f"`error: {cell(line)}`" for line in case.lines)} |' for case in CASES]
  return '\n'.join(['| what | the line |', '|---|---|', *rows])


# ---- the place where they happen -----------------------------------------------------------------------------------


@contextlib.contextmanager
def inside(folder):
  before = os.getcwd()
  os.chdir(folder)
  try:
    yield
  finally:
    os.chdir(before)


def program(*argv: str) -> int:
  """`python -m jaxlm.main` in this process; its exit code."""
  from jaxlm import main, programs
  return programs.outcome(main.main, ['jaxlm.main', *argv])


@pytest.fixture(scope='session')
def world(tmp_path_factory):
  """A folder with tiny.py, its corpus, its tokenizer, and runs/tiny: a finished run of 2 steps."""
  from jaxlm.data import tokenizers
  folder = tmp_path_factory.mktemp('world')
  (folder / 'tiny.py').write_text(TINY)
  (folder / 'corpus').mkdir()
  for i in range(10, 40):
    (folder / 'corpus' / f'{i}.txt').write_text(''.join(
        f'the model {i} reads token {j} and predicts what follows it\n' for j in range(i % 7 + 3)))
  tokenizers.bytes_tokenizer().save(folder / 'pieces')
  with inside(folder):
    assert program('--config=tiny.py') == 0
  return folder


@pytest.fixture
def here(world, tmp_path):
  """The working folder: a copy of the world."""
  shutil.copytree(world, tmp_path / 'world')
  with inside(tmp_path / 'world'):
    yield tmp_path / 'world'


def contents(folder) -> dict[str, str]:
  """The digest of every file, but for the lock, which names its holder."""
  return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
          for p in sorted(pathlib.Path(folder).rglob('*')) if p.is_file() and p.name != 'lock'}


def told(stderr: str, here) -> tuple[str, ...]:
  """The lines after 'error: ', without what differs from machine to machine."""
  assert 'Traceback' not in stderr, stderr
  text = stderr.replace(str(here), '{here}')
  text = re.sub(r'host \S+, pid \d+', 'host {host}, pid {pid}', text)
  text = re.sub(r'\b[0-9a-f]{12}\b', '{digest}', text)
  text = re.sub(r'(?<=does not fit: ).*(?= Use the config)', '{differences}', text)
  return tuple(line.removeprefix('error: ') for line in text.splitlines() if line.startswith('error: '))


def make(case: Case, stack: contextlib.ExitStack) -> None:
  if callable(case.make):
    case.make(stack)
  for path, content in (case.make.items() if isinstance(case.make, dict) else ()):
    file = pathlib.Path(path)
    if content is None:
      file.unlink()
      continue
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', CASES, ids=lambda case: re.sub(r'\W+', '_', case.what))
def test_a_bad_input_is_its_clear_line_and_harms_nothing(case, here, capfd):
  with contextlib.ExitStack() as stack:
    make(case, stack)
    before, was_there = contents('runs/tiny'), os.path.exists('runs/new')
    capfd.readouterr()
    code = program(*shlex.split(case.argv))
    assert told(capfd.readouterr().err, here) == case.lines
    assert code == 2
    assert contents('runs/tiny') == before and os.path.exists('runs/new') == was_there


def test_the_program_itself_leaves_with_2_and_one_line(here):
  argv = [sys.executable, '-m', 'jaxlm.main', '--config=tiny.py', '--config.optim.lrr=3e-4']
  done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=ENV)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == "error: config.optim.lrr is unknown. Did you mean 'optim.lr'?\n"


def test_a_directory_that_cannot_be_written_is_told(here, capfd):
  """As another user where this one is root, whom permissions do not stop; so the config is read before."""
  from jaxlm import programs, train
  from jaxlm.config import loads
  config = loads(pathlib.Path('runs/tiny/config.json').read_text())
  config.data.tokenizer = 'bytes'
  folder = here / 'readonly'
  folder.mkdir(mode=0o555)
  root = os.geteuid() == 0
  def main(argv):
    del argv
    os.seteuid(65534 if root else os.geteuid())
    try:
      train.run(config, str(folder / 'run'))
    finally:
      os.seteuid(0 if root else os.geteuid())
  assert programs.outcome(main, ['jaxlm.main']) == 2
  assert told(capfd.readouterr().err, here) == (
      'Cannot lock {here}/readonly/run: Permission denied. Give a workdir that can be written.',)


def test_a_full_disk_is_told_and_what_was_saved_stands(here, capfd):
  before = contents('runs/tiny/checkpoints')
  capfd.readouterr()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # bytes a file; the parameters are 118 kB
  try:
    code = program('--config=tiny.py', '--config.steps=3')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  err = capfd.readouterr().err
  assert [line for line in err.splitlines() if line.startswith('failed: ')] == [
      f'failed: Checkpoint 3 was not saved in {here}/runs/tiny/checkpoints: File too large. Steps that stand: 2. Mend '
      'this and start the run again.']
  assert 'Traceback' not in err
  assert code == 1
  after = contents('runs/tiny/checkpoints')
  assert {path: after.get(path) for path in before} == before
  assert program('--config=tiny.py', '--config.steps=3') == 0
  assert json.loads(pathlib.Path('runs/tiny/metrics.jsonl').read_text().splitlines()[-1])['step'] == 3


@pytest.mark.parametrize('key, value, group, make_it', [
    ('model.family', 'gpt2', 'model', {}),
    ('seed', 5, 'seed', {}),
    (None, None, 'data', {'corpus/10.txt': 'other text, which is long enough to be a document of its own\n'}),
    (None, None, 'tokenizer', edited_tokenizer),
])
def test_a_change_that_is_allowed_goes_on(key, value, group, make_it, here):
  with contextlib.ExitStack() as stack:
    make(Case('', '', (), make_it), stack)
  argv = ['--config=tiny.py', '--config.steps=3'] + [f'--config.{key}={value}'] * bool(key)
  before = contents('runs/tiny')
  assert program(*argv) == 2
  assert contents('runs/tiny') == before
  assert program(*argv, f'--allow_change={group}') == 0
  changes = json.loads(pathlib.Path('runs/tiny/run.json').read_text())['starts'][-1]['changes']
  assert changes.keys() == {'steps', *filter(None, [key])}
  assert program(*argv) == 0  # it is the run's config now


def test_what_may_always_change_goes_on_without_a_word(here):
  shutil.move('corpus', 'elsewhere')
  assert program('--config=tiny.py', '--config.data.paths=elsewhere/*.txt', '--config.steps=3', '--config.log_every=2',
                 '--config.save_every=1', '--config.eval.max_tokens=1024') == 0


def test_build_notes_hold_this_table():
  notes = pathlib.Path(__file__).parents[1] / 'BUILD_NOTES.md'
  missing = set(table().splitlines()) - set(notes.read_text(encoding='utf-8').splitlines())
  assert not missing, 'paste what `python tests/bad_inputs_test.py` prints'


if __name__ == '__main__':
  print(table())
