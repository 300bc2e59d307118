"""What ends a program other than well; each outcome has its exit code in programs.py."""


class JaxlmError(Exception):
  """A fault the user can mend: programs print it as one line and exit with 2."""


class Preempted(Exception):
  """The run was asked to stop and saved; programs exit with 75."""


class RunFailed(Exception):
  """The run itself failed (a loss that is not finite, say): programs print one line and exit with 1."""
