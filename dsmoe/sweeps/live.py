"""A sweep in the terminal while it runs: the best so far, running trials' curves, what failed and why.

`render` makes a picture for a terminal, `lines` plain text for a log or a dumb terminal; both are pure
functions of what `progress.Follower` read from the files of the trials. `showing` chooses between them.
"""

import contextlib
import datetime
import heapq
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rich.box
import rich.console
import rich.live
import rich.table
import rich.text

from dsmoe.sweeps import dependent, sentences, verdict
from dsmoe.sweeps.progress import TRAINING_MARK, TRAINING_NOTE, Follower, Progress
from dsmoe.sweeps.results import Sweep, Trial

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_CHARS = 10
_MOST_RANKED = 5
_MOST_RUNNING = 12
_MOST_REASONS = 4
_LEFT_ALIGNED = ("validation", "state")
_LONGEST_WORD = 34  # for which the first column of a table keeps room


def sparkline(values: Sequence[float], width: int = 16) -> str:
  """Draws values as a line of bars, the lowest of them as the lowest bar; × is not finite.

  More values than `width` are thinned evenly; the first and the last stay.
  """
  if len(values) > width:
    values = [values[round(n * (len(values) - 1) / (width - 1))] for n in range(width)]
  finite = [value for value in values if math.isfinite(value)]
  low, high = min(finite, default=0.0), max(finite, default=0.0)
  scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
  return "".join(
    _BARS[round((value - low) * scale)] if math.isfinite(value) else "×" for value in values
  )


def secs_left(sweep: Sweep, progress: Mapping[int, Progress]) -> float | None:
  """Estimates when the last trial ends, if as many run at once as now; None where nothing says.

  Trials that wait or were interrupted are taken to last as long as the median of the complete ones, or, before there are
  any, as what runs. Pruning makes it less.
  """
  numbers = [trial.number for trial in sweep.trials if trial.state == "running"]
  running = [progress[number].status for number in numbers if number in progress]
  running = [status for status in running if status.secs_left is not None]
  num_waiting = sum(trial.state in ("waiting", "interrupted") for trial in sweep.trials)
  known = [trial.seconds for trial in sweep.trials if trial.state == "complete"]
  whole = [
    status.secs_left * status.num_steps / (status.num_steps - status.step)
    for status in running
    if status.secs_left and status.num_steps and status.step is not None
  ]
  if not running or (num_waiting and not (known or whole)):
    return None
  ends = [status.secs_left or 0.0 for status in running]
  heapq.heapify(ends)
  for _ in range(num_waiting):
    heapq.heappush(ends, heapq.heappop(ends) + statistics.median(known or whole))
  return max(ends)


def heading(sweep: Sweep, progress: Mapping[int, Progress]) -> str:
  """Returns how many trials are in each state, and the time left."""
  states = ("complete", "running", "interrupted", "waiting", "pruned", "failed")
  counts = [(sum(t.state == state for t in sweep.trials), state) for state in states]
  said = ", ".join(f"{number:,} {state}" for number, state in counts if number) or "no trials"
  left = secs_left(sweep, progress)
  return f"{sweep.name}: {said}" + (f"; about {_duration(left)} left" if left else "")


def _duration(secs: float) -> str:
  length = datetime.timedelta(seconds=round(secs))
  return f"{length.days:,} d {length.seconds // 3600} h" if length.days else str(length)


def short_names(fields: Sequence[str]) -> dict[str, str]:
  """Returns each field's last part, where no other field has the same."""
  last = [field.rpartition(".")[2] for field in fields]
  return {field: end if last.count(end) == 1 else field for field, end in zip(fields, last)}


def _setting(params: Mapping[str, object], names: Mapping[str, str]) -> str:
  return sentences.name({names.get(field, field): value for field, value in params.items()})


