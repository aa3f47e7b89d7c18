"""Pieces of scripts, run by bash."""

import subprocess

from dsmoe.launching import shell


def test_a_signal_that_comes_before_a_program_is_started_ends_it():
  """The script sends it to itself; what it notes, and what the program ends with, come out."""
  started = shell.started_with_traps(["kill -TERM $$; sleep 600"], "TERM")
  script = "\n".join([*started, *shell.waited(), 'echo "$stopped $code"'])
  done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
  assert (done.stdout, done.returncode) == ("1 143\n", 0)
