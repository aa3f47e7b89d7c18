"""Times the grouped SwiGLU's implementations beside one dense SwiGLU of equal FLOPs.

python scripts/bench_kernels.py --config=experiments/bench_small.py --tokens=4096

Each output and gradient is compared with the reference before any timing. The ways are then
timed in turns, so that a busy machine slows all of them. `dense` is the bound: every row
through one expert.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from absl import app, flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import dispatch, host
from dsmoe.config import ModelConfig
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_swiglu

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, experiments/<name>.py.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens routed.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Times each way is measured.", lower_bound=1)
_IMPLEMENTATIONS = flags.DEFINE_multi_enum(
  "implementations",
  ["blocked"],
  sorted(IMPLEMENTATIONS),
  "What to time; ragged_dot is slow on CPU.",
)
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def problem(config: ModelConfig, M: int):
  """Returns random (x_MD, expert_MK, gate_MK, experts): every expert about equally loaded."""
  E, K = config.n_routed_experts, config.num_experts_per_tok
  D, F = config.hidden_size, config.moe_intermediate_size
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), config.compute_dtype)  # noqa: E731
  expert_MK = np.argsort(rng.random((M, E)), axis=1)[:, :K].astype(np.int32)
  gate_MK = rng.random((M, K), np.float32)
  experts = (draw(E, D, F) / D**0.5, draw(E, D, F) / D**0.5, draw(E, F, D) / F**0.5)
  return draw(M, D), jnp.asarray(expert_MK), jnp.asarray(gate_MK), experts


def ways(config: ModelConfig, M: int, names: list[str]) -> dict[str, tuple]:
  """Returns (function, its oracle, their arguments) of each way; a function takes (x, experts)."""
  x_MD, expert_MK, gate_MK, experts = problem(config, M)
  order_P = jnp.argsort(expert_MK.reshape(-1), stable=True)
  x_PD, weight_P = x_MD[order_P // expert_MK.shape[1]], gate_MK.reshape(-1)[order_P]
  sizes_E = jnp.bincount(expert_MK.reshape(-1), length=config.n_routed_experts).astype(jnp.int32)

  def one_expert(x_PD, experts):
    w_gate_DF, w_up_DF, w_down_FD = (w[0] for w in experts)
    inner_PF = jax.nn.silu(x_PD @ w_gate_DF) * (x_PD @ w_up_DF) * weight_P[:, None]
    return inner_PF.astype(x_PD.dtype) @ w_down_FD

  def grouped(x_PD, experts, implementation: str = "reference"):
    gate_EDF, up_EDF, down_EFD = experts
    sizes = sizes_E if gate_EDF.shape[0] > 1 else sizes_E.sum(keepdims=True)
    return grouped_swiglu(x_PD, weight_P, gate_EDF, up_EDF, down_EFD, sizes, implementation)

  found: dict[str, tuple] = {"dense": (one_expert, grouped, (x_PD, tuple(w[:1] for w in experts)))}
  for name in names:
    found[name] = functools.partial(grouped, implementation=name), grouped, (x_PD, experts)
  local, oracle = (
    functools.partial(lambda way, x, experts: way(x, expert_MK, gate_MK, experts), way)
    for way in (dispatch.local, dispatch.dense)
  )
  return found | {"local dispatch": (local, oracle, (x_MD, experts))}


def _with_gradient(fn: Callable) -> Callable:
  def run(*args):
    value, vjp = jax.vjp(fn, *args)
    return value, vjp(jnp.sin(value.astype(jnp.float32)).astype(value.dtype))

  return run


def check(found: dict[str, tuple], compute_dtype: str) -> None:
  """Raises AssertionError for a way whose value or gradient is not its oracle's."""
  limit = 1e-4 if compute_dtype == "float32" else 5e-2
  for fn, oracle, args in found.values():
    actual, expected = (jax.jit(_with_gradient(f))(*args) for f in (fn, oracle))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.abs(b).max())


def measure(config: ModelConfig, M: int, names: list[str], rounds: int) -> list[dict]:
  """Returns a row of figures for each way and direction."""
  options, found = host.compiler_options(), ways(config, M, names)
  check(found, config.compute_dtype)
  compiled = {
    (name, direction): (jax.jit(wrap(fn), compiler_options=options), args)
    for name, (fn, _, args) in found.items()
    for direction, wrap in (("forward", lambda f: f), ("forward + backward", _with_gradient))
  }
  secs: dict[tuple[str, str], list[float]] = {key: [] for key in compiled}
  for round_number in range(rounds + 2):
    for key, (fn, args) in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(fn(*args))
      if round_number >= 2:
        secs[key].append(time.perf_counter() - start)
  flops = 6 * M * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size
  rows = []
  for (name, direction), times in secs.items():
    ratios = [d / t for d, t in zip(secs["dense", direction], times)]
    work = flops * (1 if direction == "forward" else 3)
    rows.append(
      {
        **{"kernel": "grouped_swiglu", "implementation": name, "direction": direction},
        **{"device": jax.devices()[0].device_kind, "tokens": M},
        "median_secs": statistics.median(times),
        "gflops_per_sec": work / statistics.median(times) / 1e9,
        "of_dense": statistics.median(ratios),
      }
    )
  return rows


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  host.start()
  config = config_lib.from_config_dict(_CONFIG.value).model
  rows = measure(config, _TOKENS.value, _IMPLEMENTATIONS.value, _ROUNDS.value)
  if _JSON.value:
    print(json.dumps(rows))
    return
  table = rich.table.Table("implementation", "direction", "ms", "GFLOP/s", "of dense")
  for row in rows:
    figures = (1e3 * row["median_secs"], row["gflops_per_sec"], row["of_dense"])
    table.add_row(
      *(row["implementation"], row["direction"]),
      *(f"{x:,.{n}f}" for x, n in zip(figures, (1, 0, 2))),
    )
  rich.print(table)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
