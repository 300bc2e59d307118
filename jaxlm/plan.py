"""What a job will cost, before it runs: compiles the true step for simulated devices, and reads the bill from it.

  python -m jaxlm.plan --config=experiments/llama.py:size=3-8b --devices=64 --hardware=h100 --config.mesh.fsdp=-1
  python -m jaxlm.plan --config=experiments/published/gpt3_175b.py --hardware=v100 --price_per_hour=1.5

Nothing is trained and no accelerator is needed. Every number is measured from the compiled program or modelled by a
formula, and the table says which.
"""
import json
import os

from jaxlm import hardware, programs
from jaxlm.errors import JaxlmError

flags = programs.Flags()
programs.define_config()
DEVICES = flags.DEFINE_integer('devices', 0, 'How many devices; 0: as many as config.mesh multiplies out to.',
                               lower_bound=0)
HARDWARE = flags.DEFINE_string('hardware', 'h100', f'What they are: {", ".join(hardware.HARDWARE)}.')
TOKENS = flags.DEFINE_float('tokens', 0.0, 'Tokens of the whole job; 0: what the config trains on.', lower_bound=0.0)
PRICE = flags.DEFINE_float('price_per_hour', 0.0, 'Of a device.', lower_bound=0.0)
EFFICIENCY = flags.DEFINE_float('efficiency', 0.7, 'Share of its peak at which a device multiplies matrices: an '
                                'assumption.', lower_bound=0.01, upper_bound=1.0)
SUSTAINED = flags.DEFINE_float('sustained_tflops', 0.0, 'Model TFLOP/s a device, where they are known; times follow '
                               'from them then.', lower_bound=0.0)
PUE = flags.DEFINE_float('pue', 1.1, 'Energy of the building over that of the devices.', lower_bound=1.0)
CARBON = flags.DEFINE_float('kg_per_kwh', 0.4, 'CO2e of a kilowatt-hour.', lower_bound=0.0)
OUTPUT = flags.DEFINE_string('output', None, 'Also write the bill as JSON to this file.')
SEARCH = flags.DEFINE_bool('search', False, 'Try meshes, remat and microbatches, and rank what fits.')
TRIES = flags.DEFINE_integer('tries', 12, 'With --search: how many are compiled, the likeliest first.', lower_bound=1)


def main(argv: list[str]) -> None:
  """Prints the bill of --config."""
  del argv
  config = programs.config()
  from jaxlm import bill, check, search  # late, for they import jax
  check.validate(config)
  if OUTPUT.value and os.path.isdir(OUTPUT.value):
    raise JaxlmError(f'--output={OUTPUT.value} is a folder; give a file in it.')
  if OUTPUT.value and not os.path.isdir(os.path.dirname(os.path.abspath(OUTPUT.value))):
    raise JaxlmError(f'--output={OUTPUT.value}: its folder is not there; make it, or give another file.')
  assumptions = bill.Assumptions(EFFICIENCY.value, SUSTAINED.value, PRICE.value, PUE.value, CARBON.value, TOKENS.value)
  if SEARCH.value:
    found = search.ranked(config, HARDWARE.value, DEVICES.value, assumptions, TRIES.value)
    print(search.table(found))
  else:
    found = bill.make(config, HARDWARE.value, DEVICES.value, assumptions)
    print(bill.table(found))
  if OUTPUT.value:
    with open(OUTPUT.value, 'w', encoding='utf-8') as f:
      json.dump(found, f, indent=2)


if __name__ == '__main__':
  programs.run(main)
