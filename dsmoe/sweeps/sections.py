"""What a page says about a sweep: verdict, fields, importance, all settings, seeds, compute."""

from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from dsmoe.reporting import html
from dsmoe.sweeps import (
  dependent,
  effects,
  figures,
  importance,
  live,
  promotion,
  sentences,
  verdict,
)
from dsmoe.sweeps.progress import Progress
from dsmoe.sweeps.results import Sweep, Trial

MOST_ROWS = 50
MOST_FIELDS = 12
_NEXT_RUNS = 6
_UNDER_WAY = ("running", "interrupted")
_KEYS = figures.KEYS
_INTERVALS = (
  "A line is the interval of the mean of one setting over seeds; a setting with one seed has none."
)


def of_sweep(
  sweep: Sweep,
  price_per_device_hour: float | None = None,
  progress: Mapping[int, Progress] | None = None,
) -> list[html.Section]:
  """Returns the sections of a page about a sweep, in any state.

  Args:
    sweep: see `results.read`.
    price_per_device_hour: in any currency; None: no price is stated.
    progress: of running trials, see `progress.Follower`; None: nothing is said of them.
  """
  sweep, multiples = dependent.without(sweep)
  ranking = verdict.rank(sweep.trials)
  fields = [field for field in sweep.fields if field != "seed"]
  names = live.short_names(fields)
  first = verdict_section(sweep, ranking, fields, names, progress or {})
  made = [first._replace(parts=[*first.parts, *multiples])]
  if any(t.state in _UNDER_WAY and t.number in (progress or {}) for t in sweep.trials):
    made.append(running_section(sweep, progress or {}))
  if seen := verdict.fields_of(ranking, fields):
    made.append(fields_section(sweep, ranking, seen))
    made.append(importance_section(sweep, seen, names))
    made.append(parallel_section(ranking, seen, names))
  made.append(seeds_section(sweep, ranking))
  if any(trial.state in ("failed", "pruned") for trial in sweep.trials):
    made.append(lost_section(sweep))
  return [*made, compute_section(sweep, ranking, price_per_device_hour)]


def page(
  sweep: Sweep,
  price_per_device_hour: float | None = None,
  progress: Mapping[int, Progress] | None = None,
  note: str = "",
) -> str:
  """Returns the HTML page about a sweep; `note` is below its title, the others see `of_sweep`."""
  made = of_sweep(sweep, price_per_device_hour, progress)
  return html.page(f"Sweep {sweep.name}", made, note)


def verdict_section(
  sweep: Sweep, ranking: verdict.Ranking, fields, names, progress
) -> html.Section:
  """Returns which settings may be the best, as sentences, a picture and a table."""
  parts: list = [live.heading(sweep, progress) + ".", *sentences.of_ranking(ranking)]
  if ranking.ranked:
    note = f"{_INTERVALS} Short strokes are single runs; ▶ is a far higher loss."
    shown = min(len(ranking.ranked), figures.MOST_RANKED)
    alt = f"The mean final losses of the {shown} best settings with their intervals and runs."
    picture = {"": figures.ranking(ranking)}
    parts.append(html.Figure("The best settings", alt, picture, _KEYS, note))
    parts.append(_ranking_table(ranking, fields, names))
  return html.Section("Verdict", parts)


def _ranking_table(ranking: verdict.Ranking, fields, names) -> html.Table:
  level = f"{100 * ranking.level:.4g}%"
  header = ["rank", "mean loss", "verdict", *(names[field] for field in fields)]
  header += [f"{level} interval", "seeds", "behind the first"]
  rows = []
  for place, one in enumerate(ranking.ranked[:MOST_ROWS], 1):
    params = [sentences.text(one.setting.params.get(field, "")) for field in fields]
    interval = "" if one.interval is None else " to ".join(map(sentences.nats, one.interval))
    losses, lost = one.setting.losses, sentences.lost(one.setting)
    seeds = f"{len(losses)}" + (f" ({lost} lost)" if lost else "")
    said = "tied" if one.is_tied and len(ranking.tied) > 1 else "best" if one.is_tied else "worse"
    mean = sentences.nats(one.mean)
    rows.append([str(place), mean, said, *params, interval, seeds, _behind(one)])
  note = (
    "Intervals of means hold for one setting alone, those of differences for all together. In the "
    "order of means without what each seed's runs share. Lost: pruned, failed or not finite."
  )
  more = len(ranking.ranked) - MOST_ROWS
  note += f" {more:,} settings further down are left out." if more > 0 else ""
  return html.Table("Ranking", header, rows, note)


