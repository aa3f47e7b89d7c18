"""What a runner shows of its workers, with workers that only print."""

import sys

from dsmoe.sweeps import runner
from dsmoe.sweeps.devices import Slot

WORKER = """
import pathlib, sys, time
for number, line in enumerate(("", "compiling for 1 x cpu", "step 3/4  loss 2.0", "evaluating")):
  print(line, flush=True)
  while not (pathlib.Path(sys.argv[1]) / str(number)).exists():
    time.sleep(0.01)
"""


def test_what_each_worker_printed_last_is_shown(tmp_path, monkeypatch):
  monkeypatch.setattr(runner, "_SHOW_SECS", 0.0)
  monkeypatch.setattr(runner, "_POLL_SECS", 0.01)
  (tmp_path / "one.log").write_text("of an earlier process\n")
  seen = []

  def show(said):
    if not seen or said != seen[-1]:
      seen.append(said)
    for number, wanted in enumerate(("starting", "compiling for 1 x cpu", "", "evaluating")):
      if said == [f"worker {n}: {wanted}" for n in (1, 2)] * bool(wanted):
        (tmp_path / str(number)).touch()

  slots = [Slot(name, {}, ()) for name in ("one", "two")]
  command = (sys.executable, "-c", WORKER)
  assert runner.run(tmp_path, None, slots, tmp_path, 0, 9.0, show, print, command) == []
  said = {line for lines in seen for line in lines}
  lines = ("starting", "compiling for 1 x cpu", "evaluating")
  assert said == {f"worker {n}: {line}" for n in (1, 2) for line in lines} and seen[-1] == []
