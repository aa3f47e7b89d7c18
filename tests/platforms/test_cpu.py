"""What a process of several writes: all but Gloo's remarks."""

from tests import runs

PROGRAM = """
import ctypes, os, sys
from dsmoe.platforms import cpu
print("first")
cpu.hide_lines_of_gloo()
libc = ctypes.CDLL(None)
os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks.\\nfrom C\\n")
print("from Python")
os.write(2, b"[Gloo] Rank 1 has failed\\n")
libc.puts(b"[Gloo] Rank 1 is connected to 1 peer ranks.")  # which C keeps until the end
libc.puts(b"[Gloo] an error\\nthe last line, \\xc3\\xa9")
assert not sys.stdout.isatty() and sys.stdout.encoding == sys.__stdout__.encoding
"""


def test_gloos_remarks_are_hidden_and_nothing_else():
  code, out, err = runs.finish(runs.start("-c", PROGRAM, env={"PYTHONUNBUFFERED": ""}))
  assert (code, err) == (0, "[Gloo] Rank 1 has failed\n")
  lines = ["first", "from C", "from Python", "[Gloo] an error", "the last line, é"]
  assert sorted(out.splitlines()) == sorted(lines)