def render(
  sweep: Sweep, progress: Mapping[int, Progress], workers: Sequence[str] = ()
) -> rich.console.RenderableType:
  """Returns what a terminal shows, from 80 columns on; `workers` has what each worker said last."""
  sweep, _ = dependent.without(sweep)
  names = short_names(sweep.fields)
  ranking = verdict.rank(sweep.trials)
  parts: list[rich.console.RenderableType] = [rich.text.Text(heading(sweep, progress))]
  if ranking.ranked:
    parts += [_ranked_table(ranking, names), rich.text.Text(_verdict(ranking))]
  running = [trial for trial in sweep.trials if trial.state in ("running", "interrupted")]
  if running:
    parts.append(_running_table(running[:_MOST_RUNNING], progress, names))
  if len(running) > _MOST_RUNNING:
    parts.append(
      rich.text.Text(f"and {len(running) - _MOST_RUNNING:,} more run or were interrupted")
    )
  parts += [rich.text.Text(line, style="dim") for line in notes(running[:_MOST_RUNNING], progress)]
  parts += [
    rich.text.Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in workers
  ]
  parts += [rich.text.Text(line, style="dim") for line in reasons(sweep, progress)]
  return rich.console.Group(*parts)


def _verdict(ranking: verdict.Ranking) -> str:
  num_tied, S = len(ranking.tied), len(ranking.ranked)
  if S == 1:
    return "one setting so far"
  if ranking.noise is None or ranking.noise.single is None:
    return "no setting has two seeds yet: the noise is not known, and all are tied"
  if num_tied > 1:
    return f"{num_tied:,} of {S:,} settings are tied within the noise"
  return "the first is better than all others beyond the noise"


def _ranked_table(ranking: verdict.Ranking, names: Mapping[str, str]) -> rich.table.Table:
  shown = ranking.ranked[:_MOST_RANKED]
  settings = [_setting(ranked.setting.params, names) for ranked in shown]
  table = table_of(("best so far", "loss", "95% interval", "seeds", ""), settings)
  for ranked, setting in zip(shown, settings):
    interval = ranked.interval
    table.add_row(
      rich.text.Text(setting),
      sentences.nats(ranked.mean),
      "" if interval is None else f"{sentences.nats(interval[0])}–{sentences.nats(interval[1])}",
      str(len(ranked.setting.losses)),
      "tied" if ranked.is_tied and len(ranking.tied) > 1 else "",
    )
  return table


def _running_table(running, progress, names: Mapping[str, str]) -> rich.table.Table:
  states = [
    progress[trial.number].status.state
    if trial.state == "running" and trial.number in progress
    else trial.state
    for trial in running
  ]
  settings = [
    f"{trial.number}: {setting_of(trial, names)}, seed {trial.seed}"
    + ("" if state == "running" else f", {state}")
    for trial, state in zip(running, states)
  ]
  table = table_of(("running", "step", "validation", "loss", "left"), settings)
  for trial, setting in zip(running, settings):
    found = progress.get(trial.number)
    left = found.status.secs_left if found is not None and trial.state == "running" else None
    table.add_row(
      rich.text.Text(setting),
      found.steps if found else "",
      sparkline([loss for _, loss in found.curve], _CURVE_CHARS) if found else "",
      found.loss if found else "",
      _duration(left) if left else "",
    )
  return table


def notes(trials: Sequence[Trial], progress: Mapping[int, Progress]) -> list[str]:
  """Returns what a mark on the loss of some of the trials means; nothing where there is none."""
  losses = [progress[trial.number].loss for trial in trials if trial.number in progress]
  return [TRAINING_NOTE] if any(loss.endswith(TRAINING_MARK) for loss in losses) else []


def setting_of(trial: Trial, names: Mapping[str, str]) -> str:
  """Returns a trial's setting with its fields under their short names."""
  is_undrawn = trial.state == "waiting" and not trial.params
  return "its point is not drawn yet" if is_undrawn else _setting(trial.params, names)