def _behind(one: verdict.Ranked) -> str:
  estimate, margin = one.behind.estimate, one.behind.margin
  if not margin and not estimate:
    return ""
  if margin == float("inf"):
    return f"{sentences.nats(estimate)} (no interval)"
  ends = f"{sentences.nats(estimate - margin)} to {sentences.nats(estimate + margin)}"
  return f"{sentences.nats(estimate)} ({ends})"


def running_section(sweep: Sweep, progress: Mapping[int, Progress]) -> html.Section:
  """Returns how far trials that run or were interrupted are, with their validation curves."""
  trials = [t for t in sweep.trials if t.state in _UNDER_WAY and t.number in progress]
  rows = []
  for trial in trials[:MOST_ROWS]:
    found = progress[trial.number]
    state = found.status.state if trial.state == "running" else trial.state
    row = [str(trial.number), sentences.name(trial.params), str(trial.seed), state, found.steps]
    rows.append([*row, live.sparkline([loss for _, loss in found.curve]), found.loss])
  header = ["trial", "setting", "seed", "state", "step", "validation curve", "last loss"]
  said = [f"{text}." for text in live.notes(trials[:MOST_ROWS], progress)]
  said += [f"{len(trials) - MOST_ROWS:,} more are left out."] if len(trials) > MOST_ROWS else []
  table = html.Table("Running trials", header, rows, " ".join(said))
  return html.Section("Running trials", [table])


def fields_section(sweep: Sweep, ranking: verdict.Ranking, fields) -> html.Section:
  """Returns the loss against each field, and the effects that matched settings show."""
  parts: list = [
    "Each point is a setting. Settings with the same value of one field differ in the others, so that "
    "only the effects below, from settings that differ in one field alone, compare like with like."
  ]
  for field in fields[:MOST_FIELDS]:
    picture, num_far = figures.against(ranking, field)
    note = _INTERVALS
    if num_far:
      note += (
        f" {sentences.count(num_far, 'setting')} with a far higher loss at the upper edge (▲)."
      )
    alt = f"The mean final loss of each setting over {field}."
    parts.append(html.Figure(f"Loss against {field}", alt, {"": picture}, _KEYS, note))
  if len(fields) > MOST_FIELDS:
    parts.append(f"{len(fields) - MOST_FIELDS:,} further fields are not drawn.")
  unmatched = []
  for field in fields:
    _, found = effects.effects(sweep.trials, field)
    parts += [sentences.of_effect(effect) for effect in effects.against_the_lowest(found)]
    unmatched += [] if found else [field]
  if unmatched:
    parts.append(
      f"No two settings with a loss differ only in {' or only in '.join(unmatched)}, so no effect of "
      "that is stated."
    )
  return html.Section("Loss against each field", parts)


def importance_section(sweep: Sweep, fields, names) -> html.Section:
  """Returns how much each field alone explains, with the definition and the uncertainty."""
  found = importance.importances(sweep.trials, fields)
  if not found:
    return html.Section(
      "Importance of the fields",
      [
        "Importance needs at least 4 settings with different losses, and a field whose values repeat."
      ],
    )
  definition = (
    "The importance of a field is the share of the variance between settings that goes with its value "
    "alone: epsilon squared of the ranks of mean losses, grouped by value (numbers of more than "
    f"{importance.MOST_GROUPS} kinds in four groups). It is adjusted so that a field that does nothing "
    "has 0 on average, and leaves out what fields do only together. It describes the settings that "
    "were tried: a search that looks mostly at good ones shows less than a grid."
  )
  keys = (html.Key("what chance reaches in 5% of sweeps", figures.MARK),)
  note = (
    "The black line is the 95% interval (jackknife over settings). Grey bars are within chance."
  )
  alt = "A bar for each field with its share of the variance, its interval and the level of chance."
  picture = {"": figures.importance(found, names)}
  rows = [
    [
      one.field,
      f"{max(one.share, 0):.0%}",
      f"{max(one.low, 0):.0%} to {max(one.high, 0):.0%}",
      f"{one.chance:.0%}",
      "beyond chance" if one.is_beyond_chance else "not distinguishable from chance",
    ]
    for one in found
  ]
  header = ["field", "share", "95% interval", "chance", "verdict"]
  table = html.Table("Importance", header, rows, f"Of {found[0].num_settings} settings.")
  parts: list = [
    definition,
    html.Figure("Importance of each field", alt, picture, keys, note),
    table,
  ]
  return html.Section("Importance of the fields", parts)


def parallel_section(ranking: verdict.Ranking, fields, names) -> html.Section:
  """Returns all settings in parallel coordinates."""
  alt = "A line for each setting through the values of its fields to its final loss."
  note = "Far higher losses are drawn at the upper end of the last axis."
  if len(ranking.ranked) > figures.MOST_SETTINGS:
    note += f" Only the {figures.MOST_SETTINGS} best settings are drawn."
  shown = fields[:MOST_FIELDS]
  picture = {"": figures.parallel(ranking, shown, names)}
  return html.Section(
    "All settings", [html.Figure("Parallel coordinates", alt, picture, _KEYS, note)]
  )


