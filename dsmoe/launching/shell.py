"""Pieces of scripts for bash: starting programs, handing signals on, and what they ended with.

Each line is a whole command, so that lines can be joined by newlines or by semicolons.
"""

from collections.abc import Mapping, Sequence
from shlex import quote

TERMINATE = "kill -TERM $children 2>/dev/null"


def exports(env: Mapping[str, str]) -> list[str]:
  """Returns lines that set variables."""
  return [f"export {name}={quote(value)}" for name, value in env.items()]


def started(commands: Sequence[str]) -> list[str]:
  """Returns lines that start commands in the background, their numbers in `children`."""
  return ["children=", *(f'{command} & children="$children $!"' for command in commands)]


def started_with_traps(commands: Sequence[str], signals: str, hand: str = TERMINATE) -> list[str]:
  """Returns lines that start commands, and upon one of `signals` note it in `stopped` and do `hand`.

  The script listens to the signals before it starts anything, so that none ends it alone. One that
  comes while the commands are started is handed on once more, to all of them, a second later: until
  the program of a command runs, what is there in its place is a shell, which drops the signal.
  """
  return [
    "stopped=",
    f"trap 'stopped=1; {hand}' {signals}",
    *started(commands),
    f'[ -z "$stopped" ] || {{ sleep 1; {hand}; }}',
  ]


def waited() -> list[str]:
  """Returns lines that wait for all that was started; `code` becomes 0 or that of one that failed.

  A signal that interrupts `wait` may lose what a program ended with that ends at the same time, be it
  another than the one that is waited for. The script therefore sleeps in the foreground, where bash
  handles a signal half a second later and loses nothing, and asks for the code at the end.
  """
  return [
    "code=0",
    'for child in $children; do while kill -0 "$child" 2>/dev/null; do sleep 0.5; done; '
    'wait "$child"; ended=$?; '
    '[ "$ended" -eq 0 ] || code=$ended; done',
  ]
