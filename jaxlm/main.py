"""Trains what an experiment describes, or resumes what its run directory holds.

  python -m jaxlm.main --config=experiments/quickstart.py
  python -m jaxlm.main --config=experiments/gpt2.py:size=nano,smoke --config.optim.lr=3e-4

Exit codes: 0 done, 1 the run failed, 2 something to mend (one line each on stderr), 75 preempted after saving.
"""
import os

from jaxlm import cluster, programs, settings
from jaxlm import config as config_module

flags = programs.Flags()
programs.define_config()
WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory; runs/<experiment> with its arguments by default.')
ALLOW_CHANGE = flags.DEFINE_list('allow_change', [], 'What a resumed run may change, by commas: model, objective, '
                                 'optim, tokenizer, data, seed, batch_size, precision, …')
PRINT_CONFIG = flags.DEFINE_bool('print_config', False, 'Print the resolved config and what differs from the default, '
                                 'and stop.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, for a run of several processes '
                                 'whose launcher does not tell (Slurm, MPI, JobSet and TPU pods do).')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.', lower_bound=1)
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', lower_bound=0)


def main(argv: list[str]) -> None:
  """Runs the config of --config."""
  del argv
  config = programs.config()
  if PRINT_CONFIG.value and not settings.faults(config):
    print(config_module.dumps(config))
    for key, (value, default) in config_module.differences(config, config_module.default()).items():
      print(f'config.{key} = {value!r}  # default {default!r}')
  from jaxlm import check  # late, as train below: what imports jax
  check.validate(config)
  if PRINT_CONFIG.value:
    return
  cluster.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, config.heartbeat_s)
  from jaxlm import train  # after joining: nothing may touch a device before
  last = train.run(config, WORKDIR.value or os.path.join('runs', programs.experiment_name()), ALLOW_CHANGE.value)
  loss, gzip = (last.get(f'eval/heldout/{name}bits_per_byte') for name in ('', 'gzip_'))
  if loss is not None:
    print(f'held-out text: {loss:.3f} bits a byte; gzip -9 needs {gzip:.3f}')


if __name__ == '__main__':
  programs.run(main)