def table_of(titles: Sequence[str], firsts: Sequence[str]) -> rich.table.Table:
  """Returns a table without rows; its first column is folded, between words, to what is left.

  Args:
    titles: of the columns.
    firsts: the texts of the first column.
  """
  longest = max((len(word) for text in firsts for word in text.split()), default=0)
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
  table.add_column(titles[0], overflow="fold", min_width=min(longest, _LONGEST_WORD))
  for title in titles[1:]:
    table.add_column(title, no_wrap=True, justify="left" if title in _LEFT_ALIGNED else "right")
  return table


def reasons(sweep: Sweep, progress: Mapping[int, Progress]) -> list[str]:
  """Returns a line for each reason that trials failed or wait for, and one for pruned trials."""
  found: dict[tuple[str, str], list[int]] = {}
  for trial in sweep.trials:
    if trial.state == "failed" or (trial.state == "waiting" and trial.error):
      reason = trial.state, trial.error or "no reason is known"
      found.setdefault(reason, []).append(trial.number)
  said = [f"{state}: {_numbers(numbers)}: {error}" for (state, error), numbers in found.items()]
  if len(said) > _MOST_REASONS:
    said = [*said[:_MOST_REASONS], f"and {len(said) - _MOST_REASONS:,} more reasons"]
  pruned = [trial.number for trial in sweep.trials if trial.state == "pruned"]
  ends = [progress[n].curve[-1] for n in pruned[-3:] if n in progress and progress[n].curve]
  if pruned:
    last = ", ".join(f"at step {step:,} with {sentences.nats(loss)}" for step, loss in ends)
    said.append(
      f"pruned, behind the others: {_numbers(pruned)}" + (f"; last {last}" if last else "")
    )
  return said


def _numbers(numbers: Sequence[int]) -> str:
  shown = ", ".join(str(number) for number in numbers[:8])
  return f"trial{'s' if len(numbers) > 1 else ''} {shown}" + (", ..." if len(numbers) > 8 else "")


def lines(sweep: Sweep, progress: Mapping[int, Progress], workers: Sequence[str] = ()) -> list[str]:
  """Returns the same as plain text, ASCII but for what names, errors and workers say."""
  sweep, _ = dependent.without(sweep)
  names = short_names(sweep.fields)
  ranking = verdict.rank(sweep.trials)
  said = [heading(sweep, progress)]
  if ranking.ranked:
    best = ranking.ranked[0]
    seeds = sentences.count(len(best.setting.losses), "seed")
    setting = _setting(best.setting.params, names)
    said.append(f"best so far: {sentences.nats(best.mean)} ({seeds}) with {setting}")
    said.append(_verdict(ranking))
  for trial in sweep.trials:
    if trial.state in ("running", "interrupted") and trial.number in progress:
      found = progress[trial.number]
      kind = "validation" if found.curve else "training"
      at = f" at step {found.curve[-1][0]:,}" if found.curve else ""
      loss = f", {kind} loss {found.loss.rstrip(TRAINING_MARK)}{at}" if found.loss else ""
      step = "starting" if found.status.step is None else f"step {found.status.step:,}"
      said.append(f"{trial.state}: trial {trial.number}, {step}{loss}")
  return [*said, *workers, *reasons(sweep, progress)]


@contextlib.contextmanager
def showing(
  console: rich.console.Console,
) -> Iterator[Callable[[Sweep, Sequence[str]], None]]:
  """Yields what shows a sweep as it is now, and what each worker said last.

  On a terminal the picture is redrawn; elsewhere the plain lines that have changed are printed.
  """
  follower, said = Follower(), list[str]()
  with contextlib.ExitStack() as stack:
    picture = None
    if console.is_terminal and not console.is_dumb_terminal:
      picture = stack.enter_context(rich.live.Live(console=console, auto_refresh=False))

    def show(sweep: Sweep, workers: Sequence[str]) -> None:
      progress = follower.poll(sweep, time.time())
      if picture is not None:
        picture.update(render(sweep, progress, workers), refresh=True)
        return
      now = lines(sweep, progress, workers)
      for line in now:
        if line not in said:
          console.print(rich.text.Text(line), soft_wrap=True)
      said[:] = now

    yield show
