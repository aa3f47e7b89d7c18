"""Says what routing traces tell of the experts: load, pairs, overlap of layers and domains, nodes.

python scripts/analyze_routing.py runs/traced/routing_traces/step_100_process_0.npz --plot=routing.png

A trace is a file that training wrote for a step of log.routing_trace_steps; of a run of several
processes name any one file. Every number is defined in dsmoe/reporting/routing_analysis.py. Groups of
experts and domains (sources of the training data) follow from the run's config.json beside the
folder of the traces.
"""

from collections.abc import Sequence

import rich.box
import rich.console
import rich.table
import rich.text
from absl import app, flags
from etils import epath

from dsmoe.reporting import (
  html,
  output,
  routing_analysis,
  routing_plots,
  routing_sections,
  run_files,
)

_GROUPS = flags.DEFINE_integer(
  "groups",
  None,
  "Groups of equally many neighbouring experts, such as the nodes they live on; None: the config's "
  "n_group.",
  lower_bound=1,
)
_PAIRS = flags.DEFINE_integer(
  "pairs", 10, "How many of the commonest pairs to show.", lower_bound=0
)
_PLOT = flags.DEFINE_string("plot", None, "PNG file to draw, a row for each trace.")
_JSON = output.define_json()


def tables(analysis: routing_analysis.Analysis) -> Sequence[html.Table]:
  """Returns what is shown of a trace."""
  found = [
    routing_sections.load_table(analysis),
    routing_sections.pairs_table(analysis, _PAIRS.value),
    routing_sections.layers_table(analysis),
    routing_sections.domains_table(analysis),
  ]
  return [table for table in found if table is not None and table.rows]


def shown(table: html.Table) -> rich.table.Table:
  """Returns a table for the terminal."""
  text = rich.text.Text
  laid_out = rich.table.Table(
    title=text(table.title), caption=text(table.note), box=rich.box.SIMPLE
  )
  for number, name in enumerate(table.header):
    laid_out.add_column(text(name), justify="right" if number else "left")
  for row in table.rows:
    laid_out.add_row(*map(text, row))
  return laid_out


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise app.UsageError("the file of at least one routing trace must be given")
  if _PLOT.value is not None and not epath.Path(_PLOT.value).parent.is_dir():
    raise app.UsageError(f"the folder of --plot must exist, there is no {_PLOT.value}")
  console = rich.console.Console(quiet=_JSON.value == output.STDOUT)
  found, drawn = [], []
  for name in argv[1:]:
    path = epath.Path(name)
    config, remarks = run_files.config_of_trace(path)
    trace, analysis, more = routing_sections.read(path, config, _GROUPS.value)
    _, M, K = trace.expert_LMK.shape
    console.print(rich.text.Text(f"\n{path}: step {trace.step}, {M:,} tokens, {K} experts a token"))
    for remark in remarks + more:
      console.print(rich.text.Text(remark))
    for table in tables(analysis):
      console.print(shown(table))
    head = {"trace": str(path), "step": trace.step, "tokens": M, "experts_per_token": K}
    found.append(head | routing_analysis.to_dict(analysis))
    drawn.append((f"{path.name}, step {trace.step}", analysis))
  output.write_json(_JSON.value, found)
  if _PLOT.value is not None:
    routing_plots.draw(drawn, _PLOT.value)
    console.print(rich.text.Text(_PLOT.value))


if __name__ == "__main__":
  output.run_script(main)
