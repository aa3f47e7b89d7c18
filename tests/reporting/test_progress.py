import io
import sys

import rich
import rich.console

from dsmoe.reporting import progress

LINE = {
  "loss": 3.25,
  "tokens_per_sec": 12345.6,
  "mfu": 0.4123,
  "gflops_per_sec": 9.0,
  "step_secs": 0.5,
}


def _is_plain(text):
  return all(c == "\n" or c.isprintable() for c in text)


def test_off_a_terminal_an_update_is_a_plain_line(capsys, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  with progress.Progress(total_steps=1000, start_step=10) as display:
    display.update(20, LINE)
    display.update(21, {})
    display.update(30, LINE | {"mfu": None})
    display.update(30, {"validation_loss": 3.5, "validation_bits_per_byte": 1.0})
    display.update(31, {"dropped_rows": 1234, "fallbacks": 0})
    display.update(40, {"loss": 3.0, "dropped_rows": 0, "fallbacks": 12, "goodput": 0.934})
    display.print("[bold]a sample[/bold]\x1b[31m " + "long " * 40 + "end")
  out = capsys.readouterr().out
  assert out.splitlines() == [
    "step 20/1000  loss 3.2500  12,346 tokens/s  MFU 41.2%  0:08:10 left",
    "step 30/1000  loss 3.2500  12,346 tokens/s  9.0 GFLOP/s  0:08:05 left",
    "step 30/1000  validation loss 3.5000  1.0000 bits/byte",
    "step 31/1000  1,234 rows dropped",
    "step 40/1000  loss 3.0000  12 layers computed by the exact path  goodput 93%",
    "[bold]a sample[/bold]\\x1b[31m " + "long " * 40 + "end",
  ]
  assert _is_plain(out)


def test_on_a_terminal_there_is_a_bar_with_prints_above():
  file = io.StringIO()
  console = rich.console.Console(
    file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"}
  )
  with progress.Progress(total_steps=1000, console=console) as display:
    display.update(20, LINE)
    display.update(25, {"validation_loss": 3.5})
    display.print("a remark")
  out = file.getvalue()
  assert "\x1b[" in out and "━" in out
  last = out[out.rindex("step") :]
  for part in ("25/1000", "loss 3.2500", "12,346 tokens/s", "MFU 41.2%", "0:08:08 left"):
    assert part in last, part
  assert "validation" not in last
  for above in ("step 25/1000  validation loss 3.5000\n", "a remark\n"):
    assert above in out[: out.rindex("step")]


def test_summary_takes_last_values_medians_and_the_best_validation():
  rows = [
    {"step": 10, "loss": 4.0, "tokens": 100, "tokens_per_sec": 1.0, "mfu": None},
    {"step": 20, "validation_loss": 2.0, "validation_bits_per_byte": 0.5},
    {"step": 14, "dropped_rows": 1200, "fallbacks": 3},
    {"step": 20, "loss": 3.0, "tokens": 2000, "tokens_per_sec": 30.0, "mfu": None},
    {"step": 30, "loss": 2.5, "tokens": 3000, "tokens_per_sec": 20.0, "max_vio": [1.0, None, 2.0]}
    | {"dropped_rows": 34, "fallbacks": 2},
    {"step": 30, "validation_loss": 2.25, "validation_bits_per_byte": 0.75},
  ]
  assert progress.summary(iter(rows)) == [
    ("steps", "30"),
    ("tokens seen", "3,000"),
    ("train loss", "2.5000"),
    ("validation loss, log.eval_batches (nats/token)", "2.2500"),
    ("validation bits per byte, log.eval_batches", "0.7500"),
    ("best validation loss", "2.0000 at step 20"),
    ("tokens/s, median", "20"),
    ("MaxVio, mean (largest) layer", "1.5 (2)"),
    ("rows dropped for want of room, all steps", "1,234"),
    ("layers computed by the exact path for want of room, all steps", "5"),
  ]
  assert progress.summary([]) == []


def test_the_best_validation_is_that_of_the_last_curve():
  """An easier subset, such as that of another batch size, had a lower loss."""
  points = [(10, 2.0, 64), (20, 1.5, 64), (30, 2.5, 128), (40, 2.25, 128), (50, 2.375, 128)]
  rows = [
    {"step": step, "validation_loss": loss, "validation_tokens": tokens}
    for step, loss, tokens in points
  ]
  assert dict(progress.summary(rows))["best validation loss"] == "2.2500 at step 40"
  for row in rows:  # as many tokens of another text are another curve too
    row["validation_checksum"] = row.pop("validation_tokens")
  assert dict(progress.summary(rows))["best validation loss"] == "2.2500 at step 40"


def test_the_whole_set_is_no_point_of_the_validation_curve():
  """Here the curve's subset is easier than the whole set, so that its best looks better."""
  curve = {"validation_loss": 4.774, "validation_bits_per_byte": 2.0}
  whole = {"whole_validation_loss": 4.833, "whole_validation_bits_per_byte": 2.1}
  rows = [{"step": 400} | curve, {"step": 500} | curve | {"validation_loss": 4.9} | whole]
  assert progress.summary(rows) == [
    ("steps", "500"),
    ("validation loss, whole set (nats/token)", "4.8330"),
    ("validation bits per byte, whole set", "2.1000"),
    ("validation loss, log.eval_batches (nats/token)", "4.9000"),
    ("validation bits per byte, log.eval_batches", "2.0000"),
    ("best validation loss", "4.7740 at step 400"),
  ]
  every = {"validation_loss": 4.833, "validation_bits_per_byte": 2.1} | whole
  assert progress.summary([{"step": 500} | every]) == [
    ("steps", "500"),
    ("validation loss, whole set (nats/token)", "4.8330"),
    ("validation bits per byte, whole set", "2.1000"),
    ("best validation loss", "4.8330 at step 500"),
  ]


def test_the_whole_set_is_said_once(capsys):
  figures = {"validation_loss": 2.0, "validation_bits_per_byte": 1.0}
  whole = {f"whole_{name}": value for name, value in figures.items()}
  with progress.Progress(total_steps=9) as display:
    display.update(9, figures | whole)
    display.update(9, figures | whole | {"whole_validation_loss": 2.5})
  assert capsys.readouterr().out.splitlines() == [
    "step 9/9  validation loss 2.0000  1.0000 bits/byte",
    "step 9/9  validation loss 2.0000  1.0000 bits/byte  whole set 2.5000",
  ]


def test_final_table_is_plain_off_a_terminal(capsys):
  rows = [("parameters", "1,234"), ("note", "[red]kept as it is[/red]")]
  table = progress.final_table(rows, title="a run")
  with progress.Progress(total_steps=1) as display:
    display.print(table)
  out = capsys.readouterr().out
  assert _is_plain(out)
  words = [line.split() for line in out.splitlines() if line.strip()]
  assert words == [
    ["a", "run"],
    ["parameters", "1,234"],
    ["note", "[red]kept", "as", "it", "is[/red]"],
  ]
  assert not sys.stdout.isatty()


def test_a_title_is_no_markup(capsys):
  rich.print(
    progress.final_table([("a[b]", "[/c]" + "." * 40)], title="runs/a[/b] :smile: [bold]c")
  )
  out = capsys.readouterr().out
  assert "runs/a[/b] :smile: [bold]c" in out and "a[b]" in out and "[/c]" in out
