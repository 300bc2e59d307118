"""What processes that tests start are told of devices."""
import os
import re


def xla_flags(count: int) -> str:
  """XLA_FLAGS of this process, which compile fast rather than well, with so many simulated devices."""
  return re.sub(r'(device_count)=\d+', rf'\1={count}', os.environ['XLA_FLAGS'])