def seeds_section(sweep: Sweep, ranking: verdict.Ranking) -> html.Section:
  """Returns how many seeds settings were run with, and which runs would say most next."""
  parts: list = []
  counts: dict[int, list[verdict.Ranked]] = {}
  for one in ranking.ranked:
    counts.setdefault(len(one.setting.losses), []).append(one)
  rows = [
    [str(number), f"{len(group):,}", f"{sum(one.is_tied for one in group):,}"]
    for number, group in sorted(counts.items())
  ]
  if rows:
    header = ["seeds", "settings", "of them tied with the best"]
    parts.append(html.Table("Seeds by setting", header, rows))
  chosen = promotion.promote(sweep.trials, _NEXT_RUNS)
  if chosen:
    runs = "; ".join(f"{sentences.name(params)} with seed {seed}" for params, seed in chosen)
    parts.append(f"Further seeds would be spent on tied settings, fewest seeds first: {runs}.")
  elif ranking.ranked:
    parts.append("No further seeds are needed: no two settings are tied.")
  else:
    parts.append("No setting has a seed with a loss yet.")
  return html.Section("Seeds", parts)


def lost_section(sweep: Sweep) -> html.Section:
  """Returns which trials failed, with their reasons, and which were pruned."""
  lost = [trial for trial in sweep.trials if trial.state in ("failed", "pruned")]
  lost.sort(key=lambda trial: (trial.state, trial.number))
  rows = [
    [str(t.number), sentences.name(t.params), str(t.seed), t.state, t.error or _why(t)]
    for t in lost[:MOST_ROWS]
  ]
  note = f"{len(lost) - MOST_ROWS:,} more are left out." if len(lost) > MOST_ROWS else ""
  header = ["trial", "setting", "seed", "state", "why"]
  return html.Section(
    "Trials that did not end well", [html.Table("Failed and pruned trials", header, rows, note)]
  )


def _why(trial: Trial) -> str:
  return "its validation loss was behind the others'" if trial.state == "pruned" else "not known"


def compute_section(
  sweep: Sweep, ranking: verdict.Ranking, price_per_device_hour: float | None
) -> html.Section:
  """Returns what the trials used, by state, and what of it went to the tied settings."""
  header = ["trials", "number", "hours", "device hours", "FLOPs", "of them computed again"]
  header += ["price"] if price_per_device_hour is not None else []
  tied = {verdict.key(one.setting.params) for one in ranking.tied}
  groups: dict[str, Sequence[Trial]] = {
    state: [trial for trial in sweep.trials if trial.state == state]
    for state in ("complete", "pruned", "failed", "running", "interrupted", "waiting")
  }
  complete = groups["complete"]
  groups = {state: group for state, group in groups.items() if group or state == "complete"}
  groups["all"] = sweep.trials
  if ranking.ranked:
    groups["complete, of tied settings"] = [
      trial
      for trial in complete
      if any(verdict.key(one.params) in tied for one in verdict.settings([trial]))
    ]
  rows = []
  for name, group in groups.items():
    hours = sum(trial.seconds for trial in group) / 3600
    device_hours = sum(trial.seconds * trial.num_devices for trial in group) / 3600
    row = [name, f"{len(group):,}", f"{hours:,.3g}", f"{device_hours:,.3g}"]
    row += [_flops(trial.flops for trial in group), _flops(trial.lost_flops for trial in group)]
    if price_per_device_hour is not None:
      row.append(f"{device_hours * price_per_device_hour:,.2f}")
    rows.append(row)
  note = (
    "Hours are those of the trials' processes added up, not of the clock; those of a process that was "
    "killed are not known. FLOPs computed again are of steps that were lost by a kill or a bad step."
  )
  if price_per_device_hour is not None:
    note += f" A device hour costs {price_per_device_hour:g}."
  return html.Section("Compute of the sweep", [html.Table("Compute by state", header, rows, note)])


def _flops(numbers: Iterable[float]) -> str:
  total = sum(numbers)
  return f"{total:.3g}" if total == total else "not known"


def best_runs(sweep: Sweep, most: int = 6) -> list[epath.Path]:
  """Returns the workdirs of the first complete trials of the best settings, in the ranking's order."""
  first: dict[str, epath.Path] = {}
  for trial in sweep.trials:
    if trial.state == "complete":
      for setting in verdict.settings([trial]):
        first.setdefault(verdict.key(setting.params), trial.workdir)
  ranked = verdict.rank(sweep.trials).ranked[:most]
  return [first[verdict.key(one.setting.params)] for one in ranked]
