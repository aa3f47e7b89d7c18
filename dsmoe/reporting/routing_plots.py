"""Draws what routing traces say as one PNG file: a row of heat maps for each trace."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib import colors, figure

from dsmoe.reporting import routing_analysis
from dsmoe.reporting.routing_analysis import Analysis

_DOTS_PER_INCH = 110


def draw(found: Sequence[tuple[str, Analysis]], path: epath.PathLike) -> None:
  """Draws load by layer, the first and last layers' pairs, overlap of layers, domain by expert.

  Args:
    found: the title and the analysis of each trace.
    path: the PNG file to write.
  """
  columns = 5 if any(analysis.domains is not None for _, analysis in found) else 4
  picture = figure.Figure(figsize=(4.2 * columns, 3.8 * len(found)), layout="constrained")
  grid = picture.subplots(len(found), columns, squeeze=False)
  for axes, (title, analysis) in zip(grid, found):
    L, E = analysis.counts_LE.shape
    mean_L1 = analysis.counts_LE.mean(axis=1, keepdims=True)
    load_LE = analysis.counts_LE / np.where(mean_L1 > 0, mean_L1, np.nan)
    _map(axes[0], load_LE.T, f"{title}\nload / mean load", "MoE layer", "expert")
    for ax, l in ((axes[1], 0), (axes[2], L - 1)):
      pairs_EE = analysis.pairs_LEE[l]
      lift_EE = routing_analysis.lift(pairs_EE, routing_analysis.num_tokens(analysis, l))
      np.fill_diagonal(lift_EE, np.nan)
      _map(ax, lift_EE, f"lift of pairs, MoE layer {l}", "expert", "expert")
    overlap_LL = np.where(np.eye(L) > 0, np.nan, analysis.layer_overlap_LL)
    _map(axes[3], overlap_LL.T, "overlap of layers", "of MoE layer", "with MoE layer", False)
    if analysis.domains is not None and analysis.domain_counts_LDE is not None:
      counts_DE = analysis.domain_counts_LDE[-1]
      total_D1 = counts_DE.sum(axis=1, keepdims=True)
      share_DE = counts_DE / np.where(total_D1 > 0, total_D1, np.nan) * E
      names = "\n".join(f"{i}: {name}" for i, name in enumerate(analysis.domains.names))
      _map(axes[4], share_DE, f"share / even share, MoE layer {L - 1}", "expert", "domain")
      axes[4].set_xlabel(f"expert\n{names}".replace("$", r"\$"), fontsize=8)
    elif columns == 5:
      picture.delaxes(axes[4])
  picture.savefig(epath.Path(path), format="png", dpi=_DOTS_PER_INCH)


def _map(ax, values_YX, title: str, x_label: str, y_label: str, is_over_mean: bool = True) -> None:
  """Draws rows downwards; values over a mean with 1 in the middle of the colours."""
  norm = None
  if is_over_mean:
    top = float(np.clip(np.nan_to_num(values_YX).max(initial=0), 2.0, 4.0))
    norm = colors.TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
  map_name = "RdBu_r" if is_over_mean else "viridis"
  image = ax.imshow(values_YX, cmap=map_name, norm=norm, aspect="auto", interpolation="nearest")
  ax.set_title(title.replace("$", r"\$"), fontsize=9)
  ax.set_xlabel(x_label)
  ax.set_ylabel(y_label)
  ax.xaxis.get_major_locator().set_params(integer=True)
  ax.yaxis.get_major_locator().set_params(integer=True)
  ax.figure.colorbar(image, ax=ax)
