"""Checks the exchange of rows between experts' devices on the attached mesh before it is trusted.

The model's own mixture of experts runs once with the chosen exchange and once with the dense
oracle, forward and backward, on the run's mesh: a layer of as many experts, groups, experts a token
and options of the exchange as the run's, in its precision, with fewer tokens and narrower matrices.
Two routings are tried: all experts equally likely, and skewed by Zipf's law.

On CPU nothing is checked: there `ragged_all_to_all` is emulated, and the tests compare every
exchange with the oracle.

Shapes: N devices that the tokens are split over, M tokens of each, E experts, K experts a token.
"""

import dataclasses
import math
import time

import jax
import numpy as np

from dsmoe.config import Config, ModelConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import processes
from dsmoe.training import exchange_layer, kernel_check

PLATFORMS = ("tpu", "gpu")  # where exchanges are checked
ROUTINGS = {"balanced": 0.0, "zipf:1.2": 1.2}  # the exponents of Zipf's law
TOKENS = 128  # of each device, or the next multiple of `moe_chunks`
# The largest difference from the oracle over the oracle's largest magnitude. The oracle computes in
# the compute dtype: with 64 experts of 128 x 128, 8 of them a token, experts in FP8 differ from it by
# up to 0.08 when nothing is wrong. A row of a wrong expert (0.3) is seen in any precision; that a
# token's gates were taken for each other may be seen in float32 only (0.06 to 0.1).
_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "fp8 rows": 1e-1, "fp8 experts": 2e-1}


class WrongExchangeError(RuntimeError):
  """An exchange did not run, or its results differ from the dense oracle's."""


def check(config: Config, mesh: jax.sharding.Mesh) -> str | None:
  """Runs the exchange of `config.model.dispatch` beside the dense oracle on the run's mesh.

  Returns:
    A line that names the exchange; None where nothing ran: on CPU, with one device along the axis
    `expert`, without experts, or with the oracle itself.

  Raises:
    WrongExchangeError: where the exchange does not run, drops rows that it has room for, or an
      output or gradient differs by more than its limit. One sentence names exchange, sizes and
      figures, and the config field to set.
  """
  model, degree, start = config.model, mesh.shape["expert"], time.perf_counter()
  exchanges = degree > 1 and model.num_moe_layers and model.dispatch != "dense"
  if not exchanges or mesh_lib.platform_of(mesh) not in PLATFORMS:
    return None
  small = narrow(model, mesh)
  chunks = model.exchange.moe_chunks
  M = chunks * -(-TOKENS // chunks)
  axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
  where = f"on {axes} of {mesh.devices.flat[0].device_kind}"
  with_what = (
    f"with {M} tokens a device, {model.num_experts_per_tok} of {model.n_routed_experts} experts, "
    f"{small.hidden_size} x {small.moe_intermediate_size}, {model.compute_dtype}, "
    f"{exchange_layer.options_of(model)}"
  )
  other = "ring" if model.dispatch == "all_gather" else "all_gather"
  advice = f"set model.dispatch={other} to run without it"
  own = exchange_layer.program(exchange_layer.with_room_for_all(small, degree), mesh)
  oracle = exchange_layer.program(exchange_layer.oracle_of(small), mesh)
  for routing, exponent in ROUTINGS.items():
    expert_NMK = exchange_layer.draw(exchange_layer.num_devices(mesh), M, small, exponent)
    inputs = exchange_layer.inputs(small, mesh, expert_NMK)
    try:
      actual = jax.block_until_ready(own(*inputs))
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
      processes.wait_if_alone(error)
      reason = (str(error).strip().splitlines() or [repr(error)])[0]
      raise WrongExchangeError(
        f"exchange {model.dispatch} {where} could not be run {with_what}: {reason}; {advice}"
      ) from error
    if wrong := difference(small, actual, oracle(*inputs), expert_NMK):
      raise WrongExchangeError(
        f"exchange {model.dispatch} {where} is wrong: {with_what}, routing {routing}, {wrong}; "
        f"{advice}"
      )
  return f"exchange checked: {model.dispatch} {where} in {time.perf_counter() - start:.1f} s"


def narrow(model: ModelConfig, mesh) -> ModelConfig:
  """Returns the config with narrow experts that can be split over the mesh like the run's.

  Matrices have the smallest sizes that are multiples of 128 and of every mesh axis, or the run's
  where these are smaller; the hidden size is at least E, which the inputs need. Shared experts,
  which no exchange touches, are left out.
  """
  unit, E = math.lcm(128, *mesh.shape.values()), model.n_routed_experts
  D, F = -(-E // unit) * unit, unit
  if E <= model.hidden_size < D:
    D = model.hidden_size
  F = min(F, model.moe_intermediate_size)
  return dataclasses.replace(model, hidden_size=D, moe_intermediate_size=F, n_shared_experts=0)


def difference(
  config: ModelConfig, actual: tuple, oracle: tuple, expert_NMK: np.ndarray
) -> str | None:
  """Says what an exchange's output and gradients differ in from the dense oracle's.

  Args:
    config: of the exchange, whose precision sets the limit.
    actual, oracle: what a program of `exchange_layer` with gradients returns.
    expert_NMK: what the tokens should have chosen.

  Returns:
    What differs and by how much, or None where all is within the limit.
  """
  E = config.n_routed_experts
  counts_NE = np.stack([np.bincount(e.ravel(), minlength=E) for e in expert_NMK]).astype(np.int32)
  expected = {"counts_NE": counts_NE, "dropped_N": np.zeros(len(counts_NE), np.int32)}
  integers = {name: getattr(actual[1], name) for name in expected}
  numbers, numbers_of_oracle = _by_name(actual), _by_name(oracle)
  # By a jitted function: of several processes each may hold a part of the arrays only.
  figures = jax.device_get(
    kernel_check.differences(integers | numbers, expected | numbers_of_oracle)
  )
  if figures["counts_NE"]:
    return "the router did not choose the experts that the routing names"
  if figures["dropped_N"]:
    return "rows were dropped although the buffers have room for all"
  limit = _limit(config)
  for name in numbers:
    if not figures[name] <= limit:
      return f"the {name} differs from the oracle's by {figures[name]:.1e} (limit {limit:.0e})"
  return None


def _by_name(result: tuple) -> dict[str, jax.Array]:
  """Returns output and gradients of what a program of `exchange_layer` returns, by their names."""
  y_NMD, _, (dparams, dx_NMD) = result
  parts = {
    jax.tree_util.keystr(path[1:], simple=True, separator="."): a
    for path, a in jax.tree.leaves_with_path(dparams)
  }
  gradients = {"x": dx_NMD} | parts
  return {"output": y_NMD} | {f"gradient of {name}": a for name, a in gradients.items()}


def _limit(config: ModelConfig) -> float:
  """Returns the largest difference allowed; TPUs multiply float32 as bfloat16."""
  if config.matmul_precision != "compute_dtype":
    return _LIMITS["fp8 experts"]
  if config.exchange.precision == "fp8":
    return _LIMITS["fp8 rows"]
  if jax.default_backend() == "tpu":
    return _LIMITS["bfloat16"]
  return _LIMITS[config.compute_dtype]
