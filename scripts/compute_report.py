"""Reports what an experiment costs: parameters by part, FLOPs by convention, cache bytes, MFU.

python scripts/compute_report.py --config=experiments/deepseek_v3.py --tokens_per_sec=1543 --chip=h100

Only shapes are computed, no model is built. FLOPs are multiplications and additions of forward and backward,
without recomputation; an FP8 operation counts as one.
"""

from typing import Any

import rich
import rich.table
from absl import app, flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe.planning import accounting, chips
from dsmoe.reporting import output

# Training FLOPs from which a rule applies, or applied.
THRESHOLDS = {
  "1e23": "US EO 14110 (revoked), biological models",
  "1e25": "EU AI Act, systemic risk",
  "1e26": "US EO 14110 (revoked); California SB 53",
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, experiments/<name>.py.")
_JSON = output.define_json()
_TOKENS_PER_SEC = flags.DEFINE_float(
  "tokens_per_sec", None, "Measured training speed of all devices together, for the MFU."
)
_PEAK_FLOPS = flags.DEFINE_float("peak_flops", None, "Peak FLOP/s of all devices together.")
_CHIP = flags.DEFINE_enum(
  "chip", None, list(chips.CHIPS), "Kind of chip, whose dense bfloat16 peak the MFU refers to."
)
_NUM_CHIPS = flags.DEFINE_integer("num_chips", 1, "Number of chips of that kind.", lower_bound=1)


def report(config: config_lib.Config) -> dict[str, Any]:
  """Returns all figures of a config; FLOPs a token at its data.sequence_length."""
  parameters = accounting.parameters(config.model)
  flops = accounting.flops_per_token(config.model, config.data.sequence_length)
  tokens = config.num_steps * config.batch_size * config.data.sequence_length
  training = {name: value * tokens for name, value in flops.items()}
  training["6nd"] = 6.0 * parameters["active"] * tokens
  return {
    "total_params": parameters["total"],
    "active_params": parameters["active"],
    "params_by_part": parameters["parts"],
    "mtp_total_params": parameters["mtp_total"],
    "mtp_active_params": parameters["mtp_active"],
    "sequence_length": config.data.sequence_length,
    "flops_per_token": flops,
    "kv_cache_bytes_per_token": accounting.kv_cache_bytes_per_token(config.model),
    "training_tokens": tokens,
    "training_flops": training,
    "share_of_threshold": {
      limit: {name: value / float(limit) for name, value in training.items()}
      for limit in THRESHOLDS
    },
  }


def table(name: str, values: dict[str, Any]) -> rich.table.Table:
  """Lays the figures out for reading."""
  out = rich.table.Table("", "", title=name, show_header=False)
  out.columns[1].justify = "right"
  for part, size in values["params_by_part"].items():
    out.add_row(f"parameters: {part}", f"{size:,}")
  out.add_section()
  out.add_row("parameters, main model with router bias", f"{values['total_params']:,}")
  out.add_row("active: in matrices one token is multiplied with", f"{values['active_params']:,}")
  mtp = f"{values['mtp_total_params']:,} / {values['mtp_active_params']:,}"
  out.add_row("MTP modules apart, total / active, embedding and head shared", mtp)
  out.add_row("latent cache, bytes a token in bfloat16", f"{values['kv_cache_bytes_per_token']:,}")
  out.add_section()
  for convention, flops in values["flops_per_token"].items():
    label = f"FLOPs a token at {values['sequence_length']:,}, {convention}"
    out.add_row(label, f"{flops / 1e9:,.4g} GFLOP")
  out.add_section()
  out.add_row("training tokens", f"{values['training_tokens']:,}")
  for convention, flops in values["training_flops"].items():
    out.add_row(f"training FLOPs, {convention}", f"{flops:.3g}")
  out.add_section()
  for limit, shares in values["share_of_threshold"].items():
    text = ", ".join(f"{share:.3g} ({convention})" for convention, share in shares.items())
    out.add_row(f"times {limit}: {THRESHOLDS[limit]}", text)
  for convention, mfu in values.get("mfu", {}).items():
    out.add_row(f"MFU, {convention}", f"{mfu:.1%}")
  return out


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  values = report(config_lib.from_config_dict(_CONFIG.value))
  peak = _PEAK_FLOPS.value
  if _CHIP.value:
    chip = chips.CHIPS[_CHIP.value]
    peak = chip.peak_flops * chip.devices_per_chip * _NUM_CHIPS.value
  if _TOKENS_PER_SEC.value and not peak:
    raise app.UsageError("--tokens_per_sec needs --chip or --peak_flops")
  if _TOKENS_PER_SEC.value:
    speed = _TOKENS_PER_SEC.value
    values["mfu"] = {name: f * speed / peak for name, f in values["flops_per_token"].items()}
  output.write_json(_JSON.value, values)
  if _JSON.value != output.STDOUT:
    rich.print(table(config_flags.get_config_filename(flags.FLAGS["config"]), values))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  output.run_script(main)
