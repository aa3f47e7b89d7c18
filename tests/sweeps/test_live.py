"""The terminal's view of a sweep: at 80 columns, as plain lines, and while its files grow."""

import io
import json

import pytest
import rich.console

from dsmoe.reporting import watch
from dsmoe.sweeps import live, results, show
from dsmoe.sweeps.progress import Follower, Progress
from tests.sweeps import drawn

FIELDS = ("optim.learning_rate", "balance.bias_update_speed")


def params(rate: float, speed: float = 0.001) -> dict:
  return dict(zip(FIELDS, (rate, speed)))


def line(step: int, loss: float | None, checksum: int = 7) -> str:
  row = {"step": step, "validation_loss": loss, "validation_checksum": checksum}
  return json.dumps(row | {"validation_tokens": 64, "step_secs": 0.5}) + "\n"


def sweep(folder) -> results.Sweep:
  """Seven trials, one of each state but two of complete ones; files of those that ran are there."""
  states = ["complete", "complete", "running", "waiting", "pruned", "failed", "interrupted"]
  values = [2.5, 2.75, *[None] * 5]
  trials = []
  for n, (state, value) in enumerate(zip(states, values)):
    workdir = folder / f"{n:04d}"
    one = drawn.trial(n, params(10.0**-n), 0, value, state=state)
    error = "the loss of step 41 must be finite, got nan" if state == "failed" else ""
    trials.append(one._replace(workdir=workdir, error=error))
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(
      json.dumps({"num_steps": 100, "log": {"log_every_steps": 10}})
    )
  for n in (2, 3, 4):  # the one that waits was handed back
    (folder / f"{n:04d}" / "metrics.jsonl").write_text(line(10, 4.0) + line(20, 3.0))
  (folder / "0006" / "metrics.jsonl").write_text('{"step": 30, "loss": 3.5, "step_secs": 0.5}\n')
  return results.Sweep("rates", FIELDS, "final validation_loss", trials)


def shown(renderable, width: int = 80) -> str:
  console = rich.console.Console(width=width, file=io.StringIO(), force_terminal=False)
  console.print(renderable)
  return console.file.getvalue()


def test_a_sweep_at_80_columns(tmp_path):
  found = sweep(tmp_path)
  text = shown(live.render(found, Follower().poll(found, 0.0)))
  assert all(len(one) <= 80 for one in text.splitlines())
  words = " ".join(text.split())
  assert (
    "rates: 2 complete, 1 running, 1 interrupted, 1 waiting, 1 pruned, 1 failed; about" in words
  )
  assert "bias_update_speed=0.001, seed 0" in words
  assert "2.5000" in words and "the noise is not known, and all are tied" in words
  assert "20/100 █▁ 3.0000 0:00:40" in words
  assert "seed 0, interrupted" in words and "30/100 3.5000*" in words
  assert "* of training: there is no validation loss yet" in words
  assert "failed: trial 5: the loss of step 41 must be finite, got nan" in words
  assert "pruned, behind the others: trial 4; last at step 20 with 3.0000" in words


def heads(text: str) -> list[str]:
  """Returns the words of the heads of tables, which stand above lines of rules."""
  lines = text.splitlines()
  return [" ".join(lines[n - 1].split()) for n, line in enumerate(lines) if "────" in line]


def test_words_stay_whole_at_80_columns(tmp_path):
  found = sweep(tmp_path)
  long = {FIELDS[0]: 1.25e-05, "model.initializer_range": 0.00625, FIELDS[1]: 0.00125}
  trials = [t._replace(params=long | t.params) for t in found.trials]
  found = found._replace(trials=trials, fields=tuple(long))
  progress = Follower().poll(found, 0.0)
  status = progress[2].status._replace(step=120_000, num_steps=200_000, secs_left=360_000.0)
  progress[2] = progress[2]._replace(curve=((1, 3.25),) * 16, status=status)
  live_text = shown(live.render(found, progress, ["worker 1: " + "compiling " * 20]))
  table_text = shown(show.table(found, progress))
  assert heads(live_text) == [
    "best so far loss 95% interval seeds", "running step validation loss left"
  ]  # fmt: skip
  assert heads(table_text) == ["trial seed state step loss secs"]
  for text in (live_text, table_text):
    assert all(len(one) <= 80 for one in text.splitlines()) and "3.5000*" in text
    words = text.replace("\n", " ").split(" ")
    for word in ("learning_rate=0.01,", "initializer_range=0.00625,", "bias_update_speed=0.001"):
      assert word in words or word + "," in words, text
    assert "120,000/200,000" in words and "interrupted" in words
  assert "worker 1: compiling compiling" in live_text


