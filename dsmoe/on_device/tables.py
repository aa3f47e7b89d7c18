"""The tables of BENCHMARKS.md about GPUs, from the files that sessions leave."""

import re
from collections.abc import Callable, Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]

BEGIN = "<!-- Written by scripts/device_tables.py. -->"
END = "<!-- End of what scripts/device_tables.py wrote. -->"

_SHAPES = {"v3": "DeepSeek-V3's sizes", "v2_lite": "DeepSeek-V2-Lite's sizes"}
_KERNELS = {
  "routing": "routing",
  "permute": "permute",
  "combine": "combine",
  "grouped_matmul": "grouped matmul",
  "grouped_swiglu": "fused SwiGLU",
  "routed_swiglu": "permute, experts, combine",
  "attention": "attention",
  "decode_attention": "decode attention, 32 rows",
  "quantized_matmul": "FP8 projection",
  "quantized_routed_swiglu": "FP8 experts, with permute and combine",
}
# "gradients" are those alone, with what they need of the forward pass.
_DIRECTIONS = {
  "forward": "",
  "gradients": ", its gradients",
  "forward + backward": ", with gradients",
}
# The implementations of `bench_kernels` beside ours.
_BASELINES = {
  "reference": "XLA",
  "xla": "XLA",
  "ragged_dot": "XLA's `ragged_dot`, which applies every expert to every row",
  "batched": "cuBLAS, one batched matmul of equal groups",
  "jax_mosaic_gpu": "JAX's Mosaic kernel",
  "cudnn": "cuDNN, values padded to the width of keys",
  "not quantized": "in bfloat16",
  "bfloat16": "dsmoe in bfloat16",
  "dense": "cuBLAS, one expert for all rows",
}
# The FP8 form of a kernel is measured beside its bfloat16 form too.
_IN_BFLOAT16 = {"quantized_routed_swiglu": "routed_swiglu"}