def test_the_table_shows_how_far_trials_are_and_why_they_ended(tmp_path):
  found = sweep(tmp_path)
  waiting = found.trials[3]._replace(error="its workdir is in use")
  trials = [waiting if trial.number == 3 else trial for trial in found.trials]
  found = found._replace(trials=trials)
  text = shown(show.table(found, Follower().poll(found, 0.0)), width=200)
  rows = {
    line.split(":")[0].strip(): line.split() for line in text.splitlines() if ": lear" in line
  }
  assert list(rows) == ["0", "1", "2", "6", "4", "5", "3"]
  assert rows["0"][3:] == ["0", "complete", "2.5000", "60"]
  assert rows["2"][3:] == ["0", "running", "20/100", "3.0000", "60"]
  assert rows["6"][3:] == ["0", "interrupted", "30/100", "3.5000*", "60"]
  assert rows["4"][3:] == ["0", "pruned", "20/100", "3.0000", "60"]
  assert "failed: trial 5: the loss of step 41 must be finite, got nan" in text
  assert "waiting: trial 3: its workdir is in use" in text
  assert rows["3"][3:] == ["0", "waiting", "20/100", "3.0000", "60"]
  text = shown(show.table(found, {}, max_rows=2))
  assert "and 5 more trials" in text and "interrupted 1" not in text


def test_names_and_errors_are_no_markup(tmp_path):
  found = sweep(tmp_path)
  trials = [t._replace(error="[bold]odd[/bold]") if t.error else t for t in found.trials]
  trials[0] = trials[0]._replace(params={"optim.learning_rate": "[red]x"})
  text = shown(live.render(found._replace(name="[b]", trials=trials), {}))
  assert "[bold]odd[/bold]" in text and "[red]x" in text and text.startswith("[b]:")


def test_plain_lines_are_ascii(tmp_path):
  found = sweep(tmp_path)
  said = live.lines(found, Follower().poll(found, 0.0))
  assert "\n".join(said).isascii()
  assert said[1] == ("best so far: 2.5000 (1 seed) with learning_rate=1, bias_update_speed=0.001")
  assert "running: trial 2, step 20, validation loss 3.0000 at step 20" in said
  assert "interrupted: trial 6, step 30, training loss 3.5000" in said


def test_curves_grow_are_cut_and_never_mix_rows(tmp_path):
  found, follower = sweep(tmp_path), Follower()
  path = tmp_path / "0002" / "metrics.jsonl"

  def curve():
    return follower.poll(found, 0.0)[2].curve

  assert curve() == ((10, 4.0), (20, 3.0))
  with path.open("a") as file:
    file.write('{"step": 25, "loss": 1.0}\nnot JSON\n' + line(30, 2.5) + '{"step": 4')
  assert curve() == ((10, 4.0), (20, 3.0), (30, 2.5))
  path.write_text(line(10, 4.0) + line(20, 2.75))  # resumed from step 10
  assert curve() == ((10, 4.0), (20, 2.75))
  with path.open("a") as file:
    file.write(line(30, 1.5, checksum=8) + line(40, None, checksum=8))
  (first, second) = curve()
  assert first == (30, 1.5) and second[0] == 40 and second[1] != second[1]
  ended = [t._replace(state="complete", value=2.0) if t.number == 2 else t for t in found.trials]
  assert set(follower.poll(found._replace(trials=ended), 0.0)) == {3, 4, 6}
  path.unlink()
  assert follower.poll(found, 0.0)[2].curve == ()


def test_sparklines():
  assert live.sparkline([3.0, 2.0, 1.0, 2.0]) == "█▅▁▅"
  assert live.sparkline([]) == "" and live.sparkline([2.0, 2.0]) == "▁▁"
  assert live.sparkline([2.0, float("nan"), 1.0]) == "█×▁"
  assert live.sparkline(range(100), 5) == "▁▃▅▆█"


@pytest.mark.parametrize(
  "num_waiting,lefts,complete,expected",
  [
    (0, [40.0, 10.0], [], 40.0),
    (3, [40.0, 10.0], [30.0], 70.0),  # 10 + 30 + 30, 40 + 30
    (1, [40.0], [], 90.0),  # what runs lasts 50 seconds in all
    (2, [], [30.0], None),
  ],
)
def test_time_left(num_waiting, lefts, complete, expected):
  trials = [drawn.trial(n, {}, 0, None, state="running") for n in range(len(lefts))]
  trials += [drawn.trial(50 + n, {}, 0, None, state="waiting") for n in range(num_waiting)]
  trials += [drawn.trial(90, {}, 0, 2.0, seconds=secs) for secs in complete]
  progress = {
    n: Progress((), watch.Status("", "running", 20, 100, secs_left=left))
    for n, left in enumerate(lefts)
  }
  assert live.secs_left(results.Sweep("", (), "", trials), progress) == expected


def test_showing_prints_what_has_changed_or_draws_anew(tmp_path):
  found = sweep(tmp_path)
  ended = [
    t._replace(state="complete", value=2.0) if t.state in results.LEFT else t for t in found.trials
  ]
  for is_terminal in (False, True):
    console = rich.console.Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
    with live.showing(console) as show_now:
      show_now(found, ["worker 1: compiling"])
      show_now(found, ["worker 1: compiling"])
      show_now(found._replace(trials=ended), [])
    text = console.file.getvalue()
    assert "5 complete, 1 pruned, 1 failed" in text
    if not is_terminal:
      assert text.count("running: trial 2, step 20") == text.count("worker 1: compiling") == 1


def test_short_names():
  assert live.short_names(["a.x", "b.x", "c.y"]) == {"a.x": "a.x", "b.x": "b.x", "c.y": "y"}