def section(rows: Rows) -> str:
  """Returns the heading and the tables of one session's rows.

  Raises:
    ValueError: for rows of a dry run, or of several sessions.
  """
  stamps = {(r["chip"], r["date"], r["jax"], r["driver"], r["commit"]) for r in rows}
  if any(row["dry_run"] for row in rows) or len(stamps) != 1:
    raise ValueError(
      f"the rows must be of one session on a GPU, got {len(stamps)} sessions, "
      f"{sum(bool(row['dry_run']) for row in rows)} rows of a dry run"
    )
  [(chip, date, jax, driver, commit)] = stamps
  heading = f"### {chip}, {date}"
  about = f"jax: {jax}; driver: {driver or 'not noted'}; commit: {commit or 'not noted'}."
  tables = [_kernels(rows, name, title) for name, title in _SHAPES.items()]
  tables += [_steps(rows), _decoding(rows), _others(rows)]
  return "\n\n".join([heading, about, *filter(None, tables)])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown; "" without rows."""
  if not rows:
    return ""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float | None, scale: float = 1.0) -> str:
  """Returns a number with three digits, or all before the point; "" for None."""
  if value is None:
    return ""
  value *= scale
  return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _kernels(rows: Rows, shape: str, title: str) -> str:
  found = [r for r in rows if r["part"].startswith("kernels") and r.get("shape") == shape]
  timed = [r for r in found if r.get("median_secs") is not None]
  lines = []
  for kernel, name in _KERNELS.items():
    for direction, ending in _DIRECTIONS.items():
      ours = _ours(timed, kernel, direction)
      if ours is None:
        continue
      of_case = {r["implementation"]: r for r in timed if _is_of(r, kernel, direction)}
      if kernel in _IN_BFLOAT16:
        in_bfloat16 = _ours(timed, _IN_BFLOAT16[kernel], direction)
        of_case |= {"bfloat16": in_bfloat16} if in_bfloat16 else {}
      beside = [f"{label}: {_ms(of_case[n])}" for n, label in _BASELINES.items() if n in of_case]
      rate = ours.get("gflops_per_sec")
      lines.append([name + ending, _ms(ours), figure(rate, 1e-3), "; ".join(beside)])
  return _table([f"kernel, {title}", "ms", "TFLOP/s", "baselines, ms"], lines)


def _is_of(row: dict[str, Any], kernel: str, direction: str) -> bool:
  return row["kernel"] == kernel and row["direction"] == direction


def _ours(timed: Rows, kernel: str, direction: str) -> dict[str, Any] | None:
  """Returns the row of our own kernel; the whole layer may be timed beside its fused SwiGLU."""
  places = [(kernel, "mosaic_gpu")]
  places += [("grouped_swiglu", "local dispatch")] if kernel == "routed_swiglu" else []
  for name, implementation in places:
    for row in timed:
      if _is_of(row, name, direction) and row["implementation"] == implementation:
        return row
  return None


def _ms(row: dict[str, Any]) -> str:
  return figure(row["median_secs"], 1e3)


def _steps(rows: Rows) -> str:
  lines = []
  fp8_secs = [
    row["compile_secs"] for row in rows if row.get("part") == "compile_fp8" and "kernels" in row
  ]
  for row in rows:
    if row["part"].startswith("step_") and "tokens_per_sec" in row:
      memory = figure(row.get("peak_device_mib"), 1 / 1024)
      precision = "bfloat16" if row["precision"] == "compute_dtype" else row["precision"].upper()
      what = f"{row['kernels']}, {precision}, {row['rows']} x {row['tokens']:,}"
      mfu = "" if row.get("mfu") is None else f"{row['mfu']:.0%}"
      speed = f"{row['tokens_per_sec']:,.0f}"
      compiling = figure(row.get("compile_secs"))
      if fp8_secs and row["precision"] == "fp8":  # this row's program came from the cache
        compiling = f"{figure(fp8_secs[0])}, beside other work"
      lines.append([what, speed, mfu, memory, compiling])
  header = "training step of DeepSeek-V2-Lite's sizes, 4 layers: kernels, precision, rows x tokens"
  return _table([header, "tokens/s", "MFU", "peak GiB", "compiling, s"], lines)


def _decoding(rows: Rows) -> str:
  lines = []
  for row in rows:
    if row["part"] == "decode" and row.get("decode_tokens_per_sec") is not None:
      bound = row["decode_bound_tokens_per_sec"]
      lines.append(
        [
          f"{row['batch']:,}",
          f"{row['cache_tokens']:,}",
          f"{row['decode_tokens_per_sec']:,.0f}",
          figure(row["step_secs"], 1e3),
          f"{row['decode_tokens_per_sec'] / bound:.0%}",
        ]
      )
  header = "decoding with DeepSeek-V2-Lite's sizes, 4 layers: rows"
  return _table([header, "tokens in the cache", "tokens/s", "ms a step", "of the bound"], lines)


_OTHERS: dict[str, Callable[[dict[str, Any]], str]] = {
  "values": lambda r: f"{r['passed']} tests passed, {r['failed']} failed, {r['skipped']} skipped",
  "train": lambda r: (
    f"{r['steps']} steps, killed at {r['killed_at_step']}, resumed from {r['resumed_from_step']}; "
    f"loss {r['first_loss']:.2f} to {r['last_loss']:.2f}; losses of steps made twice differ by at "
    f"most {figure(r['largest_difference'])}"
  ),
  "serve": lambda r: (
    f"{r['answered']} of {r['requests']} requests answered, {r['new_tokens']} tokens, the longest "
    f"after {figure(r['longest_secs'])} s, beside the tests of kernels"
  ),
}


def _others(rows: Rows) -> str:
  found = {r["part"]: r for r in rows if r["part"] in _OTHERS and "ended" not in r}
  lines = [[part, _OTHERS[part](row)] for part, row in found.items()]
  ends = {r["part"]: r["ended"] for r in rows if "ended" in r}
  failed = [[part, f"failed: {end}"] for part, end in ends.items() if end != "well"]
  return _table(["part", "result"], [*lines, *failed])


def replaced(text: str, sections: Sequence[str]) -> str:
  """Returns a document with these sections between its two marks.

  Raises:
    ValueError: for a document without one pair of marks.
  """
  if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
    raise ValueError(f"the document must have one line {BEGIN!r} and, after it, one line {END!r}")
  block = "\n\n".join([BEGIN, *sections, END])
  pattern = re.escape(BEGIN) + ".*" + re.escape(END)
  return re.sub(pattern, lambda _: block, text, flags=re.DOTALL)
